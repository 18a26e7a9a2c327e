"""Exponential moving averages of a network's weights: the decays and the shadow network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def warmup_decay(step: int, decay: float) -> float:
    """Return the decay after ``step`` updates, min(decay, (1 + step) / (10 + step)), so that early averages forget the start."""
    return min(decay, (1 + step) / (10 + step))


def half_life_decay(step: int, half_life: float, batch_size: int, ramp: float | None = 0.05) -> float:
    """Return the decay 2^(-batch_size / half-life): weights ``half_life`` images ago count half (EDM, arXiv 2206.00364, appendix F.2).

    The average means the same for any batch size. Until step ``half_life / (ramp batch_size)`` the half-life is only the share
    ``ramp`` of the images seen so far, so that early averages forget the start; None turns this off.

    step: counted from 1. Raises ValueError if the half-life, the batch size or the ramp is not above 0.
    """
    if not half_life > 0 or batch_size < 1 or (ramp is not None and not ramp > 0):
        raise ValueError(
            f"an EMA half-life, batch size and ramp must be above 0, got {half_life}, {batch_size} and {ramp}"
        )
    if ramp is not None:
        half_life = min(half_life, step * batch_size * ramp)
    return 0.5 ** (batch_size / max(half_life, 1e-8))


def power_decay(step: int, sigma_rel: float) -> float:
    """Return (1 - 1 / step)^(gamma + 1): the power-function average of width ``sigma_rel`` (arXiv 2312.02696, eq. 127).

    The weights of step s count as s^(gamma + 1) - (s - 1)^(gamma + 1) for any length of the run. step: from 1; the decay of step 1
    is 0, so that the average starts at the first weights. Raises ValueError if step is below 1 or the width is out of range.
    """
    if step < 1:
        raise ValueError(f"steps of an average are counted from 1, got {step}")
    return (1.0 - 1.0 / step) ** (power_gamma(sigma_rel) + 1.0)


def power_gamma(sigma_rel: float) -> float:
    """Return the exponent gamma whose profile t^gamma on [0, 1] has standard deviation ``sigma_rel`` (arXiv 2312.02696, eq. 126).

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2). Raises ValueError if sigma_rel is not in (0, 12^(-1/2)];
    gamma is 0 at 12^(-1/2) = 0.2886.
    """
    if not 0.0 < sigma_rel <= 12**-0.5:
        raise ValueError(
            f"the relative width of a power-function EMA must lie in 0 to 0.2886 (0 excluded), got {sigma_rel}"
        )
    inverse = sigma_rel**-2
    return max(float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max()), 0.0)


class EMA:
    """A shadow of ``network``: shadow <- decay shadow + (1 - decay) network, for parameters; buffers are copied.

    Give it the bare network, without a wrapper. The decay after step n (counted from 1) is `warmup_decay` of ``decay``, or
    ``decay_at(n)`` if given:

        EMA(network, decay_at=lambda step: half_life_decay(step, half_life=500_000, batch_size=128))
        EMA(network, decay_at=lambda step: power_decay(step, sigma_rel=0.1))

    Raises ValueError if the decay is not in [0, 1).
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
        """Update the shadow with the weights after optimizer step ``step`` (counted from 1)."""
        decay = warmup_decay(step, self.decay) if self.decay_at is None else self.decay_at(step)
        torch._foreach_lerp_(self._shadow, [p.detach() for p in network.parameters()], 1.0 - decay)
        for shadow, buffer in zip(self._shadow_buffers, network.buffers(), strict=True):
            shadow.copy_(buffer)
