"""The computation of the reference as a Ray task, so that it uses a GPU of the cluster and never the head node's CPUs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pipelines.data.shards import open_split
from pipelines.devices import deterministic, prepare_process
from pipelines.measurement.reference_writer import write_reference
from pipelines.resources import Node, TaskPlan


def plan_reference(device: Literal["auto", "cpu", "cuda"], nodes: Sequence[Node]) -> TaskPlan:
    """Plan the task: one GPU with its share of the CPUs if there is one, else all CPUs of the largest node.

    Raises ValueError if ``device`` is cuda and no node has a GPU.
    """
    with_gpu = [node for node in nodes if node.gpus >= 1]
    if device == "cuda" and not with_gpu:
        raise ValueError(
            "reference.device in run.yaml: given cuda, but no node of the Ray cluster has a GPU: set auto or cpu"
        )
    use_gpu = bool(with_gpu) and device != "cpu"
    if use_gpu:
        cpus = max(min(node.cpus // node.gpus for node in with_gpu), 1.0)
    else:
        cpus = max((node.cpus for node in nodes), default=1.0) or 1.0
    why = f"reference.device in run.yaml is {device}"
    return TaskPlan(
        max_concurrent=1,
        cpus=cpus,
        gpus=1.0 if use_gpu else 0.0,
        max_retries=3,
        reason=f"one task with {cpus:g} CPUs and {1 if use_gpu else 0} GPUs: {why}",
        request="reference.device",
        remedy="set reference.device in run.yaml to cpu, or add nodes",
    )


def write_reference_on_ray(
    folder: Path, data_dir: Path, plan: TaskPlan, **options: Any
) -> tuple[list[tuple[int, float]], str]:
    """Call `write_reference` in a Ray task and write its files into ``folder``. Return the losses of `train_classifier` and the device type.

    ``data_dir``: the prepared data, which the task's node must see; ``options``: the other arguments of `write_reference`. Only
    the driver writes into ``folder``. A task whose node dies is retried ``plan.max_retries`` times.
    """
    import ray

    task = ray.remote(num_cpus=plan.cpus, num_gpus=plan.gpus, max_retries=plan.max_retries)(_compute)
    files, losses, device_type = ray.get(task.remote(str(data_dir.resolve()), plan.threads, options))  # type: ignore[misc]
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return losses, device_type


def _compute(
    data_dir: str, threads: int, options: dict[str, Any]
) -> tuple[dict[str, bytes], list[tuple[int, float]], str]:
    """Return the files by name, the losses and the device type."""
    device = prepare_process(threads)
    losses: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as scratch, deterministic():
        write_reference(
            Path(scratch),
            splits={split: open_split(Path(data_dir), split) for split in ("train", "test")},
            device=device,
            on_step=step_recorder(losses, options["steps"], print),  # Ray passes printed lines to the driver
            **options,
        )
        files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    return files, losses, device.type


def step_recorder(
    losses: list[tuple[int, float]], steps: int, show: Callable[[str], object]
) -> Callable[[int, float], None]:
    """Return an ``on_step`` that appends to ``losses`` and shows a line every 200 steps and at the end."""

    def on_step(step: int, loss: float) -> None:
        losses.append((step, loss))
        if step % 200 == 0 or step == steps:
            show(f"class network: step {step}/{steps}  loss {loss:.4f}")

    return on_step
