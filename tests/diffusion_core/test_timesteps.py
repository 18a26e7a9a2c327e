"""Timestep sampling: distributions, invariance to the split of the batch, unbiased importance."""

from __future__ import annotations

import pytest
import torch

from diffusion_core.noise import NoiseSource
from diffusion_core.schedules import make_schedule
from diffusion_core.timesteps import SAMPLINGS, LossHistory, draw_training_step, sample_timesteps

SCHEDULE = make_schedule("cosine", 40)


def history() -> LossHistory:
    empty = LossHistory.empty(40, length=3)
    for _ in range(3):
        empty = empty.updated(torch.arange(40), torch.linspace(0.1, 2.0, 40))
    return empty


def steps_of(sampling, positions, batch_size, step=0, **options):
    return sample_timesteps(
        sampling, SCHEDULE, NoiseSource(1), positions, batch_size, step, history=history(), **options
    )


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_any_split_of_the_batch_draws_the_same_numbers(sampling):
    positions = torch.arange(64)
    options = {"seed": 3, "sampling": sampling, "history": history(), "condition_dropout": 0.2, "offset_noise": 0.1}
    whole = draw_training_step(SCHEDULE, (3, 4, 4), positions, 64, 7, self_conditioning=0.5, **options)
    for size in (1, 7, 32):
        parts = [
            draw_training_step(SCHEDULE, (3, 4, 4), part, 64, 7, self_conditioning=0.5, **options)
            for part in positions.split(size)
        ]
        for name in ("t", "eps", "dropped", "importance"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
        assert {part.self_condition for part in parts} == {whole.self_condition}


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_every_step_is_equally_likely(sampling):
    counts = torch.zeros(40)
    for step in range(200):
        counts += torch.bincount(steps_of(sampling, torch.arange(100), 100, step)[0], minlength=40)
    # 20000 draws over 40 steps: 500 each, standard deviation 22 where independent
    assert float((counts - 500).abs().max()) < 4.5 * 22


@pytest.mark.parametrize("batch_size", [1, 7, 40, 64])
def test_stratified_batch_is_antithetic_and_covers_the_schedule_evenly(batch_size):
    for step in range(20):
        t, importance = steps_of("stratified", torch.arange(batch_size), batch_size, step)
        pairs = batch_size // 2
        assert torch.equal(t[0 : 2 * pairs : 2] + t[1 : 2 * pairs : 2], torch.full((pairs,), 39))
        assert torch.equal(importance, torch.ones(batch_size))
        if batch_size == 40:
            assert torch.equal(t.sort().values[::2] // 2, torch.arange(20)) or t.unique().numel() >= 20
            quarters = torch.bincount(t // 10, minlength=4)
            assert int(quarters.min()) >= 8 and int(quarters.max()) <= 12


def test_stratified_step_of_one_position_is_uniform_over_many_batches():
    first = torch.cat([steps_of("stratified", torch.tensor([0]), 7, step)[0] for step in range(250)])
    assert float(first.double().mean()) == pytest.approx(19.5, abs=4.5 * 40 / (12 * 250) ** 0.5)
    assert int(torch.bincount(first // 10, minlength=4).min()) > 35


def test_log_normal_steps_have_the_given_mean_and_deviation_of_log_sigma():
    schedule = make_schedule("linear", 1000)
    t, _ = sample_timesteps(
        "log_normal", schedule, NoiseSource(0), torch.arange(20000), 20000, 0, log_normal=(-1.0, 0.8)
    )
    log_sigma = schedule.sigma(t).log()
    assert float(log_sigma.mean()) == pytest.approx(-1.0, abs=0.03)
    assert float(log_sigma.std()) == pytest.approx(0.8, abs=0.03)


def test_log_normal_works_where_the_last_step_is_pure_noise():
    schedule = make_schedule("linear", 100, zero_terminal_snr=True)
    t, _ = sample_timesteps("log_normal", schedule, NoiseSource(0), torch.arange(2000), 2000, 0, log_normal=(3.0, 3.0))
    assert int(t.min()) >= 0 and int(t.max()) <= 99


def test_loss_aware_steps_follow_the_losses_and_importance_keeps_the_mean():
    probabilities = history().probabilities()
    expected = torch.linspace(0.1, 2.0, 40).double()
    torch.testing.assert_close(probabilities, 0.999 * expected / expected.sum() + 0.001 / 40)
    t, importance = steps_of("loss_aware", torch.arange(40_000), 40_000)
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


def test_shares_of_dropped_conditions_and_self_conditioned_steps_are_as_asked():
    draws = [
        draw_training_step(
            SCHEDULE, (1,), torch.arange(64), 64, step, seed=0, condition_dropout=0.1, self_conditioning=0.5
        )
        for step in range(150)
    ]
    assert sum(int(draw.dropped.sum()) for draw in draws) / (64 * 150) == pytest.approx(0.1, abs=0.014)
    assert sum(draw.self_condition for draw in draws) / 150 == pytest.approx(0.5, abs=0.15)
    never = draw_training_step(SCHEDULE, (1,), torch.arange(64), 64, 0, seed=0)
    assert not never.dropped.any() and not never.self_condition


def test_offset_noise_adds_one_number_a_channel():
    plain = draw_training_step(SCHEDULE, (3, 8, 8), torch.arange(500), 500, 2, seed=0)
    offset = draw_training_step(SCHEDULE, (3, 8, 8), torch.arange(500), 500, 2, seed=0, offset_noise=0.1)
    added = offset.eps - plain.eps
    assert float((added - added[:, :, :1, :1]).abs().max()) < 1e-6
    assert float(added.std()) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(offset.t, plain.t)


def test_bad_input_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="unknown timestep sampling"):
        steps_of("importance", torch.arange(4), 4)
    with pytest.raises(ValueError, match=r"LossHistory\.empty"):
        sample_timesteps("loss_aware", SCHEDULE, NoiseSource(0), torch.arange(4), 4, 0)
    with pytest.raises(ValueError, match="has 3 steps, the schedule 40"):
        sample_timesteps("loss_aware", SCHEDULE, NoiseSource(0), torch.arange(4), 4, 0, history=LossHistory.empty(3))
    with pytest.raises(ValueError, match="deviation above 0"):
        steps_of("log_normal", torch.arange(4), 4, log_normal=(0.0, 0.0))
    with pytest.raises(ValueError, match="condition_dropout is a share"):
        draw_training_step(SCHEDULE, (1,), torch.arange(4), 4, 0, seed=0, condition_dropout=1.2)


def test_positions_outside_the_batch_and_losses_that_are_none_are_refused():
    for positions in (torch.tensor([0, 4]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="0 to 3"):
            steps_of("stratified", positions, 4)
    for step, loss in ((0, float("nan")), (3, 1.0), (-1, 1.0)):
        with pytest.raises(ValueError, match="finite losses of steps 0 to 2"):
            LossHistory.empty(3).updated(torch.tensor([step]), torch.tensor([loss]))
