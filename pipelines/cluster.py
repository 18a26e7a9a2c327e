"""Ray: where it starts, what it must offer, and whether its nodes see the same storage. Nothing else calls ray.init."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from diffusion_core.storage import write_text
from pipelines.autoscaling import future_nodes, is_autoscaling, node_types, wait_for_nodes
from pipelines.cpu_quota import usable_cpus
from pipelines.devices import best_precision
from pipelines.identity import State
from pipelines.joining import join
from pipelines.node_facts import check_same_versions
from pipelines.params import RayRun
from pipelines.resources import Node, TaskPlan, TrainingPlan
from pipelines.stage import log, quiet_environment
from pipelines.termination import exit_on_sigterm, own_process_group
from pipelines.workspace import in_project

_started_here = False
"""Whether `ray_session` started the Ray that is in use."""
LONGEST_SOCKET = 107
"""The longest path of a socket in bytes that Linux allows."""
RAY_SOCKET = "/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
PYTHON_SOCKET = "/pymp-xxxxxxxx/listener-xxxxxxxx"
"""The longest sockets below Ray's folder and below the temporary folder: Ray's processes use `multiprocessing`."""


@contextmanager
def ray_session(settings: RayRun, *, compare: bool = True) -> Iterator[None]:
    """Join the cluster of ``ray.address`` or RAY_ADDRESS, else start a local Ray on this machine's cores; leave it at the end.

    The local Ray uses token authentication. For a cluster, RAY_AUTH_MODE stays unchanged.
    ``compare``: compare the versions and the code of the cluster's nodes with this process's first.
    Raises ValueError if the cluster cannot be joined, or if a node has other code or another torch.
    """
    global _started_here
    quiet_environment()
    address, local = _address(settings), not joins_cluster(settings)
    if local and "ray" not in sys.modules:  # Ray reads the variable when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray
    from ray._private import ray_constants

    # Ray read the variable when it was imported, which may have been before quiet_environment.
    if os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0":
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    if ray.is_initialized():
        yield
        return
    if local:
        with _short_folders() as folders, own_process_group():
            ray.init(
                address="local",
                num_cpus=usable_cpus() if settings.num_cpus == "auto" else settings.num_cpus,
                log_to_driver=True,
                logging_level=logging.WARNING,
                dashboard_host="127.0.0.1",
                **folders,
            )
    else:
        import diffusion_core
        import pipelines

        assert address is not None
        join(
            address,
            _forwarded_environment(),
            [Path(each.__file__ or "").parent for each in (diffusion_core, pipelines)],
        )
    exit_on_sigterm()
    _started_here = local
    total = ray.cluster_resources()
    log.info("Ray: %d node(s), %g CPUs, %g GPUs", len(_alive_nodes()), total.get("CPU", 0), total.get("GPU", 0))
    try:
        if compare and not local:
            check_same_versions()
        yield
    finally:
        _started_here = False
        ray.shutdown()


def joins_cluster(settings: RayRun) -> bool:
    """Return True if `ray_session` joins a cluster, False if it starts a local Ray."""
    return _address(settings) not in (None, "local")


def _address(settings: RayRun) -> str | None:
    return settings.address or os.environ.get("RAY_ADDRESS") or None


def cluster_nodes() -> list[Node]:
    """Return the CPUs and GPUs of each node that is alive. GPUs of the local Ray that torch cannot use do not count.

    If the cluster can add nodes, every node that its types allow counts (max_workers), so that ``auto`` does not depend on how
    many are up. A type without a limit counts as its present nodes, at least one; unknown types count as nothing.
    """
    nodes = [Node(each["Resources"].get("CPU", 0.0), each["Resources"].get("GPU", 0.0)) for each in _alive_nodes()]
    if _is_local() and any(node.gpus for node in nodes) and not torch.cuda.is_available():
        log.warning("torch %s cannot use the GPUs of this machine: computing on the CPU", torch.__version__)
        nodes = [Node(node.cpus) for node in nodes]
    if not _is_local() and is_autoscaling():
        nodes = future_nodes(nodes, node_types())
    return nodes


def place(plan: TrainingPlan | TaskPlan) -> None:
    """Log what the plan takes and why. Raises ValueError if the cluster can never hold it."""
    log.info("%s", plan.reason)
    if plan.warning:
        log.warning("%s", plan.warning)
    check_resources(plan.processes, plan.cpus, plan.gpus, plan.request, plan.remedy)


def resolve_precision(precision: str, device_type: Literal["cpu", "cuda"]) -> str:
    """Return ``fp32`` or ``bf16``. An explicit precision is returned unchanged; ``auto`` is bf16 if every node multiplies bf16 natively.

    Every node with that type of device is asked once, so that all workers, and all workers of a later resume, agree.
    Raises ValueError if a node has a GPU that torch cannot use.
    """
    if precision != "auto":
        return precision
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resource = "GPU" if device_type == "cuda" else "CPU"
    if _is_local():
        answers = [_best_precision(device_type)]
    else:
        ask = ray.remote(num_cpus=0)(_best_precision)
        able = [node["NodeID"] for node in _alive_nodes() if node["Resources"].get(resource, 0.0) > 0]
        strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in able]
        answers = ray.get(
            [ask.options(scheduling_strategy=each).remote(device_type) for each in strategies], timeout=120
        )
    resolved = "bf16" if answers and all(answer == "bf16" for answer in answers) else "fp32"
    native = "all nodes multiply" if resolved == "bf16" else "not all nodes multiply"
    log.info("precision auto: %s, because %s bf16 natively on the %s", resolved, native, resource)
    return resolved


def state_storage(storage: str, stage: str, state: State) -> str:
    """Return where the checkpoints of a state lie: the URI or absolute folder ``<storage>/<stage>/<key>``.

    With the default storage ``runs`` it is the state's own folder.
    """
    if is_uri(storage):
        return f"{storage.rstrip('/')}/{stage}/{state.key}"
    return str((in_project(storage) / stage / state.key).absolute())


def check_resources(count: int, cpus: float, gpus: float, what: str, remedy: str) -> None:
    """Raise ValueError if ``count`` bundles of these resources can never be placed on the cluster's nodes.

    If the cluster can add nodes, ask for them and wait. If its node types are not known here, nothing is refused.

    ``what`` names the request and ``remedy`` the settings that change it.
    """
    nodes = cluster_nodes()
    can_grow = not _is_local() and is_autoscaling()
    if can_grow:
        present = [
            Node(each["Resources"].get("CPU", 0.0), each["Resources"].get("GPU", 0.0)) for each in _alive_nodes()
        ]
        if sum(node.holds(cpus, gpus) for node in present) >= count:
            return
    if sum(node.holds(cpus, gpus) for node in nodes) < count and not (can_grow and not node_types()):
        asked = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise ValueError(
            f"{what}: {count} x ({asked}) can never run on this Ray cluster of {len(nodes)} node(s) with "
            f"{sum(node.cpus for node in nodes):g} CPUs and {sum(node.gpus for node in nodes):g} GPUs; {remedy}"
        )
    if can_grow:
        wait_for_nodes(count, cpus, gpus, what)


def check_shared(folders: dict[str, Path]) -> None:
    """Raise ValueError if the cluster has several nodes and one of them does not see one of these local folders.

    Each node looks for a file that this process has just written, so a network file system passes and a local disk does not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = _alive_nodes()
    if len(nodes) < 2:
        return
    probes = {}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        probes[name] = folder.resolve() / f".shared-{uuid.uuid4().hex}"
        write_text(probes[name], "")
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(_exist)
        answers = []  # pairs, because several nodes may share a host name
        for node in nodes:
            there = look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            answers.append((node["NodeManagerHostname"], there.remote([str(path) for path in probes.values()])))
        for host, answer in answers:
            found: list[bool] = ray.get(answer, timeout=120)  # type: ignore[arg-type]
            for name, seen in zip(probes, found, strict=True):
                if not seen:
                    raise ValueError(
                        f"{name} is {folders[name]}, a folder that node {host} of the Ray cluster does not see: with several nodes, put the "
                        "project on storage that all of them mount, or set ray.storage in run.yaml to such a folder or URI (s3://..., gs://...)"
                    )
    finally:
        for path in probes.values():
            path.unlink(missing_ok=True)


def is_uri(storage: str) -> bool:
    """Return True if the storage is a URI (s3://..., gs://...) and not a folder."""
    return "://" in storage


def _alive_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _is_local() -> bool:
    """Return True if this process started its Ray, so that all of it is on this machine."""
    return _started_here


def _best_precision(device_type: str) -> str:
    return best_precision(torch.device(device_type))


def _exist(paths: list[str]) -> list[bool]:
    return [Path(path).exists() for path in paths]


@contextmanager
def _short_folders() -> Iterator[dict[str, Any]]:
    """Yield the settings of a local Ray for a TMPDIR or RAY_TMPDIR whose path is too long for sockets; none if it is not.

    Ray's folder is then a short one, but objects spill to the default. Processes that start inside of the block get a short TMPDIR.
    """
    temporary = os.environ.get("TMPDIR") or "/tmp"
    default = Path(os.environ.get("RAY_TMPDIR") or temporary, "ray").absolute()
    settings, former = {}, os.environ.get("TMPDIR")
    if len(os.fsencode(default)) + len(RAY_SOCKET) > LONGEST_SOCKET:
        default.mkdir(parents=True, exist_ok=True)
        settings = {"_temp_dir": str(_short_folder()), "object_spilling_directory": str(default)}
        log.info("Ray's folder is %s: %s is too long for its sockets", settings["_temp_dir"], default)
    if len(os.fsencode(temporary)) + len(PYTHON_SOCKET) > LONGEST_SOCKET:
        os.environ["TMPDIR"] = str(_short_folder())
    try:
        yield settings
    finally:
        if former is not None:
            os.environ["TMPDIR"] = former


def _short_folder() -> Path:
    """Create and return a folder of this user with a short path. Raises ValueError if none can be created."""
    for parent in ("/tmp", "/var/tmp", "/dev/shm"):
        folder = Path(parent, f"ray-{os.getuid()}")
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            continue
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    allowed = LONGEST_SOCKET - len(RAY_SOCKET) - len("/ray")
    raise ValueError(
        f"TMPDIR or RAY_TMPDIR is too long for Ray's sockets: set both to a folder whose path has at most {allowed} characters"
    )


def _forwarded_environment() -> dict[str, str]:
    """Return the variables of this process that workers on other nodes need: those of NCCL and torch, and some of our own."""
    names = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "MLFLOW_DISABLE_TELEMETRY", "REDIFFUSE_TRACEBACK")
    return {
        name: value
        for name, value in os.environ.items()
        if name in names or name.startswith(("NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_"))
    }
