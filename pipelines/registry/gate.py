"""The gate that decides if a candidate becomes the champion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.measurement.notice import MARK

COMPARED = (
    "data_hash",
    "metric",
    "extractor_digest",
    "num_samples",
    "spacing",
    "guidance_scale",
    "eta",
    "steps",
    "seed",
    "measured_by",
)
"""Keys that must agree before two figures are compared: data, extractor, sample count, sampler, seed and measuring code."""
RECORDED = ("rows_per_call", "device_type", "classifier_digest")
"""Keys that a measurement also holds. They change an FID only by rounding, or not at all."""


NOTICE = "few_images"
"""Key of the notice of `pipelines.measurement.notice`; a measurement of enough images has none."""


@dataclass(frozen=True)
class Verdict:
    """Whether the alias moves to the candidate, and why."""

    promoted: bool
    reason: str


def differences(candidate: Mapping[str, Any], champion: Mapping[str, Any]) -> list[str]:
    """Return the keys of `COMPARED` in which two measurements differ. Values are compared as text, as tags hold them."""
    return [key for key in COMPARED if str(candidate.get(key)) != str(champion.get(key))]


def judge(candidate: Mapping[str, Any], champion: Mapping[str, Any] | None) -> Verdict:
    """Compare two measurements: ``fid``, ``fid_error`` (one standard error, or None) and `COMPARED`. Without a champion pass None.

    The alias moves only to a lower FID that was measured in the same way. The errors do not change the rule; the reason states them.
    A candidate whose FID is not finite never becomes the champion; a champion whose FID is not finite gives way to any other.
    """
    new = float(candidate["fid"])
    if not math.isfinite(new):
        return Verdict(
            False, f"refused: the candidate's {candidate['metric']} is not finite ({new}); evaluate it again"
        )
    if champion is None:
        return Verdict(True, "there is no champion to beat")
    different = differences(candidate, champion)
    if different:
        return Verdict(False, f"not comparable with the champion: they differ in {', '.join(different)}")
    old = float(champion["fid"])
    if not math.isfinite(old):
        return Verdict(
            True, f"the champion's {candidate['metric']} is not finite ({old}), the candidate's is {new:.6g}"
        )
    new_error, old_error = measured_error(candidate), measured_error(champion)
    setting = f"{candidate['metric']} at eta {candidate['eta']}, {candidate['steps']} steps, {candidate['num_samples']} samples"
    figures = f"{setting}: {_figure(new, new_error)} against {_figure(old, old_error)}"
    if new_error is not None and old_error is not None and abs(new - old) <= math.hypot(new_error, old_error):
        figures += f"; the difference is within its error ({math.hypot(new_error, old_error):.2g})"
    if candidate.get(NOTICE):
        figures += f"; {MARK}"
    promoted = new < old
    return Verdict(promoted, f"{'better' if promoted else 'not better'} than the champion: {figures}")


def measured_error(measurement: Mapping[str, Any]) -> float | None:
    """Return the FID's error, or None if it is unknown or not finite. Tags hold it as text."""
    error = measurement.get("fid_error")
    return None if error in (None, "None") or not math.isfinite(float(error)) else float(error)


def _figure(fid: float, error: float | None) -> str:
    return f"{fid:.6g}" + ("" if error is None else f" ± {error:.2g}")
