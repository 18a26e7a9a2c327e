"""Measure the champion again, in the way in which the candidate was measured."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings
from pipelines.cluster import check_resources, check_shared, cluster_nodes, ray_session
from pipelines.data.shards import read_manifest
from pipelines.identity import identify, open_state
from pipelines.measurement.distributed import measure_on_ray
from pipelines.measurement.measure import distance_with_error, measure, rows_per_call
from pipelines.measurement.reference import load_reference
from pipelines.measurement.units import Work
from pipelines.params import RunSettings
from pipelines.registry.gate import COMPARED
from pipelines.registry.registration import download_model
from pipelines.resources import plan_units
from pipelines.stage import DATA, REFERENCE, RUNS, log

SHARD_SIZE = 500


def measure_champion(version: Any, candidate: Mapping[str, Any], seed: int, run: RunSettings) -> dict[str, Any] | None:
    """Return the champion's ``fid``, ``fid_error`` and ``class_agreement`` at the candidate's setting, with `COMPARED`.

    ``candidate`` holds the candidate's measurement. Returns None if the champion samples other classes or image sizes than the data
    set has. Finished units of an earlier attempt are not computed again.
    """
    manifest = read_manifest(DATA)
    RUNS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RUNS.resolve(), prefix="champion-") as scratch, ray_session(run.ray):
        folder = download_model(version, Path(scratch))
        model = DiffusionModel.load(folder)
        if tuple(model.class_names) != manifest.class_names or model.image_shape[1:] != manifest.shape[:2]:
            log.warning("the champion samples other classes or image sizes: it cannot be measured on this data set")
            return None
        reference = load_reference(REFERENCE, manifest.content_hash)
        settings = SamplerSettings(
            steps=candidate["steps"],
            eta=candidate["eta"],
            guidance_scale=candidate["guidance_scale"],
            spacing=candidate["spacing"],
        )
        num_units = -(-candidate["num_samples"] // SHARD_SIZE)
        plan = plan_units(run.evaluate, num_units=num_units, nodes=cluster_nodes())
        log.info("%s", plan.reason)
        if plan.warning:
            log.warning("%s", plan.warning)
        check_resources(1, plan.cpus, plan.gpus, "a unit", "lower evaluate.cpus_per_task or evaluate.gpus_per_task")
        check_shared({"the champion": folder, "the reference": REFERENCE})
        work = Work(
            model_dir=str(folder.resolve()),
            model_digest=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            reference_dir=str(REFERENCE.resolve()),
            data_hash=manifest.content_hash,
            seed=seed,
            rows_per_call=rows_per_call(plan.device_type),
        )
        decides = {"seed": seed, "rows_per_call": work.rows_per_call, "device_type": plan.device_type}
        inputs = {"data": work.data_hash, "model": work.model_digest, "extractor": reference.extractor.digest}
        state = open_state(identify("register", decides, inputs, [measure]), run.resume)
        (measurement,) = measure_on_ray(
            [settings], candidate["num_samples"], SHARD_SIZE, work, state_dir=state.folder, plan=plan
        )
    fid, error = distance_with_error(measurement, reference.statistics["train"])
    return {
        **{name: candidate[name] for name in COMPARED},
        "fid": fid,
        "fid_error": error,
        "class_agreement": measurement.agreeing / measurement.num_samples,
    }
