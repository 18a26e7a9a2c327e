"""Stage 4: train the network with Ray Train and write the EMA model."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_core.storage import write_json, write_text
from pipelines.cluster import check_resources, check_shared, is_uri, ray_session
from pipelines.data.shards import read_manifest
from pipelines.params import Params
from pipelines.stage import DATA, METRICS, MODEL, PLOTS, RUNS, SEARCH, check_writable, log, run_stage
from pipelines.state import fingerprint, state_folder
from pipelines.tracking import stage_run
from pipelines.training.checkpoint import load_checkpoint
from pipelines.training.driver import train_on_ray
from pipelines.training.loop import ema_model, new_state
from pipelines.training.settings import read_overrides, train_settings


def train(params: Params) -> None:
    """Train the conditional diffusion model with Ray Train (DDP), going on from the last checkpoint if there is one, and write artifacts/model."""
    check_writable(MODEL.parent, METRICS, PLOTS, RUNS)
    manifest = read_manifest(DATA)
    overrides = read_overrides(SEARCH / "best.yaml", params)
    settings = train_settings(params, manifest, overrides)
    key = fingerprint("train", params, {"data": manifest.content_hash, **{k: str(v) for k, v in overrides.items()}})
    state_dir = state_folder("train", key)
    with ray_session(params.ray), stage_run(params, "train", key, manifest.content_hash) as run:
        check_resources(
            params.train.num_workers,
            params.train.cpus_per_worker,
            params.train.gpus_per_worker,
            "train.num_workers",
            "lower train.num_workers, train.cpus_per_worker or train.gpus_per_worker, or add nodes",
        )
        folders = {"the data set": DATA}
        check_shared(folders if is_uri(params.ray.storage) else {**folders, "ray.storage": state_dir})
        run.log_dict({"overrides": overrides, "settings": _plain(settings)}, "train_settings.json")
        logger = _Logger(run, settings.steps)
        checkpoint, history = train_on_ray(params, settings, DATA, state_dir, key, logger.on_row, logger.on_grid)
        logger.flush(history)
        state = new_state(settings, torch.device("cpu"))
        load_checkpoint(state, checkpoint, key)
        model = ema_model(settings, state, {"data_hash": manifest.content_hash, "fingerprint": key, "step": state.step})
        digest = model.save(MODEL)
        rows = ["step,loss,learning_rate,grad_norm"]
        rows += [f"{r['step']},{r['loss']:.6g},{r['learning_rate']:.6g},{r['grad_norm']:.6g}" for r in history]
        write_text(PLOTS / "train_loss.csv", "\n".join(rows) + "\n")
        tail = history[-max(len(history) // 10, 1) :]
        metrics = {
            "steps": state.step,
            "final_loss": round(sum(row["loss"] for row in tail) / len(tail), 6),
            "parameters": sum(p.numel() for p in state.network.parameters()),
            "images_seen": state.step * settings.batch_size,
        }
        write_json(METRICS / "train.json", metrics)
        run.log_metrics({f"final/{name}": value for name, value in metrics.items()}, step=state.step)
        run.log_artifact(MODEL / "model.json", "model")
        run.set_tags({"rediffuse.model_digest": digest})
    log.info("model %s: loss %.4f over the last tenth of %d steps", digest[:12], metrics["final_loss"], state.step)


class _Logger:
    """Shows progress, and logs rows to MLflow in batches."""

    def __init__(self, run: Any, steps: int) -> None:
        self.run = run
        self.steps = steps
        self.pending: list[dict[str, float]] = []
        self.shown = 0.0

    def on_row(self, row: dict[str, Any]) -> None:
        named = {f"train/{name}": value for name, value in row.items() if name != "step"}
        self.pending.append({"step": row["step"], **named})
        if "images_per_s" not in row:
            return
        if len(self.pending) >= 10:
            self.flush()
        if row["step"] - self.shown >= self.steps / 20 or row["step"] == self.steps:
            self.shown = row["step"]
            minutes, seconds = divmod(int(row["seconds_left"]), 60)
            log.info(
                "step %d/%d  loss %.4f  lr %.2e  grad %.2f  %.0f images/s  ETA %d:%02d",
                row["step"], self.steps, row["loss"], row["learning_rate"], row["grad_norm"], row["images_per_s"], minutes, seconds,
            )  # fmt: skip

    def on_grid(self, step: int, picture: bytes) -> None:
        path = RUNS / "train" / "grid" / f"step_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
        self.run.log_artifact(path, "samples")

    def flush(self, history: list[dict[str, float]] | None = None) -> None:
        """Log what is pending; with the whole history, also what a kill may have lost."""
        rows, self.pending = self.pending, []
        self.run.log_rows(rows)
        if history is not None:
            self.run.log_rows(
                [{"step": r["step"], **{f"train/{k}": v for k, v in r.items() if k != "step"}} for r in history]
            )


def _plain(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


if __name__ == "__main__":
    run_stage("train", train)
