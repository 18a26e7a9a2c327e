"""Exponential moving averages of a network's weights: decays, the shadow network, and averages made after the fact."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


def warmup_decay(step: int, decay: float) -> float:
    """The decay after ``step`` updates: min(decay, (1 + step) / (10 + step)), so that early averages forget the start."""
    return min(decay, (1 + step) / (10 + step))


def half_life_decay(step: int, half_life: float, batch_size: int, ramp: float | None = 0.05) -> float:
    """2^(-batch_size / half-life): weights ``half_life`` images ago count half (EDM, arXiv 2206.00364, appendix F.2).

    The average means the same for any batch size. Until step ``half_life / (ramp batch_size)`` the half-life is only the share
    ``ramp`` of the images seen so far, so that early averages forget the start; None is without that.

    step: counted from 1. Raises ValueError for a half-life, batch size or ramp that is not above 0.
    """
    if not half_life > 0 or batch_size < 1 or (ramp is not None and not ramp > 0):
        raise ValueError(
            f"an EMA half-life, batch size and ramp must be above 0, got {half_life}, {batch_size} and {ramp}"
        )
    if ramp is not None:
        half_life = min(half_life, step * batch_size * ramp)
    return 0.5 ** (batch_size / max(half_life, 1e-8))


def power_decay(step: int, sigma_rel: float) -> float:
    """(1 - 1 / step)^(gamma + 1), the power-function average of relative width ``sigma_rel`` (arXiv 2312.02696, eq. 127).

    The weights of step s count as s^(gamma + 1) - (s - 1)^(gamma + 1), whatever the length of the run. step: from 1; the first is 0,
    so that the average starts at the first weights. Raises ValueError for a step before, or a width out of range.
    """
    if step < 1:
        raise ValueError(f"the steps of an average are counted from 1, got {step}")
    return (1.0 - 1.0 / step) ** (power_gamma(sigma_rel) + 1.0)


def power_gamma(sigma_rel: float) -> float:
    """The exponent gamma whose profile t^gamma on [0, 1] has the standard deviation ``sigma_rel`` (arXiv 2312.02696, eq. 126).

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2). Raises ValueError outside 0 to 12^(-1/2) (0.2886, where gamma is 0).
    """
    if not 0.0 < sigma_rel <= 12**-0.5:
        raise ValueError(
            f"the relative width of a power-function EMA lies in 0 to 0.2886 (0 excluded), got {sigma_rel}"
        )
    inverse = sigma_rel**-2
    return max(float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max()), 0.0)


class EMA:
    """A shadow of ``network``: shadow <- decay shadow + (1 - decay) network, for parameters; buffers are copied.

    It covers the network alone: not the optimizer, not a wrapper around it. The decay after step n (counted from 1) is
    `warmup_decay` of ``decay``, unless ``decay_at(n)`` is given:

        EMA(network, decay_at=lambda step: half_life_decay(step, half_life=500_000, batch_size=128))
        EMA(network, decay_at=lambda step: power_decay(step, sigma_rel=0.1))

    Raises ValueError for a decay outside [0, 1).
    """

    def __init__(
        self, network: nn.Module, decay: float = 0.9999, *, decay_at: Callable[[int], float] | None = None
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema decay must lie in 0 to 1 (1 excluded), got {decay}")
        self.decay = decay
        self.decay_at = decay_at
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._shadow: list[Tensor] = list(self.network.parameters())
        self._shadow_buffers = list(self.network.buffers())

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step ``step`` (counted from 1)."""
        decay = warmup_decay(step, self.decay) if self.decay_at is None else self.decay_at(step)
        torch._foreach_lerp_(self._shadow, [p.detach() for p in network.parameters()], 1.0 - decay)
        for shadow, buffer in zip(self._shadow_buffers, network.buffers(), strict=True):
            shadow.copy_(buffer)


@dataclass(frozen=True)
class PowerSnapshot:
    """A power-function average as it stood after ``step`` updates: its relative width and its weights by name."""

    step: int
    sigma_rel: float
    weights: Mapping[str, Tensor]


def post_hoc_coefficients(steps: Sequence[int], sigma_rels: Sequence[float], step: int, sigma_rel: float) -> np.ndarray:
    """(N,) float64 coefficients of N snapshots whose sum is nearest to the average of width ``sigma_rel`` at ``step``.

    The least-squares fit of profiles p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T], from their inner products
    (arXiv 2312.02696, section 3.2 and appendix C.3). Raises ValueError for no snapshots, or a step after all of them.
    """
    if len(steps) != len(sigma_rels) or not steps:
        raise ValueError(
            f"a post-hoc average needs snapshots, each with a width: got {len(steps)} and {len(sigma_rels)}"
        )
    if not 0 < step <= max(steps):
        raise ValueError(f"the average can be made for a step from 1 to the last snapshot's {max(steps)}, got {step}")
    ends, gammas = np.asarray(steps, dtype=np.float64), np.asarray([power_gamma(s) for s in sigma_rels])
    gram = _inner_product(ends[:, None], gammas[:, None], ends[None], gammas[None])
    wanted = _inner_product(ends, gammas, np.asarray(float(step)), np.asarray(power_gamma(sigma_rel)))
    # each profile scaled to length 1: the fit is the same, its condition better
    length = np.sqrt(np.diag(gram))
    solution = np.linalg.lstsq(gram / np.outer(length, length), wanted / length, rcond=1e-14)[0]
    return solution / length


def reconstruct_ema(snapshots: Sequence[PowerSnapshot], sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The weights that an average of width ``sigma_rel`` would have held after ``step`` (the last snapshot's unless given).

    Sums in float64 and returns the snapshots' own types; tensors of integers are those of the latest snapshot. Snapshots of two
    widths (0.05 and 0.1 in the paper), taken all along the run, reconstruct the widths in between and around.

    Raises ValueError as `post_hoc_coefficients` does, and for snapshots of different networks.
    """
    if not snapshots:
        raise ValueError("a post-hoc average needs snapshots: save the averages while training")
    names = snapshots[0].weights.keys()
    if any(snapshot.weights.keys() != names for snapshot in snapshots):
        raise ValueError("the snapshots hold different weights: they are not of one network")
    latest = max(snapshots, key=lambda snapshot: snapshot.step)
    step = latest.step if step is None else step
    coefficients = post_hoc_coefficients(
        [snapshot.step for snapshot in snapshots], [snapshot.sigma_rel for snapshot in snapshots], step, sigma_rel
    )
    result = {}
    for name, value in latest.weights.items():
        if not value.is_floating_point():
            result[name] = value.clone()
            continue
        total = torch.zeros_like(value, dtype=torch.float64)
        for coefficient, snapshot in zip(coefficients, snapshots, strict=True):
            total += float(coefficient) * snapshot.weights[name].to(torch.float64)
        result[name] = total.to(value.dtype)
    return result


def _inner_product(end_a: np.ndarray, gamma_a: np.ndarray, end_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """The integral of the product of two profiles; they overlap up to the earlier end."""
    end = np.minimum(end_a, end_b)
    ratio = (end / end_a) ** gamma_a * (end / end_b) ** gamma_b * end / (end_a * end_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio
