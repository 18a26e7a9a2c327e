import numpy as np
import pytest
import torch

from diffusion_core.metrics.frechet import frechet_distance
from diffusion_core.metrics.statistics import GaussianStatistics, merge_statistics


def exact(mean, covariance, n=10_001):
    return GaussianStatistics(n, np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64) * (n - 1))


def rotation(dim, seed):
    return np.linalg.qr(np.random.RandomState(seed).randn(dim, dim))[0]


def test_distance_of_commuting_covariances_is_the_closed_form():
    turn, generator = rotation(6, 0), np.random.RandomState(1)
    first, second = generator.rand(6) * 3, generator.rand(6)
    mean = generator.randn(6)
    expected = mean @ mean + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    got = frechet_distance(exact(mean, turn * first @ turn.T), exact(np.zeros(6), turn * second @ turn.T))
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_singular_covariances_have_the_closed_form_and_equal_ones_distance_zero(rank):
    turn, generator = rotation(6, 0), np.random.RandomState(1)
    first, second = generator.rand(6) * 3, generator.rand(6)
    first[rank:] = 0.0
    a, b = exact(np.zeros(6), turn * first @ turn.T), exact(np.zeros(6), turn * second @ turn.T)
    assert frechet_distance(a, b) == pytest.approx(((np.sqrt(first) - np.sqrt(second)) ** 2).sum(), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)


def test_distance_is_symmetric_and_survives_a_rotation_of_the_features():
    features, others = (
        np.random.RandomState(0).randn(40, 5),
        np.random.RandomState(1).randn(30, 5) @ np.diag([1, 2, 3, 0.1, 0]),
    )
    turn = rotation(5, 3)
    a, b = GaussianStatistics.from_features(features), GaussianStatistics.from_features(others)
    turned = [GaussianStatistics.from_features(x @ turn) for x in (features, others)]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b), rel=1e-10)


@pytest.mark.parametrize("shards", [1, 3, 16])
def test_distance_agrees_with_torch_fidelity_on_the_same_float64_features(shards):
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    generator = np.random.RandomState(0)
    mixing = generator.randn(48, 48)
    first, second = generator.randn(400, 48) @ mixing, np.abs(generator.randn(300, 48)) @ mixing + 0.3
    theirs = fid.fid_statistics_to_metric(
        fid.fid_features_to_statistics(torch.from_numpy(first)),
        fid.fid_features_to_statistics(torch.from_numpy(second)),
        False,
    )["frechet_inception_distance"]
    ours = frechet_distance(
        merge_statistics(GaussianStatistics.from_features(part) for part in np.array_split(first, shards)),
        merge_statistics(GaussianStatistics.from_features(part) for part in np.array_split(second, shards)),
    )
    assert ours == pytest.approx(theirs, rel=1e-10)


def test_sets_of_different_width_or_one_sample_are_refused():
    with pytest.raises(ValueError, match="one extractor for both"):
        frechet_distance(exact([0], [[1]]), exact([0, 0], np.eye(2)))
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(GaussianStatistics.from_features(np.zeros((1, 2))), exact([0, 0], np.eye(2)))


@pytest.mark.parametrize(("first_n", "second_n"), [(20, 200), (20, 30), (3, 2)])
def test_fewer_samples_than_features_give_the_distance_of_their_statistics(first_n, second_n):
    """Compare with the nuclear norm of the product of the samples, which needs no covariance."""
    generator = np.random.RandomState(first_n)
    first, second = generator.randn(first_n, 64), generator.randn(second_n, 64) * 2 + 1
    a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (first, second))
    delta = first.mean(axis=0) - second.mean(axis=0)
    expected = delta @ delta + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    statistics = [GaussianStatistics.from_features(x) for x in (first, second)]
    assert statistics[0].rank_deficient
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-11)
