"""One trial: train for a while, and judge the EMA weights by a quick FID at each rung.

Losses of different objectives and schedules cannot be compared, so sample quality is what the search compares.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_core.generation import SamplerSettings, generate
from diffusion_core.metrics.frechet import frechet_distance
from diffusion_core.metrics.statistics import GaussianStatistics, merge_statistics
from pipelines.cluster import prepare_worker
from pipelines.data.shards import open_split
from pipelines.evaluation.reference import Reference, load_reference
from pipelines.evaluation.sweep import sample_labels
from pipelines.training.checkpoint import load_checkpoint, save_checkpoint
from pipelines.training.loop import Hooks, TrainingDivergedError, TrainSettings, TrainState, ema_model, new_state, train

FAILED_FID = 1e9
"""What a diverged trial reports: worse than any image could be, and still a number."""


@dataclass(frozen=True)
class TrialWork:
    """What all trials share. Paths are absolute: trials run elsewhere."""

    settings: dict[str, Any]
    data_dir: str
    reference_dir: str
    data_hash: str
    rungs: tuple[int, ...]
    num_samples: int
    ddim_steps: int
    threads: int


def rungs(steps: int, grace_steps: int, reduction_factor: int) -> tuple[int, ...]:
    """The steps at which trials are compared: grace_steps times powers of the factor, and the end."""
    marks = []
    mark = grace_steps
    while mark < steps:
        marks.append(mark)
        mark *= reduction_factor
    return (*marks, steps)


def trial_settings(base: dict[str, Any], config: dict[str, Any]) -> TrainSettings:
    """The loop's settings with a trial's choice of schedule, objective, weighting and learning rate."""
    schedule = {**base["schedule"], "name": config["schedule"]}
    return TrainSettings(**{**base, **config, "schedule": schedule})


def run_trial(config: dict[str, Any], work: TrialWork) -> None:
    """A Ray Tune trainable: reports ``fid`` and ``step`` at each rung with a checkpoint, from which it goes on after a death."""
    from ray import tune

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_worker(work.threads)
    settings = trial_settings(work.settings, config)
    images = open_split(Path(work.data_dir), "train")
    reference = load_reference(Path(work.reference_dir), work.data_hash)
    reference.extractor.to(device)
    state = new_state(settings, device)
    key = trial_key(config)
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            load_checkpoint(state, Path(folder), key)
    for rung in work.rungs:
        if rung <= state.step:
            continue
        try:
            train(
                settings,
                images,
                state,
                Hooks(log_every=10, checkpoint_every=rung, sample_every=settings.steps + 1),
                until=rung,
            )
        except TrainingDivergedError:
            tune.report({"fid": FAILED_FID, "step": work.rungs[-1], "loss": float("nan")})
            return
        fid = quick_fid(settings, state, reference, work.num_samples, work.ddim_steps)
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(state, Path(folder), key)
            metrics = {"fid": fid, "step": state.step, "loss": state.history[-1]["loss"]}
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def quick_fid(
    settings: TrainSettings, state: TrainState, reference: Reference, num_samples: int, ddim_steps: int
) -> float:
    """FID of the EMA weights' samples by deterministic DDIM; the noise and labels are the same for every trial."""
    model = ema_model(settings, state)
    device = next(model.network.parameters()).device
    labels = torch.from_numpy(sample_labels(reference.description["class_counts"], num_samples, settings.seed))
    sampler = SamplerSettings(steps=ddim_steps, eta=0.0)
    blocks = generate(
        model, labels, torch.arange(num_samples), sampler, seed=settings.seed, block_size=min(num_samples, 128)
    )
    parts = [
        GaussianStatistics.from_features(reference.extractor(block.to(device)).double().cpu().numpy())
        for _, block in blocks
    ]
    return frechet_distance(merge_statistics(parts), reference.statistics["train"])


def trial_key(config: dict[str, Any]) -> str:
    return "/".join(f"{name}={config[name]}" for name in sorted(config))


def share(settings: TrainSettings) -> dict[str, Any]:
    """Settings as plain values that travel to the trials."""
    return asdict(settings)
