from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from diffusion_core.storage import write_json
from pipelines.data.shards import write_manifest, write_shards
from pipelines.identity import import_closure
from pipelines.params import Report, RunSettings
from pipelines.report import read_results, report
from pipelines.reporting.page import Results, render
from pipelines.stage import DATA, EVALUATION, MODEL, PLOTS, REFERENCE, REGISTRATION, REPORT, SEARCH
from pipelines.tables import write_csv

NAMES = ('a "quoted", comma', "two\nlines", "<b>&amp;'</b>")
METRIC = "fid_classifier"


@dataclass(frozen=True)
class Split:
    """The part of the manifest that the page reads."""

    class_names: tuple[str, ...] = NAMES
    shape: tuple[int, int, int] = (8, 8, 1)
    counts: Mapping[str, int] = None  # type: ignore[assignment]
    skipped: tuple[str, ...] = ()
    ignored: tuple[Mapping[str, Any], ...] = ()
    ignored_profiles: tuple[str, ...] = ()
    content_hash: str = "d" * 64
    transform: Mapping[str, Any] = None  # type: ignore[assignment]


def cell(eta: str, steps: int, fid: float, error: str = "0.020000", **more: str) -> dict[str, str]:
    row = {
        "setting": f"eta-{eta}-steps-{steps}",
        "eta": eta,
        "steps": str(steps),
        "num_samples": "1000",
        METRIC: f"{fid:.6f}",
        f"{METRIC}_error": error,
    }
    floor = {"floor": "0.300000", "floor_error": "0.030000", "floor_extrapolated": "false", "suspicious": "false"}
    return {**row, "class_agreement": "0.97", "images_per_s": "100.0", "pareto": "true", **floor, **more}


def trial(name: str, fid: float, **more: str) -> dict[str, str]:
    choice = {"schedule": "cosine", "objective": "v", "weighting": "uniform", "learning_rate": "0.001"}
    return {"trial": name, **choice, "step": "40", "fid": str(fid), "fid_error": "0.05", **more}


def pixel() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def results() -> Results:
    candidate = {"eta": 0.0, "steps": 10, "num_samples": 1000, "fid": 0.35, "fid_error": 0.02}
    return Results(
        manifest=Split(counts={"train": 1438, "test": 359}, transform={"image_size": 8}),
        reference={
            "counts": {"train": 1438, "test": 359},
            "classifier_test_accuracy": 0.98,
            "extractor": "classifier",
            "extractor_digest": "e" * 64,
        },
        chosen={"overrides": {}, "trial": "trial-a", "tie": []},
        trials=[trial("trial-a", 1.8), trial("trial-b", 1.9), trial("trial-c", 1e9, fid_error="")],
        losses=[{"step": "10", "loss": "1.0", "learning_rate": "0.1", "grad_norm": "2.0"}],
        model={
            "network": {"name": "unet"},
            "schedule": {"name": "sigmoid", "num_steps": 1000},
            "objective": "x0",
            "condition_dropout": 0.1,
            "weights_sha256": "f" * 64,
            "provenance": {
                "step": 1200,
                "settings": {"train.learning_rate": 0.0038, "train.precision": "bf16"},
                "torch": "2.11.0",
                "device_type": "cuda",
                "resumed_across_changes": ["diffusion_core.losses"],
            },
        },
        parameters=398449,
        quality={
            "metric": METRIC,
            "num_samples": 1000,
            "guidance_scale": 1.0,
            "spacing": "trailing",
            "floor_label": "floor: 1000 real images, extrapolated from 359",
            "continued_across_changes": [],
        },
        sweep=[cell("0.0", 5, 0.5), cell("0.0", 10, 0.35), cell("sigma_hat", 5, 0.9), cell("sigma_hat", 10, 0.4)],
        heat_map=pixel(),
        pareto=pixel(),
        samples=[
            ("0.0", "5", pixel()),
            ("0.0", "10", pixel()),
            ("sigma_hat", "5", pixel()),
            ("sigma_hat", "10", pixel()),
        ],
        real_images=pixel(),
        trajectory={"x": pixel(), "x0": pixel()},
        trajectory_labels={"eta": 0.0, "steps": 10, "times": [99, 50, -1], "names": list(NAMES)},  # type: ignore[dict-item]
        registration={
            "model_name": "model",
            "version": 2,
            "promoted": True,
            "alias": "champion",
            "champion_version": 2,
            "reason": "better than the champion",
            "candidate": candidate,
            "previous_champion_fid": 0.5,
            "previous_champion_fid_error": None,
        },
    )


class Names(HTMLParser):
    """The text of every element of class ``name``."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = False
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.inside = ("class", "name") in attributes
        if self.inside:
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] += data


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<svg.*?</svg>|<style.*?</style>|<[^>]*>", " ", page, flags=re.S)).split())


def test_class_names_with_quotes_commas_line_breaks_and_markup_survive(results: Results) -> None:
    page = Names(render('The "title" <i>', results))
    assert page.found == [*NAMES, *NAMES], "the trajectory and the data each name every class"
    assert "i" not in page.tags, "markup in a name or the title stays text"


def test_floor_shows_its_label_and_its_error(results: Results) -> None:
    text = text_of(render("t", results))
    assert (
        "fid_classifier of real test images 0.300 ± 0.030 floor: 1000 real images, extrapolated from 359 agree" in text
    )
    rows = [{**row, "floor_error": ""} for row in results.sweep]
    assert "real test images 0.300 floor: 1000 real" in text_of(render("t", replace(results, sweep=rows)))


def test_sweep_continued_by_force_names_the_changed_modules(results: Results) -> None:
    assert "sweep continued" not in text_of(render("t", results))
    forced = {**results.quality, "continued_across_changes": ["diffusion_core.samplers", "diffusion_core.grids"]}
    text = text_of(render("t", replace(results, quality=forced)))
    assert "sweep continued across changes of diffusion_core.samplers, diffusion_core.grids" in text


def test_figures_carry_their_errors_and_suspicious_ones_a_mark(results: Results) -> None:
    text = text_of(render("t", results))
    assert "best fid_classifier 0.350 ± 0.020 eta 0.0, 10 steps" in text
    assert "⚠" not in text and "uspicious" not in text.split("All settings")[0]
    rows = [cell("0.0", 5, 0.5), cell("0.0", 10, 0.1, suspicious="true")]
    page = render("t", replace(results, sweep=rows))
    assert text_of(page).count("0.100 ± 0.020 ⚠") == 1
    assert "10 steps; suspicious: below the floor" in text_of(page)
    assert '<td class="best suspicious">0.100' in page
    assert '<td class="">0.500 ± 0.020</td>' in page


def test_unknown_errors_are_said_to_be_unknown(results: Results) -> None:
    text = text_of(render("t", replace(results, sweep=[cell("0.0", 10, 0.35, error="")])))
    assert "best fid_classifier 0.350 eta" in text
    assert "unknown for this extractor" in text
    assert "champion before: 0.5000." in text


def test_page_shows_what_was_ignored_and_skipped(results: Results) -> None:
    assert "not in the data set" not in render("t", results)
    manifest = replace(
        results.manifest,
        ignored=({"reason": "no suffix", "suffix": "", "files": 3, "first": "cat/<b>"},),
        skipped=("cat/x (1).PNG (not an image)", "cat/y.png (truncated (3 bytes))"),
        ignored_profiles=("cat/0.jpg (unreadable profile: x)",),
    )
    text = text_of(render("t", replace(results, manifest=manifest)))
    assert "no suffix none 3 cat/<b>" in text
    assert "broken: skipped .png 2 cat/x (1).PNG (not an image)" in text
    assert "colour profile ignored .jpg 1 cat/0.jpg (unreadable profile: x)" in text


def test_search_shows_the_error_of_each_trial_and_a_tie(results: Results) -> None:
    text = text_of(render("t", results))
    assert "trial-a was chosen: the lowest quick FID" in text
    assert "step fid fid_error trial-a cosine v uniform 0.001 40 1.8 0.05" in text
    tied = replace(results, chosen={"overrides": {}, "trial": "trial-b", "tie": ["trial-b", "trial-a"]})
    assert "trial-b was chosen. Within the error it ties with trial-a; a tie goes to" in text_of(render("t", tied))
    off = replace(results, chosen={"overrides": {}}, trials=[])
    assert "No search: training used its own settings." in text_of(render("t", off))


def test_page_says_with_which_settings_and_machine_the_model_was_trained(results: Results) -> None:
    text = text_of(render("t", results))
    for pair in (
        "settings.train.learning_rate 0.0038",
        "settings.train.precision bf16",
        "torch 2.11.0",
        "device_type cuda",
        "resumed_across_changes diffusion_core.losses",
    ):
        assert pair in text


def test_report_neither_samples_nor_loads_a_model() -> None:
    modules = import_closure(["pipelines.report"], without=["pipelines.stage"])
    forbidden = (
        "diffusion_core.artifact",
        "diffusion_core.generation",
        "diffusion_core.samplers",
        "diffusion_core.networks",
    )
    assert not [name for name in modules if name.startswith(forbidden)]


class _Params:
    """The params that dvc.yaml declares for report."""

    report = Report(title='Digits & "more"')


@pytest.fixture
def artifacts(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the earlier stages."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")  # MLflow sets both, and this restores them after the test
    monkeypatch.chdir(tmp_path)
    DATA.mkdir(parents=True)
    images = np.arange(9, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    chunks = [(images, np.arange(9) % 3)]
    write_manifest(
        DATA,
        shape=[8, 8, 1],
        class_names=list(NAMES),
        transform={"image_size": 8},
        shards={split: write_shards(DATA, split, chunks, 100) for split in ("train", "test")},
        counts={"train": 9, "test": 9},
        class_counts={"train": [3, 3, 3], "test": [3, 3, 3]},
        skipped=[],
    )
    for folder in (REFERENCE, SEARCH, MODEL, EVALUATION / "samples", PLOTS):
        folder.mkdir(parents=True)
    write_json(REFERENCE / "reference.json", results.reference)
    YAML().dump(dict(results.chosen), SEARCH / "best.yaml")
    write_csv(SEARCH / "trials.csv", list(results.trials[0]), results.trials)
    write_csv(PLOTS / "train_loss.csv", list(results.losses[0]), results.losses)
    write_json(MODEL / "model.json", results.model)
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, MODEL / "model.safetensors")
    write_json(EVALUATION / "quality.json", {**results.quality, "model_digest": "m"})
    write_csv(EVALUATION / "sweep.csv", list(results.sweep[0]), results.sweep)
    for name in ("heatmap", "pareto", "trajectory_x", "trajectory_x0"):
        (EVALUATION / f"{name}.png").write_bytes(pixel())
    for eta, steps, picture in results.samples:
        (EVALUATION / "samples" / f"eta-{eta}-steps-{steps}.png").write_bytes(picture)
    write_json(EVALUATION / "trajectory.json", results.trajectory_labels)
    write_json(REGISTRATION, results.registration)
    return tmp_path


def test_stage_renders_what_the_stages_wrote(artifacts: Path, results: Results) -> None:
    report(_Params(), RunSettings())  # type: ignore[arg-type]
    page = (REPORT / "index.html").read_text(encoding="utf-8")
    assert "<title>Digits &amp; &#34;more&#34;</title>" in page
    assert Names(page).found == [*NAMES, *NAMES]
    assert page.count('class="samples"') == 4
    assert 'src="http' not in page and "src='http" not in page
    assert read_results().parameters == 17
    real = Image.open(io.BytesIO(read_results().real_images))
    assert real.size == (3 * 34 + 2, 4 * 34 + 2), "one column per class, four rows"


@pytest.mark.parametrize(
    "missing", ["sweep.csv", "trajectory_x0.png", "samples/eta-0.0-steps-5.png", "trajectory.json"]
)
def test_missing_file_is_named(artifacts: Path, missing: str) -> None:
    (EVALUATION / missing).unlink()
    with pytest.raises(ValueError, match=re.escape(str(EVALUATION / missing))):
        read_results()
