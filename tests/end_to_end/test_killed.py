"""kill -9 of the driver, of a worker, or of everything, during any stage; then the same command completes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import Project, kill_everything, make_project, wait_until

pytestmark = pytest.mark.slow

LONGER = {"train__steps": 60, "train__network__channels": 16}
LONGER_RUN = {"train": {"log_every": 2, "checkpoint_every": 5, "sample_every": 30}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project trained without a death: what killed runs must equal."""
    made = make_project(
        tmp_path_factory.mktemp("uninterrupted") / "project", run=LONGER_RUN, tune__enabled=False, **LONGER
    )
    for stage in ("prepare", "reference", "tune", "train"):
        made.stage(stage)
    yield made
    kill_everything(made)


@pytest.fixture
def ready(uninterrupted: Project, tmp_path: Path) -> Iterator[Project]:
    """A copy of the same project without its training and with an MLflow store of its own."""
    copy = tmp_path / "project"
    shutil.copytree(uninterrupted.folder, copy, symlinks=True)
    for name in ("artifacts/model", "runs/train", "mlartifacts"):
        shutil.rmtree(copy / name)
    (copy / "mlflow.db").unlink()
    made = Project(copy)
    yield made
    kill_everything(made)


def weights(project: Project) -> str:
    return hashlib.sha256((project.folder / "artifacts/model/model.safetensors").read_bytes()).hexdigest()


def last_checkpoint(project: Project) -> int:
    found = [int(path.parent.name[5:]) for path in project.folder.glob("runs/train/*/train/step_*/checkpoint.json")]
    return max(found, default=0)


def judged(text: str) -> set[str]:
    """The trials that a search's output says were judged."""
    return set(re.findall(r"(trial-\w+) \(.*at step \d+;", text))


def stage_process(started: psutil.Process, name: str) -> psutil.Process | None:
    for process in [started, *started.children(recursive=True)]:
        try:
            if process.name().startswith("python") and f"pipelines.{name}" in process.cmdline():
                return process
        except psutil.Error:
            continue
    return None


def running(driver: int, what: str) -> list[psutil.Process]:
    """The processes that a driver started, also through Ray, whose command line holds ``what``. Another test may run beside."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if what in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def runs_of(project: Project, stage: str) -> list:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    return client.search_runs(["1"], f"tags.`rediffuse.stage` = '{stage}'")


@pytest.mark.parametrize("victim", ["driver", "worker", "everything"])
def test_killed_training_ends_with_the_weights_of_an_uninterrupted_run(
    uninterrupted: Project, ready: Project, victim: str
) -> None:
    started = ready.start(sys.executable, "-m", "pipelines.train")
    at = wait_until(lambda: last_checkpoint(ready) >= 10 and last_checkpoint(ready), 180, "a checkpoint", ready)
    if victim == "driver":
        os.kill(started.pid, signal.SIGKILL)
    elif victim == "worker":
        running(started.pid, "ray::RayTrainWorker")[0].kill()
    else:
        kill_everything(ready)
    began = time.monotonic()
    if victim == "worker":
        assert started.wait(300) == 0, ready.output()[-4000:]
        text = ready.output()
    else:
        started.wait(30)
        assert not (ready.folder / "artifacts/model").exists()
        text = ready.stage("train", timeout=300)
    seconds = time.monotonic() - began
    resumed_at = int(re.search(r"resuming from the checkpoint of step (\d+)", text).group(1))
    print(f"{victim} killed after the checkpoint of step {at}: resumed from {resumed_at}, {seconds:.0f} s to the end")
    assert resumed_at >= at
    assert weights(ready) == weights(uninterrupted)
    runs = runs_of(ready, "train")
    assert [run.info.status for run in runs] == ["FINISHED"]
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{ready.folder / 'mlflow.db'}")
    steps = [point.step for point in client.get_metric_history(runs[0].info.run_id, "train/loss")]
    assert sorted(steps) == list(range(2, 61, 2)), "each logged step once, none lost"


def test_torn_checkpoint_and_torn_ray_state_are_skipped(uninterrupted: Project, ready: Project) -> None:
    started = ready.start(sys.executable, "-m", "pipelines.train")
    wait_until(lambda: last_checkpoint(ready) >= 15, 180, "three checkpoints", ready)
    kill_everything(ready)
    started.wait(30)
    newest = max(ready.folder.glob("runs/train/*/train/step_*"))
    tensors = newest / "checkpoint.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    for snapshot in ready.folder.glob("runs/train/*/train/*snapshot*.json"):
        snapshot.write_text(snapshot.read_text()[:40])
    text = ready.stage("train", timeout=300)
    assert "is torn" in text
    assert int(re.search(r"resuming from the checkpoint of step (\d+)", text).group(1)) < int(newest.name[5:])
    assert weights(ready) == weights(uninterrupted)


@pytest.mark.parametrize("victim", ["driver", "everything"])
def test_killed_search_does_not_run_finished_trials_again(tmp_path: Path, victim: str) -> None:
    made = make_project(
        tmp_path / "project",
        run={"tune": {"max_concurrent": 1}},
        tune__num_trials=4,
        tune__steps=16,
        tune__grace_steps=16,
    )
    try:
        made.stage("prepare")
        made.stage("reference")
        started = made.start(sys.executable, "-m", "pipelines.tune")
        wait_until(lambda: judged(made.output()), 240, "a judged trial", made)
        if victim == "driver":
            os.kill(started.pid, signal.SIGKILL)
        else:
            kill_everything(made)
        started.wait(30)
        before = judged(made.output())
        text = made.stage("tune", timeout=400)
        assert "resuming the search" in text
        again = judged(text)
        rows = (made.folder / "artifacts/search/trials.csv").read_text().splitlines()[1:]
        print(
            f"{victim} killed: {len(before)} trials had reported, {len(again)} reported afterwards, {len(rows)} in trials.csv"
        )
        assert len(rows) == 4
        assert not before & again, "a judged trial is not judged again"
        assert len(before | again) == 4
        children = [run for run in runs_of(made, "tune") if "mlflow.parentRunId" in run.data.tags]
        assert len(children) == 4
        assert {run.info.status for run in runs_of(made, "tune")} == {"FINISHED"}
    finally:
        kill_everything(made)


@pytest.mark.parametrize("victim", ["driver", "worker", "everything"])
def test_killed_sweep_does_not_repeat_finished_units(copied_project: Project, victim: str) -> None:
    project = copied_project
    project.change(evaluate__num_samples=96, evaluate__steps=[4, 400])
    units = lambda: set(project.folder.glob("runs/evaluate/*/*.safetensors"))  # noqa: E731
    old = units()
    fresh = lambda: units() - old  # noqa: E731
    started = project.start("dvc", "repro", "evaluate")
    wait_until(lambda: len(fresh()) >= 2, 240, "two finished units", project)
    kept = {path: path.stat().st_mtime_ns for path in fresh()}
    if victim == "driver":
        stage_process(psutil.Process(started.pid), "evaluate").kill()
    elif victim == "worker":
        workers = running(started.pid, "ray::_Computer")
        assert workers, "a unit runs"
        workers[0].kill()
    else:
        kill_everything(project)
    started.wait(300)
    text = project.output() if victim == "worker" else project.repro("evaluate", timeout=300)
    print(
        f"{victim} killed after {len(kept)} of {len(fresh())} units; "
        + (re.search(r"\d+ of \d+ units are finished", text) or [""])[0]
    )
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished units were repeated"
    assert "units are finished" in text
    if victim == "worker":
        assert "retry 1 of" in text
    assert len(json.loads((project.folder / "artifacts/evaluation/quality.json").read_text())["rows"]) == 4
    parents = [run for run in runs_of(project, "evaluate") if "mlflow.parentRunId" not in run.data.tags]
    assert {run.info.status for run in runs_of(project, "evaluate")} == {"FINISHED"}
    assert len(parents) == 2, "one run of the first sweep, one of this"


@pytest.mark.parametrize("stage", ["prepare", "reference", "register", "report"])
def test_stage_killed_at_any_moment_completes_when_started_again(copied_project: Project, stage: str) -> None:
    project = copied_project
    for delay in (1.5, 4.0):
        started = project.start("dvc", "repro", "-f", "-s", stage)
        time.sleep(delay)
        kill_everything(project)
        started.wait(30)
    project.repro("-f", "-s", stage)
    assert {run.info.status for run in runs_of(project, stage)} <= {"FINISHED"}
    leftovers = [
        path.name
        for path in (project.folder / "artifacts").iterdir()
        if path.name.startswith(".") and path.name != ".gitignore"
    ]
    assert leftovers == [], "half-written folders must not stay"
