"""Conversion of a training state to a DiffusionModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_core.artifact import DiffusionModel
from diffusion_core.schedules import make_schedule
from pipelines.training.loop import TrainSettings, TrainState


def ema_model(
    settings: TrainSettings, state: TrainState, provenance: Mapping[str, Any] | None = None
) -> DiffusionModel:
    """Return the EMA weights as a DiffusionModel; it shares their memory."""
    return DiffusionModel(
        network=state.ema.network,
        network_config=settings.network,
        schedule=make_schedule(**settings.schedule),
        objective=settings.objective,
        image_size=settings.network["image_size"],
        image_channels=settings.network["image_channels"],
        class_names=settings.class_names,
        condition_dropout=settings.condition_dropout,
        provenance=provenance or {},
    )
