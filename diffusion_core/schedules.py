"""Noise schedules: alpha-bar in float64, and the quantities derived from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion_core.checks import is_whole

SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid")


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving noise schedule.

    ``alphas_cumprod``: (T,) float64, strictly decreasing, in [0, 1); entry t is
    alpha_bar_t = prod_{s<=t} (1 - beta_s) (DDPM, arXiv 2006.11239, section 2), so that
    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I). Only the last entry may be 0
    (zero terminal SNR, arXiv 2305.08891). ``config`` holds the arguments with which
    `make_schedule` builds the schedule again; the default holds the array itself.

    Raises ValueError if the array is not such a schedule.
    """

    alphas_cumprod: Tensor
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.alphas_cumprod, Tensor):
            object.__setattr__(self, "alphas_cumprod", torch.as_tensor(self.alphas_cumprod, dtype=torch.float64))
        table = self.alphas_cumprod
        if table.ndim != 1 or table.numel() < 1 or table.dtype != torch.float64:
            raise ValueError(f"alphas_cumprod must be a float64 vector, not {tuple(table.shape)} {table.dtype}")
        if not bool(torch.isfinite(table).all()) or bool((table < 0).any()) or bool((table >= 1).any()):
            raise ValueError("alphas_cumprod must lie in [0, 1): check the schedule's start and end")
        if bool((table.diff() >= 0).any()):
            raise ValueError("alphas_cumprod must fall at every step, because noise only grows")
        if not self.config:
            given = {"name": "given", "num_steps": table.numel(), "alphas_cumprod": table.detach().cpu().tolist()}
            object.__setattr__(self, "config", given)
        padded = torch.cat([torch.ones(1, dtype=torch.float64), table.detach().cpu()])
        object.__setattr__(self, "_tables", {torch.device("cpu"): padded})
        object.__setattr__(self, "_values", padded.tolist())

    @property
    def num_steps(self) -> int:
        """T, the number of diffusion steps."""
        return self.alphas_cumprod.numel()

    @property
    def has_zero_terminal_snr(self) -> bool:
        """True if the last step is pure noise."""
        return self.alpha_bar(self.num_steps - 1) == 0.0

    def alpha_bar(self, t: int) -> float:
        """Return alpha_bar_t as a Python float; t in [-1, T), and alpha_bar_{-1} is exactly 1."""
        if not is_whole(t) or not -1 <= t < self.num_steps:
            raise ValueError(f"step {t} is outside the schedule: allowed are -1 to {self.num_steps - 1}")
        return self._values[t + 1]  # type: ignore[attr-defined]

    def gather(self, t: Tensor) -> Tensor:
        """Return alpha_bar at each step of ``t`` (any shape, int64, in [-1, T)), as float64 on t's device.

        Raises ValueError if the steps are not whole numbers or (on a CPU only) lie outside the schedule.
        """
        t = torch.as_tensor(t)
        if t.is_floating_point() or t.dtype == torch.bool:
            raise ValueError(f"steps must be whole numbers, got {t.dtype}")
        if t.device.type == "cpu" and t.numel() and (int(t.min()) < -1 or int(t.max()) >= self.num_steps):
            raise ValueError(f"steps must lie in -1 to {self.num_steps - 1}, got {int(t.min())} to {int(t.max())}")
        tables = self._tables  # type: ignore[attr-defined]
        if t.device not in tables:
            tables[t.device] = tables[torch.device("cpu")].to(t.device)
        return tables[t.device][t.long() + 1]

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), float64; 0 at a zero terminal SNR."""
        alpha_bar = self.gather(t)
        return alpha_bar / (1.0 - alpha_bar)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log SNR(t), float64; minus infinity at a zero terminal SNR."""
        alpha_bar = self.gather(t)
        return torch.log(alpha_bar) - torch.log1p(-alpha_bar)

    def sigma(self, t: Tensor) -> Tensor:
        """Return sqrt((1 - alpha_bar_t) / alpha_bar_t), float64: the noise level of x_t / sqrt(alpha_bar_t) (arXiv 2206.00364)."""
        return self.snr(t).rsqrt()

    def betas(self) -> Tensor:
        """Return beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, (T,) float64."""
        padded = self._tables[torch.device("cpu")]  # type: ignore[attr-defined]
        return 1.0 - padded[1:] / padded[:-1]


def make_schedule(name: str, num_steps: int = 1000, **options: Any) -> NoiseSchedule:
    """Return the schedule ``name`` over ``num_steps`` steps.

    ``linear``         beta from 1e-4 to 0.02 (DDPM), scaled by 1000 / T for other T; ``start`` and ``end`` are not scaled
    ``scaled_linear``  sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012) (Stable Diffusion), made for T = 1000, not scaled
    ``cosine``         alpha_bar = cos^2 of a quarter turn, s = 0.008, beta <= 0.999 (arXiv 2102.09672, eq. 17)
    ``sigmoid``        a rescaled sigmoid from ``start`` -3 to ``end`` 3 with ``tau`` (arXiv 2212.11972)
    ``given``          the list ``alphas_cumprod`` of ``num_steps`` numbers, from `given_schedule`

    ``zero_terminal_snr=True`` rescales so that the last step is pure noise (arXiv 2305.08891,
    algorithm 1). Raises ValueError if the name or an option is unknown, or a value is out of range.
    """
    if not is_whole(num_steps) or num_steps < 1:
        raise ValueError(f"num_steps must be a whole number of at least 1, got {num_steps!r}")
    builders: dict[str, Callable[..., Tensor]] = {
        "linear": _linear,
        "scaled_linear": _scaled_linear,
        "cosine": _cosine,
        "sigmoid": _sigmoid,
        "given": _given,
    }
    if name not in builders:
        raise ValueError(f"unknown noise schedule {name!r}: choose one of {', '.join(builders)}")
    config = {"name": name, "num_steps": num_steps, **options}
    zero_terminal_snr = options.pop("zero_terminal_snr", False)
    try:
        alphas_cumprod = builders[name](num_steps, **options)
    except TypeError as error:
        raise ValueError(f"schedule {name!r} does not take {sorted(options)}: {error}") from None
    schedule = NoiseSchedule(alphas_cumprod, config)
    return rescale_to_zero_terminal_snr(schedule) if zero_terminal_snr else schedule


def given_schedule(alphas_cumprod: Tensor | Sequence[float]) -> NoiseSchedule:
    """Return the schedule of any (T,) array of alpha_bar; its ``config`` holds the numbers, so that it can be saved.

    Float32 values are converted exactly. Raises ValueError as `NoiseSchedule` does.
    """
    array = torch.as_tensor(alphas_cumprod, dtype=torch.float64).detach().cpu()
    if array.ndim != 1:
        raise ValueError(f"alphas_cumprod must be a vector, got shape {tuple(array.shape)}")
    values = array.tolist()
    return make_schedule("given", num_steps=len(values), alphas_cumprod=values)


def rescale_to_zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Shift and scale sqrt(alpha_bar) so that the first step keeps its value and the last is 0 (arXiv 2305.08891, algorithm 1)."""
    if schedule.num_steps < 2:
        raise ValueError("a zero terminal SNR needs a schedule of at least two steps")
    root = schedule.alphas_cumprod.sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return NoiseSchedule(root.square(), {**schedule.config, "zero_terminal_snr": True})


def _from_betas(betas: Tensor) -> Tensor:
    if bool((betas <= 0).any()) or bool((betas >= 1).any()):
        raise ValueError("every beta must lie strictly between 0 and 1: use more steps or a smaller end")
    return torch.cumprod(1.0 - betas, dim=0)


def _given(num_steps: int, *, alphas_cumprod: Sequence[float]) -> Tensor:
    if len(alphas_cumprod) != num_steps:
        raise ValueError(
            f"a given schedule of {num_steps} steps needs {num_steps} alphas_cumprod, got {len(alphas_cumprod)}"
        )
    return torch.tensor(alphas_cumprod, dtype=torch.float64)


def _linear(num_steps: int, *, start: float | None = None, end: float | None = None) -> Tensor:
    scale = 1000.0 / num_steps
    first = 1e-4 * scale if start is None else start
    last = 0.02 * scale if end is None else end
    betas = torch.linspace(first, last, num_steps, dtype=torch.float64)
    return _from_betas(betas.clamp(max=0.999) if end is None else betas)


def _scaled_linear(num_steps: int, *, start: float = 0.00085, end: float = 0.012) -> Tensor:
    roots = torch.linspace(math.sqrt(start), math.sqrt(end), num_steps, dtype=torch.float64)
    return _from_betas(roots.square())


def _cosine(num_steps: int, *, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    turn = (torch.arange(num_steps + 1, dtype=torch.float64) / num_steps + s) / (1.0 + s) * (math.pi / 2)
    alpha_bar = torch.cos(turn).square()
    return _from_betas((1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))


def _sigmoid(
    num_steps: int, *, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
) -> Tensor:
    if tau <= 0 or end <= start:
        raise ValueError(f"a sigmoid schedule needs tau > 0 and start < end, got tau={tau}, start={start}, end={end}")
    ramp = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    curve = torch.sigmoid((ramp * (end - start) + start) / tau)
    low, high = torch.sigmoid(torch.tensor([start / tau, end / tau], dtype=torch.float64))
    alpha_bar = (high - curve) / (high - low)
    return _from_betas((1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(min=1e-9, max=max_beta))
