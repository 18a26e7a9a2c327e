"""SIGTERM in a process of its own, without Ray."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

HEAD = """
import os, signal, threading, time
from pipelines.termination import exit_on_sigterm, own_process_group, stopping
exit_on_sigterm()
stop = threading.Event()
def kill(): os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(
    ("code", "printed", "least", "most"),
    [
        ("with stopping(stop.set, 20.0):\n    kill(); stop.wait(10); print('saved')", "saved", 0.0, 10.0),
        ("with stopping(stop.set, 0.5):\n    kill(); time.sleep(15); print('too late')", "", 0.5, 10.0),
        ("with stopping(stop.set, 20.0):\n    kill(); stop.wait(5); kill(); print('second')", "", 0.0, 10.0),
        ("with stopping(stop.set, 20.0):\n    kill(); stop.wait(5); raise RuntimeError('Ray died too')", "", 0.0, 10.0),
        ("kill(); print('not reached')", "", 0.0, 10.0),
        (
            "try:\n    with stopping(stop.set, 0.5): kill(); stop.wait(5)\nfinally: time.sleep(1.5); print('ended')",
            "ended",
            1.5,
            10.0,
        ),
    ],
    ids=["saves", "grace time", "second signal", "error that follows", "no request", "end is not interrupted"],
)
def test_sigterm_gives_time_to_save_and_exits_143(code: str, printed: str, least: float, most: float) -> None:
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", f"{HEAD}\n{code}"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    seconds = time.monotonic() - began
    assert result.returncode == 143, result.stderr
    assert result.stdout.strip() == printed
    assert "Traceback" not in result.stderr
    assert least <= seconds <= most


def test_children_start_in_another_process_group_and_the_process_returns_to_its_own() -> None:
    code = (
        f"{HEAD}\nimport subprocess\nbefore = os.getpgid(0)\n"
        "with own_process_group():\n    child = subprocess.Popen(['sleep', '30'])\n"
        "print(before == os.getpgid(0), os.getpgid(child.pid) != before)\nchild.kill()"
    )
    # a shell that runs two commands keeps its group, so that Python is not the leader
    command = f'{sys.executable} -c "$CODE"; true'
    result = subprocess.run(
        ["sh", "-c", command],
        cwd=ROOT,
        env={"CODE": code, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.split() == ["True", "True"], result.stderr
