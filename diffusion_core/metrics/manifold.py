"""Precision, recall, density and coverage: how the nearest-neighbour balls of two sets of features cover the other set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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

    real: (N, D), generated: (M, D); computed in float64. A ball includes its surface. Memory: ``block_size`` x max(N, M)
    distances. torch-fidelity and 1904.06991 use k = 3, 2002.09797 uses 5: state k beside the figure.

    Raises ValueError if the features are not two finite matrices of one width, or a set has no more than k samples.
    """
    real, generated = check_features(real), check_features(generated)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"the two sets have {real.shape[1]} and {generated.shape[1]} features: use one extractor for both"
        )
    smallest = min(len(real), len(generated))
    if not 1 <= neighbours < smallest:
        raise ValueError(f"neighbours must lie in 1 to {smallest - 1} for sets of {smallest} samples, got {neighbours}")
    centre = real.mean(axis=0)  # keeps the distances and loses fewer digits
    real_set, generated_set = torch.from_numpy(real - centre), torch.from_numpy(generated - centre)
    real_radius = _radii(real_set, neighbours, block_size)
    generated_radius = _radii(generated_set, neighbours, block_size)
    balls_of_generated, recalled, covered = [], [], []
    for _, distance in _distances(generated_set, real_set, block_size):
        balls_of_generated.append((distance <= real_radius).sum(dim=1))
    for rows, distance in _distances(real_set, generated_set, block_size):
        recalled.append((distance <= generated_radius).any(dim=1))
        covered.append((distance <= real_radius[rows, None]).any(dim=1))
    balls = torch.cat(balls_of_generated).double()
    return ManifoldScores(
        precision=float((balls > 0).double().mean()),
        recall=float(torch.cat(recalled).double().mean()),
        density=float(balls.mean()) / neighbours,
        coverage=float(torch.cat(covered).double().mean()),
    )


def _radii(samples: Tensor, neighbours: int, block_size: int) -> Tensor:
    """Return the (N,) distance of each sample to its k-th nearest other sample."""
    radii = []
    for rows, distance in _distances(samples, samples, block_size):
        distance[torch.arange(len(distance)), torch.arange(rows.start, rows.stop)] = float("inf")
        radii.append(distance.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _distances(first: Tensor, second: Tensor, block_size: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(first), block_size):
        rows = slice(start, min(start + block_size, len(first)))
        yield rows, torch.cdist(first[rows], second)
