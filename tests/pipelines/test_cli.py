from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_core.artifact import DiffusionModel
from diffusion_core.networks import build_network
from diffusion_core.schedules import make_schedule
from pipelines.cli import main


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
def test_same_seed_gives_the_same_images_whatever_the_batch_size(
    model_dir: Path, tmp_path: Path, batch_size: str
) -> None:
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


def test_folder_gets_one_file_an_image_with_its_label(model_dir: Path, tmp_path: Path) -> None:
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


def test_missing_and_unknown_models_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for model in (str(tmp_path / "nowhere"), "models:/nobody@champion"):
        with pytest.raises(SystemExit):
            main(["sample", model])
        assert "nowhere" in (error := capsys.readouterr().err) or "nobody" in error


def test_doctor_names_versions_devices_and_stores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    main(["doctor"])
    text = capsys.readouterr().out
    for word in ("torch", "ray", "mlflow", "dvc", "cores", "cuda", "MLflow", "sqlite:///", "Ray", "free"):
        assert word in text
    assert list(tmp_path.iterdir()) == [], "doctor changes nothing"
