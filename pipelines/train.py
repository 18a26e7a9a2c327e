"""Stage 4: train the network with Ray Train and write the EMA model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffusion_core.storage import write_json
from pipelines.cluster import check_shared, cluster_nodes, is_uri, place, ray_session, resolve_precision, state_storage
from pipelines.data.shards import open_split, read_manifest
from pipelines.ddp.driver import train_on_ray
from pipelines.ddp.progress import ProgressLog
from pipelines.identity import CONTINUES_FILE, Identity, State, identify, open_state
from pipelines.params import Params, RunSettings, flatten, with_overrides
from pipelines.resources import TrainingPlan, plan_training
from pipelines.stage import DATA, METRICS, MODEL, PLOTS, RUNS, SEARCH, check_writable, log, run_stage
from pipelines.storages import earlier_storages
from pipelines.tables import write_csv
from pipelines.tracking import Run, stage_run
from pipelines.training import checkpoint, loop
from pipelines.training.model import ema_model
from pipelines.training.settings import read_best, train_settings

COLUMNS = ("step", "loss", "learning_rate", "grad_norm")
PLOTTED_ROWS = 120
"""Minimum number of rows of plots/train_loss.csv if there are as many steps; the maximum is below twice as many."""


def train(params: Params, run: RunSettings) -> None:
    """Train the conditional diffusion model with Ray Train (DDP) and write artifacts/model. Resumes from the last checkpoint."""
    check_writable(MODEL.parent, METRICS, PLOTS, RUNS)
    manifest = read_manifest(DATA)
    best = read_best(SEARCH / "best.yaml")
    used = with_overrides(params, best.overrides, str(SEARCH / "best.yaml"))
    with ray_session(run.ray):
        plan = plan_training(run.train, batch_size=used.train.batch_size, steps=used.train.steps, nodes=cluster_nodes())
        place(plan)
        precision = resolve_precision(used.train.precision, plan.device_type)
        settings = train_settings(used.train, used.seed, manifest, precision)
        identity = train_identity(settings, manifest.content_hash)
        state = open_state(identity, run.resume)
        flat = {"seed": used.seed, **flatten("train", used.train), "train.precision": precision}
        tags = {"rediffuse.data_hash": manifest.content_hash, "rediffuse.precision": precision}
        with stage_run(run.tracking, "train", identity.key, settings=flat, tags=tags) as tracked:
            tracked.log_dict({"overrides": dict(best.overrides), "settings": asdict(settings)}, "train_settings.json")
            try:
                trained, folder = _trained(settings, plan, run, state, tracked)
            except loop.TrainingDivergedError as error:
                remedy = _remedy(settings, chosen="learning_rate" in best.overrides)
                raise ValueError(f"{error}: {remedy}") from None
            except checkpoint.CheckpointMismatchError as error:
                # without the pointer, the next run with resume: auto opens this identity's own state
                (RUNS / "train" / identity.key / CONTINUES_FILE).unlink(missing_ok=True)
                raise ValueError(f"{error}: set resume: auto in run.yaml to train from the beginning") from None
            origin = checkpoint.origin_of(folder)
            provenance = {
                "data_hash": manifest.content_hash,
                "fingerprint": identity.key,
                "step": trained.step,
                "settings": flat,
                **origin,
                **_changes("resumed_across_changes", state.changed_modules),
                **_changes("search_resumed_across_changes", best.resumed_across_changes),
            }
            digest = ema_model(settings, trained, provenance).save(MODEL)
            metrics = _write_metrics(settings, trained)
            tracked.log_metrics({f"final/{name}": value for name, value in metrics.items()}, step=trained.step)
            tracked.log_artifact(MODEL / "model.json", "model")
            tracked.set_tags(
                {"rediffuse.model_digest": digest, **{f"rediffuse.{name}": value for name, value in origin.items()}}
            )
    log.info("model %s: loss %.4f over the last tenth of %d steps", digest[:12], metrics["final_loss"], trained.step)


def train_identity(settings: loop.TrainSettings, data_hash: str) -> Identity:
    """Return the identity of a training: the settings of the loop, resolved, not those of params.yaml."""
    computed_by: tuple[Callable[..., Any], ...] = (loop.train, checkpoint.save_checkpoint, open_split)
    return identify("train", flatten("train", asdict(settings)), {"data": data_hash}, computed_by)


def _trained(
    settings: loop.TrainSettings, plan: TrainingPlan, run: RunSettings, state: State, tracked: Run
) -> tuple[loop.TrainState, Path]:
    """Train on Ray. Return the final state, on the CPU, and the folder of its checkpoint."""
    storage = state_storage(run.ray.storage, "train", state)
    folders = {"the data set": DATA}
    check_shared(folders if is_uri(storage) else {**folders, "ray.storage": Path(storage)})
    progress = ProgressLog(tracked, settings.steps, state.folder / "samples")
    folder = train_on_ray(
        settings,
        plan,
        data_dir=DATA,
        storage=storage,
        earlier=earlier_storages(state, storage),
        state=state,
        on_row=progress.on_row,
        on_picture=progress.on_picture,
        grace_seconds=run.grace_seconds,
    )
    trained = loop.new_state(settings, torch.device("cpu"))
    checkpoint.load_checkpoint(trained, folder, state.key)
    assert trained.step == settings.steps, f"training ended at step {trained.step} of {settings.steps}"
    progress.flush(loop.rows(settings, trained, plan.log_every))
    return trained, folder


def _changes(name: str, modules: Sequence[str]) -> dict[str, list[str]]:
    """Return the entry of the provenance for a forced resume; empty if there was none."""
    return {name: list(modules)} if modules else {}


def _write_metrics(settings: loop.TrainSettings, trained: loop.TrainState) -> dict[str, Any]:
    """Write metrics/train.json and the loss curve, whose rows depend on the number of steps, never on run.yaml. Return the metrics."""
    rows = loop.rows(settings, trained, max(settings.steps // PLOTTED_ROWS, 1))
    texts = [{name: value if name == "step" else f"{value:.6g}" for name, value in row.items()} for row in rows]
    write_csv(PLOTS / "train_loss.csv", COLUMNS, texts)
    metrics = {
        "steps": trained.step,
        "final_loss": round(float(trained.losses[-max(settings.steps // 10, 1) :].double().mean()), 6),
        "parameters": sum(parameter.numel() for parameter in trained.network.parameters()),
        "images_seen": trained.step * settings.batch_size,
    }
    write_json(METRICS / "train.json", metrics)
    return metrics


def _remedy(settings: loop.TrainSettings, chosen: bool) -> str:
    """Return the keys of params.yaml that help. ``chosen``: the search has chosen the learning rate."""
    origin = ", chosen by the search from tune.space.learning_rate" if chosen else ""
    remedy = (
        f"lower train.learning_rate ({settings.learning_rate:g}{origin}) or train.grad_clip ({settings.grad_clip:g})"
    )
    return remedy if settings.precision == "fp32" else f"{remedy}, or set train.precision to fp32"


if __name__ == "__main__":
    run_stage("train", train)
