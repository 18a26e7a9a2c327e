"""The variational bound on the negative log-likelihood of images under a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_core import objectives
from diffusion_core.bound_terms import decoder_bits, mean_bits, step_bits
from diffusion_core.denoiser import Denoiser
from diffusion_core.grids import Grid, make_grid
from diffusion_core.posterior import VARIANCES, learned_log_variance, log_variance_range, posterior
from diffusion_core.samplers import StepNoise, check_inputs, draw


@dataclass(frozen=True)
class VariationalBound:
    """The terms of the bound in bits/dim, float64: the cost of storing an image with this model.

    prior: (B,), KL(q(x_T | x0) || N(0, I)); steps: (B, S - 1), KL(q(x_s | x_t, x0) || p(x_s | x_t)) along the grid from its
    top; decoder: (B,), -log2 p(x0 | x_t) per dimension at the grid's last pair.
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """Upper bound on the negative log-likelihood, (B,) bits/dim: prior + steps + decoder."""
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
    decoder_variance: str | None = None,
) -> VariationalBound:
    """Compute the variational bound of images (DDPM, arXiv 2006.11239, eq. 5), with one draw of x_t per term.

    ``noise(t)`` gives x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise(t); average over several sources for a closer estimate.
    ``variance`` as in `sample_ddpm`. ``grid``: the reverse chain; every step by default. ``decoder``: ``discretised``, the
    probability of an 8-bit level under the last Gaussian (eq. 13), for images of 256 levels in [-1, 1]; or ``density``, its
    density, for continuous data. x0: (B, ...) float32. A denoiser with ``self_conditioning`` gets no self-condition.

    ``decoder_variance``: the fixed variance of the last pair, whose own posterior variance is 0. ``posterior``: that of the pair
    before, for ``fixed_small`` and for ``fixed_large`` (the code of arXiv 2006.11239 and 2102.09672); the default of
    ``discretised``. ``beta``: the last pair's beta, exact if the data is N(0, I); the default of ``density`` with
    ``fixed_large``. On ``linear`` with 1000 steps and a good estimate of x0, beta adds about 0.4 bits/dim, because its Gaussian
    is wider than an 8-bit level. A learned variance lies between the two: it takes no ``decoder_variance``.

    Raises ValueError if a name is unknown, ``variance`` is ``learned`` but the network did not learn it or ``decoder_variance``
    is given, the images do not lie in [-1, 1] (``discretised``), or the grid does not end at -1.
    """
    if variance not in VARIANCES or decoder not in ("discretised", "density"):
        raise ValueError(
            f"variance must be one of {', '.join(VARIANCES)} and decoder discretised or density, got {variance!r}, {decoder!r}"
        )
    if decoder_variance not in (None, "posterior", "beta"):
        raise ValueError(f"decoder_variance must be posterior or beta, got {decoder_variance!r}")
    if variance == "learned" and decoder_variance is not None:
        raise ValueError("decoder_variance belongs to a fixed variance, and this one is learned: omit it")
    if decoder_variance is None:
        decoder_variance = "beta" if decoder == "density" and variance == "fixed_large" else "posterior"
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
            last = i + 1 == len(grid)
            large = decoder_variance == "beta" if last else variance == "fixed_large"
            log_variance = (log_large[i] if large else log_small[i]).to(x0.device)
        if i + 1 == len(grid):
            terms.append(decoder_bits(x0, prediction.x0, log_variance, decoder))
        else:
            terms.append(step_bits(x0, prediction.x0, log_variance, alpha_bar[i], alpha_bar_prev[i]))
    top = alpha_bar[0].to(x0.device)
    prior = mean_bits(0.5 * (top * x0.double().square() - top - torch.log1p(-top)))
    steps = torch.stack(terms[:-1], dim=1) if len(terms) > 1 else prior.new_zeros(len(prior), 0)
    return VariationalBound(prior, steps, terms[-1])
