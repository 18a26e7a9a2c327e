"""The sweep: units of work as Ray tasks, finished ones kept, statistics merged in shard order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_core.generation import SamplerSettings
from diffusion_core.metrics.frechet import frechet_distance
from diffusion_core.metrics.statistics import GaussianStatistics, merge_statistics
from pipelines.evaluation.units import Unit, UnitResult, Work, evaluate_unit, load_result, save_result
from pipelines.params import Evaluate
from pipelines.stage import log

GRID_FIRST = 1 << 30
"""Grid samples have numbers of their own, far from the measured ones; they are the same at every setting."""
GRID_COLUMNS = 12


@dataclass(frozen=True)
class Row:
    """One setting's result. ``images_per_s`` is the sampling speed of one worker."""

    settings: SamplerSettings
    num_samples: int
    fid: float
    class_agreement: float
    images_per_s: float
    grid: np.ndarray


def sweep_settings(evaluate: Evaluate) -> list[SamplerSettings]:
    """Every eta with every number of steps."""
    return [
        SamplerSettings(steps=steps, eta=eta, guidance_scale=evaluate.guidance_scale, spacing=evaluate.spacing)
        for eta, steps in product(evaluate.etas, evaluate.steps)
    ]


def sample_labels(class_counts: Sequence[int], num_samples: int, seed: int) -> np.ndarray:
    """(num_samples,) int64: as many of each class as its share of the real images, to within one, in a shuffled order."""
    counts = np.asarray(class_counts, dtype=np.float64)
    quota = counts / counts.sum() * num_samples
    whole = np.floor(quota).astype(np.int64)
    for label in np.argsort(-(quota - whole), kind="stable")[: num_samples - int(whole.sum())]:
        whole[label] += 1
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), whole))


def run_sweep(
    evaluate: Evaluate,
    work: Work,
    settings: Sequence[SamplerSettings],
    class_counts: Sequence[int],
    real: GaussianStatistics,
    state_dir: Path,
    on_row: Callable[[int, Row], None] = lambda number, row: None,
) -> list[Row]:
    """Evaluate every setting on Ray; units that ``state_dir`` holds already are not done again.

    ``on_row(number, row)`` is called as soon as all shards of a setting are there. A unit whose worker dies is tried again.
    """
    import ray

    labels = sample_labels(class_counts, evaluate.num_samples, work.seed)
    grid_labels = np.tile(np.arange(min(len(class_counts), GRID_COLUMNS)), evaluate.grid_rows)
    units = [
        unit
        for number in range(len(settings))
        for unit in _units(number, evaluate.num_samples, evaluate.shard_size, len(grid_labels))
    ]
    results = {
        unit: found for unit in units if (found := load_result(state_dir / f"{unit.name}.safetensors")) is not None
    }
    if results:
        log.info("%d of %d units are done already", len(results), len(units))
    rows: dict[int, Row] = {}

    def finish(number: int) -> None:
        own = [unit for unit in units if unit.setting == number]
        if number not in rows and all(unit in results for unit in own):
            rows[number] = _row(settings[number], [results[unit] for unit in own], real)
            on_row(number, rows[number])

    for number in range(len(settings)):
        finish(number)
    task = ray.remote(evaluate_unit).options(
        num_cpus=evaluate.cpus_per_task, num_gpus=evaluate.gpus_per_task, max_retries=evaluate.max_retries
    )
    waiting = [unit for unit in units if unit not in results]
    waiting.sort(key=lambda unit: settings[unit.setting].steps * unit.count, reverse=True)
    cost = {unit: settings[unit.setting].steps * unit.count for unit in waiting}
    shared = ray.put(work)
    pending: dict[Any, Unit] = {
        task.remote(
            shared,
            unit,
            settings[unit.setting],
            grid_labels if unit.grid else labels[unit.first : unit.first + unit.count],
        ): unit
        for unit in waiting
    }
    started, total, done, said = time.monotonic(), sum(cost.values()), 0, 0.0
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1)
        unit = pending.pop(ready[0])
        results[unit] = ray.get(ready[0])
        save_result(results[unit], state_dir / f"{unit.name}.safetensors")
        done += cost[unit]
        elapsed = time.monotonic() - started
        if elapsed - said >= 10.0 or not pending:
            said = elapsed
            minutes, seconds = divmod(int(elapsed * (total - done) / done), 60)
            log.info(
                "%d/%d units  %.0f network calls/s  ETA %d:%02d",
                len(results),
                len(units),
                done / elapsed,
                minutes,
                seconds,
            )
        finish(unit.setting)
    return [rows[number] for number in range(len(settings))]


def pareto_front(rows: Sequence[Row]) -> list[bool]:
    """Whether no other row is at least as good in FID and speed, and better in one."""
    return [
        not any(
            other.fid <= row.fid
            and other.images_per_s >= row.images_per_s
            and (other.fid < row.fid or other.images_per_s > row.images_per_s)
            for other in rows
        )
        for row in rows
    ]


def _units(number: int, num_samples: int, shard_size: int, grid_size: int) -> list[Unit]:
    shards = [
        Unit(number, shard, first, min(shard_size, num_samples - first))
        for shard, first in enumerate(range(0, num_samples, shard_size))
    ]
    return [*shards, Unit(number, 0, GRID_FIRST, grid_size, grid=True)]


def _row(settings: SamplerSettings, results: Sequence[UnitResult], real: GaussianStatistics) -> Row:
    shards = [result for result in results if result.statistics is not None]
    merged = merge_statistics(result.statistics for result in shards if result.statistics is not None)
    grid = next(result.images for result in results if result.images is not None)
    return Row(
        settings=settings,
        num_samples=merged.n,
        fid=frechet_distance(merged, real),
        class_agreement=sum(result.agreeing for result in shards) / merged.n,
        images_per_s=merged.n / max(sum(result.seconds for result in shards), 1e-9),
        grid=grid,
    )
