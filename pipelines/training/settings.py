"""Settings of the training loop, from params.yaml, the manifest and best.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.shards import Manifest
from pipelines.params import Train, read_yaml
from pipelines.training.loop import TrainSettings

SEARCHED = ("schedule", "objective", "weighting", "learning_rate")


@dataclass(frozen=True)
class Best:
    """The search's choice: overrides of train's settings. ``resumed_across_changes``: see `pipelines.identity.State`."""

    overrides: Mapping[str, Any]
    resumed_across_changes: tuple[str, ...] = ()


def train_settings(train: Train, seed: int, manifest: Manifest, precision: str) -> TrainSettings:
    """Return the settings of the loop. ``precision``: fp32 or bf16, resolved; replaces ``train.precision``."""
    height, _, channels = manifest.shape
    unused = set() if train.network.name == "unet" else {"multipliers", "num_res_blocks", "attention_sizes", "dropout"}
    network = train.network.model_dump(exclude=unused) | {
        "image_size": height,
        "image_channels": channels,
        "condition": {"kind": "class", "size": len(manifest.class_names)},
    }
    schedule: dict[str, Any] = {"name": train.diffusion.schedule, "num_steps": train.diffusion.num_steps}
    if train.diffusion.zero_terminal_snr:
        schedule["zero_terminal_snr"] = True
    return TrainSettings(
        seed=seed,
        steps=train.steps,
        batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        network=network,
        schedule=schedule,
        objective=train.diffusion.objective,
        weighting=train.diffusion.weighting,
        precision=precision,
        warmup_steps=min(train.warmup_steps, train.steps),
        decay=train.decay,
        weight_decay=train.weight_decay,
        grad_clip=train.grad_clip,
        ema_decay=train.ema_decay,
        condition_dropout=train.condition_dropout,
        horizontal_flip=train.horizontal_flip,
        class_names=manifest.class_names,
    )


def shortened(train: Train, steps: int) -> Train:
    """Return the settings of a run of ``steps`` steps that stands for the whole one, such as a trial of the search.

    The schedule of the learning rate keeps its shape: the warm-up takes the same share of the steps, rounded, at least 1 if there is
    one, and the decay ends with the run. Otherwise a warm-up of the whole run's length would fill a short run: with 5,000 of 200,000
    steps and trials of 4,000, the learning rate would reach its peak at a trial's last step and never fall. The decay of the EMA stays: `diffusion_core.ema.warmup_decay` limits the average to about
    the last ninth of the steps so far, so it scales with a short run by itself.
    """
    warmup_steps = max(round(train.warmup_steps * steps / train.steps), min(train.warmup_steps, 1))
    return train.model_copy(update={"steps": steps, "warmup_steps": min(warmup_steps, steps)})


def read_best(path: Path) -> Best:
    """Return the search's choice from best.yaml. Raises ValueError if the file does not have its form."""
    tree = read_yaml(path)
    overrides = tree.get("overrides") if isinstance(tree, dict) else None
    if not isinstance(overrides, dict) or not set(overrides) <= set(SEARCHED):
        raise ValueError(f"{path}: must hold overrides of {', '.join(SEARCHED)}: run the tune stage again")
    return Best(overrides, tuple(str(module) for module in tree.get("resumed_across_changes") or ()))
