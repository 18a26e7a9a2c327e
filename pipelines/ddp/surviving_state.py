"""State that survives a kill: checkpoints, Ray Train's snapshots, and workers that still run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from diffusion_core.storage import atomic_folder
from pipelines.cluster import is_uri
from pipelines.training.checkpoint import check_checkpoint

RUN_NAME = "train"
LOCK = "worker.lock"

log = logging.getLogger("rediffuse")

_worker_lock: TextIO | None = None
"""The open file that holds this process's lock; the lock ends with the file."""


def newest_checkpoint(storage_path: str, key: str, copy_to: Path) -> Path | None:
    """Return the folder of the newest whole checkpoint, or None. Copies it to ``copy_to`` if the storage is a URI.

    Skips a torn checkpoint with a warning.
    """
    from pyarrow import fs

    remote = is_uri(storage_path)
    filesystem, root = fs.FileSystem.from_uri(storage_path) if remote else (fs.LocalFileSystem(), storage_path)
    listing = filesystem.get_file_info(fs.FileSelector(f"{root}/{RUN_NAME}", allow_not_found=True))
    names = sorted((info.path for info in listing if info.base_name.startswith("step_")), reverse=True)
    for name in names:
        folder = Path(name)
        if remote:
            with atomic_folder(copy_to) as temporary:
                fs.copy_files(name, str(temporary), source_filesystem=filesystem)
            folder = copy_to
        try:
            check_checkpoint(folder, key)
        except ValueError as error:
            log.warning("checkpoint skipped: %s", error)
            continue
        return folder
    return None


def adopt_checkpoint(storage_path: str, earlier: Sequence[str], key: str, scratch: Path) -> None:
    """Copy the newest whole checkpoint of the earlier storages into the storage, if it is newer than every one there."""
    newest = _step_of(newest_checkpoint(storage_path, key, scratch / "own"), key) if earlier else 0
    for number, other in enumerate(earlier):
        folder = newest_checkpoint(other, key, scratch / str(number))
        step = _step_of(folder, key)
        if folder is not None and step > newest:
            log.info("the checkpoint of step %d lies in an earlier storage, %s: copied", step, other)
            _copy_folder(folder, f"{storage_path}/{RUN_NAME}/step_{step:08d}")
            newest = step


def rename_torn_snapshots(run_dir: Path) -> None:
    """Rename Ray Train's snapshots that a kill has torn: Ray writes them in place and fails on a torn one. Checkpoints stay."""
    for path in run_dir.glob("*snapshot*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, OSError):
            log.warning("%s is torn, probably by a kill: renamed", path)
            path.replace(path.with_suffix(".torn"))


def hold_worker_lock(state_dir: Path) -> None:
    """Hold a shared lock until this process ends, so that a new driver can wait for the workers of an earlier one."""
    global _worker_lock
    with contextlib.suppress(OSError):  # a node without this folder relies on Ray's job control
        _worker_lock = open(state_dir / LOCK, "a+")  # noqa: SIM115
        fcntl.flock(_worker_lock, fcntl.LOCK_SH)


def wait_for_workers(state_dir: Path, seconds: float = 120.0) -> None:
    """Wait until the workers of an earlier driver have ended; after a kill they run for some seconds.

    Raises ValueError if one still runs after ``seconds``.
    """
    deadline, waiting = time.monotonic() + seconds, False
    with open(state_dir / LOCK, "a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not waiting:
                    log.info("waiting for the workers of an earlier run to end")
                    waiting = True
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"workers of an earlier run still train in {state_dir}: stop them (ray job stop, or ray stop --force), "
                        "then run the same command again"
                    ) from None
                time.sleep(0.5)


def _step_of(folder: Path | None, key: str) -> int:
    return check_checkpoint(folder, key) if folder is not None else 0


def _copy_folder(folder: Path, target: str) -> None:
    """Copy a local folder to a folder or URI."""
    from pyarrow import fs

    if not is_uri(target):
        with atomic_folder(Path(target)) as temporary:
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
        return
    filesystem, path = fs.FileSystem.from_uri(target)
    filesystem.create_dir(path, recursive=True)
    fs.copy_files(str(folder), path, destination_filesystem=filesystem)
