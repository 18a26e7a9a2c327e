"""Input checks that several modules share."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from torch import Tensor


def is_whole(value: Any) -> bool:
    """Return whether ``value`` is a Python or NumPy integer; False for any float."""
    return isinstance(value, Integral)


def check_images(images: Any, name: str = "x0") -> None:
    """Raise ValueError unless ``images`` is a (B, ...) batch of floats."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2:
        got = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"{name} must be a (B, ...) batch of floats, got {got}: convert 8-bit images with diffusion_core.images.to_float"
        )
