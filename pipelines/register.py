"""Stage 6: a version in the MLflow model registry, and the gate that moves the champion."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_core.artifact import DiffusionModel
from diffusion_core.storage import read_json, write_json
from pipelines.identity import identify
from pipelines.params import Params, Register, RunSettings, flatten
from pipelines.registry.champion_measurement import measure_champion
from pipelines.registry.gate import COMPARED, differences, judge, measured_error
from pipelines.registry.registration import (
    ALIAS,
    champion,
    code_digest,
    create_version,
    find_version,
    record,
    recorded,
)
from pipelines.stage import EVALUATION, METRICS, MODEL, REGISTRATION, check_writable, log, run_stage
from pipelines.tracking import stage_run

QUALITY = EVALUATION / "quality.json"


def register(params: Params, run: RunSettings) -> None:
    """Make the EMA model a version in the MLflow model registry. The alias champion moves to it if the gate finds it better."""
    check_writable(REGISTRATION.parent, METRICS)
    quality = read_json(QUALITY)
    check_weights(quality, MODEL / "model.safetensors")
    model = DiffusionModel.load(MODEL)
    measurement = candidate_measurement(quality, params.register_)
    name, digest, code = params.register_.model_name, quality["model_digest"], code_digest()
    settings = flatten("register", params.register_)
    inputs = {"model": digest, "code": code, **{key: str(value) for key, value in measurement.items()}}
    key = identify("register", settings, inputs, [judge]).key
    tags = {"rediffuse.data_hash": quality["data_hash"], "rediffuse.model_digest": digest}
    with stage_run(run.tracking, "register", key, settings=settings, tags=tags) as tracked:
        client = tracked.client
        current = champion(client, name)
        version = find_version(client, name, digest, code)
        if version is None:
            version = create_version(tracked, name, MODEL, digest, code, model.image_shape)
        record(client, name, version.version, measurement)
        old: Mapping[str, Any] | None = None if current is None else recorded(current)
        if current is not None and int(current.version) == int(version.version):
            promoted, reason = False, "it is already the champion: the same weights and the same code"
            old = measurement
        else:
            if current is not None and old is not None and differences(measurement, old):
                log.info(
                    "measuring the champion again: it was measured with another %s",
                    ", ".join(differences(measurement, old)),
                )
                old = measure_champion(current, measurement, quality["seed"], run) or old
            verdict = judge(measurement, old)
            promoted, reason = verdict.promoted, verdict.reason
        if promoted:
            client.set_registered_model_alias(name, ALIAS, version.version)
        now = champion(client, name)
        result = {
            "model_name": name,
            "version": int(version.version),
            "alias": ALIAS,
            "promoted": promoted,
            "reason": reason,
            "champion_version": int(now.version) if now is not None else None,
            "previous_champion_version": int(current.version) if current is not None else None,
            "previous_champion_fid": float(old["fid"]) if old is not None and "fid" in old else None,
            "previous_champion_fid_error": measured_error(old) if old is not None else None,
            "candidate": measurement,
            "model_digest": digest,
            "code_digest": code,
        }
        write_json(REGISTRATION, result)
        metrics = {
            "version": int(version.version),
            "promoted": promoted,
            measurement["metric"]: round(measurement["fid"], 6),
        }
        write_json(METRICS / "register.json", metrics)
        tracked.log_metrics({metric: float(value) for metric, value in metrics.items()})
        tracked.log_artifact(REGISTRATION)
        tracked.set_tags({"verdict": "promoted" if promoted else "kept", "reason": reason[:4000]})
    log.info("%s version %s: %s; %s", name, version.version, "champion" if promoted else "the alias stays", reason)


def check_weights(quality: Mapping[str, Any], weights: Path) -> None:
    """Raise ValueError if quality.json measures other weights than those that are to be registered."""
    try:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {weights}: {error.strerror}; run the train stage again") from None
    if quality["model_digest"] != digest:
        raise ValueError(
            f"{QUALITY} measures the weights {quality['model_digest'][:12]}, but {weights} holds {digest[:12]}: "
            "measure them first with: dvc repro evaluate"
        )


def candidate_measurement(quality: Mapping[str, Any], gate: Register) -> dict[str, Any]:
    """Return the candidate's figure at the gate's setting, and everything that it depends on."""
    for row in quality["rows"]:
        if row["eta"] == gate.eta and row["steps"] == gate.steps:
            everything = {**quality, **row}
            return {
                **{key: everything[key] for key in COMPARED},
                "fid": row["fid"],
                "fid_error": row["fid_error"],
                "class_agreement": row["class_agreement"],
            }
    raise ValueError(
        f"{QUALITY} has no row of eta {gate.eta} and {gate.steps} steps: measure it with: dvc repro evaluate"
    )


if __name__ == "__main__":
    run_stage("register", register)
