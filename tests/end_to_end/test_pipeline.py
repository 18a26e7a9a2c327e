"""The real pipeline on real Ray, MLflow and DVC, with small budgets."""

from __future__ import annotations

import csv
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest

from pipelines.data.shards import read_manifest
from pipelines.params import Params, Section, read_yaml
from tests.conftest import PARAMS_READ, SHARED_DATA, Project, kill_everything, make_project, wait_until

STAGES = ("prepare", "reference", "tune", "train", "evaluate", "register", "report")


def ran(text: str) -> list[str]:
    """The stages that ``dvc repro`` says it ran, without those that it restored."""
    return re.findall(r"Running stage '(\w+)'", text)


def client_of(project: Project) -> mlflow.MlflowClient:
    uri = f"sqlite:///{project.folder / 'mlflow.db'}"
    return mlflow.MlflowClient(uri, registry_uri=uri)


def test_second_repro_runs_nothing_and_is_quick(finished_project: Project) -> None:
    began = time.monotonic()
    assert ran(finished_project.repro()) == []
    assert time.monotonic() - began < 20


def test_changed_params_run_only_the_stages_that_depend_on_them(copied_project: Project) -> None:
    copied_project.change(evaluate__num_samples=32)
    assert ran(copied_project.repro("--dry")) == ["evaluate"]  # what follows from its outputs shows only in a real run
    copied_project.run("git", "checkout", "params.yaml")
    copied_project.change(train__learning_rate=0.0021)
    assert set(ran(copied_project.repro("--dry"))).isdisjoint({"prepare", "reference"})
    copied_project.run("git", "checkout", "params.yaml")
    copied_project.change_run(ray__num_cpus=2, tracking__experiment="other", train__num_workers=1, resume="force")
    assert ran(copied_project.repro("--dry")) == []
    assert "up to date" in copied_project.run("dvc", "status")


def test_stages_read_exactly_the_params_that_dvc_yaml_declares(finished_project: Project) -> None:
    keys = section_keys(Params)
    reads: dict[str, set[str]] = {stage: set() for stage in STAGES}
    for line in (finished_project.folder / PARAMS_READ).read_text().splitlines():
        stage, read = line.split()
        section, field = read.split(".")
        if (section, field) in keys:
            reads[stage].add(keys[section, field])
    declared = read_yaml(finished_project.folder / "dvc.yaml")["stages"]
    every_leaf = set(keys.values())
    for stage in STAGES:
        leaves = {
            key for key in every_leaf for own in declared[stage].get("params", []) if f"{key}.".startswith(f"{own}.")
        }
        assert reads[stage] == leaves, stage


def section_keys(schema: type, prefix: str = "") -> dict[tuple[str, str], str]:
    """The dotted key of each leaf of params.yaml, by (class, field)."""
    keys: dict[tuple[str, str], str] = {}
    for name, field in schema.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= section_keys(field.annotation, f"{key}.")
        else:
            keys[schema.__name__, name] = key
    return keys


@pytest.mark.slow
def test_comments_unrelated_code_and_run_settings_compute_nothing_again(copied_project: Project) -> None:
    folder = copied_project.folder
    work = lambda: {  # noqa: E731
        path: path.stat().st_mtime_ns
        for pattern in ("tune/**/rung_*.json", "train/**/checkpoint.safetensors", "evaluate/**/*.safetensors")
        for path in folder.glob(f"runs/{pattern}")
    }
    before = {path: path.read_bytes() for path in folder.glob("artifacts/**/*") if path.is_file()}
    done = work()
    assert {path.relative_to(folder).parts[1] for path in done} == {"tune", "train", "evaluate"}
    copied_project.change_run(train__num_workers=1, train__log_every=3, evaluate__max_concurrent=1)
    with open(folder / "diffusion_core/losses.py", "a", encoding="utf-8") as file:
        file.write("\n# a comment\n")
    with open(folder / "diffusion_core/editing.py", "a", encoding="utf-8") as file:
        file.write("\n\ndef added() -> int:\n    return 1\n")
    began = time.monotonic()
    text = copied_project.repro()
    print(f"dvc repro took {time.monotonic() - began:.0f} s and ran {ran(text)}")
    assert set(ran(text)) <= {"tune", "train"}, "what depends on the bytes of losses.py, and nothing after it"
    assert "Ray Train" not in text
    after = {path: path.read_bytes() for path in folder.glob("artifacts/**/*") if path.is_file()}
    assert after == before
    assert work() == done, "nothing was computed again"


@pytest.mark.slow
def test_changed_sweep_is_measured_and_judged_again_with_the_champion(copied_project: Project) -> None:
    copied_project.change(evaluate__num_samples=32)
    assert ran(copied_project.repro()) == ["evaluate", "register", "report"]
    registration = json.loads((copied_project.folder / "artifacts/registration.json").read_text())
    assert registration["version"] == 1, "the same weights are not registered twice"
    assert registration["candidate"]["num_samples"] == 32


@pytest.mark.slow
def test_champion_that_was_measured_differently_is_measured_again_before_it_is_judged(copied_project: Project) -> None:
    copied_project.change(
        evaluate__num_samples=48, train__learning_rate=0.001, train__ema_decay=0.0, tune__enabled=False
    )
    text = copied_project.repro()
    assert ran(text) == ["tune", "train", "evaluate", "register", "report"]
    assert "measuring the champion again: it was measured with another num_samples" in text
    registration = json.loads((copied_project.folder / "artifacts/registration.json").read_text())
    assert registration["version"] == 2
    assert registration["previous_champion_version"] == 1
    new, old = registration["candidate"]["fid"], registration["previous_champion_fid"]
    assert registration["promoted"] is (new < old)
    uri = f"sqlite:///{copied_project.folder / 'mlflow.db'}"
    champion = mlflow.MlflowClient(uri, registry_uri=uri).get_model_version_by_alias("rediffuse-digits", "champion")
    assert int(champion.version) == (2 if new < old else 1) == registration["champion_version"]


def test_every_stage_leaves_what_the_design_says(finished_project: Project) -> None:
    artifacts = finished_project.folder / "artifacts"
    manifest = read_manifest(artifacts / "data")
    for shard in manifest.shards["train"]:
        assert (artifacts / "data" / str(shard["images"])).exists()
    reference = json.loads((artifacts / "reference/reference.json").read_text())
    assert reference["data_hash"] == manifest.content_hash
    assert reference["test_fid"] > 0
    model = json.loads((artifacts / "model/model.json").read_text())
    assert model["provenance"]["data_hash"] == manifest.content_hash
    assert sorted(path.name for path in (artifacts / "model").iterdir()) == ["model.json", "model.safetensors"]
    trials = list(csv.DictReader((artifacts / "search/trials.csv").open()))
    assert len(trials) == 2
    sweep = list(csv.DictReader((artifacts / "evaluation/sweep.csv").open()))
    assert [(row["eta"], row["steps"]) for row in sweep] == [("0.0", "2"), ("0.0", "4"), ("1.0", "2"), ("1.0", "4")]
    assert {row["num_samples"] for row in sweep} == {"40"}
    assert any(row["pareto"] == "true" for row in sweep)
    for row in sweep:
        assert (artifacts / f"evaluation/samples/eta-{row['eta']}-steps-{row['steps']}.png").exists()
    page = (artifacts / "report/index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "https://" not in page
    for name in ("train", "evaluate"):
        text = (finished_project.folder / "metrics" / f"{name}.json").read_text()
        assert socket.gethostname() not in text


def test_metrics_of_dvc_the_report_and_mlflow_agree(finished_project: Project) -> None:
    shown = json.loads(finished_project.run("dvc", "metrics", "show", "--json"))[""]["data"]
    client = client_of(finished_project)
    runs = {run.info.run_name: run for run in client.search_runs(["1"], max_results=500)}
    for stage in ("prepare", "reference", "tune", "evaluate", "register"):
        values = shown[f"metrics/{stage}.json"]["data"]
        logged = runs[stage].data.metrics
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name in logged:
                assert logged[name] == pytest.approx(value, rel=1e-9), (stage, name)
        assert set(values) & set(logged), stage
    trained = shown["metrics/train.json"]["data"]
    assert runs["train"].data.metrics["final/final_loss"] == trained["final_loss"]
    page = (finished_project.folder / "artifacts/report/index.html").read_text()
    assert f"{shown['metrics/evaluate.json']['data']['best_fid_classifier']:.3f}" in page
    plots = json.loads(finished_project.run("dvc", "plots", "show", "--json"))["data"]
    assert len(plots["FID by steps and eta"][0]["content"]["data"]["values"]) == 4
    assert len(plots["training loss"][0]["content"]["data"]["values"]) == 24


def test_mlflow_holds_one_finished_run_per_stage_with_nested_children(finished_project: Project) -> None:
    client = client_of(finished_project)
    runs = client.search_runs(["1"], max_results=500)
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = {run.info.run_name: run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags}
    assert sorted(parents) == sorted(STAGES)
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    counts = {
        name: sum(run.data.tags["mlflow.parentRunId"] == own for run in children) for name, own in parents.items()
    }
    assert counts["tune"] == 2
    assert counts["evaluate"] == 4
    commit = finished_project.run("git", "rev-list", "--max-parents=0", "HEAD").strip()
    data_hash = read_manifest(finished_project.folder / "artifacts/data").content_hash
    for run in runs:
        assert run.data.tags["git_commit"] == commit
        assert run.data.tags["rediffuse.data_hash"] == data_hash
        assert run.data.params
    steps = sorted(point.step for point in client.get_metric_history(parents["train"], "train/loss"))
    assert steps == list(range(2, 25, 2))
    assert "params.json" in {path.path for path in client.list_artifacts(parents["evaluate"])}
    names = {Path(path.path).name for path in client.list_artifacts(parents["evaluate"], "evaluation")}
    assert {"sweep.csv", "samples", "heatmap.png"} <= names
    assert [path.path for path in client.list_artifacts(parents["train"], "samples")] == ["samples/step_00000024.png"]


PREDICT = """
import json, sys, mlflow, pandas as pd
model = mlflow.pyfunc.load_model("models:/rediffuse-digits@champion")
params = {"steps": 4, "eta": 0.0, "guidance_scale": 1.0, "seed": 0}
by_index = model.predict(pd.DataFrame({"label": [3, 7, 3]}), params=params)
by_name = model.predict(pd.DataFrame({"label": ["3", "7", "3"]}), params=params)
again = model.predict(pd.DataFrame({"label": [3]}), params=params)
assert (by_index == by_name).all() and (by_index[:1] == again).all() and (by_index[0] != by_index[2]).any()
guided = model.predict(pd.DataFrame({"label": [3]}), params={**params, "guidance_scale": 3.0})
assert (guided != again).any()
assert model.predict(pd.DataFrame({"label": [1]})).shape == (1, 8, 8, 1)
print(json.dumps([str(by_index.dtype), list(by_index.shape), by_index.tolist()]))
"""


def test_registered_champion_predicts_in_a_fresh_process_without_pickle(
    finished_project: Project, tmp_path: Path
) -> None:
    output = finished_project.run(
        sys.executable, "-P", "-c", PREDICT, MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
        MLFLOW_TRACKING_URI=f"sqlite:///{finished_project.folder / 'mlflow.db'}",
    )  # fmt: skip
    dtype, shape, _ = json.loads(output.splitlines()[-1])
    assert (dtype, shape) == ("uint8", [3, 8, 8, 1])
    pickles = [
        p
        for p in (finished_project.folder / "mlartifacts").rglob("*")
        if p.suffix in (".pkl", ".pickle", ".pt", ".pth")
    ]
    assert pickles == []


@pytest.mark.slow
def test_model_server_answers_over_http_as_predict_does(finished_project: Project) -> None:
    output = finished_project.run(sys.executable, "-P", "-c", PREDICT)
    expected = json.loads(output.splitlines()[-1])[2]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = finished_project.start(
        "mlflow",
        "models",
        "serve",
        "-m",
        "models:/rediffuse-digits@champion",
        "--env-manager",
        "local",
        "-p",
        str(port),
    )
    try:
        body = json.dumps(
            {
                "dataframe_split": {"columns": ["label"], "data": [[3], [7], [3]]},
                "params": {"steps": 4, "eta": 0.0, "guidance_scale": 1.0, "seed": 0},
            }
        ).encode()

        def ask() -> list | None:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
            )
            try:
                return json.load(urllib.request.urlopen(request, timeout=60))["predictions"]
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read().decode()) from None
            except OSError:
                return None

        answer = wait_until(ask, 120, "the server to answer", finished_project)
        assert np.asarray(answer).tolist() == expected
    finally:
        server.terminate()
        server.wait(30)


def test_sample_command_reads_the_registry(finished_project: Project, tmp_path: Path) -> None:
    for where in ("artifacts/model", "models:/rediffuse-digits@champion"):
        finished_project.run(
            sys.executable, "-m", "pipelines.cli", "sample", where, "--labels", "3,7", "--num", "8", "--steps", "4",
            "--output", str(tmp_path / f"{where.replace('/', '-')}.png"),
        )  # fmt: skip
    first, second = sorted(tmp_path.glob("*.png"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("data", ["fashion_mnist", "image_folder"])
def test_presets_carry_real_data_sets_through_every_stage(data: str, tmp_path: Path) -> None:
    if not SHARED_DATA.exists():
        pytest.skip("the shared data sets are not on this machine")
    made = make_project(tmp_path / "project")
    made.run("git", "checkout", "-q", "params.yaml")
    root = tmp_path / "images"
    unpack = [sys.executable, str(SHARED_DATA / "unpack.py")]
    arguments = ["fashion", str(root)] if data == "fashion_mnist" else ["folder", "dcss_tiles32", str(root)]
    subprocess.run([*unpack, *arguments], check=True, stdout=subprocess.DEVNULL)
    try:
        overrides = [f"+preset={data}", "+budget=smoke", f"prepare.root={root}"]
        made.run("dvc", "exp", "run", *[part for override in overrides for part in ("-S", override)], timeout=900)
        manifest = read_manifest(made.folder / "artifacts/data")
        assert manifest.shape == ((28, 28, 1) if data == "fashion_mnist" else (32, 32, 3))
        assert len(manifest.class_names) == (10 if data == "fashion_mnist" else 49)
        assert (made.folder / "artifacts/report/index.html").exists()
        registration = json.loads((made.folder / "artifacts/registration.json").read_text())
        assert registration["promoted"] is True
        assert registration["model_name"] == (
            "rediffuse-fashion-mnist" if data == "fashion_mnist" else "rediffuse-images"
        )
    finally:
        kill_everything(made)
