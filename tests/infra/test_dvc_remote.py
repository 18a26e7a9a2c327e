"""Data and models in S3: pushed from one clone, pulled into another, where nothing is computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Project, kill_everything
from tests.infra.tracking_parts import KEYS, s3_server

pytestmark = pytest.mark.infra


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def pushed(copied_project: Project, tmp_path: Path) -> Iterator[Project]:
    """A project with its results in an S3 bucket and its other files in git."""
    pytest.importorskip("dvc_s3", reason="no dvc-s3: install the extra s3")
    with s3_server(tmp_path, "data") as address:
        made = copied_project
        made.run("dvc", "remote", "add", "--default", "storage", "s3://data/dvc")
        made.run("dvc", "remote", "modify", "storage", "endpointurl", address)
        made.commit()
        made.run("dvc", "push", **KEYS)
        yield made


@pytest.fixture
def clone(pushed: Project, tmp_path: Path) -> Iterator[Project]:
    pushed.run("git", "clone", "-q", str(pushed.folder), str(tmp_path / "elsewhere"))
    made = Project(tmp_path / "elsewhere")
    yield made
    kill_everything(made)


def test_clone_pulls_results_from_s3_and_computes_nothing_again(pushed: Project, clone: Project) -> None:
    assert not (clone.folder / "artifacts" / "model").exists()
    clone.run("dvc", "pull", **KEYS)
    assert "up to date" in clone.run("dvc", "status")
    text = clone.repro()
    assert "Running stage" not in text and "up to date" in text
    assert digest(clone.folder / "artifacts" / "model") == digest(pushed.folder / "artifacts" / "model")
    assert not (clone.folder / "mlflow.db").exists(), "no stage has run"
    assert clone.run("git", "status", "--porcelain") == ""


def test_dvc_artifacts_get_fetches_the_model_of_a_tag_alone(pushed: Project, tmp_path: Path) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t.invalid")
    pushed.run("git", *identity, "tag", "-a", "model@v1.0.0", "-m", "the first model")
    (pushed.folder / ".dvc" / "cache").rename(tmp_path / "cache")  # so that the model comes from S3
    elsewhere = tmp_path / "consumer"
    elsewhere.mkdir()
    Project(elsewhere).run("dvc", "artifacts", "get", str(pushed.folder), "model", "-o", "fetched", **KEYS)
    assert digest(elsewhere / "fetched") == digest(pushed.folder / "artifacts" / "model")
    assert [path.name for path in elsewhere.iterdir()] == ["fetched"]
