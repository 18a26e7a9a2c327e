"""The training loss against exact values."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from diffusion_core import objectives
from diffusion_core.denoiser import Denoiser
from diffusion_core.likelihood import variational_bound
from diffusion_core.losses import training_loss
from diffusion_core.noise import NoiseSource
from diffusion_core.objectives import OBJECTIVES
from diffusion_core.schedules import make_schedule
from diffusion_core.weightings import WEIGHTINGS
from tests.conftest import ROOT
from tests.diffusion_core.oracle import as_network, tilted_gaussian


def batch(schedule, count=64, dim=2):
    source = NoiseSource(0, "test")
    x0 = source.normal((dim,), torch.arange(count), 0).double()
    eps = source.normal((dim,), torch.arange(count), 1).double()
    t = (source.uniform((), torch.arange(count), 2) * schedule.num_steps).long()
    return x0, t, eps


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weighting_gives_the_same_loss_for_every_objective(weighting):
    schedule, target = make_schedule("cosine", 100), tilted_gaussian()
    x0, t, eps = batch(schedule)
    losses = [
        training_loss(
            as_network(target.x0_given, schedule, objective),
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

    def network(x, t, condition, self_condition=None):
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


def test_bound_term_of_the_hybrid_loss_trains_only_the_variance():
    schedule = make_schedule("cosine", 20)
    x0, t, eps = (value.float() if value.is_floating_point() else value for value in batch(schedule, 40))
    x0 = (x0 / 3).clamp(-1, 1)
    mean_weight = torch.tensor(0.7, requires_grad=True)
    raw_variance = torch.tensor(0.3, requires_grad=True)

    def network(x_t, t, condition, self_condition=None):
        return torch.cat([mean_weight * x_t, raw_variance.expand_as(x_t)], dim=1)

    def plain(x_t, t, condition, self_condition=None):
        return mean_weight * x_t

    hybrid = training_loss(network, schedule, "eps", "snr", x0, t, eps, learned_variance=True, bound_weight=0.1)
    simple = training_loss(plain, schedule, "eps", "snr", x0, t, eps)
    one, two = (torch.autograd.grad(loss.sum(), mean_weight, retain_graph=True)[0] for loss in (hybrid, simple))
    torch.testing.assert_close(one, two)
    gradient = torch.autograd.grad(hybrid.sum(), raw_variance)[0]
    assert torch.isfinite(gradient) and gradient != 0
    # the added term equals the bound's term for the same x_t
    denoiser = Denoiser(
        lambda x, *_: torch.cat([0.7 * x, torch.full_like(x, 0.3)], dim=1),
        schedule,
        "eps",
        clip=None,
        learned_variance=True,
    )
    bound = variational_bound(denoiser, x0, lambda step: eps, variance="learned")
    table = torch.cat([bound.steps, bound.decoder[:, None]], dim=1).flip(1)
    expected = table.gather(1, t[:, None])[:, 0] * 0.1 * 20
    torch.testing.assert_close((hybrid - simple).double(), expected, rtol=1e-4, atol=1e-5)


def test_loss_is_computed_in_float32_under_autocast():
    schedule = make_schedule("cosine", 50)
    x0, t, eps = (value.float() if value.is_floating_point() else value for value in batch(schedule, 16, 8))
    layer = torch.nn.Linear(8, 8)

    def network(x, t, condition, self_condition=None):
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
    for steps, message in ((t - 60, "training steps"), (t + 60, "-1 to 49"), (t[:1], "one step per image")):
        with pytest.raises(ValueError, match=message):
            training_loss(network, schedule, "eps", "snr", x0, steps, eps)
    with pytest.raises(ValueError, match="whole numbers"):
        training_loss(network, schedule, "eps", "snr", x0, t.double(), eps)
    with pytest.raises(ValueError, match="eps the shape of x0"):
        training_loss(network, schedule, "eps", "snr", x0, t, eps[:1])
    with pytest.raises(ValueError, match="batch of floats"):
        training_loss(network, schedule, "eps", "snr", x0.to(torch.uint8), t, eps)
    with pytest.raises(ValueError, match="does not take"):
        training_loss(network, schedule, "eps", "snr", x0, t, eps, weighting_options={"gamma_ray": 1.0})
    with pytest.raises(ValueError, match="unknown weighting"):
        training_loss(network, schedule, "eps", "best", x0, t, eps)


@pytest.mark.parametrize("self_condition", [False, True])
def test_network_that_returns_no_tensor_is_refused_with_the_remedy(self_condition):
    schedule = make_schedule("cosine", 50)
    with pytest.raises(ValueError, match=r"returned dict, not a tensor.*output\.sample"):
        training_loss(
            lambda x, *_: {"sample": x}, schedule, "eps", "snr", *batch(schedule, 4), self_condition=self_condition
        )


def test_loss_does_not_import_the_sampling_modules():
    """A change there must not change the identity of the code that trains."""
    names = ("denoiser", "grids", "samplers", "likelihood", "guidance", "artifact")
    program = (
        "import sys, diffusion_core.losses;"
        f"print([name for name in {names} if 'diffusion_core.' + name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
