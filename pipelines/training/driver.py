"""Training on Ray Train: the driver's side, and what each worker runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusion_core.storage import atomic_folder
from pipelines.cluster import is_uri, prepare_worker
from pipelines.params import Params
from pipelines.stage import log
from pipelines.training.loop import Hooks, Progress, TrainSettings, TrainState

RUN_NAME = "train"
KEEP = 3
"""Checkpoints kept: a torn one is skipped for the one before."""


def train_on_ray(
    params: Params,
    settings: TrainSettings,
    data_dir: Path,
    state_dir: Path,
    key: str,
    on_row: Callable[[dict[str, Any]], None],
    on_grid: Callable[[int, bytes], None],
    *,
    sample_steps: int = 20,
) -> tuple[Path, list[dict[str, float]]]:
    """Train with Ray Train, going on from the last whole checkpoint; returns the last one and its history.

    ``on_row`` gets each logged row (with images_per_s and seconds_left), ``on_grid`` the PNG of each sample grid, both
    here in the driver, as they come; a row may come twice after a resume. Raises ValueError for what a user can cause.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    storage = params.ray.storage
    storage_path = f"{storage.rstrip('/')}/train/{key}" if is_uri(storage) else str(state_dir)
    wait_for_workers(state_dir)
    set_aside_torn_state(state_dir / RUN_NAME)
    train = params.train
    queue = Queue(actor_options={"num_cpus": 0})
    config = {
        "settings": asdict(settings),
        "data_dir": str(data_dir.resolve()),
        "state_dir": str(state_dir),
        "storage_path": storage_path,
        "key": key,
        "queue": queue,
        "threads": max(int(train.cpus_per_worker), 1),
        "sample_steps": min(sample_steps, params.train.diffusion.num_steps),
        "hooks": {
            "log_every": train.log_every,
            "checkpoint_every": train.checkpoint_every,
            "sample_every": train.sample_every,
        },
    }
    resources = {"CPU": float(train.cpus_per_worker)}
    if train.gpus_per_worker:
        resources["GPU"] = float(train.gpus_per_worker)
    trainer = TorchTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=train.num_workers, use_gpu=train.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker >= 1 else "gloo"),
        run_config=RunConfig(
            name=RUN_NAME,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=KEEP),
        ),
    )
    with draining(queue, on_row, on_grid):
        try:
            trainer.fit()
        except Exception as error:
            raise_user_error(error)
            raise
    folder = newest_checkpoint(storage_path, key, state_dir / "final")
    if folder is None:
        raise ValueError(
            f"training ended without a whole checkpoint in {storage_path}: is the storage full or not writable?"
        )
    description = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    assert ray.is_initialized()
    return folder, description["history"]


def worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: join DDP, find the newest whole checkpoint, train, report checkpoints."""
    import ray.train
    import torch.distributed as dist
    from ray.train.torch import get_device, prepare_model

    from pipelines.data.shards import open_split
    from pipelines.training.checkpoint import load_checkpoint, save_checkpoint
    from pipelines.training.grids import sample_grid_png
    from pipelines.training.loop import TrainingDivergedError, new_state, train

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    prepare_worker(config["threads"])
    settings = TrainSettings(**config["settings"])
    key, queue, device = config["key"], config["queue"], get_device()
    if rank == 0:
        hold_worker_lock(Path(config["state_dir"]))
    images = open_split(Path(config["data_dir"]), "train")
    state = new_state(settings, device)
    with tempfile.TemporaryDirectory() as scratch:
        chosen: list[str | None] = [None]
        if rank == 0:
            folder = newest_checkpoint(config["storage_path"], key, Path(scratch) / "resume")
            if folder is not None:
                load_checkpoint(state, folder, key)
                chosen = [folder.name]
        if world_size > 1:
            dist.broadcast_object_list(chosen, src=0)
        if chosen[0] is not None and world_size > 1:
            broadcast_state(state, rank)
    if rank == 0 and state.step:
        queue.put({"resumed": state.step, "rows": state.history})

    def send(message: dict[str, Any]) -> None:
        queue.actor.put_nowait.remote(message)

    def on_log(progress: Progress) -> None:
        if rank == 0:
            send(
                {
                    "rows": [
                        {**progress.row, "images_per_s": progress.images_per_s, "seconds_left": progress.seconds_left}
                    ]
                }
            )

    def on_sample(state: TrainState) -> None:
        if rank == 0:
            queue.put({"grid": sample_grid_png(settings, state, config["sample_steps"]), "step": state.step})

    def on_checkpoint(state: TrainState) -> None:
        metrics = {"step": state.step, "loss": state.history[-1]["loss"] if state.history else float("nan")}
        name = f"step_{state.step:08d}"
        if rank != 0:
            ray.train.report(metrics, checkpoint_dir_name=name)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(state, Path(folder), key)
            ray.train.report(metrics, ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=name)

    hooks = Hooks(**config["hooks"], on_log=on_log, on_checkpoint=on_checkpoint, on_sample=on_sample)
    wrap = (lambda network: prepare_model(network)) if world_size > 1 else (lambda network: network)
    try:
        train(settings, images, state, hooks, rank=rank, world_size=world_size, wrap=wrap)
    except TrainingDivergedError as error:  # on every rank at once, and again on every retry: end without one
        if rank == 0:
            queue.put({"error": str(error)})


def broadcast_state(state: TrainState, rank: int) -> None:
    """Give every rank the state that rank 0 read."""
    import torch
    import torch.distributed as dist

    payload: list[Any] = [None]
    if rank == 0:
        payload = [
            (
                state.network.state_dict(),
                state.ema.network.state_dict(),
                state.optimizer.state_dict(),
                state.step,
                state.history,
            )
        ]
    dist.broadcast_object_list(payload, src=0, device=torch.device("cpu") if dist.get_backend() == "gloo" else None)
    if rank != 0:
        network, ema, optimizer, state.step, state.history = payload[0]
        state.network.load_state_dict(network)
        state.ema.network.load_state_dict(ema)
        state.optimizer.load_state_dict(optimizer)


def newest_checkpoint(storage_path: str, key: str, copy_to: Path) -> Path | None:
    """The newest whole checkpoint of the run: its folder, or a copy of it where the storage is remote. None where there is none.

    A torn checkpoint is skipped, with a warning.
    """
    from pyarrow import fs

    from pipelines.training.checkpoint import check_checkpoint

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


@contextlib.contextmanager
def draining(
    queue: Any, on_row: Callable[[dict[str, Any]], None], on_grid: Callable[[int, bytes], None]
) -> Iterator[None]:
    """Hand on what the workers send, in a thread, until the block ends and the queue is empty."""
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
            except Exception:  # Ray is going down: nothing more will come
                return
            try:
                if "resumed" in message:
                    log.info("going on from the checkpoint of step %d", message["resumed"])
                for row in message.get("rows", []):
                    on_row(row)
                if "grid" in message:
                    on_grid(message["step"], message["grid"])
                if "error" in message:
                    raise ValueError(message["error"])
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


def hold_worker_lock(state_dir: Path) -> None:
    """Rank 0 holds a lock for as long as its process lives, so that a new driver can tell when an old run is gone."""
    with contextlib.suppress(OSError):  # a node that does not see the folder: then Ray's own job control must do
        file = open(state_dir / "worker.lock", "a")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_SH)
        globals()["_worker_lock"] = file


def wait_for_workers(state_dir: Path, seconds: float = 120.0) -> None:
    """Wait until no worker of an earlier driver of this run lives: after a kill they go on for some seconds.

    Raises ValueError where one still lives after ``seconds``.
    """
    deadline, said = time.monotonic() + seconds, False
    with open(state_dir / "worker.lock", "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not said:
                    log.info("waiting for the workers of an earlier run to end")
                    said = True
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"workers of an earlier run still train in {state_dir}: stop them (ray job stop, or ray stop --force) and try again"
                    ) from None
                time.sleep(0.5)


def set_aside_torn_state(run_dir: Path) -> None:
    """Ray Train writes its snapshot in place: a torn one would fail the run, so it is renamed. Our checkpoints stay."""
    for path in run_dir.glob("*snapshot*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, OSError):
            log.warning("%s is torn, probably by a kill: set aside", path)
            path.replace(path.with_suffix(".torn"))


def raise_user_error(error: BaseException) -> None:
    """Raise the ValueError at the root of what Ray wraps, if there is one."""
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
