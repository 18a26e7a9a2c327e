"""The training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core import objectives
from diffusion_core.bound_terms import bound_term
from diffusion_core.checks import check_condition, check_images
from diffusion_core.objectives import Network, per_image, split_output
from diffusion_core.schedules import NoiseSchedule
from diffusion_core.weightings import loss_weight

ERRORS = ("mse", "huber")


def training_loss(
    network: Network,
    schedule: NoiseSchedule,
    objective: str,
    weighting: str,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    condition: Any = None,
    *,
    weighting_options: Mapping[str, float] | None = None,
    error: str = "mse",
    huber_delta: float = 1.0,
    self_condition: bool = False,
    self_condition_clip: float | None = 1.0,
    learned_variance: bool = False,
    bound_weight: float = 1e-3,
) -> Tensor:
    """Return (B,) float32: the weighted mean error of the network's output for each image at its step t.

    x0: (B, ...) float32 in [-1, 1]; t: (B,) int64 in [0, T); eps: (B, ...) standard normal; condition: as the network
    takes it, with the null condition in dropped rows. The error is computed in float32, also under autocast.

    ``error``: ``mse``, or ``huber``: 0.5 d^2 below ``huber_delta`` and delta (|d| - 0.5 delta) above, times 2 so that both
    agree for small errors. ``self_condition``: first estimate x0 without gradients, clamp it to ``self_condition_clip`` as
    the sampler does, then feed it to the network (arXiv 2208.04202, section 3.2); use it in half of the steps, see
    `random_draws.draw_training_step`. ``learned_variance``: the network returns 2C channels; adds ``bound_weight`` T L_t.
    L_t, in bits/dim, is this step's term of the variational bound with the mean's gradient stopped, so that only the variance
    learns from it (the hybrid loss of arXiv 2102.09672, eq. 16: T L_t estimates the whole bound).

    Raises ValueError if a name is unknown, the objective does not fit the schedule, a tensor or the network's output has the
    wrong shape or type, there is not one condition per image, or (if t is on a CPU) a step lies outside the schedule.
    """
    objectives.check_objective(objective, schedule)
    check_images(x0)
    if t.shape != x0.shape[:1] or eps.shape != x0.shape:
        raise ValueError(
            f"t needs one step per image and eps the shape of x0, got t {tuple(t.shape)} and eps {tuple(eps.shape)} "
            f"for x0 {tuple(x0.shape)}"
        )
    check_condition(condition, x0.shape[0])
    if t.device.type == "cpu" and t.numel() and int(t.min()) < 0:
        raise ValueError(f"training steps must lie in 0 to {schedule.num_steps - 1}, got {int(t.min())}")
    if error not in ERRORS or huber_delta <= 0:
        raise ValueError(
            f"error must be one of {', '.join(ERRORS)} and huber_delta above 0, got {error!r}, {huber_delta}"
        )
    alpha_bar = per_image(schedule.gather(t), x0)
    x_t = objectives.add_noise(x0, eps, alpha_bar)
    estimate = None
    if self_condition:
        with torch.no_grad():
            first, _ = split_output(network(x_t, t, condition, None), x_t, learned_variance)
            estimate = objectives.to_x0(objective, first.float(), x_t, alpha_bar)
            if self_condition_clip is not None:
                estimate = estimate.clamp(-self_condition_clip, self_condition_clip)
    output, variance = split_output(network(x_t, t, condition, estimate), x_t, learned_variance)
    output = output.float()
    target = objectives.target(objective, x0, eps, alpha_bar)
    if error == "mse":
        errors = (output - target).square()
    else:
        errors = 2.0 * F.huber_loss(output, target, reduction="none", delta=huber_delta)
    try:
        weight = loss_weight(weighting, objective, schedule.snr(t), **(weighting_options or {}))
    except TypeError as mistake:
        raise ValueError(f"weighting {weighting!r} does not take {dict(weighting_options or {})}: {mistake}") from None
    loss = weight.to(errors.dtype) * errors.flatten(1).mean(dim=1)
    if variance is not None:
        x0_hat = objectives.to_x0(objective, output.detach(), x_t, alpha_bar)
        term = bound_term(schedule, x0, x0_hat, (variance.float() + 1.0) / 2.0, t)
        loss = loss + bound_weight * schedule.num_steps * term.to(loss.dtype)
    return loss
