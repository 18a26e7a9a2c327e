"""Objectives of the network (eps, x0, v) and every conversion between them.

With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar), a noisy image is x_t = a x_0 + s eps, and the
velocity (Salimans and Ho, arXiv 2202.00512, section 4) is v = a eps - s x_0.

All functions take ``alpha_bar`` as a Python float, or as a tensor that broadcasts against the images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffusion_core.schedules import NoiseSchedule

OBJECTIVES = ("eps", "x0", "v")

Network = Callable[..., Tensor]
"""``network(x_t, t, condition, self_condition=None)``, the one call form. x_t: (B, C, ...) float; t: (B,) int64; condition:
as its `ConditionSpec` describes it, or None; self_condition: an estimate of x0 shaped as x_t, or None. Returns (B, C, ...), or
(B, 2C, ...) if it learned its variance."""


def check_objective(objective: str, schedule: NoiseSchedule) -> None:
    """Raise ValueError if the objective is unknown, or is eps and the schedule's last step is pure noise."""
    _check_name(objective)
    if objective == "eps" and schedule.has_zero_terminal_snr:
        raise ValueError(
            "objective 'eps' cannot be used with zero_terminal_snr: the image of the last step is pure noise "
            "and x0 cannot be computed from eps; use objective 'v' or 'x0'"
        )


def _check_name(objective: str) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Return x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, a draw of the forward marginal (DDPM eq. 4)."""
    signal, noise = _roots(alpha_bar, x0)
    return signal * x0 + noise * eps


def target(objective: str, x0: Tensor, eps: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Return the training target of a network with this objective at this noise level."""
    _check_name(objective)
    if objective == "eps":
        return eps
    if objective == "x0":
        return x0
    signal, noise = _roots(alpha_bar, x0)
    return signal * eps - noise * x0


def to_x0(objective: str, output: Tensor, x_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Return x_0, computed from the network's output. For eps, alpha_bar must be above 0."""
    _check_name(objective)
    if objective == "x0":
        return output
    signal, noise = _roots(alpha_bar, x_t)
    if objective == "eps":
        return (x_t - noise * output) / signal
    return signal * x_t - noise * output


def to_eps(objective: str, output: Tensor, x_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Return eps, computed from the network's output. For x0, alpha_bar must be below 1."""
    _check_name(objective)
    if objective == "eps":
        return output
    if objective == "x0":
        return eps_from_x0(output, x_t, alpha_bar)
    signal, noise = _roots(alpha_bar, x_t)
    return signal * output + noise * x_t


def convert(source: str, destination: str, output: Tensor, x_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Convert the output of a network with objective ``source`` to objective ``destination``.

    output, x_t: (B, ...). alpha_bar must be above 0 if the source is eps, and below 1 if it is x0.
    """
    if source == destination:
        _check_name(source)
        return output
    x0 = to_x0(source, output, x_t, alpha_bar)
    if destination == "x0":
        return x0
    return target(destination, x0, to_eps(source, output, x_t, alpha_bar), alpha_bar)


def eps_from_x0(x0: Tensor, x_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """Return eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar); alpha_bar must be below 1."""
    signal, noise = _roots(alpha_bar, x_t)
    return (x_t - signal * x0) / noise


def _roots(alpha_bar: Tensor | float, like: Tensor):
    """Return (sqrt(alpha_bar), sqrt(1 - alpha_bar)), computed in float64 and cast to the images' dtype."""
    if isinstance(alpha_bar, Tensor):
        return alpha_bar.sqrt().to(like.dtype), (1.0 - alpha_bar).sqrt().to(like.dtype)
    return alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Reshape (B,) values so that they broadcast against (B, ...) images. Raises ValueError unless there is one per image."""
    if values.shape != images.shape[:1]:
        raise ValueError(
            f"one value per image is needed, got {tuple(values.shape)} for images of {tuple(images.shape)}"
        )
    return values.view(-1, *([1] * (images.ndim - 1)))


def check_is_tensor(output: Any) -> None:
    """Raise ValueError, with the remedy, unless a network's output is a tensor."""
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the network returned {type(output).__name__}, not a tensor: wrap it in a function that returns the "
            "predicted tensor, such as output.sample"
        )


def split_output(output: Any, x_t: Tensor, learned_variance: bool) -> tuple[Tensor, Tensor | None]:
    """Split a network's output into (the part that the objective describes, the variance part or None).

    output: (B, C, ...), or (B, 2C, ...) with ``learned_variance`` (arXiv 2102.09672, section 3.1); x_t: (B, C, ...). Raises
    ValueError if the output is not a tensor of that shape.
    """
    check_is_tensor(output)
    channels = x_t.shape[1] * (2 if learned_variance else 1)
    if output.shape != (x_t.shape[0], channels, *x_t.shape[2:]):
        raise ValueError(
            f"the network returned {tuple(output.shape)} for images of {tuple(x_t.shape)}: it must return "
            f"{channels} channels with learned_variance={learned_variance}"
        )
    if not learned_variance:
        return output, None
    mean, variance = output.chunk(2, dim=1)
    return mean, variance
