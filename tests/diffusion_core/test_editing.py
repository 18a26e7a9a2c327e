"""Editing against exact maps between Gaussians and the posterior of an inpainted Gaussian."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from diffusion_core.denoiser import Denoiser
from diffusion_core.editing import edit, image_to_image, inpaint, interpolate, repaint_walk, slerp
from diffusion_core.grids import make_grid
from diffusion_core.guidance import ClassifierFreeGuidance
from diffusion_core.inversion import invert_ddim
from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.unet import UNet
from diffusion_core.noise import NoiseSource
from diffusion_core.objectives import eps_from_x0
from diffusion_core.samplers import sample_ddim
from diffusion_core.schedules import make_schedule
from tests.diffusion_core.oracle import Gaussian, exact_moments, tilted_gaussian

SCHEDULE = make_schedule("cosine", 1000)
CLASSES = [
    Gaussian(torch.tensor([-0.5, 0.2], dtype=torch.float64), torch.diag(torch.tensor([0.1, 0.3], dtype=torch.float64))),
    Gaussian(
        torch.tensor([0.6, -0.1], dtype=torch.float64), torch.diag(torch.tensor([0.4, 0.05], dtype=torch.float64))
    ),
]
BROAD = Gaussian(torch.zeros(2).double(), torch.eye(2).double())


def gaussian_of_class(x_t, t, condition, self_condition=None):
    """Return eps of a two-class model: conditions 0 and 1 are the classes, 2 is the null."""
    alpha_bar = SCHEDULE.gather(t).view(-1, 1)
    each = torch.stack([target.x0_given(x_t, alpha_bar) for target in (*CLASSES, BROAD)])
    x0 = each[condition, torch.arange(len(x_t))]
    return eps_from_x0(x0, x_t, alpha_bar)


def images(count=16):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(3)).double() * 0.4


def labels(value, count=16):
    return torch.full((count,), value)


def test_edit_maps_one_gaussian_onto_the_other():
    """Inverting under N(m, C) and sampling under N(m', C') is an affine map that keeps the standardised x."""
    denoiser = Denoiser(gaussian_of_class, SCHEDULE, "eps", clip=None)
    grid = make_grid("uniform", 1000, 1000)
    x0 = images()
    edited = edit(denoiser, x0, grid, labels(0), labels(1))
    source, target = CLASSES
    expected = target.mean + (x0 - source.mean) * (target.covariance.diag() / source.covariance.diag()).sqrt()
    torch.testing.assert_close(edited, expected, atol=2e-2, rtol=0)


def test_edit_to_the_same_condition_returns_the_image():
    denoiser = Denoiser(gaussian_of_class, SCHEDULE, "eps", clip=None)
    grid = make_grid("trailing", 1000, 100)
    edited = edit(denoiser, images(), grid, labels(1), labels(1), fixed_point_steps=12)
    torch.testing.assert_close(edited, images(), atol=1e-6, rtol=0)


def test_edit_from_a_lower_level_keeps_more_of_the_image():
    denoiser = Denoiser(gaussian_of_class, SCHEDULE, "eps", clip=None)
    grid = make_grid("trailing", 1000, 100)
    changes = [
        float(
            (edit(denoiser, images(), grid, labels(0), labels(1), start=level, fixed_point_steps=6) - images())
            .abs()
            .mean()
        )
        for level in (99, 399, 699, 999)
    ]
    assert changes == sorted(changes) and changes[0] < 0.2 * changes[-1]


def test_edit_inverts_with_the_inversion_denoiser_if_one_is_given():
    bare = Denoiser(gaussian_of_class, SCHEDULE, "eps", clip=None)
    guided = Denoiser(ClassifierFreeGuidance(gaussian_of_class, torch.tensor([2]), 2.0), SCHEDULE, "eps", clip=None)
    grid = make_grid("trailing", 1000, 30)
    latent = invert_ddim(bare, images(), grid, condition=labels(0))
    expected = sample_ddim(guided, latent, grid, condition=labels(1))
    assert torch.equal(edit(guided, images(), grid, labels(0), labels(1), inversion_denoiser=bare), expected)
    assert not torch.allclose(edit(guided, images(), grid, labels(0), labels(1)), expected)


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_image_to_image_has_the_moments_of_noising_and_denoising(strength):
    """With eta 1 on the full grid, x0 -> x_t -> x0' draws from the posterior given x_t, whose moments are known."""
    target, schedule = tilted_gaussian(), make_schedule("cosine", 300)
    grid = make_grid("uniform", 300, 300)
    part = grid[len(grid) - round(strength * 300) :]
    x0 = torch.tensor([0.9, 0.4], dtype=torch.float64)

    def run(x, noise):
        return image_to_image(target.denoiser(schedule), x, grid, noise, strength=strength, eta=1.0)

    tiny = 1e-12 * torch.eye(2).double()
    mean, covariance = exact_moments(run, x0, tiny, [300, *(t for t, _ in part)])
    a = schedule.alpha_bar(part[0][0])
    C, one = target.covariance, torch.eye(2).double()
    gain = a**0.5 * C @ torch.linalg.inv(a * C + (1 - a) * one)
    expected_mean = target.mean + gain @ (a**0.5 * (x0 - target.mean))
    expected_covariance = C - a**0.5 * gain @ C + (1 - a) * gain @ gain.T
    torch.testing.assert_close(mean, expected_mean, atol=1e-2, rtol=0)
    torch.testing.assert_close(covariance, expected_covariance, atol=2e-2, rtol=0)


def test_slerp_keeps_the_norm_and_the_angle():
    first, second = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    second = second * (first.flatten(1).norm(dim=1) / second.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    norm = first.flatten(1).norm(dim=1)

    def angle(a, b):
        return torch.arccos(((a * b).flatten(1).sum(1) / norm**2).clamp(-1, 1))

    whole = angle(first, second)
    for fraction in (0.0, 0.25, 0.5, 1.0):
        mixed = slerp(first, second, fraction)
        torch.testing.assert_close(mixed.flatten(1).norm(dim=1), norm)
        torch.testing.assert_close(angle(first, mixed), fraction * whole, atol=1e-6, rtol=0)
    assert torch.equal(slerp(first, first, 0.3), first) or torch.allclose(slerp(first, first, 0.3), first)
    assert bool(torch.isfinite(slerp(first, -first, 0.5)).all())
    assert slerp(first.float(), second.float(), 0.5).dtype == torch.float32


def test_interpolation_reconstructs_its_ends():
    denoiser = Denoiser(gaussian_of_class, SCHEDULE, "eps", clip=None)
    grid = make_grid("trailing", 1000, 50)
    first, second = images(4), images(8)[4:]
    between = interpolate(denoiser, first, second, (0.0, 0.5, 1.0), grid, condition=labels(1, 4), fixed_point_steps=12)
    torch.testing.assert_close(between[0], first, atol=1e-6, rtol=0)
    torch.testing.assert_close(between[2], second, atol=1e-6, rtol=0)
    assert between.shape == (3, 4, 2)
    assert bool(torch.isfinite(between[1]).all()) and not torch.allclose(between[1], first)


@pytest.mark.parametrize("eta", [1.0, "sigma_hat"])
def test_inpainting_draws_the_unknown_given_the_known(eta):
    """The second coordinate of a correlated Gaussian has the mean and variance of its conditional given the first."""
    target = Gaussian(torch.zeros(2).double(), torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64))
    schedule = make_schedule("cosine", 100)
    count = 1000
    x0 = torch.tensor([[0.9, 0.0]]).double().expand(count, 2)
    known = torch.tensor([1.0, 0.0])
    source = NoiseSource(0)
    noise = source.for_samples((2,), torch.arange(count))
    run = functools.partial(
        inpaint,
        target.denoiser(schedule),
        x0,
        known,
        noise(100).double(),
        make_grid("uniform", 100, 50),
        noise,
        eta=eta,
    )
    out = run(jump_length=5, resamples=20)
    assert torch.equal(out[:, 0], x0[:, 0])
    assert float(out[:, 1].mean()) == pytest.approx(0.72, abs=0.06)
    # eta 1 uses the smaller of the two DDPM variances, so the spread is too small
    assert float(out[:, 1].var()) == pytest.approx(0.36, abs=0.06 if eta == "sigma_hat" else 0.12)
    # without the paper's jumps the two parts agree less
    plain = run(resamples=1)
    assert abs(float(plain[:, 1].mean()) - 0.72) > abs(float(out[:, 1].mean()) - 0.72)


def test_inpainting_returns_a_fully_known_image_and_samples_a_fully_unknown_one():
    target, schedule = tilted_gaussian(), make_schedule("cosine", 100)
    x0, grid = images(4), make_grid("uniform", 100, 20)
    draws = []

    def noise(step):
        draws.append(step)
        return NoiseSource(0).normal((2,), torch.arange(4), step)

    x_T = noise(100).double()
    assert torch.equal(inpaint(target.denoiser(schedule), x0, torch.ones(1, 2), x_T, grid, noise), x0)
    draws.clear()
    nothing = inpaint(target.denoiser(schedule), x0, torch.zeros(1, 2), x_T, grid, noise, eta=0.0, resamples=1)
    torch.testing.assert_close(nothing, sample_ddim(target.denoiser(schedule), x_T, grid), atol=1e-12, rtol=0)
    draws.clear()
    inpaint(target.denoiser(schedule), x0, torch.zeros(1, 2), x_T, grid, noise, jump_length=3, resamples=4)
    assert draws == list(range(101, 101 + len(draws))), (
        "every draw has its own address, distinct from those of sampling"
    )


@pytest.mark.parametrize(
    ("length", "jump_length", "resamples"), [(250, 10, 10), (20, 3, 4), (5, 10, 10), (7, 1, 2), (4, 4, 3)]
)
def test_repaint_walk_is_connected_and_repeats_each_stretch_as_requested(length, jump_length, resamples):
    grid = make_grid("uniform", 300, length)
    level = grid[0][0]
    for down, (t, t_prev) in repaint_walk(grid, jump_length, resamples):
        assert level == (t if down else t_prev)
        level = t_prev if down else t
    assert level == -1
    walk = repaint_walk(grid, jump_length, resamples)
    jumps = max(0, math.ceil((length - jump_length) / jump_length)) if length > jump_length else 0
    assert sum(not down for down, _ in walk) == jumps * jump_length * (resamples - 1)
    assert sum(down for down, _ in walk) == length + jumps * jump_length * (resamples - 1)


def test_bad_input_is_refused_with_the_remedy():
    target, schedule = tilted_gaussian(), make_schedule("cosine", 100)
    denoiser, grid = target.denoiser(schedule), make_grid("uniform", 100, 10)
    noise = NoiseSource(0).for_samples((2,), torch.arange(4))
    x0 = images(4)
    for strength in (0.0, 1.1):
        with pytest.raises(ValueError, match="strength must lie above 0"):
            image_to_image(denoiser, x0, grid, noise, strength=strength)
    with pytest.raises(ValueError, match="two tensors of one shape"):
        slerp(x0, x0[:2], 0.5)
    pixels = (x0 * 100).to(torch.uint8)
    for call in (
        lambda: image_to_image(denoiser, pixels, grid, noise),
        lambda: inpaint(denoiser, pixels, torch.ones(4, 2), x0, grid, noise),
        lambda: slerp(pixels, pixels, 0.5),
        lambda: slerp(x0[0], x0[1], 0.5),
        lambda: edit(denoiser, pixels, grid, None, None),
    ):
        with pytest.raises(ValueError, match="batch of floats"):
            call()
    with pytest.raises(ValueError, match="x_T has shape"):
        inpaint(denoiser, x0, torch.ones(4, 2), x0[:2], grid, noise)
    with pytest.raises(ValueError, match="pass noise="):
        inpaint(denoiser, x0, torch.ones(4, 2), x0, grid, None)
    with pytest.raises(ValueError, match="does not fit images"):
        inpaint(denoiser, x0, torch.ones(3, 2), x0, grid, noise)
    with pytest.raises(ValueError, match="between 0"):
        inpaint(denoiser, x0, torch.full((4, 2), 255.0), x0, grid, noise)
    with pytest.raises(ValueError, match="at least 1"):
        inpaint(denoiser, x0, torch.ones(4, 2), x0, grid, noise, resamples=0)
    with pytest.raises(ValueError, match="level 33 is not on the grid"):
        edit(denoiser, x0, grid, None, None, start=33)


SPECS = {
    "class": (ConditionSpec("class", 5), torch.tensor([1, 4]), torch.tensor([2, 0])),
    "classes": (ConditionSpec("classes", sizes=(3, 2)), torch.tensor([[1, 0], [2, 1]]), torch.tensor([[0, 0], [1, 1]])),
    "multi_hot": (ConditionSpec("multi_hot", 4), torch.eye(4)[:2], torch.eye(4)[2:]),
    "vector": (ConditionSpec("vector", 3), torch.zeros(2, 3), torch.ones(2, 3)),
    "tokens": (ConditionSpec("tokens", 4, length=3), torch.zeros(2, 3, 4), torch.ones(2, 3, 4)),
}


@pytest.mark.parametrize("kind", SPECS)
def test_every_edit_works_with_every_kind_of_condition_and_a_real_network(kind):
    spec, source, wanted = SPECS[kind]
    torch.manual_seed(0)
    network = UNet(
        condition=spec, image_size=8, image_channels=1, channels=8, multipliers=(1, 2), num_res_blocks=1,
        attention_sizes=(4,), groups=4,
    ).eval()  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    denoiser = Denoiser(ClassifierFreeGuidance(network, spec.null(1), 2.0), SCHEDULE, "v")
    x0, grid = torch.rand(2, 1, 8, 8) * 2 - 1, make_grid("trailing", 1000, 4)
    noise = NoiseSource(0).for_samples((1, 8, 8), torch.arange(2))

    def of(condition):
        return [
            edit(denoiser, x0, grid, source, condition),
            image_to_image(denoiser, x0, grid, noise, condition=condition),
            interpolate(denoiser, x0[:1], x0[1:], [0.5], grid, condition=condition[:1])[0],
            inpaint(denoiser, x0, torch.tensor([[1.0] * 4 + [0.0] * 4]), noise(1000), grid, noise, condition=condition),
        ]

    for one, other in zip(of(source), of(wanted), strict=True):
        assert torch.isfinite(one).all() and float((one - other).abs().max()) > 1e-4
