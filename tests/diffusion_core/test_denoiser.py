"""The denoiser: clipping, thresholding, learned variance, and the call form of a network."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffusion_core.denoiser import Denoiser, Prediction, threshold_dynamically
from diffusion_core.objectives import OBJECTIVES, eps_from_x0
from diffusion_core.schedules import make_schedule
from tests.diffusion_core.oracle import tilted_gaussian

SCHEDULE = make_schedule("cosine", 100)


def noisy():
    return torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("t", [1, 50, 98])
def test_prediction_is_consistent_and_unpacks_as_x0_and_eps(objective, t):
    x_t = noisy()
    prediction = Denoiser(lambda x, *_: torch.sin(x), SCHEDULE, objective, clip=None)(x_t, t)
    x0, eps = prediction
    assert x0 is prediction.x0 and eps is prediction.eps and prediction.variance_fraction is None
    a = SCHEDULE.alpha_bar(t)
    torch.testing.assert_close(a**0.5 * x0 + (1 - a) ** 0.5 * eps, x_t, atol=1e-4, rtol=1e-4)
    assert Prediction(x0, eps).x0 is x0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_eps_is_computed_again_from_the_clipped_x0_unless_switched_off(objective):
    x_t = noisy()

    def network(x, t, condition, self_condition=None):
        return torch.sin(3 * x) * 2

    clipped = Denoiser(network, SCHEDULE, objective)(x_t, 60)
    free = Denoiser(network, SCHEDULE, objective, clip=None)(x_t, 60)
    kept = Denoiser(network, SCHEDULE, objective, rederive_eps=False)(x_t, 60)
    assert float(free.x0.abs().max()) > 1.0
    assert torch.equal(clipped.x0, free.x0.clamp(-1, 1)) and torch.equal(kept.x0, clipped.x0)
    assert torch.equal(kept.eps, free.eps)
    torch.testing.assert_close(clipped.eps, eps_from_x0(clipped.x0, x_t, SCHEDULE.alpha_bar(60)))


def test_dynamic_thresholding_scales_by_the_percentile_of_each_image():
    x0 = torch.linspace(-4, 4, 101).view(1, 1, 101).repeat(2, 1, 1)
    x0[1] *= 0.1
    out = threshold_dynamically(x0, 0.5)
    # the median of |x0| is 2.0: values beyond it reach the bound, values within it are halved
    torch.testing.assert_close(out[0], (x0[0] / 2.0).clamp(-1, 1))
    assert torch.equal(out[1], x0[1]), "an image within the range does not change"
    denoiser = Denoiser(lambda x, *_: x, SCHEDULE, "x0", clip=1.0, dynamic_percentile=0.5)
    torch.testing.assert_close(denoiser(x0, 40).x0, out)
    torch.testing.assert_close(denoiser(x0, 40).eps, eps_from_x0(out, x0, SCHEDULE.alpha_bar(40)))


def test_learned_variance_is_split_off_and_mapped_to_a_fraction():
    def network(x, t, condition, self_condition=None):
        return torch.cat([0.1 * x, torch.full_like(x, -0.5)], dim=1)

    denoiser = Denoiser(network, SCHEDULE, "eps", clip=None, learned_variance=True)
    prediction = denoiser(noisy(), 30)
    torch.testing.assert_close(prediction.eps, 0.1 * noisy())
    assert prediction.variance_fraction is not None
    torch.testing.assert_close(prediction.variance_fraction, torch.full_like(noisy(), 0.25))
    with pytest.raises(ValueError, match="3 channels with learned_variance=False"):
        Denoiser(network, SCHEDULE, "eps")(noisy(), 30)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_image_is_read_at_its_own_level_if_the_network_is_called_with_another_step(objective):
    target = tilted_gaussian()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    denoiser = target.denoiser(SCHEDULE, objective)
    x0, eps = denoiser(x, 40, level=20)
    a = SCHEDULE.alpha_bar(20)
    torch.testing.assert_close(a**0.5 * x0 + (1 - a) ** 0.5 * eps, x, atol=1e-9, rtol=0)
    if objective != "v":  # eps is that of the step that the network was called with
        told = denoiser(x, 40)
        torch.testing.assert_close(eps, told.eps, atol=1e-9, rtol=0)
    clean = denoiser(x, 1, level=-1)
    assert clean.x0 is x and bool(torch.isfinite(clean.eps).all())


def test_network_is_called_with_the_condition_and_the_self_condition():
    calls = []

    def full(x, t, condition, self_condition=None):
        assert t.shape == (6,) and t.dtype == torch.int64
        calls.append((condition, self_condition))
        return x

    class Module(torch.nn.Module):
        def forward(self, x, t, condition=None, self_condition=None):
            return full(x, t, condition, self_condition)

    for network in (full, Module(), lambda x, t, c, own: full(x, t, c, own)):
        Denoiser(network, SCHEDULE, "eps")(noisy(), 3, "condition", noisy())
        assert calls[-1][0] == "condition" and torch.equal(calls[-1][1], noisy())
        Denoiser(network, SCHEDULE, "eps")(noisy(), 3)
        assert calls[-1] == (None, None)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_plain_function_gives_the_prediction_of_a_network_with_its_objective(objective):
    wrap = {"eps": Denoiser.from_eps, "x0": Denoiser.from_x0, "v": Denoiser.from_v}[objective]
    for clip in (None, 0.7):
        plain = wrap(lambda x, t: torch.sin(x + t.view(-1, 1, 1, 1)), SCHEDULE, clip=clip)(noisy(), 40)
        network = Denoiser(lambda x, t, *_: torch.sin(x + t.view(-1, 1, 1, 1)), SCHEDULE, objective, clip=clip)
        assert torch.equal(plain.x0, network(noisy(), 40).x0) and torch.equal(plain.eps, network(noisy(), 40).eps)


@pytest.mark.parametrize("wrap", [Denoiser.from_eps, Denoiser.from_x0, Denoiser.from_v])
def test_condition_never_reaches_the_default_argument_of_a_plain_function(wrap):
    def closure(x, t, scale=2.0, offset=0.0):
        return scale * x + offset

    denoiser = wrap(closure, SCHEDULE)
    assert torch.isfinite(denoiser(noisy(), 3).x0).all()
    for arguments, name in ((("condition",), "condition"), ((None, noisy()), "self_condition")):
        with pytest.raises(ValueError, match=f"a {name} was given"):
            denoiser(noisy(), 3, *arguments)


@pytest.mark.parametrize("output", [{"sample": torch.zeros(6, 3, 4, 4)}, SimpleNamespace(sample=torch.zeros(1))])
def test_network_that_returns_no_tensor_is_refused_with_the_remedy(output):
    with pytest.raises(ValueError, match=r"not a tensor.*output\.sample"):
        Denoiser(lambda *_: output, SCHEDULE, "eps")(noisy(), 3)


def test_bad_options_are_refused_with_the_remedy():
    def network(x, t, condition, self_condition=None):
        return x

    with pytest.raises(ValueError, match="unknown objective"):
        Denoiser(network, SCHEDULE, "noise")
    with pytest.raises(ValueError, match="use objective 'v' or 'x0'"):
        Denoiser(network, make_schedule("linear", 10, zero_terminal_snr=True), "eps")
    with pytest.raises(ValueError, match="clip must be above 0"):
        Denoiser(network, SCHEDULE, "eps", clip=0.0)
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        Denoiser(network, SCHEDULE, "eps", dynamic_percentile=99.5)
    with pytest.raises(ValueError, match="set clip"):
        Denoiser(network, SCHEDULE, "eps", clip=None, dynamic_percentile=0.995)
    with pytest.raises(ValueError, match="outside the schedule"):
        Denoiser(network, SCHEDULE, "eps")(noisy(), 100)
    with pytest.raises(ValueError, match="the network returned"):
        Denoiser(lambda x, *_: x[:, :1], SCHEDULE, "eps")(noisy(), 5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sample", ["heun", "dpmpp_2m"])
def test_network_with_one_output_buffer_gives_the_same_images(objective, sample):
    """CUDA graphs write every output of a network to the same memory."""
    from diffusion_core import samplers
    from diffusion_core.grids import make_grid

    buffer = torch.empty_like(noisy())

    def network(x_t, t, condition, self_condition=None):
        return 0.3 * x_t + 0.01 * t.view(-1, 1, 1, 1)

    def static_network(x_t, t, condition, self_condition=None):
        return buffer.copy_(network(x_t, t, condition))

    function = {"heun": samplers.sample_heun, "dpmpp_2m": samplers.sample_dpmpp_2m}[sample]
    grid = make_grid("trailing", SCHEDULE.num_steps, 5)
    images = [
        function(Denoiser(each, SCHEDULE, objective, clip=None), noisy(), grid) for each in (network, static_network)
    ]
    assert torch.equal(*images)
