"""Stage 6: a version in the MLflow model registry, and the gate that moves the champion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import NonFiniteOutputError, SamplerSettings
from diffusion_core.storage import file_sha256, read_json, write_json
from pipelines.identity import identify
from pipelines.params import Params, Register, RunSettings, flatten
from pipelines.registry.champion_measurement import measure_champion
from pipelines.registry.gate import COMPARED, NOTICE, RECORDED, Verdict, differences, judge, measured_error
from pipelines.registry.registration import (
    ALIAS,
    CODE_TAG,
    DIGEST_TAG,
    champion,
    code_digest,
    create_version,
    find_version,
    record,
    recorded,
)
from pipelines.stage import EVALUATION, METRICS, MODEL, REGISTRATION, check_writable, log, run_stage
from pipelines.tracking import Run, stage_run

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
        judged = SamplerSettings(**{key: measurement[key] for key in ("steps", "eta", "guidance_scale", "spacing")})
        version = find_version(client, name, digest, code, judged)
        if version is None:
            version = create_version(tracked, name, MODEL, model, digest, code, judged)
        record(client, name, version.version, measurement)
        verdict, old = _judge(version, measurement, current, run)
        if verdict.promoted:
            client.set_registered_model_alias(name, ALIAS, version.version)
        now = champion(client, name)
        result = {
            "model_name": name,
            "version": int(version.version),
            "alias": ALIAS,
            "promoted": verdict.promoted,
            "reason": verdict.reason,
            "champion_version": int(now.version) if now is not None else None,
            "previous_champion_version": int(current.version) if current is not None else None,
            "previous_champion_fid": _finite_fid(old),
            "previous_champion_fid_error": measured_error(old) if old is not None else None,
            "candidate": measurement,
            "model_digest": digest,
            "code_digest": code,
        }
        _write_outputs(result, tracked)
    outcome = "champion" if verdict.promoted else "not promoted"
    log.info("%s version %s: %s; %s", name, version.version, outcome, verdict.reason)
    if measurement.get(NOTICE):
        log.warning("%s of %s", measurement["metric"], measurement[NOTICE])


def _judge(
    version: Any, measurement: Mapping[str, Any], current: Any | None, run: RunSettings
) -> tuple[Verdict, Mapping[str, Any] | None]:
    """Return the verdict on a version, and the measurement of ``current``, the champion.

    The champion is measured again if its recorded measurement is not comparable. One whose network returns NaN has an FID of NaN.
    """
    if current is None:
        return judge(measurement, None), None
    if int(current.version) == int(version.version):
        return Verdict(False, "it is already the champion: the same weights, code and sampler settings"), measurement
    old: Mapping[str, Any] = recorded(current)
    if all(current.tags.get(tag) == version.tags.get(tag) for tag in (DIGEST_TAG, CODE_TAG)):
        verdict = judge(measurement, None)
        reason = "the champion's weights and code, judged at other sampler settings, which are its defaults"
        return (Verdict(True, reason) if verdict.promoted else verdict), old
    different = differences(measurement, old)
    if different:
        log.info("measuring the champion again: it was measured with another %s", ", ".join(different))
        try:
            old = measure_champion(current, measurement, run) or old
        except NonFiniteOutputError as error:
            log.warning("the champion, version %s, cannot be measured: %s", current.version, error)
            old = {**measurement, "fid": math.nan, "fid_error": None}
    return judge(measurement, old), old


def _finite_fid(measurement: Mapping[str, Any] | None) -> float | None:
    """Return the FID of a measurement, or None if there is none or it is not finite. Tags hold it as text."""
    fid = float("nan" if measurement is None else measurement.get("fid", "nan"))
    return fid if math.isfinite(fid) else None


def _write_outputs(result: Mapping[str, Any], tracked: Run) -> None:
    """Write artifacts/registration.json and the metrics, and log them to MLflow."""
    write_json(REGISTRATION, result)
    candidate = result["candidate"]
    metrics = {
        "version": result["version"],
        "promoted": result["promoted"],
        candidate["metric"]: round(candidate["fid"], 6),
    }
    write_json(METRICS / "register.json", metrics)
    tracked.log_metrics({metric: float(value) for metric, value in metrics.items()})
    tracked.log_artifact(REGISTRATION)
    tracked.set_tags({"verdict": "promoted" if result["promoted"] else "kept", "reason": result["reason"][:4000]})


def check_weights(quality: Mapping[str, Any], weights: Path) -> None:
    """Raise ValueError if quality.json measures other weights than those that are to be registered."""
    try:
        digest = file_sha256(weights)
    except OSError as error:
        raise ValueError(f"cannot read {weights}: {error.strerror}; run the train stage again") from None
    if quality["model_digest"] != digest:
        raise ValueError(
            f"{QUALITY} measures the weights {quality['model_digest'][:12]}, but {weights} holds {digest[:12]}: "
            "measure them first with: dvc repro evaluate"
        )


def candidate_measurement(quality: Mapping[str, Any], gate: Register) -> dict[str, Any]:
    """Return the candidate's figure at the gate's setting, everything that it depends on, and its notice if it has one.

    Raises ValueError if there is no such figure, or it is not finite.
    """
    keys = (*COMPARED, *RECORDED, "fid", "fid_error", "class_agreement")
    for row in quality["rows"]:
        if row["eta"] == gate.eta and row["steps"] == gate.steps:
            everything = {**quality, **row}
            missing = [key for key in keys if key not in everything]
            if missing:
                raise ValueError(f"{QUALITY} lacks {', '.join(missing)}: measure again with: dvc repro -f evaluate")
            if not math.isfinite(everything["fid"]):
                raise ValueError(
                    f"{QUALITY}: the {everything['metric']} of eta {gate.eta} and {gate.steps} steps is not finite "
                    f"({everything['fid']}): measure again with: dvc repro -f evaluate"
                )
            notice = {NOTICE: everything[NOTICE]} if everything.get(NOTICE) else {}
            return {**{key: everything[key] for key in keys}, **notice}
    raise ValueError(
        f"{QUALITY} has no row of eta {gate.eta} and {gate.steps} steps: measure it with: dvc repro evaluate"
    )


if __name__ == "__main__":
    run_stage("register", register)
