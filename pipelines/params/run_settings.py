"""The schema of run.yaml: where and how the stages run. Nothing in it decides a result, so DVC does not track it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipelines.params.sections import (
    NAME,
    NonNegative,
    Positive,
    PositiveInt,
    Section,
    parse_section,
    read_yaml,
)

RUN_PATH = Path("run.yaml")
RUN_VARIABLE = "REDIFFUSE_RUN"

Auto = Literal["auto"]
Count = Annotated[PositiveInt | Auto, Field(description="a whole number of at least 1, or auto")]
CountOrNone = Annotated[Annotated[int, Field(ge=0)] | Auto, Field(description="a whole number of at least 0, or auto")]
Cpus = Annotated[Positive | Auto, Field(description="a number above 0, or auto")]
Gpus = Annotated[NonNegative | Auto, Field(description="a number of at least 0, or auto")]


class RayRun(Section):
    """The Ray cluster to join or start, and the storage its nodes share."""

    address: Annotated[str, Field(pattern=NAME)] | None = None
    num_cpus: Count = "auto"
    storage: Annotated[str, Field(pattern=NAME)] = "runs"


class TrackingRun(Section):
    """MLflow store and experiment. ``wait_minutes``: how long a stage waits at its end for a server that is away."""

    uri: Annotated[str, Field(pattern=NAME)] | None = None
    experiment: Annotated[str, Field(pattern=NAME)] = "rediffuse"
    wait_minutes: Positive = 30


class ReferenceRun(Section):
    """Run settings of the reference stage."""

    device: Literal["auto", "cpu", "cuda"] = "auto"


class TuneRun(Section):
    """Run settings of the search."""

    max_concurrent: Count = "auto"
    cpus_per_trial: Cpus = "auto"
    gpus_per_trial: Gpus = "auto"
    max_failures: CountOrNone = "auto"


class TrainRun(Section):
    """Run settings of training."""

    num_workers: Count = "auto"
    cpus_per_worker: Cpus = "auto"
    gpus_per_worker: Gpus = "auto"
    max_failures: CountOrNone = "auto"
    log_every: Count = "auto"
    checkpoint_every: Count = "auto"
    sample_every: Count = "auto"


class EvaluateRun(Section):
    """Run settings of the sweep."""

    max_concurrent: Count = "auto"
    cpus_per_task: Cpus = "auto"
    gpus_per_task: Gpus = "auto"
    max_retries: CountOrNone = "auto"


class RunSettings(Section):
    """All of run.yaml. A missing section or key is ``auto``.

    ``resume``: ``auto`` continues state of the same settings, inputs and code; ``force`` also continues state whose code has
    changed since, and the model's provenance says so. ``grace_seconds``: time that training gets after SIGTERM to save a checkpoint.
    """

    resume: Literal["auto", "force"] = "auto"
    grace_seconds: Positive = 25.0
    ray: RayRun = RayRun()
    tracking: TrackingRun = TrackingRun()
    reference: ReferenceRun = ReferenceRun()
    tune: TuneRun = TuneRun()
    train: TrainRun = TrainRun()
    evaluate: EvaluateRun = EvaluateRun()


MOVED_HERE = (
    "ray",
    "tracking",
    "tune.max_concurrent",
    "tune.cpus_per_trial",
    "tune.gpus_per_trial",
    "train.num_workers",
    "train.cpus_per_worker",
    "train.gpus_per_worker",
    "train.log_every",
    "train.checkpoint_every",
    "train.sample_every",
    "train.max_failures",
    "evaluate.cpus_per_task",
    "evaluate.gpus_per_task",
    "evaluate.max_retries",
)
"""Keys of older params.yaml files that have moved to the same place in run.yaml."""


def run_settings_path() -> Path:
    """Return the file that REDIFFUSE_RUN names, or run.yaml in the project."""
    return Path(os.environ.get(RUN_VARIABLE) or RUN_PATH)


def load_run_settings(path: Path | None = None) -> RunSettings:
    """Read and check run.yaml, or the file that REDIFFUSE_RUN names. Without a run.yaml everything is ``auto``.

    Raises ValueError with one line that names the key that is wrong, or the file that REDIFFUSE_RUN names and does not exist.
    """
    path = path or run_settings_path()
    if path == RUN_PATH and not path.exists():
        return RunSettings()
    tree = read_yaml(path)
    return parse_run_settings({} if tree is None else tree, str(path))


def parse_run_settings(tree: object, origin: str = "run.yaml") -> RunSettings:
    """Check a tree of plain values against the schema; a section without keys is all ``auto``."""
    if isinstance(tree, dict):
        tree = {
            key: {} if value is None and key not in ("resume", "grace_seconds") else value
            for key, value in tree.items()
        }
    return parse_section(RunSettings, tree, origin)
