"""Pictures of samples during training: the same noise and labels each time, so that a person can compare them."""

from __future__ import annotations

import torch

from diffusion_core.generation import SamplerSettings, generate_images
from pipelines.pictures import labels_by_column, picture_of, png
from pipelines.training.loop import TrainSettings, TrainState
from pipelines.training.model import ema_model

SAMPLER_STEPS = 20
BLOCK_SIZE = 16
"""Images per network call: few, because training holds most of the memory."""


def progress_picture(settings: TrainSettings, state: TrainState, rows: int = 4) -> bytes:
    """Return a PNG with samples of the EMA weights, one column per class."""
    model = ema_model(settings, state)
    labels = labels_by_column(len(settings.class_names), rows)
    sampler = SamplerSettings(steps=min(SAMPLER_STEPS, model.schedule.num_steps))
    indices = torch.arange(len(labels))
    images = generate_images(model, labels, indices, sampler, seed=settings.seed, block_size=BLOCK_SIZE)
    return png(picture_of(images, len(labels) // rows))
