from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings
from diffusion_core.networks import build_network
from diffusion_core.schedules import make_schedule
from pipelines.cli import _file_names, main
from pipelines.params import TrackingRun
from pipelines.registry.registration import create_version
from pipelines.tracking import connect, report_changed_store, stage_run
from tests.conftest import ROOT


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working folder, and an environment without settings."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "REDIFFUSE_RUN", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # MLflow sets its own, and this restores them after the test
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small_model(
    names: Sequence[str] = ("cat", "dog", "owl", "7"), num_steps: int = 100, condition: dict[str, Any] | None = None
) -> DiffusionModel:
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
        "condition": condition or {"kind": "class", "size": 4},
    }
    network = build_network(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return DiffusionModel(network, config, make_schedule("cosine", num_steps), "v", 8, 1, tuple(names), 0.1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    small_model().save(folder)
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
    sample(model_dir, tmp_path / "out", "--labels", "owl, dog,7.0")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[:4] == ["00-owl.png", "01-dog.png", "02-7.png", "03-owl.png"]
    assert len(names) == 20
    assert np.asarray(Image.open(tmp_path / "out" / "00-owl.png")).shape == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--labels", "zebra"], "unknown label 'zebra'"),
        (["--labels", "9"], "unknown label '9'"),
        (["--labels", "0"], "unknown label '0'"),
        (["--labels", "kat"], "the nearest are 'cat'"),
        (["--labels", ""], "--labels: given nothing"),
        (["--labels", '"cat'], "--labels: given"),
        (["--class-indices", "4"], "unknown class index '4'"),
        (["--class-indices", "cat"], "unknown class index 'cat'"),
        (["--class-indices", "1.5"], "unknown class index '1.5'"),
        (["--first", "-1"], "--first: given -1"),
        (["--first", "4294967295"], "--first: given 4294967295"),
        (["--spacing", "even"], "unknown grid spacing 'even'"),
        (["--guidance-scale", "nan"], "guidance scale must be a finite number"),
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


@pytest.mark.parametrize(
    "arguments",
    [["--label", "cat"], ["--step", "3"], ["--temperature", "1"], ["--labels", "cat", "--class-indices", "0"]],
)
def test_unknown_shortened_and_contradicting_options_are_refused(model_dir: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sample", str(model_dir), *arguments])
    assert caught.value.code == 2


NAMES = ("a:b", "a+b", "a,b", "a=b", '"quoted"', "x, y", "plain")


def test_names_with_operators_and_commas_can_be_given_and_get_distinct_files(tmp_path: Path) -> None:
    small_model(NAMES, condition={"kind": "class", "size": 7}).save(tmp_path / "model")
    labels = 'a:b,a+b,"a,b",a=b,"""quoted""","x, y",plain'
    for output, options in (
        ("out", ["--labels", labels]),
        ("all", []),
        ("indices", ["--class-indices", "0,1,2,3,4,5,6"]),
    ):
        main(["sample", str(tmp_path / "model"), "--steps", "2", "--output", str(tmp_path / output), *options])
        assert names_in(tmp_path / output) == [
            "0-a_b.0.png", "1-a_b.1.png", "2-a_b.2.png", "3-a_b.3.png", "4-_quoted_.png", "5-x__y.png", "6-plain.png",
        ]  # fmt: skip
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "all" / path.name).read_bytes()


def test_file_names_differ_for_every_class() -> None:
    names = ["Cat", "cat", "a/b", "a b", "a_b", "a_b.2", "x" * 300, "x" * 400, "\u732b" * 200, "dog"]
    found = _file_names(names)
    assert len({name.casefold() for name in found}) == len(names)
    assert found[-1] == "dog" and all(len(name.encode()) < 200 and "/" not in name for name in found)


def test_every_class_is_sampled_once_by_default(model_dir: Path, tmp_path: Path) -> None:
    main(["sample", str(model_dir), "--steps", "2", "--output", str(tmp_path / "all")])
    assert names_in(tmp_path / "all") == ["0-cat.png", "1-dog.png", "2-owl.png", "3-7.png"]
    main(["sample", str(model_dir), "--steps", "2", "--labels", "7,cat", "--output", str(tmp_path / "two")])
    assert names_in(tmp_path / "two") == ["0-7.png", "1-cat.png"]
    main(["sample", str(model_dir), "--steps", "2", "--num", "5", "--output", str(tmp_path / "five")])
    assert names_in(tmp_path / "five")[3:] == ["3-7.png", "4-cat.png"]


def test_unconditional_model_is_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model((), condition={"kind": "none"}).save(tmp_path / "model")
    main(["sample", str(tmp_path / "model"), "--steps", "2", "--num", "3", "--output", str(tmp_path / "out")])
    assert names_in(tmp_path / "out") == ["0.png", "1.png", "2.png"]
    main(["sample", str(tmp_path / "model"), "--steps", "2", "--output", str(tmp_path / "default")])
    assert len(names_in(tmp_path / "default")) == 16
    for option in ("--labels", "--class-indices"):
        with pytest.raises(SystemExit):
            main(["sample", str(tmp_path / "model"), option, "0"])
        assert f"{option}: {tmp_path / 'model'} takes no condition" in capsys.readouterr().err


def test_first_continues_the_sequence_of_the_same_seed(model_dir: Path, tmp_path: Path) -> None:
    sample(model_dir, tmp_path / "whole")
    for first, num in ((0, 7), (7, 13)):
        sample(model_dir, tmp_path / f"from_{first}", "--num", str(num), "--first", str(first))
    parts = [*(tmp_path / "from_0").iterdir(), *(tmp_path / "from_7").iterdir()]
    assert {path.name.lstrip("0") for path in parts} == {name.lstrip("0") for name in names_in(tmp_path / "whole")}
    whole = {path.name.lstrip("0"): path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert all(path.read_bytes() == whole[path.name.lstrip("0")] for path in parts)
    assert len(set(whole.values())) == 20


def test_set_of_images_is_never_mixed_with_others(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    sample(model_dir, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(SystemExit):
        sample(model_dir, output, "--num", "3", "--seed", "1")
    assert "already holds 00-cat.png and more" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    (output / ".gitignore").write_text("*")
    sample(model_dir, output, "--num", "3", "--seed", "1", "--overwrite")
    assert names_in(output) == [".gitignore", "0-cat.png", "1-dog.png", "2-owl.png"]
    (output / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        sample(model_dir, output, "--overwrite")
    assert "holds notes.txt, which is no .png file" in capsys.readouterr().err
    assert len(names_in(output)) == 5


@pytest.mark.parametrize("exists", [False, True])
def test_half_written_sets_do_not_stay(
    model_dir: Path, tmp_path: Path, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    if exists:
        sample(model_dir, output, "--num", "2")
    before = names_in(output) if exists else None
    written: list[int] = []

    def fail(picture: Image.Image) -> bytes:
        written.append(1)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return b"png"

    monkeypatch.setattr("pipelines.pictures.png", fail)
    with pytest.raises(SystemExit):
        sample(model_dir, output, "--num", "5", "--overwrite")
    assert (names_in(output) if output.exists() else None) == before
    assert names_in(tmp_path) == (["out"] if exists else [])


def test_path_with_a_dot_is_a_folder_if_it_is_one_or_ends_in_a_slash(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.v1").mkdir()
    (tmp_path / "odd.png").mkdir()
    command = ["sample", str(model_dir), "--steps", "2", "--num", "1", "--output"]
    for output in ("run.v1", "odd.png", "new.v2/"):
        main([*command, f"{tmp_path}/{output}"])
        assert names_in(tmp_path / output) == ["0-cat.png"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    main([*command, "."])
    assert names_in(tmp_path / "empty") == ["0-cat.png"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "file")])
    assert "file is a file, allowed a name that ends in .png" in capsys.readouterr().err


def test_defaults_fit_a_short_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(num_steps=20).save(tmp_path / "model")
    main(["sample", str(tmp_path / "model"), "--output", str(tmp_path / "a.png")])
    assert "(20 steps, eta 0.0, guidance 1, trailing)" in capsys.readouterr().out


def test_defaults_are_the_settings_that_the_gate_judged_these_weights_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = small_model().save(tmp_path / "model")
    candidate = {"steps": 6, "eta": "sigma_hat", "guidance_scale": 1.5, "spacing": "uniform", "fid": 1.0}
    record = tmp_path / "registration.json"
    record.write_text(json.dumps({"model_digest": digest, "candidate": candidate}))
    command = ["sample", str(tmp_path / "model"), "--num", "1", "--output", str(tmp_path / "a.png")]

    def used(*more: str) -> str:
        main([*command, *more])
        return capsys.readouterr().out

    assert "(6 steps, eta sigma_hat, guidance 1.5, uniform)" in used()
    assert "(4 steps, eta 0.5, guidance 1, linspace)" in used(
        "--steps", "4", "--eta", "0.5", "--guidance-scale", "1", "--spacing", "linspace"
    )
    record.write_text(json.dumps({"model_digest": "other weights", "candidate": candidate}))
    assert "(50 steps, eta 0.0, guidance 1, trailing)" in used()
    record.write_text(json.dumps({"model_digest": digest}))
    with pytest.raises(SystemExit):
        main(command)
    assert "registration.json is damaged" in capsys.readouterr().err


def test_registered_model_is_sampled_as_it_was_judged(
    here: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, judged = DiffusionModel.load(model_dir), SamplerSettings(4, "sigma_hat", 2.0, "linspace")
    tracking = TrackingRun()
    with stage_run(tracking, "register", "key", settings={}, tags={}) as run:
        create_version(run, "tiny", model_dir, model, "digest", "code", judged)
    main(["sample", "models:/tiny/1", "--output", "a.png"])
    assert "4 images of 8x8 (4 steps, eta sigma_hat, guidance 2, linspace)" in capsys.readouterr().out
    options = ["--steps", "4", "--eta", "sigma_hat", "--guidance-scale", "2", "--spacing", "linspace"]
    main(["sample", str(model_dir), "--output", "b.png", *options])
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_network_that_returns_nan_gives_one_line_and_no_picture(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "diffusion_core.networks.unet.UNet.forward", lambda self, x, *more: torch.full_like(x, torch.nan)
    )
    with pytest.raises(SystemExit):
        main(["sample", str(model_dir), "--output", str(tmp_path / "a.png")])
    assert "NaN or infinity at step t = 99 for sample 0 with condition 0" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_missing_and_unknown_models_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    connect(TrackingRun())
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
    assert "sqlite:///elsewhere.db does not exist" in capsys.readouterr().err
    assert names_in(here) == ["elsewhere.yaml"], "a command that reads creates no store"


def test_model_without_class_names_is_sampled_by_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(()).save(tmp_path / "model")
    sample(tmp_path / "model", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[:5] == [
        "00-0.png", "01-1.png", "02-2.png", "03-3.png", "04-0.png",
    ]  # fmt: skip
    sample(tmp_path / "model", tmp_path / "some", "--class-indices", "3,1")
    assert sorted(path.name for path in (tmp_path / "some").iterdir())[:2] == ["00-3.png", "01-1.png"]
    with pytest.raises(SystemExit):
        sample(tmp_path / "model", tmp_path / "named", "--labels", "3")
    assert "this model has no class names: give class indices" in capsys.readouterr().err


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
