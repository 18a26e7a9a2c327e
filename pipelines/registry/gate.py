"""The gate: may a candidate become the champion?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COMPARED = ("data_hash", "metric", "extractor_digest", "num_samples", "spacing", "guidance_scale", "eta", "steps")
"""What must be the same for two figures to be compared: data, extractor, sample count and sampler."""


@dataclass(frozen=True)
class Verdict:
    """Whether the alias moves to the candidate, and why."""

    promoted: bool
    reason: str


def differences(candidate: Mapping[str, Any], champion: Mapping[str, Any]) -> list[str]:
    """The keys of `COMPARED` in which two measurements differ; values are compared as text, as tags hold them."""
    return [key for key in COMPARED if str(candidate.get(key)) != str(champion.get(key))]


def judge(candidate: Mapping[str, Any], champion: Mapping[str, Any] | None) -> Verdict:
    """Compare two measurements (``fid`` and `COMPARED`); the champion's is None where there is no champion.

    The alias moves only to a lower FID, measured in the same way.
    """
    if champion is None:
        return Verdict(True, "there was no champion")
    different = differences(candidate, champion)
    if different:
        return Verdict(False, f"not comparable with the champion: they differ in {', '.join(different)}")
    new, old = float(candidate["fid"]), float(champion["fid"])
    setting = f"{candidate['metric']} at eta {candidate['eta']}, {candidate['steps']} steps, {candidate['num_samples']} samples"
    if new < old:
        return Verdict(True, f"better than the champion: {setting}: {new:.6g} against {old:.6g}")
    return Verdict(False, f"not better than the champion: {setting}: {new:.6g} against {old:.6g}")
