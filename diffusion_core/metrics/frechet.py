"""The Fréchet distance between two Gaussians: FID, once the features are those of an image network."""

from __future__ import annotations

import numpy as np

from diffusion_core.metrics.statistics import GaussianStatistics


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al., arXiv 1706.08500, eq. 6), in float64.

    The trace of the root is the sum of the singular values of A1^T A2, where C = A A^T by a symmetric eigen-decomposition:
    it stays real and accurate where a covariance has no full rank (`GaussianStatistics.rank_deficient`: no more samples
    than features), where the eigenvalues of C1 C2 lose half of their digits. Such a distance is that of the statistics
    given, exactly; as an estimate of the distance of the populations it is biased upwards, more so the fewer the samples.
    At least 0. Raises ValueError for different numbers of features, or fewer than two samples.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"the two sets have {first.mean.shape[0]} and {second.mean.shape[0]} features: use one extractor for both"
        )
    delta = first.mean - second.mean
    root = np.linalg.svd(_factor(first).T @ _factor(second), compute_uv=False).sum()
    distance = delta @ delta + np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * root
    return max(float(distance), 0.0)


def _factor(statistics: GaussianStatistics) -> np.ndarray:
    """A (D, D) with A A^T the covariance. n samples span n - 1 directions: what eigh finds in the others is rounding,
    whose square root would be many orders larger than itself, and is left out."""
    values, vectors = np.linalg.eigh(statistics.covariance)
    spare = values[: max(len(values) - (statistics.n - 1), 0)]
    spare[spare < len(values) * np.finfo(np.float64).eps * values[-1]] = 0.0
    return vectors * np.sqrt(values.clip(min=0.0))
