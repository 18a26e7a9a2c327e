from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_core.artifact import DiffusionModel
from diffusion_core.generation import SamplerSettings
from diffusion_core.metrics.extractors import ImageClassifier, build_inception, import_inception_weights, save_extractor
from diffusion_core.metrics.statistics import GaussianStatistics, merge_statistics
from diffusion_core.networks import build_network
from diffusion_core.schedules import make_schedule
from diffusion_core.storage import write_json
from pipelines.evaluation.reference import (
    accuracy,
    load_reference,
    load_statistics,
    save_class_network,
    save_statistics,
    split_statistics,
    train_classifier,
)
from pipelines.evaluation.sweep import Row, _units, pareto_front, sample_labels, sweep_settings
from pipelines.evaluation.units import Unit, Work, evaluate_unit, load_result, save_result
from pipelines.params import Evaluate


def row(fid: float, speed: float) -> Row:
    return Row(SamplerSettings(), 10, fid, 0.5, speed, np.zeros(0))


def test_pareto_front_is_what_no_other_setting_beats_in_both() -> None:
    rows = [row(1.0, 10.0), row(2.0, 20.0), row(3.0, 15.0), row(0.5, 5.0), row(1.0, 9.0)]
    assert pareto_front(rows) == [True, True, False, True, False]
    assert pareto_front([row(1.0, 1.0), row(1.0, 1.0)]) == [True, True]


def test_sample_labels_follow_the_real_classes_exactly() -> None:
    labels = sample_labels([50, 30, 15, 5], 40, seed=0)
    assert np.bincount(labels).tolist() == [20, 12, 6, 2]
    assert not np.array_equal(labels, np.sort(labels))
    for count in (2, 7, 101):
        assert len(sample_labels([3, 3, 1], count, seed=1)) == count


def test_shards_cover_every_sample_once() -> None:
    for count, size in ((1000, 250), (1000, 300), (5, 100)):
        shards = [unit for unit in _units(0, count, size, 8) if not unit.grid]
        covered = [k for unit in shards for k in range(unit.first, unit.first + unit.count)]
        assert covered == list(range(count))


def test_sweep_is_every_eta_with_every_number_of_steps() -> None:
    settings = sweep_settings(Evaluate(etas=[0.0, "sigma_hat"], steps=[2, 3], num_samples=4, guidance_scale=2.0))
    assert [(s.eta, s.steps, s.guidance_scale) for s in settings] == [
        (0.0, 2, 2.0), (0.0, 3, 2.0), ("sigma_hat", 2, 2.0), ("sigma_hat", 3, 2.0),
    ]  # fmt: skip


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
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(reference, model): a class network of stripes, and a diffusion model with random weights."""
    root = tmp_path_factory.mktemp("evaluation")
    cpu = torch.device("cpu")
    images = Stripes(400, 0)
    classifier = train_classifier(images, (8, 8, 1), 2, steps=40, batch_size=64, seed=0, device=cpu)  # type: ignore[arg-type]
    assert accuracy(classifier, Stripes(200, 1), cpu) > 0.98  # type: ignore[arg-type]
    reference = root / "reference"
    reference.mkdir()
    save_class_network(classifier, reference)
    digest = save_extractor(reference, "classifier", classifier.state_dict(), classifier.config)
    from diffusion_core.metrics.extractors import FeatureExtractor

    extractor = FeatureExtractor("classifier", digest, classifier)
    save_statistics({"train": split_statistics(extractor, images, cpu)}, reference / "statistics.safetensors")  # type: ignore[arg-type]
    write_json(
        reference / "reference.json",
        {
            "data_hash": "d",
            "extractor": "classifier",
            "extractor_digest": digest,
            "floor": 0.1,
            "class_counts": [200, 200],
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
    return reference, root / "model"


def work(folders: tuple[Path, Path]) -> Work:
    return Work(str(folders[1]), "digest", str(folders[0]), "d", seed=5, batch_size=8, threads=1)


def test_statistics_do_not_depend_on_how_samples_are_split_into_shards(folders: tuple[Path, Path]) -> None:
    labels = sample_labels([1, 1], 48, seed=0)
    settings = SamplerSettings(steps=3, eta=1.0)

    def measure(size: int) -> tuple[GaussianStatistics, int]:
        units = [unit for unit in _units(0, 48, size, 2) if not unit.grid]
        results = [evaluate_unit(work(folders), u, settings, labels[u.first : u.first + u.count]) for u in units]
        return merge_statistics(r.statistics for r in results if r.statistics), sum(r.agreeing for r in results)

    whole, agreeing = measure(48)
    for size in (8, 16, 24):
        part, part_agreeing = measure(size)
        assert part.n == 48
        assert part_agreeing == agreeing
        assert np.allclose(part.mean, whole.mean, rtol=1e-12, atol=1e-12)
        assert np.allclose(part.scatter, whole.scatter, rtol=1e-10, atol=1e-10)


def test_grid_unit_gives_the_same_noise_at_every_setting(folders: tuple[Path, Path]) -> None:
    unit = Unit(0, 0, 1 << 30, 4, grid=True)
    labels = np.asarray([0, 1, 0, 1])
    one = evaluate_unit(work(folders), unit, SamplerSettings(steps=50), labels).images
    same = evaluate_unit(work(folders), unit, SamplerSettings(steps=50), labels).images
    near = evaluate_unit(work(folders), unit, SamplerSettings(steps=40), labels).images
    other = evaluate_unit(work(folders), Unit(0, 0, 0, 4, grid=True), SamplerSettings(steps=50), labels).images
    assert one is not None
    assert np.array_equal(one, same)
    difference = lambda a: float(np.abs(a.astype(float) - one.astype(float)).mean())  # noqa: E731
    assert difference(near) < 0.5 * difference(other), "the same noise leads to nearly the same image"


def test_finished_units_come_back_and_torn_ones_do_not(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = evaluate_unit(work(folders), Unit(0, 0, 0, 5), SamplerSettings(steps=2), np.asarray([0, 1, 0, 1, 0]))
    path = tmp_path / "unit.safetensors"
    save_result(result, path)
    back = load_result(path)
    assert back is not None
    assert back.statistics is not None
    assert result.statistics is not None
    assert np.array_equal(back.statistics.scatter, result.statistics.scatter)
    assert (back.agreeing, back.seconds, back.statistics.n) == (result.agreeing, result.seconds, 5)
    path.write_bytes(path.read_bytes()[:-10])
    assert load_result(path) is None
    assert load_result(tmp_path / "absent.safetensors") is None


def test_statistics_survive_the_file_bit_for_bit(tmp_path: Path) -> None:
    statistics = GaussianStatistics.from_features(np.random.default_rng(0).normal(size=(30, 5)))
    save_statistics({"train": statistics}, tmp_path / "s.safetensors")
    back = load_statistics(tmp_path / "s.safetensors")["train"]
    assert back.n == 30
    assert np.array_equal(back.mean, statistics.mean)
    assert np.array_equal(back.scatter, statistics.scatter)


def test_reference_of_another_extractor_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "reference"
    shutil.copytree(folders[0], copy)
    other = ImageClassifier(image_size=8, image_channels=1, num_classes=2)
    save_extractor(copy, "classifier", other.state_dict(), other.config)
    with pytest.raises(ValueError, match="statistics of another extractor"):
        load_reference(copy, "d")


def test_inception_with_given_weights_is_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real network with random weights: ours loads the file after its hash is right, and gives torch-fidelity's features."""
    import hashlib

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
    from diffusion_core.metrics.extractors import load_extractor

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
