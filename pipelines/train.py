"""Stage 4: train the network with Ray Train and write the EMA model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from diffusion_core.storage import write_json
from pipelines.cluster import check_resources, check_shared, cluster_nodes, is_uri, ray_session, resolve_precision
from pipelines.data.shards import read_manifest
from pipelines.ddp.driver import train_on_ray
from pipelines.ddp.progress import ProgressLog
from pipelines.identity import identify, open_state
from pipelines.params import Params, RunSettings, flatten, with_overrides
from pipelines.resources import plan_training
from pipelines.stage import DATA, METRICS, MODEL, PLOTS, RUNS, SEARCH, check_writable, log, run_stage
from pipelines.tables import write_csv
from pipelines.tracking import stage_run
from pipelines.training import checkpoint, loop
from pipelines.training.model import ema_model
from pipelines.training.settings import read_overrides, train_settings

COLUMNS = ("step", "loss", "learning_rate", "grad_norm")
PLOTTED_ROWS = 120
"""Rows of plots/train_loss.csv, at least, if there are as many steps; fewer than twice as many."""


def train(params: Params, run: RunSettings) -> None:
    """Train the conditional diffusion model with Ray Train (DDP) and write artifacts/model. Resumes from the last checkpoint."""
    check_writable(MODEL.parent, METRICS, PLOTS, RUNS)
    manifest = read_manifest(DATA)
    best = SEARCH / "best.yaml"
    overrides = read_overrides(best)
    used = with_overrides(params, overrides, str(best))
    with ray_session(run.ray):
        plan = plan_training(run.train, batch_size=used.train.batch_size, steps=used.train.steps, nodes=cluster_nodes())
        log.info("%s", plan.reason)
        if plan.warning:
            log.warning("%s", plan.warning)
        check_resources(
            plan.num_workers,
            plan.cpus_per_worker,
            plan.gpus_per_worker,
            "train.num_workers",
            "lower train.num_workers, train.cpus_per_worker or train.gpus_per_worker in run.yaml, or add nodes",
        )
        settings = train_settings(
            used.train, used.seed, manifest, resolve_precision(used.train.precision, plan.device_type)
        )
        flat = {"seed": used.seed, **flatten("train", used.train), "train.precision": settings.precision}
        identity = identify("train", flat, {"data": manifest.content_hash}, [loop.train, checkpoint.save_checkpoint])
        state = open_state(identity, run.resume)
        tags = {"rediffuse.data_hash": manifest.content_hash, "rediffuse.precision": settings.precision}
        with stage_run(run.tracking, "train", identity.key, settings=flat, tags=tags) as tracked:
            storage = run.ray.storage
            shared = {"the data set": DATA}
            check_shared(shared if is_uri(storage) else {**shared, "ray.storage": Path(storage)})
            tracked.log_dict({"overrides": overrides, "settings": asdict(settings)}, "train_settings.json")
            progress = ProgressLog(tracked, settings.steps, RUNS / "train" / "samples")
            try:
                folder = train_on_ray(
                    settings,
                    plan,
                    data_dir=DATA,
                    storage=storage,
                    state=state,
                    on_row=progress.on_row,
                    on_picture=progress.on_picture,
                )
            except loop.TrainingDivergedError as error:
                raise ValueError(f"{error}: {_remedy(settings, chosen='learning_rate' in overrides)}") from None
            trained = loop.new_state(settings, torch.device("cpu"))
            checkpoint.load_checkpoint(trained, folder, state.key)
            assert trained.step == settings.steps, f"training ended at step {trained.step} of {settings.steps}"
            progress.flush(loop.rows(settings, trained, plan.log_every))
            origin = checkpoint.origin_of(folder)
            provenance = {
                "data_hash": manifest.content_hash,
                "fingerprint": identity.key,
                "step": trained.step,
                "settings": flat,
                **origin,
            }
            if state.changed_modules:
                provenance["resumed_across_changes"] = list(state.changed_modules)
            digest = ema_model(settings, trained, provenance).save(MODEL)
            _write_plot(settings, trained)
            metrics = {
                "steps": trained.step,
                "final_loss": round(float(trained.losses[-max(settings.steps // 10, 1) :].double().mean()), 6),
                "parameters": sum(p.numel() for p in trained.network.parameters()),
                "images_seen": trained.step * settings.batch_size,
            }
            write_json(METRICS / "train.json", metrics)
            tracked.log_metrics({f"final/{name}": value for name, value in metrics.items()}, step=trained.step)
            tracked.log_artifact(MODEL / "model.json", "model")
            tracked.set_tags(
                {"rediffuse.model_digest": digest, **{f"rediffuse.{name}": value for name, value in origin.items()}}
            )
    log.info("model %s: loss %.4f over the last tenth of %d steps", digest[:12], metrics["final_loss"], trained.step)


def _write_plot(settings: loop.TrainSettings, trained: loop.TrainState) -> None:
    """Write the loss curve. Its rows depend on the number of steps, never on run.yaml."""
    rows = loop.rows(settings, trained, max(settings.steps // PLOTTED_ROWS, 1))
    shown = [{name: value if name == "step" else f"{value:.6g}" for name, value in row.items()} for row in rows]
    write_csv(PLOTS / "train_loss.csv", COLUMNS, shown)


def _remedy(settings: loop.TrainSettings, chosen: bool) -> str:
    """Return the keys of params.yaml that help. ``chosen``: the search has chosen the learning rate."""
    origin = ", chosen by the search from tune.space.learning_rate" if chosen else ""
    remedy = (
        f"lower train.learning_rate ({settings.learning_rate:g}{origin}) or train.grad_clip ({settings.grad_clip:g})"
    )
    return remedy if settings.precision == "fp32" else f"{remedy}, or set train.precision to fp32"


if __name__ == "__main__":
    run_stage("train", train)
