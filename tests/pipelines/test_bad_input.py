"""Broken inputs: one clear line on stderr, exit status 1, no traceback, nothing half-written."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.params import read_yaml
from pipelines.stage import run_stage
from tests.conftest import Project, make_project

Run = Callable[[str], str]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], project: Project) -> Run:
    """Run a stage in this process inside the project, and return the one line that it ends with."""
    monkeypatch.chdir(project.folder)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RAY_ADDRESS", "REDIFFUSE_TRACEBACK", "REDIFFUSE_RUN"):
        monkeypatch.delenv(name, raising=False)

    def run(stage: str) -> str:
        monkeypatch.setattr(sys, "argv", [stage])
        module = importlib.import_module(f"pipelines.{stage}")
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_stage(stage, getattr(module, stage))
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line or "Traceback" in line]
        assert caught.value.code == 1
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{stage}: error: ")
        return lines[0]

    return run


@pytest.fixture(scope="module")
def prepared_template(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with its data prepared and its reference made."""
    made = make_project(tmp_path_factory.mktemp("prepared") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for stage in ("prepare", "reference"):
            patch.setattr(sys, "argv", [stage])
            run_stage(stage, getattr(importlib.import_module(f"pipelines.{stage}"), stage))
    return made


@pytest.fixture
def prepared(project: Project, prepared_template: Project) -> Project:
    """A copy of it that a test may damage."""
    for name in ("artifacts", "metrics", "plots", "runs"):
        shutil.copytree(prepared_template.folder / name, project.folder / name, dirs_exist_ok=True)
    return project


def image_folder(root: Path, classes: int = 2, count: int = 5) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(
                root / f"class{label}" / f"{number}.png"
            )
    return root


def use_folder(project: Project, root: Path, **more) -> None:
    project.change(prepare__source="folder", prepare__root=str(root), **more)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_truncated_image_is_named(project: Project, fails: Run, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    truncate(root / "class1" / "3.png")
    use_folder(project, root)
    line = fails("prepare")
    assert "class1/3.png" in line
    assert "prepare.on_broken_image" in line
    assert not Path("artifacts/data").exists()


def test_file_that_is_not_an_image_is_named(project: Project, fails: Run, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    (root / "class0" / "note.jpg").write_text("hello")
    use_folder(project, root)
    assert "class0/note.jpg (not an image)" in fails("prepare")


def test_broken_images_are_skipped_and_counted_on_request(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(tmp_path / "images", count=10)
    truncate(root / "class1" / "3.png")
    use_folder(project, root, prepare__on_broken_image="skip")
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(sys, "argv", ["prepare"])
    run_stage("prepare", importlib.import_module("pipelines.prepare").prepare)
    manifest = json.loads(Path("artifacts/data/manifest.json").read_text())
    assert manifest["counts"]["train"] + manifest["counts"]["test"] == 19
    assert len(manifest["skipped"]) == 1
    assert manifest["skipped"][0].startswith("class1/3.png")
    assert json.loads(Path("metrics/prepare.json").read_text())["skipped"] == 1


def test_absent_folder_is_named(project: Project, fails: Run, tmp_path: Path) -> None:
    use_folder(project, tmp_path / "nowhere")
    assert "prepare.root" in fails("prepare")


def test_folder_without_classes_is_refused(project: Project, fails: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    use_folder(project, tmp_path / "empty")
    assert "class folders" in fails("prepare")


def test_empty_class_folder_is_named(project: Project, fails: Run, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    (root / "nothing").mkdir()
    use_folder(project, root)
    assert f"{root / 'nothing'} holds no images" in fails("prepare")


def test_single_class_is_refused(project: Project, fails: Run, tmp_path: Path) -> None:
    use_folder(project, image_folder(tmp_path / "images", classes=1))
    assert "at least two class" in fails("prepare")


def test_class_that_loses_all_its_images_is_named(project: Project, fails: Run, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    for path in (root / "class1").iterdir():
        path.write_bytes(b"broken")
    use_folder(project, root, prepare__on_broken_image="skip")
    assert "'class1' has no training image" in fails("prepare")


def test_unknown_torchvision_data_set_is_named(project: Project, fails: Run) -> None:
    project.change(prepare__source="torchvision", prepare__dataset="Mnist", prepare__root="data")
    assert "'Mnist'" in fails("prepare")


def test_absent_torchvision_files_without_download_are_explained(project: Project, fails: Run) -> None:
    project.change(
        prepare__source="torchvision", prepare__dataset="MNIST", prepare__root="data", prepare__download=False
    )
    line = fails("prepare")
    assert "MNIST" in line
    assert "prepare.download" in line


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").exists(), reason="needs /proc to refuse writing to root")
def test_folder_that_cannot_be_written_is_named(project: Project, fails: Run) -> None:
    shutil.rmtree("artifacts", ignore_errors=True)
    Path("artifacts").symlink_to("/proc/1")  # nobody, root included, can make a file there
    assert "cannot write into artifacts" in fails("prepare")


def test_wrong_params_end_every_stage(project: Project, fails: Run) -> None:
    project.change(train__steps=-1)
    for stage in ("prepare", "reference", "tune", "train", "evaluate", "register", "report"):
        assert "params.yaml: train.steps: given -1, allowed at least 1" in fails(stage)


def test_wrong_run_settings_end_every_stage(project: Project, fails: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    project.change_run(train__num_workers=0)
    for stage in ("prepare", "reference", "tune", "train", "evaluate", "register", "report"):
        assert "run.yaml: train.num_workers: given 0, allowed a whole number of at least 1, or auto" in fails(stage)
    monkeypatch.setenv("REDIFFUSE_RUN", "absent.yaml")
    assert "absent.yaml: cannot be read" in fails("prepare")


def test_key_that_moved_to_run_yaml_is_refused_with_its_new_place(project: Project, fails: Run) -> None:
    project.change(train__num_workers=4)
    line = fails("train")
    assert "params.yaml: train.num_workers: has moved to run.yaml" in line
    assert "set train.num_workers there" in line


def test_wrong_hash_of_inception_weights_is_refused(prepared: Project, fails: Run) -> None:
    Path("weights.pth").write_bytes(b"not these")
    prepared.change(reference__extractor="inception-v3-compat", reference__inception_weights="weights.pth")
    line = fails("reference")
    assert "weights.pth has SHA-256" in line
    prepared.change(reference__inception_sha256="0" * 64)
    assert f"expected {'0' * 64}" in fails("reference")
    prepared.change(reference__inception_weights="absent.pth")
    assert "cannot read absent.pth" in fails("reference")
    assert read_yaml(Path("params.yaml"))["reference"]["extractor"] == "inception-v3-compat"
    assert json.loads(Path("artifacts/reference/extractor.json").read_text())["name"] == "classifier", (
        "nothing was lost"
    )


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.write_text("{"), "not valid JSON"),
        (lambda path: path.write_text("{}"), "version None"),
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 9')), "version 9"),
        (lambda path: path.write_text(path.read_text().replace('"class_names"', '"names"')), "class_names"),
        (lambda path: path.write_text(path.read_text().replace('"count": ', '"count": 1')), "its shards"),
    ],
)
def test_corrupt_manifest_is_explained(prepared: Project, fails: Run, damage, expected: str) -> None:
    damage(Path("artifacts/data/manifest.json"))
    for stage in ("reference", "train"):
        line = fails(stage)
        assert expected in line
        assert "manifest.json" in line


def test_truncated_shard_is_named(prepared: Project, fails: Run) -> None:
    truncate(Path("artifacts/data/train-00000-images.npy"))
    assert "train-00000-images.npy" in fails("reference")


def test_damaged_reference_is_named(prepared: Project, fails: Run) -> None:
    truncate(Path("artifacts/reference/extractor.safetensors"))
    assert "extractor.safetensors" in fails("tune")


def test_reference_of_other_data_is_refused(prepared: Project, fails: Run) -> None:
    path = Path("artifacts/reference/reference.json")
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "data_hash": "0" * 64}))
    assert "made of data 000000000000" in fails("tune")


def test_search_result_with_foreign_keys_is_refused(prepared: Project, fails: Run) -> None:
    Path("artifacts/search").mkdir()
    Path("artifacts/search/best.yaml").write_text("overrides: {batch_size: 3}\n")
    assert "best.yaml" in fails("train")
    Path("artifacts/search/best.yaml").write_text("overrides: {objective: w}\n")
    assert "'eps', 'x0' or 'v'" in fails("train")


def test_missing_and_damaged_models_are_named(prepared: Project, fails: Run) -> None:
    assert "artifacts/model/model.json" in fails("evaluate")
    Path("artifacts/model").mkdir()
    Path("artifacts/model/model.json").write_text('{"schema_version": 99}')
    assert "newer rediffuse" in fails("evaluate")


def test_unreachable_ray_cluster_is_refused(prepared: Project, fails: Run) -> None:
    prepared.change_run(ray__address="127.0.0.1:1")
    line = fails("tune")
    assert "127.0.0.1:1" in line
    assert "ray.address" in line


@pytest.mark.parametrize("uri", ["file:./mlruns", "mlruns", "sqlite:////proc/1/nowhere/x.db"])
def test_unusable_tracking_store_is_refused(project: Project, fails: Run, uri: str) -> None:
    project.change_run(tracking__uri=uri)
    assert "MLflow store" in fails("prepare")


def test_tests_use_a_copy_of_the_real_project(tmp_path: Path) -> None:
    made = make_project(tmp_path / "p")
    assert (made.folder / "dvc.yaml").read_text() == (Path(__file__).parents[2] / "dvc.yaml").read_text()
