from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cluster import LONGEST_SOCKET, RAY_SOCKET, _short_folders
from tests.conftest import ROOT

LONGEST = LONGEST_SOCKET - len(RAY_SOCKET) - len("/ray")


@pytest.fixture(autouse=True)
def no_ray_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_ray_gets_a_short_folder_only_if_the_default_is_too_long(
    tmp_path: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _short_folders() as settings:
        assert settings == {}
    monkeypatch.setenv(variable, "/" + "x" * (LONGEST - 1))
    with _short_folders() as settings:
        assert settings == {}
    long = tmp_path / ("ü" * (LONGEST // 2))  # two bytes each
    monkeypatch.setenv(variable, str(long))
    with _short_folders() as settings:
        assert len(os.fsencode(settings["_temp_dir"])) + len(RAY_SOCKET) <= LONGEST_SOCKET
        assert settings["object_spilling_directory"] == str(long / "ray"), "large objects stay on the user's disk"
        assert (long / "ray").is_dir()
        if variable == "TMPDIR":
            assert len(os.environ["TMPDIR"]) < 30, "Ray's processes open sockets there"
    assert os.environ[variable] == str(long), "it is the user's again"


@pytest.mark.slow
def test_local_ray_starts_with_a_temporary_folder_of_two_hundred_characters(tmp_path: Path) -> None:
    long = tmp_path / ("a" * 100) / ("b" * 100)
    long.mkdir(parents=True)
    code = (
        "import ray; from pipelines.cluster import ray_session; from pipelines.params import RayRun\n"
        "with ray_session(RayRun(num_cpus=1)): print(ray.get(ray.remote(lambda: 3).remote()))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, "TMPDIR": str(long)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[-1] == "3"
    assert "too long" not in result.stdout + result.stderr
