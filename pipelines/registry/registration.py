"""Versions and aliases in the MLflow model registry."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import diffusion_core
from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings
from pipelines.identity import closure_digest
from pipelines.tracking import Run, refusal, without_credentials

T = TypeVar("T")
ALIAS = "champion"
DIGEST_TAG = "rediffuse.model_digest"
CODE_TAG = "rediffuse.code_digest"
JUDGED_TAG = "rediffuse.judged_with"
PREFIX = "rediffuse."
REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "safetensors")
MISSING = "RESOURCE_DOES_NOT_EXIST"


def code_digest() -> str:
    """Return the SHA-256 of the code that a version runs: the pyfunc and what it imports from diffusion_core.

    A version ships all of diffusion_core. Modules that the pyfunc does not import (editing, metrics) make no new version.
    """
    from pipelines.registry.pyfunc_model import DiffusionPyfunc

    return closure_digest(DiffusionPyfunc)


def find_version(client: Any, name: str, digest: str, code: str, judged: SamplerSettings) -> Any | None:
    """Return the first complete version with these weights, this code and these default sampler settings, or None."""
    found = _ask(lambda: client.search_model_versions(f"name = '{name}'", max_results=1000))
    wanted = _tags(digest, code, judged)
    own = [version for version in found if wanted.items() <= version.tags.items() and version.status == "READY"]
    return min(own, key=lambda version: int(version.version)) if own else None


def create_version(
    run: Run, name: str, model_dir: Path, model: DiffusionModel, digest: str, code: str, judged: SamplerSettings
) -> Any:
    """Log the model as a pyfunc into ``run`` and register it. The code ships with the model; nothing is pickled.

    ``model``: the model in ``model_dir``; ``judged``: the sampler settings of the gate, which are the defaults of its predictions.
    Raises ValueError, and registers nothing, if the logged model cannot predict its own input example.
    """
    import mlflow

    from pipelines.registry.pyfunc_model import input_example, signature

    example = input_example(model)
    with mlflow.start_run(run_id=run.run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"model": str(model_dir)},
            code_paths=[str(Path(diffusion_core.__file__).parent)],
            signature=signature(model, judged),
            model_config=asdict(judged),
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in REQUIREMENTS],
            input_example=example,
        )
    run.client.update_run(run.run_id, status="RUNNING")
    try:
        mlflow.pyfunc.load_model(info.model_uri).predict(example)
    except Exception as error:
        raise ValueError(
            f"no version is registered, because the model cannot predict its own input example: {' '.join(str(error).split())}"
        ) from None
    if _registered_model(run.client, name) is None:
        run.client.create_registered_model(name)
    tags = _tags(digest, code, judged)
    return run.client.create_model_version(name, info.model_uri, run.run_id, tags=tags, model_id=info.model_id)


def judged_settings(folder: Path) -> SamplerSettings | None:
    """Return the default sampler settings of a version that was downloaded into ``folder``.

    Returns None for a version that an older rediffuse registered without them.
    """
    import mlflow

    found = sorted(folder.rglob("MLmodel"))
    config = mlflow.models.Model.load(str(found[0])).flavors["python_function"].get("config") if found else None
    return SamplerSettings(**config) if config else None


def _tags(digest: str, code: str, judged: SamplerSettings) -> dict[str, str]:
    """Return the tags that tell a version from others."""
    return {DIGEST_TAG: digest, CODE_TAG: code, JUDGED_TAG: json.dumps(asdict(judged), sort_keys=True)}


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
        registry = mlflow.get_registry_uri()
        reason = refusal(error, registry) or " ".join(str(error).split())
        raise ValueError(f"{source}: {reason}; the registry is {without_credentials(registry)}") from None
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
        reason = refusal(error, mlflow.get_registry_uri())
        raise ValueError(
            reason
            or f"the model registry {without_credentials(mlflow.get_registry_uri())} does not answer ({' '.join(str(error).split())[:200]}): "
            "run the stage again when it does"
        ) from None
