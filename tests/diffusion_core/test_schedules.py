"""Noise schedules against their published formulas, and the quantities derived from alpha-bar."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.schedules import (
    SCHEDULES,
    NoiseSchedule,
    given_schedule,
    make_schedule,
    rescale_to_zero_terminal_snr,
)


def every_schedule(num_steps=1000):
    for name in SCHEDULES:
        yield make_schedule(name, num_steps)
        yield make_schedule(name, num_steps, zero_terminal_snr=True)


@given(name=st.sampled_from(SCHEDULES), num_steps=st.integers(2, 4000), zero=st.booleans())
@settings(max_examples=60, deadline=None)
def test_alpha_bar_falls_from_below_one_at_any_length(name, num_steps, zero):
    schedule = make_schedule(name, num_steps, zero_terminal_snr=zero)
    table = schedule.alphas_cumprod
    assert table.dtype == torch.float64 and len(table) == num_steps == schedule.num_steps
    assert bool((table.diff() < 0).all()) and 0 <= float(table[-1]) < float(table[0]) < 1
    assert schedule.alpha_bar(-1) == 1.0
    assert schedule.has_zero_terminal_snr == zero


def test_schedules_have_their_published_values():
    linear = make_schedule("linear")
    assert float(linear.betas()[0]) == pytest.approx(1e-4, rel=1e-10)
    assert float(linear.betas()[-1]) == pytest.approx(0.02, rel=1e-10)
    # DDPM, section 4: KL(q(x_T | x_0) || N(0, I)) is about 1e-5 bits per dimension
    assert linear.alpha_bar(999) == pytest.approx(4.04e-5, rel=1e-2)
    scaled = make_schedule("scaled_linear")
    assert scaled.alpha_bar(999) == pytest.approx(0.0046601, rel=1e-4)  # Stable Diffusion's 0.00466
    cosine = make_schedule("cosine")
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    assert cosine.alpha_bar(499) == pytest.approx(f[500] / f[0], rel=1e-9)
    assert float(cosine.betas().max()) == pytest.approx(0.999)
    sigmoid = make_schedule("sigmoid", start=-3, end=3, tau=0.5)
    v = [1 / (1 + math.exp(-(i / 1000 * 6 - 3) / 0.5)) for i in range(1001)]
    assert sigmoid.alpha_bar(299) == pytest.approx((v[1000] - v[300]) / (v[1000] - v[0]), rel=1e-7)


def test_linear_schedule_of_any_length_ends_near_the_same_noise():
    ends = [math.log(make_schedule("linear", steps).alpha_bar(steps - 1)) for steps in (250, 500, 1000, 4000)]
    assert max(ends) - min(ends) < 0.4


def test_snr_log_snr_sigma_and_betas_follow_from_alpha_bar():
    for schedule in every_schedule():
        t = torch.arange(1000)
        a = schedule.alphas_cumprod
        torch.testing.assert_close(schedule.snr(t), a / (1 - a))
        torch.testing.assert_close(schedule.log_snr(t), (a / (1 - a)).log(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(schedule.sigma(t), ((1 - a) / a).sqrt())
        torch.testing.assert_close(torch.cumprod(1 - schedule.betas(), 0), a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            schedule.gather(torch.tensor([[-1, 3]])), torch.tensor([[1.0, float(a[3])]]).double()
        )


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_rescale_keeps_the_first_step_and_ends_at_zero(name):
    plain, rescaled = make_schedule(name), make_schedule(name, zero_terminal_snr=True)
    assert rescaled.alpha_bar(0) == pytest.approx(plain.alpha_bar(0), rel=1e-12)
    assert rescaled.alpha_bar(999) == 0.0
    assert float(rescaled.log_snr(torch.tensor(999))) == -math.inf
    again = rescale_to_zero_terminal_snr(rescaled)
    torch.testing.assert_close(again.alphas_cumprod, rescaled.alphas_cumprod, rtol=1e-12, atol=0)


def test_config_builds_the_same_schedule_again():
    for schedule in (*every_schedule(100), make_schedule("sigmoid", 50, tau=0.7), given_schedule([0.9, 0.5, 0.1])):
        assert torch.equal(make_schedule(**schedule.config).alphas_cumprod, schedule.alphas_cumprod)
    rescaled = rescale_to_zero_terminal_snr(given_schedule([0.9, 0.5, 0.1]))
    assert torch.equal(make_schedule(**rescaled.config).alphas_cumprod, rescaled.alphas_cumprod)


def test_schedule_of_any_array_keeps_its_numbers():
    array = torch.linspace(0.99, 0.01, 17)
    schedule = given_schedule(array)
    assert torch.equal(schedule.alphas_cumprod, array.double())
    for values in (array.double(), array.double().tolist(), array.double().numpy()):
        assert NoiseSchedule(values).alpha_bar(16) == schedule.alpha_bar(16)
    again = make_schedule(**NoiseSchedule(array.double()).config)
    assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)


def test_scaled_linear_runs_between_its_published_ends_at_any_length():
    for num_steps in (100, 1000):
        betas = make_schedule("scaled_linear", num_steps).betas()
        assert float(betas[0]) == pytest.approx(0.00085, rel=1e-9) and float(betas[-1]) == pytest.approx(
            0.012, rel=1e-9
        )


def test_bad_schedules_are_refused_with_the_remedy():
    for array, message in (
        ([0.5, 0.5], "must fall at every step"),
        ([0.5, 0.6], "must fall at every step"),
        ([1.0, 0.5], r"must lie in \[0, 1\)"),
        ([0.5, -0.1], r"must lie in \[0, 1\)"),
        ([0.5, math.nan], r"must lie in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            given_schedule(array)
    with pytest.raises(ValueError, match="float64 vector"):
        NoiseSchedule(torch.tensor([0.5, 0.4]))
    with pytest.raises(ValueError, match="unknown noise schedule"):
        make_schedule("quadratic")
    with pytest.raises(ValueError, match="does not take"):
        make_schedule("cosine", tau=1.0)
    with pytest.raises(ValueError, match="whole number of at least 1"):
        make_schedule("cosine", 0)
    with pytest.raises(ValueError, match="tau > 0"):
        make_schedule("sigmoid", tau=0.0)
    with pytest.raises(ValueError, match="at least two steps"):
        make_schedule("linear", 1, zero_terminal_snr=True)
    with pytest.raises(ValueError, match="needs 3 alphas_cumprod"):
        make_schedule("given", 3, alphas_cumprod=[0.5])
    with pytest.raises(ValueError, match="must be a vector"):
        given_schedule(torch.full((2, 3), 0.5))
    for steps in (torch.tensor([-2]), torch.tensor([5, 1000])):
        with pytest.raises(ValueError, match="-1 to 999"):
            make_schedule("linear").snr(steps)
    with pytest.raises(ValueError, match="whole numbers"):
        make_schedule("linear").gather(torch.tensor([0.5]))
    assert float(make_schedule("linear").snr(500)) == float(make_schedule("linear").snr(torch.tensor(500)))
    for t in (-2, 1000, 5.0):
        with pytest.raises(ValueError, match="outside the schedule"):
            make_schedule("linear").alpha_bar(t)


@pytest.mark.parametrize("num_steps", [100, 250, 1000, 4000])
def test_explicit_ends_of_a_linear_schedule_are_taken_as_they_are(num_steps):
    betas = make_schedule("linear", num_steps, start=1e-4, end=0.02).betas()
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, num_steps).double(), rtol=1e-6, atol=1e-12)
    only_end = make_schedule("linear", num_steps, end=0.05).betas()
    assert float(only_end[0]) == pytest.approx(0.1 / num_steps, rel=1e-9) and float(only_end[-1]) == pytest.approx(0.05)
    schedule = make_schedule("linear", num_steps, start=1e-4, end=0.02)
    assert torch.equal(make_schedule(**schedule.config).alphas_cumprod, schedule.alphas_cumprod)


def test_default_linear_schedule_is_unchanged_and_short_ones_reach_the_largest_beta():
    expected = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 100, dtype=torch.float64), 0)
    assert torch.equal(make_schedule("linear", 100).alphas_cumprod, expected)
    assert float(make_schedule("linear", 10).betas()[-1]) == pytest.approx(0.999)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        make_schedule("linear", 10, end=1.5)


@pytest.mark.parametrize("convert", [list, tuple, np.asarray, torch.tensor], ids=["list", "tuple", "array", "tensor"])
def test_numbers_of_a_given_schedule_keep_all_their_digits(convert):
    numbers = [0.9, 0.7, 0.1, 1e-9]
    values = convert(numbers) if convert is not torch.tensor else torch.tensor(numbers, dtype=torch.float64)
    schedule = given_schedule(values)
    assert schedule.alphas_cumprod.tolist() == numbers == list(schedule.config["alphas_cumprod"])
    assert NoiseSchedule(values).alphas_cumprod.tolist() == numbers
