"""The report as one self-contained HTML page: figures, pictures and tables of results that are already there."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("page.html.jinja")
Row = Mapping[str, str]


@dataclass(frozen=True)
class Results:
    """Content of the page: the files of the stages as they were read. Tables are rows of strings, pictures are PNG files.

    ``samples`` holds (eta, steps, picture) per setting; ``trajectory`` the pictures ``x`` and ``x0``; ``chosen`` is best.yaml.
    """

    manifest: Any
    reference: Mapping[str, Any]
    chosen: Mapping[str, Any]
    trials: Sequence[Row]
    losses: Sequence[Row]
    model: Mapping[str, Any]
    parameters: int
    quality: Mapping[str, Any]
    sweep: Sequence[Row]
    heat_map: bytes
    pareto: bytes
    samples: Sequence[tuple[str, str, bytes]]
    real_images: bytes
    trajectory: Mapping[str, bytes]
    trajectory_labels: Mapping[str, Sequence[Any]]
    registration: Mapping[str, Any]


def render(title: str, results: Results) -> str:
    """Return the page. Names and values are escaped, so a class name with markup or quotes stays text."""
    metric = results.quality["metric"]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["figure"] = _figure_with_error
    environment.filters["data_uri"] = _data_uri
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    sweep = results.sweep
    return page.render(
        title=title,
        metric=metric,
        error=f"{metric}_error",
        best=_best(sweep, metric),
        notices=_notices(results, metric),
        etas=list(dict.fromkeys(row["eta"] for row in sweep)),
        steps=sorted({int(row["steps"]) for row in sweep}),
        cells={(row["eta"], int(row["steps"])): row for row in sweep},
        loss_plot=_svg(_loss_figure(results.losses)),
        trials_plot=_svg(_trials_figure(results.trials)) if results.trials else None,
        left_out=_left_out(results.manifest),
        provenance=list(_flat(results.model["provenance"])),
        **{name: getattr(results, name) for name in Results.__dataclass_fields__},
    )


def _best(sweep: Sequence[Row], metric: str) -> Row:
    """Return the row with the lowest figure. Raises ValueError if no figure is finite."""
    usable = [row for row in sweep if math.isfinite(float(row[metric]))]
    if not usable:
        raise ValueError(
            f"no row of sweep.csv has a finite {metric}: run the evaluate stage again (dvc repro -f evaluate)"
        )
    return min(usable, key=lambda row: float(row[metric]))


def _notices(results: Results, metric: str) -> dict[str, str]:
    """Return the sentence for each figure that comes from too few images for its features, by the figure's place."""
    notices = {
        "sweep": (f"{metric} of", results.quality.get("few_images")),
        "floor": (f"{metric} of", results.quality.get("floor_few_images")),
        "search": (f"quick {metric} of", results.chosen.get("few_images")),
        "gate": (f"{metric} of", results.registration["candidate"].get("few_images")),
    }
    return {place: f"{figure} {notice}" for place, (figure, notice) in notices.items() if notice}


def _left_out(manifest: Any) -> list[dict[str, Any]]:
    """Rows of the files that the prepare stage ignored or skipped, and of the colour profiles that it ignored."""
    rows = [dict(group) for group in manifest.ignored]
    for reason, names in (("broken: skipped", manifest.skipped), ("colour profile ignored", manifest.ignored_profiles)):
        by_suffix: dict[str, list[str]] = {}
        for name in names:  # "path.suffix (reason)"
            suffix = re.search(r"(\.\w+) \(", name)
            by_suffix.setdefault(suffix[1].lower() if suffix else "", []).append(name)
        rows += [
            {"reason": reason, "suffix": suffix, "files": len(own), "first": own[0]}
            for suffix, own in sorted(by_suffix.items())
        ]
    return rows


def _figure_with_error(value: str | float, error: str | float | None, digits: int = 3) -> str:
    """A figure with its error, if it is known: CSV has an empty cell for an unknown one."""
    return f"{float(value):.{digits}f}" + ("" if error in (None, "") else f" ± {float(error):.{digits}f}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else value))
    return pairs


def _loss_figure(rows: Sequence[Row]) -> Figure:
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


def _trials_figure(trials: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(7.0, 3.0), layout="constrained")
    axes = figure.subplots()
    usable = [trial for trial in trials if trial["fid_error"]]  # a diverged trial has none
    longest = max(int(trial["step"]) for trial in usable)
    for objective in sorted({trial["objective"] for trial in usable}):
        own = [trial for trial in usable if trial["objective"] == objective]
        sizes = [20 + 60 * int(trial["step"]) / longest for trial in own]
        rates, fids = [float(trial["learning_rate"]) for trial in own], [float(trial["fid"]) for trial in own]
        axes.scatter(rates, fids, s=sizes, label=objective)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("learning rate (a larger dot was trained longer)")
    axes.set_ylabel("quick FID")
    axes.legend(title="objective", fontsize=8)
    return figure


def _svg(figure: Figure) -> str:
    FigureCanvasAgg(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
