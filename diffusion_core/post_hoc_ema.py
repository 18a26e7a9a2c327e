"""Averages of weights made after training from saved power-function averages (arXiv 2312.02696, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion_core.ema import power_gamma


@dataclass(frozen=True)
class PowerSnapshot:
    """A power-function average after ``step`` updates: its relative width and its weights by name."""

    step: int
    sigma_rel: float
    weights: Mapping[str, Tensor]


def post_hoc_coefficients(steps: Sequence[int], sigma_rels: Sequence[float], step: int, sigma_rel: float) -> np.ndarray:
    """Return the (N,) float64 coefficients with which N snapshots best sum to the average of width ``sigma_rel`` at ``step``.

    The least-squares fit of profiles p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T], from their inner products
    (arXiv 2312.02696, section 3.2 and appendix C.3). The coefficients sum to 1, unlike the paper's: without this constraint
    the fit scales all weights down, by 6% for width 0.25 from 8 snapshots of widths 0.05 and 0.1.

    Raises ValueError if there are no snapshots, or ``step`` is before the first or after the last.
    """
    if len(steps) != len(sigma_rels) or not steps:
        raise ValueError(
            f"a post-hoc average needs snapshots and one width per snapshot, got {len(steps)} and {len(sigma_rels)}"
        )
    if not 0 < min(steps) <= step <= max(steps):
        raise ValueError(
            f"step must lie between the first snapshot's {min(steps)} and the last snapshot's {max(steps)}, got {step}"
        )
    ends, gammas = np.asarray(steps, dtype=np.float64), np.asarray([power_gamma(s) for s in sigma_rels])
    gram = _inner_product(ends[:, None], gammas[:, None], ends[None], gammas[None])
    wanted = _inner_product(ends, gammas, np.asarray(float(step)), np.asarray(power_gamma(sigma_rel)))
    # scale each profile to length 1: same fit, better conditioned
    length = np.sqrt(np.diag(gram))
    gram, wanted = gram / np.outer(length, length), wanted / length
    # the coefficients are solution / length: start from one solution whose coefficients sum to 1 and keep to those that do
    start = (1.0 / length) / np.square(1.0 / length).sum()
    basis = np.linalg.svd((1.0 / length)[None])[2][1:].T
    inner, pull = basis.T @ gram @ basis, basis.T @ (wanted - gram @ start)
    values, vectors = np.linalg.eigh(inner)
    kept = values > 1e-14 * len(
        steps
    )  # gram has a diagonal of 1; what is smaller is rounding, as between equal snapshots
    moved = vectors[:, kept] @ ((vectors[:, kept].T @ pull) / values[kept])
    coefficients = (start + basis @ moved) / length
    return coefficients / coefficients.sum()


def reconstruct_ema(snapshots: Sequence[PowerSnapshot], sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """Return the weights of the average of width ``sigma_rel`` after ``step`` (default: the last snapshot's step).

    Sums in float64 and returns the snapshots' own types; integer tensors come from the latest snapshot. Snapshots of two
    widths (0.05 and 0.1 in the paper), taken throughout the run, are enough for the widths between and near them.

    Raises ValueError as `post_hoc_coefficients` does, and if the snapshots belong to different networks.
    """
    if not snapshots:
        raise ValueError("a post-hoc average needs snapshots: save the averages during training")
    names = snapshots[0].weights.keys()
    if any(snapshot.weights.keys() != names for snapshot in snapshots):
        raise ValueError("the snapshots hold different weights: they must come from one network")
    latest = max(snapshots, key=lambda snapshot: snapshot.step)
    step = latest.step if step is None else step
    coefficients = post_hoc_coefficients(
        [snapshot.step for snapshot in snapshots], [snapshot.sigma_rel for snapshot in snapshots], step, sigma_rel
    )
    result = {}
    for name, value in latest.weights.items():
        if not value.is_floating_point():
            result[name] = value.clone()
            continue
        total = torch.zeros_like(value, dtype=torch.float64)
        for coefficient, snapshot in zip(coefficients, snapshots, strict=True):
            total += float(coefficient) * snapshot.weights[name].to(torch.float64)
        result[name] = total.to(value.dtype)
    return result


def _inner_product(end_a: np.ndarray, gamma_a: np.ndarray, end_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Return the integral of the product of two profiles, which overlap up to the earlier end."""
    end = np.minimum(end_a, end_b)
    ratio = (end / end_a) ** gamma_a * (end / end_b) ** gamma_b * end / (end_a * end_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio
