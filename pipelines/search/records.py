"""Records of the search: the choice that a trial tries, and its results."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass

FAILED_FID = 1e9
"""Quick FID of a diverged trial: finite, and larger than any real FID."""


@dataclass(frozen=True)
class Choice:
    """The settings that a trial uses in place of train's own."""

    schedule: str
    objective: str
    weighting: str
    learning_rate: float

    @property
    def name(self) -> str:
        """The trial's name in trials.csv, in MLflow and on disk: a hash of its settings, the same in every search."""
        text = "/".join(f"{name}={value}" for name, value in sorted(asdict(self).items()))
        return f"trial-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def __str__(self) -> str:
        return f"{self.name} ({self.schedule}, {self.objective}, {self.weighting}, {self.learning_rate:.2e})"


@dataclass(frozen=True)
class TrialResult:
    """A trial judged at a rung, after ``step`` training steps.

    ``leave_one_out``: the quick FID without each of the fixed groups of sample indices, in the order of the groups; empty for
    a diverged trial, whose ``fid`` is `FAILED_FID` and whose ``reason`` says what was not finite. A result with NaN or infinity
    becomes that of a diverged trial, so no comparison ever sees one. ``loss`` is for display only: losses of different objectives
    and schedules cannot be compared.
    """

    step: int
    fid: float
    leave_one_out: tuple[float, ...] = ()
    loss: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        figures = {"quick FID": [self.fid], "error of the quick FID": self.leave_one_out, "loss": [self.loss or 0.0]}
        broken = [name for name, values in figures.items() if not all(map(math.isfinite, values))]
        if broken or self.fid >= FAILED_FID:
            failed = {"fid": FAILED_FID, "leave_one_out": (), "loss": None}
            if broken and not self.reason:
                failed["reason"] = f"{', '.join(broken)} not finite"
            for name, value in failed.items():
                object.__setattr__(self, name, value)

    @property
    def diverged(self) -> bool:
        return self.fid >= FAILED_FID


@dataclass(frozen=True)
class Trial:
    """A trial of the search with its result at the last rung that judged it. Numbers count proposals from 0."""

    number: int
    choice: Choice
    result: TrialResult
