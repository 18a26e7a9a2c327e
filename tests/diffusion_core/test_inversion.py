"""Inversion against the exact flow and the exact round trip, for every kind of condition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffusion_core.denoiser import Denoiser
from diffusion_core.grids import make_grid, restrict_grid
from diffusion_core.guidance import ClassifierFreeGuidance
from diffusion_core.inversion import (
    invert_ddim,
    invert_trajectory,
    optimise_null_condition,
    reconstruct,
    sample_with_denoisers,
)
from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.context_unet import ContextUNet
from diffusion_core.networks.unet import UNet
from diffusion_core.objectives import OBJECTIVES
from diffusion_core.samplers import sample_ddim
from diffusion_core.schedules import make_schedule
from tests.diffusion_core.oracle import Mixture, as_network, tilted_gaussian

SCHEDULE = make_schedule("cosine", 1000)
TWO_MODES = Mixture(
    torch.tensor([0.4, 0.6], dtype=torch.float64), torch.tensor([[-1.0, 0.3], [0.8, -0.2]], dtype=torch.float64), 0.2
)


def clean_images(count=32):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0)).double() * 0.6


def smooth_condition_network(x_t, t, condition, self_condition=None):
    """Return an eps that depends on x_t and on a real-valued condition, not too steeply on either."""
    time = (t.to(x_t.dtype) / 1000.0).view(-1, 1)
    return 0.3 * torch.tanh(x_t + condition) * time + 0.5 * x_t * time + 0.1 * condition


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_inversion_converges_to_the_exact_flow_at_first_order(objective):
    target, x0 = tilted_gaussian(), clean_images()
    schedule = make_schedule("cosine", 4096)
    top = 3600
    exact = target.flow(x0, 1.0, schedule.alpha_bar(top))
    errors = []
    for num_steps in (25, 50, 100, 200):
        steps = torch.linspace(0, top, num_steps + 1).round().int().tolist()
        grid = [*itertools.pairwise(reversed(steps)), (0, -1)]
        errors.append(float((invert_ddim(target.denoiser(schedule, objective), x0, grid) - exact).abs().max()))
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(1.0, abs=0.2), (errors, slopes)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("num_steps", [7, 50, 97])
def test_fixed_point_inversion_closes_the_round_trip(objective, num_steps):
    denoiser, x0 = TWO_MODES.denoiser(SCHEDULE, objective), clean_images()
    grid = make_grid("uniform", 1000, num_steps)
    plain = sample_ddim(denoiser, invert_ddim(denoiser, x0, grid), grid)
    exact = sample_ddim(denoiser, invert_ddim(denoiser, x0, grid, fixed_point_steps=40, tolerance=1e-13), grid)
    plain_gap, exact_gap = float((plain - x0).abs().max()), float((exact - x0).abs().max())
    assert exact_gap < 1e-8, exact_gap
    assert 1e-4 < plain_gap < 20 / num_steps, plain_gap


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("spacing", "num_steps"), [("trailing", 1), ("linspace", 2), ("linspace", 3), ("uniform", 3)])
def test_fixed_point_inversion_closes_the_longest_steps(objective, spacing, num_steps):
    for target in (TWO_MODES, tilted_gaussian()):
        denoiser, x0 = target.denoiser(SCHEDULE, objective), clean_images()
        grid = make_grid(spacing, 1000, num_steps)
        latent = invert_ddim(denoiser, x0, grid, fixed_point_steps=60)
        torch.testing.assert_close(sample_ddim(denoiser, latent, grid), x0, atol=1e-5, rtol=0)


def test_latent_of_an_image_does_not_depend_on_its_batch_with_a_tolerance():
    denoiser, x0, grid = TWO_MODES.denoiser(SCHEDULE), clean_images(), make_grid("uniform", 1000, 20)
    options = {"fixed_point_steps": 30, "tolerance": 1e-4}
    together = invert_ddim(denoiser, x0, grid, **options)
    alone = torch.cat([invert_ddim(denoiser, image[None], grid, **options) for image in x0])
    torch.testing.assert_close(alone, together, atol=1e-10, rtol=0)


def test_more_fixed_point_steps_reduce_the_gap_of_the_round_trip():
    denoiser, x0 = TWO_MODES.denoiser(SCHEDULE), clean_images()
    grid = make_grid("uniform", 1000, 50)
    gaps = [
        float((sample_ddim(denoiser, invert_ddim(denoiser, x0, grid, fixed_point_steps=n), grid) - x0).abs().max())
        for n in (0, 1, 2, 4)
    ]
    assert all(later < earlier / 2 for earlier, later in itertools.pairwise(gaps)), gaps


def test_fixed_point_steps_beat_plain_inversion_with_clipping_on():
    denoiser = Denoiser(as_network(TWO_MODES.x0_given, SCHEDULE, "eps"), SCHEDULE, "eps", clip=1.0)
    x0 = clean_images().clamp(-0.9, 0.9)
    grid = make_grid("uniform", 1000, 50)
    plain = sample_ddim(denoiser, invert_ddim(denoiser, x0, grid), grid)
    better = sample_ddim(denoiser, invert_ddim(denoiser, x0, grid, fixed_point_steps=5), grid)
    assert float((better - x0).abs().mean()) < 0.3 * float((plain - x0).abs().mean())


def test_trajectory_holds_every_level_and_each_level_reconstructs_the_image():
    denoiser, x0 = TWO_MODES.denoiser(SCHEDULE), clean_images()
    grid = make_grid("trailing", 1000, 25)
    seen = []
    trajectory = invert_trajectory(denoiser, x0, grid, fixed_point_steps=12, callback=seen.append)
    assert sorted(trajectory) == sorted({level for pair in grid for level in pair})
    assert trajectory[-1] is x0 and len(seen) == 25
    assert [(step.t, step.t_prev) for step in seen] == list(reversed(grid))
    assert torch.equal(trajectory[999], invert_ddim(denoiser, x0, grid, fixed_point_steps=12))
    for start in (None, grid[10][0], grid[-1][0]):
        torch.testing.assert_close(reconstruct(denoiser, trajectory, grid, start=start), x0, atol=1e-6, rtol=0)


def test_inversion_resumed_from_a_middle_latent_equals_the_whole_inversion():
    denoiser, x0 = TWO_MODES.denoiser(SCHEDULE), clean_images()
    grid = make_grid("trailing", 1000, 25)
    middle = grid[12][0]
    halfway = invert_ddim(denoiser, x0, restrict_grid(grid, highest=middle))
    top = invert_ddim(denoiser, halfway, restrict_grid(grid, lowest=middle))
    assert torch.equal(top, invert_ddim(denoiser, x0, grid))


def guided(null, scale=4.0):
    return Denoiser(ClassifierFreeGuidance(smooth_condition_network, null, scale), SCHEDULE, "eps", clip=None)


def test_null_condition_optimisation_makes_guided_sampling_follow_the_pivot():
    x0 = clean_images(4).float()
    condition, null = torch.full((4, 2), 0.7), torch.zeros(1, 2)
    grid = make_grid("trailing", 1000, 20)
    pivot = invert_trajectory(guided(null, 1.0), x0, grid, condition=condition)
    denoiser = guided(null)
    untuned = sample_ddim(denoiser, pivot[999], grid, condition=condition)
    tuned = optimise_null_condition(denoiser, pivot, grid, condition, inner_steps=40, learning_rate=0.05)
    followed = sample_with_denoisers(tuned, pivot[999], grid, condition=condition)
    unguided = sample_ddim(guided(null, 1.0), pivot[999], grid, condition=condition)
    before, after = float((untuned - x0).square().mean()), float((followed - x0).square().mean())
    assert after < before / 50, (before, after)
    assert after < 1.2 * float((unguided - x0).square().mean()) + 1e-4
    assert len(tuned) == 20 and tuned[0].network.null_condition.shape == (4, 2)
    assert not any(denoiser.network.null_condition.requires_grad for denoiser in tuned)


def test_null_condition_of_an_image_does_not_depend_on_its_batch():
    x0 = clean_images(3).float()
    condition, null = torch.tensor([[0.7, 0.1], [-0.5, 0.2], [0.3, 0.9]]), torch.zeros(1, 2)
    grid = make_grid("trailing", 1000, 6)

    def tune(rows):
        pivot = invert_trajectory(guided(null, 1.0), x0[rows], grid, condition=condition[rows])
        tuned = optimise_null_condition(guided(null), pivot, grid, condition[rows], inner_steps=5)
        return torch.stack([denoiser.network.null_condition for denoiser in tuned])

    torch.testing.assert_close(tune([1]), tune([0, 1, 2])[:, 1:2], atol=1e-5, rtol=1e-5)


CONDITIONS = {
    "class": (ConditionSpec("class", 5), torch.tensor([1, 4])),
    "multi_hot": (ConditionSpec("multi_hot", 4), torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])),
    "vector": (ConditionSpec("vector", 3), torch.tensor([[0.2, -0.7, 1.0], [1.1, 0.0, -0.4]])),
    "classes": (ConditionSpec("classes", sizes=(3, 2)), torch.tensor([[1, 0], [2, 1]])),
    "tokens": (ConditionSpec("tokens", 4, length=3), torch.linspace(-1, 1, 24).view(2, 3, 4)),
}


def random_network(network_name, spec):
    torch.manual_seed(0)
    network: torch.nn.Module
    if network_name == "unet":
        network = UNet(
            condition=spec,
            image_size=8,
            image_channels=1,
            channels=8,
            multipliers=(1, 2),
            num_res_blocks=1,
            attention_sizes=(4,) if spec.kind == "tokens" else (),
            groups=4,
        )
    else:
        network = ContextUNet(condition=spec, image_size=8, image_channels=1, channels=8, groups=4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.mark.parametrize("network_name", ["unet", "context_unet"])
@pytest.mark.parametrize("kind", CONDITIONS)
def test_null_condition_optimisation_works_for_every_kind_of_condition(network_name, kind):
    spec, condition = CONDITIONS[kind]
    if kind == "tokens" and network_name == "context_unet":
        pytest.skip("the context UNet has no attention that could read tokens")
    network = random_network(network_name, spec)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    grid = make_grid("trailing", 1000, 4)
    x0 = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    bare = Denoiser(network, SCHEDULE, "v", clip=None)
    denoiser = Denoiser(ClassifierFreeGuidance(network, spec.null(1), 5.0), SCHEDULE, "v", clip=None)
    pivot = invert_trajectory(bare, x0, grid, condition=condition, fixed_point_steps=20)
    untuned = sample_ddim(denoiser, pivot[999], grid, condition=condition)
    tuned = optimise_null_condition(denoiser, pivot, grid, condition, inner_steps=10, learning_rate=0.15)
    followed = sample_with_denoisers(tuned, pivot[999], grid, condition=condition)
    assert float((followed - x0).square().mean()) < 0.7 * float((untuned - x0).square().mean())
    # without optimisation steps every tuned denoiser equals the guided one
    same = sample_with_denoisers(
        optimise_null_condition(denoiser, pivot, grid, condition, inner_steps=0), pivot[999], grid, condition=condition
    )
    torch.testing.assert_close(same, untuned, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_null_condition_does_not_change_outside_the_guidance_interval():
    x0, condition = clean_images(3).float(), torch.full((3, 2), 0.7)
    grid = make_grid("trailing", 1000, 10)
    pivot = invert_trajectory(guided(torch.zeros(1, 2), 1.0), x0, grid, condition=condition)
    guidance = ClassifierFreeGuidance(smooth_condition_network, torch.zeros(1, 2), 4.0, interval=(200, 700))
    tuned = optimise_null_condition(
        Denoiser(guidance, SCHEDULE, "eps", clip=None), pivot, grid, condition, inner_steps=5, learning_rate=0.05
    )
    moved = [bool(denoiser.network.null_condition.any()) for denoiser in tuned]
    assert moved == [t <= 700 for t, _ in grid]  # the null of a step starts from that of the step before


def test_tuned_denoisers_carry_the_self_condition_as_the_sampler_does():
    def network(x_t, t, condition, self_condition=None):
        own = torch.zeros_like(x_t) if self_condition is None else self_condition
        return smooth_condition_network(x_t, t, condition) + 0.2 * own

    grid, x0, condition = make_grid("trailing", 1000, 6), clean_images(3).float(), torch.full((3, 2), 0.7)
    guidance = ClassifierFreeGuidance(network, torch.zeros(1, 2), 4.0)
    denoiser = Denoiser(guidance, SCHEDULE, "eps", clip=None, self_conditioning=True)
    pivot = invert_trajectory(denoiser, x0, grid, condition=condition)
    tuned = optimise_null_condition(denoiser, pivot, grid, condition, inner_steps=0)
    followed = sample_with_denoisers(tuned, pivot[999], grid, condition=condition)
    torch.testing.assert_close(followed, sample_ddim(denoiser, pivot[999], grid, condition=condition))


def test_null_of_an_embedding_with_several_outputs_tunes_the_first_output():
    """The embedding returns tokens and their mask: the tokens are tuned, the mask does not change."""

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.spec = ConditionSpec("vector", 2)

        def forward(self, condition):
            missing = condition.isnan()
            return torch.where(missing, torch.zeros_like(condition), condition), ~missing.all(dim=1, keepdim=True)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = Tokens()

        def forward(self, x_t, t, condition, self_condition=None):
            tokens, there = self.tokens(condition)
            assert there.dtype == torch.bool and there.shape == (len(x_t), 1)
            return smooth_condition_network(x_t, t, tokens)

    grid, x0, condition = make_grid("trailing", 1000, 8), clean_images(3).float(), torch.full((3, 2), 0.7)
    network, schedule = Network(), make_schedule("scaled_linear")
    bare = Denoiser(network, schedule, "eps", clip=None)
    guidance = ClassifierFreeGuidance(network, torch.full((1, 2), float("nan")), 4.0)
    denoiser = Denoiser(guidance, schedule, "eps", clip=None)
    pivot = invert_trajectory(bare, x0, grid, condition=condition)
    tuned = optimise_null_condition(denoiser, pivot, grid, condition, inner_steps=40, learning_rate=0.05)
    untuned = float((sample_ddim(denoiser, pivot[999], grid, condition=condition) - x0).square().mean())
    followed = float((sample_with_denoisers(tuned, pivot[999], grid, condition=condition) - x0).square().mean())
    assert followed < untuned / 20, (followed, untuned)


def test_bad_input_is_refused_with_the_remedy():
    denoiser, x0 = TWO_MODES.denoiser(SCHEDULE), clean_images(2)
    grid = make_grid("trailing", 1000, 4)
    trajectory = invert_trajectory(denoiser, x0, grid)
    with pytest.raises(ValueError, match="must not be negative"):
        invert_ddim(denoiser, x0, grid, fixed_point_steps=-1)
    with pytest.raises(ValueError, match="batch of floats"):
        invert_ddim(denoiser, (x0 * 100).to(torch.uint8), grid)
    with pytest.raises(ValueError, match="empty trajectory"):
        reconstruct(denoiser, {}, grid)
    with pytest.raises(ValueError, match="inner_steps"):
        optimise_null_condition(guided(torch.zeros(1, 2)), trajectory, grid, torch.zeros(2, 2), inner_steps=-1)
    assert invert_trajectory(denoiser, x0, [900, 300, 20]).keys() == {-1, 20, 300, 900}
    with pytest.raises(ValueError, match="no level 7"):
        reconstruct(denoiser, trajectory, grid, start=7)
    with pytest.raises(ValueError, match="is a ClassifierFreeGuidance"):
        optimise_null_condition(denoiser, trajectory, grid, None)
    with pytest.raises(ValueError, match="choose another scale"):
        optimise_null_condition(guided(torch.zeros(1, 2), 1.0), trajectory, grid, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="invert over the same grid"):
        optimise_null_condition(guided(torch.zeros(1, 2)), {999: x0}, grid, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="no condition embedding"):
        optimise_null_condition(guided(torch.full((1, 2), float("nan"))), trajectory, grid, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="4 grid steps need 4 denoisers"):
        sample_with_denoisers([denoiser], x0, grid)
