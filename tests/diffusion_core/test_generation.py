"""Generation: bit-identical samples in any batch, in their order, and block sizes per device."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import (
    NonFiniteOutputError,
    SamplerSettings,
    _aligned_blocks,
    default_settings,
    generate,
    generate_images,
    rows_per_call,
)
from diffusion_core.networks import build_network
from diffusion_core.schedules import make_schedule


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    """An 8x8 RGB model with random weights, three classes and attention: every layer that rounds by the number of rows."""
    config = {
        "name": "unet", "image_size": 8, "image_channels": 3, "channels": 16, "multipliers": [1, 2], "num_res_blocks": 1,
        "attention_sizes": [4], "condition": {"kind": "class", "size": 3},
    }  # fmt: skip
    torch.manual_seed(0)
    network = build_network(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return DiffusionModel(network, config, make_schedule("cosine", 100), "v", 8, 3, ("a", "b", "c"), 0.1)


SETTINGS = SamplerSettings(steps=4, eta=1.0, guidance_scale=2.0)
LABELS = torch.arange(70) % 3


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_sample_is_bit_identical_for_any_batch_composition(model: DiffusionModel, batch: int) -> None:
    whole = generate_images(model, LABELS, torch.arange(70), SETTINGS, seed=3)
    for part in list(torch.arange(70).split(batch))[:4]:
        assert torch.equal(generate_images(model, LABELS[part], part, SETTINGS, seed=3), whole[part])


def test_samples_are_returned_in_the_order_of_the_indices(model: DiffusionModel) -> None:
    whole = generate_images(model, LABELS, torch.arange(70), SETTINGS, seed=3)
    order = torch.tensor([69, 0, 33, 5, 33, 16])
    assert torch.equal(generate_images(model, LABELS[order], order, SETTINGS, seed=3), whole[order])
    assert not torch.equal(generate_images(model, LABELS, torch.arange(70), SETTINGS, seed=4), whole)


def test_blocks_keep_every_index_in_its_row() -> None:
    indices = torch.tensor([5, 21, 4, 5, 100])
    blocks = list(_aligned_blocks(indices, 16))
    placed = [(int(p), row) for block in blocks for row, p in enumerate(block) if p >= 0]
    assert sorted(p for p, _ in placed) == [0, 1, 2, 3, 4]
    assert all(int(indices[p]) % 16 == row for p, row in placed)
    assert len(blocks) == 4, "two blocks for the repeated 5, one for 21, one for 100"


def test_callback_sees_every_step_without_the_padding_rows(model: DiffusionModel) -> None:
    seen: list[tuple[int, torch.Size]] = []
    for _ in generate(
        model,
        LABELS[:5],
        torch.arange(5),
        SETTINGS,
        seed=0,
        on_step=lambda rows, step: seen.append((step.t_prev, step.x.shape)),
    ):
        pass
    assert [t for t, _ in seen] == [74, 49, 24, -1]
    assert {shape for _, shape in seen} == {torch.Size([5, 3, 8, 8])}


@pytest.mark.parametrize(
    ("num_samples", "on_gpu"),
    [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (256, 256), (257, 256), (5000, 256)],
)
def test_rows_per_call_are_16_on_a_cpu_and_the_next_power_of_two_up_to_256_on_a_gpu(
    num_samples: int, on_gpu: int
) -> None:
    assert rows_per_call("cpu", num_samples) == 16
    assert rows_per_call("cuda", num_samples) == on_gpu


def test_network_is_called_with_the_block_size_whatever_the_request(model: DiffusionModel) -> None:
    sizes: list[int] = []
    hook = model.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    plain = SamplerSettings(steps=1)
    try:
        generate_images(model, LABELS[:3], torch.arange(3), plain, seed=0)
        generate_images(model, LABELS[:3], torch.arange(3), plain, seed=0, block_size=4)
    finally:
        hook.remove()
    assert sizes == [16, 4]


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 1.5}, {"eta": "large"}, {"eta": float("nan")}, {"steps": 0}, {"steps": 2.5}, {"steps": True},
        {"guidance_scale": float("nan")}, {"guidance_scale": float("inf")}, {"spacing": "even"},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"eta must lie|steps must be|guidance scale must be|unknown grid spacing"):
        SamplerSettings(**options)


class Broken(nn.Module):
    """A network whose output is ``value`` at one step and in rows of one condition."""

    def __init__(self, network: nn.Module, value: float, step: int, label: int) -> None:
        super().__init__()
        self.network, self.value, self.step, self.label = network, value, step, label

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, self_condition: Tensor | None = None) -> Tensor:
        output = self.network(x, t, condition, self_condition)
        wrong = (condition == self.label) & (t == self.step)
        return torch.where(wrong.view(-1, 1, 1, 1), torch.full_like(output, self.value), output)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_output_that_is_not_finite_is_named_by_step_sample_and_condition(
    model: DiffusionModel, value: float, guidance_scale: float
) -> None:
    broken = replace(model, network=Broken(model.network, value, step=49, label=1))
    settings = SamplerSettings(steps=4, guidance_scale=guidance_scale)
    expected = r"NaN or infinity at step t = 49 for sample 41 with condition 1 and for 2 more samples"
    with pytest.raises(NonFiniteOutputError, match=expected):
        generate_images(broken, LABELS[:8], torch.arange(40, 48), settings, seed=0)
    healthy = torch.zeros(8, dtype=torch.int64)
    assert len(generate_images(broken, healthy, torch.arange(8), settings, seed=0)) == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_model_in_another_precision_samples_nearly_the_same(
    model: DiffusionModel, dtype: torch.dtype, guidance_scale: float
) -> None:
    settings = SamplerSettings(steps=4, eta=0.5, guidance_scale=guidance_scale)
    other = replace(model, network=copy.deepcopy(model.network).to(dtype))
    seen: list[Tensor] = []
    blocks = generate(other, LABELS[:6], torch.arange(6), settings, seed=3, on_step=lambda _, step: seen.append(step.x))
    images = torch.cat([block for _, block in blocks]).float()
    assert {x.dtype for x in seen} == {torch.float32}
    expected = generate_images(model, LABELS[:6], torch.arange(6), settings, seed=3).float()
    assert float((images - expected).abs().mean()) < (6.0 if dtype == torch.bfloat16 else 1.0)


@pytest.mark.parametrize(
    ("condition", "indices", "options", "named"),
    [
        (LABELS[:2], torch.arange(3), {}, "2 conditions were given for 3 indices"),
        (LABELS[:3], torch.arange(2), {}, "3 conditions were given for 2 indices"),
        (torch.tensor([0, 4]), torch.arange(2), {}, "class labels must lie in 0 to 2"),
        (torch.tensor([0.0, 1.0]), torch.arange(2), {}, "must hold integers"),
        ([0, 1], torch.arange(2), {}, "must be a tensor with one row per image, got list"),
        (LABELS[:2], torch.tensor([0, -1]), {}, "sample indices must lie in 0 to 4294967295, got -1 to 0"),
        (LABELS[:2], torch.tensor([0, 2**32]), {}, "sample indices must lie in"),
        (LABELS[:2], torch.tensor([0.0, 1.0]), {}, "indices must be an"),
        (LABELS[:2], [0, 1], {}, "indices must be an"),
        (LABELS[:2], torch.arange(2), {"block_size": 0}, "block_size must be at least 1, got 0"),
        (LABELS[:2], torch.arange(2), {"seed": -1}, "a seed must be"),
    ],
)
def test_wrong_requests_are_refused_before_sampling(
    model: DiffusionModel, condition: Tensor, indices: Tensor, options: dict, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        generate(model, condition, indices, SamplerSettings(steps=2), **{"seed": 0, **options})


def test_steps_beyond_the_schedule_are_refused_before_sampling(model: DiffusionModel) -> None:
    with pytest.raises(ValueError, match="a grid of 101 steps does not fit"):
        generate(model, LABELS[:1], torch.arange(1), SamplerSettings(steps=101), seed=0)


def test_no_condition_is_the_null_condition(model: DiffusionModel) -> None:
    null = model.condition.null(3)
    settings = SamplerSettings(steps=2)
    images = generate_images(model, None, torch.arange(3), settings, seed=0)
    assert torch.equal(images, generate_images(model, null, torch.arange(3), settings, seed=0))
    with pytest.raises(ValueError, match="guidance needs a condition"):
        generate(model, None, torch.arange(3), SETTINGS, seed=0)


@pytest.mark.parametrize(("num_steps", "expected"), [(1, 1), (20, 20), (50, 50), (1000, 50)])
def test_default_settings_fit_every_schedule(model: DiffusionModel, num_steps: int, expected: int) -> None:
    short = replace(model, schedule=make_schedule("cosine", num_steps))
    assert default_settings(short) == SamplerSettings(steps=expected)
    assert len(generate_images(short, LABELS[:2], torch.arange(2), default_settings(short), seed=0)) == 2
