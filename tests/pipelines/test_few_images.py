"""The notice of a FID from no more images than features, wherever the figure is shown."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion_core.storage import read_json
from pipelines import evaluate as evaluate_stage
from pipelines import reference as reference_stage
from pipelines.evaluation.figures import _below
from pipelines.measurement.floor import Floor
from pipelines.measurement.notice import few_images_notice, marked
from pipelines.params import RunSettings
from pipelines.params.schema import Evaluate, Register
from pipelines.register import candidate_measurement
from pipelines.registry.gate import judge
from pipelines.reporting.page import render
from pipelines.search.driver import _Progress
from pipelines.search.records import TrialResult
from pipelines.stage import EVALUATION, METRICS, REFERENCE
from pipelines.tables import read_csv
from tests.pipelines.test_evaluation import inputs, work  # noqa: F401
from tests.pipelines.test_measurement import _Params as ReferenceStageParams
from tests.pipelines.test_measurement import write_stripes
from tests.pipelines.test_registry import MEASURED, quality_of
from tests.pipelines.test_report import results, text_of  # noqa: F401


@pytest.mark.parametrize(
    ("counts", "few"),
    [
        ({"samples": 64, "train images": 65}, "64 samples"),
        ({"samples": 65, "train images": 64}, "64 train images"),
        ({"samples": 3, "train images": 64}, "3 samples and 64 train images"),
    ],
)
def test_notice_names_each_set_that_is_not_larger_than_the_features(counts: dict[str, int], few: str) -> None:
    notice = few_images_notice(64, counts)
    assert notice is not None
    assert notice.startswith(f"{few}: not more than the 64 features of the extractor")
    assert few_images_notice(64, {"samples": 65, "train images": 65}) is None
    assert (marked(notice), marked(None)) == (" (few images)", "")


def test_floor_counts_the_smallest_sets_that_it_compares() -> None:
    assert Floor(1.0, 0.1, 100, 359, False).smallest_set == 100
    assert Floor(1.0, 0.1, 1000, 359, True).smallest_set == 179
    assert Floor(1.0, None, 20, 20, False).smallest_set == 20


class _Few:
    seed = 5
    evaluate = Evaluate(
        etas=[0.0, 1.0], steps=[2], num_samples=64, shard_size=32, batch_size=32, picture_rows=1, trajectory_images=2
    )


class _Enough(_Few):
    evaluate = _Few.evaluate.model_copy(update={"num_samples": 65})


def test_sweep_of_few_samples_says_so_in_log_table_and_json(
    inputs: None,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow

    caplog.set_level(logging.INFO, "rediffuse")
    drawn: list[str | None] = []
    for name in ("heat_map", "pareto_plot"):
        true = getattr(evaluate_stage, name)
        monkeypatch.setattr(evaluate_stage, name, lambda *a, true=true: (drawn.append(a[-1]), true(*a)))
    evaluate_stage.evaluate(_Few(), RunSettings())  # type: ignore[arg-type]
    quality = read_json(EVALUATION / "quality.json")
    assert quality["few_images"].startswith("64 samples: not more than the 64 features")
    assert quality["floor_few_images"].startswith("60 test images: not more")
    assert drawn == [quality["few_images"]] * 2
    assert [row["few_images"] for row in read_csv(EVALUATION / "sweep.csv")] == ["true"] * 2
    assert read_json(METRICS / "evaluate.json")["few_images"] is True
    lines = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("fid_classifier of 64 samples: not more") for line in lines) == 1
    assert sum(line.startswith("the floor comes from sets of 60 test images: not more") for line in lines) == 1
    for line in lines:
        if line.startswith(("eta ", "floor: ")):
            assert "(few images)" in line
    runs = mlflow.search_runs(search_all_experiments=True)
    assert len(runs) == 3, "the stage and its settings"
    assert set(runs["tags.few_images"]) == {quality["few_images"]}
    caplog.clear()
    evaluate_stage.evaluate(_Enough(), RunSettings())  # type: ignore[arg-type]
    quality = read_json(EVALUATION / "quality.json")
    assert quality["few_images"] is None
    assert [row["few_images"] for row in read_csv(EVALUATION / "sweep.csv")] == ["false"] * 2
    assert not any("fid_classifier of" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("test_images", "few"), [(64, True), (65, False)])
def test_reference_of_few_test_images_says_so(
    test_images: int, few: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")  # MLflow sets both, and this restores them after the test
    monkeypatch.chdir(tmp_path)
    write_stripes(test_images)
    caplog.set_level(logging.INFO, "rediffuse")
    reference_stage.reference(ReferenceStageParams(), RunSettings())  # type: ignore[arg-type]
    notice = read_json(REFERENCE / "reference.json")["few_images"]
    assert (notice is not None) == few
    assert read_json(METRICS / "reference.json")["few_images"] is few
    assert ("(few images)" in caplog.text) == few
    assert ("fid_classifier of 64 test images: not more than the 64 features" in caplog.text) == few


def test_quick_fids_of_few_samples_are_marked_in_the_log() -> None:
    progress = _Progress(2, (10,), 2, marked("a notice"))
    assert progress.add(TrialResult(10, 1.5, (1.5,) * 8, 0.1)).startswith("FID 1.500 +- 0.000 (few images) at step 10")


def test_gate_passes_the_notice_on_and_its_reason_carries_the_mark() -> None:
    quality = {**quality_of("m", 1.0), "few_images": "3 samples: not more"}
    measured = candidate_measurement(quality, Register(model_name="m", eta=0.0, steps=50))
    assert measured["few_images"] == "3 samples: not more"
    plain = candidate_measurement({**quality, "few_images": None}, Register(model_name="m", eta=0.0, steps=50))
    assert "few_images" not in plain
    assert judge({**MEASURED, "fid": 1.0, "few_images": "3 samples"}, MEASURED).reason.endswith("against 2; few images")
    assert "few images" not in judge({**MEASURED, "fid": 1.0}, MEASURED).reason


def test_page_marks_every_figure_of_few_images(results) -> None:  # noqa: F811
    assert "†" not in text_of(render("t", results))
    sweep, floor, search, gate = (f"{count} samples: not more" for count in (1, 2, 3, 4))
    few = SimpleNamespace(**{name: getattr(results, name) for name in results.__dataclass_fields__})
    few.quality = {**results.quality, "few_images": sweep, "floor_few_images": floor}
    few.chosen = {**results.chosen, "few_images": search}
    few.registration = {
        **results.registration, "candidate": {**results.registration["candidate"], "few_images": gate}
    }  # fmt: skip
    text = text_of(render("t", few))
    assert "best fid_classifier 0.350 ± 0.020 † eta" in text
    assert "real test images 0.300 ± 0.030 † floor" in text
    assert text.count("0.500 ± 0.020 †") == 1, "the cells of the table"
    assert "0.3500 ± 0.0200 †" in text, "the gate's figure"
    for sentence in (
        f"† fid_classifier of {sweep}.",
        f"† Floor: fid_classifier of {floor}.",
        f"† quick fid_classifier of {search}.",
        f"† fid_classifier of {gate}.",
    ):
        assert sentence in text


def test_notice_of_a_figure_fits_its_width() -> None:
    from matplotlib.figure import Figure

    notice = few_images_notice(2048, {"samples": 1000})
    assert notice is not None
    lines = _below(notice, Figure(figsize=(4.0, 3.0))).splitlines()
    assert lines[0] == ""
    assert " ".join(lines[1:]) == notice
    assert max(map(len, lines)) <= np.floor(4.0 * 13)
