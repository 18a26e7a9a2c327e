"""`rediffuse doctor --cluster` on a real cluster of three raylets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.infra.raylets import Head, clean_environment, ray_head, ray_node

pytestmark = pytest.mark.infra
CAN_HIDE = os.geteuid() == 0 and shutil.which("unshare") is not None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    """A head and two nodes."""
    with (
        ray_head("--include-dashboard=false") as head,
        ray_node(head, "--num-cpus=1"),
        ray_node(head, "--num-cpus=1"),
    ):
        yield head


def doctor(folder: Path, **variables: str) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "doctor", "--cluster"],
        cwd=folder,
        env=clean_environment(folder, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in result.stdout, result.stdout
    return result.returncode, result.stdout


def test_healthy_cluster_passes_every_row(cluster: Head, tmp_path: Path) -> None:
    code, text = doctor(tmp_path, RAY_ADDRESS=cluster.address)
    assert code == 0 and "WRONG" not in text, text
    assert "3 node(s), 4 CPUs, 0 GPUs" in text
    assert text.count("versions") == 3 and text.count("against the driver") == 3
    assert re.search(r"ok +DDP step +3 workers, gloo", text), text
    assert re.search(r"ok +all-reduce +\d+\.\d+ GB/s.*, float32 tensor of 64 MiB", text), text
    assert re.search(r"ok +sampling unit +8 images on cpu", text), text
    assert re.search(r"ok +MLflow +sqlite:///mlflow.db: a run written, read and deleted", text), text


@pytest.mark.skipif(not CAN_HIDE, reason="needs root and unshare for a node with a disk of its own")
def test_node_that_does_not_see_the_storage_is_named(cluster: Head, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with ray_node(cluster, "--num-cpus=1", hide=tmp_path / "runs"):
        code, text = doctor(tmp_path, RAY_ADDRESS=cluster.address)
    assert code == 1, text
    assert len(re.findall(r"WRONG +ray.storage +not seen", text)) == 1, text
    assert len(re.findall(r"ok +ray.storage +ok", text)) == 3, text
    assert "mount the project's storage there, or set ray.storage" in text
    assert "DDP step" in text and "sampling unit" in text and "MLflow" in text, "the other tests still run"
    assert text.count("WRONG") == 1, text


def test_cluster_that_cannot_be_joined_is_a_row(tmp_path: Path) -> None:
    code, text = doctor(tmp_path, RAY_ADDRESS="127.0.0.1:1")
    assert code == 1
    assert re.search(r"WRONG +joining", text) and "no Ray cluster answers at 127.0.0.1:1" in text
    assert re.search(r"ok +MLflow", text), "the store is tested without a cluster"


def test_mlflow_that_cannot_be_used_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("tracking: {uri: 'http://127.0.0.1:1'}\nray: {address: '127.0.0.1:1'}\n")
    code, text = doctor(tmp_path)
    assert code == 1 and re.search(r"WRONG +MLflow +http://127.0.0.1:1", text), text
    assert "check tracking.uri or MLFLOW_TRACKING_URI" in text
