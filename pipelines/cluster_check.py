"""``rediffuse doctor --cluster``: a self-test of about a minute on the user's own cluster."""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_core.storage import write_text
from pipelines.cluster import cluster_nodes, is_uri, place, ray_session
from pipelines.node_facts import REMEDIES, NodeFacts, ask_nodes, differences, facts_of_this_node, is_fatal, shown
from pipelines.params import RunSettings
from pipelines.resources import TaskPlan, TrainingPlan, plan_training, plan_units
from pipelines.stage import DATA, describe_error, quiet_environment
from pipelines.workspace import in_project

TENSOR_MIB = 64
"""Size of the tensor of the all-reduce: about the gradients of a network of 16 million parameters."""
ROUNDS = 5
LEAST_FREE_GIB = 5.0
MOST_SKEW = 2.0
"""Seconds. Tokens and signatures of object stores tolerate more, log lines of several nodes do not."""
STEP_SECONDS = 180.0


@dataclass(frozen=True)
class Row:
    """A line of the table. An empty remedy means that all is well."""

    what: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{'WRONG' if self.remedy else 'ok':<6}{self.what:<34}{self.found}" + (
            f"\n{'':<6}-> {self.remedy}" if self.remedy else ""
        )


def check_cluster(run: RunSettings, show: Callable[[Row], None]) -> bool:
    """Test the cluster and call ``show`` with each row as soon as it is known. Return True if nothing is wrong."""
    wrong: list[Row] = []

    def report(row: Row) -> None:
        show(row)
        if row.remedy:
            wrong.append(row)

    logging.getLogger("rediffuse").setLevel(logging.ERROR)
    try:
        with ray_session(run.ray, compare=False):
            _check_nodes(run, report)
            _check_step(run, report)
            _check_unit(run, report)
    except ValueError as error:
        report(Row("joining", "failed", describe_error(error)))
    report(_check_mlflow(run))
    return not wrong


def _check_nodes(run: RunSettings, report: Callable[[Row], None]) -> None:
    """Report the versions, devices, storage, free disk and clock of each node."""
    import ray

    probes = {}
    folders = {"the data folder": DATA} | (
        {} if is_uri(run.ray.storage) else {"ray.storage": in_project(run.ray.storage)}
    )
    for name, folder in folders.items():
        made = folder.resolve()
        made.mkdir(parents=True, exist_ok=True)
        probes[name] = made / f".shared-{uuid.uuid4().hex}"
        write_text(probes[name], "")
    try:
        nodes = ask_nodes({name: str(path) for name, path in probes.items()}, devices=True)
    finally:
        for path in probes.values():
            path.unlink(missing_ok=True)
    total = ray.cluster_resources()
    report(Row("cluster", f"{len(nodes)} node(s), {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"))
    own = facts_of_this_node()({}, False)["versions"]
    for node in nodes:
        for row in _rows_of(node, own, probes):
            report(row)
    if is_uri(run.ray.storage):
        report(_check_uri(run.ray.storage))


def _rows_of(node: NodeFacts, own: dict[str, str], probes: dict[str, Path]) -> list[Row]:
    name = f"node {node.name}"
    if node.error:
        remedy = "look into the logs of this node (ray logs), and compare its Python environment with the driver's"
        return [Row(name, f"cannot run a task: {node.error}", remedy)]
    rows = [
        Row(
            name,
            f"{node.cpus:g} CPUs, {node.gpus:g} GPUs; torch sees {shown(node.devices)}",
            "install a driver and a torch build that fit each other there, or start the node with --num-gpus=0"
            if node.gpus > len(node.devices)
            else "",
        )
    ]
    other = differences(node.versions, own)
    versions = ", ".join(f"{key} {value}" for key, value in node.versions.items())
    fatal = [key for key, (theirs, ours) in other.items() if is_fatal(key, theirs, ours)]
    if other:
        versions += "; here " + ", ".join(f"{key} {ours}" for key, (_, ours) in other.items())
    rows.append(
        Row(
            "  versions",
            versions,
            "; ".join(REMEDIES.get(key, f"install {key}=={other[key][1]} there") for key in fatal),
        )
    )
    for key, state in node.storage.items():
        folder = probes[key].parent
        remedy = ""
        if state == "not seen":
            remedy = (
                f"{folder} is not on this node: mount the project's storage there, or set ray.storage in run.yaml to a shared folder or "
                "URI (s3://..., gs://...)"
            )
        elif state != "ok":
            remedy = f"make {folder} writable for the user of this node's Ray"
        rows.append(Row(f"  {key}", state, remedy))
    free = "free space: Ray spills objects to its temporary folder (ray start --temp-dir)"
    rows.append(Row("  free disk", f"{node.free_gib:.0f} GiB", free if node.free_gib < LEAST_FREE_GIB else ""))
    clock = "synchronise the clocks (chrony, ntp)" if abs(node.skew) > MOST_SKEW else ""
    rows.append(Row("  clock", f"{node.skew:+.3f} s against the driver", clock))
    return rows


def _check_uri(storage: str) -> Row:
    from pyarrow import fs

    remedy = "check ray.storage in run.yaml, the credentials in the environment, and the rights to write"
    try:
        filesystem, path = fs.FileSystem.from_uri(storage)
        probe = f"{path.rstrip('/')}/.probe-{uuid.uuid4().hex}"
        filesystem.create_dir(path, recursive=True)
        with filesystem.open_output_stream(probe) as file:
            file.write(b"probe")
        filesystem.delete_file(probe)
    except (OSError, ValueError) as error:
        return Row("ray.storage", f"{storage}: {describe_error(error)[:200]}", remedy)
    return Row("ray.storage", f"{storage} is writable from here")


def _check_step(run: RunSettings, report: Callable[[Row], None]) -> None:
    """Report one DDP step over all workers of the plan that training uses, and the bandwidth of its all-reduce."""
    nodes = cluster_nodes()
    name = "DDP step"
    try:
        plan = plan_training(run.train, batch_size=1_000_000, steps=1, nodes=nodes)
        place(plan)
    except ValueError as error:
        report(Row(name, "not run", describe_error(error)))
        return
    backend = "nccl" if plan.gpus_per_worker >= 1 else "gloo"
    interface = "set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME on every node to the interface that connects them, and open its ports"
    try:
        seconds, bandwidth, loss_equal = _step(plan, backend)
    except Exception as error:
        report(Row(name, f"failed with {backend}: {describe_error(error)[-300:]}", interface))
        return
    found = f"{plan.num_workers} workers, {backend}, {seconds:.2f} s"
    differ = "the workers' weights differ after one step: test the memory and the network of the nodes"
    report(Row(name, found, "" if loss_equal else differ))
    if plan.num_workers > 1:
        gb = "GB/s" if bandwidth >= 0.1 else "GB/s: slow"
        report(Row("all-reduce", f"{bandwidth:.2f} {gb}, float32 tensor of {TENSOR_MIB} MiB"))


def _step(plan: TrainingPlan, backend: str) -> tuple[float, float, bool]:
    """Run the step in actors of one placement group. Return its seconds, the bandwidth in GB/s, and whether all weights are equal."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": plan.cpus} | ({"GPU": plan.gpus} if plan.gpus else {})
    group = placement_group([bundle] * plan.num_workers, strategy="PACK")
    workers: list[Any] = []
    try:
        if not group.wait(STEP_SECONDS):
            raise ValueError(f"the cluster did not free {plan.num_workers} x {bundle} within {STEP_SECONDS:.0f} s")
        actor = ray.remote(StepWorker)
        for index in range(plan.num_workers):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            options = {"num_cpus": plan.cpus, "num_gpus": plan.gpus, "scheduling_strategy": strategy}
            workers.append(actor.options(**options).remote(plan.threads))
        address = ray.get(workers[0].address.remote(), timeout=STEP_SECONDS)
        answers = ray.get(
            [each.step.remote(rank, len(workers), backend, address) for rank, each in enumerate(workers)],
            timeout=STEP_SECONDS,
        )
    finally:
        for each in workers:
            ray.kill(each)
        remove_placement_group(group)
    return (
        max(answer[0] for answer in answers),
        min(answer[1] for answer in answers),
        len({answer[2] for answer in answers}) == 1,
    )


class StepWorker:
    """One process of the DDP step."""

    def __init__(self, threads: int) -> None:
        from pipelines.devices import prepare_process

        quiet_environment()
        self.device = prepare_process(threads)

    def address(self) -> str:
        """Return an address on this worker's node that the others can reach."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        host = ray.util.get_node_ip_address()
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def step(self, rank: int, world_size: int, backend: str, address: str) -> tuple[float, float, float]:
        """Return the seconds of a step, the bandwidth of the all-reduce in GB/s, and a sum of the weights after the step.

        Bandwidth is the ring's: 2 (N - 1) / N times the tensor's bytes per second.
        """
        from datetime import timedelta

        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        limit = timedelta(seconds=STEP_SECONDS / 2)
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size, timeout=limit)
        try:
            torch.manual_seed(0)
            network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.SiLU(), torch.nn.Conv2d(16, 3, 3))
            model = DistributedDataParallel(network.to(self.device))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(rank)).to(self.device)
            began = time.perf_counter()
            model(images).square().mean().backward()
            optimizer.step()
            total = float(sum(parameter.detach().double().sum().item() for parameter in model.parameters()))
            seconds = time.perf_counter() - began
            tensor = torch.ones(TENSOR_MIB * 2**18, device=self.device)
            dist.all_reduce(tensor)
            float(tensor[0])
            began = time.perf_counter()
            for _ in range(ROUNDS):
                dist.all_reduce(tensor)
            float(tensor[0])
            took = (time.perf_counter() - began) / ROUNDS
            return seconds, 2 * (world_size - 1) / world_size * TENSOR_MIB * 2**20 / took / 1e9, total
        finally:
            dist.destroy_process_group()


def _check_unit(run: RunSettings, report: Callable[[Row], None]) -> None:
    """Report one sampling unit with a tiny random model, on the resources that evaluate asks for."""
    import ray

    name = "sampling unit"
    try:
        plan: TaskPlan = plan_units(run.evaluate, num_units=1, nodes=cluster_nodes())
        place(plan)
        task = ray.remote(num_cpus=plan.cpus, num_gpus=plan.gpus, max_calls=1, max_retries=0)(sample_tiny)
        began = time.perf_counter()
        device = ray.get(task.remote(plan.threads), timeout=STEP_SECONDS)
    except Exception as error:
        remedy = "compare the versions above, and read the worker's log in Ray's temporary folder"
        known = isinstance(error, ValueError) and not hasattr(error, "cause")
        report(
            Row(
                name, "not run" if known else f"failed: {describe_error(error)[-300:]}", str(error) if known else remedy
            )
        )
        return
    report(Row(name, f"8 images on {device}, {time.perf_counter() - began:.2f} s"))


def sample_tiny(threads: int) -> str:
    """Sample eight images of a random network. Return the device. Raises ValueError if an image is not finite."""
    import torch

    from diffusion_core.artifact import DiffusionModel
    from diffusion_core.generation import SamplerSettings, generate_images
    from diffusion_core.networks import build_network
    from diffusion_core.schedules import make_schedule
    from pipelines.devices import prepare_process

    device = prepare_process(threads)
    torch.manual_seed(0)
    config = {
        "name": "unet",
        "condition": {"kind": "class", "size": 2},
        "image_size": 8,
        "image_channels": 1,
        "channels": 8,
        "multipliers": [1, 1],
        "num_res_blocks": 1,
        "attention_sizes": [4],
        "groups": 4,
    }
    network = build_network(config).eval().to(device)
    schedule = make_schedule("cosine", num_steps=10)
    model = DiffusionModel(
        network=network,
        network_config=config,
        schedule=schedule,
        objective="v",
        image_size=8,
        image_channels=1,
        condition_dropout=0.1,
        class_names=("a", "b"),
        provenance={},
    )
    images = generate_images(model, torch.arange(8) % 2, torch.arange(8), SamplerSettings(steps=4), seed=0)
    assert images.shape == (8, 1, 8, 8)
    return str(device)


def _check_mlflow(run: RunSettings) -> Row:
    """Write one run to the tracking store, read it back and delete it."""
    from pipelines.tracking import connect, tracking_uri, without_credentials

    uri = without_credentials(tracking_uri(run.tracking))
    began = time.perf_counter()
    try:
        client = connect(run.tracking)
        experiment = client.get_experiment_by_name(run.tracking.experiment)
        made = client.create_run(experiment.experiment_id, tags={"mlflow.runName": "doctor"}).info.run_id
        client.log_metric(made, "probe", 1.0)
        read = client.get_run(made).data.metrics.get("probe")
        client.set_terminated(made)
        client.delete_run(made)
    except Exception as error:
        return Row("MLflow", uri, describe_error(error))
    remedy = "" if read == 1.0 else "the store returned another value than was written: check its database"
    return Row("MLflow", f"{uri}: a run written, read and deleted, {time.perf_counter() - began:.2f} s", remedy)
