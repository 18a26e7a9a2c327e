"""Real Ray heads for tests, each with its own port, folder and home directory."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Head:
    """A running head: its addresses, and a home directory without a token."""

    address: str
    dashboard: str
    home: Path


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """This environment without Ray's variables, so that a client has no token."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "REDIFFUSE_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "OMP_NUM_THREADS": "1"}
    return {**environment, **quiet, "HOME": str(home), "PYTHONPATH": str(ROOT), **more}


@contextmanager
def ray_head(*options: str, port: int = 0, num_cpus: int = 2, **variables: str) -> Iterator[Head]:
    """``ray start --head`` in a session of its own, killed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="rd", dir="/tmp"))
    free, dashboard, agent = _three_ports()
    port = port or free
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        f"--port={port}",
        f"--temp-dir={folder}/r",
        f"--num-cpus={num_cpus}",
    ]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", *options]
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(
            command, start_new_session=True, stdout=log, stderr=log, env=clean_environment(folder, **variables)
        )
        try:
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in (folder / "log").read_text():
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                time.sleep(0.2)
            yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", folder)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
            shutil.rmtree(folder, ignore_errors=True)


def _three_ports() -> tuple[int, int, int]:
    with closing(socket.socket()) as one, closing(socket.socket()) as two, closing(socket.socket()) as three:
        for each in (one, two, three):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1], three.getsockname()[1]


@contextmanager
def ray_node(head: Head, *options: str, hide: Path | None = None, **variables: str) -> Iterator[None]:
    """A further raylet of the head's cluster. ``hide``: a folder that this node sees empty, on a disk of its own."""
    port, agent, _ = _three_ports()
    command = ["ray", "start", "--block", f"--address={head.address}", f"--dashboard-agent-listen-port={agent}"]
    command += [*options, f"--runtime-env-agent-port={port}"]
    if hide is not None:
        command = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {hide} && exec {' '.join(command)}"]
    log = head.home / f"node-{port}.log"
    with open(log, "w+") as file:
        process = subprocess.Popen(
            command, start_new_session=True, stdout=file, stderr=file, env=clean_environment(head.home, **variables)
        )
        try:
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
