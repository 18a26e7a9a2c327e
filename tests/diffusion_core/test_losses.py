"""The training loss and the variational bound: equal to what is known exactly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion_core import objectives
from diffusion_core.denoiser import Denoiser
from diffusion_core.grids import make_grid
from diffusion_core.losses import discretised_log_likelihood, training_loss, variational_bound
from diffusion_core.noise import NoiseSource
from diffusion_core.objectives import OBJECTIVES
from diffusion_core.posterior import posterior
from diffusion_core.schedules import make_schedule
from diffusion_core.weightings import WEIGHTINGS
from tests.diffusion_core.oracle import Gaussian, as_network, tilted_gaussian


def batch(schedule, count=64, dim=2):
    source = NoiseSource(0, "test")
    x0 = source.normal((dim,), torch.arange(count), 0).double()
    eps = source.normal((dim,), torch.arange(count), 1).double()
    t = (source.uniform((), torch.arange(count), 2) * schedule.num_steps).long()
    return x0, t, eps


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_weighting_means_the_same_loss_for_every_objective(weighting):
    schedule, target = make_schedule("cosine", 100), tilted_gaussian()
    x0, t, eps = batch(schedule)
    losses = [
        training_loss(
            lambda x, t, c, o=objective: as_network(target.x0_given, schedule, o)(x, t).double(),
            schedule,
            objective,
            weighting,
            x0,
            t,
            eps,
        )
        for objective in OBJECTIVES
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other.double(), losses[0].double(), rtol=2e-4, atol=1e-6)


def test_perfect_network_has_the_loss_of_the_posterior_spread():
    """E|x0 - E[x0|x_t]|^2 is the trace of the posterior covariance, C - a C (aC + 1 - a)^-1 C."""
    schedule, target = make_schedule("cosine", 100), tilted_gaussian()
    count = 40_000
    source = NoiseSource(1)
    x0 = target.mean + source.normal((2,), torch.arange(count), 0).double() @ torch.linalg.cholesky(target.covariance).T
    eps = source.normal((2,), torch.arange(count), 1).double()
    for step in (5, 50, 90):
        t = torch.full((count,), step)
        loss = training_loss(as_network(target.x0_given, schedule, "x0"), schedule, "x0", "uniform", x0, t, eps).mean()
        values = torch.linalg.eigvalsh(target.covariance)
        a = schedule.alpha_bar(step)
        expected = (values * (1 - a) / (a * values + 1 - a)).mean()
        assert float(loss) == pytest.approx(float(expected), rel=0.03)


def test_huber_is_the_squared_error_inside_delta_and_linear_outside():
    schedule = make_schedule("linear", 10)
    x0, t, eps = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2)

    def network(x, t, condition):
        return torch.tensor([[0.1, 3.0]])

    loss = training_loss(network, schedule, "eps", "snr", x0, t, eps, error="huber", huber_delta=0.5)
    assert float(loss) == pytest.approx((0.1**2 + 2 * 0.5 * (3.0 - 0.25)) / 2, rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_self_conditioning_feeds_the_detached_clamped_estimate(objective):
    schedule = make_schedule("cosine", 50)
    x0, t, eps = (value.float() if value.is_floating_point() else value for value in batch(schedule, 8))
    weight = torch.tensor(0.7, requires_grad=True)
    fed = []

    def network(x_t, t, condition, self_condition=None):
        fed.append(self_condition)
        return weight * x_t + (0.0 if self_condition is None else self_condition)

    training_loss(network, schedule, objective, "uniform", x0, t, eps, self_condition=True).sum().backward()
    alpha_bar = objectives.per_image(schedule.gather(t), x0)
    x_t = objectives.add_noise(x0, eps, alpha_bar)
    expected = objectives.to_x0(objective, 0.7 * x_t, x_t, alpha_bar).clamp(-1, 1)
    assert fed[0] is None and not fed[1].requires_grad
    torch.testing.assert_close(fed[1], expected)
    residual = weight.detach() * x_t + expected - objectives.target(objective, x0, eps, alpha_bar)
    factor = {"eps": 1 / schedule.snr(t), "x0": torch.ones(8), "v": 1 / (schedule.snr(t) + 1)}[objective]
    gradient = (factor.float() * (2 * residual * x_t).mean(1)).sum()
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-4)


def test_hybrid_loss_trains_the_variance_alone_through_the_bound():
    schedule = make_schedule("cosine", 20)
    x0, t, eps = (value.float() if value.is_floating_point() else value for value in batch(schedule, 40))
    x0 = (x0 / 3).clamp(-1, 1)
    mean_weight = torch.tensor(0.7, requires_grad=True)
    raw_variance = torch.tensor(0.3, requires_grad=True)

    def network(x_t, t, condition):
        return torch.cat([mean_weight * x_t, raw_variance.expand_as(x_t)], dim=1)

    def plain(x_t, t, condition):
        return mean_weight * x_t

    hybrid = training_loss(network, schedule, "eps", "snr", x0, t, eps, learned_variance=True, bound_weight=0.1)
    simple = training_loss(plain, schedule, "eps", "snr", x0, t, eps)
    one, two = (torch.autograd.grad(loss.sum(), mean_weight, retain_graph=True)[0] for loss in (hybrid, simple))
    torch.testing.assert_close(one, two)
    gradient = torch.autograd.grad(hybrid.sum(), raw_variance)[0]
    assert torch.isfinite(gradient) and gradient != 0
    # the added term is the bound's own: the same x_t through variational_bound
    denoiser = Denoiser(
        lambda x, t: torch.cat([0.7 * x, torch.full_like(x, 0.3)], dim=1),
        schedule,
        "eps",
        clip=None,
        learned_variance=True,
    )
    bound = variational_bound(denoiser, x0, lambda step: eps, variance="learned")
    table = torch.cat([bound.steps, bound.decoder[:, None]], dim=1).flip(1)
    expected = table.gather(1, t[:, None])[:, 0] * 0.1 * 20
    torch.testing.assert_close((hybrid - simple).double(), expected, rtol=1e-4, atol=1e-5)


def quadrature_noise(step):
    """+1 and -1 for one image each: exact for the expectation of anything quadratic in the noise."""
    return torch.tensor([[1.0], [-1.0]]).double()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule_name", ["linear", "cosine", "sigmoid"])
def test_bound_is_the_exact_likelihood_where_the_reverse_step_is_exact(schedule_name, objective):
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
    """Any Gaussian: a network that learned the true reverse variance reaches -log p(x0), on a sub-grid as well."""
    schedule = make_schedule("cosine", 50)
    target = Gaussian(torch.tensor([0.4]).double(), torch.tensor([[variance]], dtype=torch.float64))
    mean_of = as_network(target.x0_given, schedule, "eps")
    grid = make_grid("trailing", 50, num_steps)
    below = dict(grid)
    last_small = posterior(*(schedule.alpha_bar(t) for t in grid[-2])).variance

    def network(x_t, t):
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
        # the top level is not exactly N(0, 1): the prior's KL is to N(0, 1), as the model starts there; correct for it
        a = schedule.alpha_bar(grid[0][0])
        top = a * variance + 1 - a
        second = a * value**2 + 1 - a
        mean_shift = second - 2 * a * value * float(target.mean) + a * float(target.mean) ** 2
        gap = 0.5 * (second - mean_shift / top - math.log(top))
        assert float(bound.total.mean()) == pytest.approx((-log_density + gap) / math.log(2), abs=1e-9)


def test_bound_adds_up_to_its_terms_and_its_prior_is_the_kl_to_a_standard_normal():
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


def test_loss_is_taken_in_float32_under_autocast():
    schedule = make_schedule("cosine", 50)
    x0, t, eps = (value.float() if value.is_floating_point() else value for value in batch(schedule, 16, 8))
    layer = torch.nn.Linear(8, 8)

    def network(x, t, condition):
        return layer(x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = training_loss(network, schedule, "eps", "snr", x0, t, eps)
        output = layer(objectives.add_noise(x0, eps, objectives.per_image(schedule.gather(t), x0)))
    assert loss.dtype == torch.float32 and output.dtype == torch.bfloat16
    torch.testing.assert_close(loss, F.mse_loss(output.float(), eps, reduction="none").mean(1))


def test_bad_input_is_refused_with_the_remedy():
    schedule, target = make_schedule("cosine", 50), tilted_gaussian()
    x0, t, eps = batch(schedule, 4)
    network = as_network(target.x0_given, schedule, "eps")
    with pytest.raises(ValueError, match="error must be one of"):
        training_loss(network, schedule, "eps", "snr", x0, t, eps, error="l1")
    with pytest.raises(ValueError, match="must return 4 channels"):
        training_loss(network, schedule, "eps", "snr", x0, t, eps, learned_variance=True)
    with pytest.raises(ValueError, match="use objective 'v' or 'x0'"):
        training_loss(network, make_schedule("linear", 50, zero_terminal_snr=True), "eps", "snr", x0, t, eps)
    for steps, message in ((t - 60, "training steps"), (t + 60, "-1 to 49"), (t[:1], "one step an image")):
        with pytest.raises(ValueError, match=message):
            training_loss(network, schedule, "eps", "snr", x0, steps, eps)
    with pytest.raises(ValueError, match="whole numbers"):
        training_loss(network, schedule, "eps", "snr", x0, t.double(), eps)
    with pytest.raises(ValueError, match="eps as x0"):
        training_loss(network, schedule, "eps", "snr", x0, t, eps[:1])
    with pytest.raises(ValueError, match="batch of floats"):
        training_loss(network, schedule, "eps", "snr", x0.to(torch.uint8), t, eps)
    with pytest.raises(ValueError, match="does not take"):
        training_loss(network, schedule, "eps", "snr", x0, t, eps, weighting_options={"gamma_ray": 1.0})
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]"):
        variational_bound(target.denoiser(schedule), 100 * x0, lambda t: eps)
    with pytest.raises(ValueError, match="unknown weighting"):
        training_loss(network, schedule, "eps", "best", x0, t, eps)
    with pytest.raises(ValueError, match="learned_variance=True"):
        variational_bound(target.denoiser(schedule), x0, lambda t: eps, variance="learned")
    with pytest.raises(ValueError, match="must reach the clean image"):
        variational_bound(target.denoiser(schedule), x0.clamp(-1, 1), lambda t: eps, grid=[(20, 10)])
    with pytest.raises(ValueError, match="decoder"):
        variational_bound(target.denoiser(schedule), x0, lambda t: eps, decoder="laplace")


def test_plain_function_can_be_trained():
    schedule = make_schedule("cosine", 50)
    x0, t, eps = batch(schedule, 4)
    with_condition = training_loss(lambda x, t, c, self_condition=None: 0.3 * x, schedule, "eps", "snr", x0, t, eps)
    assert torch.equal(training_loss(lambda x, t: 0.3 * x, schedule, "eps", "snr", x0, t, eps), with_condition)
