"""Samples for pictures: the same noise and labels at every sampler setting, so that a person can compare them."""

from __future__ import annotations

import numpy as np
import torch

from diffusion_core.generation import SamplerSettings, generate_images
from pipelines.measurement.measure import CallCounter
from pipelines.measurement.units import Arrays, Unit, Work, load_model

PICTURE_FIRST = 1 << 30
"""Samples of pictures have numbers of their own, far from the measured ones."""
MOST_COLUMNS = 12


def picture_unit(settings: SamplerSettings, num_classes: int, rows: int) -> Unit:
    """Return the unit that samples a picture: one column per class, for the first `MOST_COLUMNS` classes."""
    return Unit(sample_picture, settings, PICTURE_FIRST, rows * min(num_classes, MOST_COLUMNS))


def sample_picture(work: Work, unit: Unit, device: torch.device) -> Arrays:
    """Sample the images of a picture, row by row: (count, C, H, W) uint8."""
    model = load_model(work, device)
    labels = torch.arange(unit.count) % min(len(model.class_names), MOST_COLUMNS)
    indices = torch.arange(unit.first, unit.first + unit.count)
    with CallCounter(model.network) as counter:
        images = generate_images(model, labels, indices, unit.settings, seed=work.seed)
    return {"images": images.numpy(), "network_calls": np.asarray([counter.calls])}
