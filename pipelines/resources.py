"""How many processes, CPUs and GPUs a stage takes: pure functions of run.yaml and the cluster's nodes.

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


@dataclass(frozen=True)
class TrainingPlan:
    """How training runs. ``reason`` is the line that says what was chosen and why; ``warning`` may be empty."""

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    max_failures: int
    log_every: int
    checkpoint_every: int
    sample_every: int
    reason: str
    warning: str = ""

    @property
    def threads(self) -> int:
        """Threads per worker."""
        return max(int(self.cpus_per_worker), 1)

    @property
    def device_type(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.gpus_per_worker > 0 else "cpu"


@dataclass(frozen=True)
class TaskPlan:
    """How trials or units run: how many at once, what each takes, and how often one is retried."""

    max_concurrent: int
    cpus: float
    gpus: float
    max_retries: int
    reason: str
    warning: str = ""

    @property
    def threads(self) -> int:
        """Threads per task."""
        return max(int(self.cpus), 1)

    @property
    def device_type(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.gpus > 0 else "cpu"


def plan_training(run: TrainRun, *, batch_size: int, steps: int, nodes: Sequence[Node]) -> TrainingPlan:
    """Workers: one per GPU; without GPUs one per node, or two on a single node with two or more CPUs. One GPU per worker if there are any.

    Raises ValueError for more than one GPU per process, or more workers than images in a batch.
    """
    gpus = _gpus(run.gpus_per_worker, "train.gpus_per_worker", nodes)
    slots = _gpu_slots(nodes, gpus)
    if run.num_workers != "auto":
        count, why = run.num_workers, "train.num_workers of run.yaml"
        if count > batch_size:
            raise ValueError(
                f"train.num_workers: given {count}, allowed at most train.batch_size ({batch_size}), one image per worker"
            )
    elif gpus:
        count, why = max(slots, 1), f"one per GPU, {_gpu_total(nodes):g} GPUs in the cluster"
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
        warning=_idle_gpus(nodes, count * gpus, "train.num_workers and train.gpus_per_worker"),
    )


def plan_trials(run: TuneRun, *, num_trials: int, nodes: Sequence[Node]) -> TaskPlan:
    """As many trials at once as fit; each takes one GPU if there are any, else an equal share of the CPUs."""
    gpus = _gpus(run.gpus_per_trial, "tune.gpus_per_trial", nodes)
    return _plan_tasks(
        "trial", "tune", num_trials, run.max_concurrent, run.cpus_per_trial, gpus, 2 if run.max_failures == "auto" else run.max_failures, nodes
    )  # fmt: skip


def plan_units(run: EvaluateRun, *, num_units: int, nodes: Sequence[Node]) -> TaskPlan:
    """As many units at once as fit; each takes one GPU if there are any, else an equal share of the CPUs."""
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
    fitting = sum(_fitting(node, cpus, gpus) for node in nodes)
    if isinstance(max_concurrent, str):
        at_once, why = max(min(fitting, count), 1), f"all that fit on {_described(nodes)}"
    else:
        at_once, why = max_concurrent, f"{section}.max_concurrent of run.yaml"
    taken = f"{at_once} {name}{'s' if at_once != 1 else ''} at once with {_amount(cpus, gpus)} each"
    idle = _idle_gpus(nodes, min(at_once, max(fitting, 1)) * gpus, f"the {section} section") if count >= fitting else ""
    return TaskPlan(at_once, cpus, gpus, max_retries, f"{taken}: {why}", idle)


def _gpus(given: float | str, key: str, nodes: Sequence[Node]) -> float:
    if isinstance(given, str):
        return 1.0 if _gpu_total(nodes) >= 1 else 0.0
    if given > 1:
        raise ValueError(
            f"{key}: given {given:g}, allowed at most 1: a process computes on one device, so take more processes"
        )
    return float(given)


def _cpus(given: float | str, nodes: Sequence[Node], count: int, gpus: float) -> float:
    """CPUs per worker: an equal share of the smallest node that takes workers, in whole CPUs if there are enough."""
    if not isinstance(given, str):
        return float(given)
    if gpus:
        shares = [node.cpus / max(int(node.gpus / gpus), 1) for node in nodes if node.gpus >= gpus]
        share = min(shares, default=1.0)
        return float(int(share)) if share >= 1 else max(share, 0.01)
    computing = [node.cpus for node in nodes if node.cpus >= 1]
    per_node = -(-count // max(len(computing), 1))
    return float(max(int(min(computing, default=1.0) // per_node), 1))


def _cadence(given: int | str, automatic: int, most: int) -> int:
    return given if not isinstance(given, str) else min(max(automatic, 1), most)


def _gpu_total(nodes: Sequence[Node]) -> float:
    return sum(node.gpus for node in nodes)


def _gpu_slots(nodes: Sequence[Node], gpus: float) -> int:
    """How many processes with ``gpus`` GPUs each fit."""
    return sum(int(node.gpus / gpus + 1e-9) for node in nodes) if gpus else 0


def _fitting(node: Node, cpus: float, gpus: float) -> int:
    by_gpu = node.gpus / gpus if gpus else float("inf")
    return int(min(node.cpus / cpus, by_gpu) + 1e-9)


def _idle_gpus(nodes: Sequence[Node], used: float, keys: str) -> str:
    idle = int(_gpu_total(nodes) - used + 1e-9)
    if idle < 1:
        return ""
    return f"{idle} of {_gpu_total(nodes):g} GPUs stay idle with {keys} as run.yaml sets them"


def _amount(cpus: float, gpus: float) -> str:
    text = f"{cpus:g} CPU{'s' if cpus != 1 else ''}"
    return text + (f" and {gpus:g} GPU{'s' if gpus != 1 else ''}" if gpus else "")


def _described(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), _gpu_total(nodes)
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} with {_amount(cpus, gpus)}"
