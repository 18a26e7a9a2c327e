"""The parts of a training run that survive a kill: checkpoints, Ray Train's snapshots, and workers that still live."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import time
from pathlib import Path

from diffusion_core.storage import atomic_folder
from pipelines.cluster import is_uri
from pipelines.training.checkpoint import check_checkpoint

RUN_NAME = "train"
LOCK = "worker.lock"

log = logging.getLogger("rediffuse")


def newest_checkpoint(storage_path: str, key: str, copy_to: Path) -> Path | None:
    """Return the folder of the run's newest whole checkpoint, or None. Copies it to ``copy_to`` if the storage is a URI.

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


def rename_torn_snapshots(run_dir: Path) -> None:
    """Rename Ray Train's snapshots that a kill has torn: Ray writes them in place and fails on a torn one. Checkpoints stay."""
    for path in run_dir.glob("*snapshot*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, OSError):
            log.warning("%s is torn, probably by a kill: renamed", path)
            path.replace(path.with_suffix(".torn"))


def hold_worker_lock(state_dir: Path) -> None:
    """Hold a shared lock until this process ends, so that a new driver can tell when the workers of an old run are gone."""
    with contextlib.suppress(OSError):  # a node without the folder: Ray's own job control must do
        file = open(state_dir / LOCK, "a+")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_SH)
        globals()["_worker_lock"] = file


def wait_for_workers(state_dir: Path, seconds: float = 120.0) -> None:
    """Wait until no worker of an earlier driver of this run lives: after a kill they train for some seconds more.

    Raises ValueError if one still lives after ``seconds``.
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
