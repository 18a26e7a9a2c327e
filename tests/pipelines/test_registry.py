from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings, generate_images
from diffusion_core.networks import build_network
from diffusion_core.schedules import make_schedule
from diffusion_core.storage import file_sha256, read_json, write_json
from pipelines import register as stage
from pipelines.identity import closure_digest, import_closure
from pipelines.measurement.measure import Measurement, distance_with_error
from pipelines.measurement.measure import measure as measure_model
from pipelines.measurement.reference import load_reference
from pipelines.measurement.units import Work, measure_unit
from pipelines.params import Register, RunSettings
from pipelines.register import candidate_measurement, check_weights, register
from pipelines.registry import champion_measurement, registration
from pipelines.registry.gate import COMPARED, RECORDED, judge
from pipelines.registry.registration import ALIAS, champion, code_digest, download_model, find_version
from pipelines.stage import MODEL, REFERENCE, REGISTRATION
from tests.pipelines.test_evaluation import measure_here, without_ray, write_inputs

MEASURED: dict[str, Any] = dict.fromkeys(COMPARED, "same") | {"num_samples": 100, "eta": 0.0, "steps": 50, "fid": 2.0}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")  # MLflow sets both, and this restores them after the test
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> mlflow.MlflowClient:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    return mlflow.MlflowClient(uri, uri)


def small_model(seed: int = 0) -> DiffusionModel:
    """A model with random weights: 8x8 grey, three named classes."""
    torch.manual_seed(seed)
    config = {
        "name": "unet",
        "image_size": 8,
        "image_channels": 1,
        "channels": 8,
        "multipliers": [1],
        "num_res_blocks": 1,
        "attention_sizes": [],
        "condition": {"kind": "class", "size": 3},
    }
    network = build_network(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return DiffusionModel(network, config, make_schedule("cosine", 100), "v", 8, 1, ("cat", "dog", "7"), 0.1)


def quality_of(digest: str, fid: float) -> dict[str, Any]:
    row = {"eta": 0.0, "steps": 50, "fid": fid, "fid_error": 0.1, "class_agreement": 0.9}
    identity = {"data_hash": "d", "metric": "fid_classifier", "extractor_digest": "e", "num_samples": 100}
    sampler = {"spacing": "trailing", "guidance_scale": 1.0, "seed": 0}
    made = {"measured_by": "code", "rows_per_call": 128, "device_type": "cpu", "classifier_digest": "c"}
    return {**identity, **sampler, **made, "model_digest": digest, "rows": [row]}


def test_first_model_becomes_champion() -> None:
    assert judge(MEASURED, None).promoted


@pytest.mark.parametrize(("fid", "promoted"), [(1.9, True), (2.0, False), (2.1, False)])
def test_only_a_lower_fid_moves_the_alias(fid: float, promoted: bool) -> None:
    old = {key: str(value) for key, value in MEASURED.items()}  # as tags hold it
    verdict = judge({**MEASURED, "fid": fid}, old)
    assert verdict.promoted is promoted
    assert f"{fid:.6g} against 2" in verdict.reason


@pytest.mark.parametrize("key", COMPARED)
def test_figures_of_another_kind_are_not_compared(key: str) -> None:
    verdict = judge({**MEASURED, "fid": 0.1}, {**MEASURED, key: "other"})
    assert not verdict.promoted
    assert f"differ in {key}" in verdict.reason


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (0.2, "0.15", "1.9 ± 0.2 against 2 ± 0.15; the difference is within its error (0.25)"),
        (0.02, "0.03", "1.9 ± 0.02 against 2 ± 0.03"),
        (0.02, "None", "1.9 ± 0.02 against 2"),
        (None, "None", "1.9 against 2"),
    ],
)
def test_reason_states_the_errors_and_the_rule_stays(new: float | None, old: str, expected: str) -> None:
    verdict = judge({**MEASURED, "fid": 1.9, "fid_error": new}, {**MEASURED, "fid": "2.0", "fid_error": old})
    assert verdict.promoted
    assert verdict.reason.endswith(f"100 samples: {expected}")


def test_model_that_does_not_exist_and_model_without_alias_have_no_champion(client: mlflow.MlflowClient) -> None:
    assert champion(client, "nobody") is None
    client.create_registered_model("no-alias")
    client.create_model_version("no-alias", "file:///nowhere")
    assert champion(client, "no-alias") is None


def test_champion_is_the_version_that_the_alias_points_to(client: mlflow.MlflowClient) -> None:
    client.create_registered_model("aliased")
    for _ in range(2):
        client.create_model_version("aliased", "file:///nowhere", tags={"rediffuse.fid": "1"})
    client.set_registered_model_alias("aliased", ALIAS, "1")
    found = champion(client, "aliased")
    assert (int(found.version), found.tags) == (1, {"rediffuse.fid": "1"})


@pytest.mark.parametrize("failing", ["get_registered_model", "get_model_version"])
@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "TEMPORARILY_UNAVAILABLE", "INVALID_PARAMETER_VALUE"])
def test_error_of_the_registry_is_not_read_as_no_champion(
    client: mlflow.MlflowClient, failing: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{failing}-{code}"
    client.create_registered_model(name)
    client.create_model_version(name, "file:///nowhere")
    client.set_registered_model_alias(name, ALIAS, "1")

    def fail(*arguments: Any, **options: Any) -> None:
        raise MlflowException("the registry is not well", error_code=_error_code(code))

    monkeypatch.setattr(client, failing, fail)
    monkeypatch.setattr(mlflow, "get_registry_uri", lambda: "https://user:secret@registry:5000")
    with pytest.raises(ValueError, match=r"https://registry:5000 does not answer \(.*not well\)"):
        champion(client, name)


def _error_code(name: str) -> int:
    from mlflow.protos import databricks_pb2

    return databricks_pb2.ErrorCode.Value(name)


def test_version_belongs_to_weights_and_code(client: mlflow.MlflowClient) -> None:
    client.create_registered_model("digests")
    tags = {registration.DIGEST_TAG: "weights", registration.CODE_TAG: "code"}
    for more in ({registration.CODE_TAG: "old code"}, {}, {}):
        client.create_model_version("digests", "file:///nowhere", tags={**tags, **more})
    assert find_version(client, "digests", "weights", "code").version == 2
    assert find_version(client, "digests", "weights", "old code").version == 1
    assert find_version(client, "digests", "weights", "new code") is None
    assert find_version(client, "digests", "other weights", "code") is None
    assert find_version(client, "nobody", "weights", "code") is None


def test_code_of_a_version_is_what_the_pyfunc_imports() -> None:
    modules = import_closure(["pipelines.registry.pyfunc_model"])
    assert {"diffusion_core.samplers", "diffusion_core.generation", "diffusion_core.artifact"} <= modules.keys()
    assert not {"diffusion_core.editing", "diffusion_core.metrics.kid", "pipelines.tracking"} & modules.keys()
    assert code_digest() == code_digest()


def test_quality_must_belong_to_the_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"new")
    check_weights({"model_digest": hashlib.sha256(b"new").hexdigest()}, weights)
    with pytest.raises(ValueError, match=r"quality\.json measures the weights .* dvc repro evaluate"):
        check_weights({"model_digest": hashlib.sha256(b"old").hexdigest()}, weights)


def test_gate_takes_the_row_of_its_setting() -> None:
    quality = quality_of("m", 1.0)
    quality["rows"] = [{**quality["rows"][0], "steps": 10, "fid": 3.0}, *quality["rows"]]
    measured = candidate_measurement(quality, Register(model_name="m", eta=0.0, steps=50))
    assert (measured["fid"], measured["fid_error"], measured["steps"]) == (1.0, 0.1, 50)
    assert set(measured) == {*COMPARED, *RECORDED, "fid", "fid_error", "class_agreement"}
    with pytest.raises(ValueError, match=r"no row of eta 1.0 and 50 steps"):
        candidate_measurement(quality, Register(model_name="m", eta=1.0, steps=50))
    del quality["measured_by"]
    with pytest.raises(ValueError, match=r"lacks measured_by: measure again"):
        candidate_measurement(quality, Register(model_name="m", eta=0.0, steps=50))


class _Params:
    """The params that dvc.yaml declares for register."""

    register_ = Register(model_name="model", eta=0.0, steps=50)


def test_stage_registers_once_per_weights_and_code_and_the_gate_moves_the_alias(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(fid: float, seed: int = 0) -> dict[str, Any]:
        digest = small_model(seed).save(MODEL)
        write_json(stage.QUALITY, quality_of(digest, fid))
        register(_Params(), RunSettings())  # type: ignore[arg-type]
        return read_json(REGISTRATION)

    first = run(2.0)
    assert (first["version"], first["promoted"], first["champion_version"]) == (1, True, 1)
    again = run(2.0)
    assert (again["version"], again["promoted"], again["champion_version"]) == (1, False, 1)
    monkeypatch.setattr(stage, "code_digest", lambda: "other code")
    other_code = run(2.0)
    assert (other_code["version"], other_code["promoted"], other_code["champion_version"]) == (2, False, 1)
    better = run(1.0, seed=1)
    assert (better["version"], better["promoted"], better["champion_version"]) == (3, True, 3)
    assert (better["previous_champion_fid"], better["previous_champion_fid_error"]) == (2.0, 0.1)
    assert "1 ± 0.1 against 2 ± 0.1" in better["reason"]

    loaded = mlflow.pyfunc.load_model(f"models:/model@{ALIAS}")
    frame, options = pd.DataFrame({"label": ["dog", "7", 0]}), {"steps": 4, "eta": 1.0, "seed": 5}
    labels = torch.tensor([1, 2, 0])
    expected = generate_images(small_model(1), labels, torch.arange(3), SamplerSettings(4, 1.0), seed=5)
    assert np.array_equal(loaded.predict(frame, params=options), expected.permute(0, 2, 3, 1).numpy())
    with pytest.raises(Exception, match="unknown label 'zebra'"):
        loaded.predict(pd.DataFrame({"label": ["zebra"]}))

    small_model(2).save(MODEL)  # as after `dvc repro -s train` and `-s register`
    with pytest.raises(ValueError, match="dvc repro evaluate"):
        register(_Params(), RunSettings())  # type: ignore[arg-type]


def test_champion_of_another_seed_or_measuring_code_is_measured_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rediffuse")
    asked: list[dict[str, Any]] = []

    def measured_again(version: Any, candidate: dict[str, Any], run: RunSettings) -> dict[str, Any]:
        asked.append(candidate)
        return {**candidate, "fid": 0.5}

    monkeypatch.setattr(stage, "measure_champion", measured_again)
    for seed, changes in enumerate(({}, {"seed": 7}, {"measured_by": "other code"})):
        digest = small_model(seed).save(MODEL)
        write_json(stage.QUALITY, {**quality_of(digest, 1.0), **changes})
        register(_Params(), RunSettings())  # type: ignore[arg-type]
        if changes:
            assert f"measured with another {next(iter(changes))}" in caplog.text
            assert not read_json(REGISTRATION)["promoted"], "0.5 is better than 1.0"
    assert [candidate["seed"] for candidate in asked] == [7, 0]


@pytest.mark.parametrize(("device_type", "rows"), [("cpu", 8), ("cuda", 128)])
def test_champion_is_measured_as_the_candidate_was(
    here: Path, monkeypatch: pytest.MonkeyPatch, device_type: str, rows: int
) -> None:
    """The defect: with evaluate.batch_size 8, the champion was measured with 128 rows per call."""
    write_inputs(("cat", "dog", "7"))
    works: list[Work] = []

    def measure(parts: Any, work: Work, **options: Any) -> list[Measurement]:
        works.append(work)
        return measure_here(parts, work, **options)

    without_ray(champion_measurement, monkeypatch)
    monkeypatch.setattr(champion_measurement, "measure_on_ray", measure)
    monkeypatch.setattr(champion_measurement, "download_model", lambda source, folder: here / "champion")
    small_model(3).save(here / "champion")
    candidate = {
        **MEASURED, "num_samples": 24, "steps": 2, "seed": 9, "guidance_scale": 1.0, "spacing": "trailing",
        "rows_per_call": 8, "device_type": device_type, "classifier_digest": "other", "fid_error": 0.1, "class_agreement": 0.9,
    }  # fmt: skip
    version = SimpleNamespace(name="m", version="1")
    found = champion_measurement.measure_champion(version, candidate, RunSettings())
    assert found is not None
    assert set(found) == set(candidate)
    assert (works[0].seed, works[0].rows_per_call) == (9, rows)
    assert (found["rows_per_call"], found["device_type"], found["seed"]) == (rows, "cpu", 9)
    assert found["measured_by"] == closure_digest(measure_unit)
    reference = load_reference(REFERENCE, works[0].data_hash)
    settings = SamplerSettings(2, 0.0)
    expected = measure_model(
        small_model(3), reference, torch.arange(24), settings, seed=9, rows_per_call=rows, num_groups=8
    )
    assert found["fid"] == pytest.approx(distance_with_error(expected, reference.statistics["train"])[0], rel=1e-6)
    (folder,) = Path("runs/register").iterdir()
    assert read_json(folder / "identity.json")["inputs"]["classifier"] == file_sha256(
        REFERENCE / "classifier.safetensors"
    )


def test_champion_of_other_classes_cannot_be_measured(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(("cat", "dog", "8"))
    without_ray(champion_measurement, monkeypatch)
    monkeypatch.setattr(champion_measurement, "download_model", lambda source, folder: here / "champion")
    small_model().save(here / "champion")
    version = SimpleNamespace(name="m", version="1")
    assert champion_measurement.measure_champion(version, MEASURED, RunSettings()) is None


def test_version_without_a_diffusion_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", lambda source, dst_path: dst_path)
    with pytest.raises(ValueError, match="models:/other/1 holds no diffusion model"):
        download_model("models:/other/1", tmp_path)
    small_model().save(tmp_path / "artifacts" / "model")
    assert download_model("models:/other/1", tmp_path) == tmp_path / "artifacts" / "model"
