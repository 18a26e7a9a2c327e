import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.metrics.frechet import frechet_distance
from diffusion_core.metrics.statistics import GaussianStatistics, merge_statistics


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    offset=st.sampled_from([0.0, 1e3, 1e6]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_merging_shards_in_any_order_gives_the_statistics_of_the_whole(sizes, offset, seed):
    features = offset + np.random.RandomState(seed).randn(sum(sizes), 4)
    shards = np.split(features, np.cumsum(sizes)[:-1])
    orders = list(itertools.permutations(range(len(shards))))[:: max(1, len(shards) ** 2)]
    for order in orders:
        merged = merge_statistics(GaussianStatistics.from_features(shards[i]) for i in order)
        assert merged.n == len(features)
        np.testing.assert_allclose(merged.mean, features.mean(axis=0), rtol=1e-13, atol=1e-13 * max(offset, 1))
        if len(features) > 1:
            expected = np.cov(features, rowvar=False)
            np.testing.assert_allclose(merged.covariance, expected, rtol=1e-10, atol=1e-12 * max(offset, 1))


def test_any_order_gives_the_same_bits_and_nesting_agrees_to_rounding():
    parts = [GaussianStatistics.from_features(np.random.RandomState(i).randn(5 + i % 2, 3)) for i in range(4)]
    first = merge_statistics(parts)
    for order in itertools.permutations(parts):
        again = merge_statistics(order)
        assert np.array_equal(first.scatter, again.scatter) and np.array_equal(first.mean, again.mean)
    one, other = parts[0].merge(parts[1]), parts[1].merge(parts[0])
    assert np.array_equal(one.scatter, other.scatter) and np.array_equal(one.mean, other.mean)
    nested = merge_statistics([merge_statistics(parts[:2]), merge_statistics(parts[2:])])
    np.testing.assert_allclose(nested.scatter, first.scatter, rtol=1e-13)


def test_float32_features_are_summed_in_float64():
    features = (1e4 + np.random.RandomState(0).randn(1000, 2)).astype(np.float32)
    got = GaussianStatistics.from_features(features)
    np.testing.assert_allclose(got.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)
    assert not got.rank_deficient and GaussianStatistics.from_features(features[:2]).rank_deficient


@pytest.mark.parametrize(
    ("features", "named"),
    [(np.zeros(3), "matrix"), (np.zeros((0, 3)), "at least one row"), (np.array([[1.0, np.nan]]), "NaN")],
)
def test_bad_features_are_refused(features, named):
    with pytest.raises(ValueError, match=named):
        GaussianStatistics.from_features(features)


def test_impossible_statistics_are_refused():
    one = GaussianStatistics.from_features(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="at least two samples"):
        _ = one.covariance
    with pytest.raises(ValueError, match="2 and 3"):
        one.merge(GaussianStatistics.from_features(np.zeros((1, 3))))
    with pytest.raises(ValueError, match="no statistics"):
        merge_statistics([])
    with pytest.raises(ValueError, match=r"mean \(D,\)"):
        GaussianStatistics(5, np.zeros(2), np.zeros((3, 3)))


def test_statistics_of_no_samples_change_nothing():
    some, none = GaussianStatistics.from_features(np.random.RandomState(0).randn(5, 2)), GaussianStatistics.empty(2)
    for merged in (some.merge(none), none.merge(some), merge_statistics([none, some, none])):
        assert merged.n == 5 and np.array_equal(merged.scatter, some.scatter)
    assert none.merge(none).n == 0


def test_published_moments_give_the_statistics_of_their_samples():
    """A published file holds numpy's mean and covariance, here in float32 as some tools write it."""
    features = np.random.RandomState(0).randn(50, 4) @ np.random.RandomState(1).randn(4, 4) + 3
    exact = GaussianStatistics.from_features(features)
    mu, sigma = features.mean(axis=0), np.cov(features, rowvar=False)
    got = GaussianStatistics.from_moments(mu, sigma, 50)
    np.testing.assert_allclose(got.scatter, exact.scatter, rtol=1e-12)
    np.testing.assert_allclose(got.covariance, sigma, rtol=1e-12)
    assert frechet_distance(got, exact) == pytest.approx(0.0, abs=1e-9) and not got.rank_deficient
    other = GaussianStatistics.from_features(np.random.RandomState(2).randn(40, 4))
    rounded = GaussianStatistics.from_moments(mu.astype(np.float32), sigma.astype(np.float32), 50)
    assert frechet_distance(rounded, other) == pytest.approx(frechet_distance(exact, other), rel=1e-5)
    merged = got.merge(other)
    np.testing.assert_allclose(merged.covariance, exact.merge(other).covariance, rtol=1e-12)
    few = GaussianStatistics.from_moments(np.zeros(4), np.diag([1.0, 2, 0, 0]), 3)
    assert few.rank_deficient and frechet_distance(few, few) == pytest.approx(0.0, abs=1e-12)
    assert got.covariance.flags.writeable and not np.shares_memory(got.scatter, sigma)


@pytest.mark.parametrize(
    ("mean", "covariance", "n", "named"),
    [
        (np.zeros(2), np.eye(2), 1, "at least 2"),
        (np.zeros(2), np.eye(2), 10.5, "whole number"),
        (np.zeros(2), np.eye(2), None, "whole number"),
        (np.zeros(2), np.eye(3), 10, r"a mean \(D,\)"),
        (np.eye(2), np.eye(2), 10, r"a mean \(D,\)"),
        (np.array([0.0, np.nan]), np.eye(2), 10, "NaN"),
        (np.zeros(2), np.array([[1.0, np.inf], [np.inf, 1.0]]), 10, "NaN or infinity"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), 10, "symmetric"),
        (np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]), 10, "negative eigenvalue"),
    ],
)
def test_moments_that_are_no_mean_and_covariance_are_refused(mean, covariance, n, named):
    with pytest.raises(ValueError, match=named):
        GaussianStatistics.from_moments(mean, covariance, n)
