from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Metric

from pipelines.params import TrackingRun
from pipelines.stage import quiet_environment
from pipelines.tracking import (
    Run,
    changed_store,
    connect,
    connect_to_read,
    find_runs,
    registry_uri,
    stage_run,
    tracking_uri,
    without_credentials,
)
from pipelines.workspace import project_root, workspace_id
from tests.conftest import ROOT

POINTS = 200
LOCAL = TrackingRun()
TAGS = {"rediffuse.data_hash": "abc123"}


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the experiment: MLflow takes seconds to create one."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")
        patch.setenv("MLFLOW_REGISTRY_URI", "")
        patch.chdir(folder)
        connect(LOCAL)
    return folder / "mlflow.db"


@pytest.fixture
def here(new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project that has not run yet, which is the working folder."""
    shutil.copy(new_store, tmp_path / "mlflow.db")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")  # MLflow sets both, and this restores them after the test
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _log_points(folder: str, run_id: str, name: str) -> None:
    os.chdir(folder)
    client = connect(LOCAL)
    run = Run(client, "1", run_id, {})
    for start in range(0, POINTS, 10):
        run.log_rows([{"step": step, name: float(step)} for step in range(start, start + 10)])


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t.invalid", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def test_two_processes_that_log_at_once_lose_no_metric(here: Path) -> None:
    client = connect(LOCAL)
    run_id = client.create_run("1").info.run_id
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_log_points, args=(str(here), run_id, name)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for name in ("a", "b"):
        points = client.get_metric_history(run_id, name)
        assert sorted(point.step for point in points) == list(range(POINTS))


def test_restarted_stage_continues_its_run(here: Path) -> None:
    with pytest.raises(RuntimeError), stage_run(LOCAL, "train", "key", settings={"a": 1}, tags=TAGS) as run:
        first = run.run_id
        run.log_rows([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
        run.child("part", {"x": 1})
        raise RuntimeError
    client = mlflow.MlflowClient(f"sqlite:///{here / 'mlflow.db'}")
    assert client.get_run(first).info.status == "FAILED"
    with stage_run(LOCAL, "train", "key", settings={"a": 1}, tags=TAGS) as run:
        assert run.run_id == first
        assert client.get_run(first).info.status == "RUNNING"
        run.log_rows([{"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}])
        run.child("part", {"x": 1}).finish()
    assert [(p.step, p.value) for p in client.get_metric_history(first, "loss")] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    everything = client.search_runs(["1"])
    assert len(everything) == 2
    assert {run.info.status for run in everything} == {"FINISHED"}


def test_run_with_other_settings_is_not_continued(here: Path) -> None:
    """MLflow cannot change a param: a continued run would show the old settings."""
    seen = {}
    for trials in (6, 8, 6):
        with stage_run(LOCAL, "tune", "key", settings={"tune.num_trials": trials}, tags=TAGS) as run:
            child = run.child("trial", {"x": 1})
            shown_value = run.client.get_run(run.run_id).data.params["tune.num_trials"]
            assert shown_value == str(trials)
            assert run.client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == run.run_id
        seen.setdefault(trials, set()).add(run.run_id)
    assert all(len(ids) == 1 for ids in seen.values()) and seen[6] != seen[8]


def test_run_that_a_kill_left_behind_ends_when_other_inputs_start(here: Path) -> None:
    with stage_run(LOCAL, "train", "old", settings={}, tags=TAGS) as run:
        child = run.child("part", {})
    for run_id in (run.run_id, child.run_id):
        run.client.update_run(run_id, status="RUNNING")  # as a SIGKILL leaves it
    with stage_run(LOCAL, "train", "new", settings={}, tags=TAGS) as other:
        assert {run.client.get_run(run_id).info.status for run_id in (run.run_id, child.run_id)} == {"KILLED"}
        assert run.client.get_run(other.run_id).info.status == "RUNNING"


def test_every_run_carries_commit_stage_and_tags_and_the_settings_that_were_used(here: Path) -> None:
    _git("init", "-q")
    _git("commit", "-q", "--allow-empty", "-m", "x")
    commit = _git("rev-parse", "HEAD")
    settings = {
        "train.learning_rate": 0.0038,
        "train.diffusion.schedule": "sigmoid",
        "train.network.multipliers": [1, 2],
    }
    with stage_run(LOCAL, "train", "key", settings=settings, tags={**TAGS, "precision": "bf16"}) as run:
        child = run.child("part", {"eta": 0.0})
        child.finish()
    for run_id in (run.run_id, child.run_id):
        tags = run.client.get_run(run_id).data.tags
        assert tags["git_commit"] == tags["mlflow.source.git.commit"] == commit
        assert tags["rediffuse.stage"] == "train"
        assert tags["rediffuse.data_hash"] == "abc123"
        assert tags["precision"] == "bf16"
    assert run.client.get_run(run.run_id).data.params == {key: str(value) for key, value in settings.items()}
    assert mlflow.artifacts.load_dict(f"runs:/{run.run_id}/params.json") == settings
    found = find_runs(run.client, "1", {"mlflow.parentRunId": run.run_id})
    assert [each.info.run_id for each in found] == [child.run_id]


def test_commit_says_if_a_tracked_file_was_changed(here: Path) -> None:
    def commit_of(key: str) -> str:
        with stage_run(LOCAL, "train", key, settings={}, tags=TAGS) as run:
            tags = run.client.get_run(run.run_id).data.tags
        assert tags["mlflow.source.git.commit"] == sha
        return tags["git_commit"]

    _git("init", "-q")
    for name in ("code.py", "metrics/train.json", "plots/train.csv", "dvc.lock"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("1")
    _git("add", "code.py", "metrics", "plots", "dvc.lock")
    _git("commit", "-q", "-m", "x")
    sha = _git("rev-parse", "HEAD")
    Path("notes.txt").write_text("not tracked")
    assert commit_of("clean") == sha
    for name in ("metrics/train.json", "plots/train.csv"):
        Path(name).unlink()  # DVC removes outputs before it runs a stage
    Path("dvc.lock").write_text("2")
    assert commit_of("outputs") == sha
    Path("code.py").write_text("2")
    assert commit_of("dirty") == f"{sha}-dirty"


def test_metric_history_is_read_once_however_often_rows_are_logged(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stage_run(LOCAL, "train", "key", settings={}, tags=TAGS) as run:
        run.log_rows([{"step": step, "loss": 1.0} for step in range(50)])
    reads: Counter[str] = Counter()
    read = mlflow.MlflowClient.get_metric_history

    def counted(self: Any, run_id: str, key: str) -> list[Metric]:
        reads[key] += 1
        return read(self, run_id, key)

    monkeypatch.setattr(mlflow.MlflowClient, "get_metric_history", counted)
    with stage_run(LOCAL, "train", "key", settings={}, tags=TAGS) as run:
        for step in range(0, 100, 10):
            run.log_rows([{"step": step + i, "loss": 1.0, "lr": 2.0} for i in range(10)])
    assert reads == {"loss": 1, "lr": 1}, "a continued run reads each metric once"
    with stage_run(LOCAL, "train", "another", settings={}, tags=TAGS) as run:
        run.log_rows([{"step": 0, "loss": 1.0}])
    assert reads.total() == 2, "a new run has nothing to read"
    assert sorted(point.step for point in read(run.client, _only(run, "key"), "loss")) == list(range(100))


def _only(run: Run, fingerprint: str) -> str:
    (found,) = find_runs(run.client, "1", {"rediffuse.fingerprint": fingerprint})
    return found.info.run_id


def test_summary_that_changed_replaces_the_old_value(here: Path) -> None:
    latest: Callable[[Run], dict[str, float]] = lambda run: run.client.get_run(run.run_id).data.metrics  # noqa: E731
    for images in (1438.0, 1438.0, 1200.0, 1500.0, 1200.0):
        with stage_run(LOCAL, "prepare", "key", settings={}, tags={"rediffuse.data_hash": str(images)}) as run:
            run.log_metrics({"train_images": images, "nan": float("nan")})
            assert latest(run)["train_images"] == images
            assert run.client.get_run(run.run_id).data.tags["rediffuse.data_hash"] == str(images)
    assert len(run.client.get_metric_history(run.run_id, "train_images")) == 4, "an equal value is not logged again"
    assert len(run.client.get_metric_history(run.run_id, "nan")) == 1


def test_telemetry_is_off_before_mlflow_and_ray_are_imported(here: Path) -> None:
    code = (
        "from pipelines.stage import quiet_environment; quiet_environment(); import os;"
        "print(os.environ['MLFLOW_DISABLE_TELEMETRY'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["true", "0"]
    assert "analytics = false" in (ROOT / ".dvc" / "config").read_text()


def test_artifacts_of_the_default_store_are_in_the_project(here: Path) -> None:
    (here / "mlflow.db").unlink()
    with stage_run(LOCAL, "report", "key", settings={}, tags=TAGS) as run:
        Path("note.txt").write_text("x")
        run.log_artifact(Path("note.txt"))
    assert len(list(here.glob("mlartifacts/**/note.txt"))) == 1


def test_registry_of_its_own_holds_the_models_and_no_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{here / 'registry.db'}")
    with stage_run(LOCAL, "register", "key", settings={}, tags=TAGS) as run:
        run.client.create_registered_model("model")
    runs, registry = (mlflow.MlflowClient(uri, uri) for uri in (tracking_uri(LOCAL), registry_uri(LOCAL)))
    assert [model.name for model in registry.search_registered_models()] == ["model"]
    assert runs.search_registered_models() == []
    assert len(runs.search_runs(["1"])) == 1
    assert registry.get_experiment_by_name(LOCAL.experiment) is None


@pytest.mark.parametrize(
    ("uri", "registry"),
    [
        ("databricks", "databricks-uc"),
        ("databricks://profile", "databricks-uc://profile"),
        ("http://server:5000", "http://server:5000"),
    ],
)
def test_registry_is_in_the_tracking_store_or_in_unity_catalog(
    here: Path, uri: str, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry_uri(TrackingRun(uri=uri)) == registry
    mlflow.set_tracking_uri(uri)
    monkeypatch.setattr(mlflow.tracking._model_registry.utils, "_registry_uri", None)
    assert mlflow.get_registry_uri() == registry, "MLflow takes the same one by default"


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile"])
def test_databricks_is_accepted_and_asked_for_an_experiment(
    here: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def found(self: Any, name: str) -> str:
        asked.append((self.tracking_uri, self._registry_uri, name))
        return name

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", found)
    connect(TrackingRun(uri=uri, experiment="/Shared/rediffuse"))
    assert set(asked) == {(uri, uri.replace("databricks", "databricks-uc"), "/Shared/rediffuse")}
    with pytest.raises(ValueError, match=r"tracking\.experiment: given 'rediffuse', allowed a workspace path"):
        connect(TrackingRun(uri=uri))


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "./mlruns"])
def test_file_store_is_refused(here: Path, uri: str) -> None:
    with pytest.raises(ValueError, match="the file store is not supported"):
        connect(TrackingRun(uri=uri))


def test_next_stage_says_once_where_the_earlier_runs_and_champions_are(
    here: Path, new_store: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines(tracking: TrackingRun, registry: str = "") -> list[str]:
        caplog.clear()
        as_in_a_new_process(registry)
        with caplog.at_level(logging.INFO, "rediffuse"), stage_run(tracking, "x", "k", settings={}, tags={}):
            pass
        return [record.message for record in caplog.records if "store has changed" in record.message]

    def as_in_a_new_process(registry: str = "") -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)

    for name in ("other.db", "registry.db"):
        shutil.copy(new_store, here / name)
    other = TrackingRun(uri=f"sqlite:///{here / 'other.db'}")
    assert lines(LOCAL) == []
    as_in_a_new_process()
    assert changed_store(LOCAL) is None
    assert "the earlier champions are in sqlite:///mlflow.db" in str(changed_store(other))
    (line,) = lines(other)
    assert "runs now go to sqlite:///other.db, the earlier runs are in sqlite:///mlflow.db" in line
    assert "\n" not in line
    assert lines(other) == []
    (line,) = lines(other, f"sqlite:///{here / 'registry.db'}")
    assert "champions now go to sqlite:///registry.db" in line and "runs now" not in line


def test_moved_project_has_not_changed_its_store(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_environment()
    (here / "a").mkdir()
    (here / "mlflow.db").rename(here / "a" / "mlflow.db")
    monkeypatch.chdir(here / "a")
    with stage_run(LOCAL, "x", "k", settings={}, tags={}):
        pass
    (here / "a").rename(here / "b")
    monkeypatch.chdir(here / "b")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")
    assert changed_store(LOCAL) is None


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://user:secret@server:5000/mlflow?token=secret", "https://server:5000/mlflow"),
        ("mysql://user:secret@server/mlflow", "mysql://server/mlflow"),
        ("databricks://profile", "databricks://profile"),
        ("databricks", "databricks"),
        ("sqlite:////elsewhere/mlflow.db", "sqlite:////elsewhere/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
    ],
)
def test_stores_are_shown_without_credentials(here: Path, uri: str, expected: str) -> None:
    assert without_credentials(uri) == expected


@pytest.fixture
def project(new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a run, an artifact of it, and a registered model, in a folder that can be moved."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("dvc.yaml", "params.yaml"):
        (folder / name).write_text("")
    shutil.copy(new_store, folder / "mlflow.db")
    enter(folder, monkeypatch)
    (folder / "note.txt").write_text("first")
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("w")
    with stage_run(LOCAL, "register", "first", settings={}, tags=TAGS) as run:
        run.log_artifact(Path("note.txt"))
        run.log_artifact(Path("model"))
        run.client.create_registered_model("model")
        source = run.client.get_run(run.run_id).info.artifact_uri + "/model"
        run.client.create_model_version("model", source, run.run_id)
        run.client.set_registered_model_alias("model", "champion", "1")
    return folder


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder the working folder, as a new process there would have it."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")
    mlflow.tracking._tracking_service.utils._artifact_repos_cache.clear()
    monkeypatch.chdir(folder)


def read_model() -> str:
    connect_to_read(LOCAL)
    folder = Path(mlflow.artifacts.download_artifacts("models:/model@champion"))
    return (folder / "weights").read_text()


def log_note(key: str, text: str) -> Run:
    note = project_root() / "note.txt"
    note.write_text(text)
    with stage_run(LOCAL, "register", key, settings={}, tags=TAGS) as run:
        run.log_artifact(note)
    return run


def locations(database: Path) -> list[str]:
    """Every text of a store that names a place on this machine."""
    with sqlite3.connect(f"file:{database.as_posix()}?mode=ro", uri=True) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        cells = [cell for name in tables for row in connection.execute(f'SELECT * FROM "{name}"') for cell in row]
    return [cell for cell in cells if isinstance(cell, str) and cell.removeprefix("file://").startswith("/")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["renamed", "with space & ü", "100%#1", "project/inside", "project-2", ".."])
def test_moved_project_finds_its_model_and_writes_into_its_new_folder(
    project: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = workspace_id()
    place = project.parent / "moved"
    project.rename(place)
    if name == "..":  # one level up
        for path in place.iterdir():
            path.rename(place.parent / path.name)
        place = place.parent
    else:
        (place.parent / name).parent.mkdir(exist_ok=True)
        place = place.rename(place.parent / name)
    enter(place, monkeypatch)
    assert read_model() == "w"
    run = log_note("second", "second")
    assert workspace_id() == before
    assert [path.read_text() for path in place.glob(f"mlartifacts/{run.run_id}/artifacts/note.txt")] == ["second"]
    assert len(list(place.glob("mlartifacts/*/artifacts/note.txt"))) == 2
    assert {project_root()} == {place}
    assert all(_path(each).is_relative_to(place) for each in locations(place / "mlflow.db")), locations(
        place / "mlflow.db"
    )
    if place not in project.parents:
        assert not (project / "mlartifacts").exists(), "nothing is written into the old place"


def _path(location: str) -> Path:
    from urllib.parse import unquote

    return Path(unquote(location.removeprefix("file://")) if location.startswith("file:") else location)


def test_stage_after_a_move_continues_its_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = log_note("same", "one")
    project.rename(project.parent / "b")
    enter(project.parent / "b", monkeypatch)
    assert log_note("same", "two").run_id == first.run_id
    (note,) = Path.cwd().glob(f"mlartifacts/{first.run_id}/artifacts/note.txt")
    assert note.read_text() == "two"


def test_copy_leaves_the_original_alone_and_has_its_own_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stage_run(LOCAL, "train", "cut", settings={}, tags=TAGS) as running:
        pass
    running.client.update_run(running.run_id, status="RUNNING")  # it runs in the original while that is copied
    copy = project.parent / "copy"
    shutil.copytree(project, copy)
    before = contents(project)
    enter(copy, monkeypatch)
    assert read_model() == "w"
    own = log_note("first", "of the copy")
    with stage_run(LOCAL, "train", "other", settings={}, tags=TAGS):
        pass
    client = connect(LOCAL)
    assert client.get_run(running.run_id).info.status == "KILLED", "it does not run in the copy"
    assert own.tags["rediffuse.workspace"] == workspace_id()
    assert [path.read_text() for path in copy.glob(f"mlartifacts/{own.run_id}/artifacts/note.txt")] == ["of the copy"]
    assert contents(project) == before
    enter(project, monkeypatch)
    assert connect(LOCAL).get_run(running.run_id).info.status == "RUNNING"
    assert workspace_id() != own.tags["rediffuse.workspace"]


def test_two_copies_do_not_end_or_continue_each_others_runs_on_a_server(
    project: Path, new_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = project.parent / "server"
    server.mkdir()
    shutil.copy(new_store, server / "mlflow.db")
    shared = TrackingRun(uri=f"sqlite:///{server / 'mlflow.db'}")
    copy = project.parent / "copy"
    shutil.copytree(project, copy)
    with stage_run(shared, "train", "key", settings={}, tags=TAGS) as original:
        enter(copy, monkeypatch)
        with stage_run(shared, "train", "key", settings={}, tags=TAGS) as other:
            assert other.run_id != original.run_id
        with stage_run(shared, "train", "another", settings={}, tags=TAGS):
            assert original.client.get_run(original.run_id).info.status == "RUNNING"


def test_store_of_a_server_is_not_rewritten(project: Path, new_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = project.parent / "server.db"
    shutil.copy(new_store, server)
    shared = TrackingRun(uri=f"sqlite:///{server}")
    connect(shared)
    before = locations(server)
    project.rename(project.parent / "moved")
    enter(project.parent / "moved", monkeypatch)
    connect(shared)
    assert locations(server) == before


def test_store_without_a_record_of_its_place_follows_the_project(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a fresh clone into which the user copied the store, or after runs/ was removed."""
    copy = project.parent / "copy"
    shutil.copytree(project, copy, ignore=shutil.ignore_patterns("runs"))
    before = contents(project)
    enter(copy, monkeypatch)
    log_note("second", "second")
    assert read_model() == "w"
    assert contents(project) == before


def test_store_that_was_copied_without_its_artifacts_names_what_is_missing(
    project: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = project.parent / "copy"
    copy.mkdir()
    for name in ("dvc.yaml", "params.yaml", "mlflow.db"):
        shutil.copy(project / name, copy / name)
    enter(copy, monkeypatch)
    with caplog.at_level(logging.INFO, "rediffuse"):
        connect(LOCAL)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"copy mlartifacts from {project}" in warning
    assert "\n" not in warning


def test_experiment_whose_artifacts_are_gone_is_named_and_nothing_is_written(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = project.parent / "disk"
    client = connect(LOCAL)
    client.create_experiment("on a disk", artifact_location=(disk / "artifacts").as_uri())
    there = TrackingRun(experiment="on a disk")
    enter(project, monkeypatch)
    with pytest.raises(
        ValueError, match=r"on a disk in sqlite:///mlflow\.db keeps its artifacts in .*/disk/artifacts, which"
    ):
        connect(there)
    assert not disk.exists()
    (disk / "artifacts").mkdir(parents=True)
    enter(project, monkeypatch)
    connect(there)
    assert (disk / "artifacts").as_uri() in locations(project / "mlflow.db"), "it was chosen and exists"


def test_store_that_cannot_be_changed_is_named_after_a_move(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (project / "mlflow.db").read_bytes()
    project.rename(project.parent / "moved")
    enter(project.parent / "moved", monkeypatch)
    holder = sqlite3.connect("mlflow.db")
    holder.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr("pipelines.local_store.BUSY_SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"mlflow\.db names locations outside of this project and cannot be changed"):
        connect(LOCAL)
    holder.close()
    assert Path("mlflow.db").read_bytes() == before
    assert not project.exists()


def test_reading_creates_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch)
    for tracking in (LOCAL, TrackingRun(uri="sqlite:///mine.db")):
        with pytest.raises(ValueError, match="does not exist yet"):
            connect_to_read(tracking)
    assert changed_store(LOCAL) is None
    assert list(tmp_path.iterdir()) == []


def test_store_is_the_projects_in_a_subfolder_and_in_a_temporary_workspace(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = f"sqlite:///{project / 'mlflow.db'}"
    below = project / "notebooks"
    below.mkdir()
    temporary = project / ".dvc/tmp/exps/standalone/tmp1"
    (temporary / ".dvc").mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(project / name, temporary)
    for folder in (project, below, temporary):
        enter(folder, monkeypatch)
        for tracking in (LOCAL, TrackingRun(uri="sqlite:///mlflow.db")):
            assert tracking_uri(tracking) == registry_uri(tracking) == expected
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db?timeout=5")
        assert tracking_uri(LOCAL) == f"sqlite:///{project / 'other.db'}?timeout=5"
        assert without_credentials(expected) == "sqlite:///mlflow.db"
        enter(folder, monkeypatch)
        assert changed_store(LOCAL) is None
        assert read_model() == "w"
    run = log_note("of the experiment", "kept")  # in the temporary workspace
    shutil.rmtree(temporary)
    enter(project, monkeypatch)
    assert [path.read_text() for path in project.glob(f"mlartifacts/{run.run_id}/artifacts/note.txt")] == ["kept"]


def test_store_that_an_experiment_creates_is_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / ".dvc/tmp/exps/standalone/tmp1"
    (temporary / ".dvc").mkdir(parents=True)
    enter(temporary, monkeypatch)
    connect(LOCAL)
    assert all(
        _path(each).parts[: len(tmp_path.parts) + 1] != (*tmp_path.parts, ".dvc")
        for each in locations(tmp_path / "mlflow.db")
    )
