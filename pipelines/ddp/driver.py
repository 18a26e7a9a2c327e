"""The driver of Ray Train: starts workers, forwards their messages, returns the last checkpoint."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipelines.cluster import is_uri
from pipelines.ddp.surviving_state import (
    RUN_NAME,
    adopt_checkpoint,
    newest_checkpoint,
    rename_torn_snapshots,
    wait_for_workers,
)
from pipelines.ddp.worker import worker
from pipelines.identity import State
from pipelines.resources import TrainingPlan
from pipelines.termination import stopping
from pipelines.training.checkpoint import check_checkpoint, load_checkpoint
from pipelines.training.loop import TrainingDivergedError, TrainSettings, new_state

KEEP = 3
"""Number of checkpoints to keep; an older one replaces a torn one."""
OUT_OF_MEMORY = (
    "a training step does not fit into GPU memory: lower train.batch_size or train.network.channels in params.yaml, "
    "or add workers with train.num_workers in run.yaml"
)

log = logging.getLogger("rediffuse")


def train_on_ray(
    settings: TrainSettings,
    plan: TrainingPlan,
    *,
    data_dir: Path,
    storage: str,
    earlier: Sequence[str],
    state: State,
    on_row: Callable[[dict[str, Any]], None],
    on_picture: Callable[[int, bytes], None],
    grace_seconds: float = 25.0,
) -> Path:
    """Train with Ray Train and return the folder of the last checkpoint. Resumes from the newest whole checkpoint.

    ``storage``: the folder or URI of the checkpoints, seen by every node; ``earlier``: storages of earlier runs. ``on_row`` gets
    each row of `loop.rows`, new ones with images_per_s and seconds_left; ``on_picture`` gets the step and the PNG of each sample
    picture. Both run in the driver; they may receive a row twice after a resume. A finished run returns at once, without workers.
    SIGTERM saves a checkpoint within ``grace_seconds`` and raises SystemExit(143).

    Raises TrainingDivergedError if the training diverged, CheckpointMismatchError if the checkpoint of a forced resume does not
    fit, and ValueError for anything else that a user can cause.
    """
    wait_for_workers(state.folder)
    with tempfile.TemporaryDirectory() as scratch:
        adopt_checkpoint(storage, earlier, state.key, Path(scratch))
    folder = newest_checkpoint(storage, state.key, state.folder / "final")
    if folder is not None and state.changed_modules:
        load_checkpoint(new_state(settings, torch.device("cpu")), folder, state.key)  # here, not on every restart
    if folder is not None and check_checkpoint(folder, state.key) == settings.steps:
        log.info("the training has already reached its last step, %d", settings.steps)
        return folder
    if not is_uri(storage):
        rename_torn_snapshots(Path(storage) / RUN_NAME)
    _fit(settings, plan, data_dir, storage, state, on_row, on_picture, grace_seconds)
    folder = newest_checkpoint(storage, state.key, state.folder / "final")
    if folder is None:
        raise ValueError(
            f"training ended without a whole checkpoint in {storage}: is the storage full or not writable?"
        )
    return folder


def _fit(
    settings: TrainSettings,
    plan: TrainingPlan,
    data_dir: Path,
    storage: str,
    state: State,
    on_row: Callable[[dict[str, Any]], None],
    on_picture: Callable[[int, bytes], None],
    grace_seconds: float,
) -> None:
    """Run the workers to the end of the training, or to a checkpoint after SIGTERM, and then raise SystemExit."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    queue, stop = Queue(actor_options={"num_cpus": 0}), Queue(actor_options={"num_cpus": 0})
    config = {
        "settings": asdict(settings),
        "data_dir": str(data_dir.resolve()),
        "state_dir": str(state.folder),
        "storage_path": storage,
        "key": state.key,
        "queue": queue,
        "stop": stop,
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
            storage_path=storage,
            failure_config=FailureConfig(max_failures=plan.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=KEEP),
        ),
    )
    with stopping(partial(stop.put, True), grace_seconds), draining(queue, on_row, on_picture):
        try:
            trainer.fit()
        except Exception as error:
            raise_user_error(error)
            raise


@contextlib.contextmanager
def draining(
    queue: Any, on_row: Callable[[dict[str, Any]], None], on_picture: Callable[[int, bytes], None]
) -> Iterator[None]:
    """Pass the workers' messages to the callbacks, in a thread, until the block has ended and the queue is empty.

    Raises the first error of a callback, TrainingDivergedError if the training diverged, and ValueError if a worker ran out of GPU
    memory. These take precedence over an error of the block, which may follow from them.
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
                if "stopped" in message:
                    log.info("SIGTERM: the checkpoint of step %d is saved", message["stopped"])
                if "picture" in message:
                    on_picture(message["step"], message["picture"])
                if "diverged" in message:
                    raise TrainingDivergedError(message["diverged"])
                if "out_of_memory" in message:
                    raise ValueError(OUT_OF_MEMORY)
            except Exception as error:
                failure.append(error)

    thread = threading.Thread(target=drain, name="drain", daemon=True)
    thread.start()
    ended: Exception | None = None
    try:
        yield
    except Exception as error:
        ended = error
    finally:
        stop.set()
        thread.join()
    if failure:
        raise failure[0]
    if ended is not None:
        raise ended


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
