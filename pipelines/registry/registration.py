"""Versions and aliases in the MLflow model registry."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import diffusion_core
from pipelines.identity import closure_digest
from pipelines.tracking import Run, without_credentials

T = TypeVar("T")
ALIAS = "champion"
DIGEST_TAG = "rediffuse.model_digest"
CODE_TAG = "rediffuse.code_digest"
PREFIX = "rediffuse."
REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "safetensors")
MISSING = "RESOURCE_DOES_NOT_EXIST"


def code_digest() -> str:
    """Return the SHA-256 of the code that a version runs: the pyfunc and what it imports from diffusion_core.

    A version ships all of diffusion_core. Modules that the pyfunc does not import (editing, metrics) make no new version.
    """
    from pipelines.registry.pyfunc_model import DiffusionPyfunc

    return closure_digest(DiffusionPyfunc)


def find_version(client: Any, name: str, digest: str, code: str) -> Any | None:
    """Return the first complete version with these weights and this code, or None."""
    found = _ask(lambda: client.search_model_versions(f"name = '{name}'", max_results=1000))
    wanted = {DIGEST_TAG: digest, CODE_TAG: code}
    own = [version for version in found if wanted.items() <= version.tags.items() and version.status == "READY"]
    return min(own, key=lambda version: int(version.version)) if own else None


def create_version(
    run: Run, name: str, model_dir: Path, digest: str, code: str, image_shape: tuple[int, int, int]
) -> Any:
    """Log the model as a pyfunc into ``run`` and register it. The code ships with the model; nothing is pickled."""
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
    if _registered_model(run.client, name) is None:
        run.client.create_registered_model(name)
    tags = {DIGEST_TAG: digest, CODE_TAG: code}
    return run.client.create_model_version(name, info.model_uri, run.run_id, tags=tags, model_id=info.model_id)


def record(client: Any, name: str, version: str, measurement: Mapping[str, Any]) -> None:
    """Store a measurement in the version's tags."""
    for key, value in measurement.items():
        client.set_model_version_tag(name, version, PREFIX + key, str(value))


def recorded(version: Any) -> dict[str, str]:
    """Return the measurement that a version's tags hold."""
    return {key.removeprefix(PREFIX): value for key, value in version.tags.items() if key.startswith(PREFIX)}


def champion(client: Any, name: str) -> Any | None:
    """Return the version that the alias points to, or None if the model or the alias does not exist.

    Raises ValueError if the registry does not answer.
    """
    registered = _registered_model(client, name)
    if registered is None or ALIAS not in registered.aliases:
        return None
    return _ask(lambda: client.get_model_version(name, registered.aliases[ALIAS]))


def download_model(source: str, folder: Path) -> Path:
    """Fetch the DiffusionModel directory of ``source`` into ``folder``; return its path.

    ``source``: models:/name/version or models:/name@alias. Raises ValueError if the registry does not have it, or it holds no
    diffusion model.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        root = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder)))
    except MlflowException as error:
        registry = without_credentials(mlflow.get_registry_uri())
        raise ValueError(f"{source}: {' '.join(str(error).split())}; the registry is {registry}") from None
    found = sorted(root.rglob("model.json"))
    if not found:
        raise ValueError(f"{source} holds no diffusion model")
    return found[0].parent


def _registered_model(client: Any, name: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    def find() -> Any | None:
        try:
            return client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code == MISSING:
                return None
            raise

    return _ask(find)


def _ask(question: Callable[[], T]) -> T:
    """Turn an error of the registry into one line: it must never read as "there is none"."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return question()
    except MlflowException as error:
        raise ValueError(
            f"the model registry {without_credentials(mlflow.get_registry_uri())} does not answer ({' '.join(str(error).split())[:200]}): "
            "run the stage again when it does"
        ) from None
