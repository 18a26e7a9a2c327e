from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import mlflow
import pytest

from pipelines.params import Tracking, load_params
from pipelines.tracking import Run, connect, find_runs, stage_run
from tests.conftest import ROOT, Project

POINTS = 200


@pytest.fixture
def here(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(project.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return project


def _log_points(folder: str, run_id: str, name: str) -> None:
    os.chdir(folder)
    client = connect(Tracking())
    run = Run(client, "1", run_id, {})
    for start in range(0, POINTS, 10):
        run.log_rows([{"step": step, name: float(step)} for step in range(start, start + 10)])


def test_two_processes_that_log_at_once_lose_no_metric(here: Project) -> None:
    client = connect(Tracking())
    run_id = client.create_run("1").info.run_id
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_log_points, args=(str(here.folder), run_id, name)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for name in ("a", "b"):
        points = client.get_metric_history(run_id, name)
        assert sorted(point.step for point in points) == list(range(POINTS))


def test_stage_that_starts_again_goes_on_with_its_run(here: Project) -> None:
    params = load_params()
    with pytest.raises(RuntimeError), stage_run(params, "train", "key", "data") as run:
        first = run.run_id
        run.log_rows([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
        run.child("part", {"x": 1})
        raise RuntimeError
    client = mlflow.MlflowClient(f"sqlite:///{here.folder / 'mlflow.db'}")
    assert client.get_run(first).info.status == "FAILED"
    with stage_run(params, "train", "key", "data") as run:
        assert run.run_id == first
        assert client.get_run(first).info.status == "RUNNING"
        run.log_rows([{"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}])
        run.child("part", {"x": 1}).finish()
    assert [(p.step, p.value) for p in client.get_metric_history(first, "loss")] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    everything = client.search_runs(["1"])
    assert len(everything) == 2
    assert {run.info.status for run in everything} == {"FINISHED"}


def test_run_that_a_kill_left_behind_is_ended_when_other_inputs_start(here: Project) -> None:
    params = load_params()
    with stage_run(params, "train", "old", "data") as run:
        pass
    run.client.update_run(run.run_id, status="RUNNING")  # as a SIGKILL leaves it
    with stage_run(params, "train", "new", "data"):
        assert run.client.get_run(run.run_id).info.status == "KILLED"


def test_every_run_carries_commit_stage_params_and_data_hash(here: Project) -> None:
    params = load_params()
    with stage_run(params, "evaluate", "key", "abc123") as run:
        child = run.child("eta-0", {"eta": 0.0})
        child.finish()
    commit = here.run("git", "rev-parse", "HEAD").strip()
    for run_id in (run.run_id, child.run_id):
        tags = run.client.get_run(run_id).data.tags
        assert tags["git_commit"] == commit
        assert tags["rediffuse.stage"] == "evaluate"
        assert tags["rediffuse.data_hash"] == "abc123"
    values = run.client.get_run(run.run_id).data.params
    assert values["evaluate.num_samples"] == str(params.evaluate.num_samples)
    assert values["seed"] == "0"
    assert not any(name.startswith("train.") for name in values), "only the params that the stage used"
    assert [found.info.run_id for found in find_runs(run.client, "1", {"mlflow.parentRunId": run.run_id})] == [
        child.run_id
    ]


def test_telemetry_is_off_before_mlflow_and_ray_are_imported(project: Project) -> None:
    code = (
        "from pipelines.stage import quiet_environment; quiet_environment(); import os;"
        "print(os.environ['MLFLOW_DISABLE_TELEMETRY'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    assert project.run(sys.executable, "-c", code).split() == ["true", "0"]
    assert "analytics = false" in (ROOT / ".dvc" / "config").read_text()


def test_artifacts_of_the_default_store_lie_in_the_project(here: Project) -> None:
    with stage_run(load_params(), "report", "key", "data") as run:
        Path("note.txt").write_text("x")
        run.log_artifact(Path("note.txt"))
    found = list(here.folder.glob("mlartifacts/**/note.txt"))
    assert len(found) == 1
