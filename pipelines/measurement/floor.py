"""The floor: the FID of as many real images as there are samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations

import numpy as np

from diffusion_core.metrics.statistics import GaussianStatistics
from pipelines.measurement.measure import jackknife_error
from pipelines.measurement.reference import finite_distance

GROUPS = 8
SUBSETS = 8


@dataclass(frozen=True)
class Floor:
    """FID of ``num_samples`` real images against the train images.

    ``error``: the standard deviation of one such figure, None if there are too few images; ``num_images``: number of test images
    used; ``extrapolated``: True if they were fewer than ``num_samples``.
    """

    value: float
    error: float | None
    num_samples: int
    num_images: int
    extrapolated: bool

    @property
    def smallest_set(self) -> int:
        """The number of images in the smallest sets whose FID the value comes from: subsets, halves, or all images."""
        if self.num_images >= 2 * self.num_samples:
            return self.num_samples
        return self.num_images if self.num_images < 4 * GROUPS else self.num_images // 2


def floor_at(
    test_features: np.ndarray, test_labels: np.ndarray, train: GaussianStatistics, num_samples: int, seed: int
) -> Floor:
    """Return the FID that ``num_samples`` real images would have against ``train``.

    test_features: (M, D), M at least 2; test_labels: (M,) integers. FID is biased upwards by b / N, so figures of different sample
    counts N cannot be compared (arXiv 1911.07023). With at least 2 N test images, the floor is the mean FID of 8 random subsets of
    N images, and its error their standard deviation. With fewer, it is the line a + b / N through the FID of all images and the
    mean FID of halves of them, as in section 3 there; its error is the jackknife over 8 groups of images. The halves are the 14
    sets of four groups of the block design 3-(8, 4, 1), so each group is absent from seven of them. Fewer than 32 test images are
    too few for groups: the floor is the FID of all of them, with ``num_samples`` their number and no error. ``seed`` draws the subsets and
    groups. All of them have the class shares of the test images, as samples have those of the train images: otherwise small subsets
    would differ in their shares too, and FID would not follow the line.

    This takes 8 or 23 Frechet distances: a few milliseconds each for 64 features, a few seconds each for 2048. If half of the images
    are not more than the features, the covariances are singular and the law a + b / N fails: the error is None.
    """
    images = len(test_features)
    rng = np.random.default_rng(seed)
    if images >= 2 * num_samples:
        subsets = [_by_class(test_labels, rng)[_evenly(num_samples, images, rng)] for _ in range(SUBSETS)]
        values = [_distance(GaussianStatistics.from_features(test_features[subset]), train) for subset in subsets]
        return Floor(float(np.mean(values)), float(np.std(values, ddof=1)), num_samples, images, extrapolated=False)
    if images < 4 * GROUPS:
        value = _distance(GaussianStatistics.from_features(test_features), train)
        return Floor(value, None, images, images, extrapolated=False)
    extrapolated = images < num_samples
    order = _by_class(test_labels, rng)
    groups = [GaussianStatistics.from_features(test_features[order[group::GROUPS]]) for group in range(GROUPS)]
    whole = _distance(_merged(groups, range(GROUPS)), train)
    halves = {half: _distance(_merged(groups, half), train) for half in balanced_halves()}
    value = max(_on_line(num_samples, (images, whole), (images / 2, float(np.mean(list(halves.values()))))), 0.0)
    if images // 2 <= test_features.shape[1]:
        return Floor(value, None, num_samples, images, extrapolated)
    left_out = []
    for left in range(GROUPS):
        most = _distance(_merged(groups, [group for group in range(GROUPS) if group != left]), train)
        half = float(np.mean([distance for members, distance in halves.items() if left not in members]))
        left_out.append(_on_line(num_samples, (images * (GROUPS - 1) / GROUPS, most), (images / 2, half)))
    return Floor(value, jackknife_error(left_out), num_samples, images, extrapolated)


def balanced_halves() -> list[tuple[int, ...]]:
    """Return 14 sets of four of the groups 0 to 7, so that every three groups are together in exactly one of them.

    They are the affine planes of the cube: the sets whose numbers, as bits, cancel under exclusive or.
    """
    return [four for four in combinations(range(GROUPS), 4) if reduce(int.__xor__, four) == 0]


def _on_line(num_samples: int, first: tuple[float, float], second: tuple[float, float]) -> float:
    """a + b / num_samples through two points (N, FID)."""
    (n1, y1), (n2, y2) = first, second
    b = (y2 - y1) / (1.0 / n2 - 1.0 / n1)
    return y1 + b * (1.0 / num_samples - 1.0 / n1)


def _distance(statistics: GaussianStatistics, train: GaussianStatistics) -> float:
    return finite_distance(statistics, train, "real test images")


def _merged(groups: Sequence[GaussianStatistics], members: Sequence[int]) -> GaussianStatistics:
    return reduce(GaussianStatistics.merge, (groups[member] for member in members))


def _by_class(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices sorted by label, in random order within a label: evenly spaced ones have the shares of the labels."""
    shuffled = rng.permutation(len(labels))
    return shuffled[np.argsort(labels[shuffled], kind="stable")]


def _evenly(count: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` evenly spaced positions below ``total``, at least twice as large, with a random start."""
    return ((np.arange(count) + rng.uniform()) * total / count).astype(np.int64)
