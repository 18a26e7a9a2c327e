"""Images as uint8 levels and as floats in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to uint8, rounded to the nearest level; values outside are clamped."""
    return ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]; `to_uint8` is its exact inverse."""
    return images.to(torch.float32) / 127.5 - 1.0
