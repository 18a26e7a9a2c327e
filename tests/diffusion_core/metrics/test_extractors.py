import numpy as np
import pytest
import torch

from diffusion_core.metrics.extractors import (
    FeatureExtractor,
    ImageClassifier,
    _mean_of_quarters,
    load_classifier,
    load_extractor,
    register_with_torch_fidelity,
    save_classifier,
    save_extractor,
)
from diffusion_core.metrics.frechet import frechet_distance
from diffusion_core.metrics.inception_score import inception_score
from diffusion_core.metrics.kid import kernel_distance
from diffusion_core.metrics.statistics import GaussianStatistics


def classifier():
    torch.manual_seed(0)
    return ImageClassifier(image_size=8, image_channels=3, num_classes=4, channels=8, feature_dim=6).eval()


def images(n, seed):
    return torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class Images(torch.utils.data.Dataset):
    def __init__(self, tensor):
        self.tensor = tensor

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, index):
        return self.tensor[index]


def test_torch_fidelity_computes_our_figures_with_our_extractor():
    torch_fidelity = pytest.importorskip("torch_fidelity")
    network = classifier()
    extractor = FeatureExtractor("test-classifier", "0123456789abcdef0123", network)
    name = register_with_torch_fidelity(extractor)
    assert name == "test-classifier-0123456789abcdef" and register_with_torch_fidelity(extractor) == name
    first, second = images(60, 0), images(50, 1)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(first), input2=Images(second), feature_extractor=name, fid=True, kid=True, isc=True,
        kid_subset_size=40, kid_subsets=5, isc_splits=2, cuda=False, verbose=False, save_cpu_ram=True, batch_size=16, cache=False,
    )  # fmt: skip
    a, b = extractor(first).double().numpy(), extractor(second).double().numpy()
    fid = frechet_distance(GaussianStatistics.from_features(a), GaussianStatistics.from_features(b))
    # torch-fidelity keeps features, means and kernels in float32
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    kid = kernel_distance(a, b, subsets=5, subset_size=40)
    assert kid.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3, abs=1e-5)
    logits = network(first)[1].detach().numpy()
    assert inception_score(logits, splits=2).mean == pytest.approx(theirs["inception_score_mean"], rel=1e-5)


def test_saved_classifier_and_extractor_give_the_same_features(tmp_path):
    network, batch = classifier(), images(5, 2)
    expected = network(batch)[0].detach()
    save_classifier(network, tmp_path / "classifier.safetensors")
    assert torch.equal(load_classifier(tmp_path / "classifier.safetensors")(batch)[0], expected)
    digest = save_extractor(tmp_path, "test-classifier", network.state_dict(), network.config)
    loaded = load_extractor(tmp_path)
    assert (loaded.name, loaded.digest) == ("test-classifier", digest)
    assert torch.equal(loaded(batch), expected)
    assert torch.equal(loaded.logits(batch), network(batch)[1])
    save_extractor(tmp_path, "test-classifier", {"other": torch.zeros(1)}, {"image_size": 8})
    with pytest.raises(ValueError, match="does not hold a feature extractor"):
        load_extractor(tmp_path)


def test_damaged_or_foreign_files_are_refused_by_name(tmp_path):
    network = classifier()
    save_extractor(tmp_path, "test-classifier", network.state_dict(), network.config)
    path = tmp_path / "extractor.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        load_extractor(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="cannot read"):
        load_extractor(tmp_path)
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ValueError, match="does not hold an image classifier"):
        load_classifier(tmp_path / "junk")


def test_only_uint8_images_have_features():
    extractor = FeatureExtractor("test-classifier", "0" * 64, classifier())
    with pytest.raises(ValueError, match="uint8"):
        extractor(torch.zeros(1, 3, 8, 8))
    features = extractor(images(3, 0))
    assert features.shape == (3, 6) and features.dtype == torch.float32 and np.isfinite(features.numpy()).all()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 7), (1, 4)])
def test_means_of_quarters_equal_adaptive_pooling(size):
    x = torch.randn(3, 5, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(_mean_of_quarters(x), torch.nn.functional.adaptive_avg_pool2d(x, 2), rtol=0, atol=1e-14)
