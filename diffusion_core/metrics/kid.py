"""Kernel Inception distance: the squared maximum mean discrepancy of two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusion_core.metrics.statistics import check_features


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation of the distance over random subsets."""

    mean: float
    std: float


def kernel_distance(
    first: np.ndarray, second: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """Return KID (arXiv 1801.01401, section 3): `squared_mmd` of ``subsets`` pairs of subsets without replacement.

    first: (N, D), second: (M, D); computed in float64. It is unbiased, so it may lie slightly below 0. Subsets are drawn in
    the same way as in torch-fidelity, so that the same seed gives the same figure.

    Raises ValueError if the features are not two finite matrices of the same width, or have fewer than ``subset_size`` rows.
    """
    first, second = check_features(first), check_features(second)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"the two sets have {first.shape[1]} and {second.shape[1]} features: use one extractor for both"
        )
    smallest = min(len(first), len(second))
    if subsets < 1 or not 2 <= subset_size <= smallest:
        raise ValueError(
            f"KID needs at least one subset of 2 to {smallest} samples (the smaller set), got {subsets} of {subset_size}: "
            "choose a smaller subset size or generate more samples"
        )
    generator = np.random.RandomState(seed)
    distances = [
        squared_mmd(
            first[generator.choice(len(first), subset_size, replace=False)],
            second[generator.choice(len(second), subset_size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)))


def squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Return the unbiased squared MMD with the kernel (x.y / D + 1)^3 (Gretton et al., JMLR 2012, eq. 3; arXiv 1801.01401, eq. 4).

    first: (N, D), second: (M, D) float64. Raises ValueError if a set has fewer than two rows.
    """
    n, m = len(first), len(second)
    if min(n, m) < 2:
        raise ValueError(f"the unbiased distance needs at least two samples of each set, got {n} and {m}")
    within_first, within_second = _kernel(first, first), _kernel(second, second)
    return float(
        (within_first.sum() - np.trace(within_first)) / (n * (n - 1))
        + (within_second.sum() - np.trace(within_second)) / (m * (m - 1))
        - 2.0 * _kernel(first, second).mean()
    )


def _kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first @ second.T / first.shape[1] + 1.0) ** 3
