"""The MLflow server of infra/tracking: Postgres, S3, users. The whole pipeline uses it, and it is killed meanwhile."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipelines.params import TrackingRun
from tests.conftest import Project, kill_everything, make_project, wait_until
from tests.infra.tracking_parts import ADMIN, KEYS, ROOT, TRACKING, Postgres, Server, free_port, postgres, s3_server

pytestmark = pytest.mark.infra

USER = ("trainer", "password-of-trainer")
AWAY_S = float(os.environ.get("REDIFFUSE_TEST_AWAY_S", "20"))
STEPS, WRITERS, ROWS = 240, 10, 40
IS_AWAY, IS_BACK = "is away: work goes on", "is back after"


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as made:
        yield made


@pytest.fixture(scope="module")
def server(database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("flask_wtf", reason="no Flask-WTF: install the extra tracking-server")
    folder = tmp_path_factory.mktemp("server")
    for name in ("mlflow", "mlflow_auth"):
        database.sql(f"create database {name}")
    port = free_port()
    with s3_server(folder, "artifacts") as s3:
        settings = {
            **KEYS,
            "MLFLOW_BACKEND_STORE_URI": database.uri("mlflow"),
            "MLFLOW_AUTH_DATABASE_URI": database.uri("mlflow_auth"),
            "MLFLOW_ARTIFACTS_DESTINATION": "s3://artifacts/mlflow",
            "MLFLOW_S3_ENDPOINT_URL": s3,
            "MLFLOW_SERVER_ALLOWED_HOSTS": f"127.0.0.1:{port}",
            "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN[0],
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "only for this test",
            "MLFLOW_PORT": str(port),
            "MLFLOW_WORKERS": "2",
            **dict.fromkeys(("AWS_SESSION_TOKEN", "MLFLOW_AUTH_DEFAULT_PERMISSION"), ""),  # lines without a value
        }
        made = Server(settings, port, folder / "server.log")
        try:
            made.start()
            with pytest.MonkeyPatch.context() as patch:
                log_in(patch, *ADMIN)
                from mlflow.server import get_app_client

                get_app_client("basic-auth", made.uri).create_user(*USER)
            yield made
        finally:
            made.kill()


def log_in(patch: pytest.MonkeyPatch, name: str, password: str) -> None:
    patch.setenv("MLFLOW_TRACKING_USERNAME", name)
    patch.setenv("MLFLOW_TRACKING_PASSWORD", password)


@pytest.fixture
def logged_in(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackingRun:
    """An empty working folder, the environment of a user, and the settings of run.yaml."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")
    log_in(monkeypatch, *USER)
    return TrackingRun(uri=server.uri, experiment=f"test-{tmp_path.name}")


def client_environment(server: Server) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": server.uri,
        "MLFLOW_TRACKING_USERNAME": USER[0],
        "MLFLOW_TRACKING_PASSWORD": USER[1],
    }


def last_checkpoint(project: Project) -> int:
    found = [int(path.parent.name[5:]) for path in project.folder.glob("runs/train/*/train/step_*/checkpoint.json")]
    return max(found, default=0)


@pytest.fixture(scope="module")
def pipeline(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The whole pipeline, whose server was away during the search and for AWAY_S seconds during training."""
    made = make_project(
        tmp_path_factory.mktemp("tracked") / "project",
        run={"train": {"log_every": 2, "checkpoint_every": 20, "sample_every": 80, "num_workers": 1}},
        train__steps=STEPS,
        train__network__channels=16,
        evaluate__etas=[0.0],
    )
    try:
        started = made.start("dvc", "repro", **client_environment(server))
        wait_until(lambda: "joined" in made.output() or "trial" in made.output(), 300, "the search", made)
        server.kill()
        time.sleep(8)
        server.start()
        wait_until(lambda: last_checkpoint(made) >= 20, 240, "training", made)
        server.kill()
        before = last_checkpoint(made)
        time.sleep(AWAY_S)
        print(
            f"training went from step {before} to {last_checkpoint(made)} while the server was away for {AWAY_S:.0f} s"
        )
        assert last_checkpoint(made) > before, made.output()[-4000:]
        server.start()
        assert started.wait(400) == 0, made.output()[-6000:]
        made.commit()
        yield made
    finally:
        kill_everything(made)


def search(client: Any, stage: str) -> list[Any]:
    experiment = client.get_experiment_by_name("rediffuse").experiment_id
    return client.search_runs([experiment], f"tags.`rediffuse.stage` = '{stage}'", max_results=1000)


def parents(runs: list[Any]) -> list[Any]:
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


@pytest.fixture
def client(server: Server, logged_in: TrackingRun) -> Any:
    import mlflow

    mlflow.set_tracking_uri(server.uri)
    mlflow.set_registry_uri(server.uri)
    return mlflow.MlflowClient(server.uri, server.uri)


def test_nothing_is_lost_if_the_server_is_killed_during_training(pipeline: Project, client: Any) -> None:
    runs = search(client, "train")
    assert [run.info.status for run in runs] == ["FINISHED"]
    points = client.get_metric_history(runs[0].info.run_id, "train/loss")
    assert sorted(point.step for point in points) == list(range(2, STEPS + 1, 2)), "each logged step once, none lost"
    with open(pipeline.folder / "plots" / "train_loss.csv", encoding="utf-8") as file:
        written = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    common = [point for point in points if point.step in written]
    assert len(common) >= STEPS // 4
    for point in common:
        assert point.value == pytest.approx(written[point.step], rel=1e-5)
    pictures = [artifact.path for artifact in client.list_artifacts(runs[0].info.run_id, "samples")]
    assert pictures == [f"samples/step_{step:08d}.png" for step in range(80, STEPS + 1, 80)]


def test_one_line_says_that_the_server_is_away_and_one_that_it_is_back(pipeline: Project) -> None:
    lines = pipeline.output().splitlines()
    away, back = ([line for line in lines if text in line] for text in (IS_AWAY, IS_BACK))
    print("\n".join([*away, *back]))
    assert 1 <= len(away) == len(back) <= 2  # one outage in the search, one in training
    assert not [line for line in lines if "Retrying (" in line or "Traceback" in line]


def test_every_stage_and_part_of_the_pipeline_has_one_finished_run(pipeline: Project, client: Any) -> None:
    for stage in ("prepare", "reference", "tune", "train", "evaluate", "register", "report"):
        runs = search(client, stage)
        assert len(parents(runs)) == 1, stage
        assert {run.info.status for run in runs} == {"FINISHED"}, stage
        names = Counter(run.data.tags["rediffuse.key"] for run in runs)
        assert set(names.values()) == {1}, "a part of a stage has two runs"
    trials = len(search(client, "tune")) - 1
    assert trials == YAML(typ="safe").load(pipeline.folder / "params.yaml")["tune"]["num_trials"]
    assert not (pipeline.folder / "mlflow.db").exists()


def writer(folder: str, number: int, server: str, fresh: str) -> str:
    return f"""
import os, time
from pathlib import Path
os.chdir({folder!r})
from pipelines.params import TrackingRun
from pipelines.tracking import connect, stage_run
import mlflow
Path("ready-{number}").touch()
while len(list(Path().glob("ready-*"))) < {WRITERS}:
    time.sleep(0.05)
for uri in ({fresh!r}, {server!r}):
    with stage_run(TrackingRun(uri=uri, experiment="ten-writers"), "train", "key-{number}", settings={{"a": {number}}}, tags={{}}) as run:
        for step in range(1, {ROWS} + 1):
            run.log_rows([{{"step": step, "loss": step / ({number} + 1), "rate": 1.0}}])
"""


def test_ten_writers_at_once_share_a_server_and_a_fresh_database(
    server: Server, database: Postgres, client: Any, tmp_path: Path
) -> None:
    database.sql("create database fresh")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "dvc.yaml").touch()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", writer(str(tmp_path), number, server.uri, database.uri("fresh"))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(WRITERS)
    ]
    try:
        for process in processes:
            text, _ = process.communicate(timeout=240)
            assert process.returncode == 0, text[-3000:]
    finally:
        for process in processes:
            process.kill()
    import mlflow

    for store in (client, mlflow.MlflowClient(database.uri("fresh"))):
        experiment = store.get_experiment_by_name("ten-writers").experiment_id
        runs = store.search_runs([experiment])
        assert len(runs) == WRITERS
        for run in runs:
            factor = int(run.data.params["a"]) + 1
            points = store.get_metric_history(run.info.run_id, "loss")
            assert sorted((p.step, p.value) for p in points) == [(s, s / factor) for s in range(1, ROWS + 1)]


def test_wrong_password_fails_at_once_and_names_the_variables(
    server: Server, logged_in: TrackingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.tracking import connect

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"refuses the login \(401\).*USERNAME and MLFLOW_TRACKING_PASSWORD") as error:
        connect(logged_in)
    assert time.monotonic() - began < 3
    assert "\n" not in str(error.value) and "wrong" not in str(error.value)


def test_unknown_host_name_fails_at_once_and_names_the_setting_of_the_server(
    server: Server, logged_in: TrackingRun
) -> None:
    from pipelines.tracking import connect

    address = f"localhost:{server.port}"
    with pytest.raises(ValueError, match=f"add {address} to MLFLOW_SERVER_ALLOWED_HOSTS"):
        connect(TrackingRun(uri=f"http://{address}"))


def test_other_user_who_may_only_read_is_told_what_to_ask_for(
    server: Server, logged_in: TrackingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.server import get_app_client

    from pipelines.tracking import connect, stage_run

    connect(logged_in)  # the first user owns the experiment
    with pytest.MonkeyPatch.context() as patch:
        log_in(patch, *ADMIN)
        get_app_client("basic-auth", server.uri).create_user("reader", "password-of-reader")
    log_in(monkeypatch, "reader", "password-of-reader")
    with (
        pytest.raises(ValueError, match=r"does not permit this \(403\).*MLFLOW_TRACKING_USERNAME"),
        stage_run(logged_in, "train", "key", settings={}, tags={}),
    ):
        pass


def backup(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TRACKING / "backup.py"), *arguments],
        env={**os.environ, **server.settings},
        capture_output=True,
        text=True,
        check=False,
    )


def test_after_the_limit_a_stage_says_how_to_resume_and_the_next_one_logs_everything(
    server: Server, logged_in: TrackingRun, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from pipelines.tracking import stage_run

    impatient = logged_in.model_copy(update={"wait_minutes": 0.05})
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 301)]
    try:
        with (
            caplog.at_level(logging.INFO, "rediffuse"),
            pytest.raises(ValueError, match=r"has been away for 0:\d\d.*run the same command again.*wait_minutes"),
            stage_run(impatient, "train", "key", settings={}, tags={}) as run,
        ):
            run.log_rows(rows[:100])
            server.kill()
            run.log_rows(rows[100:200])
            run.log_rows(rows[200:])
    finally:
        if server.process is None:
            server.start()
    with stage_run(logged_in, "train", "key", settings={}, tags={}) as again:
        again.log_rows(rows)
    assert again.run_id == run.run_id
    points = client.get_metric_history(run.run_id, "loss")
    assert sorted((point.step, point.value) for point in points) == [(row["step"], row["loss"]) for row in rows]
    assert sum(IS_AWAY in record.getMessage() for record in caplog.records) == 1


def test_champion_loads_after_backup_loss_and_restore(
    pipeline: Project, server: Server, database: Postgres, client: Any, tmp_path: Path
) -> None:
    import boto3
    import mlflow
    import pandas as pd

    model = "models:/rediffuse-digits@champion"
    inputs = pd.DataFrame({"label": [3, 7]})
    images = mlflow.pyfunc.load_model(model).predict(inputs, params={"seed": 0, "steps": 2})
    run_id = search(client, "train")[0].info.run_id
    points = {(p.step, p.value, p.timestamp) for p in client.get_metric_history(run_id, "train/loss")}
    made = backup(server, "backup", str(tmp_path / "backup"))
    assert made.returncode == 0, made.stderr
    again = backup(server, "backup", str(tmp_path / "backup"))
    assert "2 databases, 0 new artifacts" in again.stdout, "a second backup copies only what is new"

    refused = backup(server, "restore", str(tmp_path / "backup"))
    assert refused.returncode == 1 and "is not empty" in refused.stderr

    server.kill()
    try:
        for name in ("mlflow", "mlflow_auth"):
            database.sql(f"drop database {name} with (force)")
            database.sql(f"create database {name}")
        settings = server.settings
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        bucket = boto3.resource("s3", endpoint_url=settings["MLFLOW_S3_ENDPOINT_URL"], **keys).Bucket("artifacts")
        bucket.objects.all().delete()
        restored = backup(server, "restore", str(tmp_path / "backup"))
        assert restored.returncode == 0, restored.stderr
    finally:
        server.start()
    loaded = mlflow.pyfunc.load_model(model).predict(inputs, params={"seed": 0, "steps": 2})
    assert (loaded == images).all()
    assert points == {(p.step, p.value, p.timestamp) for p in client.get_metric_history(run_id, "train/loss")}


def test_files_hold_no_password_and_name_each_setting_that_start_reads() -> None:
    example = dict(
        line.split("=", 1)
        for line in (TRACKING / ".env.example").read_text().splitlines()
        if "=" in line and line[0] != "#"
    )
    assert {name for name, value in example.items() if value} == {"MLFLOW_AUTH_DEFAULT_PERMISSION"}
    import re

    text = "".join((TRACKING / name).read_text() for name in ("start", "compose.yaml", "backup.py"))
    read = set(re.findall(r"\$\{((?:MLFLOW|POSTGRES|PYTHON)_\w+):\?", text))
    assert len(read) >= 7
    assert read <= set(example)


def test_units_are_valid(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    for unit in TRACKING.glob("mlflow-*"):
        # the programs of another machine are replaced by ones that exist here
        text = unit.read_text().replace("/opt/rediffuse/infra/tracking/start", "/bin/true")
        (tmp_path / unit.name).write_text(text.replace("/opt/rediffuse/venv/bin/python", "/bin/true"))
    units = [str(path) for path in sorted(tmp_path.glob("mlflow-*"))]
    result = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    about_these = [line for line in result.stderr.splitlines() if "mlflow-" in line]
    assert len(units) == 3 and not about_these, result.stderr
