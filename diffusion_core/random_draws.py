"""The random draws of a training step: images of an epoch, timesteps, noise, flips and dropped conditions.

All are addressed: they depend on (seed, training step, position in the global batch), never on the rank or the batch split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from diffusion_core.noise import NoiseSource
from diffusion_core.schedules import NoiseSchedule

SAMPLINGS = ("uniform", "stratified", "log_normal", "loss_aware")


@dataclass(frozen=True)
class LossHistory:
    """The last K losses at each timestep, for loss-aware sampling. losses: (T, K) float64; seen: (T,) int64 counts.

    Both tensors belong in a checkpoint. Start with `LossHistory.empty`.
    """

    losses: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, num_steps: int, length: int = 10) -> LossHistory:
        """Return the history of T = ``num_steps`` timesteps without losses; ``length`` is K."""
        return cls(torch.zeros(num_steps, length, dtype=torch.float64), torch.zeros(num_steps, dtype=torch.int64))

    def updated(self, t: Tensor, losses: Tensor) -> LossHistory:
        """Return the history with the losses (B,) at timesteps t (B,) added. Pass the whole global batch, in its order.

        Raises ValueError if a loss is not finite or a timestep is outside the schedule.
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
        """Return the probability of each timestep, (T,) float64: p_t proportional to sqrt(E[L_t^2]) (arXiv 2102.09672, eq. 18).

        The share ``floor`` is spread uniformly. All are equal until every timestep has K losses.
        """
        num_steps, length = self.losses.shape
        uniform = torch.full((num_steps,), 1.0 / num_steps, dtype=torch.float64)
        root = self.losses.square().mean(dim=1).sqrt()
        if bool((self.seen < length).any()) or float(root.sum()) == 0.0:
            return uniform
        return (1.0 - floor) * root / root.sum() + floor * uniform


@dataclass(frozen=True)
class TrainingDraw:
    """The random part of a training step for B images.

    t: (B,) int64 in [0, T); eps: (B, ...) float32; dropped: (B,) bool, the images whose condition is dropped; flipped: (B,) bool,
    the images to mirror; importance: (B,) float32, the factor of each loss that keeps the mean of uniform timesteps (1 unless
    loss-aware); self_condition: bool, whether the step uses self-conditioning, the same for the whole global batch.
    """

    t: Tensor
    eps: Tensor
    dropped: Tensor
    flipped: Tensor
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
    horizontal_flip: bool = False,
    offset_noise: float = 0.0,
    self_conditioning: float = 0.0,
    log_normal: tuple[float, float] = (-1.2, 1.2),
    history: LossHistory | None = None,
) -> TrainingDraw:
    """Draw the random part of training step ``step`` for the images at ``positions`` of a global batch of ``batch_size``.

    ``sampling``, ``log_normal`` and ``history``: see `sample_timesteps`. ``condition_dropout``: the share of images whose condition
    is dropped (arXiv 2207.12598, algorithm 1). ``horizontal_flip``: mirror half of the images. ``offset_noise``: the strength of one
    more normal number per channel, added to eps (https://www.crosslabs.org/blog/diffusion-with-offset-noise; 0.1 there).
    ``self_conditioning``: the share of steps that use it (one half in arXiv 2208.04202).

    shape: (C, ...), the shape of one image; positions: (B,) int64 in [0, batch_size), on any device; the result is on the same device.
    Raises ValueError if a share is not in [0, 1], and as `sample_timesteps` does.
    """
    for name, share in (("condition_dropout", condition_dropout), ("self_conditioning", self_conditioning)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} is a share and must lie in 0 to 1, got {share}")
    draws = NoiseSource(seed, "train-draws").uniform((3,), positions, step)
    t, importance = sample_timesteps(
        sampling, schedule, draws[:, 1], positions, batch_size, step, seed=seed, log_normal=log_normal, history=history
    )
    eps = NoiseSource(seed, "train-noise").normal(shape, positions, step)
    if offset_noise:
        offset = NoiseSource(seed, "train-offset").normal(shape[:1], positions, step)
        eps = eps + offset_noise * offset.view(*offset.shape, *([1] * (len(shape) - 1)))
    flipped = draws[:, 0] < 0.5 if horizontal_flip else torch.zeros_like(positions, dtype=torch.bool)
    dropped = draws[:, 2] < condition_dropout
    self_condition = False
    if self_conditioning:  # on the CPU, because reading the coin from another device would wait for it
        coin = NoiseSource(seed, "train-self-condition").uniform((), torch.zeros(1, dtype=torch.int64), step)
        self_condition = bool(coin.item() < self_conditioning)
    return TrainingDraw(t, eps, dropped, flipped, importance, self_condition)


def sample_timesteps(
    sampling: str,
    schedule: NoiseSchedule,
    uniform: Tensor,
    positions: Tensor,
    batch_size: int,
    step: int,
    *,
    seed: int,
    log_normal: tuple[float, float] = (-1.2, 1.2),
    history: LossHistory | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw timesteps and importance of the images at ``positions`` of the global batch: (B,) int64 in [0, T), (B,) float32.

    ``uniform``     independent and uniform: floor(T u)
    ``stratified``  antithetic pairs (t, T - 1 - t) on a lattice with one random offset per batch (arXiv 2107.00630, appendix
                    I.1): the timestep of each image is still uniform, but the batch covers the schedule evenly
    ``log_normal``  the timestep whose log sigma is nearest to a normal number of mean and deviation ``log_normal``
                    (arXiv 2206.00364, table 1); changes the weighting of the loss, on purpose
    ``loss_aware``  in proportion to the root mean square of past losses, ``history`` (arXiv 2102.09672, section 3.3);
                    importance 1 / (p_t T) keeps the expected loss

    ``uniform``: (B,) float64 in (0, 1), the numbers u of uniform and loss_aware. The other two draw from the stream
    "train-timesteps" of ``seed``.

    Raises ValueError if the sampling is unknown, a position is outside the batch (checked on a CPU only), the deviation of
    ``log_normal`` is not above 0, or loss_aware has no history of T timesteps.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"unknown timestep sampling {sampling!r}: choose one of {', '.join(SAMPLINGS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if positions.device.type == "cpu" and bool(((positions < 0) | (positions >= batch_size)).any()):
        raise ValueError(
            f"positions in a batch of {batch_size} must lie in 0 to {batch_size - 1}, got {positions.tolist()[:8]}"
        )
    total = schedule.num_steps
    source = NoiseSource(seed, "train-timesteps")
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
    if sampling == "uniform":
        return _step_of(uniform, total), importance
    if history is None:
        raise ValueError("timestep sampling 'loss_aware' needs past losses: start with history=LossHistory.empty(T)")
    if len(history.seen) != total:
        raise ValueError(f"the loss history has {len(history.seen)} steps, but the schedule has {total}")
    probabilities = history.probabilities().to(positions.device)
    t = torch.searchsorted(probabilities.cumsum(0), uniform.contiguous(), right=True).clamp(max=total - 1)
    return t, (1.0 / (probabilities[t] * total)).float()


def dataset_indices(seed: int, size: int, positions: np.ndarray) -> np.ndarray:
    """Return the dataset indices, (N,) int64 in [0, size), at ``positions`` ((N,) integers from 0) of an endless sequence of epochs.

    Each epoch of ``size`` positions is a permutation of its own, drawn from (seed, epoch).
    """
    epochs, offsets = np.divmod(positions, size)
    indices = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        indices[rows] = _permutation(seed, size, int(epoch))[offsets[rows]]
    return indices


@lru_cache(maxsize=4)
def _permutation(seed: int, size: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def _step_of(uniform: Tensor, total: int) -> Tensor:
    return (uniform * total).long().clamp(max=total - 1)
