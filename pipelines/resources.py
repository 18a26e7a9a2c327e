"""Counts of processes, CPUs and GPUs per stage: pure functions of run.yaml and the nodes of the cluster.

``auto`` takes what fits. An explicit value is obeyed or refused, never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.params import EvaluateRun, TrainRun, TuneRun


@dataclass(frozen=True)
class Node:
    """The CPUs and GPUs that a node of the Ray cluster offers."""

    cpus: float
    gpus: float = 0.0

    def holds(self, cpus: float, gpus: float) -> int:
        """Return the number of processes with these CPUs and GPUs that fit."""
        by_cpu = self.cpus / cpus if cpus else float("inf")
        by_gpu = self.gpus / gpus if gpus else float("inf")
        return int(min(by_cpu, by_gpu) + 1e-9)


@dataclass(frozen=True)
class TrainingPlan:
    """Plan of a training run. ``reason`` is the line that says what was chosen and why; ``warning`` may be empty."""

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    max_failures: int
    log_every: int
    checkpoint_every: int
    sample_every: int
    reason: str
    warning: str = ""

    request = "train.num_workers"
    remedy = "lower train.num_workers, train.cpus_per_worker or train.gpus_per_worker in run.yaml, or add nodes"

    @property
    def processes(self) -> int:
        """Workers that must fit at once."""
        return self.num_workers

    @property
    def cpus(self) -> float:
        return self.cpus_per_worker

    @property
    def gpus(self) -> float:
        return self.gpus_per_worker

    @property
    def threads(self) -> int:
        """Threads per worker."""
        return max(int(self.cpus_per_worker), 1)

    @property
    def device_type(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.gpus_per_worker > 0 else "cpu"


@dataclass(frozen=True)
class TaskPlan:
    """Plan of trials or units: concurrency, resources per task, retries. ``request`` names the setting that asks for the most."""

    max_concurrent: int
    cpus: float
    gpus: float
    max_retries: int
    reason: str
    request: str
    remedy: str
    required: int = 1
    warning: str = ""

    @property
    def processes(self) -> int:
        """Tasks that must fit at once: all of an explicit ``max_concurrent``, else one."""
        return self.required

    @property
    def threads(self) -> int:
        """Threads per task."""
        return max(int(self.cpus), 1)

    @property
    def device_type(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.gpus > 0 else "cpu"


def plan_training(run: TrainRun, *, batch_size: int, steps: int, nodes: Sequence[Node]) -> TrainingPlan:
    """Plan the training workers: one per GPU; without GPUs one per node, or two on a single node with two or more CPUs.

    Raises ValueError for more than one GPU per process, or more workers than images in a batch.
    """
    gpus = _gpus(run.gpus_per_worker, "train.gpus_per_worker", nodes)
    slots = _gpu_slots(nodes, gpus)
    if run.num_workers != "auto":
        count, why = run.num_workers, "set by train.num_workers in run.yaml"
        if count > batch_size:
            raise ValueError(
                f"train.num_workers: given {count}, allowed at most train.batch_size ({batch_size}), one image per worker"
            )
    elif gpus:
        count = max(slots, 1)
        share = "one per GPU" if gpus == 1 else f"one per {gpus:g} GPU"
        why = f"{share}, {_gpu_total(nodes):g} GPUs in the cluster"
    else:
        least = 1.0 if run.cpus_per_worker == "auto" else run.cpus_per_worker
        computing = [node for node in nodes if node.cpus >= least]
        if len(computing) > 1:
            count, why = len(computing), "one per node, no GPUs"
        else:
            cpus = computing[0].cpus if computing else 1.0
            count = 2 if cpus >= 2 * least else 1
            why = f"{'two' if count == 2 else 'one'} on a single node with {cpus:g} CPUs and no GPUs"
    if count > batch_size:
        count, why = batch_size, f"{why}, at most one per image of a batch"
    if 0 < gpus < 1 < count:
        raise ValueError(
            f"train.gpus_per_worker: given {gpus:g} with {count} workers: workers that share a GPU exchange gradients through the CPU, "
            "which is slower than one worker; set it to 1, or train.num_workers to 1"
        )
    cpus_per_worker = _cpus(run.cpus_per_worker, nodes, count, gpus)
    taken = f"{count} worker{'s' if count != 1 else ''} with {_amount(cpus_per_worker, gpus)} each"
    return TrainingPlan(
        num_workers=count,
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=gpus,
        max_failures=3 if run.max_failures == "auto" else run.max_failures,
        log_every=_cadence(run.log_every, steps // 100, 100),
        checkpoint_every=_cadence(run.checkpoint_every, steps // 8, 2000),
        sample_every=_cadence(run.sample_every, steps // 2, 10_000),
        reason=f"{taken}: {why}",
        warning=_idle_gpus(nodes, batch_size, count * gpus, "train.num_workers and train.gpus_per_worker")
        if run.num_workers != "auto" or run.gpus_per_worker != "auto"
        else "",
    )


def plan_trials(run: TuneRun, *, num_trials: int, nodes: Sequence[Node]) -> TaskPlan:
    """Plan the trials: as many at once as fit, each with one GPU if there are any, else with an equal share of the CPUs."""
    gpus = _gpus(run.gpus_per_trial, "tune.gpus_per_trial", nodes)
    return _plan_tasks(
        "trial", "tune", num_trials, run.max_concurrent, run.cpus_per_trial, gpus, 2 if run.max_failures == "auto" else run.max_failures, nodes
    )  # fmt: skip


def plan_units(run: EvaluateRun, *, num_units: int, nodes: Sequence[Node]) -> TaskPlan:
    """Plan the units: as many at once as fit, each with one GPU if there are any, else with an equal share of the CPUs."""
    gpus = _gpus(run.gpus_per_task, "evaluate.gpus_per_task", nodes)
    return _plan_tasks(
        "unit", "evaluate", num_units, run.max_concurrent, run.cpus_per_task, gpus, 3 if run.max_retries == "auto" else run.max_retries, nodes
    )  # fmt: skip


def _plan_tasks(
    name: str,
    section: str,
    count: int,
    max_concurrent: int | str,
    cpus: float | str,
    gpus: float,
    max_retries: int,
    nodes: Sequence[Node],
) -> TaskPlan:
    if isinstance(cpus, str):
        total = sum(node.cpus for node in nodes)
        wanted = max(count if isinstance(max_concurrent, str) else min(max_concurrent, count), 1)
        share = _cpus("auto", nodes, max(_gpu_slots(nodes, gpus), 1), gpus) if gpus else max(total // wanted, 1)
        cpus = float(min(share, max((node.cpus for node in nodes), default=1.0)) or 1.0)
    fitting = sum(node.holds(cpus, gpus) for node in nodes)
    explicit = not isinstance(max_concurrent, str)
    if explicit:
        at_once, why = int(max_concurrent), f"set by {section}.max_concurrent in run.yaml"
    else:
        at_once, why = max(min(fitting, count), 1), f"all that fit on {_described(nodes)}"
    kinds = "cpus_per_trial", "gpus_per_trial"
    if section == "evaluate":
        kinds = "cpus_per_task", "gpus_per_task"
    keys = [f"{section}.{key}" for key in ("max_concurrent", *kinds)]
    return TaskPlan(
        max_concurrent=at_once,
        cpus=cpus,
        gpus=gpus,
        max_retries=max_retries,
        reason=f"{at_once} {name}{'s' if at_once != 1 else ''} at once with {_amount(cpus, gpus)} each: {why}",
        request=keys[0] if explicit and at_once > 1 else keys[1],
        remedy=f"lower {', '.join(keys[:2])} or {keys[2]} in run.yaml, or add nodes",
        required=at_once if explicit else 1,
        warning=_idle_gpus(nodes, count, min(at_once, fitting, count) * gpus, f"{keys[0]} and {keys[2]}")
        if explicit or gpus < 1
        else "",
    )


def _gpus(given: float | str, key: str, nodes: Sequence[Node]) -> float:
    if isinstance(given, str):
        return 1.0 if _gpu_total(nodes) >= 1 else 0.0
    if given > 1:
        raise ValueError(
            f"{key}: given {given:g}, allowed at most 1: a process computes on one device, so take more processes"
        )
    return float(given)


def _cpus(given: float | str, nodes: Sequence[Node], count: int, gpus: float) -> float:
    """Return the CPUs per worker: an equal share of the smallest node that takes workers, in whole CPUs if there are enough."""
    if not isinstance(given, str):
        return float(given)
    if gpus:
        shares = [node.cpus / max(int(node.gpus / gpus), 1) for node in nodes if node.gpus >= gpus]
        share = min(shares, default=1.0)
        return float(int(share)) if share >= 1 else max(share, 0.01)
    computing = [node.cpus for node in nodes if node.cpus >= 1]
    per_node = -(-count // max(len(computing), 1))
    share = min(computing, default=1.0) / per_node
    return float(int(share)) if share >= 1 else max(int(share * 100) / 100, 0.01)


def _cadence(given: int | str, automatic: int, most: int) -> int:
    return given if not isinstance(given, str) else min(max(automatic, 1), most)


def _gpu_total(nodes: Sequence[Node]) -> float:
    return sum(node.gpus for node in nodes)


def _gpu_slots(nodes: Sequence[Node], gpus: float) -> int:
    """Return the number of processes with ``gpus`` GPUs that fit."""
    return sum(int(node.gpus / gpus + 1e-9) for node in nodes) if gpus else 0


def _idle_gpus(nodes: Sequence[Node], count: int, used: float, keys: str) -> str:
    """The warning about GPUs that ``count`` processes could use and do not; empty if there are none."""
    idle = int(min(_gpu_total(nodes), count) - used + 1e-9)
    if idle < 1:
        return ""
    return f"{idle} of {_gpu_total(nodes):g} GPUs stay idle: change {keys} in run.yaml"


def _amount(cpus: float, gpus: float) -> str:
    text = f"{cpus:g} CPU{'s' if cpus != 1 else ''}"
    return text + (f" and {gpus:g} GPU{'s' if gpus != 1 else ''}" if gpus else "")


def _described(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), _gpu_total(nodes)
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} with {_amount(cpus, gpus)}"
