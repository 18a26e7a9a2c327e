"""Render a kustomization: with kubectl or kustomize if one is on the PATH, else with the subset of kustomize that infra/kuberay uses.

The subset knows `resources`, `configMapGenerator` (files), `generatorOptions.disableNameSuffixHash`, `namespace`, `images` and
`patches` (JSON 6902, target by kind). It raises ValueError for every other key, which kubectl knows, so nothing is rendered wrongly.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml  # YAML 1.1, as Kubernetes reads it

KEYS = {
    "apiVersion",
    "kind",
    "resources",
    "configMapGenerator",
    "generatorOptions",
    "namespace",
    "images",
    "patches",
}
CLUSTER_SCOPED = {"Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "PersistentVolume"}


def real_command() -> list[str] | None:
    """Return the command of a real kustomize, or None. kubectl before 1.21 has a kustomize of 2019 and does not count."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        version = subprocess.run(["kubectl", "version", "--client", "-o", "yaml"], capture_output=True, text=True)
        if version.returncode == 0 and load_all(version.stdout)[0].get("kustomizeVersion", "").startswith("v5"):
            return ["kubectl", "kustomize"]
    return None


def render_with(command: list[str], folder: Path) -> list[dict[str, Any]]:
    """Render the kustomization in ``folder`` with a real kustomize."""
    result = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return load_all(result.stdout)


def render_subset(folder: Path) -> list[dict[str, Any]]:
    """Render the kustomization in ``folder`` with the subset that the module describes."""
    tree = load_all((folder / "kustomization.yaml").read_text(encoding="utf-8"))[0]
    _only(tree, KEYS, folder)
    objects: list[dict[str, Any]] = []
    for name in tree.get("resources", ()):
        path = (folder / name).resolve()
        objects += render_subset(path) if path.is_dir() else load_all(path.read_text(encoding="utf-8"))
    options = tree.get("generatorOptions", {})
    _only(options, {"disableNameSuffixHash"}, folder)
    for generator in tree.get("configMapGenerator", ()):
        _only(generator, {"name", "files"}, folder)
        if not options.get("disableNameSuffixHash"):
            raise ValueError(f"{folder}: a configMapGenerator with a hash in its name")
        data = {Path(file).name: (folder / file).read_text(encoding="utf-8") for file in generator["files"]}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data})
    for patch in tree.get("patches", ()):
        _only(patch, {"target", "patch"}, folder)
        _only(patch["target"], {"kind"}, folder)
        targets = [each for each in objects if each["kind"] == patch["target"]["kind"]]
        if not targets:
            raise ValueError(f"{folder}: no object of kind {patch['target']['kind']} to patch")
        for target in targets:
            for operation in load_all(patch["patch"])[0]:
                _apply(target, operation, folder)
    for image in tree.get("images", ()):
        _only(image, {"name", "newName", "newTag"}, folder)
        for each in objects:
            _replace_image(each, image)
    if "namespace" in tree:
        for each in objects:
            if each["kind"] not in CLUSTER_SCOPED:
                each["metadata"]["namespace"] = tree["namespace"]
    return objects


def load_all(text: str) -> list[Any]:
    """Load all documents of a YAML text as plain values, aliases as copies."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [_plain(each) for each in yaml.load_all(text, Loader=loader) if each is not None]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _only(tree: dict[str, Any], allowed: set[str], folder: Path) -> None:
    if unknown := set(tree) - allowed:
        raise ValueError(f"{folder}: the test's renderer does not know {sorted(unknown)}; install kubectl")


def _apply(target: Any, operation: dict[str, Any], folder: Path) -> None:
    """Apply one operation of JSON Patch (RFC 6902): replace or remove of a value that exists."""
    _only(operation, {"op", "path", "value"}, folder)
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    key = int(last) if isinstance(target, list) else last
    target[key]  # RFC 6902: the target location must exist
    if operation["op"] == "replace":
        target[key] = operation["value"]
    elif operation["op"] == "remove":
        del target[key]
    else:
        raise ValueError(f"{folder}: the test's renderer does not know the operation {operation['op']}")


def _replace_image(tree: Any, image: dict[str, str]) -> None:
    """Replace the image in every list of containers at any depth, as kustomize does."""
    if isinstance(tree, list):
        for each in tree:
            _replace_image(each, image)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("containers", "initContainers"):
                for container in value:
                    if container["image"].split(":")[0] == image["name"]:
                        container["image"] = f"{image['newName']}:{image['newTag']}"
            _replace_image(value, image)
