"""Precision, recall, density and coverage: how the nearest-neighbour balls of two sets of features cover the other set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion_core.checks import is_whole
from diffusion_core.metrics.statistics import check_features


@dataclass(frozen=True)
class ManifoldScores:
    """All scores lie in [0, 1], except density, which may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(
    real: np.ndarray, generated: np.ndarray, *, neighbours: int = 3, block_size: int = 2048
) -> ManifoldScores:
    """Measure fidelity and variety with a ball around each sample that reaches its k-th nearest neighbour of the same set.

    precision  share of generated samples inside some real ball       (arXiv 1904.06991, eq. 2)
    recall     share of real samples inside some generated ball       (arXiv 1904.06991, eq. 2)
    density    mean of the real balls around a generated sample / k   (arXiv 2002.09797, eq. 4)
    coverage   share of real balls that hold some generated sample    (arXiv 2002.09797, eq. 5)

    real: (N, D), generated: (M, D); computed in float64. A ball includes its surface, as in 1904.06991 and torch-fidelity. The
    ``prdc`` package of 2002.09797 leaves it out: a set against itself has density (k + 1) / k here and 1 there. A distance
    near a radius is computed from the differences of the features, so ties do not depend on rounding of larger numbers, on
    ``block_size`` or on the order of the samples. Memory: a few matrices of ``block_size`` x max(N, M). torch-fidelity and
    1904.06991 use k = 3, 2002.09797 uses 5: state k beside the figure.

    Raises ValueError if the features are not two finite matrices of one width, a set has no more than k samples, or a number is
    not whole.
    """
    real, generated = check_features(real), check_features(generated)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"the two sets have {real.shape[1]} and {generated.shape[1]} features: use one extractor for both"
        )
    smallest = min(len(real), len(generated))
    if not is_whole(block_size) or block_size < 1:
        raise ValueError(f"block_size must be a whole number of at least 1, got {block_size!r}")
    if not is_whole(neighbours) or not 1 <= neighbours < smallest:
        raise ValueError(f"neighbours must lie in 1 to {smallest - 1} for sets of {smallest} samples, got {neighbours}")
    centre = real.mean(axis=0)  # keeps the distances and loses fewer digits
    numbers: dict[bytes, int] = {}
    real_set, generated_set = (_Samples.of(features, centre, numbers) for features in (real, generated))
    real_radius = _radii(real_set, neighbours, block_size)
    generated_radius = _radii(generated_set, neighbours, block_size)
    balls_of_generated, recalled = [], []
    covered = torch.zeros(len(real), dtype=torch.bool)
    for part in generated_set.blocks(block_size):
        inside = _within(part, real_set, real_radius)
        balls_of_generated.append(inside.sum(dim=1))
        covered |= inside.any(dim=0)
    for part in real_set.blocks(block_size):
        recalled.append(_within(part, generated_set, generated_radius).any(dim=1))
    balls = torch.cat(balls_of_generated).double()
    return ManifoldScores(
        precision=float((balls > 0).double().mean()),
        recall=float(torch.cat(recalled).double().mean()),
        density=float(balls.mean()) / neighbours,
        coverage=float(covered.double().mean()),
    )


@dataclass(frozen=True)
class _Samples:
    """Features (N, D), the same minus a centre, the squared norms (N,) of those, and a number (N,) that only equal rows share."""

    features: Tensor
    centred: Tensor
    squares: Tensor
    number: Tensor

    @classmethod
    def of(cls, features: np.ndarray, centre: np.ndarray, numbers: dict[bytes, int]) -> _Samples:
        centred = torch.from_numpy(features - centre)
        digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in features + 0.0]  # -0.0 equals 0.0
        number = torch.tensor([numbers.setdefault(digest, len(numbers)) for digest in digests])
        return cls(torch.from_numpy(features), centred, centred.square().sum(dim=1), number)

    def blocks(self, size: int) -> list[_Samples]:
        columns = (self.features, self.centred, self.squares, self.number)
        return [_Samples(*part) for part in zip(*(column.split(size) for column in columns), strict=True)]


def _radii(samples: _Samples, neighbours: int, block_size: int) -> Tensor:
    """Return the (N,) exact distance of each sample to its k-th nearest other sample."""
    radii, start = [], 0
    for part in samples.blocks(block_size):
        squared, margin = _squared_distances(part, samples)
        own = torch.arange(len(squared))
        squared[own, own + start] = float("inf")
        # the k-th nearest sample is among those that may be nearer than the k-th largest possible distance
        furthest = (squared + margin).kthvalue(neighbours, dim=1).values
        rows, columns = torch.nonzero(squared - margin <= furthest[:, None], as_tuple=True)
        distances = torch.full_like(squared, float("inf"))
        distances[rows, columns] = _exact_distances(part, samples, rows, columns)
        radii.append(distances.kthvalue(neighbours, dim=1).values)
        start += len(squared)
    return torch.cat(radii)


def _within(points: _Samples, centres: _Samples, radius: Tensor) -> Tensor:
    """Return (M, N): whether each point lies inside the ball around each centre, or on its surface."""
    squared, margin = _squared_distances(points, centres)
    limit = radius.square()
    margin = margin + 1e-14 * limit
    inside = squared + margin < limit
    rows, columns = torch.nonzero((squared - margin <= limit) & ~inside, as_tuple=True)
    inside[rows, columns] = _exact_distances(points, centres, rows, columns) <= radius[columns]
    return inside


def _squared_distances(first: _Samples, second: _Samples) -> tuple[Tensor, Tensor]:
    """Return (M, N) squared distances by one matrix product, and a bound on the rounding error of each."""
    norms = first.squares[:, None] + second.squares
    if not bool(norms.isfinite().all()):
        raise ValueError("the features are too large: their squared distances overflow float64; scale both sets down")
    squared = norms - 2.0 * (first.centred @ second.centred.T)
    return squared, 4.0 * (first.centred.shape[1] + 8) * torch.finfo(torch.float64).eps * norms


def _exact_distances(first: _Samples, second: _Samples, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the distance of each pair from its differences: the same for the same two samples in any call and order."""
    distances = torch.zeros(len(rows), dtype=torch.float64)
    differ = torch.nonzero(first.number[rows] != second.number[columns]).flatten()
    for pairs in differ.split(max(1, 2**22 // max(1, first.features.shape[1]))):
        one, other = first.features[rows[pairs]][:, None], second.features[columns[pairs]][:, None]
        distances[pairs] = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist").flatten()
    return distances
