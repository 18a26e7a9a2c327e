import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusion_core.ema import (
    EMA,
    PowerSnapshot,
    half_life_decay,
    post_hoc_coefficients,
    power_decay,
    power_gamma,
    reconstruct_ema,
    warmup_decay,
)


class Scalar(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))


def averaged(values, **options):
    """The EMA after each of ``values``, the weights after step 1, 2, ..."""
    network = Scalar(123.0)  # what the network is before step 1 should be forgotten
    ema, result = EMA(network, **options), []
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            network.weight.fill_(value)
            network.count.fill_(step)
        ema.update(network, step)
        result.append(float(ema.network.weight))
    assert int(ema.network.count) == len(values)
    return result


def test_average_follows_the_recursion_with_warm_up():
    values, expected = [1.0, -2.0, 5.0, 0.5] * 30, 123.0
    for step, value in enumerate(values, start=1):
        decay = min(0.95, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert averaged(values, decay=0.95)[-1] == pytest.approx(expected, rel=1e-12)
    assert warmup_decay(10**9, 0.95) == 0.95


def test_average_starts_as_a_copy_that_training_does_not_change():
    network = Scalar(2.0)
    ema = EMA(network)
    with torch.no_grad():
        network.weight.fill_(7.0)
    assert float(ema.network.weight) == 2.0
    assert not ema.network.weight.requires_grad and network.weight.requires_grad


@given(half_life=st.floats(1e2, 1e6), batch_size=st.integers(1, 4096))
@settings(max_examples=50, deadline=None)
def test_weights_a_half_life_ago_count_half_for_any_batch_size(half_life, batch_size):
    decay = half_life_decay(10**9, half_life, batch_size)
    assert decay ** (half_life / batch_size) == pytest.approx(0.5, rel=1e-6)


def test_half_life_ramps_up_with_the_images_seen():
    assert half_life_decay(10, 1e6, 64) == pytest.approx(0.5 ** (64 / (10 * 64 * 0.05)))
    assert half_life_decay(10, 1e6, 64, ramp=None) == pytest.approx(0.5 ** (64 / 1e6))
    with pytest.raises(ValueError, match="above 0"):
        half_life_decay(1, 0, 64)


@given(sigma_rel=st.floats(0.01, 0.288))
@settings(max_examples=50, deadline=None)
def test_power_profile_has_the_relative_width_asked_for(sigma_rel):
    gamma = power_gamma(sigma_rel)
    # the density (gamma + 1) t^gamma on [0, 1] is Beta(gamma + 1, 1)
    a, b = gamma + 1.0, 1.0
    assert math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1))) == pytest.approx(sigma_rel, rel=1e-9)


def test_published_exponents_of_the_paper_are_met():
    assert power_gamma(0.05) == pytest.approx(16.97, abs=0.005)  # arXiv 2312.02696, section 3.1
    assert power_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    for wrong in (0.0, -0.1, 0.3):
        with pytest.raises(ValueError, match="relative width"):
            power_gamma(wrong)


@given(sigma_rel=st.floats(0.02, 0.28), length=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_power_average_weighs_each_step_as_its_profile_does(sigma_rel, length):
    values = np.random.RandomState(0).randn(length)
    exponent = power_gamma(sigma_rel) + 1
    edges = (np.arange(length + 1) / length) ** exponent
    got = averaged(values, decay_at=lambda step: power_decay(step, sigma_rel))[-1]
    assert got == pytest.approx(float(np.diff(edges) @ values), rel=1e-9, abs=1e-12)


def snapshots_of(values, every, sigma_rels):
    result = []
    for sigma_rel in sigma_rels:
        track = averaged(values, decay_at=lambda step, s=sigma_rel: power_decay(step, s))
        result += [
            PowerSnapshot(step, sigma_rel, {"weight": torch.tensor([track[step - 1]], dtype=torch.float64)})
            for step in range(every, len(values) + 1, every)
        ]
    return result


def test_reconstruction_of_a_saved_average_is_that_average():
    values = np.random.RandomState(1).randn(256).cumsum()
    snapshots = snapshots_of(values, 32, (0.05, 0.10))
    for snapshot in snapshots:
        again = reconstruct_ema(snapshots, snapshot.sigma_rel, snapshot.step)["weight"]
        torch.testing.assert_close(again, snapshot.weights["weight"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.075, 0.12, 0.15])
def test_reconstruction_is_near_the_average_really_run_and_nearer_with_more_snapshots(sigma_rel):
    step = np.arange(1, 2049) / 2048
    values = np.sin(9 * step) + 2 * step**2
    truth = averaged(values, decay_at=lambda s: power_decay(s, sigma_rel))[-1]
    errors = []
    for every in (512, 128, 32):
        rebuilt = reconstruct_ema(snapshots_of(values, every, (0.05, 0.10)), sigma_rel)["weight"]
        errors.append(abs(float(rebuilt) - truth))
    assert errors[2] < 1e-3 and errors[2] <= errors[0]


def test_coefficients_minimise_the_distance_of_the_profiles():
    steps, widths = [40, 80, 120, 160], [0.05, 0.1, 0.05, 0.1]
    grid = (np.arange(200_000) + 0.5) / 200_000 * 160

    def profile(end, sigma_rel):
        gamma = power_gamma(sigma_rel)
        return np.where(grid <= end, (gamma + 1) * (grid / end) ** gamma / end, 0.0)

    matrix = np.stack([profile(s, w) for s, w in zip(steps, widths)], axis=1)
    expected = np.linalg.lstsq(matrix, profile(150, 0.08), rcond=None)[0]
    np.testing.assert_allclose(post_hoc_coefficients(steps, widths, 150, 0.08), expected, rtol=1e-3, atol=1e-4)


def test_impossible_averages_are_refused():
    with pytest.raises(ValueError, match="ema decay"):
        EMA(Scalar(), decay=1.0)
    with pytest.raises(ValueError, match="needs snapshots"):
        reconstruct_ema([], 0.1)
    one = PowerSnapshot(10, 0.1, {"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="last snapshot's 10"):
        reconstruct_ema([one], 0.1, step=11)
    with pytest.raises(ValueError, match="not of one network"):
        reconstruct_ema([one, PowerSnapshot(10, 0.05, {"other": torch.zeros(1)})], 0.1)
