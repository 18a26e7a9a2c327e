"""Samples for pictures: the same noise and labels at every sampler setting, so that a person can compare them."""

from __future__ import annotations

import numpy as np
import torch

from diffusion_core.generation import SamplerSettings, generate_images
from pipelines.measurement.measure import CallCounter
from pipelines.measurement.units import Arrays, Unit, Work, load_model
from pipelines.pictures import labels_by_column

PICTURE_FIRST = 1 << 30
"""Samples of pictures have numbers of their own, far from the measured ones."""


def picture_unit(settings: SamplerSettings, num_classes: int, rows: int) -> Unit:
    """Return the unit that samples a picture of one setting, with the labels of `labels_by_column`."""
    return Unit(sample_setting, settings, PICTURE_FIRST, len(labels_by_column(num_classes, rows)))


def sample_setting(work: Work, unit: Unit, device: torch.device) -> Arrays:
    """Sample the images of a picture, row by row: (count, C, H, W) uint8."""
    model = load_model(work, device)
    columns = len(labels_by_column(len(model.class_names), rows=1))
    labels = labels_by_column(len(model.class_names), rows=unit.count // columns)
    indices = torch.arange(unit.first, unit.first + unit.count)
    with CallCounter(model.network) as counter:
        images = generate_images(model, labels, indices, unit.settings, seed=work.seed)
    return {"images": images.numpy(), "network_calls": np.asarray([counter.calls])}
