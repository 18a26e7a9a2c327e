"""Ray: where it starts, what it must offer, and whether its nodes see the same storage. Nothing else calls ray.init."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion_core.storage import write_text
from pipelines.params import Ray
from pipelines.stage import log, quiet_environment


@contextmanager
def ray_session(settings: Ray) -> Iterator[None]:
    """Join the cluster of ``ray.address`` or RAY_ADDRESS, else start a local Ray on this machine's cores; leave it at the end.

    Raises ValueError where the cluster cannot be reached.
    """
    quiet_environment()
    import ray

    address = settings.address or os.environ.get("RAY_ADDRESS") or None
    if ray.is_initialized():
        yield
        return
    if address in (None, "local"):
        ray.init(
            address="local",
            num_cpus=settings.num_cpus or len(os.sched_getaffinity(0)),
            log_to_driver=True,
            logging_level=logging.WARNING,
            dashboard_host="127.0.0.1",
        )
    else:
        import diffusion_core
        import pipelines

        _check_listens(address)
        packages = [str(Path(package.__file__ or "").parent) for package in (diffusion_core, pipelines)]
        try:
            ray.init(
                address=address,
                runtime_env={"py_modules": packages, "env_vars": _passed_on()},
                logging_level=logging.WARNING,
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise _no_cluster(address, str(error)) from None
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    log.info("Ray: %d node(s), %g CPUs, %g GPUs", len(nodes), total.get("CPU", 0), total.get("GPU", 0))
    try:
        yield
    finally:
        ray.shutdown()


def check_resources(count: int, cpus: float, gpus: float, what: str, remedy: str) -> None:
    """Raise ValueError where ``count`` bundles of these resources can never be placed on the cluster's nodes.

    ``what`` names the request and ``remedy`` the settings that change it. A cluster that can grow by itself is not judged.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = 0
    for resources in nodes:
        by_cpu = resources.get("CPU", 0.0) / cpus if cpus else float("inf")
        by_gpu = resources.get("GPU", 0.0) / gpus if gpus else float("inf")
        fitting += int(min(by_cpu, by_gpu, count) + 1e-9)
    if fitting < count:
        total = ray.cluster_resources()
        asked = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise ValueError(
            f"{what}: {count} x ({asked}) can never run on this Ray cluster of {len(nodes)} node(s) with "
            f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs; {remedy}"
        )


def check_shared(folders: dict[str, Path]) -> None:
    """Raise ValueError where a node of a cluster of several does not see one of these local folders.

    Each node looks for a file that this process has just written, so a network file system passes and a local disk does not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    probes = {}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        probes[name] = folder.resolve() / f".shared-{uuid.uuid4().hex}"
        write_text(probes[name], "")
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(_exist)
        answers = []  # pairs: a host name is no key, several nodes may share one
        for node in nodes:
            there = look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            answers.append((node["NodeManagerHostname"], there.remote([str(path) for path in probes.values()])))
        for host, answer in answers:
            found: list[bool] = ray.get(answer, timeout=120)  # type: ignore[arg-type]
            for name, seen in zip(probes, found, strict=True):
                if not seen:
                    raise ValueError(
                        f"{name} is {folders[name]}, a folder that node {host} of the Ray cluster does not see: with several nodes, "
                        "put the project on storage that all of them mount, or set ray.storage to such a folder or URI (s3://..., gs://...)"
                    )
    finally:
        for path in probes.values():
            path.unlink(missing_ok=True)


def prepare_worker(threads: int) -> None:
    """Called by each Ray worker before it computes: its share of the cores, and an allocator that keeps its memory."""
    import torch

    from diffusion_core.networks.memory import keep_freed_memory

    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
        keep_freed_memory()


def is_uri(storage: str) -> bool:
    return "://" in storage


def _exist(paths: list[str]) -> list[bool]:
    return [Path(path).exists() for path in paths]


def _passed_on() -> dict[str, str]:
    names = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "MLFLOW_DISABLE_TELEMETRY", "REDIFFUSE_TRACEBACK")
    return {name: os.environ[name] for name in names if name in os.environ}


def _check_listens(address: str) -> None:
    """Ray itself waits for minutes, and then ends the process, where nobody listens at host:port."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from None


def _no_cluster(address: str, reason: str) -> ValueError:
    return ValueError(
        f"no Ray cluster answers at {address} ({' '.join(reason.split())[:200]}): start it (ray start --head), or correct "
        "ray.address or RAY_ADDRESS; without either a local Ray is started"
    )
