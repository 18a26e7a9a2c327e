"""Conversions between uint8 images and floats."""

from __future__ import annotations

import pytest
import torch

from diffusion_core.images import to_float, to_uint8


def test_every_uint8_level_survives_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = to_float(levels)
    assert images.dtype == torch.float32 and float(images.min()) == -1.0 and float(images.max()) == 1.0
    assert torch.equal(to_uint8(images), levels)


def test_values_outside_the_range_become_black_and_white() -> None:
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_never_become_a_level(value: float, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="1 of 4 values of the images are NaN or infinite"):
        to_uint8(torch.tensor([[0.0, value], [1.0, -1.0]], dtype=dtype))


def test_levels_are_computed_in_float32_for_half_precision() -> None:
    halves = torch.linspace(-1.0, 1.0, 1001).to(torch.bfloat16)
    assert torch.equal(to_uint8(halves), to_uint8(halves.float()))


def test_conversion_of_what_is_already_converted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"to_uint8 takes floats in \[-1, 1\], got torch.uint8"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"to_float takes uint8 images .* got torch.float32"):
        to_float(torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int64, torch.bool])
def test_only_uint8_images_have_levels(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="to_float takes uint8 images"):
        to_float(torch.ones(2, 2).to(dtype))
