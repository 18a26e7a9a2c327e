"""Conversions between uint8 images and floats."""

from __future__ import annotations

import torch

from diffusion_core.images import to_float, to_uint8


def test_every_uint8_level_survives_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = to_float(levels)
    assert images.dtype == torch.float32 and float(images.min()) == -1.0 and float(images.max()) == 1.0
    assert torch.equal(to_uint8(images), levels)


def test_values_outside_the_range_become_black_and_white() -> None:
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
