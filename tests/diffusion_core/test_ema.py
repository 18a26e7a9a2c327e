import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusion_core.ema import EMA, half_life_decay, power_decay, power_gamma, warmup_decay


class Scalar(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))


def averaged(values, **options):
    """Return the EMA after each step, for weights that equal ``values`` after step 1, 2, ..."""
    network = Scalar(123.0)  # the average should forget the weights before step 1
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
def test_power_profile_has_the_given_relative_width(sigma_rel):
    gamma = power_gamma(sigma_rel)
    # the density (gamma + 1) t^gamma on [0, 1] is Beta(gamma + 1, 1)
    a, b = gamma + 1.0, 1.0
    assert math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1))) == pytest.approx(sigma_rel, rel=1e-9)


def test_exponents_equal_the_published_ones():
    assert power_gamma(0.05) == pytest.approx(16.97, abs=0.005)  # arXiv 2312.02696, section 3.1
    assert power_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    for wrong in (0.0, -0.1, 0.3):
        with pytest.raises(ValueError, match="relative width"):
            power_gamma(wrong)


@given(sigma_rel=st.floats(0.02, 0.28), length=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_power_average_weighs_each_step_by_its_profile(sigma_rel, length):
    values = np.random.RandomState(0).randn(length)
    exponent = power_gamma(sigma_rel) + 1
    edges = (np.arange(length + 1) / length) ** exponent
    got = averaged(values, decay_at=lambda step: power_decay(step, sigma_rel))[-1]
    assert got == pytest.approx(float(np.diff(edges) @ values), rel=1e-9, abs=1e-12)


def test_impossible_decay_is_refused():
    with pytest.raises(ValueError, match="ema decay"):
        EMA(Scalar(), decay=1.0)
