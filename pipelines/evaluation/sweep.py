"""Sampler settings of the sweep, and its rows, suspicious cells and Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from diffusion_core.generation import SamplerSettings
from diffusion_core.metrics.statistics import GaussianStatistics
from pipelines.measurement.floor import Floor
from pipelines.measurement.measure import Measurement, distance_with_error


@dataclass(frozen=True)
class Row:
    """The result of one setting.

    ``fid_error``: the jackknife error of ``fid``, None if it is unknown; ``class_agreement``: the share of samples that show their
    label; ``images_per_s``: images sampled per second of one worker's time in sampling, without the model's loading and the features.
    """

    settings: SamplerSettings
    num_samples: int
    fid: float
    fid_error: float | None
    class_agreement: float
    images_per_s: float

    @property
    def name(self) -> str:
        """The setting, as files and MLflow runs are named after it."""
        return f"eta-{self.settings.eta}-steps-{self.settings.steps}"


def sweep_settings(
    etas: Sequence[float | Literal["sigma_hat"]], steps: Sequence[int], guidance_scale: float, spacing: str
) -> list[SamplerSettings]:
    """Return every eta with every number of steps."""
    return [SamplerSettings(count, eta, guidance_scale, spacing) for eta, count in product(etas, steps)]


def make_row(settings: SamplerSettings, measurement: Measurement, real: GaussianStatistics) -> Row:
    """Compare a measurement with the statistics of the real train images. Raises ValueError if the FID is not finite."""
    try:
        fid, error = distance_with_error(measurement, real)
    except ValueError as mistake:
        raise ValueError(f"eta {settings.eta}, {settings.steps} steps: {mistake}") from None
    return Row(
        settings=settings,
        num_samples=measurement.num_samples,
        fid=fid,
        fid_error=error,
        class_agreement=measurement.agreeing / measurement.num_samples,
        images_per_s=measurement.num_samples / max(measurement.seconds, 1e-9),
    )


def best_row(rows: Sequence[Row]) -> Row:
    """Return the row with the lowest FID, the first of equal ones. Raises ValueError if no FID is finite."""
    usable = [row for row in rows if math.isfinite(row.fid)]
    if not usable:
        raise ValueError("no setting of the sweep has a finite FID: train the model again")
    return min(usable, key=lambda row: row.fid)


def is_suspicious(row: Row, floor: Floor) -> bool:
    """Return True if the FID is below the floor by more than the error of their difference, so lower than that of real images.

    The error is sqrt(fid_error^2 + floor error^2), an unknown fid_error counts as 0. False if the floor's error is unknown.
    """
    if floor.error is None:
        return False
    return floor.value - row.fid > ((row.fid_error or 0.0) ** 2 + floor.error**2) ** 0.5


def pareto_front(rows: Sequence[Row]) -> list[bool]:
    """Return for each row whether no other row is at least as good in FID and speed, and better in one of them.

    A row without a finite FID is not on the front.
    """
    return [
        math.isfinite(row.fid)
        and not any(
            other.fid <= row.fid
            and other.images_per_s >= row.images_per_s
            and (other.fid < row.fid or other.images_per_s > row.images_per_s)
            for other in rows
            if math.isfinite(other.fid)
        )
        for row in rows
    ]
