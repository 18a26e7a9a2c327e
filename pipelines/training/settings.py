"""From params.yaml, the data set and the search's overrides to the settings of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.data.shards import Manifest
from pipelines.params import Params, parse_params, read_yaml
from pipelines.training.loop import TrainSettings

SEARCHED = ("schedule", "objective", "weighting", "learning_rate")


def train_settings(params: Params, manifest: Manifest, overrides: Mapping[str, Any] | None = None) -> TrainSettings:
    """The settings of the loop; ``overrides`` may set schedule, objective, weighting, learning_rate, steps and seed."""
    train = params.train
    chosen = {
        "schedule": train.diffusion.schedule,
        "objective": train.diffusion.objective,
        "weighting": train.diffusion.weighting,
        "learning_rate": train.learning_rate,
        "steps": train.steps,
        **(overrides or {}),
    }
    height, _, channels = manifest.shape
    network = train.network.model_dump(exclude={"multipliers", "num_res_blocks", "attention_sizes", "dropout"})
    if train.network.name == "unet":
        network = train.network.model_dump()
    network |= {
        "image_size": height,
        "image_channels": channels,
        "condition": {"kind": "class", "size": len(manifest.class_names)},
    }
    schedule: dict[str, Any] = {"name": chosen["schedule"], "num_steps": train.diffusion.num_steps}
    if train.diffusion.zero_terminal_snr:
        schedule["zero_terminal_snr"] = True
    return TrainSettings(
        seed=params.seed,
        steps=chosen["steps"],
        batch_size=train.batch_size,
        learning_rate=chosen["learning_rate"],
        network=network,
        schedule=schedule,
        objective=chosen["objective"],
        weighting=chosen["weighting"],
        warmup_steps=min(train.warmup_steps, chosen["steps"]),
        decay=train.decay,
        weight_decay=train.weight_decay,
        grad_clip=train.grad_clip,
        ema_decay=train.ema_decay,
        condition_dropout=train.condition_dropout,
        horizontal_flip=train.horizontal_flip,
        precision=train.precision,
        class_names=manifest.class_names,
    )


def read_overrides(path: Path, params: Params) -> dict[str, Any]:
    """The search's overrides from best.yaml, checked against the schema. Raises ValueError naming what is wrong."""
    tree = read_yaml(path)
    overrides = tree.get("overrides") if isinstance(tree, dict) else None
    if not isinstance(overrides, dict) or not set(overrides) <= set(SEARCHED):
        raise ValueError(f"{path}: must hold overrides of {', '.join(SEARCHED)}: run the tune stage again")
    whole = params.model_dump(by_alias=True)
    for name, value in overrides.items():
        section = whole["train"] if name == "learning_rate" else whole["train"]["diffusion"]
        section[name] = value
    parse_params(whole, str(path))
    return overrides
