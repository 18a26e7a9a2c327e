"""Pictures that show several images at once."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

SMALLEST = 32


def picture_of(images: Tensor, columns: int, *, scale: int | None = None, gap: int = 2) -> Image.Image:
    """Arrange (N, C, H, W) uint8 images row by row on white, ``gap`` pixels apart; C is 1 or 3.

    Each image is enlarged ``scale`` times without smoothing. By default its longer side gets at least 32 pixels.
    """
    from torchvision.utils import make_grid  # takes seconds to import

    scale = scale or -(-SMALLEST // max(images.shape[-2:]))
    large = images.cpu().repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    if len(large) == 1:  # make_grid would drop the gap
        picture = torch.nn.functional.pad(large[0], (gap,) * 4, value=255)
    else:
        picture = make_grid(large, nrow=columns, padding=gap, pad_value=255)
    pixels = picture.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if images.shape[1] == 1 else pixels)


def png(picture: Image.Image) -> bytes:
    """Return the picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def labels_by_column(num_classes: int, rows: int, most: int = 12) -> Tensor:
    """Return (rows * columns,) int64 labels, row by row: one column per class, for the first ``most`` classes."""
    return torch.arange(min(num_classes, most), dtype=torch.int64).repeat(rows)
