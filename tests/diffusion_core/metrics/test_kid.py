import itertools

import numpy as np
import pytest
import torch

from diffusion_core.metrics.kid import kernel_distance, squared_mmd


def sets(n=60, m=50, dim=12):
    generator = np.random.RandomState(0)
    return generator.randn(n, dim), generator.randn(m, dim) * 1.2 + 0.2


def test_distance_agrees_with_torch_fidelity_on_the_same_float64_features():
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    first, second = sets()
    theirs = kid.kid_features_to_metric(
        torch.from_numpy(first), torch.from_numpy(second), kid_subsets=20, kid_subset_size=40, verbose=False
    )
    ours = kernel_distance(first, second, subsets=20, subset_size=40)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-10)


def test_squared_mmd_is_the_double_sum_written_out():
    first, second = sets(6, 5, 3)

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    expected = np.mean([kernel(first[i], first[j]) for i, j in itertools.permutations(range(6), 2)])
    expected += np.mean([kernel(second[i], second[j]) for i, j in itertools.permutations(range(5), 2)])
    expected -= 2 * np.mean([kernel(x, y) for x in first for y in second])
    assert squared_mmd(first, second) == pytest.approx(expected, rel=1e-12)


def test_estimate_is_unbiased_for_equal_distributions():
    generator = np.random.RandomState(1)
    estimates = [squared_mmd(generator.randn(20, 4), generator.randn(20, 4)) for _ in range(800)]
    assert abs(np.mean(estimates)) < 4 * np.std(estimates) / np.sqrt(len(estimates))


def test_impossible_subsets_are_refused():
    first, second = sets()
    with pytest.raises(ValueError, match="2 to 50 samples"):
        kernel_distance(first, second, subset_size=51)
    with pytest.raises(ValueError, match="one extractor for both"):
        kernel_distance(first, second[:, :3], subset_size=10)
