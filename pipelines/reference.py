"""Stage 2: the class network, the feature extractor, and the features of the real images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_core.metrics.extractors import INCEPTION, build_inception, import_inception_weights
from diffusion_core.storage import atomic_folder, file_sha256, read_json, write_json
from pipelines.cluster import check_shared, cluster_nodes, joins_cluster, place, ray_session
from pipelines.data.shards import Manifest, open_split, read_manifest
from pipelines.devices import deterministic, driver_device
from pipelines.identity import identify, open_state
from pipelines.measurement.distributed_reference import plan_reference, step_recorder, write_reference_on_ray
from pipelines.measurement.notice import few_images_notice, marked
from pipelines.measurement.reference import DESCRIPTION, STATISTICS, load_statistics
from pipelines.measurement.reference_writer import write_reference
from pipelines.params import Params, RunSettings, flatten
from pipelines.params.schema import Reference
from pipelines.stage import DATA, METRICS, PLOTS, REFERENCE, RUNS, check_writable, log, run_stage
from pipelines.tables import write_csv
from pipelines.tracking import Run, stage_run
from pipelines.workspace import resolve_root

FINISHED, FILES, RECORD = "finished", "reference", "record.json"
"""Inside the state folder: the finished result, its copy of artifacts/reference, and its losses, device and file digests."""


def reference(params: Params, run: RunSettings) -> None:
    """Train the class network, take the feature extractor, and compute the features of the real images.

    Writes artifacts/reference: both networks, the statistics of the train images, the features of the test images, and the FID
    between the two. Copies a finished result of the same settings, data and code, because on a GPU the class network, and with it
    every later figure, differs in its last bits from run to run.
    """
    settings = params.reference
    check_writable(REFERENCE.parent, METRICS, PLOTS, RUNS)
    manifest = read_manifest(DATA)
    for split in ("train", "test"):  # damaged data ends the stage, also if a finished state is found
        open_split(DATA, split)
    used = {"seed": params.seed, **flatten("reference", settings)}
    identity = identify("reference", used, {"data": manifest.content_hash}, [write_reference])
    state = open_state(identity, run.resume)
    finished = state.folder / FINISHED
    record = _read_record(finished)
    inception = None
    if record is None and settings.extractor == INCEPTION:  # before the long work: a wrong file fails at once
        inception = _read_inception(settings.inception_weights, settings.inception_sha256)
    tags = {"rediffuse.data_hash": manifest.content_hash}
    with stage_run(run.tracking, "reference", identity.key, settings=used, tags=tags) as tracked:
        if record is None:
            record = _compute(finished, settings, manifest, inception, seed=params.seed, run=run)
        else:
            log.info("finished state found: %s", finished)
        description = _copy_result(finished / FILES, state.changed_modules)
        _write_outputs(description, record["losses"], tracked)
    log.info(
        "class network trained on %s: it predicts the label of %.1f%% of the test images; fid_%s of the %d test images: %.4f%s",
        record["device_type"],
        100 * description["classifier_test_accuracy"],
        description["extractor"],
        description["counts"]["test"],
        description["test_fid"],
        marked(description["few_images"]),
    )
    if description["few_images"]:
        log.warning("fid_%s of %s", description["extractor"], description["few_images"])


def _read_inception(weights: str | None, sha256: str | None) -> dict[str, Tensor]:
    """Return the weights of Inception. Raises ValueError, naming the params, if they are not available or do not fit."""
    try:
        inception = import_inception_weights(resolve_root(weights) if weights else None, sha256)
    except ValueError as error:
        raise ValueError(
            f"{error}; see reference.inception_weights and reference.inception_sha256 in params.yaml"
        ) from None
    build_inception(inception)
    return inception


def _compute(
    finished: Path,
    settings: Reference,
    manifest: Manifest,
    inception: Mapping[str, Tensor] | None,
    *,
    seed: int,
    run: RunSettings,
) -> dict[str, Any]:
    """Compute the reference into the folder ``finished``, and return its record.

    A Ray task computes if there is a cluster to join, else this process.
    """
    options: dict[str, Any] = {
        "manifest": manifest,
        "extractor_name": settings.extractor,
        "inception": inception,
        "steps": settings.classifier_steps,
        "batch_size": settings.classifier_batch_size,
        "seed": seed,
    }
    with atomic_folder(finished) as folder:
        (folder / FILES).mkdir()
        if joins_cluster(run.ray):
            with ray_session(run.ray):
                plan = plan_reference(run.reference.device, cluster_nodes())
                place(plan)
                check_shared({"the data set": DATA})
                losses, device_type = write_reference_on_ray(folder / FILES, DATA, plan, **options)
        else:
            device = driver_device(run.reference.device)
            losses, device_type = [], device.type
            with deterministic():
                write_reference(
                    folder / FILES,
                    splits={split: open_split(DATA, split) for split in ("train", "test")},
                    device=device,
                    on_step=step_recorder(losses, settings.classifier_steps, log.info),
                    **options,
                )
        record = {
            "device_type": device_type,
            "losses": losses,
            "files": {path.name: file_sha256(path) for path in sorted((folder / FILES).iterdir())},
        }
        write_json(folder / RECORD, record)
    return record


def _read_record(finished: Path) -> dict[str, Any] | None:
    """Return the record of a finished result, or None if there is none or it is damaged."""
    if not finished.exists():
        return None
    try:
        record = read_json(finished / RECORD)
        damaged = [name for name, digest in record["files"].items() if file_sha256(finished / FILES / name) != digest]
    except (ValueError, OSError) as error:
        log.warning("the finished state is damaged (%s): computing it again", error)
        return None
    if damaged:
        log.warning("the finished state %s is damaged in %s: computing it again", finished, ", ".join(damaged))
        return None
    return record


def _copy_result(source: Path, changed_modules: Sequence[str]) -> dict[str, Any]:
    """Write artifacts/reference and return reference.json.

    It names the modules that changed since a state continued by force, and holds the notice of the test images' FID, or null.
    """
    with atomic_folder(REFERENCE) as folder:
        for path in source.iterdir():
            shutil.copyfile(path, folder / path.name)
        description = read_json(folder / DESCRIPTION)
        if changed_modules:
            description["continued_across_changes"] = list(changed_modules)
        num_features = len(load_statistics(folder / STATISTICS)["train"].mean)
        counts = {f"{split} images": description["counts"][split] for split in ("test", "train")}
        description["few_images"] = few_images_notice(num_features, counts)
        write_json(folder / DESCRIPTION, description)
    return description


def _write_outputs(description: Mapping[str, Any], losses: Sequence[tuple[int, float]], tracked: Run) -> None:
    """Write the metrics and the plot, and log them to MLflow."""
    metrics = {
        "classifier_test_accuracy": round(description["classifier_test_accuracy"], 6),
        f"test_fid_{description['extractor']}": round(description["test_fid"], 6),
        "test_images": description["counts"]["test"],
        "few_images": description["few_images"] is not None,
    }
    write_json(METRICS / "reference.json", metrics)
    rows = [{"step": step, "loss": f"{loss:.6g}"} for step, loss in losses]
    write_csv(PLOTS / "reference_classifier.csv", ["step", "loss"], rows)
    tracked.log_metrics(metrics)
    tracked.set_tags({"few_images": description["few_images"]} if description["few_images"] else {})
    tracked.log_rows([{"step": step, "classifier/loss": loss} for step, loss in losses])
    tracked.log_artifact(REFERENCE / DESCRIPTION)


if __name__ == "__main__":
    run_stage("reference", reference)
