"""The denoising trajectory: a few samples on their way from noise to image."""

from __future__ import annotations

import numpy as np
import torch

from diffusion_core.generation import SamplerSettings, generate
from diffusion_core.images import to_uint8
from diffusion_core.samplers import Step
from pipelines.measurement.measure import CallCounter
from pipelines.measurement.units import Arrays, Unit, Work, load_model

MOMENTS = 9
"""Columns of the trajectory."""


def trajectory_unit(settings: SamplerSettings, count: int) -> Unit:
    """Return the unit that samples ``count`` trajectories, one class after the other."""
    return Unit(sample_trajectory, settings, 0, count)


def sample_trajectory(work: Work, unit: Unit, device: torch.device) -> Arrays:
    """Sample, and keep x_t and the predicted x_0 after at most `MOMENTS` steps, evenly spaced, the first and the last included.

    Returns ``x`` and ``x0``, (count, moments, C, H, W) uint8; ``times``, (moments,) the t that each step leads to, -1 for the image;
    ``labels``, (count,).
    """
    model = load_model(work, device)
    labels = torch.arange(unit.count) % len(model.class_names)
    indices = torch.arange(unit.first, unit.first + unit.count)
    steps: list[Step] = []
    with CallCounter(model.network) as counter:
        blocks = generate(
            model,
            labels,
            indices,
            unit.settings,
            seed=work.seed,
            block_size=unit.count,
            on_step=lambda positions, step: steps.append(step),
        )
        for _ in blocks:
            pass
    chosen = sorted({round(i * (len(steps) - 1) / (MOMENTS - 1)) for i in range(MOMENTS)})
    arrays = {
        name: torch.stack([to_uint8(getattr(steps[moment], name)).cpu() for moment in chosen], dim=1).numpy()
        for name in ("x", "x0")
    }
    times = np.asarray([steps[moment].t_prev for moment in chosen])
    return {**arrays, "times": times, "labels": labels.numpy(), "network_calls": np.asarray([counter.calls])}
