"""Loss weights by signal-to-noise ratio, defined in x0 space and converted to each objective.

The three squared errors differ by a known factor at a given SNR (Salimans and Ho, arXiv 2202.00512):
``|eps - eps_hat|^2 = SNR |x0 - x0_hat|^2`` and ``|v - v_hat|^2 = (SNR + 1) |x0 - x0_hat|^2``. So a weighting
w(SNR) of the x0 error, divided by that factor, means the same training for each objective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_core.objectives import OBJECTIVES

WEIGHTINGS = ("uniform", "snr", "truncated_snr", "snr_plus_one", "min_snr", "p2")


def x0_weight(name: str, snr: Tensor, *, gamma: float | None = None, k: float = 1.0) -> Tensor:
    """Return the weight of the squared x0 error at each SNR (same shape, float64 in and out).

    ``uniform``        1
    ``snr``            SNR: the plain eps loss, L_simple of DDPM (arXiv 2006.11239, eq. 14)
    ``truncated_snr``  max(SNR, 1) (arXiv 2202.00512)
    ``snr_plus_one``   SNR + 1: the plain v loss (arXiv 2202.00512)
    ``min_snr``        min(SNR, gamma), gamma 5 (arXiv 2303.09556)
    ``p2``             SNR / (k + SNR)^gamma, k 1, gamma 1 (arXiv 2204.00227)

    Raises ValueError if the name is unknown, gamma is below 0 (or 0 for min_snr), or k is not above 0.
    """
    if k <= 0 or (gamma is not None and (gamma < 0 or (gamma == 0 and name == "min_snr"))):
        raise ValueError(
            f"weighting {name!r} needs k and gamma above 0 (gamma 0 is allowed for p2), got k={k}, gamma={gamma}"
        )
    if name == "uniform":
        return torch.ones_like(snr)
    if name == "snr":
        return snr
    if name == "truncated_snr":
        return snr.clamp(min=1.0)
    if name == "snr_plus_one":
        return snr + 1.0
    if name == "min_snr":
        return snr.clamp(max=5.0 if gamma is None else gamma)
    if name == "p2":
        return snr / (k + snr) ** (1.0 if gamma is None else gamma)
    raise ValueError(f"unknown weighting {name!r}: choose one of {', '.join(WEIGHTINGS)}")


def loss_weight(name: str, objective: str, snr: Tensor, **options: float) -> Tensor:
    """Return the weight of the squared error of this objective's own output: float64, the shape of ``snr``.

    The SNR must be above 0 for the eps objective. Raises ValueError if the weighting or the objective is unknown.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
    weight = x0_weight(name, snr, **options)
    if objective == "eps":
        return weight / snr
    if objective == "v":
        return weight / (snr + 1.0)
    return weight
