"""Network + schedule + objective -> Prediction(x0, eps): the one place that reads a network's output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_core import objectives
from diffusion_core.schedules import NoiseSchedule

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Prediction:
    """The estimates of the clean image and of the noise in x_t: (B, ...) float32 each. Unpacks as ``x0, eps``.

    ``variance_fraction``: of a network that learned its variance, (B, ...): where the log-variance of a reverse step lies
    between the posterior's (0) and beta's (1); `posterior.learned_log_variance` turns it into one for any two levels.
    """

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        yield self.x0
        yield self.eps


@dataclass(frozen=True)
class Denoiser:
    """Turns ``network(x_t, t, condition, self_condition=None)`` into a `Prediction`.

    A plain function ``(x_t, t)``, or ``(x_t, t, condition)``, can stand in for the network. ``clip``: None, or a bound that
    x0 is clamped to (images lie in [-1, 1], so 1.0). After clipping, eps is derived again from the clipped x0 so that the two
    agree, unless ``rederive_eps`` is off. ``dynamic_percentile``: the share p of dynamic thresholding in place of the clamp
    (see `threshold_dynamically`); it needs ``clip``, the range that it keeps. ``self_conditioning``: the network takes its
    last estimate of x0, which samplers then carry from step to step (arXiv 2208.04202). ``learned_variance``: the network
    returns 2C channels, the second half for the variance (arXiv 2102.09672).

    Raises ValueError for an objective that the schedule cannot carry, options out of range, or a network that cannot be
    called as above.
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
                raise ValueError(f"dynamic_percentile is a share in 0 to 1 (0.995, say), got {self.dynamic_percentile}")
            if self.clip is None:
                raise ValueError("dynamic_percentile needs a range to keep x0 in: set clip (1.0 for images), not None")
        form = _call_form(self.network)
        if self.self_conditioning and form < 4:
            raise ValueError("self_conditioning needs a network that takes self_condition=, and this one does not")
        object.__setattr__(self, "_form", form)

    @classmethod
    def from_eps(
        cls, function: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, *, clip: float | None = None
    ) -> Denoiser:
        """A denoiser of a plain function ``(x_t, t) -> eps``, t being (B,) int64; not clipped unless told."""
        return cls(function, schedule, "eps", clip)

    def __call__(
        self,
        x_t: Tensor,
        t: int,
        condition: Any = None,
        self_condition: Tensor | None = None,
        *,
        level: int | None = None,
    ) -> Prediction:
        """x_t: (B, ...) float32; t: one step in [0, T) for the whole batch; condition: as the network takes it.

        ``level``: the step in [-1, T) whose noise x_t really has, where that is not t. DDIM inversion asks the network
        about step t while the image is still a level below; at level -1 it is clean, and x0 is x_t itself.
        Raises ValueError where the network's output does not have the shape that it must have.
        """
        steps = torch.full((x_t.shape[0],), t, dtype=torch.int64, device=x_t.device)
        output = _call(self.network, self._form, x_t, steps, condition, self_condition)  # type: ignore[attr-defined]
        output, fraction = self._split(output.to(x_t.dtype), x_t)
        if level == -1:
            alpha_bar = self.schedule.alpha_bar(t if self.objective == "x0" else -1)
            return Prediction(x_t, objectives.to_eps(self.objective, output, x_t, alpha_bar), fraction)
        alpha_bar = self.schedule.alpha_bar(t if level is None else level)
        if level not in (None, t) and self.objective == "x0":
            # the network's error shrinks with the noise it was told of: divided by less noise, it would grow instead
            eps = objectives.to_eps("x0", output, x_t, self.schedule.alpha_bar(t))
            output = objectives.to_x0("eps", eps, x_t, alpha_bar)
        x0 = objectives.to_x0(self.objective, output, x_t, alpha_bar)
        if self.clip is not None:
            if self.dynamic_percentile is not None:
                x0 = threshold_dynamically(x0, self.dynamic_percentile, self.clip)
            else:
                x0 = x0.clamp(-self.clip, self.clip)
            if self.rederive_eps:
                return Prediction(x0, objectives.eps_from_x0(x0, x_t, alpha_bar), fraction)
        return Prediction(x0, objectives.to_eps(self.objective, output, x_t, alpha_bar), fraction)

    def _split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """(what the objective reads, the variance fraction or None)."""
        channels = x_t.shape[1] * (2 if self.learned_variance else 1)
        if output.shape != (x_t.shape[0], channels, *x_t.shape[2:]):
            raise ValueError(
                f"the network returned {tuple(output.shape)} for images of {tuple(x_t.shape)}: it must return "
                f"{channels} channels with learned_variance={self.learned_variance}"
            )
        if not self.learned_variance:
            return output, None
        mean, variance = output.chunk(2, dim=1)
        return mean, (variance + 1.0) / 2.0


def threshold_dynamically(x0: Tensor, percentile: float, bound: float = 1.0) -> Tensor:
    """Clamp to s, then scale by bound / s, s being the percentile of |x0| of each image, at least ``bound``.

    Imagen's dynamic thresholding (arXiv 2205.11487, section 2.3). x0: (B, ...) float32 or float64, at most 2^24 elements.
    """
    limit = torch.quantile(x0.flatten(1).abs(), percentile, dim=1).clamp(min=bound)
    limit = objectives.per_image(limit, x0)
    return x0.clamp(-limit, limit) * (bound / limit)


def call_network(
    network: Network, x_t: Tensor, t: Tensor, condition: Any = None, self_condition: Tensor | None = None
) -> Tensor:
    """``network(x_t, t, condition, self_condition=...)``, or as much of it as a plain function takes.

    Raises ValueError for a condition or an estimate given to a function that would not see it.
    """
    return _call(network, _call_form(network), x_t, t, condition, self_condition)


def _call(network: Network, form: int, x_t: Tensor, t: Tensor, condition: Any, self_condition: Tensor | None) -> Tensor:
    if form == 4:
        return network(x_t, t, condition, self_condition=self_condition)
    for given, taken, name in ((condition, form > 2, "condition"), (self_condition, False, "self_condition")):
        if given is not None and not taken:
            raise ValueError(
                f"a {name} was given, but this network does not take one: "
                "write it as network(x_t, t, condition, self_condition=None)"
            )
    return network(x_t, t, condition) if form == 3 else network(x_t, t)


def _call_form(network: Network) -> int:
    """How many of (x_t, t, condition, self_condition=) the network takes: 4, or of a plain function 3 or 2."""
    try:
        signature = inspect.signature(network.forward if isinstance(network, nn.Module) else network)
    except (TypeError, ValueError):
        return 4
    for form, keywords in ((4, {"self_condition": None}), (3, {}), (2, {})):
        try:
            signature.bind(*(None,) * min(form, 3), **keywords)
        except TypeError:
            continue
        return form
    raise ValueError(
        f"a network is called as network(x_t, t, condition, self_condition=None), or as network(x_t, t); this one takes {signature}"
    )
