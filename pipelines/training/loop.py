"""The training loop: plain PyTorch, the same on one process, under DDP, and in a search trial.

Every random number is addressed by (seed, step, position in the global batch), so that a run goes on from a checkpoint
as if it had never stopped, and does not depend on how many workers share its batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffusion_core.artifact import DiffusionModel
from diffusion_core.ema import EMA
from diffusion_core.generation import to_float
from diffusion_core.losses import training_loss
from diffusion_core.networks import build_network
from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.memory import best_memory_format
from diffusion_core.noise import NoiseSource
from diffusion_core.objectives import check_objective
from diffusion_core.schedules import NoiseSchedule, make_schedule


@dataclass(frozen=True)
class TrainSettings:
    """All that decides the weights. ``network`` and ``schedule`` are the configs of `build_network` and `make_schedule`."""

    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    network: Mapping[str, Any]
    schedule: Mapping[str, Any]
    objective: str
    weighting: str
    warmup_steps: int = 0
    decay: str = "cosine"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    condition_dropout: float = 0.1
    horizontal_flip: bool = False
    precision: str = "auto"
    class_names: tuple[str, ...] = ()


class Images(Protocol):
    """What the loop reads: `pipelines.data.shards.ImageSplit`, or anything like it."""

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]: ...


@dataclass
class TrainState:
    """What a checkpoint holds: after ``step`` optimizer steps. ``history`` has a row for each logged step."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class TrainingDivergedError(ValueError):
    """The loss is no longer finite; raised on every rank at the same step."""


@dataclass(frozen=True)
class Progress:
    """A logged step: the row that goes into the history, and how fast it went."""

    row: Mapping[str, float]
    images_per_s: float
    seconds_left: float


@dataclass(frozen=True)
class Hooks:
    """What happens beside the training. Each ``every`` counts steps; a hook also runs after the last step."""

    log_every: int = 10
    checkpoint_every: int = 100
    sample_every: int = 500
    on_log: Callable[[Progress], None] = lambda progress: None
    on_checkpoint: Callable[[TrainState], None] = lambda state: None
    on_sample: Callable[[TrainState], None] = lambda state: None


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The autocast type: bf16 where asked for, or with ``auto`` where the hardware multiplies bf16 natively."""
    if precision == "bf16" or (precision == "auto" and has_bf16(device)):
        return torch.bfloat16
    return torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether this device has native bf16 arithmetic: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(flag)) for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def learning_rate_at(settings: TrainSettings, step: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up, then constant, or a half cosine down to 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.decay == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def new_state(settings: TrainSettings, device: torch.device) -> TrainState:
    """The state before the first step: weights drawn from the seed, on the CPU, so that they are the same everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = build_network(settings.network)
    memory_format = best_memory_format(device, resolve_precision(settings.precision, device))
    network = network.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    return TrainState(network, optimizer, EMA(network, settings.ema_decay))


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
    """Train from ``state.step`` to ``settings.steps`` (or ``until``), with this rank's share of each batch.

    ``wrap`` puts the network into DistributedDataParallel. Raises TrainingDivergedError where the loss is no longer finite.
    """
    hooks = hooks or Hooks()
    device = next(state.network.parameters()).device
    schedule = make_schedule(**settings.schedule)
    check_objective(settings.objective, schedule)
    condition = ConditionSpec(**settings.network["condition"])
    dtype = resolve_precision(settings.precision, device)
    autocast = torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
    network = wrap(state.network)
    network.train()
    last = settings.steps if until is None else min(until, settings.steps)
    losses: list[Tensor] = []
    began, began_step = time.monotonic(), state.step
    parameters = list(state.network.parameters())
    for step, batch in _batches(settings, images, schedule, condition, state.step, last, rank, world_size, device):
        torch.manual_seed(
            (settings.seed * 1_000_003 + step) * 1_009 + rank
        )  # dropout is the one draw that has no address
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate_at(settings, step)
        with autocast:
            loss = training_loss(network, schedule, settings.objective, settings.weighting, **batch).mean()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, settings.grad_clip, foreach=True)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step = step + 1
        state.ema.update(state.network, state.step)
        losses.append(loss.detach())
        at_end = state.step == last
        if state.step % hooks.log_every == 0 or at_end:
            mean_loss = torch.stack(losses).mean()
            if world_size > 1:
                dist.all_reduce(mean_loss)
                mean_loss /= world_size
            row = {
                "step": state.step,
                "loss": float(mean_loss),
                "learning_rate": learning_rate_at(settings, step),
                "grad_norm": float(grad_norm),
            }
            losses.clear()
            if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
                raise TrainingDivergedError(
                    f"the training loss is no longer finite at step {state.step}: lower train.learning_rate "
                    f"({settings.learning_rate:g}) or train.grad_clip ({settings.grad_clip:g}), or set train.precision to fp32"
                )
            state.history.append(row)
            seconds = max(time.monotonic() - began, 1e-9)
            speed = (state.step - began_step) / seconds
            hooks.on_log(Progress(row, speed * settings.batch_size, (settings.steps - state.step) / speed))
        if state.step % hooks.sample_every == 0 or state.step == settings.steps:
            hooks.on_sample(state)
        if state.step % hooks.checkpoint_every == 0 or at_end:
            hooks.on_checkpoint(state)
    return state


def ema_model(
    settings: TrainSettings, state: TrainState, provenance: Mapping[str, Any] | None = None
) -> DiffusionModel:
    """The EMA weights as a DiffusionModel (shares their memory)."""
    return DiffusionModel(
        network=state.ema.network,
        network_config=settings.network,
        schedule=make_schedule(**settings.schedule),
        objective=settings.objective,
        image_size=settings.network["image_size"],
        image_channels=settings.network["image_channels"],
        class_names=settings.class_names,
        condition_dropout=settings.condition_dropout,
        provenance=provenance or {},
    )


def _batches(
    settings: TrainSettings,
    images: Images,
    schedule: NoiseSchedule,
    condition: ConditionSpec,
    first: int,
    last: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, arguments of the loss) for this rank; the next batch is read while the network works on this one."""
    share = settings.batch_size // world_size
    rows = torch.arange(rank * share, (rank + 1) * share, dtype=torch.int64)

    def read(step: int) -> tuple[Tensor, Tensor]:
        picked = dataset_indices(settings.seed, len(images), step * settings.batch_size + rows.numpy())
        pixels, labels = images.gather(picked)
        if device.type == "cuda":
            pixels, labels = pixels.pin_memory(), labels.pin_memory()
        return pixels, labels

    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(read, first) if first < last else None
        for step in range(first, last):
            assert pending is not None
            pixels, labels = pending.result()
            pending = reader.submit(read, step + 1) if step + 1 < last else None
            yield step, _prepare(settings, schedule, condition, pixels, labels, rows, step, device)


def _prepare(
    settings: TrainSettings,
    schedule: NoiseSchedule,
    condition: ConditionSpec,
    pixels: Tensor,
    labels: Tensor,
    rows: Tensor,
    step: int,
    device: torch.device,
) -> dict[str, Any]:
    """Images in [-1, 1], steps, noise and conditions of one batch; ``rows`` are positions in the global batch."""
    rows = rows.to(device, non_blocking=True)
    memory_format = best_memory_format(device, resolve_precision(settings.precision, device))
    x0 = to_float(pixels.to(device, non_blocking=True)).contiguous(memory_format=memory_format)
    draws = NoiseSource(settings.seed, "train-draws").uniform((3,), rows, step)
    if settings.horizontal_flip:
        x0 = torch.where((draws[:, 0] < 0.5).view(-1, 1, 1, 1), x0.flip(-1), x0)
    t = (draws[:, 1] * schedule.num_steps).to(torch.int64)
    eps = NoiseSource(settings.seed, "train-noise").normal(x0.shape[1:], rows, step)
    labels = condition.drop(labels.to(device, non_blocking=True), draws[:, 2] < settings.condition_dropout)
    return {"x0": x0, "t": t, "eps": eps.contiguous(memory_format=memory_format), "condition": labels}


def dataset_indices(seed: int, size: int, positions: np.ndarray) -> np.ndarray:
    """Which image stands at each position of the endless sequence of epochs, each a permutation of its own."""
    epochs, offsets = np.divmod(positions, size)
    indices = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        indices[rows] = _permutation(seed, size, int(epoch))[offsets[rows]]
    return indices


@lru_cache(maxsize=4)
def _permutation(seed: int, size: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
