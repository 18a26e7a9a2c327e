"""Objectives: every conversion and its inverse cancel, at every noise level of every schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.objectives import OBJECTIVES, add_noise, check_objective, convert, target, to_eps, to_x0
from diffusion_core.schedules import SCHEDULES, make_schedule


@given(
    name=st.sampled_from(SCHEDULES),
    zero=st.booleans(),
    source=st.sampled_from(OBJECTIVES),
    destination=st.sampled_from(OBJECTIVES),
    level=st.floats(0, 1),
    num_steps=st.integers(2, 1500),
)
@settings(max_examples=200, deadline=None)
def test_conversions_invert_each_other_on_every_schedule(name, zero, source, destination, level, num_steps):
    schedule = make_schedule(name, num_steps, zero_terminal_snr=zero)
    t = round(level * (num_steps - 1))
    alpha_bar = schedule.alpha_bar(t)
    if alpha_bar < 1e-6:  # eps no longer determines x0
        t = round(level * (num_steps - 1) / 2)
        alpha_bar = schedule.alpha_bar(t)
    x0, eps = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    x_t = add_noise(x0, eps, alpha_bar)
    output = target(source, x0, eps, alpha_bar)
    torch.testing.assert_close(to_x0(source, output, x_t, alpha_bar), x0, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(to_eps(source, output, x_t, alpha_bar), eps, atol=1e-7, rtol=1e-7)
    there = convert(source, destination, output, x_t, alpha_bar)
    torch.testing.assert_close(there, target(destination, x0, eps, alpha_bar), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(convert(destination, source, there, x_t, alpha_bar), output, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_alpha_bar_as_a_number_or_a_tensor_gives_the_same_result(objective):
    schedule = make_schedule("cosine")
    x_t = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    output = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 10, 400, 700, 990])
    rows = schedule.gather(t).view(-1, 1, 1, 1)
    for function in (to_x0, to_eps):
        together = function(objective, output, x_t, rows)
        assert together.dtype == torch.float32
        for i, step in enumerate(t.tolist()):
            torch.testing.assert_close(together[i], function(objective, output[i], x_t[i], schedule.alpha_bar(step)))


def test_pure_noise_is_converted_for_x0_and_v_and_refused_for_eps():
    schedule = make_schedule("linear", zero_terminal_snr=True)
    x0, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for objective in ("x0", "v"):
        check_objective(objective, schedule)
        output = target(objective, x0, eps, 0.0)
        torch.testing.assert_close(to_x0(objective, output, eps, 0.0), x0)
        torch.testing.assert_close(to_eps(objective, output, eps, 0.0), eps)
    with pytest.raises(ValueError, match="use objective 'v' or 'x0'"):
        check_objective("eps", schedule)


def test_unknown_objective_is_refused_by_every_function():
    x = torch.ones(2, 2)
    for call in (
        lambda: target("noise", x, x, 0.5),
        lambda: to_x0("noise", x, x, 0.5),
        lambda: to_eps("noise", x, x, 0.5),
        lambda: convert("eps", "noise", x, x, 0.5),
        lambda: convert("noise", "noise", x, x, 0.5),
        lambda: check_objective("noise", make_schedule("linear")),
    ):
        with pytest.raises(ValueError, match="unknown objective 'noise': choose one of eps, x0, v"):
            call()
