from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, replace
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
from pipelines.params import Register, RunSettings, TrackingRun
from pipelines.register import candidate_measurement, check_weights, register
from pipelines.registry import champion_measurement, registration
from pipelines.registry.gate import COMPARED, RECORDED, judge
from pipelines.registry.pyfunc_model import DiffusionPyfunc, input_example, requested_settings
from pipelines.registry.registration import (
    ALIAS,
    champion,
    code_digest,
    create_version,
    download_model,
    find_version,
    judged_settings,
)
from pipelines.stage import MODEL, REFERENCE, REGISTRATION
from pipelines.tracking import stage_run
from tests.conftest import wait_until
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


def small_model(
    seed: int = 0,
    num_steps: int = 100,
    names: tuple[str, ...] = ("cat", "dog", "7"),
    std: float = 0.2,
    **condition: Any,
) -> DiffusionModel:
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
        "condition": condition or {"kind": "class", "size": 3},
    }
    network = build_network(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return DiffusionModel(network, config, make_schedule("cosine", num_steps), "v", 8, 1, names, 0.1)


def quality_of(digest: str, fid: float, eta: float | str = 0.0, steps: int = 50) -> dict[str, Any]:
    row = {"eta": eta, "steps": steps, "fid": fid, "fid_error": 0.1, "class_agreement": 0.9}
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
    reason = r"not permit this \(403\)" if code == "PERMISSION_DENIED" else r"not answer \(.*not well\)"
    with pytest.raises(ValueError, match=f"https://registry:5000 does {reason}"):
        champion(client, name)


def _error_code(name: str) -> int:
    from mlflow.protos import databricks_pb2

    return databricks_pb2.ErrorCode.Value(name)


def test_version_belongs_to_weights_and_code(client: mlflow.MlflowClient) -> None:
    client.create_registered_model("digests")
    judged, other = SamplerSettings(steps=20), SamplerSettings(steps=20, eta="sigma_hat")
    for code in ("old code", "code", "code"):
        client.create_model_version("digests", "file:///nowhere", tags=registration._tags("weights", code, judged))
    assert find_version(client, "digests", "weights", "code", judged).version == 2
    assert find_version(client, "digests", "weights", "old code", judged).version == 1
    assert find_version(client, "digests", "weights", "new code", judged) is None
    assert find_version(client, "digests", "other weights", "code", judged) is None
    assert find_version(client, "digests", "weights", "code", other) is None
    assert find_version(client, "nobody", "weights", "code", judged) is None


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
    def run(fid: float, seed: int = 0, eta: float | str = 0.0, steps: int = 50) -> dict[str, Any]:
        digest = small_model(seed).save(MODEL)
        write_json(stage.QUALITY, quality_of(digest, fid, eta, steps))
        gate = Register(model_name="model", eta=eta, steps=steps)
        register(SimpleNamespace(register_=gate), RunSettings())  # type: ignore[arg-type]
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
    frame, options = pd.DataFrame({"label": ["dog", "7", 7.0]}), {"steps": 4, "eta": 1.0, "seed": 5}
    labels = torch.tensor([1, 2, 2])
    expected = generate_images(small_model(1), labels, torch.arange(3), SamplerSettings(4, 1.0), seed=5)
    assert np.array_equal(loaded.predict(frame, params=options), expected.permute(0, 2, 3, 1).numpy())
    with pytest.raises(Exception, match="unknown label 'zebra'"):
        loaded.predict(pd.DataFrame({"label": ["zebra"]}))

    monkeypatch.setattr(stage, "measure_champion", lambda *arguments: {**arguments[1], "fid": 9.0, "fid_error": None})
    for _ in range(2):
        other_gate = run(0.5, seed=1, eta="sigma_hat", steps=6)
        assert other_gate["version"] == 4, "the same weights with other default sampler settings are another version"
    judged = SamplerSettings(6, "sigma_hat")
    assert judged_settings(Path(mlflow.artifacts.download_artifacts("models:/model/4"))) == judged
    loaded = mlflow.pyfunc.load_model("models:/model/4")
    expected = generate_images(small_model(1), labels, torch.arange(3), judged, seed=0)
    assert np.array_equal(loaded.predict(frame), expected.permute(0, 2, 3, 1).numpy())

    small_model(2).save(MODEL)  # as after `dvc repro -s train` and `-s register`
    with pytest.raises(ValueError, match="dvc repro evaluate"):
        register(_Params(), RunSettings())  # type: ignore[arg-type]


JUDGED = SamplerSettings(steps=3, eta=1.0, guidance_scale=2.0)


def register_version(folder: Path, name: str, model: DiffusionModel) -> None:
    """Register a version of the model in the store of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            patch.setenv(variable, "")  # MLflow sets both, also in the test before
        patch.chdir(folder)
        digest = model.save(MODEL)
        tracking = TrackingRun(uri=f"sqlite:///{folder / 'mlflow.db'}")
        with stage_run(tracking, "register", name, settings={}, tags={}) as run:
            create_version(run, name, MODEL, model, digest, "code", JUDGED)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the registered version model/1: the small model with a schedule of 20 steps."""
    folder = tmp_path_factory.mktemp("store")
    register_version(folder, "model", small_model(num_steps=20))
    return folder


@pytest.fixture(scope="module")
def logged(store: Path) -> mlflow.pyfunc.PyFuncModel:
    """The version model/1, loaded as the server loads it."""
    uri = f"sqlite:///{store / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return mlflow.pyfunc.load_model("models:/model/1")


def test_model_that_fails_on_its_own_input_example_is_not_registered(store: Path) -> None:
    expected = r"no version is registered, because .* own input example: the network returned NaN or infinity at step"
    with pytest.raises(ValueError, match=expected):
        register_version(store, "broken", small_model(std=1e30))
    uri = f"sqlite:///{store / 'mlflow.db'}"
    assert [found.name for found in mlflow.MlflowClient(uri, uri).search_registered_models()] == ["model"]


def ask(logged: mlflow.pyfunc.PyFuncModel, body: str, kind: str = "application/json") -> np.ndarray:
    """Answer a request as MLflow's server does, without the socket."""
    from mlflow.pyfunc.scoring_server import invocations

    answer = invocations(body.encode(), kind, logged, logged.metadata.get_input_schema())
    assert answer.status == 200
    return np.asarray(json.loads(answer.response)["predictions"])


def columns(params: dict[str, Any] | None = None, **given: Any) -> str:
    """The body of a JSON request."""
    split = {"columns": list(given), "data": list(zip(*given.values(), strict=True))}
    return json.dumps({"dataframe_split": split, **({"params": params} if params else {})})


def test_label_takes_names_and_class_index_takes_indices(logged: mlflow.pyfunc.PyFuncModel) -> None:
    expected = generate_images(small_model(num_steps=20), torch.tensor([2, 2]), torch.arange(2), JUDGED, seed=0)
    images = expected.permute(0, 2, 3, 1).numpy()
    for values in ([7, 7], [7.0, 7.0], ["7", "7"]):
        assert np.array_equal(logged.predict(pd.DataFrame({"label": values})), images)
        assert np.array_equal(ask(logged, columns(label=values)), images)
    for values in ([2, 2], [2.0, 2.0], ["2", "2"]):
        assert np.array_equal(logged.predict(pd.DataFrame({"class_index": values})), images)
        assert np.array_equal(ask(logged, columns(class_index=values)), images)
    for body in ("label\n7\n7\n", "class_index\n2\n2\n", "sample_index,label\n0,7\n1,7.0\n"):
        assert np.array_equal(ask(logged, body, "text/csv"), images)


@pytest.mark.parametrize("kind", ["param", "column", "csv"])
def test_requests_continue_a_sequence(logged: mlflow.pyfunc.PyFuncModel, kind: str) -> None:
    whole = ask(logged, columns(label=["cat"] * 6))
    assert len(np.unique(whole.reshape(6, -1), axis=0)) == 6
    if kind == "param":
        rest = ask(logged, columns({"first": 2}, label=["cat"] * 4))
    elif kind == "column":
        rest = ask(logged, columns(label=["cat"] * 4, sample_index=[2, 3, 4, 5]))
    else:
        rest = ask(logged, "label,sample_index\ncat,2\ncat,3\ncat,4\ncat,5\n", "text/csv")
    assert np.array_equal(rest, whole[2:])


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (columns(label=["zebra"]), "unknown label 'zebra': the 3 names are cat, dog, 7"),
        (columns(label=[0]), "unknown label 0"),
        (columns(label=[True]), "the label True is a bool"),
        (columns(label=["cat", None]), "a label is missing"),
        (columns(class_index=[3]), "unknown class index 3"),
        (columns(class_index=["cat"]), "unknown class index 'cat'"),
        (columns(class_index=[1.7]), "unknown class index 1.7"),
        (columns(class_index=[True]), "unknown class index True"),
        (columns(label=["cat"], class_index=[0]), "exactly one of the columns label .* it has label and class_index"),
        (columns(labels=["cat"]), "exactly one of the columns label .* it has neither"),
        (columns(label=["cat"], sample_index=[-1]), "unknown sample_index -1"),
        (columns({"first": 3}, label=["cat"], sample_index=[1]), "sample_index and the param first were both given"),
        (columns({"first": -1}, label=["cat"]), "first is -1"),
        (columns({"first": 2**62}, label=["cat"]), "sample numbers must lie in"),
        (columns({"steps": 21}, label=["cat"]), "a grid of 21 steps does not fit a schedule of 20"),
        (columns({"steps": 0}, label=["cat"]), "steps must be at least 1"),
        (columns({"eta": 1.5}, label=["cat"]), "eta must lie in 0 to 1"),
        (columns({"eta": 0.5, "sigma_hat": True}, label=["cat"]), "eta 0.5 and sigma_hat were both given"),
        (columns({"spacing": "even"}, label=["cat"]), "unknown grid spacing 'even'"),
        (columns({"guidance_scale": float("inf")}, label=["cat"]), "a guidance scale must be a finite number"),
        (columns({"seed": -1}, label=["cat"]), "a seed must be a whole number"),
    ],
)
def test_wrong_request_is_answered_with_400_and_our_sentence(
    logged: mlflow.pyfunc.PyFuncModel, body: str, sentence: str
) -> None:
    with pytest.raises(MlflowException, match=sentence) as caught:
        ask(logged, body)
    assert caught.value.get_http_status_code() == 400
    assert not {"Traceback", "stack_trace"} & set(caught.value.serialize_as_json().replace('"', " ").split())


def test_text_csv_with_an_unknown_label_is_answered_with_400(logged: mlflow.pyfunc.PyFuncModel) -> None:
    with pytest.raises(MlflowException, match="unknown label 'zebra'") as caught:
        ask(logged, "label\nzebra\n", "text/csv")
    assert caught.value.get_http_status_code() == 400


def test_every_sampler_setting_can_be_requested(logged: mlflow.pyfunc.PyFuncModel) -> None:
    model, labels = small_model(num_steps=20), torch.tensor([0, 1])
    for params, settings in (
        ({}, JUDGED),
        ({"steps": 5}, replace(JUDGED, steps=5)),
        ({"eta": 0.25}, replace(JUDGED, eta=0.25)),
        ({"sigma_hat": True}, replace(JUDGED, eta="sigma_hat")),
        ({"guidance_scale": 1.0, "spacing": "linspace"}, replace(JUDGED, guidance_scale=1.0, spacing="linspace")),
    ):
        expected = generate_images(model, labels, torch.arange(2), settings, seed=4).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(ask(logged, columns({"seed": 4, **params}, label=["cat", "dog"])), expected), params


def test_request_for_eta_replaces_a_judged_sigma_hat() -> None:
    judged = SamplerSettings(steps=3, eta="sigma_hat")
    as_filled_in = {"steps": 3, "sigma_hat": True, "guidance_scale": 1.0, "spacing": "trailing"}
    assert requested_settings(as_filled_in, judged) == judged
    assert requested_settings({**as_filled_in, "eta": 0.5}, judged).eta == 0.5
    with pytest.raises(ValueError, match="sigma_hat is false: give a number for eta"):
        requested_settings({**as_filled_in, "sigma_hat": False}, judged)
    with pytest.raises(ValueError, match="unknown params sampler"):
        requested_settings({"sampler": "heun"}, judged)


def served(model: DiffusionModel, folder: Path) -> tuple[DiffusionPyfunc, Any]:
    """The pyfunc of a model and its context, without MLflow around them."""
    model.save(folder / "model")
    context = SimpleNamespace(artifacts={"model": str(folder / "model")}, model_config=asdict(JUDGED))
    pyfunc = DiffusionPyfunc()
    pyfunc.load_context(context)  # type: ignore[arg-type]
    return pyfunc, context


def test_model_without_names_is_asked_by_index(tmp_path: Path) -> None:
    model = small_model(names=())
    pyfunc, context = served(model, tmp_path)
    expected = generate_images(model, torch.tensor([0, 1]), torch.arange(2), JUDGED, seed=0)
    example = input_example(model)
    assert example.to_dict("list") == {"class_index": [0, 1]}
    assert np.array_equal(pyfunc.predict(context, example), expected.permute(0, 2, 3, 1).numpy())
    with pytest.raises(MlflowException, match="no class names: give class indices"):
        pyfunc.predict(context, pd.DataFrame({"label": [0]}))


def test_model_without_a_condition_is_asked_by_sample_index(tmp_path: Path) -> None:
    model = replace(small_model(names=(), kind="none"), condition_dropout=0.0)
    pyfunc, context = served(model, tmp_path)
    context.model_config["guidance_scale"] = 1.0
    settings = replace(JUDGED, guidance_scale=1.0)
    expected = generate_images(model, None, torch.tensor([0, 1]), settings, seed=0)
    assert np.array_equal(pyfunc.predict(context, input_example(model)), expected.permute(0, 2, 3, 1).numpy())
    with pytest.raises(MlflowException, match="takes no condition"):
        pyfunc.predict(context, pd.DataFrame({"label": ["cat"]}))


@pytest.mark.slow
def test_real_server_answers_json_and_csv_and_refuses_with_our_sentence(
    store: Path, logged: mlflow.pyfunc.PyFuncModel
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"sqlite:///{store / 'mlflow.db'}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/model/1", "--env-manager", "local"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_REGISTRY_URI": uri}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    server = subprocess.Popen(
        [*command, "-p", str(port)], cwd=store, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def post(body: str, kind: str) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body.encode(), {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def first_answer() -> tuple[int, str] | None:
        try:
            return post(columns(label=["cat", 7]), "application/json")
        except OSError:
            return None

    try:
        status, answer = wait_until(first_answer, 120, "the server to answer")
        expected = ask(logged, columns(label=["cat", 7]))
        assert status == 200 and np.array_equal(json.loads(answer)["predictions"], expected)
        status, answer = post("label\ncat\n7\n", "text/csv")
        assert status == 200 and np.array_equal(json.loads(answer)["predictions"], expected)
        for body, kind in ((columns(label=["zebra"]), "application/json"), ("label\nzebra\n", "text/csv")):
            status, answer = post(body, kind)
            assert status == 400
            assert "unknown label 'zebra': the 3 names are cat, dog, 7" in json.loads(answer)["message"]
            assert "Traceback" not in answer and "stack_trace" not in answer
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


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
