"""What the network predicts (eps, x0 or v), and every conversion between them.

With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar), a noisy image is x_t = a x_0 + s eps, and the
velocity (Salimans and Ho, arXiv 2202.00512, section 4) is v = a eps - s x_0.

All functions take ``alpha_bar`` as a Python float, or as a tensor that broadcasts against the images.
"""

from __future__ import annotations

from torch import Tensor

from diffusion_core.schedules import NoiseSchedule

OBJECTIVES = ("eps", "x0", "v")


def check_objective(objective: str, schedule: NoiseSchedule) -> None:
    """Refuse an unknown objective, and eps where the last step holds no signal (x_0 could not be recovered)."""
    _check_name(objective)
    if objective == "eps" and schedule.has_zero_terminal_snr:
        raise ValueError(
            "objective 'eps' cannot be used with zero_terminal_snr: at the last step the image is pure noise "
            "and eps says nothing of x0; use objective 'v' or 'x0'"
        )


def _check_name(objective: str) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, the forward marginal (DDPM eq. 4)."""
    signal, noise = _roots(alpha_bar, x0)
    return signal * x0 + noise * eps


def target(objective: str, x0: Tensor, eps: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """What a network with this objective should return for (x_0, eps) at this noise level."""
    _check_name(objective)
    if objective == "eps":
        return eps
    if objective == "x0":
        return x0
    signal, noise = _roots(alpha_bar, x0)
    return signal * eps - noise * x0


def to_x0(objective: str, output: Tensor, x_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """x_0 from the network's output. For eps, alpha_bar must be above 0."""
    _check_name(objective)
    if objective == "x0":
        return output
    signal, noise = _roots(alpha_bar, x_t)
    if objective == "eps":
        return (x_t - noise * output) / signal
    return signal * x_t - noise * output


def to_eps(objective: str, output: Tensor, x_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """eps from the network's output. For x0, alpha_bar must be below 1."""
    _check_name(objective)
    if objective == "eps":
        return output
    if objective == "x0":
        return eps_from_x0(output, x_t, alpha_bar)
    signal, noise = _roots(alpha_bar, x_t)
    return signal * output + noise * x_t


def convert(source: str, destination: str, output: Tensor, x_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """The output of a network with objective ``source`` as one with objective ``destination`` would give it.

    output, x_t: (B, ...). alpha_bar must be above 0 where the source is eps and below 1 where it is x0.
    """
    if source == destination:
        _check_name(source)
        return output
    x0 = to_x0(source, output, x_t, alpha_bar)
    if destination == "x0":
        return x0
    return target(destination, x0, to_eps(source, output, x_t, alpha_bar), alpha_bar)


def eps_from_x0(x0: Tensor, x_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar); alpha_bar must be below 1."""
    signal, noise = _roots(alpha_bar, x_t)
    return (x_t - signal * x0) / noise


def _roots(alpha_bar: Tensor | float, like: Tensor):
    """(sqrt(alpha_bar), sqrt(1 - alpha_bar)): the roots in float64, then the images' type."""
    if isinstance(alpha_bar, Tensor):
        return alpha_bar.sqrt().to(like.dtype), (1.0 - alpha_bar).sqrt().to(like.dtype)
    return alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """(B,) values, shaped to broadcast against (B, ...) images."""
    return values.view(-1, *([1] * (images.ndim - 1)))
