"""Stage 3: search over schedule, objective, weighting and learning rate."""

from __future__ import annotations

import csv
import io
from typing import Any

from ruamel.yaml import YAML

from diffusion_core.storage import atomic_folder, write_json, write_text
from pipelines.cluster import check_resources, check_shared, is_uri, ray_session
from pipelines.data.shards import read_manifest
from pipelines.evaluation.reference import load_reference
from pipelines.params import Params
from pipelines.search.driver import best_row, run_search
from pipelines.search.trial import TrialWork, rungs, share
from pipelines.stage import DATA, METRICS, PLOTS, REFERENCE, RUNS, SEARCH, check_writable, log, run_stage
from pipelines.state import fingerprint, state_folder
from pipelines.tracking import stage_run
from pipelines.training.settings import SEARCHED, train_settings

COLUMNS = ("trial", *SEARCHED, "step", "fid")


def tune(params: Params) -> None:
    """Search over schedule, objective, weighting and learning rate with Ray Tune, by a quick FID, and write artifacts/search: trials.csv and best.yaml for train."""
    check_writable(SEARCH.parent, METRICS, PLOTS, RUNS)
    manifest = read_manifest(DATA)
    if not params.tune.enabled:
        log.info("tune.enabled is false: train uses its own settings")
        _write([], {})
        return
    reference = load_reference(REFERENCE, manifest.content_hash)
    key = fingerprint("tune", params, {"data": manifest.content_hash, "extractor": reference.extractor.digest})
    state_dir = state_folder("tune", key)
    settings = params.tune
    work = TrialWork(
        settings=share(train_settings(params, manifest, {"steps": settings.steps})),
        data_dir=str(DATA.resolve()),
        reference_dir=str(REFERENCE.resolve()),
        data_hash=manifest.content_hash,
        rungs=rungs(settings.steps, settings.grace_steps, settings.reduction_factor),
        num_samples=settings.num_samples,
        ddim_steps=settings.ddim_steps,
        threads=max(int(settings.cpus_per_trial), 1),
    )
    with ray_session(params.ray), stage_run(params, "tune", key, manifest.content_hash) as run:
        check_resources(
            1,
            settings.cpus_per_trial,
            settings.gpus_per_trial,
            "tune.cpus_per_trial",
            "lower tune.cpus_per_trial or tune.gpus_per_trial",
        )
        folders = {"the data set": DATA, "the reference": REFERENCE}
        check_shared(folders if is_uri(params.ray.storage) else {**folders, "ray.storage": state_dir})
        rows = run_search(params, work, state_dir, run)
        best = best_row(rows)
        overrides = {name: best[name] for name in SEARCHED}
        overrides["learning_rate"] = float(f"{overrides['learning_rate']:.4g}")
        _write(rows, overrides, best)
        run.log_metrics({"best_quick_fid": round(best["fid"], 6), "trials": len(rows)})
        run.log_artifact(SEARCH)
    log.info(
        "best of %d trials: quick FID %.3f with %s",
        len(rows),
        best["fid"],
        ", ".join(f"{k} {v}" for k, v in overrides.items()),
    )


def _write(rows: list[dict[str, Any]], overrides: dict[str, Any], best: dict[str, Any] | None = None) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "learning_rate": f"{row['learning_rate']:.4g}", "fid": f"{row['fid']:.6g}"})
    with atomic_folder(SEARCH) as folder:
        write_text(folder / "trials.csv", text.getvalue())
        with open(folder / "best.yaml", "w", encoding="utf-8") as file:
            file.write("# written by the tune stage: what train applies on top of params.yaml\n")
            YAML().dump({"overrides": overrides}, file)
    write_text(PLOTS / "tune_trials.csv", text.getvalue())
    metrics: dict[str, Any] = {"enabled": best is not None, "trials": len(rows)}
    if best is not None:
        metrics |= {"best_quick_fid": round(best["fid"], 6), **overrides}
    write_json(METRICS / "tune.json", metrics)


if __name__ == "__main__":
    run_stage("tune", tune)
