"""The search on Ray Tune: ASHA stops what falls behind, Optuna proposes what comes next."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.cluster import is_uri
from pipelines.params import Params
from pipelines.search.trial import FAILED_FID, TrialWork, run_trial, trial_key
from pipelines.stage import log
from pipelines.tracking import Run
from pipelines.training.settings import SEARCHED

EXPERIMENT = "search"


def run_search(params: Params, work: TrialWork, state_dir: Path, run: Run) -> list[dict[str, Any]]:
    """All trials' results: a row each with its settings, the last ``step`` and the ``fid`` there. Finished trials are not run again.

    Raises ValueError where no trial gave a usable model.
    """
    import optuna
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    settings = params.tune
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = (
        f"{params.ray.storage.rstrip('/')}/tune/{state_dir.name}" if is_uri(params.ray.storage) else str(state_dir)
    )
    resources = {"cpu": float(settings.cpus_per_trial)}
    if settings.gpus_per_trial:
        resources["gpu"] = float(settings.gpus_per_trial)
    trainable = tune.with_resources(partial(run_trial, work=work), resources)
    path = f"{storage}/{EXPERIMENT}"
    tuner = None
    if tune.Tuner.can_restore(path):
        try:
            tuner = tune.Tuner.restore(path, trainable=trainable, resume_unfinished=True, resume_errored=True)
            log.info("going on with the search in %s", state_dir)
        except Exception as error:
            log.warning("the search's state is torn (%s): it starts again", " ".join(str(error).split())[:200])
    if tuner is None:
        space = settings.space
        low, high = space.learning_rate
        low, high = float(low), float(high)
        tuner = tune.Tuner(
            trainable,
            param_space={
                "schedule": tune.choice(list(space.schedule)),
                "objective": tune.choice(list(space.objective)),
                "weighting": tune.choice(list(space.weighting)),
                "learning_rate": tune.loguniform(low, high) if low < high else tune.choice([low]),
            },
            tune_config=tune.TuneConfig(
                metric="fid",
                mode="min",
                num_samples=settings.num_trials,
                max_concurrent_trials=settings.max_concurrent,
                search_alg=OptunaSearch(
                    points_to_evaluate=_first_points(params), sampler=optuna.samplers.TPESampler(seed=params.seed + 1)
                ),
                scheduler=ASHAScheduler(
                    time_attr="step",
                    max_t=settings.steps,
                    grace_period=settings.grace_steps,
                    reduction_factor=settings.reduction_factor,
                ),
            ),
            run_config=tune.RunConfig(
                name=EXPERIMENT,
                storage_path=storage,
                verbose=0,
                callbacks=[trial_logger(params, run)],
                failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            ),
        )
    grid = tuner.fit()
    results = [grid[index] for index in range(len(grid))]
    rows = []
    for result in results:
        if result.metrics is None or "fid" not in result.metrics:
            log.warning("a trial gave no result: %s", " ".join(str(result.error).split())[-300:])
            continue
        config = result.config or {}
        chosen = {name: config[name] for name in SEARCHED}
        rows.append(
            {
                "trial": trial_name(config),
                **chosen,
                "step": result.metrics["step"],
                "fid": result.metrics["fid"],
            }
        )
    if not any(row["fid"] < FAILED_FID for row in rows):
        first = " ".join(str(next((r.error for r in results if r.error), "every trial's loss diverged")).split())
        raise ValueError(
            f"no trial of the search gave a usable model ({first[-300:]}): narrow tune.space, its learning_rate above all"
        )
    return sorted(rows, key=lambda row: (-row["step"], row["fid"], row["trial"]))


def trial_name(config: dict[str, Any]) -> str:
    """What a trial is called in trials.csv and in MLflow: made from its settings, so the same in every run of the search."""
    return f"trial-{hashlib.sha256(trial_key(config).encode()).hexdigest()[:8]}"


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best FID among the trials that went furthest: those stopped early were judged at fewer steps."""
    furthest = max(row["step"] for row in rows if row["fid"] < FAILED_FID)
    return min((row for row in rows if row["step"] == furthest), key=lambda row: row["fid"])


def trial_logger(params: Params, run: Run) -> Any:
    """A Tune callback that logs each trial as a child run, named by its settings: a trial that a kill cut off and that the
    restored search starts again, under another id, goes on with its run."""
    from ray import tune

    from pipelines.tracking import connect

    class TrialLogger(tune.Callback):
        """Pickled with the search's state: it holds names, and connects when it is used."""

        def __init__(self) -> None:
            self.run: Run | None = None
            self.where = (run.experiment_id, run.run_id, dict(run.tags))
            self.children: dict[str, Run] = {}
            self.total = params.tune.num_trials
            self.tracking = params.tracking

        def __getstate__(self) -> Mapping[str, Any]:
            return {**self.__dict__, "run": None, "children": {}}

        def _child(self, trial: Any, trials: list[Any]) -> Run:
            if self.run is None:
                experiment_id, run_id, tags = self.where
                self.run = Run(connect(self.tracking), experiment_id, run_id, tags)
            if trial.trial_id not in self.children:
                alike = [other.trial_id for other in trials if other.config == trial.config]
                name = trial_name(trial.config)
                if len(alike) > 1:
                    name += f"-{alike.index(trial.trial_id)}"
                self.children[trial.trial_id] = self.run.child(name, trial.config)
            return self.children[trial.trial_id]

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            values: dict[str, float] = {
                name: result[name] for name in ("fid", "loss") if name in result and math.isfinite(result[name])
            }
            self._child(trial, trials).log_metrics(values, step=result["step"])
            text = ", ".join(f"{name} {_short(trial.config[name])}" for name in SEARCHED)
            done = sum(other.status == "TERMINATED" for other in trials)
            log.info(
                "%s (%s): FID %.3f at step %d; %d of %d trials done",
                trial_name(trial.config),
                text,
                result["fid"],
                result["step"],
                done,
                self.total,
            )

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._child(trial, trials).finish()

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._child(trial, trials).finish("FAILED")

    return TrialLogger()


def _first_points(params: Params) -> list[dict[str, Any]]:
    """Train's own settings, where they lie in the space: the search then never does worse than they."""
    train, space = params.train, params.tune.space
    point: dict[str, Any] = {
        "schedule": train.diffusion.schedule,
        "objective": train.diffusion.objective,
        "weighting": train.diffusion.weighting,
        "learning_rate": float(train.learning_rate),
    }
    low, high = space.learning_rate
    inside = low <= point["learning_rate"] <= high and all(point[name] in getattr(space, name) for name in SEARCHED[:3])
    return [point] if inside else []


def _short(value: Any) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)
