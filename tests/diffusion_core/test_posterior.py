"""The posterior q(x_s | x_t, x_0) against Bayes' rule computed numerically."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.posterior import learned_log_variance, log_variance_range, posterior
from diffusion_core.schedules import SCHEDULES, make_schedule


@given(
    name=st.sampled_from(SCHEDULES),
    t=st.integers(1, 59),
    gap=st.integers(1, 58),
    x0=st.floats(-1, 1),
    z=st.floats(-2.5, 2.5),
)
@settings(max_examples=150, deadline=None)
def test_posterior_agrees_with_bayes_rule_by_quadrature(name, t, gap, x0, z):
    """q(x_s | x_t, x0) is q(x_t | x_s) q(x_s | x0), normalised: compute its mean and variance by a sum over many points."""
    schedule = make_schedule(name, 60)
    s = max(t - gap, 0)
    a, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(s)
    x_t = a**0.5 * x0 + (1 - a) ** 0.5 * z
    step = posterior(a, a_prev)
    middle, spread = step.x0 * x0 + step.x_t * x_t, step.variance**0.5
    # the points are centred on the answer, but spread wide enough to show a wrong one
    points = middle + spread * torch.linspace(-12, 12, 8001, dtype=torch.float64)
    ratio = a / a_prev
    log_weight = -((x_t - ratio**0.5 * points) ** 2) / (2 * (1 - ratio)) - (points - a_prev**0.5 * x0) ** 2 / (
        2 * (1 - a_prev)
    )
    weight = torch.softmax(log_weight, 0)
    mean = (weight * points).sum()
    variance = (weight * (points - mean) ** 2).sum()
    assert float(mean) == pytest.approx(middle, abs=1e-6 * max(spread, 1e-3))
    assert float(variance) == pytest.approx(step.variance, rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_at_the_clean_level_is_the_clean_image(name):
    schedule = make_schedule(name, 60)
    for t in (0, 30, 59):
        assert posterior(schedule.alpha_bar(t), 1.0) == (pytest.approx(1.0, rel=1e-12), 0.0, 0.0)


def test_two_reverse_steps_compose_to_one_reverse_step():
    """Averaging q(x_r | x_s, x0) over q(x_s | x_t, x0) is q(x_r | x_t, x0), for levels r < s < t."""
    schedule = make_schedule("cosine", 100)
    t, s, r = (schedule.alpha_bar(step) for step in (80, 50, 20))
    first, second, whole = posterior(t, s), posterior(s, r), posterior(t, r)
    assert second.x0 + second.x_t * first.x0 == pytest.approx(whole.x0, rel=1e-12)
    assert second.x_t * first.x_t == pytest.approx(whole.x_t, rel=1e-12)
    assert second.variance + second.x_t**2 * first.variance == pytest.approx(whole.variance, rel=1e-12)


def test_tensors_and_numbers_give_the_same_posterior():
    schedule = make_schedule("linear", 60)
    t = torch.arange(60)
    table = posterior(schedule.gather(t), schedule.gather(t - 1))
    for step in (0, 1, 59):
        single = posterior(schedule.alpha_bar(step), schedule.alpha_bar(step - 1))
        assert tuple(float(part[step]) for part in table) == pytest.approx(tuple(single), rel=1e-12)


def test_learned_variance_ranges_from_the_posterior_variance_to_beta():
    schedule = make_schedule("linear", 60)
    t = torch.arange(60)
    floor = torch.tensor(posterior(schedule.alpha_bar(1), schedule.alpha_bar(0)).variance)
    small, large = log_variance_range(schedule.gather(t), schedule.gather(t - 1), floor)
    torch.testing.assert_close(large.exp(), schedule.betas())
    assert bool((small[1:] < large[1:]).all()) and float(small[0].exp()) == pytest.approx(float(floor))
    torch.testing.assert_close(learned_log_variance(torch.zeros(60), small, large), small)
    torch.testing.assert_close(learned_log_variance(torch.ones(60), small, large), large)
    middle = learned_log_variance(torch.full((60,), 0.5), small, large)
    assert float(middle[7]) == pytest.approx(0.5 * math.log(float(small[7].exp() * large[7].exp())))
