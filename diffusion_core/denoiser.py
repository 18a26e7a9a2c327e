"""The denoiser, which turns a network's output into estimates of x0 and eps. Samplers read a network only through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_core import objectives
from diffusion_core.checks import check_condition
from diffusion_core.objectives import Network
from diffusion_core.schedules import NoiseSchedule


@dataclass(frozen=True)
class Prediction:
    """The estimates of the clean image and of the noise in x_t: (B, ...) float32 each. Unpacks as ``x0, eps``.

    ``variance_fraction``: (B, ...) if the network learned its variance, else None. It places the log-variance of a reverse
    step between the posterior's (0) and beta's (1); `posterior.learned_log_variance` computes it for any two levels.
    """

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        yield self.x0
        yield self.eps


@dataclass(frozen=True)
class Denoiser:
    """Turns the output of ``network(x_t, t, condition, self_condition=None)`` into a `Prediction`.

    Wrap a plain function ``(x_t, t)`` with `from_eps`, `from_x0` or `from_v`. ``clip``: None, or the bound that x0 is
    clamped to (1.0 for images in [-1, 1]). After clipping, eps is computed again from the clipped x0 so that the two agree,
    unless ``rederive_eps`` is off. ``dynamic_percentile``: the share p of dynamic thresholding, which replaces the clamp (see
    `threshold_dynamically`); it needs ``clip`` as its range. ``self_conditioning``: the network takes its last estimate of
    x0, which samplers then carry from step to step (arXiv 2208.04202). ``learned_variance``: the network returns 2C channels,
    the second half for the variance (arXiv 2102.09672).

    Raises ValueError if the objective does not fit the schedule or an option is out of range.
    """

    network: Network
    schedule: NoiseSchedule
    objective: str
    clip: float | None = 1.0
    rederive_eps: bool = True
    dynamic_percentile: float | None = None
    self_conditioning: bool = False
    learned_variance: bool = False

    def __post_init__(self) -> None:
        objectives.check_objective(self.objective, self.schedule)
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0, or None for no clipping, got {self.clip}")
        if self.dynamic_percentile is not None:
            if not 0.0 < self.dynamic_percentile <= 1.0:
                raise ValueError(
                    f"dynamic_percentile must be a share between 0 and 1, such as 0.995, got {self.dynamic_percentile}"
                )
            if self.clip is None:
                raise ValueError("dynamic_percentile needs a range for x0: set clip, 1.0 for images")

    @classmethod
    def from_eps(cls, function: PlainFunction, schedule: NoiseSchedule, *, clip: float | None = None) -> Denoiser:
        """Return a denoiser for a plain function ``(x_t, t) -> eps``; t is (B,) int64. It takes no condition."""
        return cls(_WithoutCondition(function), schedule, "eps", clip)

    @classmethod
    def from_x0(cls, function: PlainFunction, schedule: NoiseSchedule, *, clip: float | None = None) -> Denoiser:
        """Return a denoiser for a plain function ``(x_t, t) -> x0``; t is (B,) int64. It takes no condition."""
        return cls(_WithoutCondition(function), schedule, "x0", clip)

    @classmethod
    def from_v(cls, function: PlainFunction, schedule: NoiseSchedule, *, clip: float | None = None) -> Denoiser:
        """Return a denoiser for a plain function ``(x_t, t) -> v``; t is (B,) int64. It takes no condition."""
        return cls(_WithoutCondition(function), schedule, "v", clip)

    def __call__(
        self,
        x_t: Tensor,
        t: int,
        condition: Any = None,
        self_condition: Tensor | None = None,
        *,
        level: int | None = None,
    ) -> Prediction:
        """Predict x0 and eps. x_t: (B, ...) float32; t: one step in [0, T) for the whole batch; condition: as the network takes it.

        ``level``: the step in [-1, T) whose noise x_t really has, if that is not t. DDIM inversion calls the network at
        step t while the image is still one level below; at level -1 it is clean, and x0 is x_t itself.
        Where the network returns NaN or infinity, the estimates are NaN, also with ``clip``.
        Raises ValueError if the condition does not have one entry per image, self_condition does not have the shape of x_t, or
        the network's output is not a tensor of the right shape.
        """
        check_condition(condition, x_t.shape[0])
        if isinstance(self_condition, Tensor) and self_condition.shape != x_t.shape:
            raise ValueError(
                f"self_condition is an estimate of x0 for each image, {tuple(x_t.shape)}, got {tuple(self_condition.shape)}"
            )
        steps = torch.full((x_t.shape[0],), t, dtype=torch.int64, device=x_t.device)
        raw = self.network(x_t, steps, condition, self_condition)
        output, variance = objectives.split_output(raw, x_t, self.learned_variance)
        output = output.to(x_t.dtype)
        if self.clip is None or not self.rederive_eps:
            output = (
                output.clone()
            )  # the estimates may be the output itself, and CUDA graphs write every output to one place
        fraction = None if variance is None else (variance.to(x_t.dtype) + 1.0) / 2.0
        if level == -1:
            alpha_bar = self.schedule.alpha_bar(t if self.objective == "x0" else -1)
            return Prediction(x_t, objectives.to_eps(self.objective, output, x_t, alpha_bar), fraction)
        alpha_bar = self.schedule.alpha_bar(t if level is None else level)
        if level not in (None, t) and self.objective == "x0":
            # the network's error shrinks with the noise level it is given; dividing by less noise would amplify it
            eps = objectives.to_eps("x0", output, x_t, self.schedule.alpha_bar(t))
            output = objectives.to_x0("eps", eps, x_t, alpha_bar)
        x0 = objectives.to_x0(self.objective, output, x_t, alpha_bar)
        if self.clip is not None:
            finite = x0.isfinite()
            if self.dynamic_percentile is not None:
                x0 = threshold_dynamically(x0, self.dynamic_percentile, self.clip)
            else:
                x0 = x0.clamp(-self.clip, self.clip)
            x0 = torch.where(finite, x0, math.nan)  # else infinity would become a colour
            if self.rederive_eps:
                return Prediction(x0, objectives.eps_from_x0(x0, x_t, alpha_bar), fraction)
        return Prediction(x0, objectives.to_eps(self.objective, output, x_t, alpha_bar), fraction)


PlainFunction = Callable[[Tensor, Tensor], Tensor]
"""A function ``(x_t, t) -> tensor`` without a condition."""


@dataclass(frozen=True)
class _WithoutCondition:
    """A plain function in the call form of a network. Raises ValueError if it is given what the function cannot take."""

    function: PlainFunction

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any = None, self_condition: Tensor | None = None) -> Tensor:
        for name, value in (("condition", condition), ("self_condition", self_condition)):
            if value is not None:
                raise ValueError(
                    f"a {name} was given, but this denoiser wraps a plain function of (x_t, t): write the function as "
                    "network(x_t, t, condition, self_condition=None) and build Denoiser(network, schedule, objective)"
                )
        return self.function(x_t, t)


def threshold_dynamically(x0: Tensor, percentile: float, bound: float = 1.0) -> Tensor:
    """Clamp to s, then scale by bound / s; s is the percentile of |x0| of each image, and at least ``bound``.

    Imagen's dynamic thresholding (arXiv 2205.11487, section 2.3). x0: (B, ...) float32 or float64, at most 2^24 elements.
    """
    limit = torch.quantile(x0.flatten(1).abs(), percentile, dim=1).clamp(min=bound)
    limit = objectives.per_image(limit, x0)
    return x0.clamp(-limit, limit) * (bound / limit)
