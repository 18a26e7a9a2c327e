"""Stage 6: a version in the MLflow model registry, and the gate that moves the champion."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings
from diffusion_core.storage import read_json, write_json
from pipelines.params import Params
from pipelines.registry.gate import COMPARED, differences, judge
from pipelines.registry.registration import (
    ALIAS,
    champion,
    create_version,
    download_model,
    find_version,
    record,
    recorded,
)
from pipelines.stage import DATA, EVALUATION, METRICS, MODEL, REFERENCE, REGISTRATION, check_writable, log, run_stage
from pipelines.state import fingerprint, state_folder
from pipelines.tracking import stage_run


def register(params: Params) -> None:
    """Make the EMA model a version in the MLflow model registry, and move the alias champion to it if the gate finds it better."""
    check_writable(REGISTRATION.parent, METRICS)
    model = DiffusionModel.load(MODEL)
    quality = read_json(EVALUATION / "quality.json")
    measurement = _measurement(quality, params)
    name, digest = params.register_.model_name, quality["model_digest"]
    key = fingerprint("register", params, {"model": digest, **{k: str(v) for k, v in measurement.items()}})
    with stage_run(params, "register", key, quality["data_hash"]) as run:
        version = find_version(run.client, name, digest)
        if version is None:
            version = create_version(run, name, MODEL, digest, model.image_shape)
        record(run.client, name, version.version, measurement)
        current = champion(run.client, name)
        if current is not None and current.version == version.version:
            promoted, reason = False, "it is the champion already: the same weights"
            old: dict[str, Any] | None = measurement
        else:
            old = None if current is None else _comparable(params, recorded(current), measurement, current, key)
            verdict = judge(measurement, old)
            promoted, reason = verdict.promoted, verdict.reason
        if promoted:
            run.client.set_registered_model_alias(name, ALIAS, version.version)
        now = champion(run.client, name)
        result = {
            "model_name": name,
            "version": int(version.version),
            "alias": ALIAS,
            "promoted": promoted,
            "reason": reason,
            "champion_version": int(now.version) if now is not None else None,
            "previous_champion_version": int(current.version) if current is not None else None,
            "previous_champion_fid": float(old["fid"]) if old is not None and "fid" in old else None,
            "candidate": measurement,
            "model_digest": digest,
        }
        write_json(REGISTRATION, result)
        metrics = {
            "version": int(version.version),
            "promoted": promoted,
            measurement["metric"]: round(measurement["fid"], 6),
        }
        write_json(METRICS / "register.json", metrics)
        run.log_metrics({name: float(value) for name, value in metrics.items()})
        run.log_artifact(REGISTRATION)
        run.set_tags({"verdict": "promoted" if promoted else "kept", "reason": reason[:4000]})
    log.info("%s version %s: %s; %s", name, version.version, "champion" if promoted else "the alias stays", reason)


def _measurement(quality: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """The candidate's figure at the gate's setting, with all that it depends on."""
    eta, steps = params.register_.eta, params.register_.steps
    for row in quality["rows"]:
        if row["eta"] == eta and row["steps"] == steps:
            whole = {**quality, **row}
            return {
                **{key: whole[key] for key in COMPARED},
                "fid": row["fid"],
                "class_agreement": row["class_agreement"],
            }
    raise ValueError(
        f"{EVALUATION / 'quality.json'} has no row of eta {eta} and {steps} steps: run the evaluate stage again"
    )


def _comparable(
    params: Params, old: dict[str, Any], measurement: dict[str, Any], current: Any, key: str
) -> dict[str, Any]:
    """The champion's measurement; made again, in the candidate's way, where it was made in another."""
    if not differences(measurement, old):
        return old
    from pipelines.cluster import ray_session
    from pipelines.data.shards import read_manifest
    from pipelines.evaluation.reference import load_reference
    from pipelines.evaluation.sweep import run_sweep
    from pipelines.evaluation.units import Work

    manifest = read_manifest(DATA)
    with tempfile.TemporaryDirectory(dir=state_folder("register", key)) as scratch:
        folder = download_model(current, Path(scratch))
        model = DiffusionModel.load(folder)
        if tuple(model.class_names) != manifest.class_names or model.image_shape[1:] != manifest.shape[:2]:
            log.warning("the champion makes other classes or sizes of images: it cannot be measured on this data set")
            return old
        log.info(
            "measuring the champion again: it was measured with another %s", ", ".join(differences(measurement, old))
        )
        reference = load_reference(REFERENCE, manifest.content_hash)
        settings = SamplerSettings(
            steps=measurement["steps"],
            eta=measurement["eta"],
            guidance_scale=measurement["guidance_scale"],
            spacing=measurement["spacing"],
        )
        work = Work(
            model_dir=str(folder.resolve()),
            model_digest=old.get("model_digest", str(current.version)),
            reference_dir=str(REFERENCE.resolve()),
            data_hash=manifest.content_hash,
            seed=params.seed,
            batch_size=params.evaluate.batch_size,
            threads=max(int(params.evaluate.cpus_per_task), 1),
        )
        state_dir = state_folder("register", key) / f"champion-{current.version}"
        with ray_session(params.ray):
            counts, real = reference.description["class_counts"], reference.statistics["train"]
            row = run_sweep(params.evaluate, work, [settings], counts, real, state_dir)[0]
    return {**{name: measurement[name] for name in COMPARED}, "fid": row.fid, "class_agreement": row.class_agreement}


if __name__ == "__main__":
    run_stage("register", register)
