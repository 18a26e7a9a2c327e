"""Stage 3: search over schedule, objective, weighting and learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from diffusion_core.storage import atomic_folder, write_json
from pipelines.cluster import check_shared, cluster_nodes, is_uri, place, ray_session, resolve_precision, state_storage
from pipelines.data.shards import open_split, read_manifest
from pipelines.identity import State, identify, open_state
from pipelines.measurement.measure import jackknife_error, measurement_rows
from pipelines.measurement.notice import few_images_notice, marked
from pipelines.measurement.reference import load_reference
from pipelines.params import Params, RunSettings, SearchSpace, Tune, flatten
from pipelines.resources import plan_trials
from pipelines.search.driver import run_search
from pipelines.search.halving import Verdict, rungs, search, winner
from pipelines.search.proposals import Proposals, Space
from pipelines.search.records import Choice, Trial, TrialResult
from pipelines.search.summary import COLUMNS, describe_verdict, search_metrics, trial_rows
from pipelines.search.trial import judge_rung, same_training
from pipelines.search.worker import TrialWork
from pipelines.stage import DATA, METRICS, PLOTS, REFERENCE, RUNS, SEARCH, check_writable, log, run_stage
from pipelines.storages import earlier_storages
from pipelines.tables import write_csv
from pipelines.tracking import Run, stage_run
from pipelines.training.checkpoint import save_checkpoint
from pipelines.training.loop import TrainSettings
from pipelines.training.settings import SEARCHED, shortened, train_settings


def tune(params: Params, run: RunSettings) -> None:
    """Search over schedule, objective, weighting and learning rate with Ray Tune, by a quick FID.

    Writes artifacts/search (trials.csv, and best.yaml for train), metrics/tune.json and plots/tune_trials.csv.
    """
    check_writable(SEARCH.parent, METRICS, PLOTS, RUNS)
    manifest = read_manifest(DATA)
    if not params.tune.enabled:
        log.info("tune.enabled is false: train uses its own settings")
        _write([], {"overrides": {}}, {"enabled": False, "trials": 0})
        return
    reference = load_reference(REFERENCE, manifest.content_hash)
    inputs = {"data": manifest.content_hash, "extractor": reference.extractor.digest}
    settings = params.tune
    counts = {"samples": settings.num_samples, "train images": reference.statistics["train"].n}
    notice = few_images_notice(reference.num_features, counts)
    if notice:
        log.warning("quick %s of %s", reference.metric, notice)
    with ray_session(run.ray):
        plan = plan_trials(run.tune, num_trials=settings.num_trials, nodes=cluster_nodes())
        place(plan)
        precision = resolve_precision(params.train.precision, plan.device_type)
        base = train_settings(shortened(params.train, settings.steps), params.seed, manifest, precision)
        judging: tuple[Callable[..., Any], ...] = (judge_rung, save_checkpoint, open_split)
        trial = identify("tune", trial_identity_settings(base, settings, plan.device_type), inputs, judging)
        state = open_state(trial, run.resume)
        work = _work(base, settings, run.ray.storage, state, manifest.content_hash, plan.threads)
        used = {
            "seed": params.seed,
            **flatten("tune", settings),
            **flatten("train", params.train),
            "train.precision": precision,
        }
        whole = identify("tune", used, inputs, [*judging, search, winner, Proposals])
        tags = {"rediffuse.data_hash": manifest.content_hash}
        with stage_run(run.tracking, "tune", whole.key, settings=used, tags=tags) as tracked:
            children = _Children(tracked, notice)
            trials = run_search(
                _proposals(settings.space, base, seed=params.seed + 1),  # a random stream apart from training's
                work,
                plan,
                num_trials=settings.num_trials,
                rungs=rungs(settings.steps, settings.grace_steps, settings.reduction_factor),
                reduction_factor=settings.reduction_factor,
                on_result=children.log,
                mark=marked(notice),
            )
            children.finish(trials)
            verdict = winner(trials)
            metrics = {**search_metrics(trials, verdict), "few_images": notice is not None}
            _write(
                trial_rows(trials, few_images=notice is not None),
                _best(verdict, state.changed_modules, notice),
                metrics,
            )
            tracked.log_metrics({name: value for name, value in metrics.items() if type(value) in (int, float)})
            tracked.set_tags({"few_images": notice} if notice else {})
            tracked.log_artifact(SEARCH)
    log.info("best of %d trials%s: %s", len(trials), marked(notice), describe_verdict(verdict))


def trial_identity_settings(base: TrainSettings, settings: Tune, device_type: str) -> dict[str, Any]:
    """Return the settings that decide a trial's result at a step, without its choice, which names its folder."""
    shared = {name: value for name, value in asdict(base).items() if name not in SEARCHED}
    shared["schedule"] = {name: value for name, value in base.schedule.items() if name != "name"}
    measured = {
        "num_samples": settings.num_samples,
        "ddim_steps": settings.ddim_steps,
        "rows_per_call": measurement_rows(device_type),
        "device_type": device_type,
    }
    return flatten("", {"train": shared, "tune": measured})


def _work(base: TrainSettings, settings: Tune, storage: str, state: State, data_hash: str, threads: int) -> TrialWork:
    """Return the settings that all trials share. Raises ValueError if a node does not see the data, the reference or the storage."""
    storage = state_storage(storage, "tune", state)
    folders = {"the data set": DATA, "the reference": REFERENCE}
    check_shared(folders if is_uri(storage) else {**folders, "ray.storage": Path(storage)})
    return TrialWork(
        settings=base,
        data_dir=str(DATA.resolve()),
        reference_dir=str(REFERENCE.resolve()),
        data_hash=data_hash,
        storage=storage,
        earlier=earlier_storages(state, storage),
        key=state.key,
        num_samples=settings.num_samples,
        ddim_steps=settings.ddim_steps,
        threads=threads,
    )


class _Children:
    """One MLflow run per trial, nested in the search's run. ``notice`` becomes a tag of each: see `few_images_notice`."""

    def __init__(self, parent: Run, notice: str | None) -> None:
        self.parent, self.notice = parent, notice
        self.runs: dict[Choice, Run] = {}

    def log(self, choice: Choice, result: TrialResult) -> None:
        if choice not in self.runs:
            self.runs[choice] = self.parent.child(choice.name, asdict(choice))
            self.runs[choice].set_tags({"few_images": self.notice} if self.notice else {})
        if result.diverged:
            self.runs[choice].set_tags({"diverged": f"before step {result.step}: {result.reason}"[:4000]})
        else:
            values = {"fid": result.fid, "fid_error": jackknife_error(result.leave_one_out), "loss": result.loss}
            self.runs[choice].log_metrics(
                {name: value for name, value in values.items() if value is not None}, result.step
            )

    def finish(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            self.runs[trial.choice].finish("FAILED" if trial.result.diverged else "FINISHED")


def _proposals(space: SearchSpace, first: TrainSettings, seed: int) -> Proposals:
    """Return the proposals of the search; train's own settings come first."""
    low, high = space.learning_rate
    return Proposals(
        Space(tuple(space.schedule), tuple(space.objective), tuple(space.weighting), (low, high)),
        Choice(first.schedule["name"], first.objective, first.weighting, first.learning_rate),
        seed,
        same_training=partial(same_training, first),
    )


def _best(verdict: Verdict, changed_modules: Sequence[str], notice: str | None = None) -> dict[str, Any]:
    """Return the content of best.yaml. A search of a forced resume names the modules that had changed."""
    best = {
        "overrides": asdict(verdict.winner.choice),
        "trial": verdict.winner.choice.name,
        "tie": [trial.choice.name for trial in verdict.tied] if verdict.tie else [],
        **({"few_images": notice} if notice else {}),
    }
    return {**best, "resumed_across_changes": list(changed_modules)} if changed_modules else best


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
