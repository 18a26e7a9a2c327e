from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings, generate_images
from diffusion_core.metrics.extractors import ImageClassifier
from diffusion_core.metrics.frechet import frechet_distance
from diffusion_core.metrics.statistics import GaussianStatistics
from diffusion_core.networks import build_network
from diffusion_core.schedules import make_schedule
from diffusion_core.storage import file_sha256, read_json, write_json
from pipelines import evaluate as stage
from pipelines.data.shards import SPLITS, open_split, write_manifest, write_shards
from pipelines.evaluation.figures import floor_label
from pipelines.evaluation.samples import PICTURE_FIRST, picture_unit
from pipelines.evaluation.sweep import Row, is_suspicious, make_row, pareto_front, sweep_settings
from pipelines.evaluation.trajectory import trajectory_unit
from pipelines.identity import MACHINERY, closure_digest, import_closure
from pipelines.measurement.class_network import save_class_network
from pipelines.measurement.floor import Floor
from pipelines.measurement.measure import Measurement
from pipelines.measurement.reference_writer import write_reference
from pipelines.measurement.units import Unit, Work, load_result, measure_unit, merge_units, save_result
from pipelines.params import EvaluateRun, RunSettings
from pipelines.params.schema import Evaluate
from pipelines.resources import Node, TaskPlan, plan_units
from pipelines.stage import DATA, EVALUATION, MODEL, REFERENCE
from pipelines.tables import read_csv

CPU = torch.device("cpu")


def write_inputs(class_names: tuple[str, ...]) -> None:
    """Write a data set of 8x8 noise and its reference into the current folder."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % len(class_names)
    chunks = [(rng.integers(0, 256, (120, 8, 8, 1), dtype=np.uint8), labels)]
    DATA.mkdir(parents=True)
    manifest = write_manifest(
        DATA,
        shape=[8, 8, 1],
        class_names=list(class_names),
        transform={"image_size": 8},
        shards={split: write_shards(DATA, split, chunks, 200) for split in SPLITS},
        counts=dict.fromkeys(SPLITS, 120),
        class_counts=dict.fromkeys(SPLITS, np.bincount(labels).tolist()),
        skipped=[],
    )
    REFERENCE.mkdir()
    write_reference(
        REFERENCE,
        manifest,
        {split: open_split(DATA, split) for split in SPLITS},
        extractor_name="classifier",
        inception=None,
        steps=4,
        batch_size=16,
        seed=0,
        device=CPU,
        on_step=lambda step, loss: None,
    )


def measure_here(
    parts: Sequence[Sequence[Unit]],
    work: Work,
    *,
    state_dir: Path,
    plan: TaskPlan,
    others: Sequence[Unit] = (),
    on_measurement: Callable[[int, Measurement], None] = lambda number, measurement: None,
) -> list[Measurement]:
    """Stand in for `measure_on_ray`: compute the units in this process."""
    for unit in [*(unit for units in parts for unit in units), *others]:
        if load_result(state_dir, unit) is None:
            save_result(unit.compute(work, unit, CPU), state_dir, unit)
    measurements = [merge_units(units, state_dir) for units in parts]
    for number, measurement in enumerate(measurements):
        on_measurement(number, measurement)
    return measurements


def without_ray(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Let a module measure in this process, as on a cluster of one node with two CPUs."""
    patch.setattr(module, "ray_session", lambda settings: contextlib.nullcontext())
    patch.setattr(module, "cluster_nodes", lambda: [Node(2.0)])
    patch.setattr(module, "place", lambda plan: None)
    patch.setattr(module, "check_shared", lambda folders: None)
    patch.setattr(module, "measure_on_ray", measure_here)


def row(fid: float, speed: float = 1.0, error: float | None = None) -> Row:
    return Row(SamplerSettings(), 10, fid, error, 0.5, speed)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A diffusion model of three classes with random weights."""
    folder = tmp_path_factory.mktemp("evaluation") / "model"
    config = {
        "name": "unet", "image_size": 8, "image_channels": 1, "channels": 8, "multipliers": [1, 2], "num_res_blocks": 1,
        "attention_sizes": [], "condition": {"kind": "class", "size": 3},
    }  # fmt: skip
    torch.manual_seed(1)
    network = build_network(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    DiffusionModel(network, config, make_schedule("cosine", 50), "v", 8, 1, ("a", "b", "c"), 0.1).save(folder)
    return Work(str(folder), "digest", "unused", "d", seed=5, rows_per_call=8)


def test_pareto_front_is_what_no_other_setting_beats_in_both() -> None:
    rows = [row(1.0, 10.0), row(2.0, 20.0), row(3.0, 15.0), row(0.5, 5.0), row(1.0, 9.0)]
    assert pareto_front(rows) == [True, True, False, True, False]
    assert pareto_front([row(1.0, 1.0), row(1.0, 1.0)]) == [True, True]


def test_sweep_is_every_eta_with_every_number_of_steps() -> None:
    settings = sweep_settings([0.0, "sigma_hat"], [2, 3], 2.0, "quadratic")
    assert [(s.eta, s.steps, s.guidance_scale, s.spacing) for s in settings] == [
        (0.0, 2, 2.0, "quadratic"),
        (0.0, 3, 2.0, "quadratic"),
        ("sigma_hat", 2, 2.0, "quadratic"),
        ("sigma_hat", 3, 2.0, "quadratic"),
    ]


def test_row_holds_what_was_measured() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(80, 3))
    groups = tuple(GaussianStatistics.from_features(features[group::8]) for group in range(8))
    real = GaussianStatistics.from_features(rng.normal(size=(200, 3)))
    found = make_row(SamplerSettings(), Measurement(groups, agreeing=60, seconds=16.0, network_calls=9), real)
    assert (found.num_samples, found.class_agreement, found.images_per_s) == (80, 0.75, 5.0)
    assert found.fid == pytest.approx(frechet_distance(GaussianStatistics.from_features(features), real))
    assert found.fid_error is not None


def test_figure_is_suspicious_below_the_floor_by_more_than_the_error() -> None:
    floor = Floor(1.0, 0.3, 1000, 359, extrapolated=True)
    assert not is_suspicious(row(0.75), floor)
    assert is_suspicious(row(0.65), floor)
    assert not is_suspicious(row(0.55, error=0.4), floor), "the errors of both count: 0.5"
    assert is_suspicious(row(0.45, error=0.4), floor)
    assert not is_suspicious(row(2.0, error=0.1), floor)
    assert not is_suspicious(row(0.0), Floor(1.0, None, 1000, 20, extrapolated=True))


def test_label_of_the_floor_states_counts_and_extrapolation() -> None:
    assert floor_label(Floor(1.0, 0.3, 1000, 359, True)) == "floor: 1000 real images, extrapolated from 359"
    assert floor_label(Floor(1.0, 0.3, 100, 359, False)) == "floor: 100 of 359 real test images"
    assert floor_label(Floor(1.0, 0.3, 300, 359, False)) == "floor: 300 real images, interpolated from 359"
    assert floor_label(Floor(1.0, 0.3, 359, 359, False)) == "floor: FID of the 359 test images"
    assert floor_label(Floor(1.0, None, 20, 20, False)) == "floor: FID of the 20 test images, error unknown"
    assert floor_label(Floor(1.0, None, 900, 300, True)).endswith("extrapolated from 300, error unknown")


def test_picture_has_one_column_per_class_and_the_same_noise_at_every_setting(work: Work) -> None:
    def images(unit: Unit) -> np.ndarray:
        return unit.compute(work, unit, CPU)["images"]

    unit = picture_unit(SamplerSettings(steps=50), 3, rows=2)
    model = DiffusionModel.load(Path(work.model_dir))
    indices = torch.arange(PICTURE_FIRST, PICTURE_FIRST + 6)
    expected = generate_images(model, torch.tensor([0, 1, 2, 0, 1, 2]), indices, unit.settings, seed=5)
    assert np.array_equal(images(unit), expected.numpy())
    near = images(picture_unit(SamplerSettings(steps=40), 3, rows=2))
    other = images(Unit(unit.compute, unit.settings, 0, 6))
    difference = lambda a: float(np.abs(a.astype(float) - expected.numpy().astype(float)).mean())  # noqa: E731
    assert difference(near) < 0.5 * difference(other), "the same noise leads to nearly the same image"
    assert picture_unit(SamplerSettings(), 100, rows=2).count == 24


def test_trajectory_ends_in_the_image_that_sampling_gives(work: Work) -> None:
    unit = trajectory_unit(SamplerSettings(steps=20), 4)
    found = unit.compute(work, unit, CPU)
    assert found["x"].shape == found["x0"].shape == (4, 9, 1, 8, 8)
    assert found["labels"].tolist() == [0, 1, 2, 0]
    assert found["network_calls"].tolist() == [20]
    times = found["times"].tolist()
    assert times[-1] == -1
    assert times == sorted(set(times), reverse=True)
    model = DiffusionModel.load(Path(work.model_dir))
    labels = torch.from_numpy(found["labels"])
    images = generate_images(model, labels, torch.arange(4), unit.settings, seed=5, block_size=4)
    assert np.array_equal(found["x"][:, -1], images.numpy())
    few = trajectory_unit(SamplerSettings(steps=3), 2)
    assert few.compute(work, few, CPU)["times"].shape == (3,)


def test_code_of_the_evaluation_holds_no_machinery() -> None:
    closure = import_closure([f"pipelines.evaluation.{name}" for name in ("sweep", "samples", "trajectory", "figures")])
    for module in closure:
        assert not any(module == name or module.startswith(f"{name}.") for name in MACHINERY), module


class _Params:
    """The params that dvc.yaml declares for evaluate."""

    seed = 5
    evaluate = Evaluate(
        etas=[0.0, 1.0],
        steps=[2, 3],
        num_samples=40,
        shard_size=16,
        batch_size=8,
        guidance_scale=1.0,
        spacing="trailing",
        picture_rows=2,
        trajectory_images=2,
    )


@pytest.fixture
def inputs(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set, the reference and the model in the current folder, and units without Ray."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")  # MLflow sets both, and this restores them after the test
    monkeypatch.chdir(tmp_path)
    write_inputs(("a", "b", "c"))
    shutil.copytree(work.model_dir, MODEL)
    without_ray(stage, monkeypatch)


def test_quality_names_all_that_a_figure_depends_on_and_a_forced_sweep(inputs: None) -> None:
    stage.evaluate(_Params(), RunSettings())  # type: ignore[arg-type]
    quality = read_json(EVALUATION / "quality.json")
    assert (quality["seed"], quality["rows_per_call"], quality["device_type"]) == (5, 8, "cpu")
    assert quality["measured_by"] == closure_digest(measure_unit)
    assert quality["model_digest"] == file_sha256(MODEL / "model.safetensors")
    assert quality["classifier_digest"] == file_sha256(REFERENCE / "classifier.safetensors")
    assert quality["floor_label"] == "floor: 40 of 120 real test images"
    assert quality["continued_across_changes"] == []
    names = {row["setting"] for row in read_csv(EVALUATION / "sweep.csv")}
    assert {path.stem for path in (EVALUATION / "samples").iterdir()} == names
    assert len(names) == 4

    (identity,) = Path("runs/evaluate").glob("*/identity.json")
    old = read_json(identity)
    other = Path("runs/evaluate/0123456789abcdef")
    identity.parent.rename(other)
    write_json(other / "identity.json", {**old, "code": {**old["code"], "diffusion_core.samplers": "other"}})
    finished = {path.name: path.stat().st_mtime_ns for path in other.glob("*.safetensors")}
    stage.evaluate(_Params(), RunSettings(resume="force"))  # type: ignore[arg-type]
    assert {path.name: path.stat().st_mtime_ns for path in other.glob("*.safetensors")} == finished
    forced = read_json(EVALUATION / "quality.json")
    assert forced["continued_across_changes"] == ["diffusion_core.samplers"]
    assert forced["rows"] == quality["rows"]


def test_another_class_network_measures_again(inputs: None) -> None:
    stage.evaluate(_Params(), RunSettings())  # type: ignore[arg-type]
    save_class_network(ImageClassifier(image_size=8, image_channels=1, num_classes=3), REFERENCE)
    stage.evaluate(_Params(), RunSettings())  # type: ignore[arg-type]
    assert len(list(Path("runs/evaluate").glob("*/identity.json"))) == 2


def test_plan_counts_the_units_that_are_computed(inputs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []

    def plan(run: EvaluateRun, *, num_units: int, nodes: Sequence[Node]) -> TaskPlan:
        planned.append(num_units)
        return plan_units(run, num_units=num_units, nodes=nodes)

    monkeypatch.setattr(stage, "plan_units", plan)
    stage.evaluate(_Params(), RunSettings())  # type: ignore[arg-type]
    assert planned == [len(list(Path("runs/evaluate").glob("*/*.safetensors")))]


def test_model_of_other_classes_is_refused(inputs: None) -> None:
    shutil.rmtree(DATA)
    shutil.rmtree(REFERENCE)
    write_inputs(("a", "b", "d"))
    with pytest.raises(ValueError, match="other classes, image sizes or channels"):
        stage.evaluate(_Params(), RunSettings())  # type: ignore[arg-type]
