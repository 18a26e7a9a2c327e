"""The reverse step: q(x_s | x_t, x_0) between any two levels s < t, and the variances that a model may use instead.

With a_t the level's alpha_bar, beta = 1 - a_t / a_s is the variance of the forward step from s to t
(DDPM, arXiv 2006.11239, section 2, for s = t - 1; arXiv 2102.09672, eq. 19, for any sub-sequence).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

VARIANCES = ("fixed_small", "fixed_large", "learned")


class Posterior(NamedTuple):
    """The posterior q(x_s | x_t, x_0) = N(x0 * x_0 + x_t * x_t, variance): two coefficients and the variance, all floats or all tensors."""

    x0: Tensor | float
    x_t: Tensor | float
    variance: Tensor | float


def posterior(alpha_bar: Tensor | float, alpha_bar_prev: Tensor | float) -> Posterior:
    """Return the posterior of the level ``alpha_bar_prev`` (s) given x_t and x_0 (DDPM eq. 7).

    mean = sqrt(a_s) beta / (1 - a_t) x_0 + sqrt(a_t / a_s) (1 - a_s) / (1 - a_t) x_t, variance = (1 - a_s) / (1 - a_t) beta.
    Needs 0 <= a_t < a_s <= 1. At a_s = 1 it is x_0 itself, with variance 0.
    """
    ratio = alpha_bar / alpha_bar_prev
    noise = 1.0 - alpha_bar
    return Posterior(
        x0=alpha_bar_prev**0.5 * (1.0 - ratio) / noise,
        x_t=ratio**0.5 * (1.0 - alpha_bar_prev) / noise,
        variance=(1.0 - alpha_bar_prev) * (1.0 - ratio) / noise,
    )


def learned_log_variance(fraction: Tensor, log_small: Tensor | float, log_large: Tensor | float) -> Tensor:
    """Return fraction log_large + (1 - fraction) log_small (arXiv 2102.09672, eq. 15).

    fraction: (B, ...), 0 for the posterior variance and 1 for beta, as `Prediction.variance_fraction`.
    """
    return fraction * log_large + (1.0 - fraction) * log_small


def log_variance_range(alpha_bar: Tensor, alpha_bar_prev: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log of the posterior variance, log beta), float64: the smallest and largest sensible variance of a step.

    At a_s = 1 the posterior variance is 0; ``floor`` replaces it (Improved DDPM uses the variance of the step before).
    """
    step = posterior(alpha_bar, alpha_bar_prev)
    small = torch.as_tensor(step.variance)
    return torch.where(small > 0, small, floor).log(), (1.0 - alpha_bar / alpha_bar_prev).log()
