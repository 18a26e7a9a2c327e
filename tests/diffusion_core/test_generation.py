"""Generation: bit-identical samples in any batch, in their order, and block sizes per device."""

from __future__ import annotations

import pytest
import torch

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings, _aligned_blocks, generate, generate_images, rows_per_call
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


@pytest.mark.parametrize("options", [{"eta": 1.5}, {"eta": "large"}, {"steps": 0}])
def test_wrong_settings_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"eta must lie|steps must be"):
        SamplerSettings(**options)
