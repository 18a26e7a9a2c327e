"""The training loop: plain PyTorch, the same in one process, under DDP, and in a search trial.

Every random number is addressed by (seed, step, position in the global batch). A run therefore resumes from a checkpoint as if it
had never stopped, and its result does not depend on the number of workers beyond the rounding of sums.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffusion_core.ema import EMA
from diffusion_core.images import to_float
from diffusion_core.losses import training_loss
from diffusion_core.networks import build_network
from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.dropout import addressed_dropout
from diffusion_core.networks.memory import best_memory_format
from diffusion_core.objectives import check_objective
from diffusion_core.random_draws import dataset_indices, draw_training_step
from diffusion_core.schedules import NoiseSchedule, make_schedule

log = logging.getLogger("rediffuse")


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the weights. ``network`` and ``schedule`` are the configs of `build_network` and `make_schedule`."""

    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    network: Mapping[str, Any]
    schedule: Mapping[str, Any]
    objective: str
    weighting: str
    precision: str
    """fp32, or bf16 for autocast to bfloat16."""
    warmup_steps: int
    decay: str
    weight_decay: float
    grad_clip: float
    ema_decay: float
    condition_dropout: float
    horizontal_flip: bool
    class_names: tuple[str, ...]


class Images(Protocol):
    """The images that the loop reads, such as `pipelines.data.shards.ImageSplit`."""

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]: ...


@dataclass
class TrainState:
    """The content of a checkpoint, after ``step`` optimizer steps.

    ``losses`` and ``grad_norms`` are (steps,) float32 on the CPU: entry k belongs to optimizer step k (from 0) and is NaN before that
    step is done. Both cover the global batch.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    losses: Tensor
    grad_norms: Tensor
    step: int = 0


class TrainingDivergedError(ValueError):
    """A loss, gradient norm or weight is NaN or infinite. All ranks raise it at the same step."""


@dataclass(frozen=True)
class Progress:
    """A logged step: its row of `rows`, and the speed since the loop started."""

    row: Mapping[str, float]
    images_per_s: float
    seconds_left: float


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop. Each ``every`` counts steps; a hook also runs after the last step.

    Hooks do not change the result. The order in a step is on_log, on_checkpoint, on_sample. They see a state that has been checked to
    be finite. on_sample may run out of GPU memory: the loop then logs one line and continues.

    ``stop`` is asked after each step. If it returns True, which it must do on every rank at the same step, the loop saves a
    checkpoint and ends.
    """

    log_every: int = 10
    checkpoint_every: int = 100
    sample_every: int = 500
    on_log: Callable[[Progress], None] = lambda progress: None
    on_checkpoint: Callable[[TrainState], None] = lambda state: None
    on_sample: Callable[[TrainState], None] = lambda state: None
    stop: Callable[[], bool] = lambda: False


def autocast_dtype(settings: TrainSettings) -> torch.dtype:
    """Return bfloat16 if the precision is bf16, else float32."""
    assert settings.precision in ("fp32", "bf16"), f"the precision must be resolved, got {settings.precision}"
    return torch.bfloat16 if settings.precision == "bf16" else torch.float32


def learning_rate_at(settings: TrainSettings, step: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0): linear warm-up, then constant or a half cosine down to 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.decay == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def rows(settings: TrainSettings, state: TrainState, every: int) -> list[dict[str, float]]:
    """Return the history as rows of step, loss, learning_rate and grad_norm: one per ``every`` steps, and one for the last step.

    The loss is the mean since the row before; learning rate and gradient norm are those of the row's step.
    """
    ends = list(range(every, state.step + 1, every))
    if state.step == settings.steps and state.step % every:
        ends.append(state.step)
    return [_row(settings, state, end, every) for end in ends]


def new_state(settings: TrainSettings, device: torch.device) -> TrainState:
    """Return the state before the first step. The weights are drawn from the seed on the CPU, so they are the same on any device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = build_network(settings.network)
    memory_format = best_memory_format(device, autocast_dtype(settings))
    network = network.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    losses, grad_norms = torch.full((2, settings.steps), math.nan).unbind()
    return TrainState(network, optimizer, EMA(network, settings.ema_decay), losses, grad_norms)


def share_of_batch(batch_size: int, rank: int, world_size: int) -> range:
    """Return the positions of the global batch that ``rank`` computes: contiguous, and at most one more than another rank's."""
    assert 0 <= rank < world_size <= batch_size, f"rank {rank} of {world_size} has no share of {batch_size} images"
    share, rest = divmod(batch_size, world_size)
    first = rank * share + min(rank, rest)
    return range(first, first + share + (rank < rest))


def train(
    settings: TrainSettings,
    images: Images,
    state: TrainState,
    hooks: Hooks | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
    until: int | None = None,
) -> TrainState:
    """Train from ``state.step`` to ``settings.steps`` (or ``until``) with this rank's share of each batch.

    ``wrap`` puts the network into DistributedDataParallel, which averages gradients over ranks. Each rank's loss is the sum over its
    images times world_size / batch_size, so that this average is the gradient of the mean over the global batch for any shares.

    Raises TrainingDivergedError before a hook could log or save a state that is not finite.
    """
    hooks = hooks or Hooks()
    device = next(state.network.parameters()).device
    schedule = make_schedule(**settings.schedule)
    check_objective(settings.objective, schedule)
    dtype = autocast_dtype(settings)
    autocast = torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
    share = share_of_batch(settings.batch_size, rank, world_size)
    positions = torch.arange(share.start, share.stop, device=device)
    network = wrap(state.network)
    network.train()
    parameters = list(state.network.parameters())
    last = settings.steps if until is None else min(until, settings.steps)
    losses: list[Tensor] = []
    grad_norms: list[Tensor] = []
    began, began_step = time.monotonic(), state.step
    for step, pixels, labels in _read_ahead(settings, images, share, state.step, last, pinned=device.type == "cuda"):
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate_at(settings, step)
        batch = _batch(settings, schedule, pixels, labels, positions, step)
        with addressed_dropout(state.network, seed=settings.seed, step=step, positions=positions):
            with autocast:
                per_image = training_loss(network, schedule, settings.objective, settings.weighting, **batch)
            loss = per_image.sum() / settings.batch_size
            (loss * world_size).backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, settings.grad_clip, foreach=True)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step = step + 1
        state.ema.update(state.network, state.step)
        losses.append(loss.detach())
        grad_norms.append(grad_norm)
        logged = state.step % hooks.log_every == 0 or state.step == settings.steps
        stopped = hooks.stop()
        saved = state.step % hooks.checkpoint_every == 0 or state.step == last or stopped
        sampled = state.step % hooks.sample_every == 0 or state.step == settings.steps
        if logged or saved or sampled:
            _record(state, losses, grad_norms, world_size)
        if logged:
            speed = (state.step - began_step) / max(time.monotonic() - began, 1e-9)
            row = _row(settings, state, state.step, hooks.log_every)
            hooks.on_log(Progress(row, speed * settings.batch_size, (settings.steps - state.step) / speed))
        if saved:
            hooks.on_checkpoint(state)
        if sampled:
            try:
                hooks.on_sample(state)
            except torch.OutOfMemoryError:
                log.warning("step %d: no GPU memory for the sample picture; it is skipped", state.step)
        if stopped:
            break
    return state


def _record(state: TrainState, losses: list[Tensor], grad_norms: list[Tensor], world_size: int) -> None:
    """Move the numbers of the latest steps from this rank's device into the history, and empty both lists.

    Raises TrainingDivergedError on every rank if a number, weight or EMA weight is not finite on any rank.
    """
    total, norms = torch.stack(losses), torch.stack(grad_norms)
    if world_size > 1:
        shares = [torch.empty_like(total) for _ in range(world_size)]
        dist.all_gather(shares, total)
        total = reduce(torch.add, shares)  # in the order of the ranks, so that the sum does not depend on the cadence
    finite = {
        "losses": _all_finite([total]),
        "gradient norms": _all_finite([norms]),
        "weights": _all_finite(list(state.network.parameters())),
        "EMA weights": _all_finite(list(state.ema.network.parameters())),
    }
    flags = torch.stack(list(finite.values())).to(torch.int32)
    if world_size > 1:
        dist.all_reduce(flags, dist.ReduceOp.MIN)
    if broken := [name for name, flag in zip(finite, flags.tolist(), strict=True) if not flag]:
        raise TrainingDivergedError(f"training diverged: {', '.join(broken)} not finite at step {state.step}")
    latest = slice(state.step - len(losses), state.step)
    state.losses[latest], state.grad_norms[latest] = torch.stack([total, norms]).cpu()
    losses.clear()
    grad_norms.clear()


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return () bool on the device of the tensors."""
    largest = torch._foreach_norm([tensor.detach() for tensor in tensors], math.inf)
    return torch.stack(largest).isfinite().all()


def _row(settings: TrainSettings, state: TrainState, end: int, every: int) -> dict[str, float]:
    first = (end - 1) // every * every
    return {
        "step": end,
        "loss": float(state.losses[first:end].double().mean()),
        "learning_rate": learning_rate_at(settings, end - 1),
        "grad_norm": float(state.grad_norms[end - 1]),
    }


def _read_ahead(
    settings: TrainSettings, images: Images, share: range, first: int, last: int, *, pinned: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (step, uint8 images, labels) of this rank's share; a thread reads the next batch while the network computes."""
    positions = np.arange(share.start, share.stop, dtype=np.int64)

    def read(step: int) -> tuple[Tensor, Tensor]:
        picked = dataset_indices(settings.seed, len(images), step * settings.batch_size + positions)
        pixels, labels = images.gather(picked)
        return (pixels.pin_memory(), labels.pin_memory()) if pinned else (pixels, labels)

    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(read, first) if first < last else None
        for step in range(first, last):
            assert pending is not None
            pixels, labels = pending.result()
            pending = reader.submit(read, step + 1) if step + 1 < last else None
            yield step, pixels, labels


def _batch(
    settings: TrainSettings, schedule: NoiseSchedule, pixels: Tensor, labels: Tensor, positions: Tensor, step: int
) -> dict[str, Any]:
    """Return x0, t, eps and condition of the images at ``positions`` of the global batch, on the device of the positions."""
    device = positions.device
    memory_format = best_memory_format(device, autocast_dtype(settings))
    x0 = to_float(pixels.to(device, non_blocking=True)).contiguous(memory_format=memory_format)
    draw = draw_training_step(
        schedule,
        x0.shape[1:],
        positions,
        settings.batch_size,
        step,
        seed=settings.seed,
        condition_dropout=settings.condition_dropout,
        horizontal_flip=settings.horizontal_flip,
    )
    if settings.horizontal_flip:
        x0 = torch.where(draw.flipped.view(-1, 1, 1, 1), x0.flip(-1), x0)
    condition = ConditionSpec(**settings.network["condition"]).drop(labels.to(device, non_blocking=True), draw.dropped)
    return {"x0": x0, "t": draw.t, "eps": draw.eps.contiguous(memory_format=memory_format), "condition": condition}
