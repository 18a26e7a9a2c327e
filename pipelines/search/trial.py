"""One trial: train to a rung, and judge the EMA weights by a quick FID.

Losses of different objectives and schedules cannot be compared, so the search compares sample quality.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch

from diffusion_core.generation import NonFiniteOutputError, SamplerSettings
from diffusion_core.schedules import make_schedule
from diffusion_core.weightings import loss_weight
from pipelines.measurement.measure import GROUPS, leave_one_out, measure, measurement_rows
from pipelines.measurement.reference import Reference, finite_distance
from pipelines.search.records import FAILED_FID, Choice, TrialResult
from pipelines.training.loop import Hooks, Images, TrainingDivergedError, TrainSettings, TrainState, train
from pipelines.training.model import ema_model

LOSS_STEPS = 10
"""The loss of a result is the mean over this many steps."""


def trial_settings(base: TrainSettings, choice: Choice) -> TrainSettings:
    """Return the settings of the loop with the trial's choice."""
    return replace(
        base,
        schedule={**base.schedule, "name": choice.schedule},
        objective=choice.objective,
        weighting=choice.weighting,
        learning_rate=choice.learning_rate,
    )


def same_training(base: TrainSettings, choice: Choice) -> Hashable:
    """Return a key that two choices share if they are the same training, by whatever name.

    It holds the schedule's and the loss weights' values, because two names may give the same ones: without a step of SNR below 1,
    truncated_snr is snr. Learning rates count to four digits.
    """
    settings = trial_settings(base, choice)
    schedule = make_schedule(**settings.schedule)
    weight = loss_weight(settings.weighting, settings.objective, schedule.snr(torch.arange(schedule.num_steps)))
    values = (schedule.alphas_cumprod.numpy().tobytes(), weight.float().numpy().tobytes())
    return values, settings.objective, f"{settings.learning_rate:.4g}"


def judge_rung(
    settings: TrainSettings,
    state: TrainState,
    images: Images,
    reference: Reference,
    rung: int,
    *,
    num_samples: int,
    ddim_steps: int,
    hooks: Hooks | None = None,
) -> TrialResult:
    """Train ``state`` to step ``rung`` and return its quick FID. A state already at ``rung`` is only measured.

    The FID compares ``num_samples`` samples of deterministic DDIM with the train split. Noise and labels depend only on the
    seed and the sample's index, so they are the same for every trial. A trial diverged if its training or its network's output is
    not finite: it has `FAILED_FID` with the reason, and its state must not be used again.
    """
    assert state.step <= rung and num_samples >= 2 * GROUPS, (state.step, rung, num_samples)
    try:
        if state.step < rung:
            train(settings, images, state, hooks, until=rung)
    except TrainingDivergedError as error:
        return TrialResult(rung, FAILED_FID, reason=str(error))
    model = ema_model(settings, state)
    try:
        measurement = measure(
            model,
            reference,
            torch.arange(num_samples),
            SamplerSettings(steps=ddim_steps, eta=0.0),
            seed=settings.seed,
            rows_per_call=measurement_rows(next(model.network.parameters()).device.type),
            num_groups=GROUPS,
        )
    except NonFiniteOutputError as error:
        return TrialResult(rung, FAILED_FID, reason=str(error))
    real = reference.statistics["train"]
    return TrialResult(
        step=rung,
        fid=finite_distance(measurement.statistics, real, "samples"),
        leave_one_out=tuple(leave_one_out(measurement.groups, real)),
        loss=float(state.losses[max(rung - LOSS_STEPS, 0) : rung].mean()),
    )
