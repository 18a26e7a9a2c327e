import numpy as np
import pytest
import torch

from diffusion_core.bound_terms import bound_term
from diffusion_core.checks import check_condition, check_images, is_whole
from diffusion_core.denoiser import Denoiser
from diffusion_core.editing import edit, image_to_image, inpaint, interpolate
from diffusion_core.grids import make_grid
from diffusion_core.guidance import Autoguidance, ClassifierFreeGuidance
from diffusion_core.inversion import (
    invert_ddim,
    invert_trajectory,
    optimise_null_condition,
    reconstruct,
    sample_with_denoisers,
)
from diffusion_core.likelihood import variational_bound
from diffusion_core.losses import training_loss
from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.unet import UNet
from diffusion_core.noise import NoiseSource
from diffusion_core.objectives import per_image
from diffusion_core.samplers import sample_ddim, sample_ddpm, sample_dpmpp_2m, sample_dpmpp_2m_sde, sample_heun
from diffusion_core.schedules import make_schedule


def test_integers_of_python_and_numpy_are_whole_and_floats_are_not():
    assert is_whole(3) and is_whole(np.int64(3))
    assert not is_whole(3.0) and not is_whole(np.float32(3)) and not is_whole("3") and not is_whole(None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_batches_of_floats_pass(dtype):
    check_images(torch.zeros(2, 3, dtype=dtype))
    check_images(torch.zeros(2, 3, 4, 4, dtype=dtype))


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(3), np.zeros((2, 3)), [[0.0]], None]
)
def test_anything_except_a_batch_of_floats_is_refused_by_name(images):
    with pytest.raises(ValueError, match="x_T must be a"):
        check_images(images, "x_T")


@pytest.mark.parametrize(
    "condition",
    [
        None,
        torch.arange(4),
        torch.zeros(4, 7),
        torch.zeros(4, 0),
        torch.tensor(3),
        np.zeros(4),
        [0, 1, 2, 3],
        ("cat", "dog", "cat", "cat"),
        "a prompt",
        {"class": torch.arange(2)},
        (torch.zeros(9, 2), torch.zeros(7)),
        object(),
    ],
    ids=lambda condition: type(condition).__name__,
)
def test_condition_of_one_entry_per_image_or_of_the_networks_own_kind_passes(condition):
    check_condition(condition, 4)


LABELS = {
    "tensor of one": torch.zeros(1, 2),
    "longer tensor": torch.zeros(5, 2),
    "empty tensor": torch.zeros(0, 2),
    "array": np.zeros((3, 2)),
    "list of numbers": [0, 1, 2],
    "names": ("cat", "dog"),
    "empty list": [],
}


@pytest.mark.parametrize("condition", LABELS.values(), ids=LABELS)
def test_condition_of_another_length_is_refused_with_both_numbers(condition):
    with pytest.raises(ValueError, match=f"^{len(condition)} conditions were given for 4 images: give one per image$"):
        check_condition(condition, 4)


SCHEDULE = make_schedule("cosine", 50)
GRID = make_grid("trailing", 50, 5)
IMAGES = NoiseSource(1).normal((2,), torch.arange(4), 0).clamp(-1, 1)
NOISE = NoiseSource(0).for_samples((2,), torch.arange(4))


def forgiving(x_t, t, condition, self_condition=None):
    """A network that broadcasts: without a check, one condition would silently stand for all images."""
    return 0.1 * x_t + (0.0 if condition is None else 0.1 * torch.as_tensor(condition)[..., :2].mean())


def null_conditions(condition, pivot=None):
    guided = Denoiser(ClassifierFreeGuidance(forgiving, torch.zeros(1, 2), 3.0), SCHEDULE, "v", clip=None)
    pivot = invert_trajectory(Denoiser(forgiving, SCHEDULE, "v"), IMAGES, GRID) if pivot is None else pivot
    return optimise_null_condition(guided, pivot, GRID, condition, inner_steps=1)


DENOISER = Denoiser(forgiving, SCHEDULE, "v")
CALLS = {
    "denoiser": lambda c: DENOISER(IMAGES, 3, c),
    "sample_ddim": lambda c: sample_ddim(DENOISER, IMAGES, GRID, condition=c),
    "sample_ddpm": lambda c: sample_ddpm(DENOISER, IMAGES, GRID, NOISE, condition=c),
    "sample_heun": lambda c: sample_heun(DENOISER, IMAGES, GRID, condition=c),
    "sample_dpmpp_2m": lambda c: sample_dpmpp_2m(DENOISER, IMAGES, GRID, condition=c),
    "sample_dpmpp_2m_sde": lambda c: sample_dpmpp_2m_sde(DENOISER, IMAGES, GRID, NOISE, condition=c),
    "variational_bound": lambda c: variational_bound(DENOISER, IMAGES, NOISE, condition=c),
    "training_loss": lambda c: training_loss(
        forgiving, SCHEDULE, "v", "snr", IMAGES, torch.arange(4), NOISE(0), condition=c
    ),
    "classifier-free guidance": lambda c: ClassifierFreeGuidance(forgiving, torch.zeros(1, 2), 3.0)(
        IMAGES, torch.full((4,), 3), torch.zeros(4, 2) if c is None else c
    ),
    "autoguidance": lambda c: Autoguidance(forgiving, forgiving, 3.0)(IMAGES, torch.full((4,), 3), c),
    "invert_ddim": lambda c: invert_ddim(DENOISER, IMAGES, GRID, condition=c),
    "invert_trajectory": lambda c: invert_trajectory(DENOISER, IMAGES, GRID, condition=c),
    "reconstruct": lambda c: reconstruct(DENOISER, {49: IMAGES}, GRID, condition=c),
    "optimise_null_condition": lambda c: null_conditions(torch.zeros(4, 2) if c is None else c),
    "sample_with_denoisers": lambda c: sample_with_denoisers([DENOISER] * 5, IMAGES, GRID, condition=c),
    "edit, source": lambda c: edit(DENOISER, IMAGES, GRID, c, None),
    "edit, target": lambda c: edit(DENOISER, IMAGES, GRID, None, c),
    "image_to_image": lambda c: image_to_image(DENOISER, IMAGES, GRID, NOISE, condition=c),
    "interpolate": lambda c: interpolate(DENOISER, IMAGES, IMAGES.flip(0), [0.5], GRID, condition=c),
    "inpaint": lambda c: inpaint(DENOISER, IMAGES, torch.ones(4, 2), IMAGES, GRID, NOISE, condition=c),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_function_refuses_conditions_of_another_length_than_the_batch(name):
    CALLS[name](None)
    CALLS[name](torch.zeros(4, 2))
    for count in (0, 1, 3, 5):
        with pytest.raises(ValueError, match=f"4 images.* got \\({count}, 2\\)|^{count} conditions .* 4 images"):
            CALLS[name](torch.zeros(count, 2))


def test_other_values_of_another_length_than_the_batch_are_refused():
    one, three = torch.full((1, 2), 0.5), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="self_condition is an estimate"):
        DENOISER(IMAGES, 3, None, one)
    for null in (three, torch.tensor(5.0)):
        for use in (
            lambda null=null: ClassifierFreeGuidance(forgiving, null, 3.0)(IMAGES, torch.full((4,), 3), IMAGES),
            lambda null=null: ClassifierFreeGuidance(forgiving, null, 0.0)(IMAGES, torch.full((4,), 3), IMAGES),
        ):
            with pytest.raises(ValueError, match="nulls for 4 images"):
                use()
    with pytest.raises(ValueError, match="one shape"):
        null_conditions(IMAGES, {level: IMAGES if level > 0 else one for pair in GRID for level in pair})
    with pytest.raises(ValueError, match="two images of one shape"):
        interpolate(DENOISER, IMAGES, one, [0.5], GRID)
    with pytest.raises(ValueError, match="at least one fraction"):
        interpolate(DENOISER, IMAGES, IMAGES, [], GRID)
    with pytest.raises(ValueError, match="one value per image"):
        per_image(torch.ones(1), IMAGES)
    t = torch.arange(4)
    for arguments in ((one, IMAGES, t), (IMAGES, one, t), (IMAGES, IMAGES, t[:1]), (IMAGES, IMAGES, t[0])):
        with pytest.raises(ValueError, match=r"need the shape of x0|one value per image"):
            bound_term(SCHEDULE, IMAGES, *arguments)


def test_null_tuned_for_some_images_is_not_used_for_another_number_of_them():
    spec = ConditionSpec("vector", 3)
    network = UNet(
        condition=spec, image_size=4, image_channels=1, channels=8, multipliers=(1,), num_res_blocks=1, groups=4
    )
    network.eval().requires_grad_(False)
    guided = Denoiser(ClassifierFreeGuidance(network, spec.null(1), 3.0), SCHEDULE, "v", clip=None)
    x0, grid = torch.zeros(3, 1, 4, 4), [40, 5]
    pivot = dict.fromkeys((40, 5, -1), x0)
    tuned = optimise_null_condition(guided, pivot, grid, torch.zeros(3, 3), inner_steps=1)
    assert sample_with_denoisers(tuned, x0, grid, condition=torch.zeros(3, 3)).shape == x0.shape
    with pytest.raises(ValueError, match="tuned for 3 images, but there are 2"):
        sample_with_denoisers(tuned, x0[:2], grid, condition=torch.zeros(2, 3))
