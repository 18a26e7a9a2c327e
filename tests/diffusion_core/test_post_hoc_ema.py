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


def test_coefficients_minimise_the_distance_of_the_profiles():
    steps, widths = [40, 80, 120, 160], [0.05, 0.1, 0.05, 0.1]
    grid = (np.arange(200_000) + 0.5) / 200_000 * 160

    def profile(end, sigma_rel):
        gamma = power_gamma(sigma_rel)
        return np.where(grid <= end, (gamma + 1) * (grid / end) ** gamma / end, 0.0)

    matrix = np.stack([profile(s, w) for s, w in zip(steps, widths)], axis=1)
    expected = np.linalg.lstsq(matrix, profile(150, 0.08), rcond=None)[0]
    np.testing.assert_allclose(post_hoc_coefficients(steps, widths, 150, 0.08), expected, rtol=1e-3, atol=1e-4)


def test_impossible_snapshots_are_refused():
    with pytest.raises(ValueError, match="needs snapshots"):
        reconstruct_ema([], 0.1)
    one = PowerSnapshot(10, 0.1, {"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="last snapshot's 10"):
        reconstruct_ema([one], 0.1, step=11)
    with pytest.raises(ValueError, match="must come from one network"):
        reconstruct_ema([one, PowerSnapshot(10, 0.05, {"other": torch.zeros(1)})], 0.1)
