from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings, generate_images
from diffusion_core.metrics.extractors import (
    FeatureExtractor,
    ImageClassifier,
    build_inception,
    import_inception_weights,
    load_extractor,
    save_extractor,
)
from diffusion_core.metrics.frechet import frechet_distance
from diffusion_core.metrics.statistics import GaussianStatistics, merge_statistics
from diffusion_core.networks import build_network
from diffusion_core.schedules import make_schedule
from diffusion_core.storage import read_json, write_json
from pipelines import reference as reference_stage
from pipelines.data.shards import read_manifest, write_manifest, write_shards
from pipelines.identity import MACHINERY, import_closure
from pipelines.measurement import reference_writer
from pipelines.measurement.class_network import accuracy, save_class_network, split_features, train_classifier
from pipelines.measurement.floor import balanced_halves, floor_at
from pipelines.measurement.labels import sample_labels
from pipelines.measurement.measure import (
    Measurement,
    distance_with_error,
    jackknife_error,
    leave_one_out,
    measure,
    num_groups,
)
from pipelines.measurement.reference import (
    Reference,
    load_reference,
    load_reference_on,
    load_statistics,
    load_test_features,
    save_statistics,
    save_test_features,
)
from pipelines.measurement.units import Unit, Work, load_result, measure_unit, merge_units, sample_units, save_result
from pipelines.measurement.work import measurement_work, model_fits
from pipelines.params import RunSettings
from pipelines.params.schema import Reference as ReferenceParams
from pipelines.resources import TaskPlan
from pipelines.stage import DATA, METRICS, PLOTS, REFERENCE

CPU = torch.device("cpu")


class Stripes:
    """Two classes that a network can tell: horizontal and vertical stripes, with noise."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, 2, count)
        lines = (np.arange(8) % 2 * 200).astype(np.float64)
        images = np.where(self.labels[:, None, None] == 0, lines[None, :, None], lines[None, None, :])
        self.images = (images + rng.uniform(0, 55, (count, 8, 8))).astype(np.uint8)[:, None]

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: np.ndarray):
        return torch.from_numpy(self.images[indices]), torch.from_numpy(self.labels[indices])

    def batches(self, size: int):
        for start in range(0, len(self), size):
            yield self.gather(np.arange(start, min(start + size, len(self))))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A class network of stripes, its reference, and a diffusion model with random weights."""
    root = tmp_path_factory.mktemp("measurement")
    images = Stripes(400, 0)
    classifier = train_classifier(images, (8, 8, 1), 2, steps=40, batch_size=64, seed=0, device=CPU)  # type: ignore[arg-type]
    assert accuracy(classifier, Stripes(200, 1), CPU) > 0.98  # type: ignore[arg-type]
    folder = root / "reference"
    folder.mkdir()
    save_class_network(classifier, folder)
    digest = save_extractor(folder, "classifier", classifier.state_dict(), classifier.config)
    extractor = FeatureExtractor("classifier", digest, classifier)
    train = np.concatenate(list(split_features(extractor, images, CPU)))  # type: ignore[arg-type]
    save_statistics({"train": GaussianStatistics.from_features(train)}, folder / "statistics.safetensors")
    save_test_features(train[:100], images.labels[:100], folder)
    write_json(
        folder / "reference.json",
        {
            "data_hash": "d",
            "extractor": "classifier",
            "extractor_digest": digest,
            "test_fid": 0.1,
            "class_counts": [300, 100],
        },
    )
    config = {
        "name": "unet", "image_size": 8, "image_channels": 1, "channels": 8, "multipliers": [1, 2], "num_res_blocks": 1,
        "attention_sizes": [], "condition": {"kind": "class", "size": 2},
    }  # fmt: skip
    torch.manual_seed(1)
    network = build_network(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    DiffusionModel(network, config, make_schedule("cosine", 50), "v", 8, 1, ("h", "v"), 0.1).save(root / "model")
    return Work(str(root / "model"), "digest", str(folder), "d", seed=5, rows_per_call=8)


@pytest.fixture(scope="module")
def model(work: Work) -> DiffusionModel:
    return DiffusionModel.load(Path(work.model_dir))


@pytest.fixture(scope="module")
def reference(work: Work) -> Reference:
    return load_reference(Path(work.reference_dir), work.data_hash)


# labels


def test_label_of_a_sample_does_not_depend_on_the_samples_asked_for() -> None:
    everything = sample_labels([142, 9, 0, 77], np.arange(5000), seed=3)
    assert np.array_equal(sample_labels([142, 9, 0, 77], np.arange(100), seed=3), everything[:100])
    some = np.random.default_rng(0).permutation(5000)[:200]
    assert np.array_equal(sample_labels([142, 9, 0, 77], some, seed=3), everything[some])
    assert not np.array_equal(sample_labels([142, 9, 0, 77], np.arange(5000), seed=4), everything)


@pytest.mark.parametrize("counts", [[1, 1], [142, 146, 142, 146, 145], [0, 5, 0, 95, 0], [1, 999], [3] * 100])
def test_each_run_of_samples_has_the_shares_of_the_real_classes(counts: list[int]) -> None:
    shares = np.asarray(counts) / sum(counts)
    for first, seed in ((0, 0), (0, 1), (12345, 2), (2**31 - 3000, 3), (1 << 30, 4)):
        labels = sample_labels(counts, np.arange(first, first + 3000), seed)
        assert labels.dtype == np.int64
        for length in (10, 128, 1000, 3000):
            found = np.bincount(labels[:length], minlength=len(counts))
            assert np.abs(found - shares * length).max() <= 4.0
            assert found[shares == 0].sum() == 0


def test_every_group_of_the_jackknife_has_the_shares_of_the_real_classes() -> None:
    labels = sample_labels([50, 30, 15, 5], np.arange(1000), seed=0)
    for group in range(8):
        assert np.abs(np.bincount(labels[group::8]) / 125 - [0.5, 0.3, 0.15, 0.05]).max() < 0.03


# measurement


def test_measurement_is_that_of_the_images_with_these_indices_and_labels(
    model: DiffusionModel, reference: Reference
) -> None:
    settings = SamplerSettings(steps=3, eta=1.0)
    indices = torch.arange(20, 61)
    labels = sample_labels([300, 100], indices.numpy(), 5)
    images = generate_images(model, torch.from_numpy(labels), indices, settings, seed=5, block_size=8)
    features = reference.extractor(images).double().numpy()
    found = measure(model, reference, indices, settings, seed=5, rows_per_call=8, num_groups=8)
    assert found.num_samples == 41
    for group, statistics in enumerate(found.groups):
        own = GaussianStatistics.from_features(features[indices.numpy() % 8 == group])
        assert statistics.n == own.n
        assert np.allclose(statistics.mean, own.mean, rtol=1e-5, atol=1e-6)
    named = reference.classifier(images)[1].argmax(dim=1).numpy()
    assert found.agreeing == int((named == labels).sum())


def test_network_calls_are_the_calls_that_happened(model: DiffusionModel, reference: Reference) -> None:
    indices = torch.arange(20)  # three calls of 8 rows per step
    plain = measure(model, reference, indices, SamplerSettings(steps=4), seed=0, rows_per_call=8)
    assert plain.network_calls == 12
    happened = 0

    def count(*arguments: object) -> None:
        nonlocal happened
        happened += 1

    handle = model.network.register_forward_hook(count)
    guided = measure(model, reference, indices, SamplerSettings(4, guidance_scale=2.0), seed=0, rows_per_call=8)
    handle.remove()
    assert guided.network_calls == happened
    assert not model.network._forward_hooks


def test_seconds_count_sampling_and_not_features(
    model: DiffusionModel, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    slow = dataclasses.replace(reference, extractor=FeatureExtractor("slow", "", reference.extractor.network))
    extract = slow.extractor._outputs

    def sleeping(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        time.sleep(0.5)
        return extract(images)

    monkeypatch.setattr(slow.extractor, "_outputs", sleeping)
    started = time.perf_counter()
    found = measure(model, slow, torch.arange(16), SamplerSettings(steps=2), seed=0, rows_per_call=8)
    assert time.perf_counter() - started >= 1.0
    assert 0.0 < found.seconds <= time.perf_counter() - started - 1.0


def test_jackknife_error_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=12)
    left_out = [(values.sum() - value) / 11 for value in values]
    assert jackknife_error(left_out) == pytest.approx(values.std(ddof=1) / np.sqrt(12))


def test_jackknife_error_of_a_distance_is_its_spread_over_repetitions() -> None:
    rng = np.random.default_rng(1)
    real = GaussianStatistics.from_features(rng.normal(size=(4000, 6)))
    distances, errors = [], []
    for _ in range(60):
        features = 1.2 * rng.normal(size=(400, 6)) + 0.3
        groups = tuple(GaussianStatistics.from_features(features[group::8]) for group in range(8))
        distance, error = distance_with_error(Measurement(groups, 0, 1.0, 1), real)
        assert error == jackknife_error(leave_one_out(groups, real))
        distances.append(distance)
        errors.append(error)
    assert 0.7 < np.mean(errors) / np.std(distances) < 1.5  # type: ignore[arg-type]


def test_error_is_unknown_if_groups_are_not_kept_apart(reference: Reference) -> None:
    assert (num_groups(512), num_groups(513)) == (8, 1)
    real = reference.statistics["train"]
    assert distance_with_error(Measurement((real,), 0, 1.0, 1), real) == (pytest.approx(0.0, abs=1e-6), None)


# units


def units_of(settings: SamplerSettings, count: int, size: int) -> list[Unit]:
    return sample_units(settings, count, size, rows_per_call=8)


def test_units_cover_every_sample_once_and_share_no_network_call() -> None:
    for count, size in ((1000, 250), (1000, 300), (5, 100), (1000, 1)):
        units = units_of(SamplerSettings(), count, size)
        assert [k for unit in units for k in range(unit.first, unit.first + unit.count)] == list(range(count))
        assert all(unit.first % 8 == 0 for unit in units)


def test_more_samples_extend_the_units_that_exist() -> None:
    few, many = (units_of(SamplerSettings(), count, 16) for count in (64, 160))
    assert many[: len(few)] == few


def test_name_of_a_unit_tells_every_setting_apart() -> None:
    unit = Unit(measure_unit, SamplerSettings(), 0, 8)
    others = [
        dataclasses.replace(unit, first=8),
        dataclasses.replace(unit, count=4),
        dataclasses.replace(unit, compute=dataclasses.replace),
    ]
    values = {"steps": 7, "eta": "sigma_hat", "guidance_scale": 1.5, "spacing": "quadratic"}
    assert set(values) == {field.name for field in dataclasses.fields(SamplerSettings)}
    for name, value in values.items():
        others.append(dataclasses.replace(unit, settings=dataclasses.replace(unit.settings, **{name: value})))
    assert len({unit.name, *(other.name for other in others)}) == 1 + len(others)
    whole = dataclasses.replace(unit, settings=SamplerSettings(eta=0, guidance_scale=1))
    assert whole.name == unit.name


def test_statistics_do_not_depend_on_how_samples_are_split_into_units(work: Work, tmp_path: Path) -> None:
    def merged(size: int) -> Measurement:
        units = units_of(SamplerSettings(steps=3, eta=1.0), 48, size)
        for unit in units:
            save_result(measure_unit(work, unit, CPU), tmp_path, unit)
        return merge_units(units, tmp_path)

    whole = merged(48)
    assert len(whole.groups) == 8
    for size in (8, 16, 24):
        part = merged(size)
        assert (part.num_samples, part.agreeing, part.network_calls) == (48, whole.agreeing, whole.network_calls)
        for one, other in zip(part.groups, whole.groups, strict=True):
            assert np.allclose(one.mean, other.mean, rtol=1e-12, atol=1e-12)
            assert np.allclose(one.scatter, other.scatter, rtol=1e-10, atol=1e-10)


def test_damaged_unit_does_not_count_as_finished(work: Work, tmp_path: Path) -> None:
    (unit,) = units_of(SamplerSettings(steps=2), 5, 8)
    assert load_result(tmp_path, unit) is None
    arrays = measure_unit(work, unit, CPU)
    save_result(arrays, tmp_path, unit)
    back = load_result(tmp_path, unit)
    assert back is not None
    assert all(np.array_equal(back[name], array) for name, array in arrays.items())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    assert load_result(tmp_path, unit) is None


def test_code_of_a_unit_holds_no_machinery_and_nothing_unrelated() -> None:
    for modules in (["pipelines.measurement.reference_writer"], ["pipelines.measurement.work"]):
        assert not set(import_closure(modules)) & set(MACHINERY)
    closure = import_closure(["pipelines.measurement.units"])
    unrelated = ("diffusion_core.editing", "diffusion_core.metrics.kid", "pipelines.data.shards", "pipelines.training")
    for module in closure:
        assert not any(module == name or module.startswith(f"{name}.") for name in (*MACHINERY, *unrelated)), module
    assert "pipelines.measurement.labels" in closure
    assert "diffusion_core.samplers" in closure


# Ray


@pytest.fixture(scope="module")
def ray_of_two() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def die_once(work: Work, unit: Unit, device: torch.device) -> dict[str, np.ndarray]:
    """End the worker the first time, if the unit's number is 8 or above."""
    import os

    marker = Path(work.model_dir) / f"died-{unit.first}"
    if unit.first >= 8 and not marker.exists():
        marker.touch()
        os._exit(1)
    return {"first": np.asarray([unit.first]), "network_calls": np.asarray([1])}


def tell_process(work: Work, unit: Unit, device: torch.device) -> dict[str, np.ndarray]:
    import os

    return {"pid": np.asarray([os.getpid()]), "network_calls": np.asarray([1])}


def fail(work: Work, unit: Unit, device: torch.device) -> dict[str, np.ndarray]:
    raise ValueError("a unit's own error")


PLAN = TaskPlan(max_concurrent=2, cpus=1.0, gpus=0.0, max_retries=1, reason="", request="", remedy="")


def test_unit_of_a_dead_worker_is_computed_again_with_the_reason(
    ray_of_two: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from pipelines.measurement.distributed import run_units

    here = Work(str(tmp_path), "", "", "", 0, 8)
    units = [Unit(die_once, SamplerSettings(steps=2), first, 8) for first in (0, 8)]
    done: list[Unit] = []
    with caplog.at_level(logging.INFO, "rediffuse"):
        run_units(units, here, state_dir=tmp_path / "state", plan=PLAN, on_result=done.append)
    assert sorted(unit.first for unit in done) == [0, 8]
    retries = [record.getMessage() for record in caplog.records if "retry 1 of 1" in record.getMessage()]
    assert len(retries) == 1
    assert "died" in retries[0]
    assert any("2/2 units" in record.getMessage() for record in caplog.records)

    again: list[Unit] = []
    (tmp_path / "died-0").touch()
    caplog.clear()
    with caplog.at_level(logging.INFO, "rediffuse"):
        run_units(units, here, state_dir=tmp_path / "state", plan=PLAN, on_result=again.append)
    assert again == units
    assert "resuming: 2 of 2 units are finished" in caplog.text


def test_each_process_of_the_pool_computes_many_units(ray_of_two: None, tmp_path: Path) -> None:
    from pipelines.measurement.distributed import run_units

    units = [Unit(tell_process, SamplerSettings(steps=2), first, 8) for first in range(0, 96, 8)]
    run_units(units, Work(str(tmp_path), "", "", "", 0, 8), state_dir=tmp_path, plan=PLAN, on_result=lambda unit: None)
    pids = {int(result["pid"].item()) for unit in units if (result := load_result(tmp_path, unit))}
    assert 1 <= len(pids) <= 2, "as many processes as device slots, each with the model loaded once"
    again = [Unit(tell_process, SamplerSettings(steps=3), 0, 8)]
    run_units(again, Work(str(tmp_path), "", "", "", 0, 8), state_dir=tmp_path, plan=PLAN, on_result=lambda unit: None)
    (result,) = [load_result(tmp_path, unit) for unit in again]
    assert result is not None
    assert int(result["pid"].item()) not in pids, "the pool has ended, so that its GPUs are free"


def test_unit_whose_worker_keeps_dying_ends_the_run(ray_of_two: None, tmp_path: Path) -> None:
    from pipelines.measurement.distributed import run_units

    never = dataclasses.replace(PLAN, max_retries=0)
    unit = Unit(die_once, SamplerSettings(steps=2), 16, 8)
    here = Work(str(tmp_path), "", "", "", 0, 8)
    with pytest.raises(ValueError, match="died 1 times, the last time"):
        run_units([unit], here, state_dir=tmp_path, plan=never, on_result=lambda unit: None)


def test_error_of_a_unit_is_raised_and_not_retried(ray_of_two: None, tmp_path: Path) -> None:
    from pipelines.measurement.distributed import run_units

    unit = Unit(fail, SamplerSettings(steps=2), 0, 8)
    with pytest.raises(ValueError, match="a unit's own error"):
        run_units(
            [unit], Work(str(tmp_path), "", "", "", 0, 8), state_dir=tmp_path, plan=PLAN, on_result=lambda unit: None
        )


def test_measurement_on_ray_equals_the_one_in_this_process_and_is_extended_by_more_samples(
    ray_of_two: None, work: Work, model: DiffusionModel, reference: Reference, tmp_path: Path
) -> None:
    from pipelines.measurement.distributed import measure_on_ray

    settings = [SamplerSettings(steps=2), SamplerSettings(steps=3, eta=1.0)]
    seen: list[int] = []
    parts = [units_of(setting, 48, 16) for setting in settings]
    found = measure_on_ray(
        parts, work, state_dir=tmp_path, plan=PLAN, on_measurement=lambda number, _: seen.append(number)
    )
    assert sorted(seen) == [0, 1]
    for one, setting in zip(found, settings, strict=True):
        here = measure(model, reference, torch.arange(48), setting, seed=work.seed, rows_per_call=8, num_groups=8)
        assert (one.num_samples, one.agreeing, one.network_calls) == (48, here.agreeing, here.network_calls)
        assert np.allclose(one.statistics.mean, here.statistics.mean, rtol=1e-6, atol=1e-9)
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    parts = [units_of(setting, 64, 16) for setting in (*settings, SamplerSettings(steps=4))]
    more = measure_on_ray(parts, work, state_dir=tmp_path, plan=PLAN)
    assert [measurement.num_samples for measurement in more] == [64, 64, 64]
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {name: after[name] for name in made} == made
    assert len(after) == len(made) + 2 + 4


# the floor


def test_every_group_is_absent_from_half_of_the_balanced_halves() -> None:
    halves = balanced_halves()
    assert len(halves) == 14
    for group in range(8):
        assert sum(group not in half for half in halves) == 7
    assert all(tuple(group for group in range(8) if group not in half) in halves for half in halves)


class Classes:
    """Five classes of images, whose features are Gaussian around a centre of their own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.mixing = self.rng.normal(size=(24, 24)) * np.exp(-np.arange(24) / 6)[:, None]
        self.centres = 3.0 * self.rng.normal(size=(5, 24))

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Features of images with equal class shares, and their labels, in random order."""
        labels = self.rng.permutation(np.arange(count) % 5)
        return self.rng.normal(size=(count, 24)) @ self.mixing.T + self.centres[labels], labels

    def statistics(self, count: int) -> GaussianStatistics:
        return GaussianStatistics.from_features(self.draw(count)[0])


@pytest.mark.parametrize(("images", "samples"), [(360, 1000), (360, 300), (360, 100), (1000, 20_000)])
def test_floor_is_the_distance_of_as_many_real_images_within_its_error(images: int, samples: int) -> None:
    """The truth is simulated: many sets of ``samples`` images from the distribution of the train images."""
    classes = Classes()
    train = classes.statistics(1500)
    repetitions = 5 if samples > 5000 else 30
    truth = np.mean([frechet_distance(classes.statistics(samples), train) for _ in range(repetitions)])
    floors = [floor_at(*classes.draw(images), train, samples, seed=0) for _ in range(30)]
    assert all(floor.extrapolated == (samples > images) for floor in floors)
    assert all((floor.num_samples, floor.num_images) == (samples, images) for floor in floors)
    values, errors = np.asarray([floor.value for floor in floors]), np.asarray([floor.error for floor in floors])
    assert np.mean(np.abs(values - truth) <= 2.0 * errors) >= 0.9
    assert np.mean(errors) < 3.0 * np.std(values), "the error is not far too large"
    assert abs(values.mean() - truth) < 3.0 * values.std() / np.sqrt(len(values)) + 0.05 * truth


def test_floor_of_few_samples_is_higher_than_the_floor_of_many() -> None:
    """The defect: 359 test images were compared with 1,000 samples, although FID falls with the sample count."""
    classes = Classes()
    train = classes.statistics(1438)
    features, labels = classes.draw(359)
    plain = frechet_distance(GaussianStatistics.from_features(features), train)
    floors = [floor_at(features, labels, train, count, 0).value for count in (50, 150, 359, 1000, 10_000)]
    assert floors == sorted(floors, reverse=True)
    assert floors[2] == pytest.approx(plain)
    assert floors[3] < 0.7 * plain


def test_error_of_a_floor_is_unknown_with_too_few_images() -> None:
    rng = np.random.default_rng(0)
    train = GaussianStatistics.from_features(rng.normal(size=(500, 64)))
    for images in (2, 20, 100):
        floor = floor_at(rng.normal(size=(images, 64)), np.zeros(images, dtype=np.int64), train, 1000, 0)
        assert floor.error is None
        assert floor.extrapolated == (images == 100)
        assert floor.value >= 0.0


def test_floor_of_too_few_images_for_groups_is_the_fid_of_them_and_says_so() -> None:
    """The defect: the FID of 20 images was called an extrapolation to 1,000."""
    rng = np.random.default_rng(0)
    train = GaussianStatistics.from_features(rng.normal(size=(500, 8)))
    features = rng.normal(size=(20, 8))
    floor = floor_at(features, np.arange(20) % 2, train, 1000, 0)
    assert (floor.num_samples, floor.num_images, floor.extrapolated, floor.error) == (20, 20, False, None)
    assert floor.value == frechet_distance(GaussianStatistics.from_features(features), train)


def test_floor_of_the_digits_is_near_the_distance_of_held_out_digits() -> None:
    """Pixels of real digits: a floor extrapolated from 240 of them is that of 600 others within its error."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    digits = data.data[order][:, [18, 19, 20, 26, 27, 28, 34, 35, 36, 42, 43, 44]] / 16.0
    train = GaussianStatistics.from_features(digits[:900])
    truth = frechet_distance(GaussianStatistics.from_features(digits[900:1500]), train)
    floor = floor_at(digits[1500:1740], data.target[order][1500:1740], train, 600, 0)
    assert floor.extrapolated
    assert floor.error is not None
    assert abs(floor.value - truth) < 2.0 * floor.error


# the reference


class _Params:
    """The params that dvc.yaml declares for reference."""

    seed = 3
    reference = ReferenceParams(extractor="classifier", classifier_steps=20, classifier_batch_size=16)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prepared data set of stripes in the current folder."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")  # MLflow sets both, and this restores them after the test
    monkeypatch.chdir(tmp_path)
    write_stripes(80)


def write_stripes(test_images: int) -> None:
    """Write a data set of stripes into the current folder."""
    counts = {"train": 160, "test": test_images}
    DATA.mkdir(parents=True)
    shards, class_counts = {}, {}
    for seed, (split, count) in enumerate(counts.items()):
        images = Stripes(count, seed)
        shards[split] = write_shards(DATA, split, [(images.images.transpose(0, 2, 3, 1), images.labels)], 100)
        class_counts[split] = np.bincount(images.labels).tolist()
    write_manifest(
        DATA,
        shape=[8, 8, 1],
        class_names=["h", "v"],
        transform={"image_size": 8},
        shards=shards,
        counts=counts,
        class_counts=class_counts,
        skipped=[],
    )


def outputs() -> dict[str, bytes]:
    paths = [*REFERENCE.iterdir(), METRICS / "reference.json", PLOTS / "reference_classifier.csv"]
    return {path.name: path.read_bytes() for path in paths}


def test_reference_is_computed_once_and_copied_back_unless_it_is_damaged(
    prepared: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """DVC deletes the outputs and runs the stage again for a changed comment. On a GPU a second class network would differ."""
    computed = 0

    def train_differently(*arguments: object, **options: object) -> ImageClassifier:
        nonlocal computed
        computed += 1
        return train_classifier(*arguments, **{**options, "seed": computed})  # type: ignore[arg-type]

    monkeypatch.setattr(reference_writer, "train_classifier", train_differently)
    caplog.set_level(logging.INFO, "rediffuse")

    def run() -> dict[str, bytes]:
        for folder in (REFERENCE, METRICS, PLOTS):
            shutil.rmtree(folder, ignore_errors=True)
        caplog.clear()
        reference_stage.reference(_Params(), RunSettings())  # type: ignore[arg-type]
        load_reference(REFERENCE, read_manifest(DATA).content_hash)
        assert "class network trained on cpu" in caplog.text
        return outputs()

    first = run()
    assert "finished state found" not in caplog.text
    assert run() == first
    assert "finished state found" in caplog.text
    monkeypatch.setattr(reference_stage, "driver_device", lambda device: torch.device("cuda"))
    assert run() == first, "the device type is not part of the key"
    monkeypatch.undo()
    assert computed == 1


def test_damaged_or_other_state_of_the_reference_is_computed_again(
    prepared: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rediffuse")
    reference_stage.reference(_Params(), RunSettings())  # type: ignore[arg-type]
    first = outputs()
    (kept,) = Path("runs/reference").glob("*/finished/reference/classifier.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    reference_stage.reference(_Params(), RunSettings())  # type: ignore[arg-type]
    assert "is damaged in classifier.safetensors: computing it again" in caplog.text
    assert outputs() == first, "deterministic on a CPU"
    caplog.clear()

    class Other(_Params):
        seed = 4

    reference_stage.reference(Other(), RunSettings())  # type: ignore[arg-type]
    assert "finished state found" not in caplog.text
    assert outputs()["classifier.safetensors"] != first["classifier.safetensors"]


def test_reference_continued_by_force_names_the_changed_modules(prepared: None) -> None:
    reference_stage.reference(_Params(), RunSettings())  # type: ignore[arg-type]
    assert "continued_across_changes" not in read_json(REFERENCE / "reference.json")
    (identity,) = Path("runs/reference").glob("*/identity.json")
    old = read_json(identity)
    changed = {**old, "code": {**old["code"], "pipelines.measurement.class_network": "other"}}
    other = Path("runs/reference/0123456789abcdef")
    identity.parent.rename(other)
    write_json(other / "identity.json", changed)
    reference_stage.reference(_Params(), RunSettings(resume="force"))  # type: ignore[arg-type]
    description = read_json(REFERENCE / "reference.json")
    assert description["continued_across_changes"] == ["pipelines.measurement.class_network"]


def test_work_of_a_model_is_identified_by_every_file_that_decides_a_unit(
    work: Work, reference: Reference, tmp_path: Path
) -> None:
    folder = shutil.copytree(work.reference_dir, tmp_path / "reference")
    options = {"seed": 5, "rows_per_call": 8, "device_type": "cpu"}
    made, settings, inputs = measurement_work(Path(work.model_dir), folder, reference, **options)  # type: ignore[arg-type]
    assert settings == options
    assert (made.model_dir, made.reference_dir, made.data_hash) == (work.model_dir, str(folder), "d")
    assert inputs["model"] == made.model_digest
    save_class_network(ImageClassifier(image_size=8, image_channels=1, num_classes=2), folder)
    _, _, other = measurement_work(Path(work.model_dir), folder, reference, **options)  # type: ignore[arg-type]
    assert {name for name in inputs if inputs[name] != other[name]} == {"classifier"}


def test_model_fits_data_of_its_classes_size_and_channels(model: DiffusionModel, prepared: None) -> None:
    manifest = read_manifest(DATA)
    assert model_fits(model, manifest)
    for other in ({"class_names": ("h", "w")}, {"shape": (16, 16, 1)}, {"shape": (8, 8, 3)}):
        assert not model_fits(model, dataclasses.replace(manifest, **other))  # type: ignore[arg-type]


def test_reference_on_a_device_is_loaded_once_per_process(work: Work) -> None:
    first = load_reference_on(work.reference_dir, work.data_hash, CPU)
    assert load_reference_on(work.reference_dir, work.data_hash, CPU) is first


def test_statistics_and_features_survive_their_files_bit_for_bit(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    statistics = GaussianStatistics.from_features(features)
    save_statistics({"train": statistics}, tmp_path / "s.safetensors")
    labels = np.arange(30) % 3
    save_test_features(features, labels, tmp_path)
    back = load_statistics(tmp_path / "s.safetensors")["train"]
    assert back.n == 30
    assert np.array_equal(back.mean, statistics.mean)
    assert np.array_equal(back.scatter, statistics.scatter)
    loaded = load_test_features(tmp_path)
    assert np.array_equal(loaded[0], features)
    assert np.array_equal(loaded[1], labels)


def test_merged_batches_have_the_statistics_of_the_whole_split(reference: Reference) -> None:
    images = Stripes(600, 3)
    batches = list(split_features(reference.extractor, images, CPU))  # type: ignore[arg-type]
    assert len(batches) > 1
    merged = merge_statistics(GaussianStatistics.from_features(batch) for batch in batches)
    whole = GaussianStatistics.from_features(reference.extractor(torch.from_numpy(images.images)).numpy())
    assert merged.n == 600
    assert np.allclose(merged.mean, whole.mean, rtol=1e-5)
    assert np.allclose(merged.covariance, whole.covariance, rtol=1e-3, atol=1e-5)


def test_reference_that_does_not_fit_is_refused_with_the_remedy(work: Work, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return shutil.copytree(work.reference_dir, tmp_path / name)

    with pytest.raises(
        ValueError, match=r"belongs to other data: made of data d, not of e: run the reference stage again"
    ):
        load_reference(Path(work.reference_dir), "e")
    other = ImageClassifier(image_size=8, image_channels=1, num_classes=2)
    folder = damaged("other")
    save_extractor(folder, "classifier", other.state_dict(), other.config)
    with pytest.raises(ValueError, match="statistics of another extractor: run the reference stage again"):
        load_reference(folder, "d")
    folder = damaged("old")
    write_json(
        folder / "reference.json", {k: v for k, v in read_json(folder / "reference.json").items() if k != "test_fid"}
    )
    with pytest.raises(ValueError, match="lacks test_fid: run the reference stage again"):
        load_reference(folder, "d")
    for file in ("reference.json", "extractor.safetensors", "classifier.safetensors", "statistics.safetensors"):
        folder = damaged(f"torn-{file}")
        (folder / file).write_bytes((folder / file).read_bytes()[:-10])
        with pytest.raises(ValueError, match="run the reference stage again"):
            load_reference(folder, "d")
    (folder / "test_features.safetensors").unlink()
    with pytest.raises(ValueError, match="run the reference stage again"):
        load_test_features(folder)


def test_inception_with_given_weights_is_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real network with random weights: ours checks the file's hash, loads it, and gives torch-fidelity's features."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with monkeypatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    weights = import_inception_weights(path, digest.upper())
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(build_inception(weights)(images)[0], network(images)[0])
    folder = tmp_path / "reference"
    folder.mkdir()
    save_extractor(folder, "inception-v3-compat", weights, {})
    extractor = load_extractor(folder)
    assert torch.equal(extractor(images), network(images)[0])
    grey = images[:, :1]
    assert torch.equal(extractor(grey), network(grey.expand(-1, 3, -1, -1))[0])
    with pytest.raises(ValueError, match="expected 000"):
        import_inception_weights(path, "0" * 64)
    with pytest.raises(ValueError, match="expected 6726825d"):
        import_inception_weights(path, None)
    with pytest.raises(ValueError, match="not the weights of"):
        build_inception({"x": torch.zeros(1)})
