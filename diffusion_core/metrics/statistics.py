"""Mean and covariance of feature vectors as sums that shards of samples can be merged from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GaussianStatistics:
    """Count, mean (D,) and scatter (D, D), the sum of outer products of deviations from the mean; float64."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def from_features(cls, features: np.ndarray) -> GaussianStatistics:
        """Statistics of (N, D) features, N at least 1. Raises ValueError where a feature is not finite."""
        features = check_features(features)
        mean = features.mean(axis=0)
        deviations = features - mean
        return cls(len(features), mean, deviations.T @ deviations)

    def merge(self, other: GaussianStatistics) -> GaussianStatistics:
        """Statistics of both sets together (Chan, Golub and LeVeque, 1979, eq. 2.1, for vectors)."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge statistics of {self.mean.shape[0]} and {other.mean.shape[0]} features")
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.n / n)
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.n * other.n / n)
        return GaussianStatistics(n, mean, scatter)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few samples for a covariance of full rank: at most as many as features."""
        return self.n <= len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, scatter / (n - 1); needs two samples."""
        if self.n < 2:
            raise ValueError("a covariance needs at least two samples")
        return self.scatter / (self.n - 1)


def merge_statistics(parts: Iterable[GaussianStatistics]) -> GaussianStatistics:
    """All parts as one, merged in the order given: the same order gives the same bits, any other the same to rounding."""
    merged: GaussianStatistics | None = None
    for part in parts:
        merged = part if merged is None else merged.merge(part)
    if merged is None:
        raise ValueError("no statistics to merge")
    return merged


def check_features(features: np.ndarray) -> np.ndarray:
    """(N, D) features as float64. Raises ValueError unless they are a matrix of at least one row, all finite."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 1:
        raise ValueError(f"features must be a matrix (N, D) with at least one row, got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity: the images or the extractor's weights are broken")
    return features
