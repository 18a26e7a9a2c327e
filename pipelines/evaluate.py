"""Stage 5: FID, speed and class agreement for every eta and number of steps, on Ray."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffusion_core.artifact import DiffusionModel
from diffusion_core.storage import atomic_folder, write_json, write_text
from pipelines.cluster import check_resources, check_shared, ray_session
from pipelines.data.shards import read_manifest
from pipelines.evaluation.figures import heat_map, pareto_plot
from pipelines.evaluation.reference import Reference, load_reference
from pipelines.evaluation.sweep import GRID_COLUMNS, Row, pareto_front, run_sweep, sweep_settings
from pipelines.evaluation.units import Work
from pipelines.params import Params
from pipelines.stage import DATA, EVALUATION, METRICS, MODEL, PLOTS, REFERENCE, RUNS, check_writable, log, run_stage
from pipelines.state import fingerprint, state_folder
from pipelines.tracking import stage_run
from pipelines.training.grids import image_grid


def evaluate(params: Params) -> None:
    """Sample at every eta and number of steps on Ray, and write artifacts/evaluation: sweep.csv, quality.json, grids, the heat map and the Pareto front."""
    settings = params.evaluate
    check_writable(EVALUATION.parent, METRICS, PLOTS, RUNS)
    manifest = read_manifest(DATA)
    reference = load_reference(REFERENCE, manifest.content_hash)
    model = DiffusionModel.load(MODEL)
    _check_model(model, manifest, settings.steps)
    digest = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    key = fingerprint(
        "evaluate",
        params,
        {"data": manifest.content_hash, "model": digest, "extractor": reference.extractor.digest},
    )
    state_dir = state_folder("evaluate", key)
    sweep = sweep_settings(settings)
    work = Work(
        model_dir=str(MODEL.resolve()),
        model_digest=digest,
        reference_dir=str(REFERENCE.resolve()),
        data_hash=manifest.content_hash,
        seed=params.seed,
        batch_size=settings.batch_size,
        threads=max(int(settings.cpus_per_task), 1),
    )
    with ray_session(params.ray), stage_run(params, "evaluate", key, manifest.content_hash) as run:
        check_resources(
            1,
            settings.cpus_per_task,
            settings.gpus_per_task,
            "evaluate.cpus_per_task",
            "lower evaluate.cpus_per_task or evaluate.gpus_per_task",
        )
        check_shared({"the model": MODEL, "the reference": REFERENCE})

        def on_row(number: int, row: Row) -> None:
            values = {"eta": row.settings.eta, "steps": row.settings.steps, "num_samples": row.num_samples}
            child = run.child(_name(row), values)
            child.log_metrics(_measures(row, reference))
            child.finish()
            log.info(
                "eta %s, %d steps: %s %.4f, %.1f%% agree with their label, %.1f images/s a worker",
                row.settings.eta, row.settings.steps, reference.metric, row.fid, 100 * row.class_agreement, row.images_per_s,
            )  # fmt: skip

        real = reference.statistics["train"]
        counts = reference.description["class_counts"]
        rows = run_sweep(settings, work, sweep, counts, real, state_dir, on_row)
        identity = {
            "data_hash": manifest.content_hash,
            "metric": reference.metric,
            "extractor_digest": reference.extractor.digest,
            "num_samples": settings.num_samples,
            "spacing": settings.spacing,
            "guidance_scale": settings.guidance_scale,
            "seed": params.seed,
        }
        _write(rows, reference, {**identity, "model_digest": digest}, settings.grid_rows)
        best = min(rows, key=lambda row: row.fid)
        metrics = {
            f"best_{reference.metric}": round(best.fid, 6),
            "best_eta": best.settings.eta,
            "best_steps": best.settings.steps,
            "class_agreement": round(best.class_agreement, 6),
            "over_floor": round(best.fid / reference.description["floor"], 4)
            if reference.description["floor"]
            else None,
        }
        write_json(METRICS / "evaluate.json", metrics)
        run.log_metrics({name: value for name, value in metrics.items() if isinstance(value, int | float)})
        run.set_tags({name: str(value) for name, value in {**identity, "model_digest": digest}.items()})
        run.log_artifact(EVALUATION)


def _check_model(model: DiffusionModel, manifest: Any, steps: Sequence[int]) -> None:
    if list(model.class_names) != list(manifest.class_names) or model.image_size != manifest.shape[0]:
        raise ValueError(
            f"{MODEL} was trained on other classes or image sizes than {DATA} holds: run the train stage again"
        )
    if max(steps) > model.schedule.num_steps:
        raise ValueError(
            f"evaluate.steps: given {max(steps)}, allowed at most the model's {model.schedule.num_steps} steps"
        )


def _name(row: Row) -> str:
    return f"eta-{row.settings.eta}-steps-{row.settings.steps}"


def _measures(row: Row, reference: Reference) -> dict[str, float]:
    return {reference.metric: row.fid, "class_agreement": row.class_agreement, "images_per_s": row.images_per_s}


def _write(rows: Sequence[Row], reference: Reference, identity: dict[str, Any], grid_rows: int) -> None:
    """The evaluation folder, and the plots that DVC shows. Only sweep.csv and the Pareto plot hold times."""
    floor = float(reference.description["floor"])
    front = pareto_front(rows)
    quality = [
        {"eta": row.settings.eta, "steps": row.settings.steps, "fid": row.fid, "class_agreement": row.class_agreement}
        for row in rows
    ]
    with atomic_folder(EVALUATION) as folder:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            [
                "eta",
                "steps",
                "guidance_scale",
                "spacing",
                "num_samples",
                reference.metric,
                "class_agreement",
                "images_per_s",
                "pareto",
            ]
        )
        for row, best in zip(rows, front, strict=True):
            writer.writerow(
                [
                    row.settings.eta,
                    row.settings.steps,
                    row.settings.guidance_scale,
                    row.settings.spacing,
                    row.num_samples,
                    f"{row.fid:.6f}",
                    f"{row.class_agreement:.6f}",
                    f"{row.images_per_s:.3f}",
                    str(best).lower(),
                ]
            )
        write_text(folder / "sweep.csv", text.getvalue())
        write_json(folder / "quality.json", {**identity, "floor": floor, "rows": quality})
        (folder / "grids").mkdir()
        for row in rows:
            columns = min(len(row.grid) // grid_rows, GRID_COLUMNS)
            image_grid(torch.from_numpy(row.grid.copy()), columns).save(folder / "grids" / f"{_name(row)}.png")
        heat_map(rows, reference.metric, floor, folder / "heatmap.png")
        pareto_plot(rows, reference.metric, floor, folder / "pareto.png")
    lines = [f"{row.settings.steps},{row.settings.eta},{row.fid:.6f},{row.class_agreement:.6f}" for row in rows]
    write_text(PLOTS / "evaluate_fid.csv", "\n".join(["steps,eta,fid,class_agreement", *lines]) + "\n")
    Path(PLOTS / "evaluate_heatmap.png").write_bytes((EVALUATION / "heatmap.png").read_bytes())


if __name__ == "__main__":
    run_stage("evaluate", evaluate)
