"""Progress of a training in the driver: lines on the terminal, rows and pictures in MLflow."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_core.storage import atomic_path
from pipelines.durations import minutes_and_seconds
from pipelines.tracking import Run

ROWS_PER_FLUSH = 10
LINES = 20

log = logging.getLogger("rediffuse")


class ProgressLog:
    """Log the rows of a training of ``steps`` steps to MLflow in batches, and about 20 of them on the terminal.

    Pictures are written into ``picture_dir`` and logged as artifacts.
    """

    def __init__(self, run: Run, steps: int, picture_dir: Path) -> None:
        self.run = run
        self.steps = steps
        self.picture_dir = picture_dir
        self.pending: list[dict[str, float]] = []
        self.shown = 0.0

    def on_row(self, row: dict[str, Any]) -> None:
        self.pending.append(row)
        if "images_per_s" not in row:  # a row of an earlier process
            return
        if len(self.pending) >= ROWS_PER_FLUSH:
            self.flush()
        if row["step"] - self.shown >= self.steps / LINES or row["step"] == self.steps:
            self.shown = row["step"]
            log.info(
                "step %d/%d  loss %.4f  lr %.2e  grad %.2f  %.0f images/s  ETA %s",
                row["step"], self.steps, row["loss"], row["learning_rate"], row["grad_norm"], row["images_per_s"], minutes_and_seconds(row["seconds_left"]),
            )  # fmt: skip

    def on_picture(self, step: int, picture: bytes) -> None:
        path = self.picture_dir / f"step_{step:08d}.png"
        with atomic_path(path) as temporary:
            temporary.write_bytes(picture)
        self.run.log_artifact(path, "samples")

    def flush(self, history: Sequence[dict[str, float]] = ()) -> None:
        """Log the pending rows. ``history``, all rows of the run, adds the rows and pictures that a kill has lost."""
        pending, self.pending = self.pending, []
        for rows in (pending, history):  # a run skips rows of earlier calls
            self.run.log_rows(
                [{"step": row["step"], **{f"train/{k}": v for k, v in row.items() if k != "step"}} for row in rows]
            )
        if history:
            self.run.log_missing_artifacts(sorted(self.picture_dir.glob("step_*.png")), "samples")
