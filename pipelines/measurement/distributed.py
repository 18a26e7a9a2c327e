"""Run units of work on a pool of Ray actors, skip finished units, and retry units whose actor dies."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
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
    """Compute the units on Ray, the longest first, on a pool of at most ``plan.max_concurrent`` actors; save each result in ``state_dir``.

    Each actor is one process with the CPUs and the GPU of the plan, and loads the model and the networks of the reference once. Skips
    units that have a result. ``on_result(unit)`` is called for every unit when its result is on disk. Retries a unit whose
    actor dies up to ``plan.max_retries`` times, on another actor. Raises ValueError if it dies more often; errors of a unit propagate.
    """
    finished = [unit for unit in units if load_result(state_dir, unit) is not None]
    if finished:
        log.info("resuming: %d of %d units are finished", len(finished), len(units))
    for unit in finished:
        on_result(unit)
    waiting = deque(sorted(set(units) - set(finished), key=lambda unit: (-unit.cost, unit.name)))
    if not waiting:
        return
    progress = _Progress(len(units), len(finished), sum(unit.cost for unit in waiting))
    pool = _Pool(work, plan)
    deaths: Counter[str] = Counter()
    try:
        while waiting or pool.computing:
            pool.grow_to(len(waiting) + pool.computing)
            while waiting and pool.idle:
                pool.submit(waiting.popleft())
            done, result = pool.next_result()
            if isinstance(result, Exception):
                name = done.name if done else "a process of the pool"
                deaths[name] += 1
                reason = " ".join(str(result).split())[:300]
                if deaths[name] > plan.max_retries:
                    raise ValueError(f"{name}: its worker died {deaths[name]} times, the last time: {reason}")
                log.warning("retry %d of %d of %s: %s", deaths[name], plan.max_retries, name, reason)
                if done:
                    waiting.append(done)
            elif done is not None and result is not None:
                save_result(result, state_dir, done)
                progress.add(done, result)
                on_result(done)
    finally:
        pool.end()


class _Pool:
    """Actors that compute units. An actor that dies is dropped, and replaced if there is work for it.

    Ray hides every GPU from an actor but its own for the actor's whole life. A task would be put into any idle process, which keeps
    the GPU of its first task.
    """

    def __init__(self, work: Work, plan: TaskPlan) -> None:
        import ray

        self.plan = plan
        self.work = ray.put(work)
        self.actor = ray.remote(_Computer).options(num_cpus=plan.cpus, num_gpus=plan.gpus, max_restarts=0)
        self.idle: list[Any] = []
        self.running: dict[Any, tuple[Any, Unit | None]] = {}
        """The actor and the unit of each call that has not ended; no unit while an actor starts."""

    @property
    def computing(self) -> int:
        """Units that are being computed."""
        return sum(unit is not None for _, unit in self.running.values())

    def grow_to(self, count: int) -> None:
        """Start actors until there is one per unit, or as many as the plan allows."""
        while len(self.idle) + len(self.running) < min(count, self.plan.max_concurrent):
            actor: Any = self.actor.remote()
            self.running[actor.prepare.remote(self.plan.threads)] = actor, None

    def submit(self, unit: Unit) -> None:
        """Let an idle actor compute the unit."""
        actor = self.idle.pop()
        self.running[actor.compute.remote(self.work, unit)] = actor, unit

    def next_result(self) -> tuple[Unit | None, Arrays | Exception | None]:
        """Wait for one call. Return its unit with the arrays, or with the error if the actor died; (None, None) if an actor is ready.

        Errors of the unit itself propagate.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        done = ray.wait(list(self.running), num_returns=1)[0][0]
        actor, unit = self.running.pop(done)
        try:
            arrays: Arrays | None = ray.get(done)
        except RayTaskError:
            raise
        except RayError as error:
            ray.kill(actor)
            return unit, error
        self.idle.append(actor)
        return unit, arrays

    def end(self) -> None:
        """End all actors."""
        import ray

        for actor in [*self.idle, *(actor for actor, _ in self.running.values())]:
            ray.kill(actor)


class _Computer:
    """An actor of the pool: one process on the device that Ray assigned to it."""

    device: torch.device

    def prepare(self, threads: int) -> None:
        self.device = prepare_process(threads)

    def compute(self, work: Work, unit: Unit) -> Arrays:
        try:
            return unit.compute(work, unit, self.device)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"{unit.name} does not fit into GPU memory: set evaluate.gpus_per_task in run.yaml to 1, or use a larger GPU"
            ) from None


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
