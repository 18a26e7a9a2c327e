"""Decode images and bring them to one size and one number of channels."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.preparation.sources import Items

CHUNK = 1024


@dataclass(frozen=True)
class Transform:
    """Conversion to RGB or grey over a background, resizing of the shorter side to ``image_size`` (bicubic), centre crop."""

    image_size: int
    channels: int
    background: int

    def describe(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "background": self.background,
            "resize": "shorter side, bicubic",
            "crop": "centre",
        }

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return (H, W, C) uint8."""
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            behind = Image.new("RGBA", image.size, (self.background,) * 3 + (255,))
            image = Image.alpha_composite(behind, image)
        image = image.convert("L" if self.channels == 1 else "RGB")
        width, height = image.size
        if (width, height) != (self.image_size, self.image_size):
            scale = self.image_size / min(width, height)
            size = (max(round(width * scale), self.image_size), max(round(height * scale), self.image_size))
            image = image.resize(size, Image.Resampling.BICUBIC)
            left, top = (size[0] - self.image_size) // 2, (size[1] - self.image_size) // 2
            image = image.crop((left, top, left + self.image_size, top + self.image_size))
        return np.asarray(image, dtype=np.uint8).reshape(self.image_size, self.image_size, self.channels)


def decode(
    items: Items, indices: np.ndarray, transform: Transform, skip_broken: bool, skipped: list[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of (images (n, H, W, C) uint8, labels (n,) int64) in the order of ``indices``.

    With ``skip_broken``, broken images are skipped and their names appended to ``skipped``. Otherwise the first one raises
    a ValueError with its name.
    """
    shape = (transform.image_size, transform.image_size)
    if items.arrays is not None and items.arrays.shape[1:3] == shape:
        arrays = items.arrays[..., None] if items.arrays.ndim == 3 else items.arrays
        if arrays.shape[-1] == transform.channels:
            for start in range(0, len(indices), CHUNK):
                rows = indices[start : start + CHUNK]
                yield arrays[rows], items.labels[rows]
            return

    def open_image(index: int) -> np.ndarray | str:
        try:
            return transform(items.load(index))
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
            return f"{items.name(index)} ({reason})"

    with ThreadPoolExecutor() as pool:
        remaining = iter(indices.tolist())
        while chunk := list(islice(remaining, CHUNK)):
            images, labels = [], []
            for index, result in zip(chunk, pool.map(open_image, chunk), strict=True):
                if isinstance(result, np.ndarray):
                    images.append(result)
                    labels.append(items.labels[index])
                elif skip_broken:
                    skipped.append(result)
                else:
                    raise ValueError(
                        f"broken image {Path(items.root, result)}: repair or remove it, or set prepare.on_broken_image to skip"
                    )
            if images:
                yield np.stack(images), np.asarray(labels, dtype=np.int64)
