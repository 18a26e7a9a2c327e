"""Closed-form denoisers: targets whose E[x0 | x_t], probability flow and reverse step are known exactly.

"Images" are (B, D) float64 vectors, so that tests measure the method and not rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core import objectives
from diffusion_core.denoiser import Denoiser
from diffusion_core.schedules import NoiseSchedule


def as_network(x0_given: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, objective: str):
    """Return a network with this objective, built from (x_t, alpha_bar (B, 1)) -> E[x0 | x_t]."""

    def network(x_t, t, condition=None, self_condition=None):
        alpha_bar = schedule.gather(t).view(-1, *([1] * (x_t.ndim - 1)))
        x0 = x0_given(x_t, alpha_bar)
        return objectives.target(objective, x0, objectives.eps_from_x0(x0, x_t, alpha_bar), alpha_bar)

    return network


@dataclass(frozen=True)
class Gaussian:
    """x0 ~ N(mean, covariance): mean (D,), covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor

    def x0_given(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """mean + sqrt(a) C (a C + (1 - a) I)^-1 (x_t - sqrt(a) mean), in the eigenbasis of C."""
        values, vectors = torch.linalg.eigh(self.covariance)
        gain = alpha_bar.sqrt() * values / (alpha_bar * values + 1.0 - alpha_bar)
        return self.mean + ((x_t - alpha_bar.sqrt() * self.mean) @ vectors * gain) @ vectors.T

    def denoiser(self, schedule: NoiseSchedule, objective: str = "eps", **options) -> Denoiser:
        return Denoiser(as_network(self.x0_given, schedule, objective), schedule, objective, clip=None, **options)

    def flow(self, x_t: Tensor, alpha_bar: float, alpha_bar_prev: float) -> Tensor:
        """Follow the probability-flow ODE from x_t: each eigen-direction scales with the marginal's standard deviation."""
        values, vectors = torch.linalg.eigh(self.covariance)
        scale = ((alpha_bar_prev * values + 1 - alpha_bar_prev) / (alpha_bar * values + 1 - alpha_bar)).sqrt()
        return alpha_bar_prev**0.5 * self.mean + ((x_t - alpha_bar**0.5 * self.mean) @ vectors * scale) @ vectors.T

    def marginal(self, alpha_bar: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x_t."""
        return alpha_bar**0.5 * self.mean, alpha_bar * self.covariance + (1 - alpha_bar) * torch.eye(
            len(self.mean)
        ).double()


@dataclass(frozen=True)
class Mixture:
    """x0 ~ sum_k w_k N(mean_k, variance I): weights (K,), means (K, D), float64."""

    weights: Tensor
    means: Tensor
    variance: float

    def responsibilities(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """Return the probability of each component given x_t, (B, K)."""
        total = alpha_bar * self.variance + 1.0 - alpha_bar
        distance = (x_t[:, None] - alpha_bar.sqrt()[:, None] * self.means).square().sum(-1)
        return torch.softmax(self.weights.log() - distance / (2.0 * total), dim=1)

    def x0_given(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        gain = alpha_bar.sqrt() * self.variance / (alpha_bar * self.variance + 1.0 - alpha_bar)
        each = self.means + gain[:, None] * (x_t[:, None] - alpha_bar.sqrt()[:, None] * self.means)
        return (self.responsibilities(x_t, alpha_bar)[..., None] * each).sum(1)

    def denoiser(self, schedule: NoiseSchedule, objective: str = "eps", **options) -> Denoiser:
        return Denoiser(as_network(self.x0_given, schedule, objective), schedule, objective, clip=None, **options)


def tilted_gaussian() -> Gaussian:
    """A correlated two-dimensional target, away from the origin."""
    return Gaussian(torch.tensor([0.5, -0.3]).double(), torch.tensor([[0.5, 0.2], [0.2, 0.3]]).double())


def exact_moments(
    sample: Callable[[Tensor, Callable[[int], Tensor]], Tensor], mean: Tensor, covariance: Tensor, steps: list[int]
) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of ``sample(x_T, noise)``, which is affine in x_T ~ N(mean, covariance) and each noise(step).

    One row of the batch gets no randomness, each other row one unit from one source, so that there is no Monte-Carlo error.
    """
    dim = len(mean)
    rows = 1 + dim * (1 + len(steps))
    x_T = mean.expand(rows, dim).clone()
    x_T[1 : 1 + dim] += torch.linalg.cholesky(covariance).T
    position = {step: 1 + dim * (1 + i) for i, step in enumerate(steps)}

    def noise(step: int) -> Tensor:
        z = torch.zeros(rows, dim, dtype=torch.float64)
        z[position[step] : position[step] + dim] = torch.eye(dim, dtype=torch.float64)
        return z

    out = sample(x_T, noise)
    spread = out[1:] - out[0]
    return out[0], spread.T @ spread
