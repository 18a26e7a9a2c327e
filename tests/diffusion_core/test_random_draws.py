"""The draws of a training step: their addresses, distributions, independence of the batch split, unbiased importance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_core.noise import NoiseSource
from diffusion_core.random_draws import SAMPLINGS, LossHistory, dataset_indices, draw_training_step, sample_timesteps
from diffusion_core.schedules import make_schedule

SCHEDULE = make_schedule("cosine", 40)


def history() -> LossHistory:
    empty = LossHistory.empty(40, length=3)
    for _ in range(3):
        empty = empty.updated(torch.arange(40), torch.linspace(0.1, 2.0, 40))
    return empty


def timesteps_of(sampling, positions, batch_size, step=0, schedule=SCHEDULE, **options):
    uniform = NoiseSource(1).uniform((), positions.clamp(min=0), step)
    options = {"seed": 1, "history": history(), **options}
    return sample_timesteps(sampling, schedule, uniform, positions, batch_size, step, **options)


def test_uniform_draws_come_from_the_streams_of_training():
    positions = torch.tensor([0, 1, 9, 500, 63])
    draw = draw_training_step(
        SCHEDULE, (3, 2, 2), positions, 501, 12, seed=5, condition_dropout=0.3, horizontal_flip=True, self_conditioning=0.5
    )  # fmt: skip
    numbers = NoiseSource(5, "train-draws").uniform((3,), positions, 12)
    assert torch.equal(draw.flipped, numbers[:, 0] < 0.5)
    assert torch.equal(draw.t, torch.floor(numbers[:, 1] * 40).long())
    assert torch.equal(draw.dropped, numbers[:, 2] < 0.3)
    assert torch.equal(draw.eps, NoiseSource(5, "train-noise").normal((3, 2, 2), positions, 12))
    assert torch.equal(draw.importance, torch.ones(5))
    coin = NoiseSource(5, "train-self-condition").uniform((), torch.tensor([0]), 12)
    assert draw.self_condition == (float(coin) < 0.5)


def test_other_samplings_and_offset_noise_draw_from_streams_of_their_own():
    positions, seed, step = torch.arange(6), 5, 12

    def draw(**options):
        return draw_training_step(SCHEDULE, (3, 2, 2), positions, 6, step, seed=seed, history=history(), **options)

    offset = float(NoiseSource(seed, "train-timesteps").uniform((), torch.tensor([0]), step))
    lattice = [int((offset + pair / 3) % 1.0 * 40) for pair in range(3)]
    assert draw(sampling="stratified").t.tolist() == [t for low in lattice for t in (low, 39 - low)]
    log_sigma = -1.2 + 1.2 * NoiseSource(seed, "train-timesteps").normal((), positions, step).double()
    levels = SCHEDULE.sigma(torch.arange(40)).log()
    assert torch.equal(draw(sampling="log_normal").t, (levels[None] - log_sigma[:, None]).abs().argmin(dim=1))
    u = NoiseSource(seed, "train-draws").uniform((3,), positions, step)[:, 1]
    edges = history().probabilities().cumsum(0)
    assert draw(sampling="loss_aware").t.tolist() == [int((edges <= number).sum()) for number in u]
    added = NoiseSource(seed, "train-offset").normal((3,), positions, step)
    torch.testing.assert_close(draw(offset_noise=0.1).eps, draw().eps + 0.1 * added[:, :, None, None])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_draws_do_not_depend_on_the_split_of_the_batch(sampling):
    positions = torch.arange(64)
    options = {
        "seed": 3, "sampling": sampling, "history": history(), "condition_dropout": 0.2, "horizontal_flip": True,
        "offset_noise": 0.1, "self_conditioning": 0.5,
    }  # fmt: skip
    whole = draw_training_step(SCHEDULE, (3, 4, 4), positions, 64, 7, **options)
    for size in (1, 7, 32):
        parts = [draw_training_step(SCHEDULE, (3, 4, 4), part, 64, 7, **options) for part in positions.split(size)]
        for name in ("t", "eps", "dropped", "flipped", "importance"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
        assert {part.self_condition for part in parts} == {whole.self_condition}


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_every_timestep_is_equally_likely(sampling):
    counts = torch.zeros(40)
    for step in range(200):
        counts += torch.bincount(timesteps_of(sampling, torch.arange(100), 100, step)[0], minlength=40)
    # 20000 draws over 40 timesteps: 500 each, standard deviation 22 if independent
    assert float((counts - 500).abs().max()) < 4.5 * 22


@pytest.mark.parametrize("batch_size", [1, 7, 40, 64])
def test_stratified_batch_is_antithetic_and_covers_the_schedule_evenly(batch_size):
    for step in range(20):
        t, importance = timesteps_of("stratified", torch.arange(batch_size), batch_size, step)
        pairs = batch_size // 2
        assert torch.equal(t[0 : 2 * pairs : 2] + t[1 : 2 * pairs : 2], torch.full((pairs,), 39))
        assert torch.equal(importance, torch.ones(batch_size))
        if batch_size == 40:
            assert torch.equal(t.sort().values[::2] // 2, torch.arange(20)) or t.unique().numel() >= 20
            quarters = torch.bincount(t // 10, minlength=4)
            assert int(quarters.min()) >= 8 and int(quarters.max()) <= 12


def test_stratified_timestep_of_one_position_is_uniform_over_many_batches():
    first = torch.cat([timesteps_of("stratified", torch.tensor([0]), 7, step)[0] for step in range(250)])
    assert float(first.double().mean()) == pytest.approx(19.5, abs=4.5 * 40 / (12 * 250) ** 0.5)
    assert int(torch.bincount(first // 10, minlength=4).min()) > 35


def test_log_normal_timesteps_have_the_given_mean_and_deviation_of_log_sigma():
    schedule = make_schedule("linear", 1000)
    t, _ = timesteps_of("log_normal", torch.arange(20000), 20000, schedule=schedule, log_normal=(-1.0, 0.8))
    log_sigma = schedule.sigma(t).log()
    assert float(log_sigma.mean()) == pytest.approx(-1.0, abs=0.03)
    assert float(log_sigma.std()) == pytest.approx(0.8, abs=0.03)


def test_log_normal_works_with_a_zero_terminal_snr():
    schedule = make_schedule("linear", 100, zero_terminal_snr=True)
    t, _ = timesteps_of("log_normal", torch.arange(2000), 2000, schedule=schedule, log_normal=(3.0, 3.0))
    assert int(t.min()) >= 0 and int(t.max()) <= 99


def test_loss_aware_timesteps_follow_the_losses_and_importance_keeps_the_mean():
    probabilities = history().probabilities()
    expected = torch.linspace(0.1, 2.0, 40).double()
    torch.testing.assert_close(probabilities, 0.999 * expected / expected.sum() + 0.001 / 40)
    t, importance = timesteps_of("loss_aware", torch.arange(40_000), 40_000)
    share = torch.bincount(t, minlength=40) / 40_000
    torch.testing.assert_close(share.double(), probabilities, atol=4e-3, rtol=0)
    loss = torch.sin(t.double()) + 2.0
    uniform_mean = (torch.sin(torch.arange(40).double()) + 2.0).mean()
    assert float((importance * loss).mean()) == pytest.approx(float(uniform_mean), rel=0.02)


def test_loss_history_keeps_the_last_losses_and_starts_uniform():
    start = LossHistory.empty(3, length=2)
    torch.testing.assert_close(start.probabilities(), torch.full((3,), 1 / 3).double())
    later = start.updated(torch.tensor([0, 0, 0, 1]), torch.tensor([5.0, 1.0, 2.0, 4.0]))
    assert sorted(later.losses[0].tolist()) == [1.0, 2.0] and later.seen.tolist() == [3, 1, 0]
    assert start.seen.tolist() == [0, 0, 0]
    torch.testing.assert_close(later.probabilities(), torch.full((3,), 1 / 3).double())
    full = later.updated(torch.tensor([1, 2, 2]), torch.tensor([4.0, 0.0, 0.0]))
    assert float(full.probabilities()[2]) == pytest.approx(1e-3 / 3)


def test_shares_of_dropped_flipped_and_self_conditioned_match_the_options():
    options = {"seed": 0, "condition_dropout": 0.1, "horizontal_flip": True, "self_conditioning": 0.5}
    draws = [draw_training_step(SCHEDULE, (1,), torch.arange(64), 64, step, **options) for step in range(150)]
    assert sum(int(draw.dropped.sum()) for draw in draws) / (64 * 150) == pytest.approx(0.1, abs=0.014)
    assert sum(int(draw.flipped.sum()) for draw in draws) / (64 * 150) == pytest.approx(0.5, abs=0.023)
    assert sum(draw.self_condition for draw in draws) / 150 == pytest.approx(0.5, abs=0.15)
    never = draw_training_step(SCHEDULE, (1,), torch.arange(64), 64, 0, seed=0)
    assert not never.dropped.any() and not never.flipped.any() and not never.self_condition


def test_offset_noise_adds_one_number_per_channel():
    plain = draw_training_step(SCHEDULE, (3, 8, 8), torch.arange(500), 500, 2, seed=0)
    offset = draw_training_step(SCHEDULE, (3, 8, 8), torch.arange(500), 500, 2, seed=0, offset_noise=0.1)
    added = offset.eps - plain.eps
    assert float((added - added[:, :, :1, :1]).abs().max()) < 1e-6
    assert float(added.std()) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(offset.t, plain.t)


def test_bad_input_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="unknown timestep sampling"):
        timesteps_of("importance", torch.arange(4), 4)
    with pytest.raises(ValueError, match=r"LossHistory\.empty"):
        timesteps_of("loss_aware", torch.arange(4), 4, history=None)
    with pytest.raises(ValueError, match="has 3 steps, but the schedule has 40"):
        timesteps_of("loss_aware", torch.arange(4), 4, history=LossHistory.empty(3))
    with pytest.raises(ValueError, match="deviation above 0"):
        timesteps_of("log_normal", torch.arange(4), 4, log_normal=(0.0, 0.0))
    with pytest.raises(ValueError, match="condition_dropout is a share"):
        draw_training_step(SCHEDULE, (1,), torch.arange(4), 4, 0, seed=0, condition_dropout=1.2)


def test_positions_outside_the_batch_and_losses_that_are_not_finite_are_refused():
    for positions in (torch.tensor([0, 4]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="0 to 3"):
            timesteps_of("stratified", positions, 4)
    for step, loss in ((0, float("nan")), (3, 1.0), (-1, 1.0)):
        with pytest.raises(ValueError, match="finite losses of steps 0 to 2"):
            LossHistory.empty(3).updated(torch.tensor([step]), torch.tensor([loss]))


def test_each_epoch_holds_every_image_once_in_an_order_of_its_own():
    first, second = (dataset_indices(0, 20, np.arange(20 * e, 20 * (e + 1))) for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20)) and not np.array_equal(first, second)
    assert np.array_equal(dataset_indices(0, 20, np.arange(15, 25)), np.concatenate([first[15:], second[:5]]))
    assert np.array_equal(first, np.random.default_rng([0, 0]).permutation(20))
    assert not np.array_equal(dataset_indices(1, 20, np.arange(20)), first)
