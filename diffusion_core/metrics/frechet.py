"""The Fréchet distance between two Gaussians: FID, if the features come from an image network."""

from __future__ import annotations

import numpy as np

from diffusion_core.metrics.statistics import GaussianStatistics


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al., arXiv 1706.08500, eq. 6), in float64.

    The trace of the root is the sum of the singular values of A1^T A2, with C = A A^T by a symmetric eigen-decomposition. It
    stays real and accurate if a covariance lacks full rank (`GaussianStatistics.rank_deficient`: no more samples than
    features), whereas the eigenvalues of C1 C2 lose half of their digits. The result is then exact for the given statistics.
    As an estimate of the distance of the populations it is biased upwards; the bias grows as the samples get fewer.
    At least 0. Raises ValueError if the numbers of features differ, a set has fewer than two samples, or
    statistics are not finite.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"the two sets have {first.mean.shape[0]} and {second.mean.shape[0]} features: use one extractor for both"
        )
    for name, one in (("first", first), ("second", second)):
        if not (np.isfinite(one.mean).all() and np.isfinite(one.covariance).all()):
            raise ValueError(f"the {name} set's statistics hold NaN or infinity: so do its features")
    delta = first.mean - second.mean
    root = np.linalg.svd(_factor(first).T @ _factor(second), compute_uv=False).sum()
    distance = delta @ delta + np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * root
    return max(float(distance), 0.0)


def _factor(statistics: GaussianStatistics) -> np.ndarray:
    """Return A (D, D) such that A A^T is the covariance.

    n samples span n - 1 directions. The eigenvalues of the others are rounding errors and are set to 0, because their
    square roots would be many orders larger.
    """
    values, vectors = np.linalg.eigh(statistics.covariance)
    spare = values[: max(len(values) - (statistics.n - 1), 0)]
    spare[spare < len(values) * np.finfo(np.float64).eps * values[-1]] = 0.0
    return vectors * np.sqrt(values.clip(min=0.0))
