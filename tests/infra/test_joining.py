"""Clusters that a process joins or cannot join: real heads, with and without tokens, and the line that a person sees."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pipelines.joining import check_versions, runtime_environment
from tests.infra.raylets import ROOT, TOKEN, Head, clean_environment, ray_head

JOIN = """
import logging, os
logging.basicConfig(level=20)
from pipelines.cluster import ray_session
from pipelines.params import RayRun
from pipelines.stage import one_line_errors
with one_line_errors("train"), ray_session(RayRun(address=os.environ["ADDRESS"])):
    import ray
    def of_a_worker():
        import pipelines
        return [os.environ.get("COLOUR"), os.environ.get("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"), pipelines.__file__]
    print("ANSWER", ray.get(ray.remote(of_a_worker).remote()))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as made:
        yield made


@pytest.fixture(scope="module")
def token_head() -> Iterator[Head]:
    with ray_head("--include-dashboard=false", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as made:
        yield made


def line_of(address: str, home: Path, **variables: str) -> str:
    """Join in a subprocess and return its whole output."""
    result = subprocess.run(
        [sys.executable, "-c", JOIN],
        env=clean_environment(home, ADDRESS=address, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
        check=False,
    )
    assert "Traceback" not in result.stdout
    if result.returncode:
        assert len(result.stdout.splitlines()) == 1, result.stdout
    return result.stdout


@pytest.mark.infra
def test_wrong_address_is_refused_with_the_setting(tmp_path: Path) -> None:
    for address in ("127.0.0.1:1", "nohost.invalid:6379", "words"):
        assert f"no Ray cluster answers at {address}" in line_of(address, tmp_path)


@pytest.mark.infra
def test_silent_port_is_refused_within_seconds(tmp_path: Path) -> None:
    with closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        line = line_of(f"127.0.0.1:{silent.getsockname()[1]}", tmp_path)
    assert "accepts connections but does not answer within 10 s" in line
    assert time.monotonic() - began < 40


@pytest.mark.infra
def test_address_of_the_dashboard_is_named(head: Head) -> None:
    assert "is the address of Ray's dashboard" in line_of(head.dashboard, head.home)
    assert "is no Ray port" in line_of(head.dashboard.removeprefix("http://"), head.home)


@pytest.mark.infra
def test_client_with_token_joins_a_cluster_without(head: Head) -> None:
    assert "ANSWER" in line_of(head.address, head.home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert "this process has no token" in line_of(head.address, head.home, RAY_AUTH_MODE="token")


@pytest.mark.infra
def test_cluster_with_tokens_takes_only_its_own(token_head: Head) -> None:
    address, home = token_head.address, token_head.home
    assert "uses token authentication, this process does not" in line_of(address, home)
    other = line_of(address, home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 40)
    assert "refuses this process's token" in other
    assert "ANSWER" in line_of(address, home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)


@pytest.mark.infra
@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("ray_version", "2.59.0", "runs Ray 2.59.0, this process Ray .*: install ray==2.59.0 here"),
        ("python_version", "3.9.1", "runs Python 3.9.1, this process Python"),
    ],
)
def test_cluster_with_other_versions_is_refused(head: Head, field: str, value: str, expected: str) -> None:
    """The head's own record of its versions is changed for the time of the test."""
    change = (
        "import json, sys; from ray._raylet import GcsClient; c = GcsClient(address=sys.argv[1])\n"
        "old = c.internal_kv_get(b'CLUSTER_METADATA', b'cluster', timeout=9).decode(); print(old)\n"
        "c.internal_kv_put(b'CLUSTER_METADATA', sys.argv[2].encode() or old.encode(), True, b'cluster')"
    )

    def put(record: str) -> str:
        command = [sys.executable, "-c", change, head.address, record]
        return subprocess.run(
            command, env=clean_environment(head.home), capture_output=True, text=True, check=True
        ).stdout.strip()

    old = put("")
    put(json.dumps({**json.loads(old), field: value}))
    try:
        import re

        assert re.search(expected, line_of(head.address, head.home))
    finally:
        put(old)


def test_other_patch_of_python_passes_if_its_variable_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    major, minor, patch = sys.version_info[:3]
    record = {"ray_version": ray.__version__, "python_version": f"{major}.{minor}.{patch + 1}"}
    with pytest.raises(ValueError, match="RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor"):
        check_versions("h:1", record)
    monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    check_versions("h:1", record)


def test_runtime_environment_adds_nothing_that_the_job_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pipelines"
    package.mkdir()
    given = ({"A": "1", "B": "2"}, [package])
    both = {"env_vars": {"A": "1", "B": "2"}, "py_modules": [str(package)]}
    assert runtime_environment(*given, None) == both
    assert runtime_environment(*given, {"working_dir": "gcs://x", "env_vars": {"A": "9"}}) == {
        **both,
        "env_vars": {"B": "2"},
    }
    monkeypatch.chdir(tmp_path)
    assert runtime_environment(*given, {"working_dir": "gcs://x"}) == {"env_vars": both["env_vars"]}
    assert runtime_environment(*given, {"py_modules": ["gcs://x"], "env_vars": given[0]}) == {}


@pytest.mark.infra
def test_submitted_job_keeps_its_runtime_environment(head: Head, tmp_path: Path) -> None:
    import shutil

    for name in ("pipelines", "diffusion_core"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "job.py").write_text(textwrap.dedent(JOIN).replace('address=os.environ["ADDRESS"]', ""))
    environment = {"env_vars": {"COLOUR": "blue", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "7"}}
    command = ["ray", "job", "submit", f"--address={head.dashboard}", "--working-dir=.", "--runtime-env-json"]
    result = subprocess.run(
        [*command, json.dumps(environment), "--", sys.executable, "job.py"],
        cwd=tmp_path,
        env={k: v for k, v in clean_environment(head.home).items() if k != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    answer = next((line for line in result.stdout.splitlines() if line.startswith("ANSWER")), result.stdout[-3000:])
    assert answer.startswith("ANSWER ['blue', '7', '/"), answer
    assert "working_dir_files" in answer, "the job's own copy of the packages"
    assert result.returncode == 0
