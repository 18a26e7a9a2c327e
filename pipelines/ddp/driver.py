"""Training on Ray Train, seen from the driver."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.cluster import is_uri
from pipelines.ddp.surviving_state import RUN_NAME, newest_checkpoint, rename_torn_snapshots, wait_for_workers
from pipelines.ddp.worker import worker
from pipelines.identity import State
from pipelines.resources import TrainingPlan
from pipelines.training.checkpoint import check_checkpoint
from pipelines.training.loop import TrainingDivergedError, TrainSettings

KEEP = 3
"""Checkpoints that are kept: if the newest is torn, the one before is used."""

log = logging.getLogger("rediffuse")


def train_on_ray(
    settings: TrainSettings,
    plan: TrainingPlan,
    *,
    data_dir: Path,
    storage: str,
    state: State,
    on_row: Callable[[dict[str, Any]], None],
    on_picture: Callable[[int, bytes], None],
) -> Path:
    """Train with Ray Train and return the folder of the last checkpoint. Resumes from the newest whole checkpoint.

    storage: a folder or URI that every node sees. ``on_row`` gets each row of `loop.rows`, new ones with images_per_s and
    seconds_left; ``on_picture`` gets the step and the PNG of each sample picture. Both run in the driver; a row may come twice
    after a resume. A finished run returns at once, without workers.

    Raises TrainingDivergedError if the training diverged, and ValueError for anything else that a user can cause.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    base = storage.rstrip("/") if is_uri(storage) else str(Path(storage).resolve())
    storage_path = f"{base}/train/{state.key}"
    wait_for_workers(state.folder)
    folder = newest_checkpoint(storage_path, state.key, state.folder / "final")
    if folder is not None and check_checkpoint(folder, state.key) == settings.steps:
        log.info("the training has already reached its last step, %d", settings.steps)
        return folder
    if not is_uri(storage):
        rename_torn_snapshots(Path(storage_path) / RUN_NAME)
    queue = Queue(actor_options={"num_cpus": 0})
    config = {
        "settings": asdict(settings),
        "data_dir": str(data_dir.resolve()),
        "state_dir": str(state.folder),
        "storage_path": storage_path,
        "key": state.key,
        "queue": queue,
        "threads": plan.threads,
        "hooks": {
            "log_every": plan.log_every,
            "checkpoint_every": plan.checkpoint_every,
            "sample_every": plan.sample_every,
        },
    }
    resources = {"CPU": float(plan.cpus_per_worker)}
    if plan.gpus_per_worker:
        resources["GPU"] = float(plan.gpus_per_worker)
    trainer = TorchTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers, use_gpu=plan.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if plan.gpus_per_worker >= 1 else "gloo"),
        run_config=RunConfig(
            name=RUN_NAME,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=plan.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=KEEP),
        ),
    )
    with draining(queue, on_row, on_picture):
        try:
            trainer.fit()
        except Exception as error:
            raise_user_error(error)
            raise
    folder = newest_checkpoint(storage_path, state.key, state.folder / "final")
    if folder is None:
        raise ValueError(
            f"training ended without a whole checkpoint in {storage_path}: is the storage full or not writable?"
        )
    return folder


@contextlib.contextmanager
def draining(
    queue: Any, on_row: Callable[[dict[str, Any]], None], on_picture: Callable[[int, bytes], None]
) -> Iterator[None]:
    """Pass the workers' messages to the callbacks, in a thread, until the block has ended and the queue is empty.

    Raises the first error of a callback, and TrainingDivergedError if the workers say that the training diverged.
    """
    from ray.util.queue import Empty

    stop, failure = threading.Event(), []

    def drain() -> None:
        while True:
            ended = stop.is_set()
            try:
                message = queue.get(timeout=0.5)
            except Empty:
                if ended:
                    return
                continue
            except Exception:  # Ray shuts down: no message will follow
                return
            try:
                if "resumed" in message:
                    log.info("resuming from the checkpoint of step %d", message["resumed"])
                for row in message.get("rows", []):
                    on_row(row)
                if "picture" in message:
                    on_picture(message["step"], message["picture"])
                if "diverged" in message:
                    raise TrainingDivergedError(message["diverged"])
            except Exception as error:
                failure.append(error)

    thread = threading.Thread(target=drain, name="drain", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failure:
        raise failure[0]


def raise_user_error(error: BaseException) -> None:
    """Raise the ValueError at the root of the errors that Ray wraps, if there is one."""
    seen: set[int] = set()
    pending: list[Any] = [error]
    while pending:
        current = pending.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, ValueError) and not hasattr(current, "cause"):
            raise ValueError(str(current)) from None
        failures = getattr(current, "worker_failures", None)
        pending += [*(failures.values() if isinstance(failures, dict) else []), getattr(current, "cause", None)]
        pending += [current.__cause__, getattr(current, "_cause", None)]
