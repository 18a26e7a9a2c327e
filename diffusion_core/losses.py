"""The training loss, and the variational bound on the negative log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core import objectives
from diffusion_core.checks import check_images
from diffusion_core.denoiser import Denoiser, Network, call_network
from diffusion_core.grids import Grid, make_grid
from diffusion_core.objectives import per_image
from diffusion_core.posterior import VARIANCES, learned_log_variance, log_variance_range, posterior
from diffusion_core.samplers import StepNoise, check_inputs, draw
from diffusion_core.schedules import NoiseSchedule
from diffusion_core.weightings import loss_weight

ERRORS = ("mse", "huber")


def training_loss(
    network: Network,
    schedule: NoiseSchedule,
    objective: str,
    weighting: str,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    condition: Any = None,
    *,
    weighting_options: Mapping[str, float] | None = None,
    error: str = "mse",
    huber_delta: float = 1.0,
    self_condition: bool = False,
    self_condition_clip: float | None = 1.0,
    learned_variance: bool = False,
    bound_weight: float = 1e-3,
) -> Tensor:
    """(B,) float32: each image's weighted mean error of the network's output at step t.

    x0: (B, ...) float32 in [-1, 1]; t: (B,) int64 in [0, T); eps: (B, ...) standard normal; condition: as the network
    takes it, with the null condition where it was dropped. The error is taken in float32, also under autocast.

    ``error``: ``mse``, or ``huber``: 0.5 d^2 below ``huber_delta`` and delta (|d| - 0.5 delta) above, times 2 so that the two
    agree for small errors. ``self_condition``: first estimate x0 without gradients, clamped to ``self_condition_clip`` as
    the sampler's is, then feed it to the network (arXiv 2208.04202, section 3.2); for half of the steps, see
    `timesteps.draw_training_step`. ``learned_variance``: the network returns 2C channels; adds ``bound_weight`` T L_t, L_t in
    bits/dim being this step's term of the variational bound, with the mean's gradient stopped, so that only the variance
    learns from it (the hybrid loss of arXiv 2102.09672, eq. 16: T L_t estimates the whole bound).

    Raises ValueError for unknown names, an objective that the schedule cannot carry, tensors of the wrong shape or type, or
    (where t lies on a CPU) steps outside the schedule.
    """
    objectives.check_objective(objective, schedule)
    check_images(x0)
    if t.shape != x0.shape[:1] or eps.shape != x0.shape:
        raise ValueError(
            f"t must be one step an image and eps as x0, got t {tuple(t.shape)} and eps {tuple(eps.shape)} for x0 {tuple(x0.shape)}"
        )
    if t.device.type == "cpu" and t.numel() and int(t.min()) < 0:
        raise ValueError(f"training steps must lie in 0 to {schedule.num_steps - 1}, got {int(t.min())}")
    if error not in ERRORS or huber_delta <= 0:
        raise ValueError(
            f"error must be one of {', '.join(ERRORS)} and huber_delta above 0, got {error!r}, {huber_delta}"
        )
    alpha_bar = per_image(schedule.gather(t), x0)
    x_t = objectives.add_noise(x0, eps, alpha_bar)
    if self_condition:
        with torch.no_grad():
            first = call_network(network, x_t, t, condition).float()[:, : x0.shape[1]]
            estimate = objectives.to_x0(objective, first, x_t, alpha_bar)
            if self_condition_clip is not None:
                estimate = estimate.clamp(-self_condition_clip, self_condition_clip)
        output = call_network(network, x_t, t, condition, estimate).float()
    else:
        output = call_network(network, x_t, t, condition).float()
    channels = x0.shape[1] * (2 if learned_variance else 1)
    if output.shape != (x0.shape[0], channels, *x0.shape[2:]):
        raise ValueError(
            f"the network returned {tuple(output.shape)} for images of {tuple(x0.shape)}: it must return {channels} channels "
            f"with learned_variance={learned_variance}"
        )
    output, variance = output[:, : x0.shape[1]], output[:, x0.shape[1] :]
    target = objectives.target(objective, x0, eps, alpha_bar)
    if error == "mse":
        errors = (output - target).square()
    else:
        errors = 2.0 * F.huber_loss(output, target, reduction="none", delta=huber_delta)
    try:
        weight = loss_weight(weighting, objective, schedule.snr(t), **(weighting_options or {}))
    except TypeError as mistake:
        raise ValueError(f"weighting {weighting!r} does not take {dict(weighting_options or {})}: {mistake}") from None
    loss = weight.to(errors.dtype) * errors.flatten(1).mean(dim=1)
    if learned_variance:
        x0_hat = objectives.to_x0(objective, output.detach(), x_t, alpha_bar)
        term = _bound_term(schedule, x0, x0_hat, (variance + 1.0) / 2.0, t)
        loss = loss + bound_weight * schedule.num_steps * term.to(loss.dtype)
    return loss


@dataclass(frozen=True)
class VariationalBound:
    """The terms of the bound in bits/dim, float64: what it costs to store an image with this model.

    prior: (B,), KL(q(x_T | x0) || N(0, I)); steps: (B, S - 1), KL(q(x_s | x_t, x0) || p(x_s | x_t)) along the grid from its
    top; decoder: (B,), -log2 p(x0 | x_t) a dimension at the grid's last pair.
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """(B,): prior + all steps + decoder, an upper bound of the negative log-likelihood in bits/dim."""
        return self.prior + self.steps.sum(dim=1) + self.decoder


@torch.no_grad()
def variational_bound(
    denoiser: Denoiser,
    x0: Tensor,
    noise: StepNoise,
    *,
    condition: Any = None,
    grid: Grid | None = None,
    variance: str = "fixed_large",
    decoder: str = "discretised",
) -> VariationalBound:
    """The variational bound of images under the model (DDPM, arXiv 2006.11239, eq. 5), one draw of x_t a term.

    ``noise(t)`` gives x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise(t); average over several sources for a closer estimate.
    ``variance`` as in `sample_ddpm`. ``grid``: the reverse chain, the full one unless given. ``decoder``: ``discretised``, the
    probability of an 8-bit level under the last Gaussian (eq. 13), for images of 256 levels in [-1, 1]; or ``density``, its
    density, for continuous data. Where the posterior variance would be 0, in the last pair, that of the pair before stands
    in (arXiv 2102.09672, as its authors' code); ``fixed_large`` has beta there, where that code takes the stand-in.
    x0: (B, ...) float32. A denoiser with ``self_conditioning`` is asked without.

    Raises ValueError for unknown names, a learned variance of a network without, or a grid that is not down to -1.
    """
    if variance not in VARIANCES or decoder not in ("discretised", "density"):
        raise ValueError(
            f"variance must be one of {', '.join(VARIANCES)} and decoder discretised or density, got {variance!r}, {decoder!r}"
        )
    if variance == "learned" and not denoiser.learned_variance:
        raise ValueError(
            "variance 'learned' needs a network that learned it: build the denoiser with learned_variance=True"
        )
    schedule = denoiser.schedule
    grid = make_grid("uniform", schedule.num_steps, schedule.num_steps) if grid is None else grid
    grid = check_inputs(denoiser, x0, grid, "x0")
    if decoder == "discretised" and float(x0.abs().max()) > 1.0:
        raise ValueError(
            f"images of 256 levels lie in [-1, 1], these reach {float(x0.abs().max()):g}: scale them, or use decoder='density'"
        )
    if grid[-1][1] != -1:
        raise ValueError(f"the bound's chain must reach the clean image: the grid ends at level {grid[-1][1]}, not -1")
    levels = torch.tensor([level for pair in grid for level in pair]).view(-1, 2)
    alpha_bar, alpha_bar_prev = schedule.gather(levels).unbind(1)
    small = torch.as_tensor(posterior(alpha_bar, alpha_bar_prev).variance)
    floor = small[-2] if len(grid) > 1 else 1.0 - alpha_bar[-1]
    log_small, log_large = log_variance_range(alpha_bar, alpha_bar_prev, floor)
    terms = []
    for i, (t, _) in enumerate(grid):
        x_t = objectives.add_noise(x0, draw(noise, t, x0), float(alpha_bar[i]))
        prediction = denoiser(x_t, t, condition)
        if variance == "learned":
            assert prediction.variance_fraction is not None
            log_variance = learned_log_variance(prediction.variance_fraction.double(), log_small[i], log_large[i])
        else:
            log_variance = (log_large[i] if variance == "fixed_large" else log_small[i]).to(x0.device)
        if i + 1 == len(grid):
            terms.append(_decoder_bits(x0, prediction.x0, log_variance, decoder))
        else:
            terms.append(_step_bits(x0, prediction.x0, log_variance, alpha_bar[i], alpha_bar_prev[i]))
    top = alpha_bar[0].to(x0.device)
    prior = _mean_bits(0.5 * (top * x0.double().square() - top - torch.log1p(-top)))
    steps = torch.stack(terms[:-1], dim=1) if len(terms) > 1 else prior.new_zeros(len(prior), 0)
    return VariationalBound(prior, steps, terms[-1])


def discretised_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor | float, levels: int = 256) -> Tensor:
    """log of the probability that a Gaussian falls in the bin of x0's level (DDPM, arXiv 2006.11239, eq. 13), float64.

    x0, mean: (B, ...), x0 on the ``levels`` evenly spaced values of [-1, 1], each bin 2 / (levels - 1) wide, the outer two
    reaching to infinity. With the exact normal distribution function, so that the levels' probabilities sum to 1.
    """
    x0, half = x0.double(), 1.0 / (levels - 1)
    deviation = torch.exp(0.5 * torch.as_tensor(log_variance, dtype=torch.float64, device=x0.device))
    lower = torch.where(x0 < -1.0 + half, -math.inf, (x0 - half - mean) / deviation)
    upper = torch.where(x0 > 1.0 - half, math.inf, (x0 + half - mean) / deviation)
    # in the upper tail both distribution functions round to 1, so measure there from the other side
    flip = lower > 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log(-torch.expm1((log_lower - log_upper).clamp(max=-1e-12)))


def _bound_term(schedule: NoiseSchedule, x0: Tensor, x0_hat: Tensor, fraction: Tensor, t: Tensor) -> Tensor:
    """(B,) bits/dim: the bound's term of each image's own step t, in the full chain."""
    alpha_bar = per_image(schedule.gather(t), x0)
    alpha_bar_prev = per_image(schedule.gather(t - 1), x0)
    floor = 1.0 - schedule.alpha_bar(0)
    if schedule.num_steps > 1:
        floor = float(posterior(schedule.alpha_bar(1), schedule.alpha_bar(0)).variance)
    log_small, log_large = log_variance_range(alpha_bar, alpha_bar_prev, alpha_bar.new_tensor(floor))
    log_variance = learned_log_variance(fraction.double(), log_small, log_large)
    is_last = t == 0
    # the step's KL is infinite at t = 0, where the posterior is a point: keep it out of the gradient too
    above = torch.where(
        per_image(is_last, x0), torch.full_like(alpha_bar_prev, 0.5) * (1.0 + alpha_bar), alpha_bar_prev
    )
    steps = _step_bits(x0, x0_hat, log_variance, alpha_bar, above)
    return torch.where(is_last, _decoder_bits(x0, x0_hat, log_variance, "discretised"), steps)


def _step_bits(x0: Tensor, x0_hat: Tensor, log_variance: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """KL(q(x_s | x_t, x0) || N(posterior mean of x0_hat, exp log_variance)): the two means differ by a multiple of x0 - x0_hat."""
    step = posterior(alpha_bar.to(x0.device), alpha_bar_prev.to(x0.device))
    log_true = torch.log(torch.as_tensor(step.variance))
    gap = (step.x0 * (x0.double() - x0_hat.double())).square()
    kl = 0.5 * (log_variance - log_true - 1.0 + torch.exp(log_true - log_variance) + gap * torch.exp(-log_variance))
    return _mean_bits(kl.expand(x0.shape))


def _decoder_bits(x0: Tensor, x0_hat: Tensor, log_variance: Tensor, decoder: str) -> Tensor:
    if decoder == "discretised":
        return _mean_bits(-discretised_log_likelihood(x0, x0_hat.double(), log_variance))
    distance = (x0.double() - x0_hat.double()).square() * torch.exp(-log_variance)
    return _mean_bits(0.5 * (math.log(2.0 * math.pi) + log_variance + distance))


def _mean_bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(dim=1) / math.log(2.0)
