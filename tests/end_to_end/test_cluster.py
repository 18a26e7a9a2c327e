"""Ray as a cluster: several nodes on one machine, a cluster that was started by hand, and what is refused early."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Project, kill_everything, make_project

pytestmark = pytest.mark.slow
CLEAN_HOME = Path(tempfile.mkdtemp(prefix="rediffuse-home-"))
"""A home directory without a Ray token: a cluster that `ray start --head` makes there uses none."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project trained on a local Ray."""
    made = make_project(tmp_path_factory.mktemp("trained") / "project", tune__enabled=False)
    for stage in ("prepare", "reference", "tune", "train"):
        made.stage(stage)
    yield made
    kill_everything(made)


@pytest.fixture
def untrained(trained: Project, tmp_path: Path) -> Iterator[Project]:
    """A copy of it without the training."""
    copy = tmp_path / "copy"
    shutil.copytree(trained.folder, copy, symlinks=True)
    shutil.rmtree(copy / "artifacts/model")
    shutil.rmtree(copy / "runs/train")
    made = Project(copy)
    yield made
    kill_everything(made)


def weights(project: Project) -> str:
    return hashlib.sha256((project.folder / "artifacts/model/model.safetensors").read_bytes()).hexdigest()


@contextmanager
def ray_head(folder: Path, *options: str) -> Iterator[str]:
    """``ray start --head`` in a session of its own; gives its address."""
    port = 20000 + os.getpid() % 20000
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--dashboard-port=0",
        f"--temp-dir={folder}",
        *options,
    ]
    with ray_process(command):
        address = f"127.0.0.1:{port}"
        probe = [sys.executable, "-c", f"import ray; ray.init('{address}', logging_level=40); print(len(ray.nodes()))"]
        deadline = time.monotonic() + 90
        while subprocess.run(probe, capture_output=True, env=environment(), check=False).returncode != 0:
            assert time.monotonic() < deadline, "ray start --head did not come up"
        yield address


@contextmanager
def ray_process(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def environment() -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"},
        "HOME": str(CLEAN_HOME),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets need a short path."""
    folder = Path(f"/tmp/rd{os.getpid()}")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_training_across_two_raylets_gives_the_weights_of_one_machine(trained: Project, untrained: Project) -> None:
    script = (
        "import os, shutil, subprocess, sys\n"
        "from ray.cluster_utils import Cluster\n"
        "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 0})\n"
        "for _ in range(2): cluster.add_node(num_cpus=1)\n"
        "cluster.wait_for_nodes()\n"
        "environment = {**os.environ, 'RAY_ADDRESS': cluster.address}\n"
        "shutil.rmtree('runs/reference')\n"
        "run = lambda stage: subprocess.run([sys.executable, '-m', 'pipelines.' + stage], env=environment).returncode\n"
        "code = run('reference') or run('train')\n"
        "cluster.shutdown()\n"
        "sys.exit(code)\n"
    )
    text = untrained.run(sys.executable, "-c", script, RAY_USAGE_STATS_ENABLED="0", HOME=str(CLEAN_HOME))
    assert "Ray: 3 node(s), 2 CPUs" in text  # a head without CPUs: each worker needs a node of its own
    assert "reference: one task with 1 CPUs and 0 GPUs" in text
    assert "world_size=2" in text or "size 2" in text
    assert weights(untrained) == weights(trained)


def test_stages_join_a_cluster_that_ray_start_made(trained: Project, untrained: Project, short_folder: Path) -> None:
    with ray_head(short_folder, "--num-cpus=2") as address:
        text = untrained.stage("train", RAY_ADDRESS=address, HOME=str(CLEAN_HOME))
        assert "Ray: 1 node(s), 2 CPUs" in text
        untrained.change_run(ray__address=address)
        text = untrained.stage("evaluate", HOME=str(CLEAN_HOME))
        assert "units" in text
    assert weights(untrained) == weights(trained)
    assert json.loads((untrained.folder / "artifacts/evaluation/quality.json").read_text())["num_samples"] == 40


def test_request_that_can_never_be_placed_is_refused_at_once(untrained: Project) -> None:
    untrained.change_run(train__num_workers=16, train__cpus_per_worker=1)
    began = time.monotonic()
    text = untrained.stage("train", check=False)
    print(f"refused after {time.monotonic() - began:.0f} s")
    line = next(line for line in text.splitlines() if "error:" in line)
    assert "train.num_workers: 16 x (1 CPUs) can never run" in line
    assert "lower train.num_workers" in line
    untrained.change_run(train__num_workers=2, train__gpus_per_worker=1)
    assert re.search(
        r"error: train.num_workers: 2 x \(1 CPUs and 1 GPUs\) can never run", untrained.stage("train", check=False)
    )
    assert not (untrained.folder / "artifacts/model").exists()


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs root and unshare for a node with a disk of its own",
)
def test_storage_that_a_node_does_not_see_is_refused_early(untrained: Project, short_folder: Path) -> None:
    hidden = untrained.folder / "runs"
    with ray_head(short_folder, "--num-cpus=1") as address:
        node = f"mount -t tmpfs tmpfs {hidden} && exec ray start --address={address} --num-cpus=1 --block"
        with ray_process(["unshare", "-m", "sh", "-c", node]):
            deadline = time.monotonic() + 90
            alive = "len([node for node in ray.nodes() if node['Alive']])"
            count = f"import ray; ray.init('{address}', logging_level=40); print({alive})"
            while (
                subprocess.run(
                    [sys.executable, "-c", count], capture_output=True, text=True, env=environment(), check=False
                ).stdout.strip()
                != "2"
            ):
                assert time.monotonic() < deadline, "the second node did not join"
            text = untrained.stage("train", check=False, RAY_ADDRESS=address, HOME=str(CLEAN_HOME))
    line = next(line for line in text.splitlines() if "error:" in line)
    assert "ray.storage" in line
    assert "does not see" in line
