"""The terms of the variational bound of one reverse step, in bits per dimension (DDPM, arXiv 2006.11239, eq. 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion_core.objectives import per_image
from diffusion_core.posterior import learned_log_variance, log_variance_range, posterior
from diffusion_core.schedules import NoiseSchedule


def bound_term(schedule: NoiseSchedule, x0: Tensor, x0_hat: Tensor, fraction: Tensor, t: Tensor) -> Tensor:
    """Return each image's bound term at its step t, (B,) float64 bits/dim, over the full chain.

    x0, x0_hat: (B, ...) clean images and their estimates; fraction: (B, ...) as `Prediction.variance_fraction`; t: (B,) int64.
    Raises ValueError if a shape differs or (if t is on a CPU) a step lies outside the schedule.
    """
    if x0_hat.shape != x0.shape or fraction.shape != x0.shape:
        raise ValueError(
            f"x0_hat and fraction need the shape of x0, {tuple(x0.shape)}, got {tuple(x0_hat.shape)} and {tuple(fraction.shape)}"
        )
    alpha_bar = per_image(schedule.gather(t), x0)
    alpha_bar_prev = per_image(schedule.gather(t - 1), x0)
    floor = 1.0 - schedule.alpha_bar(0)
    if schedule.num_steps > 1:
        floor = float(posterior(schedule.alpha_bar(1), schedule.alpha_bar(0)).variance)
    log_small, log_large = log_variance_range(alpha_bar, alpha_bar_prev, alpha_bar.new_tensor(floor))
    log_variance = learned_log_variance(fraction.double(), log_small, log_large)
    is_last = t == 0
    # at t = 0 the posterior is a point and the step's KL infinite: replace the level, or the gradient becomes NaN
    above = torch.where(
        per_image(is_last, x0), torch.full_like(alpha_bar_prev, 0.5) * (1.0 + alpha_bar), alpha_bar_prev
    )
    steps = step_bits(x0, x0_hat, log_variance, alpha_bar, above)
    return torch.where(is_last, decoder_bits(x0, x0_hat, log_variance, "discretised"), steps)


def step_bits(x0: Tensor, x0_hat: Tensor, log_variance: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """Return KL(q(x_s | x_t, x0) || N(posterior mean of x0_hat, exp log_variance)), (B,) float64.

    The two means differ by a multiple of x0 - x0_hat. ``alpha_bar`` is that of level t, ``alpha_bar_prev`` that of s.
    """
    step = posterior(alpha_bar.to(x0.device), alpha_bar_prev.to(x0.device))
    log_true = torch.log(torch.as_tensor(step.variance))
    gap = (step.x0 * (x0.double() - x0_hat.double())).square()
    kl = 0.5 * (log_variance - log_true - 1.0 + torch.exp(log_true - log_variance) + gap * torch.exp(-log_variance))
    return mean_bits(kl.expand(x0.shape))


def decoder_bits(x0: Tensor, x0_hat: Tensor, log_variance: Tensor, decoder: str) -> Tensor:
    """Return -log2 p(x0 | x_t) per dimension, (B,) float64, with the ``discretised`` decoder or as a ``density``."""
    if decoder == "discretised":
        return mean_bits(-discretised_log_likelihood(x0, x0_hat.double(), log_variance))
    distance = (x0.double() - x0_hat.double()).square() * torch.exp(-log_variance)
    return mean_bits(0.5 * (math.log(2.0 * math.pi) + log_variance + distance))


def discretised_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor | float, levels: int = 256) -> Tensor:
    """Return the log-probability of the bin of x0's level under a Gaussian (DDPM, arXiv 2006.11239, eq. 13), float64.

    x0, mean: (B, ...); x0 takes the ``levels`` evenly spaced values of [-1, 1]. Each bin is 2 / (levels - 1) wide, and the
    outer two reach to infinity. Uses the exact normal distribution function, so that the probabilities sum to 1.
    """
    x0, half = x0.double(), 1.0 / (levels - 1)
    deviation = torch.exp(0.5 * torch.as_tensor(log_variance, dtype=torch.float64, device=x0.device))
    lower = torch.where(x0 < -1.0 + half, -math.inf, (x0 - half - mean) / deviation)
    upper = torch.where(x0 > 1.0 - half, math.inf, (x0 + half - mean) / deviation)
    # in the upper tail both distribution functions round to 1: mirror the bin into the lower tail
    flip = lower > 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log(-torch.expm1((log_lower - log_upper).clamp(max=-1e-12)))


def mean_bits(nats: Tensor) -> Tensor:
    """Return the mean over each image's dimensions, (B,), converted from nats to bits."""
    return nats.flatten(1).mean(dim=1) / math.log(2.0)
