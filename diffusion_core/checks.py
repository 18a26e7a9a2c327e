"""Input checks that several modules share."""

from __future__ import annotations

from numbers import Integral, Number
from typing import Any

import numpy as np
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


def check_condition(condition: Any, batch: int) -> None:
    """Raise ValueError if a condition does not have one entry for each of ``batch`` images.

    Checks tensors and arrays with a dimension, and lists and tuples of numbers or names. A network may take anything else, such
    as a mapping; that is the network's to check.
    """
    if isinstance(condition, Tensor | np.ndarray):
        count = len(condition) if condition.ndim else batch
    elif isinstance(condition, list | tuple) and all(isinstance(entry, str | Number | np.bool_) for entry in condition):
        count = len(condition)
    else:
        return
    if count != batch:
        raise ValueError(f"{count} conditions were given for {batch} images: give one per image")
