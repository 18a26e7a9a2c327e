"""Stage 3: search over schedule, objective, weighting and learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ruamel.yaml import YAML

from diffusion_core.storage import atomic_folder, write_json
from pipelines.cluster import check_resources, check_shared, cluster_nodes, is_uri, ray_session, resolve_precision
from pipelines.data.shards import open_split, read_manifest
from pipelines.identity import identify, open_state
from pipelines.measurement.measure import jackknife_error
from pipelines.measurement.reference import load_reference
from pipelines.params import Params, RunSettings, SearchSpace, flatten
from pipelines.resources import plan_trials
from pipelines.search.driver import run_search
from pipelines.search.halving import rungs, search, winner
from pipelines.search.proposals import Proposals, Space
from pipelines.search.records import Choice, Trial, TrialResult
from pipelines.search.summary import COLUMNS, describe_verdict, search_metrics, trial_rows
from pipelines.search.trial import judge_rung
from pipelines.search.worker import TrialWork
from pipelines.stage import DATA, METRICS, PLOTS, REFERENCE, RUNS, SEARCH, check_writable, log, run_stage
from pipelines.tables import write_csv
from pipelines.tracking import Run, stage_run
from pipelines.training.checkpoint import save_checkpoint
from pipelines.training.loop import TrainSettings
from pipelines.training.settings import SEARCHED, train_settings


def tune(params: Params, run: RunSettings) -> None:
    """Search over schedule, objective, weighting and learning rate with Ray Tune, by a quick FID; write artifacts/search (trials.csv, and best.yaml for train)."""
    check_writable(SEARCH.parent, METRICS, PLOTS, RUNS)
    manifest = read_manifest(DATA)
    if not params.tune.enabled:
        log.info("tune.enabled is false: train uses its own settings")
        _write([], {"overrides": {}}, {"enabled": False, "trials": 0})
        return
    reference = load_reference(REFERENCE, manifest.content_hash)
    inputs = {"data": manifest.content_hash, "extractor": reference.extractor.digest}
    settings = params.tune
    with ray_session(run.ray):
        plan = plan_trials(run.tune, num_trials=settings.num_trials, nodes=cluster_nodes())
        log.info("%s", plan.reason)
        if plan.warning:
            log.warning("%s", plan.warning)
        check_resources(
            1,
            plan.cpus,
            plan.gpus,
            "tune.cpus_per_trial",
            "lower tune.cpus_per_trial or tune.gpus_per_trial in run.yaml",
        )
        precision = resolve_precision(params.train.precision, plan.device_type)
        short = params.train.model_copy(update={"steps": settings.steps})
        base = train_settings(short, params.seed, manifest, precision)
        judging: tuple[Callable[..., Any], ...] = (judge_rung, save_checkpoint, open_split)
        trial = identify("tune", _trial_identity(base, settings.num_samples, settings.ddim_steps), inputs, judging)
        state = open_state(trial, run.resume)
        folders = {"the data set": DATA, "the reference": REFERENCE}
        check_shared(folders if is_uri(run.ray.storage) else {**folders, "ray.storage": state.folder})
        work = TrialWork(
            settings=base,
            data_dir=str(DATA.resolve()),
            reference_dir=str(REFERENCE.resolve()),
            data_hash=manifest.content_hash,
            storage=f"{run.ray.storage.rstrip('/')}/tune/{state.key}" if is_uri(run.ray.storage) else str(state.folder),
            key=state.key,
            num_samples=settings.num_samples,
            ddim_steps=settings.ddim_steps,
            threads=plan.threads,
        )
        used = {
            "seed": params.seed,
            **flatten("tune", settings),
            **flatten("train", params.train),
            "train.precision": precision,
        }
        whole = identify("tune", used, inputs, [*judging, search, winner, Proposals])
        tags = {"rediffuse.data_hash": manifest.content_hash}
        with stage_run(run.tracking, "tune", whole.key, settings=used, tags=tags) as tracked:
            children = _Children(tracked)
            trials = run_search(
                _proposals(settings.space, base),
                work,
                plan,
                num_trials=settings.num_trials,
                rungs=rungs(settings.steps, settings.grace_steps, settings.reduction_factor),
                reduction_factor=settings.reduction_factor,
                on_result=children.log,
            )
            children.finish(trials)
            verdict = winner(trials)
            metrics = search_metrics(trials, verdict)
            best = {
                "overrides": asdict(verdict.winner.choice),
                "trial": verdict.winner.choice.name,
                "tie": [trial.choice.name for trial in verdict.tied] if verdict.tie else [],
            }
            _write(trial_rows(trials), best, metrics)
            tracked.log_metrics({name: value for name, value in metrics.items() if type(value) in (int, float)})
            tracked.log_artifact(SEARCH)
    log.info("best of %d trials: %s", len(trials), describe_verdict(verdict))


class _Children:
    """One MLflow run per trial, nested in the search's run."""

    def __init__(self, parent: Run) -> None:
        self.parent = parent
        self.runs: dict[Choice, Run] = {}

    def log(self, choice: Choice, result: TrialResult) -> None:
        if choice not in self.runs:
            self.runs[choice] = self.parent.child(choice.name, asdict(choice))
        if not result.diverged:
            values = {"fid": result.fid, "fid_error": jackknife_error(result.leave_one_out), "loss": result.loss}
            self.runs[choice].log_metrics(
                {name: value for name, value in values.items() if value is not None}, result.step
            )

    def finish(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            self.runs[trial.choice].finish("FAILED" if trial.result.diverged else "FINISHED")


def _proposals(space: SearchSpace, train: TrainSettings) -> Proposals:
    """Return the proposals of the search; train's own settings come first."""
    low, high = space.learning_rate
    return Proposals(
        Space(tuple(space.schedule), tuple(space.objective), tuple(space.weighting), (low, high)),
        Choice(train.schedule["name"], train.objective, train.weighting, train.learning_rate),
        train.seed + 1,
    )


def _trial_identity(base: TrainSettings, num_samples: int, ddim_steps: int) -> dict[str, Any]:
    """Return the settings on which the result of a trial at a step depends, besides its choice, which names its folder."""
    settings = {name: value for name, value in asdict(base).items() if name not in SEARCHED}
    settings["schedule"] = {name: value for name, value in base.schedule.items() if name != "name"}
    return flatten("", {"train": settings, "tune": {"num_samples": num_samples, "ddim_steps": ddim_steps}})


def _write(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    with atomic_folder(SEARCH) as folder:
        write_csv(folder / "trials.csv", COLUMNS, rows)
        with open(folder / "best.yaml", "w", encoding="utf-8") as file:
            file.write("# written by the tune stage: train applies the overrides on top of params.yaml\n")
            YAML().dump(dict(best), file)
    write_csv(PLOTS / "tune_trials.csv", COLUMNS, rows)
    write_json(METRICS / "tune.json", dict(metrics))


if __name__ == "__main__":
    run_stage("tune", tune)
