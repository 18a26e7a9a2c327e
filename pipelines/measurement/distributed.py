"""Run units of work as Ray tasks, skip finished units, and retry units whose worker dies."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.devices import prepare_process
from pipelines.durations import minutes_and_seconds
from pipelines.measurement.measure import Measurement
from pipelines.measurement.units import Arrays, Unit, Work, load_result, merge_units, save_result
from pipelines.params import EvaluateRun
from pipelines.resources import Node, TaskPlan, plan_units

log = logging.getLogger("rediffuse")

PROGRESS_SECONDS = 10.0


def unit_device(run: EvaluateRun, nodes: Sequence[Node]) -> str:
    """Return the device type of the units, cpu or cuda. The number of units, which depends on it, does not change it."""
    return plan_units(run, num_units=1, nodes=nodes).device_type


def measure_on_ray(
    parts: Sequence[Sequence[Unit]],
    work: Work,
    *,
    state_dir: Path,
    plan: TaskPlan,
    others: Sequence[Unit] = (),
    on_measurement: Callable[[int, Measurement], None] = lambda number, measurement: None,
) -> list[Measurement]:
    """Measure on Ray, and return one measurement per setting. ``parts`` are the `sample_units` of each setting.

    ``others`` are further units that run in the same pool. ``on_measurement(number of the setting, measurement)`` is called as soon
    as a setting is finished. See `run_units`.
    """
    number_of = {unit: number for number, units in enumerate(parts) for unit in units}
    missing = [len(units) for units in parts]
    measurements: dict[int, Measurement] = {}

    def on_result(unit: Unit) -> None:
        number = number_of.get(unit)
        if number is None:
            return
        missing[number] -= 1
        if missing[number] == 0:
            measurements[number] = merge_units(parts[number], state_dir)
            on_measurement(number, measurements[number])

    run_units([*number_of, *others], work, state_dir=state_dir, plan=plan, on_result=on_result)
    return [measurements[number] for number in range(len(parts))]


def run_units(
    units: Sequence[Unit], work: Work, *, state_dir: Path, plan: TaskPlan, on_result: Callable[[Unit], None]
) -> None:
    """Compute the units on Ray, the longest first, at most ``plan.max_concurrent`` at a time; save each result in ``state_dir``.

    Skips units that have a result. ``on_result(unit)`` is called for every unit when its result is on disk. Retries a unit whose
    worker dies up to ``plan.max_retries`` times. Raises ValueError if it dies more often; errors of a unit propagate.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    finished = [unit for unit in units if load_result(state_dir, unit) is not None]
    if finished:
        log.info("resuming: %d of %d units are finished", len(finished), len(units))
    for unit in finished:
        on_result(unit)
    waiting = deque(sorted(set(units) - set(finished), key=lambda unit: (-unit.cost, unit.name)))
    if not waiting:
        return
    progress = _Progress(len(units), len(finished), sum(unit.cost for unit in waiting))
    task = ray.remote(_compute).options(num_cpus=plan.cpus, num_gpus=plan.gpus, max_retries=0)
    shared = ray.put(work)
    deaths: dict[Unit, int] = dict.fromkeys(waiting, 0)
    running: dict[Any, Unit] = {}
    while waiting or running:
        while waiting and len(running) < plan.max_concurrent:
            unit = waiting.popleft()
            running[task.remote(shared, unit, plan.threads)] = unit
        ready = ray.wait(list(running), num_returns=1)[0][0]
        unit = running.pop(ready)
        try:
            arrays: Arrays = ray.get(ready)
        except RayTaskError:
            raise
        except RayError as error:  # the process or the node died, or the result was lost with its node
            deaths[unit] += 1
            reason = " ".join(str(error).split())[:300]
            if deaths[unit] > plan.max_retries:
                raise ValueError(
                    f"{unit.name}: its worker died {deaths[unit]} times, the last time: {reason}"
                ) from None
            log.warning("retry %d of %d of %s: %s", deaths[unit], plan.max_retries, unit.name, reason)
            waiting.append(unit)
            continue
        save_result(arrays, state_dir, unit)
        progress.add(unit, arrays)
        on_result(unit)


class _Progress:
    """Progress line: units done, speed, time left."""

    def __init__(self, num_units: int, finished: int, total_cost: int) -> None:
        self.num_units, self.finished, self.total_cost = num_units, finished, total_cost
        self.started = self.reported = time.monotonic()
        self.cost = self.images = self.calls = 0

    def add(self, unit: Unit, arrays: Arrays) -> None:
        self.finished += 1
        self.cost += unit.cost
        self.images += unit.count
        self.calls += int(arrays["network_calls"].item())
        now = time.monotonic()
        if now - self.reported < PROGRESS_SECONDS and self.finished < self.num_units:
            return
        self.reported = now
        elapsed = max(now - self.started, 1e-9)
        log.info(
            "%d/%d units  %.1f network calls/s  %.1f images/s  ETA %s",
            self.finished,
            self.num_units,
            self.calls / elapsed,
            self.images / elapsed,
            minutes_and_seconds(elapsed * (self.total_cost - self.cost) / self.cost),
        )


def _compute(work: Work, unit: Unit, threads: int) -> Arrays:
    device: torch.device = prepare_process(threads)
    return unit.compute(work, unit, device)
