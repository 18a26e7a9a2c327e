"""Stage 5: FID, speed and class agreement for every eta and number of steps, on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings
from diffusion_core.metrics.statistics import GaussianStatistics
from diffusion_core.storage import atomic_folder, write_json
from pipelines.cluster import check_shared, cluster_nodes, place, ray_session
from pipelines.data.shards import Manifest, read_manifest
from pipelines.evaluation.figures import floor_label, heat_map, pareto_plot
from pipelines.evaluation.samples import picture_unit, sample_setting
from pipelines.evaluation.sweep import Row, best_row, is_suspicious, make_row, pareto_front, sweep_settings
from pipelines.evaluation.trajectory import sample_trajectory, trajectory_unit
from pipelines.identity import closure_digest, identify, open_state
from pipelines.measurement.distributed import measure_on_ray, unit_device
from pipelines.measurement.floor import Floor, floor_at
from pipelines.measurement.measure import Measurement, measurement_rows
from pipelines.measurement.notice import few_images_notice, marked
from pipelines.measurement.reference import load_reference, load_test_features
from pipelines.measurement.units import Arrays, Unit, Work, load_result, measure_unit, sample_units
from pipelines.measurement.work import measurement_work, model_fits
from pipelines.params import Params, RunSettings, flatten
from pipelines.params.schema import Evaluate
from pipelines.pictures import picture_of
from pipelines.resources import TaskPlan, plan_units
from pipelines.stage import DATA, EVALUATION, METRICS, MODEL, PLOTS, REFERENCE, RUNS, check_writable, log, run_stage
from pipelines.tables import write_csv
from pipelines.tracking import Run, stage_run


def evaluate(params: Params, run: RunSettings) -> None:
    """Sample at every eta and number of steps on Ray, and compare the samples with the real images.

    Writes artifacts/evaluation: sweep.csv, quality.json, pictures of samples, a denoising trajectory, the heat map and the Pareto
    front.
    """
    settings = params.evaluate
    check_writable(EVALUATION.parent, METRICS, PLOTS, RUNS)
    manifest = read_manifest(DATA)
    reference = load_reference(REFERENCE, manifest.content_hash)
    _check_model(DiffusionModel.load(MODEL), manifest, settings.steps)
    with ray_session(run.ray):
        nodes = cluster_nodes()
        device_type = unit_device(run.evaluate, nodes)
        rows_per_call = measurement_rows(device_type) if settings.batch_size == "auto" else settings.batch_size
        work, decisive, inputs = measurement_work(
            MODEL, REFERENCE, reference, seed=params.seed, rows_per_call=rows_per_call, device_type=device_type
        )
        sweep = _make_sweep(settings, len(manifest.class_names), rows_per_call)
        plan = plan_units(run.evaluate, num_units=sweep.num_units, nodes=nodes)
        place(plan)
        check_shared({"the model": MODEL, "the reference": REFERENCE})
        # settings that decide a unit's result; its name adds sampler and sample range, so a larger sweep reuses finished units
        computed_by = [measure_unit, sample_setting, sample_trajectory]
        state = open_state(identify("evaluate", decisive, inputs, computed_by), run.resume)
        used = {**decisive, **flatten("evaluate", settings)}
        key = identify("evaluate", used, inputs, computed_by).key
        tags = {"rediffuse.data_hash": manifest.content_hash}
        with stage_run(run.tracking, "evaluate", key, settings=used, tags=tags) as tracked:
            real, metric = reference.statistics["train"], reference.metric
            notice = few_images_notice(
                reference.num_features, {"samples": settings.num_samples, "train images": real.n}
            )
            if notice:
                log.warning("%s of %s", metric, notice)
            rows = _measure(sweep, work, state.folder, plan, real, metric, tracked, notice)
            floor = floor_at(*load_test_features(REFERENCE), real, settings.num_samples, params.seed)
            floor_notice = few_images_notice(
                reference.num_features, {"test images": floor.smallest_set, "train images": real.n}
            )
            _report_floor(rows, metric, floor, floor_notice)
            quality = {
                "data_hash": manifest.content_hash,
                "metric": metric,
                "extractor_digest": inputs["extractor"],
                "classifier_digest": inputs["classifier"],
                "num_samples": settings.num_samples,
                "spacing": settings.spacing,
                "guidance_scale": settings.guidance_scale,
                **decisive,
                "measured_by": closure_digest(measure_unit),
                "model_digest": work.model_digest,
                "continued_across_changes": list(state.changed_modules),
                "few_images": notice,
                "floor_few_images": floor_notice,
            }
            _write_results(
                rows, metric, floor, quality, sweep, state.folder, manifest.class_names, settings.picture_rows
            )
            summary = {**_summary(rows, metric, floor), "few_images": notice is not None}
            _write_outputs(rows, summary, quality, tracked)


@dataclass(frozen=True)
class _Sweep:
    """The units of a sweep: the parts of each setting's samples, a picture per setting, and the trajectory."""

    settings: Sequence[SamplerSettings]
    parts: Sequence[Sequence[Unit]]
    pictures: Sequence[Unit]
    trajectory: Unit

    @property
    def num_units(self) -> int:
        return sum(map(len, self.parts)) + len(self.pictures) + 1


def _make_sweep(settings: Evaluate, num_classes: int, rows_per_call: int) -> _Sweep:
    sweep = sweep_settings(settings.etas, settings.steps, settings.guidance_scale, settings.spacing)
    # eta 0: sampling adds no noise, so x_t changes smoothly from column to column
    trajectory_sampler = SamplerSettings(
        steps=max(settings.steps), eta=0.0, guidance_scale=settings.guidance_scale, spacing=settings.spacing
    )
    return _Sweep(
        settings=sweep,
        parts=[sample_units(each, settings.num_samples, settings.shard_size, rows_per_call) for each in sweep],
        pictures=[picture_unit(each, num_classes, settings.picture_rows) for each in sweep],
        trajectory=trajectory_unit(trajectory_sampler, settings.trajectory_images),
    )


def _check_model(model: DiffusionModel, manifest: Manifest, steps: Sequence[int]) -> None:
    if not model_fits(model, manifest):
        raise ValueError(
            f"{MODEL} was trained on other classes, image sizes or channels than {DATA} holds: run the train stage again"
        )
    if max(steps) > model.schedule.num_steps:
        raise ValueError(
            f"evaluate.steps: given {max(steps)}, allowed at most the model's {model.schedule.num_steps} steps"
        )


def _measure(
    sweep: _Sweep,
    work: Work,
    state_dir: Path,
    plan: TaskPlan,
    real: GaussianStatistics,
    metric: str,
    tracked: Run,
    notice: str | None,
) -> list[Row]:
    """Compute all units on Ray and return a row per setting; log each row as soon as its setting is finished."""
    rows: dict[int, Row] = {}

    def on_measurement(number: int, measurement: Measurement) -> None:
        row = rows[number] = make_row(sweep.settings[number], measurement, real)
        values = {"eta": row.settings.eta, "steps": row.settings.steps, "num_samples": row.num_samples}
        child = tracked.child(row.name, values)
        child.log_metrics(_measures(row, metric))
        child.set_tags({"few_images": notice} if notice else {})
        child.finish()
        log.info(
            "eta %s, %d steps: %s %.4f%s%s, %.1f%% agree with their label, %.1f images/s per worker",
            row.settings.eta,
            row.settings.steps,
            metric,
            row.fid,
            "" if row.fid_error is None else f" ± {row.fid_error:.4f}",
            marked(notice),
            100 * row.class_agreement,
            row.images_per_s,
        )

    others = [*sweep.pictures, sweep.trajectory]
    measure_on_ray(sweep.parts, work, state_dir=state_dir, plan=plan, others=others, on_measurement=on_measurement)
    return [rows[number] for number in range(len(sweep.settings))]


def _measures(row: Row, metric: str) -> dict[str, float]:
    errors = {} if row.fid_error is None else {f"{metric}_error": row.fid_error}
    return {metric: row.fid, **errors, "class_agreement": row.class_agreement, "images_per_s": row.images_per_s}


def _report_floor(rows: Sequence[Row], metric: str, floor: Floor, notice: str | None) -> None:
    error = "" if floor.error is None else f" ± {floor.error:.4f}"
    log.info("%s: %s %.4f%s%s", floor_label(floor), metric, floor.value, error, marked(notice))
    if notice:
        log.warning("the floor comes from sets of %s", notice)
    suspicious = [row.name for row in rows if is_suspicious(row, floor)]
    if suspicious:
        log.warning(
            "suspicious: %s: FID below the floor by more than its error, so lower than that of real images; check for memorised "
            "training images",
            ", ".join(suspicious),
        )


def _summary(rows: Sequence[Row], metric: str, floor: Floor) -> dict[str, Any]:
    best = best_row(rows)
    comparable = floor.num_samples == best.num_samples
    return {
        f"best_{metric}": round(best.fid, 6),
        f"best_{metric}_error": _rounded(best.fid_error),
        "best_eta": best.settings.eta,
        "best_steps": best.settings.steps,
        "class_agreement": round(best.class_agreement, 6),
        "floor": round(floor.value, 6),
        "floor_error": _rounded(floor.error),
        "floor_extrapolated": floor.extrapolated,
        "over_floor": round(best.fid / floor.value, 4) if comparable and floor.value else None,
        "suspicious": sum(is_suspicious(row, floor) for row in rows),
    }


def _write_results(
    rows: Sequence[Row],
    metric: str,
    floor: Floor,
    quality: dict[str, Any],
    sweep: _Sweep,
    state_dir: Path,
    class_names: Sequence[str],
    picture_rows: int,
) -> None:
    """Write artifacts/evaluation. The pictures come from the results of the finished units."""
    with atomic_folder(EVALUATION) as folder:
        _write_tables(rows, metric, floor, quality, folder)
        samples = [_finished(state_dir, unit)["images"] for unit in sweep.pictures]
        _write_pictures(rows, samples, picture_rows, folder / "samples")
        _write_trajectory(_finished(state_dir, sweep.trajectory), sweep.trajectory.settings, class_names, folder)
        heat_map(rows, metric, floor, folder / "heatmap.png", quality["few_images"])
        pareto_plot(rows, metric, floor, folder / "pareto.png", quality["few_images"])


def _write_tables(rows: Sequence[Row], metric: str, floor: Floor, quality: dict[str, Any], folder: Path) -> None:
    """Write sweep.csv and quality.json. Only sweep.csv holds times."""
    table = [
        {
            "setting": row.name,
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
            "few_images": str(quality["few_images"] is not None).lower(),
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
        "floor_samples": floor.num_samples,
        "floor_label": floor_label(floor),
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


def _write_outputs(rows: Sequence[Row], metrics: dict[str, Any], quality: dict[str, Any], tracked: Run) -> None:
    """Write the plots and metrics of DVC, and log the metrics and artifacts/evaluation to MLflow."""
    fids = [
        {
            "steps": row.settings.steps,
            "eta": row.settings.eta,
            "fid": f"{row.fid:.6f}",
            "class_agreement": f"{row.class_agreement:.6f}",
        }
        for row in rows
    ]
    write_csv(PLOTS / "evaluate_fid.csv", ["steps", "eta", "fid", "class_agreement"], fids)
    (PLOTS / "evaluate_heatmap.png").write_bytes((EVALUATION / "heatmap.png").read_bytes())
    write_json(METRICS / "evaluate.json", metrics)
    tracked.log_metrics({name: value for name, value in metrics.items() if isinstance(value, int | float)})
    tracked.set_tags({name: str(value) for name, value in quality.items() if value is not None})
    tracked.log_artifact(EVALUATION)


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
