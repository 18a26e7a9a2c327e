import functools

import numpy as np
import pytest
import torch
from torch import nn

from diffusion_core.ema import EMA, power_decay, power_gamma
from diffusion_core.post_hoc_ema import PowerSnapshot, post_hoc_coefficients, reconstruct_ema


def averaged(values, sigma_rel):
    """Return the power-function average after each step, for weights that equal ``values`` after step 1, 2, ..."""
    network = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema, result = EMA(network, decay_at=lambda step: power_decay(step, sigma_rel)), []
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            network.weight.fill_(value)
        ema.update(network, step)
        result.append(float(ema.network.weight))
    return result


def snapshots_of(values, every, sigma_rels):
    result = []
    for sigma_rel in sigma_rels:
        track = averaged(values, sigma_rel)
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
def test_reconstruction_is_near_the_real_average_and_nearer_with_more_snapshots(sigma_rel):
    step = np.arange(1, 2049) / 2048
    values = np.sin(9 * step) + 2 * step**2
    truth = averaged(values, sigma_rel)[-1]
    errors = []
    for every in (512, 128, 32):
        rebuilt = reconstruct_ema(snapshots_of(values, every, (0.05, 0.10)), sigma_rel)["weight"]
        errors.append(abs(float(rebuilt) - truth))
    assert errors[2] < 1e-3 and errors[2] <= errors[0]


def test_coefficients_minimise_the_distance_of_the_profiles_among_those_that_sum_to_one():
    steps, widths = [40, 80, 120, 160], [0.05, 0.1, 0.05, 0.1]
    grid = (np.arange(200_000) + 0.5) / 200_000 * 160

    def profile(end, sigma_rel):
        gamma = power_gamma(sigma_rel)
        return np.where(grid <= end, (gamma + 1) * (grid / end) ** gamma / end, 0.0)

    matrix = np.stack([profile(s, w) for s, w in zip(steps, widths)], axis=1)
    # eliminate the last coefficient, which is 1 minus the others
    rest = np.linalg.lstsq(matrix[:, :-1] - matrix[:, -1:], profile(150, 0.08) - matrix[:, -1], rcond=None)[0]
    expected = [*rest, 1 - rest.sum()]
    np.testing.assert_allclose(post_hoc_coefficients(steps, widths, 150, 0.08), expected, rtol=1e-3, atol=1e-4)


EIGHT_OF_TWO_WIDTHS = ([512 * (i + 1) for i in range(8)] * 2, [0.05] * 8 + [0.1] * 8)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.06, 0.075, 0.1, 0.12, 0.15, 0.2, 0.25])
@pytest.mark.parametrize("step", [4096, 3172, 2048, 600])
def test_coefficients_sum_to_one(sigma_rel, step):
    assert post_hoc_coefficients(*EIGHT_OF_TWO_WIDTHS, step, sigma_rel).sum() == pytest.approx(1.0, abs=1e-9)
    assert post_hoc_coefficients([512], [0.1], 512, sigma_rel) == pytest.approx([1.0])


@functools.cache
def eight_snapshots():
    values = 1.0 + 0.02 * np.cos(5 * np.arange(512) / 512) + 0.01 * np.random.RandomState(0).randn(512)
    return values, snapshots_of(values, 64, (0.05, 0.10))


@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.15, 0.2, 0.25])
def test_weights_from_eight_snapshots_of_two_widths_have_the_size_of_the_average_that_was_run(sigma_rel):
    """Weights far from 0, as those of a norm layer: with coefficients that do not sum to 1 they shrink by up to 6%."""
    values, snapshots = eight_snapshots()
    rebuilt = float(reconstruct_ema(snapshots, sigma_rel)["weight"])
    assert rebuilt == pytest.approx(averaged(values, sigma_rel)[-1], abs=2e-3)


def test_impossible_snapshots_are_refused():
    with pytest.raises(ValueError, match="needs snapshots"):
        reconstruct_ema([], 0.1)
    one = PowerSnapshot(10, 0.1, {"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="last snapshot's 10"):
        reconstruct_ema([one], 0.1, step=11)
    with pytest.raises(ValueError, match="between the first snapshot's 10 and the last snapshot's 10"):
        reconstruct_ema([one], 0.1, step=9)
    for steps, widths in (([], []), ([10, 20], [0.1])):
        with pytest.raises(ValueError, match="one width per snapshot"):
            post_hoc_coefficients(steps, widths, 10, 0.1)
    with pytest.raises(ValueError, match="must come from one network"):
        reconstruct_ema([one, PowerSnapshot(10, 0.05, {"other": torch.zeros(1)})], 0.1)


def test_repeated_snapshots_share_the_weight():
    for count in (2, 3):
        coefficients = post_hoc_coefficients([10] * count, [0.1] * count, 10, 0.05)
        np.testing.assert_allclose(coefficients, np.full(count, 1 / count), atol=1e-6)
