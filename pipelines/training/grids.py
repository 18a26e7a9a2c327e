"""Sample grids: the same noise and labels each time, so that a person can compare them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_core.generation import SamplerSettings, generate_images
from pipelines.training.loop import TrainSettings, TrainState, ema_model


def image_grid(images: Tensor, columns: int, *, scale: int | None = None, gap: int = 2) -> Image.Image:
    """(N, C, H, W) uint8 images as one picture, row by row, enlarged (without smoothing) to at least 32 pixels each."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    scale = scale or max(1, -(-32 // max(height, width)))
    cell_h, cell_w = height * scale + gap, width * scale + gap
    canvas = np.full((rows * cell_h + gap, columns * cell_w + gap, channels), 255, dtype=np.uint8)
    pixels = images.permute(0, 2, 3, 1).numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    for index, picture in enumerate(pixels):
        top, left = gap + (index // columns) * cell_h, gap + (index % columns) * cell_w
        canvas[top : top + height * scale, left : left + width * scale] = picture
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def class_grid_labels(num_classes: int, rows: int, most: int = 12) -> Tensor:
    """(rows * columns,) int64: one column a class (the first ``most`` of them), row by row."""
    return torch.arange(min(num_classes, most), dtype=torch.int64).repeat(rows)


def sample_grid_png(settings: TrainSettings, state: TrainState, steps: int, rows: int = 4) -> bytes:
    """A grid of the EMA weights' samples, one column a class."""
    model = ema_model(settings, state)
    labels = class_grid_labels(len(settings.class_names), rows)
    options: dict[str, Any] = {"seed": settings.seed}
    images = generate_images(model, labels, torch.arange(len(labels)), SamplerSettings(steps=steps), **options)
    return png(image_grid(images, len(labels) // rows))
