"""Measurement of a model: labels, samples, features, statistics. Trials, the sweep and the gate use it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings, generate
from diffusion_core.metrics.frechet import frechet_distance
from diffusion_core.metrics.statistics import GaussianStatistics
from pipelines.measurement.labels import sample_labels
from pipelines.measurement.reference import Reference, finite_distance, num_agreeing

GROUPS = 8
"""Groups of samples (sample k is in group k modulo 8) that the jackknife leaves out in turn."""
GROUPED_FEATURES = 512
"""Largest number of features with separate groups. At 2048 the groups would take 8 x 32 MB per measurement."""


@dataclass(frozen=True)
class Measurement:
    """Statistics of samples, and the cost of sampling them.

    ``groups``: statistics per group of samples, k modulo their number; ``agreeing``: number of samples that the class
    network assigns to their label; ``seconds``: time spent in sampling, each block measured until its images are on the CPU, without
    loading the model and without the features; ``network_calls``: calls of the network, a batched call is one.
    """

    groups: tuple[GaussianStatistics, ...]
    agreeing: int
    seconds: float
    network_calls: int

    @property
    def statistics(self) -> GaussianStatistics:
        """Statistics of all samples."""
        return reduce(GaussianStatistics.merge, self.groups)

    @property
    def num_samples(self) -> int:
        return sum(group.n for group in self.groups)

    def merge(self, other: Measurement) -> Measurement:
        """Return the measurement of both sets of samples."""
        groups = tuple(a.merge(b) for a, b in zip(self.groups, other.groups, strict=True))
        calls = self.network_calls + other.network_calls
        return Measurement(groups, self.agreeing + other.agreeing, self.seconds + other.seconds, calls)


class CallCounter:
    """Count the calls of a network inside a ``with`` block."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.calls = 0

    def __enter__(self) -> CallCounter:
        self._handle = self.network.register_forward_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _count(self, *arguments: object) -> None:
        self.calls += 1


def measurement_rows(device_type: str) -> int:
    """Return the number of rows per network call, fixed per device type because it changes the last bits of an image.

    128 on a CPU, because the digits network is fastest per image from 96 rows; 256 on a GPU.
    """
    return 128 if device_type == "cpu" else 256


def num_groups(num_features: int) -> int:
    """Return the number of groups that a measurement keeps apart: `GROUPS`, or 1 for more than `GROUPED_FEATURES` features."""
    return GROUPS if num_features <= GROUPED_FEATURES else 1


@torch.inference_mode()
def measure(
    model: DiffusionModel,
    reference: Reference,
    indices: Tensor,
    settings: SamplerSettings,
    *,
    seed: int,
    rows_per_call: int,
    num_groups: int = 1,
) -> Measurement:
    """Sample ``indices`` ((N,) int64) with labels in the shares of the real images, and return their statistics.

    Sample k depends only on (seed, k), so the result does not depend on how the indices are shared out over workers, except for
    rounding. ``model`` and ``reference`` must lie on the same device. Holds the features of all indices in memory.
    """
    device = next(model.network.parameters()).device
    labels = torch.from_numpy(sample_labels(reference.description["class_counts"], indices.numpy(), seed))
    features: np.ndarray | None = None
    agreeing, seconds = 0, 0.0
    with CallCounter(model.network) as counter:
        blocks = generate(model, labels, indices, settings, seed=seed, block_size=rows_per_call)
        while True:
            started = time.perf_counter()
            block = next(blocks, None)
            seconds += time.perf_counter() - started
            if block is None:
                break
            positions, images = block[0], block[1].to(device)
            extracted = reference.extractor(images).double().cpu().numpy()
            if features is None:
                features = np.empty((len(indices), extracted.shape[1]))
            features[positions.numpy()] = extracted
            agreeing += num_agreeing(reference.classifier, images, labels[positions])
    assert features is not None, "measure needs at least one index"
    group_of = indices.numpy() % num_groups
    groups = (features[group_of == group] for group in range(num_groups))
    return Measurement(tuple(_statistics(group) for group in groups), agreeing, seconds, counter.calls)


def leave_one_out(groups: Sequence[GaussianStatistics], real: GaussianStatistics) -> list[float]:
    """Return the Frechet distance to ``real`` of all groups but one, for each group."""
    return [
        frechet_distance(reduce(GaussianStatistics.merge, (*groups[:left], *groups[left + 1 :])), real)
        for left in range(len(groups))
    ]


def jackknife_error(left_out: Iterable[float]) -> float:
    """Return the standard error sqrt((g - 1) / g sum (v_i - mean v)^2) of a figure, from its g values without one group each.

    Raises ValueError if there are fewer than two values, or one is not finite.
    """
    values = np.asarray(list(left_out), dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"the jackknife needs at least two finite figures, got {values.tolist()}")
    return float(np.sqrt((len(values) - 1) / len(values) * np.square(values - values.mean()).sum()))


def distance_with_error(measurement: Measurement, real: GaussianStatistics) -> tuple[float, float | None]:
    """Return the Frechet distance to ``real`` and its jackknife error, or None if there is one group.

    Raises ValueError if the distance is not finite.
    """
    distance = finite_distance(measurement.statistics, real, "samples")
    if len(measurement.groups) == 1 or min(group.n for group in measurement.groups) == 0:
        return distance, None
    return distance, jackknife_error(leave_one_out(measurement.groups, real))


def _statistics(features: np.ndarray) -> GaussianStatistics:
    if len(features) == 0:
        return GaussianStatistics.empty(features.shape[1])
    return GaussianStatistics.from_features(features)
