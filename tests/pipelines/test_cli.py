from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_core.artifact import DiffusionModel
from diffusion_core.networks import build_network
from diffusion_core.schedules import make_schedule
from pipelines.cli import main
from pipelines.params import TrackingRun
from pipelines.tracking import report_changed_store
from tests.conftest import ROOT


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working folder, and an environment without settings."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "REDIFFUSE_RUN", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # MLflow sets its own, and this restores them after the test
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights: 8x8 grey, four named classes."""
    torch.manual_seed(0)
    config = {
        "name": "unet",
        "image_size": 8,
        "image_channels": 1,
        "channels": 8,
        "multipliers": [1, 2],
        "num_res_blocks": 1,
        "attention_sizes": [],
        "condition": {"kind": "class", "size": 4},
    }
    network = build_network(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = DiffusionModel(network, config, make_schedule("cosine", 100), "v", 8, 1, ("cat", "dog", "owl", "7"), 0.1)
    folder = tmp_path_factory.mktemp("model") / "model"
    model.save(folder)
    return folder


def sample(model_dir: Path, output: Path, *more: str) -> None:
    main(["sample", str(model_dir), "--num", "20", "--steps", "5", "--eta", "1", "--output", str(output), *more])


@pytest.mark.parametrize("batch_size", ["1", "7", "64"])
def test_same_seed_gives_the_same_images_for_any_batch_size(model_dir: Path, tmp_path: Path, batch_size: str) -> None:
    sample(model_dir, tmp_path / "a.png", "--batch-size", "20")
    sample(model_dir, tmp_path / "b.png", "--batch-size", batch_size)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    sample(model_dir, tmp_path / "c.png", "--seed", "1")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_fewer_images_are_the_first_of_more(model_dir: Path, tmp_path: Path) -> None:
    sample(model_dir, tmp_path / "all")
    main(["sample", str(model_dir), "--num", "3", "--steps", "5", "--eta", "1", "--output", str(tmp_path / "few")])
    for path in (tmp_path / "few").iterdir():
        assert path.read_bytes() == (tmp_path / "all" / f"0{path.name}").read_bytes()


def test_folder_gets_one_file_per_image_with_its_label(model_dir: Path, tmp_path: Path) -> None:
    sample(model_dir, tmp_path / "out", "--labels", "owl,1,7")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[:4] == ["00-owl.png", "01-dog.png", "02-7.png", "03-owl.png"]
    assert len(names) == 20
    assert np.asarray(Image.open(tmp_path / "out" / "00-owl.png")).shape == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--labels", "zebra"], "unknown label 'zebra'"),
        (["--labels", "9"], "unknown label '9'"),
        (["--eta", "2"], "eta must lie in 0 to 1"),
        (["--eta", "x"], "--eta: given 'x'"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--steps", "500"], "a grid of 500 steps does not fit a schedule of 100"),
        (["--num", "0"], "--num: given 0"),
        (["--seed", "-1"], "a seed must be a whole number"),
        (["--output", "x.jpg"], "ends in .png"),
    ],
)
def test_wrong_arguments_give_one_line(
    model_dir: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sample", str(model_dir), "--num", "2", *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 1
    assert expected in error
    assert "Traceback" not in error


def test_missing_and_unknown_models_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, named in ((str(here / "nowhere"), "nowhere"), ("models:/nobody@champion", "nobody")):
        with pytest.raises(SystemExit):
            main(["sample", model])
        assert named in capsys.readouterr().err


def test_sample_asks_the_registry_of_run_yaml(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "elsewhere.yaml").write_text("tracking: {uri: 'sqlite:///elsewhere.db'}")
    monkeypatch.setenv("REDIFFUSE_RUN", "elsewhere.yaml")
    with pytest.raises(SystemExit):
        main(["sample", "models:/nobody@champion"])
    assert "the registry is sqlite:///elsewhere.db" in capsys.readouterr().err
    assert not (here / "mlflow.db").exists()


def test_model_without_class_names_is_sampled_by_index(model_dir: Path, tmp_path: Path) -> None:
    model = DiffusionModel.load(model_dir)
    DiffusionModel(model.network, model.network_config, model.schedule, "v", 8, 1, (), 0.1).save(tmp_path / "model")
    sample(tmp_path / "model", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[:5] == [
        "00-0.png", "01-1.png", "02-2.png", "03-3.png", "04-0.png",
    ]  # fmt: skip


def test_every_class_is_sampled_if_classes_are_named_by_numbers(model_dir: Path, tmp_path: Path) -> None:
    model = DiffusionModel.load(model_dir)
    names = ("1", "2", "3", "4")
    DiffusionModel(model.network, model.network_config, model.schedule, "v", 8, 1, names, 0.1).save(tmp_path / "model")
    sample(tmp_path / "model", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[:5] == [
        "00-1.png", "01-2.png", "02-3.png", "03-4.png", "04-1.png",
    ]  # fmt: skip


def test_doctor_names_versions_devices_settings_and_stores(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    text = capsys.readouterr().out
    for word in ("Python", "uv ", "torch", "ray", "mlflow", "dvc", "cores", "cuda", "precision auto: ", "free"):
        assert word in text
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert lines["MLflow"] == "sqlite:///mlflow.db (not created yet)"
    assert lines["params.yaml"] == "not found: run this in the project's folder"
    assert lines["run.yaml"] == "not found: every count is auto"
    assert "stages start a local Ray" in lines["Ray"]
    assert list(here.iterdir()) == [], "doctor changes nothing"


def test_doctor_says_whether_both_settings_files_are_valid(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines() -> dict[str, str]:
        main(["doctor"])
        return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())

    shutil.copy(ROOT / "params.yaml", here / "params.yaml")
    (here / "run.yaml").write_text("tracking: {uri: 'sqlite:///other.db'}")
    found = lines()
    assert (found["params.yaml"], found["run.yaml"]) == ("valid", "valid")
    assert found["MLflow"].startswith("sqlite:///other.db")
    (here / "params.yaml").write_text("seed: x")
    (here / "bad.yaml").write_text("train: {num_workers: 0}")
    monkeypatch.setenv("REDIFFUSE_RUN", "bad.yaml")
    found = lines()
    assert "seed: given 'x'" in found["params.yaml"]
    assert "train.num_workers: given 0" in found["bad.yaml"]


def test_doctor_says_where_the_earlier_runs_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_changed_store(TrackingRun())
    main(["doctor"])
    assert "has changed" not in capsys.readouterr().out
    (here / "run.yaml").write_text("tracking: {uri: 'sqlite:///other.db'}")
    for _ in range(2):
        main(["doctor"])
        assert "the earlier champions are in sqlite:///mlflow.db" in capsys.readouterr().out
