"""What a stage depends on, as a fingerprint, and the folder of the state that lets it resume.

`dvc repro` deletes a stage's outputs before it runs the stage, so the state lies outside them, under ``runs/``. Its
key is a hash of everything that the stage depends on: the same inputs resume, other inputs start fresh.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_core.storage import write_text
from pipelines.params import Params, read_yaml
from pipelines.stage import RUNS

CODE = ("pipelines", "diffusion_core")


def fingerprint(stage: str, params: Params, inputs: Mapping[str, str]) -> str:
    """16 hexadecimal digits over the stage's code, its params (both as dvc.yaml lists them) and the hashes of its inputs."""
    declared = read_yaml(Path("dvc.yaml"))["stages"][stage]
    code = {}
    for dependency in declared["deps"]:
        if Path(dependency).parts[0] in CODE:
            code.update(_hash_sources(Path(dependency)))
    identity = {
        "stage": stage,
        "params": stage_params(stage, params),
        "inputs": dict(inputs),
        "code": code,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def stage_params(stage: str, params: Params) -> dict[str, Any]:
    """The values of the params that dvc.yaml lists for the stage, by dotted key, sections opened."""
    tree = params.model_dump(by_alias=True)
    values: dict[str, Any] = {}
    for key in read_yaml(Path("dvc.yaml"))["stages"][stage].get("params", []):
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        _flatten(key, value, values)
    return values


def state_folder(stage: str, key: str) -> Path:
    """runs/<stage>/<fingerprint>, made where it is absent; absolute, because Ray's workers run elsewhere."""
    folder = (RUNS / stage / key).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def workspace_id() -> str:
    """A name of this working copy, made once: it keeps its MLflow runs apart from others' on the same server."""
    path = RUNS / "workspace"
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()


def _hash_sources(path: Path) -> dict[str, str]:
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return {file.as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _flatten(key: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _flatten(f"{key}.{name}", inner, into)
    else:
        into[key] = value
