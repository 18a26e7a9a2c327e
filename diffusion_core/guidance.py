"""Guidance, which pushes a network's output away from that of a weaker one. A guided network is itself a network.

At a given x_t, eps, x0 and v are affine in each other, so guiding any of them gives the same result (rescaling does not).
If the network learned its variance, only the first half of the channels is guided; the variance is the conditional one's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_core.checks import check_condition, is_whole
from diffusion_core.objectives import Network, check_is_tensor, per_image
from diffusion_core.schedules import NoiseSchedule

Interval = tuple[int, int]
"""The steps (lowest, highest), both included, at which guidance acts; outside, the output is the conditional one."""


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Classifier-free guidance: unconditional + scale (conditional - unconditional), in one batched call (arXiv 2207.12598, eq. 6).

    Scale 1 runs the conditional network alone, scale 0 the unconditional one alone, above 1 extrapolates; the paper's weight
    is w = scale - 1. ``null_condition``: a batch of one null condition, as the network takes it, or one per image.
    ``rescale``: 0 to 1, how far the output's spread is moved back to the conditional one's (arXiv 2305.08891, eq. 15-16).
    ``interval``: guide only at these steps (arXiv 2404.07724); see `steps_between_sigmas`.

    Raises ValueError if the scale is not finite, rescale is outside [0, 1], the interval is empty, or a call does not get one
    condition per image or an output of the images' shape from its network.
    """

    network: Network
    null_condition: Tensor
    scale: float
    rescale: float = 0.0
    interval: Interval | None = None

    def __post_init__(self) -> None:
        _check_options(self.scale, self.rescale, self.interval)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any, self_condition: Tensor | None = None) -> Tensor:
        if condition is None:
            raise ValueError(
                "guidance needs a condition to guide towards: pass condition=, or use the unguided network"
            )
        if not isinstance(condition, Tensor) or condition.shape[:1] != x_t.shape[:1]:
            got = tuple(condition.shape) if isinstance(condition, Tensor) else type(condition).__name__
            raise ValueError(f"guidance needs a tensor with one condition for each of {x_t.shape[0]} images, got {got}")
        null = null_batch(self.null_condition, x_t)
        scale = _scale_at(t, self.scale, self.interval)
        if scale == 1.0:
            return self.network(x_t, t, condition, self_condition)
        if scale == 0.0:
            return self.network(x_t, t, null, self_condition)
        both = self.network(
            torch.cat([x_t, x_t]),
            torch.cat([t, t]),
            torch.cat([condition, null.to(condition.dtype)]),
            None if self_condition is None else torch.cat([self_condition, self_condition]),
        )
        _check_output(both, torch.Size([2 * x_t.shape[0], *x_t.shape[1:]]))
        conditional, unconditional = both.chunk(2)
        return extrapolate(conditional, unconditional, scale, self.rescale, x_t.shape[1])


@dataclass(frozen=True)
class Autoguidance:
    """Guidance by a weaker network with the same condition: weak + scale (strong - weak) (arXiv 2406.02507, eq. 4).

    ``weak_network``: smaller or less trained, with the same objective and schedule. Scale 1 runs the strong network alone,
    scale 0 the weak one. ``rescale``, ``interval`` and the errors of construction: as in `ClassifierFreeGuidance`. A call raises
    ValueError if the condition does not have one entry per image, or an output does not have the images' shape.
    """

    network: Network
    weak_network: Network
    scale: float
    rescale: float = 0.0
    interval: Interval | None = None

    def __post_init__(self) -> None:
        _check_options(self.scale, self.rescale, self.interval)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any = None, self_condition: Tensor | None = None) -> Tensor:
        check_condition(condition, x_t.shape[0])
        scale = _scale_at(t, self.scale, self.interval)
        if scale == 0.0:
            return self.weak_network(x_t, t, condition, self_condition)
        strong = self.network(x_t, t, condition, self_condition)
        if scale == 1.0:
            return strong
        weak = self.weak_network(x_t, t, condition, self_condition)
        for output in (strong, weak):
            _check_output(output, x_t.shape)
        return extrapolate(strong, weak, scale, self.rescale, x_t.shape[1])


def null_batch(null_condition: Tensor, x_t: Tensor) -> Tensor:
    """Return one null condition per image, on the images' device. Raises ValueError unless there is one null, or one per image."""
    if null_condition.ndim < 1 or null_condition.shape[0] not in (1, x_t.shape[0]):
        raise ValueError(
            f"null_condition holds {null_condition.shape[0] if null_condition.ndim else 'no'} nulls for {x_t.shape[0]} images: "
            "give a batch of one, or one per image"
        )
    return null_condition.to(x_t.device).expand(x_t.shape[0], *null_condition.shape[1:])


def extrapolate(strong: Tensor, weak: Tensor, scale: float, rescale: float, channels: int) -> Tensor:
    """Return g = weak + scale (strong - weak) over the first ``channels`` channels; the others are the strong network's.

    With ``rescale`` phi, the result is phi g s(strong) / s(g) + (1 - phi) g, where s is the standard deviation of each image's
    output (arXiv 2305.08891, eq. 15-16).
    """
    rest, strong, weak = strong[:, channels:], strong[:, :channels], weak[:, :channels]
    guided = weak + scale * (strong - weak)
    if rescale > 0.0:
        spread = strong.flatten(1).std(dim=1, correction=0) / guided.flatten(1).std(dim=1, correction=0)
        spread = torch.where(torch.isfinite(spread), spread, torch.ones_like(spread))  # a constant output has no spread
        guided = guided * per_image(rescale * spread + (1.0 - rescale), guided)
    return torch.cat([guided, rest], dim=1) if rest.shape[1] else guided


def steps_between_sigmas(schedule: NoiseSchedule, sigma_low: float, sigma_high: float) -> Interval:
    """Return the steps whose noise level sigma = sqrt((1 - a) / a) lies in (sigma_low, sigma_high] (arXiv 2404.07724, eq. 6).

    Raises ValueError if there is none.
    """
    sigma = schedule.sigma(torch.arange(schedule.num_steps))
    steps = torch.nonzero((sigma > sigma_low) & (sigma <= sigma_high)).flatten()
    if not len(steps):
        raise ValueError(
            f"no step has a noise level in ({sigma_low:g}, {sigma_high:g}]: this schedule spans {sigma[0]:g} to {sigma[-1]:g}"
        )
    return int(steps[0]), int(steps[-1])


def _scale_at(t: Tensor, scale: float, interval: Interval | None) -> float:
    """Return the scale at these steps, 1 outside the interval. Raises ValueError if only some of them lie inside."""
    if interval is None:
        return float(scale)
    inside = (t >= interval[0]) & (t <= interval[1])
    if bool(inside.all()):
        return float(scale)
    if not bool(inside.any()):
        return 1.0
    raise ValueError("a guidance interval needs every image of a batch at the same step")


def _check_output(output: Any, shape: torch.Size) -> None:
    """Raise ValueError unless the output is a tensor of this shape; it may have more channels, for the variance."""
    check_is_tensor(output)
    fits = output.ndim == len(shape) and output.shape[:1] + output.shape[2:] == shape[:1] + shape[2:]
    if not fits or output.shape[1] < shape[1]:
        raise ValueError(
            f"the guided network returned {tuple(output.shape)} for images of {tuple(shape)}: it must return one output per "
            "image, of its size and with at least its channels"
        )


def _check_options(scale: float, rescale: float, interval: Interval | None) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"a guidance scale must be a finite number, got {scale}")
    if interval is not None and not all(is_whole(step) for step in interval):
        raise ValueError(
            f"a guidance interval holds steps, got {interval}: convert noise levels with steps_between_sigmas"
        )
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"guidance rescale must lie in 0 to 1, got {rescale}")
    if interval is not None and interval[0] > interval[1]:
        raise ValueError(f"a guidance interval must go from its lowest to its highest step, got {interval}")
