from __future__ import annotations

import pytest
import torch

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings, _aligned_blocks, generate, generate_images, to_float, to_uint8
from diffusion_core.networks import build_network
from diffusion_core.schedules import make_schedule


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    """Random weights, 8x8 RGB, three classes, attention: every kind of layer that rounds by the number of rows."""
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
def test_sample_is_bit_identical_whoever_else_is_asked_for(model: DiffusionModel, batch: int) -> None:
    whole = generate_images(model, LABELS, torch.arange(70), SETTINGS, seed=3)
    for part in list(torch.arange(70).split(batch))[:4]:
        assert torch.equal(generate_images(model, LABELS[part], part, SETTINGS, seed=3), whole[part])


def test_samples_come_back_in_the_order_asked_for(model: DiffusionModel) -> None:
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


def test_every_step_is_seen_for_the_samples_asked_for_only(model: DiffusionModel) -> None:
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


def test_uint8_images_survive_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("options", [{"eta": 1.5}, {"eta": "large"}, {"steps": 0}])
def test_wrong_settings_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"eta must lie|steps must be"):
        SamplerSettings(**options)
