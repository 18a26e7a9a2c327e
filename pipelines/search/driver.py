"""The driver of the search: runs each rung of trials on Ray Tune, and reads the results from the trials' folders."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from pyarrow import fs

from pipelines.cluster import is_uri
from pipelines.durations import minutes_and_seconds
from pipelines.measurement.measure import jackknife_error
from pipelines.resources import TaskPlan
from pipelines.search.halving import Proposer, search
from pipelines.search.records import Choice, Trial, TrialResult
from pipelines.search.worker import TrialWork, run_rung, stored_result
from pipelines.stage import describe_error, log

TUNE_RUN = "tune"
"""The folder of Ray Tune's own files, beside the trials; removed after each rung."""


def run_search(
    proposer: Proposer,
    work: TrialWork,
    plan: TaskPlan,
    *,
    num_trials: int,
    rungs: Sequence[int],
    reduction_factor: int,
    on_result: Callable[[Choice, TrialResult], None],
    trainable: Callable[..., None] = run_rung,
    mark: str = "",
) -> list[Trial]:
    """Search with Ray Tune and return all trials. Skips rungs that already have a result.

    ``trainable(config, work)`` judges one trial at one rung, see `run_rung`. ``on_result`` is called once per result, in this
    process, as soon as the result exists. ``mark`` follows each quick FID in the log. Raises ValueError if a trial fails more than
    ``plan.max_retries`` times, or all trials diverge.
    """
    judge = _Judge(work, plan, trainable, on_result, _Progress(num_trials, rungs, reduction_factor, mark))
    trials = search(proposer, judge, num_trials=num_trials, rungs=rungs, reduction_factor=reduction_factor)
    if all(trial.result.diverged for trial in trials):
        first = trials[0]
        raise ValueError(
            f"every trial of the search diverged ({len(trials)} of {len(trials)}; {first.choice.name}: {first.result.reason}): "
            "narrow tune.space, first its learning_rate"
        )
    return trials


class _Judge:
    """Judges choices at a rung with one run of Ray Tune."""

    def __init__(
        self,
        work: TrialWork,
        plan: TaskPlan,
        trainable: Callable[..., None],
        on_result: Callable[[Choice, TrialResult], None],
        progress: _Progress,
    ) -> None:
        self.work, self.plan, self.trainable, self.on_result, self.progress = work, plan, trainable, on_result, progress

    def __call__(self, choices: Sequence[Choice], step: int) -> list[TrialResult]:
        results = {choice: result for choice in choices if (result := self._stored(choice, step)) is not None}
        self.progress.begin(step, len(choices), len(results))
        if results:
            log.info(
                "resuming the search: %d of %d trials already have a result at step %d",
                len(results),
                len(choices),
                step,
            )
        for choice, result in results.items():
            self.on_result(choice, result)

        def arrived(choice: Choice) -> None:
            result = self._stored(choice, step)
            if result is not None and choice not in results:
                results[choice] = result
                log.info("%s: %s", choice, self.progress.add(result))
                self.on_result(choice, result)

        missing = [choice for choice in choices if choice not in results]
        if missing:
            error = self._run_tune(missing, step, arrived)
            for choice in missing:
                arrived(choice)
            if len(results) < len(choices):
                failed = next(choice for choice in choices if choice not in results)
                raise ValueError(
                    f"{failed} failed at step {step} after {self.plan.max_retries} retries "
                    f"({describe_error(error)[-300:] if error else 'it left no result'}); run the stage again to resume"
                ) from error
        return [results[choice] for choice in choices]

    def _stored(self, choice: Choice, step: int) -> TrialResult | None:
        return stored_result(self.work, choice, step)

    def _run_tune(
        self, choices: Sequence[Choice], step: int, on_complete: Callable[[Choice], None]
    ) -> BaseException | None:
        """Run one trial of Ray Tune per choice, up to ``step``. Return the error of a trial that failed after its retries, or None."""
        from ray import tune

        resources = {"cpu": self.plan.cpus}
        if self.plan.gpus:
            resources["gpu"] = self.plan.gpus
        self._remove_tune_files()
        tuner = tune.Tuner(
            tune.with_resources(partial(self.trainable, work=self.work), resources),
            param_space={"choice": tune.grid_search([asdict(choice) for choice in choices]), "rung": step},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=self.plan.max_concurrent,
                reuse_actors=True,
                trial_name_creator=_name_of,
                trial_dirname_creator=_name_of,
            ),
            run_config=tune.RunConfig(
                name=TUNE_RUN,
                storage_path=self.work.storage,
                verbose=0,
                callbacks=[_callback(on_complete)],
                failure_config=tune.FailureConfig(max_failures=self.plan.max_retries),
            ),
        )
        grid = tuner.fit()
        self._remove_tune_files()
        return next(iter(grid.errors), None)

    def _remove_tune_files(self) -> None:
        path = f"{self.work.storage.rstrip('/')}/{TUNE_RUN}"
        filesystem, path = fs.FileSystem.from_uri(path) if is_uri(path) else (fs.LocalFileSystem(), path)
        if filesystem.get_file_info(path).type == fs.FileType.Directory:
            with contextlib.suppress(OSError):  # a worker of a killed search may still write there
                filesystem.delete_dir(path)


class _Progress:
    """Counts judged trials for the log lines. The time left is estimated from the training steps left."""

    def __init__(self, num_trials: int, rungs: Sequence[int], reduction_factor: int, mark: str = "") -> None:
        self.mark = mark
        self.planned: dict[int, int] = {}
        self.added_steps: dict[int, int] = {}
        count, before = num_trials, 0
        for rung in rungs:
            self.planned[rung], self.added_steps[rung] = count, rung - before
            count, before = math.ceil(count / reduction_factor), rung
        self.judged = dict.fromkeys(rungs, 0)
        self.steps_left = sum(self.planned[rung] * self.added_steps[rung] for rung in rungs)
        self.steps_done = 0
        self.started = time.monotonic()

    def begin(self, step: int, count: int, stored: int) -> None:
        """Count the results that an earlier run stored.

        After the first rung, divergence or a small space may have left fewer trials than planned.
        """
        first = min(self.planned)
        if step != first:
            for rung, planned in ((first, self.judged[first]), (step, count)):
                self.steps_left += (planned - self.planned[rung]) * self.added_steps[rung]
                self.planned[rung] = planned
        self.judged[step] += stored
        self.steps_left -= stored * self.added_steps[step]

    def add(self, result: TrialResult) -> str:
        """Count a new result and return its text."""
        step = result.step
        self.judged[step] += 1
        self.steps_left -= self.added_steps[step]
        self.steps_done += self.added_steps[step]
        seconds = (time.monotonic() - self.started) / self.steps_done * max(self.steps_left, 0)
        if result.diverged:
            text = f"diverged before step {step} ({result.reason})"
        else:
            text = f"FID {result.fid:.3f} +- {jackknife_error(result.leave_one_out):.3f}{self.mark} at step {step}"
        remaining = minutes_and_seconds(seconds)
        return f"{text}; {self.judged[step]} of {self.planned[step]} judged at this rung  ETA {remaining}"


def _name_of(trial: Any) -> str:
    return Choice(**trial.config["choice"]).name


def _callback(on_complete: Callable[[Choice], None]) -> Any:
    from ray import tune

    class RungCallback(tune.Callback):
        """Callback for one rung. Pickles as a plain callback, because Ray Tune's saved state is never restored."""

        def __reduce__(self) -> tuple[Any, ...]:
            return tune.Callback, ()

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            on_complete(Choice(**trial.config["choice"]))

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            error = trial.get_error()
            log.warning(
                "%s failed (%s): retrying",
                _name_of(trial),
                describe_error(error)[-300:] if error else "no reason given",
            )

    return RungCallback()
