from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path

from pipelines.stage import describe_error, stage_lock


def test_second_process_waits_for_the_lock(tmp_path: Path) -> None:
    held = open(tmp_path / "train.lock", "a+")  # noqa: SIM115
    fcntl.flock(held, fcntl.LOCK_EX)
    entered = threading.Event()

    def enter() -> None:
        with stage_lock("train", tmp_path):
            entered.set()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    time.sleep(0.5)
    assert not entered.is_set()
    held.close()
    assert entered.wait(5)


def test_errors_are_described_in_one_line() -> None:
    assert describe_error(ValueError("two\n  lines")) == "two lines"
    assert describe_error(PermissionError(13, "Permission denied", "x/y")) == "x/y: Permission denied"
