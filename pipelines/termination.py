"""SIGTERM, which Slurm, Kubernetes and spot nodes send before they take a machine away.

A stage ends with exit status 143 (128 + SIGTERM). Training first gets some seconds to save a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

STATUS = 143

_request: Callable[[], None] | None = None
_grace_seconds = 0.0
_deadline: threading.Timer | None = None
_received = False


def exit_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit(143) in the main thread. Call it again after `ray.init`, which installs a handler of its own."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _handle)


def sigterm_received() -> bool:
    """Return True if this process got SIGTERM."""
    return _received


@contextmanager
def stopping(request: Callable[[], None], grace_seconds: float) -> Iterator[None]:
    """Let the first SIGTERM inside of the block call ``request`` in a thread. SystemExit(143) follows when the block ends.

    A second SIGTERM, or a block that has not ended ``grace_seconds`` after the first, raises SystemExit(143) inside of the block.
    """
    global _request, _grace_seconds
    _request, _grace_seconds = request, grace_seconds
    try:
        yield
    except Exception:
        if not _received:  # an error of the block may follow from the signal, such as Ray's processes that got it too
            raise
    finally:
        _request = None
        if _deadline is not None:
            _deadline.cancel()  # it must not interrupt the end of the MLflow runs
    if _received:
        raise SystemExit(STATUS)


def _handle(signum: int, frame: object) -> None:
    global _received, _deadline
    if _received or _request is None:
        _received = True
        raise SystemExit(STATUS)
    _received = True
    threading.Thread(target=_request, daemon=True).start()
    _deadline = threading.Timer(_grace_seconds, os.kill, (os.getpid(), signal.SIGTERM))
    _deadline.daemon = True
    _deadline.start()


@contextmanager
def own_process_group() -> Iterator[None]:
    """Start the processes of the block in another process group than this process, if it is not the leader of its group.

    A signal to the group of `dvc repro` then reaches the stage but not the Ray that the stage started, which must still save a
    checkpoint.
    """
    group = os.getpgid(0)
    if group == os.getpid():
        yield
        return
    os.setpgid(0, 0)
    try:
        yield
    finally:
        with suppress(PermissionError):  # the former group has no process left
            os.setpgid(0, group)
