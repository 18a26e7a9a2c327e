"""The model directory: saved, loaded, and refused if it is damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_core.artifact import SCHEMA_VERSION, DiffusionModel
from diffusion_core.networks import build_network
from diffusion_core.schedules import NoiseSchedule, make_schedule

FIXTURE = Path(__file__).parent / "fixtures" / "model_schema_1"
NAN = float("nan")

CONDITIONS = {
    "none": ({"kind": "none"}, {}),
    "class": ({"kind": "class", "size": 3}, {"class_names": ("cat", "dog", "owl")}),
    "classes": (
        {"kind": "classes", "sizes": [2, 3]},
        {"attributes": {"sex": ("f", "m"), "hair": ("dark", "fair", "none")}},
    ),
    "multi_hot": ({"kind": "multi_hot", "size": 3}, {"class_names": ("hat", "smile", "glasses")}),
    "vector": ({"kind": "vector", "size": 2}, {"condition_source": "a text encoder"}),
    "tokens": ({"kind": "tokens", "size": 2, "length": 3}, {"condition_source": "a text encoder"}),
}


def make_model(kind="class", **changes):
    torch.manual_seed(0)
    condition, vocabulary = CONDITIONS[kind]
    config = {
        "name": "unet",
        "condition": condition,
        "image_size": 4,
        "image_channels": 1,
        "channels": 8,
        "multipliers": [1, 1],
        "num_res_blocks": 1,
        "attention_sizes": [2],
        "groups": 4,
    }
    network = build_network(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return DiffusionModel(
        network=network,
        network_config=config,
        schedule=make_schedule("cosine", num_steps=10),
        objective="v",
        image_size=4,
        image_channels=1,
        **{"condition_dropout": 0.1, "provenance": {"data": "abc"}, **vocabulary, **changes},
    )


@pytest.mark.parametrize("kind", CONDITIONS)
@torch.no_grad()
def test_saved_model_loads_with_everything_it_had(kind, tmp_path):
    model = make_model(kind)
    digest = model.save(tmp_path / "model")
    assert hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest() == digest
    loaded = DiffusionModel.load(tmp_path / "model")
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0, 9])
    torch.testing.assert_close(loaded.network(x, t), model.network(x, t), atol=1e-6, rtol=1e-5)
    for name in ("objective", "image_shape", "condition", "class_names", "attributes", "condition_source"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert loaded.provenance == {"data": "abc"} and loaded.condition_dropout == 0.1
    assert torch.equal(loaded.schedule.alphas_cumprod, model.schedule.alphas_cumprod)
    assert not loaded.network.training and not any(p.requires_grad for p in loaded.network.parameters())


@torch.no_grad()
def test_model_of_schema_1_loads_and_computes_the_same():
    assert json.loads((FIXTURE / "model.json").read_text())["schema_version"] == 1
    model = DiffusionModel.load(FIXTURE)
    assert model.class_names == ("cat", "dog", "owl") and model.attributes == {} and model.condition_source == ""
    x = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
    output = model.network(x, torch.tensor([0, 9]), torch.tensor([2, 3])).flatten()
    # EXPECTED was computed by the code that wrote the fixture
    expected = torch.tensor(EXPECTED)
    torch.testing.assert_close(output[:6], expected, atol=1e-5, rtol=1e-4)


EXPECTED = [0.14592993, 0.08820305, 0.26404593, 0.11673043, 0.19169115, 0.08407012]


def change_json(folder, **changes):
    path = folder / "model.json"
    description = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del description[key]
        else:
            description[key] = value
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schema_version": ...}, "no schema_version"),
        ({"schema_version": SCHEMA_VERSION + 1}, "upgrade rediffuse"),
        ({"schema_version": "2"}, "schema_version must be a whole number"),
        ({"objective": ...}, "lacks objective"),
        ({"attributes": ..., "provenance": ...}, "lacks attributes, provenance"),
        ({"class_names": "cat"}, "class_names has the wrong type"),
        ({"class_names": ["cat", "dog"]}, "2 class_names were given for a class condition of size 3"),
        ({"class_names": ["cat", "dog", "cat"]}, "a name twice"),
        ({"attributes": {"sex": ["f"]}}, "attributes has"),
        ({"condition_dropout": 1.5}, "condition_dropout"),
        ({"image": {"size": 8, "channels": 1}}, "image_size is 8, but the network is built for 4"),
        ({"image": {"size": 4}}, r"image\.channels"),
        ({"objective": "score"}, "unknown objective 'score'"),
        ({"schedule": {"name": "magic"}}, "unknown noise schedule 'magic'"),
        ({"schedule": {}}, "name"),
        ({"network": {"name": "magic"}}, "unknown network 'magic'"),
        ({"weights_sha256": "0" * 64}, "SHA-256"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_broken_description_is_refused_with_its_fault(changes, named, tmp_path):
    make_model().save(tmp_path / "model")
    change_json(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=named):
        DiffusionModel.load(tmp_path / "model")


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    change_json(folder, weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: weights.pop("conv_in.bias"), r"lacks conv_in\.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "holds extra"),
        (
            lambda weights: weights.update({"conv_in.bias": torch.zeros(3)}),
            r"conv_in\.bias is \[3\], but the network has \[8\]",
        ),
        (lambda weights: weights["conv_in.bias"].fill_(NAN), "NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_their_name(change, named, tmp_path):
    make_model().save(tmp_path / "model")
    change_weights(tmp_path / "model", change)
    with pytest.raises(ValueError, match=named):
        DiffusionModel.load(tmp_path / "model")


def test_missing_or_torn_files_are_refused(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot read"):
        DiffusionModel.load(tmp_path / "model")
    (tmp_path / "model" / "model.json").write_text('{"schema_version"')
    with pytest.raises(ValueError, match="not valid JSON"):
        DiffusionModel.load(tmp_path / "model")


def test_guidance_without_condition_dropout_is_refused():
    with pytest.raises(ValueError, match="condition_dropout"):
        make_model(condition_dropout=0.0).denoiser(guidance_scale=2.0)
    with pytest.raises(ValueError, match="needs a model with a condition"):
        make_model("none").denoiser(guidance_scale=2.0)
    assert make_model("none").denoiser().objective == "v"


def test_failed_save_keeps_the_previous_model(tmp_path, monkeypatch):
    model = make_model()
    digest = model.save(tmp_path / "model")
    monkeypatch.setattr("diffusion_core.artifact.write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make_model().save(tmp_path / "model")
    monkeypatch.undo()
    DiffusionModel.load(tmp_path / "model")
    assert hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest() == digest
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("attributes", {"a": 3}, "attributes.a"),
        ("class_names", [1, 2, 3], "class_names"),
        ("class_names", [["cat"], "dog", "owl"], "class_names"),
        ("schedule", {"name": "cosine", "num_steps": 10.5}, "num_steps"),
        ("schedule", {"num_steps": 10}, "name"),
        ("network", {"name": "unet", "channels": -8, "image_size": 4, "image_channels": 1}, "channels"),
        ("network", {"name": "unet", "condition": {"sort": "class"}}, "sort"),
    ],
)
def test_wrong_value_in_the_description_is_refused_with_its_key(key, value, named, tmp_path):
    make_model().save(tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=rf"model\.json.*{named}"):
        DiffusionModel.load(tmp_path / "model")


def test_weights_of_another_dtype_are_refused(tmp_path):
    make_model().save(tmp_path / "model")
    change_weights(tmp_path / "model", lambda weights: weights.update({"conv_in.bias": weights["conv_in.bias"].long()}))
    with pytest.raises(ValueError, match=r"conv_in\.bias is torch\.int64"):
        DiffusionModel.load(tmp_path / "model")


def test_schedule_given_as_an_array_is_saved_with_the_model(tmp_path):
    array = make_schedule("sigmoid", num_steps=7).alphas_cumprod
    replace(make_model(), schedule=NoiseSchedule(array)).save(tmp_path / "model")
    assert torch.equal(DiffusionModel.load(tmp_path / "model").schedule.alphas_cumprod, array)


def test_vocabulary_of_another_kind_of_condition_is_refused():
    with pytest.raises(ValueError, match="class_names name the classes"):
        make_model("vector", class_names=("cat", "dog"))


def test_provenance_that_json_cannot_represent_is_refused(tmp_path):
    with pytest.raises(ValueError, match="provenance"):
        make_model(provenance={"data": tmp_path}).save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
