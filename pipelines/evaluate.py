"""Stage 5: FID, speed and class agreement for every eta and number of steps, on Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings
from diffusion_core.storage import atomic_folder, write_json
from pipelines.cluster import check_resources, check_shared, cluster_nodes, ray_session
from pipelines.data.shards import Manifest, read_manifest
from pipelines.evaluation.figures import floor_label, heat_map, pareto_plot
from pipelines.evaluation.samples import picture_unit, sample_picture
from pipelines.evaluation.sweep import Row, is_suspicious, make_row, pareto_front, sweep_settings
from pipelines.evaluation.trajectory import sample_trajectory, trajectory_unit
from pipelines.identity import identify, open_state
from pipelines.measurement.distributed import measure_on_ray
from pipelines.measurement.floor import Floor, floor_at
from pipelines.measurement.measure import Measurement, rows_per_call
from pipelines.measurement.reference import load_reference, load_test_features
from pipelines.measurement.units import Arrays, Unit, Work, load_result, measure_unit
from pipelines.params import Params, RunSettings, flatten
from pipelines.pictures import picture_of
from pipelines.resources import plan_units
from pipelines.stage import DATA, EVALUATION, METRICS, MODEL, PLOTS, REFERENCE, RUNS, check_writable, log, run_stage
from pipelines.tables import write_csv
from pipelines.tracking import stage_run


def evaluate(params: Params, run: RunSettings) -> None:
    """Sample at every eta and number of steps on Ray, and write artifacts/evaluation: sweep.csv, quality.json, pictures of samples, a denoising trajectory, the heat map and the Pareto front."""
    settings = params.evaluate
    check_writable(EVALUATION.parent, METRICS, PLOTS, RUNS)
    manifest = read_manifest(DATA)
    reference = load_reference(REFERENCE, manifest.content_hash)
    _check_model(DiffusionModel.load(MODEL), manifest, settings.steps)
    digest = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    inputs = {"data": manifest.content_hash, "model": digest, "extractor": reference.extractor.digest}
    sweep = sweep_settings(settings.etas, settings.steps, settings.guidance_scale, settings.spacing)
    with ray_session(run.ray):
        num_units = len(sweep) * (1 + -(-settings.num_samples // settings.shard_size))
        plan = plan_units(run.evaluate, num_units=num_units, nodes=cluster_nodes())
        log.info("%s", plan.reason)
        if plan.warning:
            log.warning("%s", plan.warning)
        check_resources(
            1, plan.cpus, plan.gpus, "evaluate.cpus_per_task", "lower evaluate.cpus_per_task or evaluate.gpus_per_task"
        )
        check_shared({"the model": MODEL, "the reference": REFERENCE})
        rows_of_call = rows_per_call(plan.device_type) if settings.batch_size == "auto" else settings.batch_size
        # what decides a unit's result, besides its name: more etas, steps or samples reuse the units that are finished
        decisive = {"seed": params.seed, "rows_per_call": rows_of_call, "device_type": plan.device_type}
        computed_by = [measure_unit, sample_picture, sample_trajectory]
        state_dir = open_state(identify("evaluate", decisive, inputs, computed_by), run.resume).folder
        used = {**decisive, **flatten("evaluate", settings)}
        key = identify("evaluate", used, inputs, computed_by).key
        work = Work(
            model_dir=str(MODEL.resolve()),
            model_digest=digest,
            reference_dir=str(REFERENCE.resolve()),
            data_hash=manifest.content_hash,
            seed=params.seed,
            rows_per_call=rows_of_call,
        )
        pictures = [picture_unit(setting, len(manifest.class_names), settings.picture_rows) for setting in sweep]
        longest = SamplerSettings(max(settings.steps), 0.0, settings.guidance_scale, settings.spacing)
        trajectory = trajectory_unit(longest, settings.trajectory_images)
        real, metric = reference.statistics["train"], reference.metric
        rows: dict[int, Row] = {}
        tags = {"rediffuse.data_hash": manifest.content_hash}
        with stage_run(run.tracking, "evaluate", key, settings=used, tags=tags) as tracked:

            def on_measurement(number: int, measurement: Measurement) -> None:
                row = rows[number] = make_row(sweep[number], measurement, real)
                values = {"eta": row.settings.eta, "steps": row.settings.steps, "num_samples": row.num_samples}
                child = tracked.child(row.name, values)
                child.log_metrics(_measures(row, metric))
                child.finish()
                log.info(
                    "eta %s, %d steps: %s %.4f%s, %.1f%% agree with their label, %.1f images/s per worker",
                    row.settings.eta,
                    row.settings.steps,
                    metric,
                    row.fid,
                    "" if row.fid_error is None else f" ± {row.fid_error:.4f}",
                    100 * row.class_agreement,
                    row.images_per_s,
                )

            measure_on_ray(
                sweep,
                settings.num_samples,
                settings.shard_size,
                work,
                state_dir=state_dir,
                plan=plan,
                others=[*pictures, trajectory],
                on_measurement=on_measurement,
            )
            in_order = [rows[number] for number in range(len(sweep))]
            floor = floor_at(*load_test_features(REFERENCE), real, settings.num_samples, params.seed)
            _report_floor(in_order, metric, floor)
            quality = {
                "data_hash": manifest.content_hash,
                "metric": metric,
                "extractor_digest": reference.extractor.digest,
                "num_samples": settings.num_samples,
                "spacing": settings.spacing,
                "guidance_scale": settings.guidance_scale,
                "seed": params.seed,
                "model_digest": digest,
            }
            with atomic_folder(EVALUATION) as folder:
                _write_tables(in_order, metric, floor, quality, folder)
                samples = [_finished(state_dir, unit)["images"] for unit in pictures]
                _write_pictures(in_order, samples, settings.picture_rows, folder / "samples")
                _write_trajectory(_finished(state_dir, trajectory), longest, manifest.class_names, folder)
                heat_map(in_order, metric, floor, folder / "heatmap.png")
                pareto_plot(in_order, metric, floor, folder / "pareto.png")
            fids = [
                {
                    "steps": row.settings.steps,
                    "eta": row.settings.eta,
                    "fid": f"{row.fid:.6f}",
                    "class_agreement": f"{row.class_agreement:.6f}",
                }
                for row in in_order
            ]
            write_csv(PLOTS / "evaluate_fid.csv", ["steps", "eta", "fid", "class_agreement"], fids)
            (PLOTS / "evaluate_heatmap.png").write_bytes((EVALUATION / "heatmap.png").read_bytes())
            metrics = _summary(in_order, metric, floor)
            write_json(METRICS / "evaluate.json", metrics)
            numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            tracked.log_metrics(numbers)
            tracked.set_tags({name: str(value) for name, value in quality.items()})
            tracked.log_artifact(EVALUATION)


def _check_model(model: DiffusionModel, manifest: Manifest, steps: Sequence[int]) -> None:
    if tuple(model.class_names) != manifest.class_names or model.image_size != manifest.shape[0]:
        raise ValueError(
            f"{MODEL} was trained on other classes or image sizes than {DATA} holds: run the train stage again"
        )
    if max(steps) > model.schedule.num_steps:
        raise ValueError(
            f"evaluate.steps: given {max(steps)}, allowed at most the model's {model.schedule.num_steps} steps"
        )


def _measures(row: Row, metric: str) -> dict[str, float]:
    errors = {} if row.fid_error is None else {f"{metric}_error": row.fid_error}
    return {metric: row.fid, **errors, "class_agreement": row.class_agreement, "images_per_s": row.images_per_s}


def _report_floor(rows: Sequence[Row], metric: str, floor: Floor) -> None:
    error = ", error unknown" if floor.error is None else f" ± {floor.error:.4f}"
    log.info("%s: %s %.4f%s", floor_label(floor), metric, floor.value, error)
    suspicious = [row.name for row in rows if is_suspicious(row, floor)]
    if suspicious:
        log.warning(
            "suspicious: %s below the floor by more than the error, so better than real images: check for memorised training images",
            ", ".join(suspicious),
        )


def _summary(rows: Sequence[Row], metric: str, floor: Floor) -> dict[str, Any]:
    best = min(rows, key=lambda row: row.fid)
    return {
        f"best_{metric}": round(best.fid, 6),
        f"best_{metric}_error": _rounded(best.fid_error),
        "best_eta": best.settings.eta,
        "best_steps": best.settings.steps,
        "class_agreement": round(best.class_agreement, 6),
        "floor": round(floor.value, 6),
        "floor_error": _rounded(floor.error),
        "floor_extrapolated": floor.extrapolated,
        "over_floor": round(best.fid / floor.value, 4) if floor.value else None,
        "suspicious": sum(is_suspicious(row, floor) for row in rows),
    }


def _write_tables(rows: Sequence[Row], metric: str, floor: Floor, quality: dict[str, Any], folder: Path) -> None:
    """Write sweep.csv and quality.json. Only sweep.csv holds times."""
    table = [
        {
            "eta": row.settings.eta,
            "steps": row.settings.steps,
            "guidance_scale": row.settings.guidance_scale,
            "spacing": row.settings.spacing,
            "num_samples": row.num_samples,
            metric: f"{row.fid:.6f}",
            f"{metric}_error": _shown(row.fid_error),
            "class_agreement": f"{row.class_agreement:.6f}",
            "images_per_s": f"{row.images_per_s:.3f}",
            "pareto": str(best).lower(),
            "floor": f"{floor.value:.6f}",
            "floor_error": _shown(floor.error),
            "floor_extrapolated": str(floor.extrapolated).lower(),
            "suspicious": str(is_suspicious(row, floor)).lower(),
        }
        for row, best in zip(rows, pareto_front(rows), strict=True)
    ]
    write_csv(folder / "sweep.csv", list(table[0]), table)
    cells = [
        {
            "eta": row.settings.eta,
            "steps": row.settings.steps,
            "fid": row.fid,
            "fid_error": row.fid_error,
            "class_agreement": row.class_agreement,
            "suspicious": is_suspicious(row, floor),
        }
        for row in rows
    ]
    floors = {
        "floor": floor.value,
        "floor_error": floor.error,
        "floor_images": floor.num_images,
        "floor_extrapolated": floor.extrapolated,
    }
    write_json(folder / "quality.json", {**quality, **floors, "rows": cells})


def _write_pictures(rows: Sequence[Row], samples: Sequence[Any], picture_rows: int, folder: Path) -> None:
    folder.mkdir()
    for row, images in zip(rows, samples, strict=True):
        picture_of(torch.from_numpy(images), len(images) // picture_rows).save(folder / f"{row.name}.png")


def _write_trajectory(arrays: Arrays, settings: SamplerSettings, class_names: Sequence[str], folder: Path) -> None:
    """Write a picture of x_t and one of the predicted x_0, one row per sample, and trajectory.json with times and classes."""
    for name in ("x", "x0"):
        images = torch.from_numpy(arrays[name])
        picture_of(images.flatten(0, 1), images.shape[1]).save(folder / f"trajectory_{name}.png")
    description = {
        "eta": settings.eta,
        "steps": settings.steps,
        "times": arrays["times"].tolist(),
        "names": [class_names[label] for label in arrays["labels"]],
    }
    write_json(folder / "trajectory.json", description)


def _finished(state_dir: Path, unit: Unit) -> Arrays:
    arrays = load_result(state_dir, unit)
    assert arrays is not None, f"{unit.name} is not finished"
    return arrays


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _shown(value: float | None) -> str | None:
    return None if value is None else f"{value:.6f}"


if __name__ == "__main__":
    run_stage("evaluate", evaluate)
