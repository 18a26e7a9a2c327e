"""The work of measuring a model against the prepared data, and what decides its result. The sweep and the gate use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_core.artifact import DiffusionModel
from diffusion_core.storage import file_sha256
from pipelines.data.shards import Manifest
from pipelines.measurement.reference import CLASSIFIER, Reference
from pipelines.measurement.units import Work


def model_fits(model: DiffusionModel, manifest: Manifest) -> bool:
    """Return True if the model samples the classes, image size and channels of the data set."""
    height, width, channels = manifest.shape
    return tuple(model.class_names) == manifest.class_names and model.image_shape == (channels, height, width)


def measurement_work(
    model_dir: Path, reference_dir: Path, reference: Reference, *, seed: int, rows_per_call: int, device_type: str
) -> tuple[Work, dict[str, Any], dict[str, str]]:
    """Return the work, and the settings and input digests that identify its results.

    ``reference`` was read from ``reference_dir``. With a unit's name they decide the unit's result.
    """
    work = Work(
        model_dir=str(model_dir.resolve()),
        model_digest=file_sha256(model_dir / "model.safetensors"),
        reference_dir=str(reference_dir.resolve()),
        data_hash=reference.description["data_hash"],
        seed=seed,
        rows_per_call=rows_per_call,
    )
    settings = {"seed": seed, "rows_per_call": rows_per_call, "device_type": device_type}
    inputs = {
        "data": work.data_hash,
        "model": work.model_digest,
        "extractor": reference.extractor.digest,
        "classifier": file_sha256(reference_dir / CLASSIFIER),
    }
    return work, settings, inputs
