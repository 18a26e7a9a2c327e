"""Stage 7: one self-contained HTML page."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings, generate, to_uint8
from diffusion_core.samplers import Step
from diffusion_core.storage import atomic_folder, read_json, write_text
from pipelines.data.shards import open_split, read_manifest
from pipelines.params import Params
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
from pipelines.state import fingerprint
from pipelines.tracking import stage_run
from pipelines.training.grids import class_grid_labels, image_grid, png

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOMENTS = 9
"""Columns of the denoising trajectory."""


def report(params: Params) -> None:
    """Write artifacts/report/index.html: what was run, losses, trials, the FID table, grids, a denoising trajectory and the verdict, in one file."""
    check_writable(REPORT.parent)
    manifest = read_manifest(DATA)
    model = DiffusionModel.load(MODEL)
    quality = read_json(EVALUATION / "quality.json")
    registration = read_json(REGISTRATION)
    sweep = _rows(EVALUATION / "sweep.csv")
    trials = _rows(SEARCH / "trials.csv")
    furthest = max((int(trial["step"]) for trial in trials), default=0)
    finished = [trial for trial in trials if int(trial["step"]) == furthest]
    best = min(sweep, key=lambda row: float(row[quality["metric"]]))
    real = open_split(DATA, "test")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    html = page.render(
        title=params.report.title,
        metric=quality["metric"],
        floor=quality["floor"],
        best=best,
        reference=read_json(REFERENCE / "reference.json"),
        manifest=manifest,
        model=read_json(MODEL / "model.json"),
        parameters=sum(p.numel() for p in model.network.parameters()),
        registration=registration,
        quality=quality,
        sweep=sweep,
        etas=list(dict.fromkeys(row["eta"] for row in sweep)),
        steps=sorted({int(row["steps"]) for row in sweep}),
        cells={(row["eta"], int(row["steps"])): row for row in sweep},
        trials=sorted(trials, key=lambda trial: (-int(trial["step"]), float(trial["fid"]))),
        best_trial=min(finished, key=lambda trial: float(trial["fid"]), default=None),
        loss_plot=_svg(_loss_figure(_rows(PLOTS / "train_loss.csv"))),
        trials_plot=_svg(_trials_figure(trials)) if trials else None,
        heat_map=_data_uri((EVALUATION / "heatmap.png").read_bytes()),
        pareto=_data_uri((EVALUATION / "pareto.png").read_bytes()),
        grids=[
            (f"eta {row['eta']}, {row['steps']} steps", _data_uri(path.read_bytes()))
            for row in sweep
            if (path := EVALUATION / "grids" / f"eta-{row['eta']}-steps-{row['steps']}.png").exists()
        ],
        real_grid=_data_uri(png(_real_grid(real, len(manifest.class_names)))),
        trajectory=_trajectory(model, params, params.report.trajectory_images),
    )
    with atomic_folder(REPORT) as folder:
        write_text(folder / "index.html", html)
    inputs = {"model": quality["model_digest"], "registration": hashlib.sha256(REGISTRATION.read_bytes()).hexdigest()}
    with stage_run(params, "report", fingerprint("report", params, inputs), manifest.content_hash) as run:
        run.log_artifact(REPORT / "index.html")
    log.info("%s: %.1f MB", REPORT / "index.html", len(html) / 1e6)


def _trajectory(model: DiffusionModel, params: Params, count: int) -> dict[str, Any]:
    """Pictures of x_t (upper) and of the predicted x_0 (lower): one row a sample, from noise to image."""
    settings = SamplerSettings(steps=params.register_.steps, eta=0.0)
    labels = torch.arange(count) % len(model.class_names)
    steps: list[Step] = []
    for _ in generate(
        model,
        labels,
        torch.arange(count),
        settings,
        seed=params.seed,
        block_size=count,
        on_step=lambda positions, step: steps.append(step),
    ):
        pass
    chosen = sorted({round(i * (len(steps) - 1) / (MOMENTS - 1)) for i in range(MOMENTS)})
    pictures = {}
    for name in ("x", "x0"):
        columns = [to_uint8(getattr(steps[moment], name)).cpu() for moment in chosen]
        tiles = torch.stack(columns, dim=1).flatten(0, 1)
        pictures[name] = _data_uri(png(image_grid(tiles, len(chosen))))
    return {
        **pictures,
        "times": [steps[moment].t_prev for moment in chosen],
        "names": [model.class_names[int(label)] for label in labels],
    }


def _real_grid(split: Any, num_classes: int, rows: int = 4) -> Any:
    """Real test images, one column a class, for comparison with the samples."""
    wanted = class_grid_labels(num_classes, rows).tolist()
    pools = {label: list((split.labels == label).nonzero()[0]) for label in set(wanted)}
    picked = []
    for position, label in enumerate(wanted):
        pool = pools[label] or list(range(len(split)))
        picked.append(int(pool[(position // (len(wanted) // rows)) % len(pool)]))
    images, _ = split.gather(torch.tensor(picked).numpy())
    return image_grid(images, len(wanted) // rows)


def _loss_figure(rows: Sequence[dict[str, str]]) -> Figure:
    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [int(row["step"]) for row in rows]
    left.plot(steps, [float(row["loss"]) for row in rows], linewidth=1)
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_title("training loss", fontsize=10)
    right.plot(steps, [float(row["grad_norm"]) for row in rows], linewidth=1, label="gradient norm")
    right.set_xlabel("step")
    right.set_title("gradient norm; learning rate (dashed)", fontsize=10)
    twin = right.twinx()
    twin.plot(steps, [float(row["learning_rate"]) for row in rows], "k--", linewidth=1)
    return figure


def _trials_figure(trials: Sequence[dict[str, str]]) -> Figure:
    figure = Figure(figsize=(7.0, 3.0), layout="constrained")
    axes = figure.subplots()
    for objective in sorted({trial["objective"] for trial in trials}):
        own = [trial for trial in trials if trial["objective"] == objective]
        sizes = [20 + 60 * int(trial["step"]) / max(int(t["step"]) for t in trials) for trial in own]
        axes.scatter([float(t["learning_rate"]) for t in own], [float(t["fid"]) for t in own], s=sizes, label=objective)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("learning rate (a larger dot ran longer)")
    axes.set_ylabel("quick FID")
    axes.legend(title="objective", fontsize=8)
    return figure


def _svg(figure: Figure) -> str:
    FigureCanvasAgg(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; run the stage that writes it again") from None


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


if __name__ == "__main__":
    run_stage("report", report)
