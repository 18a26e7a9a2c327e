"""Real programs for tests of infra/tracking: Postgres, an S3 server and the MLflow server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import ROOT

TRACKING = ROOT / "infra" / "tracking"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
ADMIN = ("admin", "password-of-admin")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: float, log: Path) -> None:
    """Return as soon as the URL answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer:\n{log.read_text(errors='replace')[-4000:]}")


def end(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    """Signal a process that leads its own session, and all its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    process.wait(30)


@dataclass
class Postgres:
    """A database server of its own, on a free port."""

    port: int
    programs: Path

    def uri(self, database: str) -> str:
        """The address for MLflow."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def sql(self, statement: str) -> None:
        command = [
            str(self.programs / "psql"),
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            "postgres",
            "-qc",
            statement,
        ]
        subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def postgres() -> Iterator[Postgres]:
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not installed:
        pytest.skip("no Postgres: apt-get install postgresql")
    programs = installed[-1].parent
    # initdb refuses root; a folder of pytest is closed to other users
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    if prefix:
        shutil.chown(folder, "postgres")
    data, port = folder / "data", free_port()

    def run(*command: str) -> None:
        result = subprocess.run([*prefix, *command], cwd="/", capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"

    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        run(str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "postgres", "--no-sync")
        subprocess.run(
            [
                *prefix,
                str(programs / "pg_ctl"),
                "-D",
                str(data),
                "-o",
                options,
                "-w",
                "-l",
                str(folder / "log"),
                "start",
            ],
            cwd="/",
            check=True,
            stdout=subprocess.DEVNULL,
        )
        yield Postgres(port, programs)
    finally:
        if (data / "postmaster.pid").exists():
            run(str(programs / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def s3_server(folder: Path, *buckets: str) -> Iterator[str]:
    """Give the address of an S3 server with these buckets."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto")
    port = free_port()
    log = folder / "s3.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("moto_server")), "-p", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **KEYS},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/moto-api/", process, 60, log)
        client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            region_name=KEYS["AWS_DEFAULT_REGION"],
        )
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        yield url
    finally:
        end(process)


@dataclass
class Server:
    """The MLflow server that infra/tracking/start starts, with users in front."""

    settings: dict[str, str]
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AWS_"))}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                [str(TRACKING / "start")],
                cwd=self.log.parent,
                env={**environment, **self.settings},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for(f"{self.uri}/health", self.process, 120, self.log)

    def kill(self) -> None:
        if self.process is not None:
            end(self.process)
            self.process = None
