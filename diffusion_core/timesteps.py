"""Which steps a training batch is taken at, and everything else that is random in a training step.

All of it is addressed: it depends on (seed, training step, position in the global batch), never on the rank or batch split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.noise import NoiseSource
from diffusion_core.schedules import NoiseSchedule

SAMPLINGS = ("uniform", "stratified", "log_normal", "loss_aware")


@dataclass(frozen=True)
class LossHistory:
    """The last ``losses.shape[1]`` losses seen at each step, for loss-aware sampling: float64 (T, K); seen: int64 (T,).

    A pair of tensors to keep in a checkpoint. Start with `LossHistory.empty`.
    """

    losses: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, num_steps: int, length: int = 10) -> LossHistory:
        return cls(torch.zeros(num_steps, length, dtype=torch.float64), torch.zeros(num_steps, dtype=torch.int64))

    def updated(self, t: Tensor, losses: Tensor) -> LossHistory:
        """With the losses (B,) of the steps t (B,) taken in, in the order given: use the whole global batch, in its order.

        Raises ValueError for a loss that is not finite, or a step outside the schedule.
        """
        table, seen = self.losses.clone(), self.seen.clone()
        for step, loss in zip(t.tolist(), losses.detach().double().tolist(), strict=True):
            if not math.isfinite(loss) or not 0 <= step < len(seen):
                raise ValueError(
                    f"a loss history takes finite losses of steps 0 to {len(seen) - 1}, got {loss} at {step}"
                )
            table[step, seen[step] % table.shape[1]] = loss
            seen[step] += 1
        return LossHistory(table, seen)

    def probabilities(self, floor: float = 1e-3) -> Tensor:
        """(T,) float64: p_t proportional to sqrt(E[L_t^2]) (arXiv 2102.09672, eq. 18), ``floor`` of it spread uniformly.

        Uniform until every step has been seen as often as the history is long.
        """
        num_steps, length = self.losses.shape
        uniform = torch.full((num_steps,), 1.0 / num_steps, dtype=torch.float64)
        root = self.losses.square().mean(dim=1).sqrt()
        if bool((self.seen < length).any()) or float(root.sum()) == 0.0:
            return uniform
        return (1.0 - floor) * root / root.sum() + floor * uniform


@dataclass(frozen=True)
class TrainingDraw:
    """The random part of a training step for a batch of B images.

    t: (B,) int64 in [0, T); eps: (B, ...) float32; dropped: (B,) bool, whose condition to drop; importance: (B,) float32,
    what to multiply the loss by so that its mean stays that of uniform steps (1 unless loss-aware); self_condition: bool,
    whether this step feeds the network its own estimate, the same for the whole global batch.
    """

    t: Tensor
    eps: Tensor
    dropped: Tensor
    importance: Tensor
    self_condition: bool


def draw_training_step(
    schedule: NoiseSchedule,
    shape: Sequence[int],
    positions: Tensor,
    batch_size: int,
    step: int,
    *,
    seed: int,
    sampling: str = "uniform",
    condition_dropout: float = 0.0,
    offset_noise: float = 0.0,
    self_conditioning: float = 0.0,
    log_normal: tuple[float, float] = (-1.2, 1.2),
    history: LossHistory | None = None,
) -> TrainingDraw:
    """Everything random of training step ``step`` for the images at ``positions`` ((B,) int64) of a batch of ``batch_size``.

    ``sampling`` and its options: see `sample_timesteps`. ``condition_dropout``: the share of images whose condition is
    dropped (arXiv 2207.12598, algorithm 1). ``offset_noise``: the strength of one more normal number a channel that is
    added to eps (https://www.crosslabs.org/blog/diffusion-with-offset-noise; 0.1 there). ``self_conditioning``: the share
    of steps that use it (one half in arXiv 2208.04202). shape: (C, ...), that of one image.

    Raises ValueError for shares outside [0, 1] or an unknown sampling.
    """
    for name, share in (("condition_dropout", condition_dropout), ("self_conditioning", self_conditioning)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} is a share and must lie in 0 to 1, got {share}")
    t, importance = sample_timesteps(
        sampling,
        schedule,
        NoiseSource(seed, "train/t"),
        positions,
        batch_size,
        step,
        log_normal=log_normal,
        history=history,
    )
    eps = NoiseSource(seed, "train/eps").normal(shape, positions, step)
    if offset_noise:
        offset = NoiseSource(seed, "train/offset").normal(shape[:1], positions, step)
        eps = eps + offset_noise * offset.view(*offset.shape, *([1] * (len(shape) - 1)))
    dropped = NoiseSource(seed, "train/dropout").uniform((), positions, step) < condition_dropout
    coin = NoiseSource(seed, "train/self_condition").uniform((), torch.zeros(1, dtype=torch.int64), step)
    return TrainingDraw(t, eps, dropped, importance, bool(coin.item() < self_conditioning))


def sample_timesteps(
    sampling: str,
    schedule: NoiseSchedule,
    source: NoiseSource,
    positions: Tensor,
    batch_size: int,
    step: int,
    *,
    log_normal: tuple[float, float] = (-1.2, 1.2),
    history: LossHistory | None = None,
) -> tuple[Tensor, Tensor]:
    """((B,) int64 steps in [0, T), (B,) float32 importance) of the images at ``positions`` of the global batch.

    ``uniform``     independent and uniform
    ``stratified``  antithetic pairs (t, T - 1 - t) on a lattice with one random offset a batch (arXiv 2107.00630, appendix
                    I.1): each image's step is still uniform, but the batch covers the schedule evenly
    ``log_normal``  the step whose log sigma is nearest to a normal number of mean and deviation ``log_normal``
                    (arXiv 2206.00364, table 1); changes the weighting of the loss, on purpose
    ``loss_aware``  in proportion to the root mean square of past losses, ``history`` (arXiv 2102.09672, section 3.3);
                    importance 1 / (p_t T) keeps the expected loss

    Raises ValueError for an unknown sampling, positions outside the batch, or loss_aware without its history.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"unknown timestep sampling {sampling!r}: choose one of {', '.join(SAMPLINGS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if positions.device.type == "cpu" and bool(((positions < 0) | (positions >= batch_size)).any()):
        raise ValueError(
            f"positions in a batch of {batch_size} lie in 0 to {batch_size - 1}, got {positions.tolist()[:8]}"
        )
    total = schedule.num_steps
    importance = torch.ones(positions.shape, dtype=torch.float32, device=positions.device)
    if sampling == "stratified":
        offset = source.uniform((), torch.zeros(1, dtype=torch.int64, device=positions.device), step)
        pairs = (batch_size + 1) // 2
        t = _step_of((offset + (positions // 2).double() / pairs) % 1.0, total)
        return torch.where(positions % 2 == 1, total - 1 - t, t), importance
    if sampling == "log_normal":
        mean, deviation = log_normal
        if deviation <= 0:
            raise ValueError(f"log_normal is (mean, deviation) with a deviation above 0, got {log_normal}")
        log_sigma = mean + deviation * source.normal((), positions, step).double()
        levels = -0.5 * schedule.log_snr(torch.arange(total, device=positions.device))
        return torch.searchsorted((levels[1:] + levels[:-1]) / 2.0, log_sigma), importance
    uniform = source.uniform((), positions, step)
    if sampling == "uniform":
        return _step_of(uniform, total), importance
    if history is None:
        raise ValueError(
            "timestep sampling 'loss_aware' needs the losses so far: pass history=LossHistory.empty(T) at first"
        )
    if len(history.seen) != total:
        raise ValueError(f"the loss history has {len(history.seen)} steps, the schedule {total}")
    probabilities = history.probabilities().to(positions.device)
    t = torch.searchsorted(probabilities.cumsum(0), uniform, right=True).clamp(max=total - 1)
    return t, (1.0 / (probabilities[t] * total)).float()


def _step_of(uniform: Tensor, total: int) -> Tensor:
    return (uniform * total).long().clamp(max=total - 1)
