"""SIGTERM, as Slurm, Kubernetes and spot nodes send it: a checkpoint, MLflow runs that end as KILLED, exit status 143; then resume."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.conftest import Project, kill_everything, make_project, wait_until
from tests.end_to_end.test_killed import judged, last_checkpoint, runs_of, stage_process, weights

pytestmark = pytest.mark.slow

LONG = {"train__steps": 240, "train__network__channels": 16, "tune__enabled": False}
RUN = {"train": {"log_every": 2, "checkpoint_every": 10_000, "sample_every": 10_000, "num_workers": 2}}
"""Without a signal the only checkpoint is that of the last step."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    made = make_project(tmp_path_factory.mktemp("terminated") / "project", run=RUN, **LONG)
    for stage in ("prepare", "reference", "tune"):
        made.stage(stage)
    yield made
    kill_everything(made)


def own_lines(text: str) -> str:
    """The driver's lines. Another Ray on this machine makes Ray's own actors print tracebacks."""
    return "\n".join(line for line in text.splitlines() if "pid=" not in line)


def step_logged(project: Project) -> int:
    return max((int(step) for step in re.findall(r"train: step (\d+)/", project.output())), default=0)


def test_sigterm_saves_a_checkpoint_of_training_and_the_resumed_run_has_the_same_weights(prepared: Project) -> None:
    started = prepared.start(sys.executable, "-m", "pipelines.train")
    wait_until(lambda: step_logged(prepared) >= 12, 180, "a logged step", prepared)
    assert last_checkpoint(prepared) == 0
    os.kill(started.pid, signal.SIGTERM)
    began = time.monotonic()
    assert started.wait(60) == 143, prepared.output()[-4000:]
    text = prepared.output()
    print(f"ended {time.monotonic() - began:.1f} s after SIGTERM")
    saved = int(re.search(r"SIGTERM: the checkpoint of step (\d+) is saved", text).group(1))
    assert text.rstrip().endswith("train: stopped by SIGTERM; run the same command again to resume")
    assert "Traceback" not in own_lines(text)
    assert 12 <= saved < 240
    assert last_checkpoint(prepared) == saved
    assert not (prepared.folder / "artifacts/model").exists()
    assert [run.info.status for run in runs_of(prepared, "train")] == ["KILLED"]

    # the group of `dvc repro` gets the signal, as from a batch script: DVC and the stage, but not the Ray that the stage started
    (prepared.folder / "command.log").unlink()
    started = prepared.start("dvc", "repro", "-s", "train")
    wait_until(lambda: step_logged(prepared) >= saved + 12, 180, "a logged step", prepared)
    stage = stage_process(psutil.Process(started.pid), "train")
    assert stage is not None
    os.killpg(started.pid, signal.SIGTERM)
    wait_until(lambda: not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE, 60, "the end", prepared)
    started.wait(30)
    text = prepared.output()
    assert f"resuming from the checkpoint of step {saved}" in text
    second = int(re.search(r"SIGTERM: the checkpoint of step (\d+) is saved", text).group(1))
    assert saved < second == last_checkpoint(prepared)
    assert [run.info.status for run in runs_of(prepared, "train")] == ["KILLED"]

    text = prepared.stage("train")
    assert f"resuming from the checkpoint of step {second}" in text
    assert [run.info.status for run in runs_of(prepared, "train")] == ["FINISHED"]
    twice = weights(prepared)
    whole = make_copy_without_training(prepared)
    whole.stage("train")
    assert twice == weights(whole)
    kill_everything(whole)


def make_copy_without_training(project: Project) -> Project:
    import shutil

    copy = project.folder.parent / "whole"
    shutil.copytree(
        project.folder, copy, symlinks=True, ignore=lambda folder, names: {"train", "model", "mlflow.db"} & set(names)
    )
    return Project(copy)


@pytest.mark.parametrize("stage", ["tune", "evaluate"])
def test_sigterm_ends_the_search_and_the_sweep_with_143_and_both_resume(copied_project: Project, stage: str) -> None:
    project = copied_project
    if stage == "tune":
        project.change(tune__enabled=True, tune__num_trials=4, tune__steps=17, tune__grace_steps=17)
        project.change_run(tune__max_concurrent=1)
        first = lambda: judged(project.output())  # noqa: E731
    else:
        project.change(evaluate__num_samples=96, evaluate__steps=[4, 400])
        old = set(project.folder.glob("runs/evaluate/*/*.safetensors"))
        first = lambda: set(project.folder.glob("runs/evaluate/*/*.safetensors")) - old  # noqa: E731
    started = project.start(sys.executable, "-m", f"pipelines.{stage}")
    wait_until(lambda: bool(first()), 240, "a first result", project)
    os.kill(started.pid, signal.SIGTERM)
    assert started.wait(60) == 143, project.output()[-4000:]
    text = project.output()
    assert text.rstrip().endswith(f"{stage}: stopped by SIGTERM; run the same command again to resume")
    assert "Traceback" not in own_lines(text)
    statuses = [run.info.status for run in runs_of(project, stage)]
    assert "KILLED" in statuses
    assert "RUNNING" not in statuses
    text = project.stage(stage)
    assert "resuming" in text
    assert {run.info.status for run in runs_of(project, stage)} == {"FINISHED"}
