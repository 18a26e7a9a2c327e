"""Stage 7: one self-contained HTML page."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from diffusion_core.storage import atomic_folder, file_sha256, read_json, write_text
from pipelines.data.shards import ImageSplit, open_split, read_manifest
from pipelines.identity import identify
from pipelines.params import Params, RunSettings, flatten, read_yaml
from pipelines.pictures import labels_by_column, picture_of, png
from pipelines.reporting.page import Results, render
from pipelines.stage import (
    DATA,
    EVALUATION,
    MODEL,
    PLOTS,
    REFERENCE,
    REGISTRATION,
    REPORT,
    SEARCH,
    check_writable,
    log,
    run_stage,
)
from pipelines.tables import read_csv
from pipelines.tracking import stage_run


def report(params: Params, run: RunSettings) -> None:
    """Write the report as one self-contained HTML page.

    Writes artifacts/report/index.html: what was run, losses, trials, the FID table, samples, a denoising trajectory and the verdict.
    """
    check_writable(REPORT.parent)
    results = read_results()
    # file names may contain bytes that are not UTF-8
    html = render(params.report.title, results).encode("utf-8", "backslashreplace").decode()
    with atomic_folder(REPORT) as folder:
        write_text(folder / "index.html", html)
    settings = flatten("report", params.report)
    inputs = {
        "model": results.quality["model_digest"],
        "registration": file_sha256(REGISTRATION),
    }
    key = identify("report", settings, inputs, [render]).key
    tags = {"rediffuse.data_hash": results.manifest.content_hash}
    with stage_run(run.tracking, "report", key, settings=settings, tags=tags) as tracked:
        tracked.log_artifact(REPORT / "index.html")
    log.info("%s: %.1f MB", REPORT / "index.html", len(html) / 1e6)


def read_results() -> Results:
    """Read what the earlier stages wrote. Raises ValueError that names a file that is missing."""
    manifest = read_manifest(DATA)
    sweep = read_csv(EVALUATION / "sweep.csv")
    pictures = [(row["eta"], row["steps"], EVALUATION / "samples" / f"{row['setting']}.png") for row in sweep]
    return Results(
        manifest=manifest,
        reference=read_json(REFERENCE / "reference.json"),
        chosen=read_yaml(SEARCH / "best.yaml"),
        trials=read_csv(SEARCH / "trials.csv"),
        losses=read_csv(PLOTS / "train_loss.csv"),
        model=read_json(MODEL / "model.json"),
        parameters=_count_parameters(MODEL / "model.safetensors"),
        quality=read_json(EVALUATION / "quality.json"),
        sweep=sweep,
        heat_map=_read(EVALUATION / "heatmap.png"),
        pareto=_read(EVALUATION / "pareto.png"),
        samples=[(eta, steps, _read(path)) for eta, steps, path in pictures],
        real_images=_real_images(open_split(DATA, "test"), len(manifest.class_names)),
        trajectory={name: _read(EVALUATION / f"trajectory_{name}.png") for name in ("x", "x0")},
        trajectory_labels=read_json(EVALUATION / "trajectory.json"),
        registration=read_json(REGISTRATION),
    )


def _real_images(split: ImageSplit, num_classes: int, rows: int = 4) -> bytes:
    """Real test images, one column per class, for comparison with the samples."""
    wanted = labels_by_column(num_classes, rows).tolist()
    columns = len(wanted) // rows
    picked = []
    for position, label in enumerate(wanted):
        pool = (split.labels == label).nonzero()[0].tolist() or list(range(len(split)))
        picked.append(pool[(position // columns) % len(pool)])
    images, _ = split.gather(torch.tensor(picked).numpy())
    return png(picture_of(images, columns))


def _count_parameters(path: Path) -> int:
    """Count the numbers in a safetensors file from its header."""
    try:
        with safe_open(path, "pt") as weights:
            return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path} ({error}): run the stage that writes it again") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; run the stage that writes it again") from None


if __name__ == "__main__":
    run_stage("report", report)
