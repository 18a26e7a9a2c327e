"""The variational bound against exact likelihoods."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_core.bound_terms import decoder_bits, discretised_log_likelihood
from diffusion_core.denoiser import Denoiser
from diffusion_core.grids import make_grid
from diffusion_core.likelihood import variational_bound
from diffusion_core.noise import NoiseSource
from diffusion_core.objectives import OBJECTIVES, add_noise
from diffusion_core.posterior import posterior
from diffusion_core.samplers import reverse_step
from diffusion_core.schedules import make_schedule
from tests.diffusion_core.oracle import Gaussian, as_network, tilted_gaussian


def quadrature_noise(step):
    """Return +1 and -1 for one image each: their mean is exact for anything quadratic in the noise."""
    return torch.tensor([[1.0], [-1.0]]).double()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule_name", ["linear", "cosine", "sigmoid"])
def test_bound_is_the_exact_likelihood_if_the_reverse_step_is_exact(schedule_name, objective):
    """For x0 ~ N(0, 1) the true reverse step has variance beta: fixed_large is exact, so the bound is -log p(x0)."""
    schedule = make_schedule(schedule_name, 50)
    target = Gaussian(torch.zeros(1).double(), torch.eye(1).double())
    for value in (-2.0, 0.0, 0.6, 1.5):
        x0 = torch.full((2, 1), value, dtype=torch.float64)
        bound = variational_bound(target.denoiser(schedule, objective), x0, quadrature_noise, decoder="density")
        exact = (0.5 * math.log(2 * math.pi) + 0.5 * value**2) / math.log(2)
        assert float(bound.total.mean()) == pytest.approx(exact, abs=1e-9)
        smaller = variational_bound(
            target.denoiser(schedule, objective), x0, quadrature_noise, decoder="density", variance="fixed_small"
        )
        assert abs(float(smaller.total.mean()) - exact) > 1e-3


@pytest.mark.parametrize("variance", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("num_steps", [4, 50])
def test_bound_with_the_exact_learned_variance_is_the_exact_likelihood(variance, num_steps):
    """For any Gaussian a network that learned the true reverse variance reaches -log p(x0), also on a sub-grid."""
    schedule = make_schedule("cosine", 50)
    target = Gaussian(torch.tensor([0.4]).double(), torch.tensor([[variance]], dtype=torch.float64))
    mean_of = as_network(target.x0_given, schedule, "eps")
    grid = make_grid("trailing", 50, num_steps)
    below = dict(grid)
    last_small = posterior(*(schedule.alpha_bar(t) for t in grid[-2])).variance

    def network(x_t, t, condition, self_condition=None):
        step = int(t[0])
        a, a_prev = schedule.alpha_bar(step), schedule.alpha_bar(below[step])
        true = posterior(a, a_prev)
        spread = variance * (1 - a) / (a * variance + 1 - a)
        exact = true.variance + true.x0**2 * spread
        small, large = (true.variance or last_small), 1 - a / a_prev
        fraction = (math.log(exact) - math.log(small)) / (math.log(large) - math.log(small))
        return torch.cat([mean_of(x_t, t), torch.full_like(x_t, 2 * fraction - 1)], dim=1)

    denoiser = Denoiser(network, schedule, "eps", clip=None, learned_variance=True)
    for value in (-0.5, 0.4, 1.0):
        x0 = torch.full((2, 1), value, dtype=torch.float64)
        bound = variational_bound(denoiser, x0, quadrature_noise, grid=grid, variance="learned", decoder="density")
        log_density = -0.5 * math.log(2 * math.pi * variance) - (value - float(target.mean)) ** 2 / (2 * variance)
        # the model starts at N(0, 1), but the top level is not exactly N(0, 1): correct for the difference
        a = schedule.alpha_bar(grid[0][0])
        top = a * variance + 1 - a
        second = a * value**2 + 1 - a
        mean_shift = second - 2 * a * value * float(target.mean) + a * float(target.mean) ** 2
        gap = 0.5 * (second - mean_shift / top - math.log(top))
        assert float(bound.total.mean()) == pytest.approx((-log_density + gap) / math.log(2), abs=1e-9)


def test_bound_is_the_sum_of_its_terms_and_its_prior_is_the_kl_to_a_standard_normal():
    schedule, target = make_schedule("linear", 30), tilted_gaussian()
    x0 = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    noise = NoiseSource(0).for_samples((2,), torch.arange(5))
    bound = variational_bound(target.denoiser(schedule), x0, noise, decoder="density")
    assert bound.steps.shape == (5, 29)
    torch.testing.assert_close(bound.total, bound.prior + bound.steps.sum(1) + bound.decoder)
    a = schedule.alpha_bar(29)
    normal = torch.distributions.Normal(a**0.5 * x0, (1 - a) ** 0.5)
    standard = torch.distributions.Normal(torch.zeros(1).double(), 1.0)
    kl = torch.distributions.kl_divergence(normal, standard).mean(1) / math.log(2)
    torch.testing.assert_close(bound.prior, kl)
    assert bool((bound.steps >= 0).all())


@pytest.mark.parametrize("deviation", [1e-3, 0.02, 0.5, 30.0])
def test_probabilities_of_all_levels_sum_to_one(deviation):
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    for mean in (-1.3, -0.2, 0.999):
        log_likelihood = discretised_log_likelihood(levels, torch.full_like(levels, mean), 2 * math.log(deviation))
        assert float(log_likelihood.exp().sum()) == pytest.approx(1.0, abs=1e-9)
        assert bool(torch.isfinite(log_likelihood).all())


def test_decoder_agrees_with_the_normal_density_for_a_wide_gaussian():
    x0 = torch.full((1, 1), 2 * 100 / 255 - 1, dtype=torch.float64)
    density = torch.distributions.Normal(torch.zeros(1).double(), 0.3).log_prob(x0) + math.log(2 / 255)
    assert float(discretised_log_likelihood(x0, torch.zeros(1, 1).double(), 2 * math.log(0.3))) == pytest.approx(
        float(density), abs=1e-4
    )


def test_bad_input_is_refused_with_the_remedy():
    schedule = make_schedule("cosine", 50)
    denoiser = tilted_gaussian().denoiser(schedule)
    source = NoiseSource(0, "test")
    x0, eps = (source.normal((2,), torch.arange(4), step).double() for step in (0, 1))
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]"):
        variational_bound(denoiser, 100 * x0, lambda t: eps)
    with pytest.raises(ValueError, match="learned_variance=True"):
        variational_bound(denoiser, x0, lambda t: eps, variance="learned")
    with pytest.raises(ValueError, match="must reach the clean image"):
        variational_bound(denoiser, x0.clamp(-1, 1), lambda t: eps, grid=[(20, 10)])
    with pytest.raises(ValueError, match="decoder"):
        variational_bound(denoiser, x0, lambda t: eps, decoder="laplace")


def chain_of_perfect_estimates(num_steps=1000):
    """Return (schedule, denoiser, images of 256 levels): the denoiser's estimate of x0 is x0 itself."""
    schedule = make_schedule("linear", num_steps)
    levels = torch.linspace(0, 255, 12, dtype=torch.float64).round()
    x0 = (levels / 127.5 - 1).view(4, 3)

    def network(x_t, t, condition=None, self_condition=None):
        return x0

    return schedule, Denoiser(network, schedule, "x0", clip=None), x0


def bits_of_a_level(x0, variance):
    """Return -log2 of the probability of an 8-bit level under a Gaussian around it, mean over each image's dimensions."""
    half = math.erf(1 / 255 / math.sqrt(2 * variance))
    inner, outer = -math.log2(half), -math.log2(0.5 + half / 2)
    edge = (x0.abs() == 1).double()
    return (edge * outer + (1 - edge) * inner).mean(dim=1)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_decoder_has_the_posterior_variance_of_step_1_as_in_the_published_code(variance):
    schedule, denoiser, x0 = chain_of_perfect_estimates()
    grid = [999, 500, 20, 1, 0]  # the other steps add nothing to the decoder
    noise = NoiseSource(0).for_samples((3,), torch.arange(4))
    published = variational_bound(denoiser, x0, noise, variance=variance, grid=grid)
    wide = variational_bound(denoiser, x0, noise, variance=variance, grid=grid, decoder_variance="beta")
    betas = schedule.betas()
    second = float(betas[1] * (1 - schedule.alpha_bar(0)) / (1 - schedule.alpha_bar(1)))
    torch.testing.assert_close(published.decoder, bits_of_a_level(x0, second), atol=1e-9, rtol=0)
    torch.testing.assert_close(wide.decoder, bits_of_a_level(x0, float(betas[0])), atol=1e-9, rtol=0)
    assert torch.equal(published.steps, wide.steps) and torch.equal(published.prior, wide.prior)
    same = variational_bound(denoiser, x0, noise, variance=variance, grid=grid, decoder_variance="posterior")
    assert torch.equal(published.total, same.total)
    inside = (x0.abs() < 1).all(dim=1)
    gap = (wide.total - published.total)[inside]
    assert bool((gap > 0.38).all() and (gap < 0.43).all()), gap  # 2.186 and 1.783 bits/dim in the published comparison


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_decoder_is_the_last_reverse_step(variance):
    schedule, target = make_schedule("linear", 30), tilted_gaussian()
    denoiser = target.denoiser(schedule)
    x0 = (torch.linspace(0, 255, 10).round() / 127.5 - 1).double().view(5, 2)
    noise = NoiseSource(0).for_samples((2,), torch.arange(5))
    for grid in (None, make_grid("trailing", 30, 7)):
        last, before = ((0, -1), (1, 0)) if grid is None else (grid[-1], grid[-2])
        floor = posterior(*(schedule.alpha_bar(level) for level in before)).variance
        x_t = add_noise(x0, noise(last[0]).double(), schedule.alpha_bar(last[0]))
        step = reverse_step(denoiser, denoiser(x_t, last[0]), x_t, *last, variance, floor=floor)
        bits = decoder_bits(x0, step.mean, step.log_variance, "discretised")
        bound = variational_bound(denoiser, x0, noise, variance=variance, grid=grid)
        torch.testing.assert_close(bound.decoder, bits, atol=1e-9, rtol=1e-9)
        if grid is None:
            assert torch.equal(
                reverse_step(denoiser, denoiser(x_t, 0), x_t, 0, -1, variance).log_variance, step.log_variance
            )


def test_density_keeps_the_variance_of_the_chain_unless_told_otherwise():
    schedule, denoiser, x0 = chain_of_perfect_estimates(30)
    noise = NoiseSource(0).for_samples((3,), torch.arange(4))
    betas = schedule.betas()
    second = float(betas[1] * (1 - schedule.alpha_bar(0)) / (1 - schedule.alpha_bar(1)))
    for variance, own in (("fixed_large", float(betas[0])), ("fixed_small", second)):
        for asked, expected in ((None, own), ("beta", float(betas[0])), ("posterior", second)):
            bound = variational_bound(denoiser, x0, noise, variance=variance, decoder="density", decoder_variance=asked)
            exact = torch.full((4,), 0.5 * math.log2(2 * math.pi * expected), dtype=torch.float64)
            torch.testing.assert_close(bound.decoder, exact, atol=1e-9, rtol=0)


def test_decoder_variance_that_does_not_apply_is_refused():
    schedule, denoiser, x0 = chain_of_perfect_estimates(30)
    with pytest.raises(ValueError, match="must be posterior or beta"):
        variational_bound(denoiser, x0, lambda t: x0, decoder_variance="large")
    learned = Denoiser(lambda x, *_: torch.cat([x, x], 1), schedule, "eps", learned_variance=True)
    for choice in ("beta", "posterior"):
        with pytest.raises(ValueError, match="omit it"):
            variational_bound(learned, x0, lambda t: x0, variance="learned", decoder_variance=choice)
