"""Images as uint8 levels and as floats in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to uint8, rounded to the nearest level; clamp finite values outside.

    Raises ValueError if the images are not floats, or hold NaN or infinity. It reads the values, which waits for a GPU.
    """
    if not images.is_floating_point():
        raise ValueError(f"to_uint8 takes floats in [-1, 1], got {images.dtype}")
    finite = images.isfinite()
    if not bool(finite.all()):
        wrong = int((~finite).sum())
        raise ValueError(
            f"{wrong} of {images.numel()} values of the images are NaN or infinite: they have no uint8 level"
        )
    values = images.to(torch.promote_types(images.dtype, torch.float32))  # half precision cannot hold every level
    return ((values.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]; `to_uint8` is its exact inverse. Raises ValueError for another dtype."""
    if images.dtype != torch.uint8:
        raise ValueError(f"to_float takes uint8 images with levels from 0 to 255, got {images.dtype}")
    return images.to(torch.float32) / 127.5 - 1.0
