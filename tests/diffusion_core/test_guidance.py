"""Guidance against the tilted distribution, and each option against its definition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffusion_core.denoiser import Denoiser
from diffusion_core.grids import make_grid
from diffusion_core.guidance import Autoguidance, ClassifierFreeGuidance, extrapolate, steps_between_sigmas
from diffusion_core.objectives import OBJECTIVES, eps_from_x0, target
from diffusion_core.samplers import sample_ddim
from diffusion_core.schedules import make_schedule
from tests.diffusion_core.oracle import Gaussian, as_network

SCHEDULE = make_schedule("cosine", 1000)
CONDITIONAL = Gaussian(torch.tensor([0.8], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64))
UNCONDITIONAL = Gaussian(torch.tensor([-0.2], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64))


def model(objective, calls=None):
    """Return a network for which condition 0 is the class and 1 the null."""

    def network(x_t, t, condition, self_condition=None):
        if calls is not None:
            calls.append(condition)
        alpha_bar = SCHEDULE.gather(t).view(-1, 1)
        each = torch.stack([CONDITIONAL.x0_given(x_t, alpha_bar), UNCONDITIONAL.x0_given(x_t, alpha_bar)])
        x0 = each[condition, torch.arange(len(x_t))]
        return target(objective, x0, eps_from_x0(x0, x_t, alpha_bar), alpha_bar)

    return network


def ones():
    return torch.zeros(9, dtype=torch.int64)


def x_t():
    return torch.linspace(-3, 3, 9, dtype=torch.float64).view(-1, 1)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("t", [20, 500, 950])
def test_guided_eps_is_the_score_of_the_tilted_distribution(objective, scale, t):
    """-eps / sqrt(1 - a) = d/dx log p(x)^(1 - w) p(x | c)^w, by central differences of the two Gaussian densities."""
    a = SCHEDULE.alpha_bar(t)

    def log_density(x, part):
        mean, covariance = part.marginal(a)
        return -((x - mean) ** 2) / (2 * covariance[0, 0])

    def tilted(x):
        return (1 - scale) * log_density(x, UNCONDITIONAL) + scale * log_density(x, CONDITIONAL)

    h = 1e-4
    score = (tilted(x_t() + h) - tilted(x_t() - h)) / (2 * h)
    guided = ClassifierFreeGuidance(model(objective), torch.tensor([1]), scale)
    _, eps = Denoiser(guided, SCHEDULE, objective, clip=None)(x_t(), t, ones())
    torch.testing.assert_close(-eps / (1 - a) ** 0.5, score, atol=1e-6, rtol=1e-6)


def test_guided_samples_follow_the_flow_of_the_tilted_gaussian():
    """With one shared variance C the tilted marginal is N(m0 + w (m1 - m0), C) at every level, so sampling must end there."""
    shared = torch.tensor([[0.3]], dtype=torch.float64)
    parts = [Gaussian(torch.tensor([m], dtype=torch.float64), shared) for m in (0.5, -0.1)]

    def network(x, t, condition, self_condition=None):
        each = torch.stack([as_network(part.x0_given, SCHEDULE, "eps")(x, t) for part in parts])
        return each[condition, torch.arange(len(x))]

    scale = 2.5
    guided = Denoiser(ClassifierFreeGuidance(network, torch.tensor([1]), scale), SCHEDULE, "eps", clip=None)
    out = sample_ddim(guided, x_t(), make_grid("uniform", 1000, 1000), condition=ones())
    tilted = Gaussian(parts[1].mean + scale * (parts[0].mean - parts[1].mean), shared)
    torch.testing.assert_close(out, tilted.flow(x_t(), SCHEDULE.alpha_bar(999), 1.0), atol=2e-2, rtol=0)


def test_scale_one_calls_only_the_conditional_network_and_scale_zero_only_the_unconditional_one():
    calls = []
    network = model("eps", calls)
    t = torch.full((9,), 300)
    for scale, condition in ((1.0, 0), (0.0, 1)):
        calls.clear()
        out = ClassifierFreeGuidance(network, torch.tensor([1]), scale)(x_t(), t, ones())
        assert len(calls) == 1 and len(calls[0]) == 9
        assert torch.equal(out, network(x_t(), t, torch.full((9,), condition)))
    calls.clear()
    ClassifierFreeGuidance(network, torch.tensor([1]), 2.0)(x_t(), t, ones())
    assert len(calls) == 1 and len(calls[0]) == 18, "both halves in one call"


def test_rescale_restores_the_spread_of_each_image():
    strong, weak = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    full = extrapolate(strong, weak, 7.5, 1.0, 3)
    torch.testing.assert_close(full.flatten(1).std(1), strong.flatten(1).std(1))
    plain = extrapolate(strong, weak, 7.5, 0.0, 3)
    torch.testing.assert_close(plain, weak + 7.5 * (strong - weak))
    torch.testing.assert_close(extrapolate(strong, weak, 7.5, 0.7, 3), 0.7 * full + 0.3 * plain)


def test_guidance_acts_only_within_its_interval():
    low, high = steps_between_sigmas(SCHEDULE, 0.3, 5.0)
    sigma = SCHEDULE.sigma(torch.arange(1000))
    assert float(sigma[low - 1]) <= 0.3 < float(sigma[low]) and float(sigma[high]) <= 5.0 < float(sigma[high + 1])
    calls = []
    network = model("eps", calls)
    guided = ClassifierFreeGuidance(network, torch.tensor([1]), 3.0, interval=(low, high))
    always = ClassifierFreeGuidance(network, torch.tensor([1]), 3.0)
    for step, inside in ((low - 1, False), (low, True), (high, True), (high + 1, False)):
        t = torch.full((9,), step)
        expected = always(x_t(), t, ones()) if inside else network(x_t(), t, ones())
        calls.clear()
        assert torch.equal(guided(x_t(), t, ones()), expected)
        assert len(calls[0]) == (18 if inside else 9), "outside the interval the null is not evaluated"


def test_autoguidance_extrapolates_away_from_the_weaker_network():
    strong, weak = model("eps"), lambda x, t, c, self_condition=None: 0.5 * x
    t = torch.full((9,), 300)
    first, second = strong(x_t(), t, ones()), 0.5 * x_t()
    for scale in (0.0, 1.0, 2.0):
        out = Autoguidance(strong, weak, scale)(x_t(), t, ones())
        torch.testing.assert_close(out, second + scale * (first - second))
    outside = Autoguidance(strong, weak, 2.0, interval=(0, 100))(x_t(), t, ones())
    assert torch.equal(outside, first)


def test_guidance_keeps_the_learned_variance_of_the_conditional_network():
    def network(x, t, condition, self_condition=None):
        return torch.cat([x * (1.0 + condition.view(-1, 1)), condition.view(-1, 1).to(x.dtype)], dim=1)

    out = ClassifierFreeGuidance(network, torch.tensor([1]), 3.0)(x_t()[:, :1], torch.full((9,), 5), ones())
    assert torch.equal(out[:, 1], torch.zeros(9).double())


def test_self_condition_reaches_both_halves():
    seen = []

    def network(x, t, condition, self_condition=None):
        seen.append(self_condition)
        return x

    ClassifierFreeGuidance(network, torch.tensor([1]), 3.0)(x_t(), torch.full((9,), 5), ones(), 2 * x_t())
    assert torch.equal(seen[0], torch.cat([2 * x_t(), 2 * x_t()]))


def test_bad_options_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="rescale must lie in 0 to 1"):
        ClassifierFreeGuidance(model("eps"), torch.tensor([1]), 2.0, rescale=1.5)
    with pytest.raises(ValueError, match="from its lowest to its highest"):
        Autoguidance(model("eps"), model("eps"), 2.0, interval=(5, 2))
    with pytest.raises(ValueError, match="pass condition="):
        ClassifierFreeGuidance(model("eps"), torch.tensor([1]), 2.0)(x_t(), torch.full((9,), 5), None)
    for condition in ([1] * 9, torch.tensor([1])):
        with pytest.raises(ValueError, match="one condition for each of 9"):
            ClassifierFreeGuidance(model("eps"), torch.tensor([1]), 2.0)(x_t(), torch.full((9,), 5), condition)
    with pytest.raises(ValueError, match="2 nulls for 9 images"):
        ClassifierFreeGuidance(model("eps"), torch.tensor([1, 1]), 2.0)(x_t(), torch.full((9,), 5), ones())
    with pytest.raises(ValueError, match="steps_between_sigmas"):
        ClassifierFreeGuidance(model("eps"), torch.tensor([1]), 2.0, interval=(0.28, 5.42))
    with pytest.raises(ValueError, match="finite"):
        Autoguidance(model("eps"), model("eps"), float("nan"))
    with pytest.raises(ValueError, match="no step has a noise level"):
        steps_between_sigmas(SCHEDULE, 1e9, 1e10)
    mixed = ClassifierFreeGuidance(model("eps"), torch.tensor([1]), 2.0, interval=(0, 100))
    with pytest.raises(ValueError, match="at the same step"):
        mixed(x_t(), torch.arange(9) * 50, ones())


def test_denoiser_of_a_plain_function_provides_a_network_for_guidance():
    strong, weak = (Denoiser.from_eps(lambda x, t, w=w: w * x, SCHEDULE).network for w in (0.5, 0.3))
    t = torch.full((9,), 5)
    torch.testing.assert_close(Autoguidance(strong, weak, 2.0)(x_t(), t), 0.7 * x_t())
    with pytest.raises(ValueError, match="condition was given"):
        ClassifierFreeGuidance(strong, torch.tensor([1]), 2.0)(x_t(), t, ones())


def test_output_without_spread_is_not_rescaled():
    one = torch.ones(3, 1)
    assert torch.isfinite(extrapolate(one, 0.5 * one, 3.0, 0.7, 1)).all()


OUTPUTS = {
    "a dict": (lambda x: {"sample": x}, r"returned dict, not a tensor.*output\.sample"),
    "an object with .sample": (lambda x: SimpleNamespace(sample=x), r"returned SimpleNamespace.*output\.sample"),
    "a tuple": (lambda x: (x,), "returned tuple, not a tensor"),
    "another batch": (lambda x: x[:1], "one output per image"),
    "another size": (lambda x: x.repeat(1, 1, 2), "of its size"),
    "fewer channels": (lambda x: x[:, :1], "at least its channels"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_network_without_a_tensor_of_the_right_shape_is_refused_with_the_remedy(name):
    change, message = OUTPUTS[name]
    x, t, condition = torch.zeros(4, 2, 3), torch.full((4,), 5), torch.zeros(4)

    def good(x, t, condition, self_condition=None):
        return x

    def bad(x, t, condition, self_condition=None):
        return change(x)

    guided = [
        ClassifierFreeGuidance(bad, torch.zeros(1), 3.0),
        Autoguidance(bad, good, 3.0),
        Autoguidance(good, bad, 3.0),
    ]
    for network in guided:
        with pytest.raises(ValueError, match=message):
            network(x, t, condition)
    for scale in (0.0, 1.0):  # one network alone: its output is checked by the denoiser
        for network in (ClassifierFreeGuidance(bad, torch.zeros(1), scale), Autoguidance(bad, bad, scale)):
            with pytest.raises(ValueError, match="returned"):
                Denoiser(network, SCHEDULE, "eps")(x, 5, condition)
