"""Mean and covariance of feature vectors, in a form that can be merged over shards of samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from diffusion_core.checks import is_whole


@dataclass(frozen=True)
class GaussianStatistics:
    """Count, mean (D,) and scatter (D, D), the sum of outer products of deviations from the mean; float64.

    Raises ValueError if the count is negative or the shapes do not fit.
    """

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    def __post_init__(self) -> None:
        if self.n < 0 or self.mean.ndim != 1 or self.scatter.shape != (len(self.mean), len(self.mean)):
            raise ValueError(
                f"statistics must be a count, a mean (D,) and a scatter (D, D), got {self.n}, {self.mean.shape} and {self.scatter.shape}"
            )

    @classmethod
    def empty(cls, num_features: int) -> GaussianStatistics:
        """Return statistics of no samples, which change nothing in a merge."""
        return cls(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    @classmethod
    def from_features(cls, features: np.ndarray) -> GaussianStatistics:
        """Return the statistics of (N, D) features, N at least 1. Raises ValueError if a feature is not finite."""
        features = check_features(features)
        mean = features.mean(axis=0)
        deviations = features - mean
        return cls(len(features), mean, deviations.T @ deviations)

    @classmethod
    def from_moments(cls, mean: np.ndarray, covariance: np.ndarray, n: int) -> GaussianStatistics:
        """Return the statistics with a published mean (D,) and unbiased covariance (D, D) of ``n`` samples.

        These are ``mu`` and ``sigma`` of the files of FID tools, with ``numpy.cov``'s divisor n - 1. Raises ValueError if n is
        below 2, the shapes do not fit, a value is not finite, or the covariance is not symmetric with eigenvalues of at least 0.
        """
        mean, covariance = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
        if not is_whole(n) or n < 2:
            raise ValueError(
                f"a covariance needs the number of samples behind it, a whole number of at least 2, got {n!r}"
            )
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"moments must be a mean (D,) and a covariance (D, D), got {mean.shape} and {covariance.shape}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("the mean or the covariance holds NaN or infinity")
        scale = float(np.abs(covariance).max(initial=0.0))
        if not np.allclose(covariance, covariance.T, rtol=0.0, atol=1e-5 * scale):
            raise ValueError("a covariance is symmetric, and this matrix is not: is it another statistic?")
        covariance = (covariance + covariance.T) / 2.0
        if len(mean) and np.linalg.eigvalsh(covariance)[0] < -1e-5 * scale * len(mean):
            raise ValueError(
                "a covariance has no negative eigenvalue, and this matrix has one: is it another statistic?"
            )
        return cls(int(n), mean, covariance * (n - 1))

    def merge(self, other: GaussianStatistics) -> GaussianStatistics:
        """Return the statistics of both sets together (Chan, Golub and LeVeque, 1979, eq. 2.1, for vectors); commutes bit for bit."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge statistics of {self.mean.shape[0]} and {other.mean.shape[0]} features")
        if self.n == 0 or other.n == 0:
            return other if self.n == 0 else self
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = self.mean * (self.n / n) + other.mean * (other.n / n)
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.n * other.n / n)
        return GaussianStatistics(n, mean, scatter)

    @property
    def rank_deficient(self) -> bool:
        """True if the number of samples is at most the number of features, so the covariance lacks full rank."""
        return self.n <= len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, scatter / (n - 1). Raises ValueError if there are fewer than two samples."""
        if self.n < 2:
            raise ValueError("a covariance needs at least two samples")
        return self.scatter / (self.n - 1)


def merge_statistics(parts: Iterable[GaussianStatistics]) -> GaussianStatistics:
    """Merge all parts, in a sorted order, so that the result is bit-identical for any order. Raises ValueError without parts."""
    merged: GaussianStatistics | None = None
    for part in sorted(parts, key=lambda part: (part.n, part.mean.tolist(), float(np.trace(part.scatter)))):
        merged = part if merged is None else merged.merge(part)
    if merged is None:
        raise ValueError("no statistics to merge")
    return merged


def check_features(features: np.ndarray) -> np.ndarray:
    """Return (N, D) features as float64. Raises ValueError unless they are a finite matrix of at least one row."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 1:
        raise ValueError(f"features must be a matrix (N, D) with at least one row, got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity: the images or the weights of the extractor are broken")
    return features
