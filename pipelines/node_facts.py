"""Facts about each node of the Ray cluster: versions, code, clock, devices and storage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("rediffuse")

ANSWER_SECONDS = 120.0
COMPARED = ("torch", "ray", "torchvision")


@dataclass(frozen=True)
class NodeFacts:
    """The answer of a node, or the error that came instead of one. ``skew``: its clock minus the driver's, in seconds."""

    name: str
    cpus: float = 0.0
    gpus: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    free_gib: float = 0.0
    skew: float = 0.0
    storage: dict[str, str] = field(default_factory=dict)
    error: str = ""


def ask_nodes(probes: dict[str, str] | None = None, devices: bool = False) -> list[NodeFacts]:
    """Ask each node that is alive. ``probes``: the path, by name, of a file of this process that it should see in a folder it can write to.

    ``devices``: also ask torch for its GPUs, which takes seconds.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = ray.remote(num_cpus=0, max_retries=0)(facts_of_this_node())
    pending = []
    for node in nodes:
        there = asked.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        pending.append(there.remote(probes or {}, devices))
    found = []
    for node, answer in zip(nodes, pending, strict=True):
        name = f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})"
        resources = {"cpus": node["Resources"].get("CPU", 0.0), "gpus": node["Resources"].get("GPU", 0.0)}
        try:
            facts: dict[str, Any] = ray.get(answer, timeout=ANSWER_SECONDS)
        except Exception as error:  # the table names it
            cause = getattr(error, "cause", None) or error
            found.append(NodeFacts(name, **resources, error=" ".join(str(cause).split())[-200:]))
            continue
        found.append(NodeFacts(name, **resources, **facts, skew=_skew(node["NodeID"]) if devices else 0.0))
    return found


def check_same_versions() -> None:
    """Compare the packages and the code of each node with this process's.

    Raises ValueError if torch's first two numbers or the code differ: the result would not be the driver's. Other differences are
    warnings.
    """
    own = facts_of_this_node()({}, False)["versions"]
    for node in ask_nodes():
        if node.error:
            line = f"node {node.name} of the Ray cluster cannot run a task: {node.error}"
            if "runtime env" in node.error.lower() or "runtime_env" in node.error.lower():
                raise ValueError(f"{line}; correct the job's runtime_env, or the packages of this node")
            log.warning("%s", line)  # it may have just died: Ray places nothing there
            continue
        for name, (theirs, ours) in differences(node.versions, own).items():
            line = f"node {node.name} of the Ray cluster has {name} {theirs}, this process {ours}"
            if is_fatal(name, theirs, ours):
                raise ValueError(f"{line}: {REMEDIES.get(name, f'install {name}=={ours} there')}")
            log.warning("%s", line)


REMEDIES = {
    "code": "start its workers with the driver's code (py_modules or working_dir of the job, or the same image on every node)"
}


def differences(theirs: dict[str, str], own: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return what differs: {name: (version there, version here)}."""
    names = [*COMPARED, "code"]
    return {
        name: (theirs.get(name, "none"), own.get(name, "none")) for name in names if theirs.get(name) != own.get(name)
    }


def is_fatal(name: str, theirs: str, ours: str) -> bool:
    """Return True if work must not start on nodes that differ in this."""
    return name == "code" or (name == "torch" and theirs.split(".")[:2] != ours.split(".")[:2])


def facts_of_this_node() -> Callable[[dict[str, str], bool], dict[str, Any]]:
    """Return the function that a node runs. It is pickled by value, so that it also runs if the project cannot be imported there."""

    def facts(probes: dict[str, str], devices: bool) -> dict[str, Any]:
        import ast
        import hashlib
        import importlib.metadata
        import importlib.util
        import os
        import pathlib
        import shutil
        import uuid

        versions = {}
        for name in ("torch", "ray", "torchvision"):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        digest = hashlib.sha256()
        for package in ("diffusion_core", "pipelines"):
            spec = importlib.util.find_spec(package)
            for folder in (spec.submodule_search_locations or []) if spec else []:
                for path in sorted(pathlib.Path(folder).rglob("*.py")):
                    digest.update(str(path.relative_to(folder)).encode())
                    digest.update(ast.dump(ast.parse(path.read_bytes())).encode())
        versions["code"] = digest.hexdigest()[:12]
        storage = {}
        for name, probe in probes.items():
            try:
                if not os.path.exists(probe):  # noqa: PTH110
                    storage[name] = "not seen"
                    continue
                written = f"{probe}-{uuid.uuid4().hex}"
                pathlib.Path(written).write_text("")
                os.unlink(written)  # noqa: PTH108
                storage[name] = "ok"
            except OSError as error:
                storage[name] = f"not writable ({error.strerror})"
        names: tuple[str, ...] = ()
        if devices:
            try:
                import torch

                found = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
                names = tuple(torch.cuda.get_device_name(index) for index in found)
            except ImportError:
                names = ()
        free = shutil.disk_usage("/tmp").free / 2**30
        return {"versions": versions, "devices": names, "free_gib": free, "storage": storage}

    return facts


def _skew(node_id: str, rounds: int = 3) -> float:
    """Return the node's clock minus this one: of the fastest of some round trips, at its middle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def now() -> float:
        import time

        return time.time()

    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    ask = ray.remote(num_cpus=0, max_retries=0)(now).options(scheduling_strategy=strategy)
    measured = []
    for _ in range(rounds):
        before = time.time()
        there: float = ray.get(ask.remote(), timeout=ANSWER_SECONDS)  # type: ignore[assignment]
        after = time.time()
        measured.append((after - before, there - (before + after) / 2))
    return min(measured)[1]


def shown(names: Sequence[str]) -> str:
    """Return equal names counted: 2 x NVIDIA H100."""
    return ", ".join(f"{list(names).count(name)} x {name}" for name in dict.fromkeys(names)) or "none"
