"""The function that every Ray Train worker runs, and its messages to the driver."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffusion_core.generation import NonFiniteOutputError
from pipelines.data.shards import open_split
from pipelines.ddp.progress_picture import progress_picture
from pipelines.ddp.surviving_state import hold_worker_lock, newest_checkpoint
from pipelines.devices import prepare_process
from pipelines.training.checkpoint import load_checkpoint, save_checkpoint
from pipelines.training.loop import (
    Hooks,
    Progress,
    TrainingDivergedError,
    TrainSettings,
    TrainState,
    new_state,
    rows,
    train,
)

log = logging.getLogger("rediffuse")


def worker(config: dict[str, Any]) -> None:
    """Join DDP, load the newest whole checkpoint, train, and report checkpoints to Ray.

    Rank 0 puts its messages into the queue of the config: ``resumed`` with the rows so far, ``rows``, ``picture``, ``diverged``.
    Any rank puts ``out_of_memory``, and fails if there are other ranks, which ends them. On Ray's retry every rank returns at once.
    A message in the config's ``stop`` queue ends the training with a checkpoint; rank 0 then puts ``stopped``.
    """
    import ray.train
    from ray.train.torch import get_device, prepare_model

    if not config["stop"].empty():
        return
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    prepare_process(config["threads"])
    settings = TrainSettings(**config["settings"])
    key, queue = config["key"], config["queue"]
    if rank == 0:
        hold_worker_lock(Path(config["state_dir"]))
    images = open_split(Path(config["data_dir"]), "train")
    state = new_state(settings, get_device())
    if rank == 0:
        with tempfile.TemporaryDirectory() as scratch:
            folder = newest_checkpoint(config["storage_path"], key, Path(scratch) / "resume")
            if folder is not None:
                load_checkpoint(state, folder, key)
    if world_size > 1:
        broadcast_state(state, rank)
    if rank == 0 and state.step:
        queue.put({"resumed": state.step, "rows": rows(settings, state, config["hooks"]["log_every"])})

    def on_log(progress: Progress) -> None:
        if rank == 0:
            speed = {"images_per_s": progress.images_per_s, "seconds_left": progress.seconds_left}
            queue.actor.put_nowait.remote({"rows": [{**progress.row, **speed}]})

    def on_sample(state: TrainState) -> None:
        if rank != 0:
            return
        try:
            picture = progress_picture(settings, state)
        except NonFiniteOutputError as error:  # the weights are finite, and later ones may sample again
            log.warning("step %d: no sample picture: %s", state.step, error)
            return
        queue.put({"picture": picture, "step": state.step})

    def on_checkpoint(state: TrainState) -> None:
        metrics = {"step": state.step, "loss": float(state.losses[state.step - 1])}
        name = f"step_{state.step:08d}"
        if rank != 0:
            ray.train.report(metrics, checkpoint_dir_name=name)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(state, Path(folder), key)
            ray.train.report(metrics, ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=name)

    stop = StopRequest(config["stop"], rank, world_size)
    hooks = Hooks(**config["hooks"], on_log=on_log, on_checkpoint=on_checkpoint, on_sample=on_sample, stop=stop)
    wrap = (lambda network: prepare_model(network)) if world_size > 1 else (lambda network: network)
    try:
        train(settings, images, state, hooks, rank=rank, world_size=world_size, wrap=wrap)
        if rank == 0 and state.step < settings.steps:
            queue.put({"stopped": state.step})
    except TrainingDivergedError as error:  # every rank raises this, and a retry would too: end without a failure
        if rank == 0:
            queue.put({"diverged": str(error)})
    except torch.OutOfMemoryError:
        config["stop"].put(True)
        queue.put({"out_of_memory": True})
        if world_size > 1:  # the other ranks may wait for this one in a collective: only a failure ends them
            raise


class StopRequest:
    """The answer to "must the training stop after this step?", the same on every rank.

    Rank 0 looks into the queue twice per second, in a thread. The ranks then agree by a maximum over one flag per rank, whose result is
    read one step later: no rank waits for another one, and no GPU is asked.
    """

    def __init__(self, queue: Any, rank: int, world_size: int) -> None:
        self.requested = threading.Event()
        self.group: Any = dist.new_group(backend="gloo") if world_size > 1 else None
        self.flag = torch.zeros(1, dtype=torch.int32)
        self.pending: Any = None
        if rank == 0:
            threading.Thread(target=self._watch, args=(queue,), name="stop", daemon=True).start()

    def __call__(self) -> bool:
        if self.group is None:
            return self.requested.is_set()
        if self.pending is not None:
            self.pending.wait()
            if self.flag.item():
                return True
        self.flag.fill_(int(self.requested.is_set()))
        self.pending = dist.all_reduce(self.flag, dist.ReduceOp.MAX, self.group, async_op=True)
        return False

    def _watch(self, queue: Any) -> None:
        while True:
            try:
                if not queue.empty():
                    break
            except Exception:  # Ray shuts down
                return
            time.sleep(0.5)
        self.requested.set()


def broadcast_state(state: TrainState, rank: int) -> None:
    """Broadcast rank 0's state to every rank: tensors only, each on the state's own device. Every rank must call it."""
    device = next(state.network.parameters()).device
    step = torch.tensor([state.step], device=device)
    dist.broadcast(step, src=0)
    state.step = int(step)
    if not state.step:
        return
    if rank != 0:
        fill_optimizer(state)
    for tensor in _tensors_of(state):
        contiguous = tensor.to(device).contiguous()
        dist.broadcast(contiguous, src=0)
        tensor.copy_(contiguous)


def fill_optimizer(state: TrainState) -> None:
    """Create AdamW's state as zeros, in the layout of its first step."""
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            state.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def _tensors_of(state: TrainState) -> Iterator[Tensor]:
    """Yield every tensor of the state in an order that is the same on every rank."""
    for network in (state.network, state.ema.network):
        yield from (value.detach() for value in network.state_dict().values())
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            slots = state.optimizer.state[parameter]
            yield from (slots[name].detach() for name in sorted(slots))
    yield state.losses[: state.step]
    yield state.grad_norms[: state.step]
