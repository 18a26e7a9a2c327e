"""NaN and infinity: refused where they arise, and never the best of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusion_core.generation import NonFiniteOutputError, SamplerSettings
from diffusion_core.metrics.extractors import ImageClassifier
from diffusion_core.metrics.statistics import GaussianStatistics
from pipelines import register as register_stage
from pipelines.evaluate import _summary as summary_of
from pipelines.evaluation.figures import heat_map, pareto_plot
from pipelines.evaluation.sweep import Row, best_row, is_suspicious, make_row, pareto_front
from pipelines.measurement import class_network
from pipelines.measurement.floor import Floor, floor_at
from pipelines.measurement.measure import Measurement, distance_with_error, jackknife_error
from pipelines.measurement.reference import (
    finite_distance,
    load_statistics,
    load_test_features,
    num_agreeing,
    save_statistics,
    save_test_features,
)
from pipelines.measurement.units import Unit, load_result, measure_unit, save_result
from pipelines.params.schema import Register
from pipelines.registry.gate import judge, measured_error
from pipelines.reporting.page import _best as best_of_page
from pipelines.training import loop
from pipelines.training.loop import Hooks, TrainingDivergedError, new_state, train
from tests.pipelines.test_measurement import CPU, Stripes
from tests.pipelines.test_registry import MEASURED as SAME
from tests.pipelines.test_registry import quality_of
from tests.pipelines.test_training_loop import SETTINGS, Noise

NAN, INF = math.nan, math.inf
MEASURED = {**SAME, "metric": "fid_classifier"}
FLOOR = Floor(1.0, 0.1, 10, 10, extrapolated=False)


def row(fid: float, speed: float = 1.0, steps: int = 50) -> Row:
    return Row(SamplerSettings(steps=steps), 10, fid, 0.1, 0.5, speed)


def statistics(count: int = 50, features: int = 3) -> GaussianStatistics:
    return GaussianStatistics.from_features(np.random.default_rng(0).normal(size=(count, features)))


def broken(value: float, where: str) -> GaussianStatistics:
    whole = statistics()
    arrays = {"mean": whole.mean.copy(), "scatter": whole.scatter.copy()}
    arrays[where].flat[0] = value
    return GaussianStatistics(whole.n, **arrays)


# the sweep


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_row_that_is_not_finite_is_neither_the_best_nor_on_the_front(value: float, place: int) -> None:
    rows = [row(2.0, 5.0), row(1.0, 4.0)]
    rows.insert(place, row(value, 9.0))
    assert best_row(rows).fid == 1.0
    assert [each.fid for each, best in zip(rows, pareto_front(rows), strict=True) if best] == [2.0, 1.0]
    assert summary_of(rows, "fid", FLOOR)["best_fid"] == 1.0
    cells = [{"fid": str(each.fid)} for each in rows]
    assert best_of_page(cells, "fid")["fid"] == "1.0"


def test_sweep_without_a_finite_figure_has_no_best_row() -> None:
    with pytest.raises(ValueError, match="no setting of the sweep has a finite FID"):
        best_row([row(NAN)])
    with pytest.raises(ValueError, match=r"no row of sweep\.csv has a finite fid: run the evaluate stage again"):
        best_of_page([{"fid": "nan"}], "fid")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fids", [[NAN, 1.0], [NAN, NAN], [INF, 0.0], [0.0, 0.0]])
def test_figures_are_drawn_with_cells_that_are_not_finite(fids: list[float], tmp_path: Path) -> None:
    rows = [row(fid, steps=10 + number) for number, fid in enumerate(fids)]
    for floor in (FLOOR, replace(FLOOR, value=0.0, error=None)):
        heat_map(rows, "fid", floor, tmp_path / "a.png")
        if not all(map(math.isnan, fids)):  # such a sweep has ended with an error before
            pareto_plot(rows, "fid", floor, tmp_path / "b.png")


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["mean", "scatter"])
def test_broken_statistics_are_named_with_the_sampler_setting(value: float, where: str) -> None:
    settings = SamplerSettings(steps=7, eta=0.5)
    bad = Measurement((broken(value, where),), 1, 1.0, 1)
    with pytest.raises(ValueError, match=r"eta 0.5, 7 steps: the statistics of the samples hold NaN or infinity"):
        make_row(settings, bad, statistics())
    good = Measurement((statistics(),), 1, 1.0, 1)
    with pytest.raises(
        ValueError, match=r"the statistics of the real train images hold NaN .* run the reference stage"
    ):
        distance_with_error(good, broken(value, where))


@pytest.mark.filterwarnings("ignore:overflow")
def test_distance_that_overflows_is_refused() -> None:
    far = GaussianStatistics(10, np.full(3, 1e200), np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"the FID of the samples is not finite \(inf\)"):
        finite_distance(far, statistics(), "samples")


@pytest.mark.parametrize("left_out", [[], [1.0], [1.0, NAN, 2.0], [INF, 1.0]])
def test_jackknife_refuses_what_has_no_error(left_out: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two finite figures"):
        jackknife_error(left_out)


def test_floor_of_broken_features_or_statistics_is_refused() -> None:
    features, labels = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2
    with pytest.raises(ValueError, match="the statistics of the real train images hold NaN"):
        floor_at(features, labels, broken(NAN, "scatter"), 100, 0)
    features[7, 1] = NAN
    for count in (10, 100):
        with pytest.raises(ValueError, match="features hold NaN or infinity"):
            floor_at(features, labels, statistics(), count, 0)
    assert not is_suspicious(row(0.95), FLOOR)


def test_constant_images_have_a_finite_distance_and_floor() -> None:
    constant = GaussianStatistics.from_features(np.ones((50, 3)))
    assert finite_distance(constant, constant, "samples") == 0.0
    assert np.isfinite(finite_distance(constant, statistics(), "samples"))
    floor = floor_at(np.ones((40, 3)), np.zeros(40, dtype=np.int64), constant, 100, 0)
    assert (floor.value, floor.error) == (0.0, 0.0)


# the reference


@pytest.mark.parametrize("at", [1, 33, 45])
def test_class_network_that_diverges_ends_the_reference_with_the_step(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the last step, and in a step between two that are logged. The network became the extractor without a word."""
    calls, logged = 0, []
    true = F.cross_entropy

    def loss(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return true(*arguments, **options) * (NAN if calls == at else 1.0)

    monkeypatch.setattr(class_network.F, "cross_entropy", loss)
    step = {1: 20, 33: 40, 45: 45}[at]
    with pytest.raises(ValueError, match=rf"the class network diverged: its loss is not finite at step {step}; try"):
        class_network.train_classifier(
            Stripes(32, 0), (8, 8, 1), 2, steps=45, batch_size=4, seed=0, device=CPU,
            on_step=lambda step, loss: logged.append(loss),
        )  # type: ignore[arg-type]  # fmt: skip
    assert all(map(math.isfinite, logged))


def test_class_network_that_the_last_update_breaks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def update(optimizer: torch.optim.AdamW) -> None:
        optimizer.param_groups[0]["params"][0].data.fill_(NAN)

    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    with pytest.raises(ValueError, match=r"the class network diverged: body\.0\.weight is not finite at step 1"):
        class_network.train_classifier(Stripes(32, 0), (8, 8, 1), 2, steps=1, batch_size=4, seed=0, device=CPU)  # type: ignore[arg-type]


def test_logits_that_are_not_finite_name_no_class() -> None:
    network = ImageClassifier(image_size=8, image_channels=1, num_classes=2)
    network.head.weight.data.fill_(NAN)
    pixels, labels = Stripes(8, 0).gather(np.arange(8))
    with pytest.raises(ValueError, match="the class network returned NaN or infinity"):
        num_agreeing(network, pixels, labels)
    with pytest.raises(ValueError, match="the class network returned NaN or infinity"):
        class_network.accuracy(network, Stripes(8, 0), CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [NAN, INF])
def test_files_with_values_that_are_not_finite_are_refused_with_the_remedy(value: float, tmp_path: Path) -> None:
    save_statistics({"train": broken(value, "scatter")}, tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match=r"s\.safetensors \(train\.scatter holds NaN .* run the reference stage again"):
        load_statistics(tmp_path / "s.safetensors")
    save_test_features(np.full((4, 3), value), np.zeros(4), tmp_path)
    with pytest.raises(ValueError, match=r"\(features holds NaN or infinity\): run the reference stage again"):
        load_test_features(tmp_path)


def test_unit_with_values_that_are_not_finite_is_neither_written_nor_finished(tmp_path: Path) -> None:
    unit = Unit(measure_unit, SamplerSettings(steps=2), 0, 8)
    with pytest.raises(ValueError, match=r"measure_unit_steps-2.*: mean hold NaN or infinity"):
        save_result({"mean": np.asarray([1.0, NAN]), "n": np.asarray([1])}, tmp_path, unit)
    assert load_result(tmp_path, unit) is None
    save_result({"mean": np.asarray([1.0, 2.0])}, tmp_path, unit)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes().replace(np.float64(2.0).tobytes(), np.float64(NAN).tobytes()))
    assert load_result(tmp_path, unit) is None


# the training


@pytest.mark.parametrize("hooks", [Hooks(log_every=5, checkpoint_every=100), Hooks(log_every=100, checkpoint_every=5)])
def test_nan_between_two_log_steps_is_found_at_the_next(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights stay finite, because the gradient of this loss is 0: only the loss tells."""
    calls = 0
    true = loop.training_loss

    def loss(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        found = true(*arguments, **options)
        return found + (NAN if calls == 3 else 0.0)

    monkeypatch.setattr(loop, "training_loss", loss)
    with pytest.raises(TrainingDivergedError, match="losses not finite at step 5"):
        train(SETTINGS, Noise(), new_state(SETTINGS, CPU), hooks)


def test_picture_shows_no_state_that_has_diverged() -> None:
    """The defect: a picture between two log steps was drawn from weights that nothing had checked."""
    settings = replace(SETTINGS, learning_rate=1e30, warmup_steps=0, steps=40)
    drawn: list[int] = []
    hooks = Hooks(
        log_every=1000, checkpoint_every=1000, sample_every=5, on_sample=lambda state: drawn.append(state.step)
    )
    with pytest.raises(TrainingDivergedError, match="not finite at step 5"):
        train(settings, Noise(), new_state(settings, CPU), hooks)
    assert drawn == []


# the gate


@pytest.mark.parametrize("value", [NAN, INF, -INF, "nan"])
def test_candidate_that_is_not_finite_is_refused_by_name(value: float | str) -> None:
    for champion in (None, MEASURED, {**MEASURED, "fid": "nan"}):
        verdict = judge({**MEASURED, "fid": value}, champion)
        assert not verdict.promoted
        assert verdict.reason.startswith("refused: the candidate's fid_classifier is not finite (")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_champion_that_is_not_finite_blocks_no_candidate(value: str) -> None:
    verdict = judge(MEASURED, {**MEASURED, "fid": value})
    assert verdict.promoted
    assert f"the champion's fid_classifier is not finite ({value})" in verdict.reason


def test_error_that_is_not_finite_is_unknown() -> None:
    assert [measured_error({"fid_error": error}) for error in ("nan", INF, "None", None, "0.5")] == [
        None, None, None, None, 0.5,
    ]  # fmt: skip


def test_figure_that_is_not_finite_is_refused_before_a_version_is_made() -> None:
    gate = Register(model_name="m", eta=0.0, steps=50)
    with pytest.raises(ValueError, match=r"the fid_classifier of eta 0.0 and 50 steps is not finite \(nan\): measure"):
        register_stage.candidate_measurement(quality_of("m", NAN), gate)


def test_champion_whose_network_returns_nan_gives_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise the stage would fail for every later candidate."""

    def fail(*arguments: Any) -> Mapping[str, Any]:
        raise NonFiniteOutputError("the network returned NaN or infinity at step t = 3")

    monkeypatch.setattr(register_stage, "measure_champion", fail)
    current = SimpleNamespace(version="1", tags={"rediffuse.fid": "1.0", "rediffuse.model_digest": "a"})
    verdict, old = register_stage._judge(
        SimpleNamespace(version="2", tags={"rediffuse.model_digest": "b"}), MEASURED, current, None
    )  # type: ignore[arg-type]
    assert verdict.promoted
    assert (
        "the champion, version 1, cannot be measured: the network returned NaN or infinity at step t = 3" in caplog.text
    )
    assert register_stage._finite_fid(old) is None, "registration.json holds no NaN"
    assert register_stage._finite_fid({"fid": "2.5"}) == 2.5
    assert register_stage._finite_fid({}) is register_stage._finite_fid(None) is None


def test_champions_weights_at_another_gate_setting_become_its_new_version() -> None:
    """Otherwise the alias would serve the settings of the former gate."""
    tags = {"rediffuse.model_digest": "a", "rediffuse.code_digest": "c", "rediffuse.fid": "1.0"}
    current, version = SimpleNamespace(version="1", tags=tags), SimpleNamespace(version="2", tags=tags)
    verdict, old = register_stage._judge(version, MEASURED, current, None)  # type: ignore[arg-type]
    assert verdict.promoted and "other sampler settings" in verdict.reason
    assert old is not None and old["fid"] == "1.0"
    verdict, _ = register_stage._judge(version, {**MEASURED, "fid": NAN}, current, None)  # type: ignore[arg-type]
    assert not verdict.promoted
