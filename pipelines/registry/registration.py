"""Versions and aliases in the MLflow model registry."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusion_core
from pipelines.tracking import Run

ALIAS = "champion"
DIGEST_TAG = "rediffuse.model_digest"
PREFIX = "rediffuse."
REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "safetensors")


def find_version(client: Any, name: str, digest: str) -> Any | None:
    """The version that holds these weights already, if one is whole."""
    found = client.search_model_versions(f"name = '{name}'", max_results=1000)
    own = [version for version in found if version.tags.get(DIGEST_TAG) == digest and version.status == "READY"]
    return min(own, key=lambda version: int(version.version)) if own else None


def create_version(run: Run, name: str, model_dir: Path, digest: str, image_shape: tuple[int, int, int]) -> Any:
    """Log the model as a pyfunc into ``run`` and register it. Its code travels with it; nothing is pickled."""
    import mlflow
    import numpy as np
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    channels, height, width = image_shape
    signature = ModelSignature(
        inputs=Schema([ColSpec(AnyType(), "label")]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, height, width, channels))]),
        params=ParamSchema(
            [
                ParamSpec("steps", DataType.long, 50),
                ParamSpec("eta", DataType.double, 0.0),
                ParamSpec("guidance_scale", DataType.double, 1.0),
                ParamSpec("seed", DataType.long, 0),
            ]
        ),
    )
    with mlflow.start_run(run_id=run.run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"model": str(model_dir)},
            code_paths=[str(Path(diffusion_core.__file__).parent)],
            signature=signature,
            input_example=pd.DataFrame({"label": [0, 1]}),
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in REQUIREMENTS],
        )
    run.client.update_run(run.run_id, status="RUNNING")
    if not run.client.search_registered_models(f"name = '{name}'"):
        run.client.create_registered_model(name)
    return run.client.create_model_version(
        name, info.model_uri, run.run_id, tags={DIGEST_TAG: digest}, model_id=info.model_id
    )


def record(client: Any, name: str, version: str, measurement: Mapping[str, Any]) -> None:
    """Keep a measurement as the version's tags."""
    for key, value in measurement.items():
        client.set_model_version_tag(name, version, PREFIX + key, str(value))


def recorded(version: Any) -> dict[str, str]:
    """The measurement that a version's tags hold."""
    return {key.removeprefix(PREFIX): value for key, value in version.tags.items() if key.startswith(PREFIX)}


def champion(client: Any, name: str) -> Any | None:
    """The version that the alias points to, if any."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, ALIAS)
    except MlflowException:
        return None


def download_model(version: Any, folder: Path) -> Path:
    """The DiffusionModel directory of a version, fetched into ``folder``."""
    import mlflow

    root = Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}", dst_path=str(folder)))
    return next(path.parent for path in sorted(root.rglob("model.json")))
