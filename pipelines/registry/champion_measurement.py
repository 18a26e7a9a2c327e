"""Measure the champion again, in the way in which the candidate was measured."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings
from pipelines.cluster import check_shared, cluster_nodes, place, ray_session
from pipelines.data.shards import read_manifest
from pipelines.identity import closure_digest, identify, open_state
from pipelines.measurement.distributed import measure_on_ray, unit_device
from pipelines.measurement.measure import distance_with_error, measurement_rows
from pipelines.measurement.reference import load_reference
from pipelines.measurement.units import measure_unit, sample_units
from pipelines.measurement.work import measurement_work, model_fits
from pipelines.params import RunSettings
from pipelines.registry.registration import download_model
from pipelines.resources import plan_units
from pipelines.stage import DATA, REFERENCE, RUNS, log

SHARD_SIZE = 500


def measure_champion(version: Any, candidate: Mapping[str, Any], run: RunSettings) -> dict[str, Any] | None:
    """Return the champion's measurement at the candidate's sampler setting, sample count and seed.

    It has the keys of ``candidate``, the candidate's measurement. The rows per call are the candidate's too, if the device types
    agree. Returns None if the champion samples other classes, image sizes or channels than the data set has. Skips units that an
    earlier attempt finished.
    """
    manifest = read_manifest(DATA)
    RUNS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RUNS.resolve(), prefix="champion-") as scratch, ray_session(run.ray):
        folder = download_model(f"models:/{version.name}/{version.version}", Path(scratch))
        if not model_fits(DiffusionModel.load(folder), manifest):
            log.warning(
                "the champion samples other classes, image sizes or channels: it cannot be measured on this data set"
            )
            return None
        reference = load_reference(REFERENCE, manifest.content_hash)
        nodes = cluster_nodes()
        device_type = unit_device(run.evaluate, nodes)
        same_device = device_type == candidate["device_type"]
        work, settings, inputs = measurement_work(
            folder,
            REFERENCE,
            reference,
            seed=candidate["seed"],
            rows_per_call=candidate["rows_per_call"] if same_device else measurement_rows(device_type),
            device_type=device_type,
        )
        sampler = SamplerSettings(
            steps=candidate["steps"],
            eta=candidate["eta"],
            guidance_scale=candidate["guidance_scale"],
            spacing=candidate["spacing"],
        )
        units = sample_units(sampler, candidate["num_samples"], SHARD_SIZE, work.rows_per_call)
        plan = plan_units(run.evaluate, num_units=len(units), nodes=nodes)
        place(plan)
        check_shared({"the champion": folder, "the reference": REFERENCE})
        state = open_state(identify("register", settings, inputs, [measure_unit]), run.resume)
        (measurement,) = measure_on_ray([units], work, state_dir=state.folder, plan=plan)
    fid, error = distance_with_error(measurement, reference.statistics["train"])
    return {
        **candidate,
        "data_hash": manifest.content_hash,
        "metric": reference.metric,
        "extractor_digest": inputs["extractor"],
        "measured_by": closure_digest(measure_unit),
        "rows_per_call": work.rows_per_call,
        "device_type": device_type,
        "classifier_digest": inputs["classifier"],
        "fid": fid,
        "fid_error": error,
        "class_agreement": measurement.agreeing / measurement.num_samples,
    }
