"""Samplers against closed forms: exact flows, exact moments, and the DDPM posterior."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.denoiser import Denoiser
from diffusion_core.grids import SPACINGS, grid_from_steps, make_grid, restrict_grid
from diffusion_core.noise import NoiseSource
from diffusion_core.objectives import OBJECTIVES
from diffusion_core.posterior import VARIANCES, posterior
from diffusion_core.samplers import (
    ddim_sigmas,
    ddim_step,
    ddpm_step,
    reverse_step,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_heun,
)
from diffusion_core.schedules import SCHEDULES, make_schedule
from tests.diffusion_core.oracle import Gaussian, Mixture, exact_moments, tilted_gaussian

DETERMINISTIC = {
    "ddim": sample_ddim,
    "dpmpp_2m": sample_dpmpp_2m,
    "heun": sample_heun,
}
STOCHASTIC = {
    "ddim eta 0.5": functools.partial(sample_ddim, eta=0.5),
    "ddim eta 1": functools.partial(sample_ddim, eta=1.0),
    "ddim sigma_hat": functools.partial(sample_ddim, eta="sigma_hat"),
    "ddpm fixed_small": functools.partial(sample_ddpm, variance="fixed_small"),
    "ddpm fixed_large": functools.partial(sample_ddpm, variance="fixed_large"),
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
}
ALL = {**DETERMINISTIC, **STOCHASTIC}


def error_against_flow(sampler, num_steps: int, schedule, highest: int, lowest: int, clean: bool) -> float:
    """Return the largest distance from the exact ODE solution, over steps evenly spaced in level."""
    target = tilted_gaussian()
    steps = torch.linspace(lowest, highest, num_steps + 1).round().int().tolist()
    grid = list(zip(reversed(steps[1:]), reversed(steps[:-1])))
    if clean:
        grid.append((lowest, -1))
    x_T = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double()
    end = schedule.alpha_bar(grid[-1][1])
    exact = target.flow(x_T, schedule.alpha_bar(highest), end)
    return float((sampler(target.denoiser(schedule), x_T, grid) - exact).abs().max())


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
def test_sampler_converges_to_the_exact_flow_at_its_order(name, order):
    schedule = make_schedule("cosine", 4096)
    errors = [error_against_flow(DETERMINISTIC[name], s, schedule, 3600, 272, clean=False) for s in (26, 52, 104, 208)]
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.2), (errors, slopes)
    assert all(slope > order - 0.35 for slope in slopes), (errors, slopes)


def error_with_trailing(sampler, schedule, num_steps: int, last: bool = True) -> float:
    """Return the largest distance from the exact ODE solution, from the top of the schedule, without or with the last step."""
    target = tilted_gaussian()
    grid = make_grid("trailing", schedule.num_steps, num_steps)
    grid = grid if last else grid[:-1]
    x_T = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double()
    exact = target.flow(x_T, schedule.alpha_bar(grid[0][0]), schedule.alpha_bar(grid[-1][1]))
    return float((sampler(target.denoiser(schedule, "v"), x_T, grid) - exact).abs().max())


FROM_NOISE = {
    "just below pure noise": make_schedule("cosine", 1000),
    "further below": make_schedule("cosine", 8000),
    "from pure noise": make_schedule("cosine", 1000, zero_terminal_snr=True),
    "from pure noise, linear": make_schedule("linear", 8000, zero_terminal_snr=True),
}


@pytest.mark.parametrize("schedule", FROM_NOISE.values(), ids=FROM_NOISE)
def test_heun_is_of_second_order_from_the_top_of_the_schedule_and_errs_less_than_ddim(schedule):
    errors = [error_with_trailing(sample_heun, schedule, n, last=False) for n in (10, 20, 40, 80)]
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(slope > 1.8 for slope in slopes), (errors, slopes)
    for num_steps in (3, 5, 10, 20, 40):
        heun, ddim = (error_with_trailing(sampler, schedule, num_steps) for sampler in (sample_heun, sample_ddim))
        assert heun < (ddim if num_steps < 10 else 0.6 * ddim), (num_steps, heun, ddim)


def test_heun_samples_of_a_mixture_lie_near_its_modes_with_the_default_schedule_and_spacing():
    schedule = make_schedule("cosine", 1000)
    target = Mixture(
        torch.tensor([0.4, 0.6]).double(), torch.tensor([[-0.8, 0.3], [0.7, -0.4]]).double(), variance=0.01
    )
    x_T = NoiseSource(0).normal((2,), torch.arange(2000), 1000).double()
    samples = sample_heun(target.denoiser(schedule, "v"), x_T, make_grid("trailing", 1000, 10))
    near = torch.cdist(samples, target.means).amin(dim=1) < 4 * target.variance**0.5
    assert float(near.double().mean()) > 0.97


def test_dpmpp_2m_errs_far_less_with_trailing_than_with_uniform_as_the_guide_says():
    schedule, target = make_schedule("cosine", 1000), tilted_gaussian()
    x_T = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double()
    errors = {}
    for spacing in ("trailing", "uniform"):
        grid = make_grid(spacing, 1000, 20)
        exact = target.flow(x_T, schedule.alpha_bar(grid[0][0]), 1.0)
        errors[spacing] = float((sample_dpmpp_2m(target.denoiser(schedule, "v"), x_T, grid) - exact).abs().max())
    assert errors["trailing"] < 0.015 and errors["uniform"] > 0.1, errors


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_full_run_reaches_the_exact_solution_up_to_the_resolution_of_the_schedule(name):
    schedule = make_schedule("linear", 1000)
    target = tilted_gaussian()
    x_T = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double()
    exact = target.flow(x_T, schedule.alpha_bar(999), 1.0)
    error = (DETERMINISTIC[name](target.denoiser(schedule), x_T, make_grid("uniform", 1000, 1000)) - exact).abs().max()
    assert float(error) < (1e-2 if name == "ddim" else 5e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ALL)
def test_samples_have_the_targets_mean_and_covariance(name, objective):
    schedule, target = make_schedule("cosine", 400), tilted_gaussian()
    grid = make_grid("uniform", 400, 400)
    mean_T, covariance_T = target.marginal(schedule.alpha_bar(399))
    denoiser = target.denoiser(schedule, objective)
    mean, covariance = exact_moments(
        lambda x, noise: ALL[name](denoiser, x, grid, noise), mean_T, covariance_T, [t for t, _ in grid]
    )
    tolerance = 4e-3 if name in DETERMINISTIC else 1.5e-2
    torch.testing.assert_close(mean, target.mean, atol=tolerance, rtol=0)
    torch.testing.assert_close(covariance, target.covariance, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_objectives_sample_the_same_images(name):
    schedule, target = make_schedule("cosine", 100), tilted_gaussian()
    x_T = torch.randn(8, 2, generator=torch.Generator().manual_seed(1)).double()
    noise = NoiseSource(3).for_samples((2,), torch.arange(8))
    grid = make_grid("trailing", 100, 13)
    runs = [ALL[name](target.denoiser(schedule, objective), x_T, grid, noise) for objective in OBJECTIVES]
    torch.testing.assert_close(runs[0], runs[1], atol=1e-8, rtol=0)
    torch.testing.assert_close(runs[0], runs[2], atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_sampling_from_pure_noise_with_zero_terminal_snr_gives_the_targets_moments(name):
    schedule, target = make_schedule("linear", 300, zero_terminal_snr=True), tilted_gaussian()
    grid = make_grid("trailing", 300, 300)
    denoiser = target.denoiser(schedule, "v")
    zero, one = torch.zeros(2).double(), torch.eye(2).double()
    mean, covariance = exact_moments(
        lambda x, noise: ALL[name](denoiser, x, grid, noise), zero, one, [t for t, _ in grid]
    )
    torch.testing.assert_close(mean, target.mean, atol=1e-2, rtol=0)
    torch.testing.assert_close(covariance, target.covariance, atol=2e-2, rtol=0)


def test_samples_of_a_mixture_fall_in_its_modes_with_the_right_weights():
    target = Mixture(
        torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([[-2.0, 0], [0, 1.5], [2, -1]]).double(), 0.05
    )
    schedule = make_schedule("cosine", 200)
    count = 4000
    source = NoiseSource(5)
    x_T = source.normal((2,), torch.arange(count), 200).double()
    noise = source.for_samples((2,), torch.arange(count))
    grid = make_grid("uniform", 200, 50)
    for name in ("ddim", "heun", "dpmpp_2m", "ddim eta 1", "dpmpp_2m_sde"):
        samples = ALL[name](target.denoiser(schedule), x_T, grid, noise)
        nearest = torch.cdist(samples, target.means).argmin(1)
        share = torch.bincount(nearest, minlength=3) / count
        torch.testing.assert_close(share.double(), target.weights, atol=0.035, rtol=0)
        inside = (samples - target.means[nearest]).square().mean()
        assert float(inside) == pytest.approx(target.variance, rel=0.25), name


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize(
    ("objective", "zero"), [("eps", False), ("x0", False), ("v", False), ("x0", True), ("v", True)]
)
def test_eta_one_on_the_full_grid_is_the_ddpm_posterior(schedule_name, objective, zero):
    schedule, target = make_schedule(schedule_name, 60, zero_terminal_snr=zero), tilted_gaussian()
    grid = make_grid("uniform", 60, 60)
    source = NoiseSource(0)
    x_T = source.normal((2,), torch.arange(16), 60).double()
    noise = source.for_samples((2,), torch.arange(16))
    denoiser = target.denoiser(schedule, objective)
    ddim = sample_ddim(denoiser, x_T, grid, noise, eta=1.0)
    torch.testing.assert_close(ddim, sample_ddpm(denoiser, x_T, grid, noise), atol=1e-9, rtol=0)
    x = x_T
    for t in range(59, -1, -1):
        x0, _ = denoiser(x, t)
        beta = float(schedule.betas()[t])
        a, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t - 1)
        x = (a_prev**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - a_prev) * x) / (1 - a)
        if t > 0:
            x = x + ((1 - a_prev) / (1 - a) * beta) ** 0.5 * noise(t).double()
    torch.testing.assert_close(ddim, x, atol=1e-9, rtol=0)


def test_sigma_hat_is_the_larger_ddpm_variance():
    schedule, target = make_schedule("cosine", 60), tilted_gaussian()
    grid = make_grid("uniform", 60, 17)
    x_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    noise = NoiseSource(0).for_samples((2,), torch.arange(4))
    hat = sample_ddim(target.denoiser(schedule), x_T, grid, noise, eta="sigma_hat")
    large = sample_ddpm(target.denoiser(schedule), x_T, grid, noise, variance="fixed_large")
    torch.testing.assert_close(hat, large, atol=1e-10, rtol=0)


@given(
    schedule_steps=st.integers(2, 60),
    data=st.data(),
    eta=st.one_of(st.floats(0, 1), st.just("sigma_hat")),
    spacing=st.sampled_from(SPACINGS),
    name=st.sampled_from(SCHEDULES),
    objective=st.sampled_from(OBJECTIVES),
)
@settings(max_examples=60, deadline=None)
def test_last_step_adds_no_noise_for_any_grid_and_eta(schedule_steps, data, eta, spacing, name, objective):
    schedule = make_schedule(name, schedule_steps)
    grid = make_grid(spacing, schedule_steps, data.draw(st.integers(1, schedule_steps)))
    target = tilted_gaussian()
    asked, steps = [], []

    def noise(t):
        asked.append(t)
        return torch.full((3, 2), float(t)).double()

    x_T = torch.ones(3, 2).double()
    large = functools.partial(sample_ddpm, variance="fixed_large")
    for run in (functools.partial(sample_ddim, eta=eta), sample_ddpm, large, sample_dpmpp_2m_sde):
        asked.clear(), steps.clear()
        out = run(target.denoiser(schedule, objective), x_T, grid, noise, callback=steps.append)
        assert grid[-1][0] not in asked
        torch.testing.assert_close(out, steps[-1].x0, atol=1e-12, rtol=0)
        assert [(step.t, step.t_prev) for step in steps] == grid


@given(
    t=st.integers(1, 99),
    gap=st.integers(1, 99),
    name=st.sampled_from(SCHEDULES),
    eta=st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_every_eta_keeps_the_forward_marginal(t, gap, name, eta):
    """If x_t ~ q(x_t | x0), one DDIM step with the true x0 gives q(x_prev | x0) (DDIM, lemma 1)."""
    schedule = make_schedule(name, 100)
    a, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(max(t - gap, -1))
    direction_sigma, noise_sigma = ddim_sigmas(a, a_prev, eta)
    direction = max(1 - a_prev - direction_sigma**2, 0.0) ** 0.5
    assert direction**2 + noise_sigma**2 == pytest.approx(1 - a_prev, abs=1e-12)


def test_learned_variance_interpolates_between_the_fixed_ones():
    schedule, target = make_schedule("cosine", 50), tilted_gaussian()
    grid = make_grid("uniform", 50, 20)
    x_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    noise = NoiseSource(0).for_samples((2,), torch.arange(4))
    inner = target.denoiser(schedule).network

    def learned(level):
        def network(x, t, condition=None, self_condition=None):
            return torch.cat([inner(x, t), torch.full_like(x, level)], dim=1)

        return Denoiser(network, schedule, "eps", clip=None, learned_variance=True)

    for level, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        out = sample_ddpm(learned(level), x_T, grid, noise, variance="learned")
        torch.testing.assert_close(out, sample_ddpm(target.denoiser(schedule), x_T, grid, noise, variance=variance))
    one = [(20, 10)]
    small, large = (
        posterior(schedule.alpha_bar(20), schedule.alpha_bar(10)).variance,
        1 - schedule.alpha_bar(20) / schedule.alpha_bar(10),
    )
    middle = sample_ddpm(learned(0.0), x_T, one, noise, variance="learned")
    still = sample_ddpm(learned(0.0), x_T, one, lambda t: torch.zeros(4, 2), variance="learned")
    torch.testing.assert_close(middle - still, (small * large) ** 0.25 * noise(20).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [n for n in ALL if "dpmpp" not in n])
def test_run_in_two_parts_equals_the_whole_run(name):
    schedule, target = make_schedule("cosine", 100), tilted_gaussian()
    grid = make_grid("quadratic", 100, 23)
    x_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    noise = NoiseSource(0).for_samples((2,), torch.arange(4))
    middle = grid[11][0]
    whole = ALL[name](target.denoiser(schedule), x_T, grid, noise)
    early = ALL[name](target.denoiser(schedule), x_T, restrict_grid(grid, lowest=middle), noise)
    assert torch.equal(ALL[name](target.denoiser(schedule), early, restrict_grid(grid, highest=middle), noise), whole)


@pytest.mark.parametrize("name", ALL)
def test_self_conditioning_carries_the_last_estimate_of_x0(name):
    schedule, target = make_schedule("cosine", 100), tilted_gaussian()
    inner = target.denoiser(schedule).network
    given_to = []

    def network(x, t, condition=None, self_condition=None):
        given_to.append((int(t[0]), self_condition))
        return inner(x, t)

    denoiser = Denoiser(network, schedule, "eps", clip=None, self_conditioning=True)
    steps = []
    x_T = torch.ones(3, 2).double()
    noise = NoiseSource(0).for_samples((2,), torch.arange(3))
    ALL[name](denoiser, x_T, make_grid("uniform", 100, 10), noise, callback=steps.append)
    assert given_to[0][1] is None
    first_calls = dict(reversed(given_to))
    for before, after in itertools.pairwise(steps):
        if name != "heun":
            assert torch.equal(first_calls[after.t], before.x0)
    if name == "heun":
        assert torch.equal(given_to[2][1], steps[0].x0) and torch.equal(given_to[1][1], steps[0].x0)
    given_to.clear()
    ALL[name](Denoiser(network, schedule, "eps", clip=None), x_T, make_grid("uniform", 100, 10), noise)
    assert all(value is None for _, value in given_to)


@pytest.mark.parametrize("name", ALL)
def test_samples_of_a_clipped_denoiser_lie_within_its_range(name):
    schedule = make_schedule("linear", 100)
    wild = Denoiser.from_eps(lambda x, t: torch.sin(37 * x) * 3, schedule, clip=1.0)
    noise = NoiseSource(0).for_samples((5,), torch.arange(6))
    out = ALL[name](wild, 3 * noise(100), make_grid("trailing", 100, 9), noise)
    assert float(out.abs().max()) <= 1.0 + 1e-6


def test_plain_function_of_x_and_t_is_sampled_as_a_denoiser():
    schedule = make_schedule("linear", 100)
    x_T = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    grid = make_grid("leading", 100, 7)

    def eps(x_t, t):
        assert t.shape == (4,) and t.dtype == torch.int64
        return 0.3 * x_t

    expected = x_T
    for t, t_prev in grid:
        a, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        x0 = (expected - (1 - a) ** 0.5 * 0.3 * expected) / a**0.5
        expected = a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * 0.3 * expected
    torch.testing.assert_close(sample_ddim(Denoiser.from_eps(eps, schedule), x_T, grid, noise=None, eta=0.0), expected)


@pytest.mark.parametrize("name", ALL)
def test_sample_does_not_depend_on_its_batch(name):
    schedule, target = make_schedule("cosine", 100), tilted_gaussian()
    grid = make_grid("uniform", 100, 7)

    def run(indices):
        noise = NoiseSource(4).for_samples((2,), indices)
        return ALL[name](target.denoiser(schedule), noise(100).double(), grid, noise)

    everyone = run(torch.arange(64))
    for size in (1, 7):
        parts = torch.cat([run(part) for part in torch.arange(64).split(size)])
        torch.testing.assert_close(
            parts, everyone, atol=1e-12, rtol=0
        )  # the oracle's matrix products round differently for other shapes


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_is_bit_identical_in_any_batch_if_the_network_is(name, dtype):
    denoiser = Denoiser(lambda x, *_: 0.3 * x + 0.1 * x * x.abs(), make_schedule("cosine", 100), "eps")

    def run(indices):
        noise = NoiseSource(4).for_samples((2, 3, 3), indices)
        return ALL[name](denoiser, noise(100).to(dtype), make_grid("uniform", 100, 7), noise)

    everyone = run(torch.arange(64))
    for size in (1, 7):
        assert torch.equal(torch.cat([run(part) for part in torch.arange(64).split(size)]), everyone)


@pytest.mark.parametrize("name", ALL)
def test_list_of_steps_is_a_grid(name):
    schedule, target = make_schedule("cosine", 100), tilted_gaussian()
    noise, x_T = NoiseSource(4).for_samples((2,), torch.arange(3)), torch.ones(3, 2).double()
    expected = ALL[name](target.denoiser(schedule), x_T, [(90, 40), (40, 3), (3, -1)], noise)
    assert torch.equal(ALL[name](target.denoiser(schedule), x_T, [90, 40, 3], noise), expected)


def test_progress_bar_is_shown_when_asked(capsys):
    schedule, target = make_schedule("cosine", 100), tilted_gaussian()
    x_T = torch.ones(1, 2).double()
    sample_ddim(target.denoiser(schedule), x_T, make_grid("uniform", 100, 7))
    assert capsys.readouterr().err == ""
    sample_ddim(target.denoiser(schedule), x_T, make_grid("uniform", 100, 7), progress=True)
    assert "7/7" in capsys.readouterr().err


def test_bad_input_is_refused_with_the_remedy():
    schedule, target = make_schedule("cosine", 100), tilted_gaussian()
    denoiser, x_T, grid = target.denoiser(schedule), torch.ones(3, 2).double(), make_grid("uniform", 100, 5)
    with pytest.raises(ValueError, match="eta must lie in 0 to 1"):
        sample_ddim(denoiser, x_T, grid, eta=1.5)
    for sampler in (functools.partial(sample_ddim, eta=0.5), sample_ddpm, sample_dpmpp_2m_sde):
        with pytest.raises(ValueError, match="pass noise="):
            sampler(denoiser, x_T, grid)
        with pytest.raises(ValueError, match="has shape"):
            sampler(denoiser, x_T, grid, lambda t: torch.zeros(1, 2))
        with pytest.raises(ValueError, match="for_samples"):
            sampler(denoiser, x_T, grid, NoiseSource(0))
    with pytest.raises(ValueError, match="learned_variance=True"):
        sample_ddpm(denoiser, x_T, grid, torch.zeros, variance="learned")
    with pytest.raises(ValueError, match="unknown variance"):
        sample_ddpm(denoiser, x_T, grid, torch.zeros, variance="medium")
    for sampler in ALL.values():
        with pytest.raises(ValueError, match="empty grid"):
            sampler(denoiser, x_T, [], torch.zeros)
        with pytest.raises(ValueError, match="within -1 to 99"):
            sampler(denoiser, x_T, grid_from_steps([100], 200), torch.zeros)
        with pytest.raises(ValueError, match="pairs"):
            sampler(denoiser, x_T, [(9.0, -1)], torch.zeros)
        with pytest.raises(ValueError, match=r"Denoiser\.from_eps"):
            sampler(lambda x, *_: x, x_T, grid, torch.zeros)
        with pytest.raises(ValueError, match="batch of floats"):
            sampler(denoiser, torch.ones(3, 2, dtype=torch.int64), grid, torch.zeros)


def test_gaussian_oracle_agrees_with_numerical_integration():
    """Check the oracle: E[x0 | x_t] of a one-dimensional Gaussian and of a mixture, by quadrature."""
    x0 = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    for target, density in (
        (
            Gaussian(torch.tensor([0.7], dtype=torch.float64), torch.tensor([[0.4]], dtype=torch.float64)),
            torch.exp(-((x0 - 0.7) ** 2) / 0.8),
        ),
        (
            Mixture(
                torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([[-1.0], [2.0]], dtype=torch.float64), 0.2
            ),
            0.3 * torch.exp(-((x0 + 1) ** 2) / 0.4) + 0.7 * torch.exp(-((x0 - 2) ** 2) / 0.4),
        ),
    ):
        for a in (0.01, 0.4, 0.95):
            x_t = torch.tensor([[-1.1], [0.2], [1.7]]).double()
            weight = density * torch.exp(-((x_t - a**0.5 * x0) ** 2) / (2 * (1 - a)))
            expected = (weight * x0).sum(1) / weight.sum(1)
            got = target.x0_given(x_t, torch.full((3, 1), a, dtype=torch.float64))
            torch.testing.assert_close(got[:, 0], expected, atol=1e-8, rtol=0)


def with_variance(schedule, fraction=0.3):
    """Return a denoiser of the tilted Gaussian that learned a variance between the two fixed ones, (B, 2) vectors."""
    inner = tilted_gaussian().denoiser(schedule).network

    def network(x, t, condition=None, self_condition=None):
        return torch.cat([inner(x, t), (2 * fraction - 1) * torch.cos(x)], dim=1)

    return Denoiser(network, schedule, "eps", clip=None, learned_variance=True)


@pytest.mark.parametrize("variance", VARIANCES)
def test_own_loop_of_single_steps_equals_the_sampler_bit_for_bit(variance):
    schedule = make_schedule("cosine", 60)
    denoiser, grid = with_variance(schedule), make_grid("trailing", 60, 13)
    noise = NoiseSource(0).for_samples((2,), torch.arange(4))
    x_T = noise(60).double()
    x = y = x_T
    for t, t_prev in grid:
        x = ddpm_step(denoiser, denoiser(x, t), x, t, t_prev, noise, variance)
        y = ddim_step(denoiser, denoiser(y, t), t, t_prev, noise, eta="sigma_hat")
    assert torch.equal(x, sample_ddpm(denoiser, x_T, grid, noise, variance=variance))
    assert torch.equal(y, sample_ddim(denoiser, x_T, grid, noise, eta="sigma_hat"))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("t", "t_prev"), [(59, 58), (59, 20), (20, 3), (1, 0), (0, -1), (7, -1)])
def test_reverse_step_is_the_gaussian_that_the_ddpm_step_draws_from(variance, t, t_prev):
    schedule = make_schedule("cosine", 60)
    denoiser = with_variance(schedule)
    noise = NoiseSource(0).for_samples((2,), torch.arange(4))
    x_t = noise(60).double()
    prediction = denoiser(x_t, t)
    mean, log_variance = reverse_step(denoiser, prediction, x_t, t, t_prev, variance)
    assert mean.shape == log_variance.shape == x_t.shape
    expected = mean if t_prev < 0 else mean + torch.exp(0.5 * log_variance) * noise(t).double()
    drawn = ddpm_step(denoiser, prediction, x_t, t, t_prev, noise, variance)
    torch.testing.assert_close(drawn, expected, atol=1e-12, rtol=0)
    if t_prev < 0:
        torch.testing.assert_close(mean, prediction.x0, atol=1e-12, rtol=0)


def test_reverse_step_has_the_tables_of_the_published_code():
    """Improved DDPM's GaussianDiffusion: fixed_large is append(posterior_variance[1], betas[1:]), fixed_small clips the log."""
    schedule = make_schedule("linear", 50)
    denoiser, x_t = with_variance(schedule), torch.ones(3, 2).double()
    betas = schedule.betas()
    below = torch.cat([torch.ones(1).double(), schedule.alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - below) / (1 - schedule.alphas_cumprod)
    small = torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log()
    large = torch.cat([posterior_variance[1:2], betas[1:]]).log()
    fraction = (0.3 * 2 - 1) * torch.cos(x_t) / 2 + 0.5
    for t in (0, 1, 2, 30, 49):
        prediction = denoiser(x_t, t)
        expected = {"fixed_small": small[t], "fixed_large": large[t]}
        expected["learned"] = fraction * betas[t].log() + (1 - fraction) * small[t]
        for variance, value in expected.items():
            got = reverse_step(denoiser, prediction, x_t, t, t - 1, variance).log_variance
            torch.testing.assert_close(got, value.expand(3, 2), atol=1e-9, rtol=0)
    other = reverse_step(denoiser, prediction, x_t, 10, -1, "fixed_small", floor=0.25)
    torch.testing.assert_close(other.log_variance, torch.full((3, 2), math.log(0.25)).double())


def test_gradients_flow_through_single_steps():
    schedule = make_schedule("cosine", 60)
    denoiser, noise = with_variance(schedule), NoiseSource(0).for_samples((2,), torch.arange(4))
    for take in (
        lambda prediction, x: ddpm_step(denoiser, prediction, x, 30, 20, noise, "learned"),
        lambda prediction, x: ddim_step(denoiser, prediction, 30, 20, noise, 0.5),
        lambda prediction, x: sum(reverse_step(denoiser, prediction, x, 30, 20, "learned")),
    ):
        x = noise(60).double().requires_grad_()
        take(denoiser(x, 30), x).sum().backward()
        assert x.grad is not None and bool((x.grad != 0).all())


def test_bad_single_steps_are_refused_with_the_remedy():
    schedule = make_schedule("cosine", 60)
    denoiser, x_t, noise = with_variance(schedule), torch.ones(4, 2).double(), lambda t: torch.zeros(4, 2)
    prediction, plain = denoiser(x_t, 30), tilted_gaussian().denoiser(schedule)
    with pytest.raises(ValueError, match="eta must lie in 0 to 1"):
        ddim_step(denoiser, prediction, 30, 20, noise, eta=1.5)
    with pytest.raises(ValueError, match="pass noise="):
        ddpm_step(denoiser, prediction, x_t, 30, 20)
    for take in (functools.partial(ddpm_step, noise=noise), reverse_step):
        with pytest.raises(ValueError, match="goes down, got t 20 and t_prev 30"):
            take(denoiser, prediction, x_t, 20, 30)
        with pytest.raises(ValueError, match="is for images"):
            take(denoiser, prediction, x_t[:1], 30, 20)
        with pytest.raises(ValueError, match="unknown variance"):
            take(denoiser, prediction, x_t, 30, 20, variance="medium")
        with pytest.raises(ValueError, match="learned_variance=True"):
            take(plain, plain(x_t, 30), x_t, 30, 20, variance="learned")
        with pytest.raises(ValueError, match="variance_fraction"):
            take(denoiser, plain(x_t, 30), x_t, 30, 20, variance="learned")
    with pytest.raises(ValueError, match="floor is a variance above 0"):
        reverse_step(denoiser, prediction, x_t, 30, -1, floor=0.0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinity_of_a_network_is_not_clipped_to_a_colour(name, value):
    def network(x_t, t, condition, self_condition=None):
        return torch.where((t > 50).view(-1, 1), torch.full_like(x_t, value), x_t)

    noise = NoiseSource(3).for_samples((2,), torch.arange(4))
    denoiser = Denoiser(network, make_schedule("linear", 100), "eps")
    x_0 = ALL[name](denoiser, torch.zeros(4, 2), make_grid("trailing", 100, 5), noise)
    assert not bool(x_0.isfinite().any())
