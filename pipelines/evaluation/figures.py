"""Figures of the sweep: the heat map of FID, and FID against speed with the Pareto front."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.evaluation.sweep import Row, pareto_front
from pipelines.measurement.floor import Floor


def heat_map(rows: Sequence[Row], metric: str, floor: Floor, path: Path, notice: str | None = None) -> None:
    """Draw FID over eta (rows) and steps (columns) with the value in each cell. The colour scale is logarithmic.

    ``notice``: that of `pipelines.measurement.notice`, which then stands below the title.
    """
    etas = list(dict.fromkeys(row.settings.eta for row in rows))
    steps = sorted({row.settings.steps for row in rows})
    values = np.full((len(etas), len(steps)), np.nan)
    for row in rows:
        values[etas.index(row.settings.eta), steps.index(row.settings.steps)] = row.fid
    figure = Figure(figsize=(1.9 + 1.1 * len(steps), 1.6 + 0.6 * len(etas)), layout="constrained")
    axes = figure.subplots()
    shades = np.log10(np.maximum(values, 1e-6))
    picture = axes.imshow(shades, cmap="viridis_r", aspect="auto")
    known = shades[np.isfinite(shades)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
    for (y, x), value in np.ndenumerate(values):
        dark = high > low and (shades[y, x] - low) / (high - low) > 0.5
        axes.text(x, y, f"{value:.3g}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(steps)), [str(s) for s in steps])
    axes.set_yticks(range(len(etas)), [_eta(eta) for eta in etas])
    axes.set_xlabel("DDIM steps")
    axes.set_ylabel("eta")
    axes.set_title(f"{metric}\n{floor_label(floor)}: {floor.value:.3g}{_below(notice, figure)}", fontsize=9)
    figure.colorbar(picture, ax=axes, label="log10 FID")
    _save(figure, path)


def pareto_plot(rows: Sequence[Row], metric: str, floor: Floor, path: Path, notice: str | None = None) -> None:
    """Draw FID, with its error, against the sampling speed of one worker. A line joins the settings of the Pareto front.

    ``notice``: as for `heat_map`.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for eta in dict.fromkeys(row.settings.eta for row in rows):
        own = [row for row in rows if row.settings.eta == eta]
        axes.errorbar(
            [r.images_per_s for r in own],
            [r.fid for r in own],
            yerr=[r.fid_error or 0.0 for r in own],
            fmt="o",
            alpha=0.75,
            elinewidth=1,
            label=f"eta {_eta(eta)}",
        )
    front = sorted(
        (row for row, best in zip(rows, pareto_front(rows), strict=True) if best), key=lambda row: row.images_per_s
    )
    axes.plot([r.images_per_s for r in front], [r.fid for r in front], "k-", linewidth=1, label="Pareto front")
    for row in front:
        axes.annotate(
            f"{row.settings.steps}", (row.images_per_s, row.fid), textcoords="offset points", xytext=(5, 5), fontsize=8
        )
    axes.axhline(floor.value, color="grey", linestyle=":", label=floor_label(floor))
    if floor.error is not None:
        axes.axhspan(
            max(floor.value - floor.error, 1e-9), floor.value + floor.error, color="grey", alpha=0.15, linewidth=0
        )
    axes.set_xscale("log")
    drawn = [row.fid for row in rows if math.isfinite(row.fid) and row.fid > 0]
    if drawn:  # a logarithmic axis needs a figure above 0: constant images have none
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(min([*drawn, *([floor.value] if floor.value > 0 else [])]) / 2, 1e-9))
    axes.set_xlabel("images/s per worker (numbers: steps)")
    axes.set_ylabel(metric)
    if notice:
        axes.set_title(_below(notice, figure).strip(), fontsize=9)
    axes.legend(fontsize=8)
    _save(figure, path)


def floor_label(floor: Floor) -> str:
    """Return the floor's label with its counts."""
    samples, images = floor.num_samples, floor.num_images
    if samples == images:
        label = f"FID of the {images} test images"
    elif 2 * samples <= images:
        label = f"{samples} of {images} real test images"
    else:
        label = f"{samples} real images, {'extrapolated' if floor.extrapolated else 'interpolated'} from {images}"
    return f"floor: {label}" + (", error unknown" if floor.error is None else "")


def _below(notice: str | None, figure: Figure) -> str:
    """Return the notice as lines that fit the width of the figure, each after a line break."""
    width = int(figure.get_figwidth() * 13)
    return "".join(f"\n{line}" for line in textwrap.wrap(notice, width)) if notice else ""


def _eta(eta: object) -> str:
    return "σ̂" if eta == "sigma_hat" else f"{eta:g}"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120, metadata={"Software": None})
