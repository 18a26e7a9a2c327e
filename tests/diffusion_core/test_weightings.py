"""Loss weightings: the same for every objective, and equal to the published formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_core.objectives import OBJECTIVES, add_noise, convert, target
from diffusion_core.schedules import make_schedule
from diffusion_core.weightings import WEIGHTINGS, loss_weight, x0_weight

SNR = make_schedule("cosine").snr(torch.arange(0, 990))


@given(name=st.sampled_from(WEIGHTINGS), t=st.integers(0, 980), seed=st.integers(0, 1000))
def test_weighted_error_is_the_same_for_every_objective(name, t, seed):
    schedule = make_schedule("cosine")
    alpha_bar, snr = schedule.alpha_bar(t), schedule.snr(torch.tensor(t))
    x0, eps, wrong = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(seed)).double()
    x_t = add_noise(x0, eps, alpha_bar)
    losses = [
        loss_weight(name, objective, snr)
        * (convert("x0", objective, wrong, x_t, alpha_bar) - target(objective, x0, eps, alpha_bar)).square().mean()
        for objective in OBJECTIVES
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "objective", "options", "expected"),
    [
        ("snr", "eps", {}, torch.ones_like(SNR)),
        ("snr_plus_one", "v", {}, torch.ones_like(SNR)),
        ("uniform", "x0", {}, torch.ones_like(SNR)),
        ("min_snr", "eps", {}, torch.minimum(SNR, torch.tensor(5.0)) / SNR),
        ("min_snr", "v", {"gamma": 3.0}, torch.minimum(SNR, torch.tensor(3.0)) / (SNR + 1)),
        ("min_snr", "x0", {}, torch.minimum(SNR, torch.tensor(5.0))),
        ("truncated_snr", "x0", {}, torch.maximum(SNR, torch.tensor(1.0))),
        ("p2", "eps", {}, 1 / (1 + SNR)),
        ("p2", "eps", {"k": 2.0, "gamma": 0.5}, 1 / (2 + SNR) ** 0.5),
        ("p2", "eps", {"gamma": 0.0}, torch.ones_like(SNR)),
    ],
)
def test_weights_are_the_published_ones(name, objective, options, expected):
    torch.testing.assert_close(loss_weight(name, objective, SNR, **options), expected.double())


def test_weights_are_finite_at_a_zero_terminal_snr_for_the_objectives_that_allow_it():
    zero = torch.zeros(1, dtype=torch.float64)
    for name in WEIGHTINGS:
        for objective in ("x0", "v"):
            assert bool(torch.isfinite(loss_weight(name, objective, zero)).all())


def test_bad_weightings_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="unknown weighting"):
        x0_weight("edm", SNR)
    with pytest.raises(ValueError, match="unknown objective"):
        loss_weight("snr", "noise", SNR)
    for options in ({"gamma": -1.0}, {"gamma": 0.0}, {"k": 0.0}):
        with pytest.raises(ValueError, match="k and gamma above 0"):
            x0_weight("min_snr", SNR, **options)
