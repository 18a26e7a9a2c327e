"""Edits of images with a trained model: change of condition, image to image, interpolation, inpainting.

``condition``: as the denoiser's network takes it, of any kind. To guide, pass a guided denoiser.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_core.checks import check_condition, check_images
from diffusion_core.denoiser import Denoiser
from diffusion_core.grids import Grid, restrict_grid
from diffusion_core.inversion import invert_ddim
from diffusion_core.objectives import add_noise, per_image
from diffusion_core.samplers import (
    Callback,
    Step,
    StepNoise,
    check_eta,
    check_inputs,
    ddim_step,
    draw,
    sample_ddim,
    steps_of,
)


def edit(
    denoiser: Denoiser,
    x0: Tensor,
    grid: Grid,
    source_condition: Any,
    target_condition: Any,
    *,
    start: int | None = None,
    inversion_denoiser: Denoiser | None = None,
    fixed_point_steps: int = 0,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Invert ``x0`` under the source condition, then sample with DDIM, eta 0, under the target condition (arXiv 2203.08382).

    ``start``: the grid level to invert up to, by default the top; a lower one keeps more of the image.
    ``inversion_denoiser``: the denoiser to invert with if the sampling one is guided; plain inversion follows the model most
    closely at guidance scale 1. ``fixed_point_steps`` as in `invert_ddim`. The callback sees the sampling steps.
    x0: (B, ...) float32. Returns (B, ...). Raises ValueError as `restrict_grid` and `invert_ddim` do.
    """
    check_images(x0)
    check_condition(target_condition, x0.shape[0])
    part = restrict_grid(grid, highest=start)
    latent = invert_ddim(
        inversion_denoiser or denoiser,
        x0,
        part,
        condition=source_condition,
        fixed_point_steps=fixed_point_steps,
        progress=progress,
    )
    return sample_ddim(denoiser, latent, part, condition=target_condition, callback=callback, progress=progress)


def image_to_image(
    denoiser: Denoiser,
    x0: Tensor,
    grid: Grid,
    noise: StepNoise,
    *,
    strength: float = 0.6,
    eta: float | Literal["sigma_hat"] = 0.0,
    condition: Any = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Add noise to ``x0`` and sample from there: SDEdit (arXiv 2108.01073).

    ``strength``: the share of the grid's steps to run, in (0, 1]; at least one step runs, and 1 starts at the grid's top. The
    added noise is ``noise(T)``. x0: (B, ...) float32. Returns (B, ...). Raises ValueError if strength is out of range.
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength must lie above 0 and be at most 1, got {strength}")
    grid = check_inputs(denoiser, x0, grid, "x0")
    part = grid[len(grid) - max(1, round(strength * len(grid))) :]
    x_t = add_noise(x0, draw(noise, denoiser.schedule.num_steps, x0), denoiser.schedule.alpha_bar(part[0][0]))
    return sample_ddim(denoiser, x_t, part, noise, eta=eta, condition=condition, callback=callback, progress=progress)


def slerp(first: Tensor, second: Tensor, fraction: float) -> Tensor:
    """Interpolate each image spherically: (sin((1 - f) theta) first + sin(f theta) second) / sin(theta).

    theta is the angle between the two (arXiv 2010.02502, appendix D.5, eq. 67). The norm stays that of Gaussian noise; a
    straight line would pass through latents that are too small. (Anti)parallel images are interpolated linearly.
    first, second: (B, ...) float. Raises ValueError if the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"slerp needs two tensors of one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    check_images(first, "first")
    check_images(second, "second")
    a, b = first.flatten(1).double(), second.flatten(1).double()
    cosine = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))
    theta = torch.arccos(cosine.clamp(-1.0, 1.0))
    sine = theta.sin()
    straight = ~(sine > 1e-6)
    weight_first = torch.where(straight, 1.0 - fraction, torch.sin((1.0 - fraction) * theta) / sine)
    weight_second = torch.where(straight, fraction, torch.sin(fraction * theta) / sine)
    mixed = per_image(weight_first, first) * first + per_image(weight_second, second) * second
    return mixed.to(first.dtype)


def interpolate(
    denoiser: Denoiser,
    first: Tensor,
    second: Tensor,
    fractions: Sequence[float],
    grid: Grid,
    *,
    condition: Any = None,
    start: int | None = None,
    fixed_point_steps: int = 0,
    progress: bool = False,
) -> Tensor:
    """Interpolate images: invert both, `slerp` their latents, sample with DDIM, eta 0 (arXiv 2010.02502, section 5.3).

    first, second: (B, ...) float32 images under the same condition; ``start``: the grid level to invert up to. Returns
    (len(fractions), B, ...); fraction 0 reconstructs the first and 1 the second. Raises ValueError if there are no fractions,
    the shapes differ, or as `invert_ddim` does.
    """
    if not len(fractions):
        raise ValueError("interpolation needs at least one fraction, such as 0.5")
    if first.shape != second.shape:
        raise ValueError(f"two images of one shape are needed, got {tuple(first.shape)} and {tuple(second.shape)}")
    part = restrict_grid(grid, highest=start)
    start_one, start_two = (
        invert_ddim(denoiser, image, part, condition=condition, fixed_point_steps=fixed_point_steps, progress=progress)
        for image in (first, second)
    )
    latents = [slerp(start_one, start_two, fraction) for fraction in fractions]
    return torch.stack(
        [sample_ddim(denoiser, latent, part, condition=condition, progress=progress) for latent in latents]
    )


@torch.no_grad()
def inpaint(
    denoiser: Denoiser,
    x0: Tensor,
    known: Tensor,
    x_T: Tensor,
    grid: Grid,
    noise: StepNoise,
    *,
    eta: float | Literal["sigma_hat"] = 1.0,
    jump_length: int = 10,
    resamples: int = 10,
    condition: Any = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Fill in the unknown part of images: RePaint (arXiv 2201.09865, algorithm 1 and appendix B), over any grid.

    After each step down, the known part is replaced by the image at that noise level (eq. 8a-8c). To make the two parts
    agree, every ``jump_length`` steps the walk jumps the same number of steps up, adding noise, and samples down again,
    ``resamples`` times in total. The paper uses 10 and 10 on 250 steps; 1 resample means no jumps. eta 1 is its DDPM step.

    x0: (B, ...) float32; known: broadcastable to x0, 1 or True where x0 is kept, values in between blend; x_T: (B, ...)
    noise. ``noise`` is called with T + 1, T + 2, ... in the order of the walk; plain sampling uses none of these addresses.
    Returns (B, ...), equal to x0 where known. Raises ValueError if the mask does not fit or an option is out of range.
    """
    check_eta(eta)
    grid = check_inputs(denoiser, x0, grid, "x0")
    if x_T.shape != x0.shape:
        raise ValueError(f"x_T has shape {tuple(x_T.shape)}, x0 {tuple(x0.shape)}: they must agree")
    if noise is None:
        raise ValueError("inpainting adds noise at every step: pass noise=")
    if jump_length < 1 or resamples < 1:
        raise ValueError(f"jump_length and resamples must be at least 1, got {jump_length} and {resamples}")
    try:
        mask = known.to(x0.dtype).expand(x0.shape)
    except RuntimeError:
        raise ValueError(
            f"known has shape {tuple(known.shape)}, which does not fit images of {tuple(x0.shape)}"
        ) from None
    if bool(((mask < 0) | (mask > 1)).any()):
        raise ValueError("known must be between 0 (fill in) and 1 (keep)")
    schedule = denoiser.schedule
    addresses = itertools.count(schedule.num_steps + 1)
    x, carried = x_T, None
    for down, (t, t_prev) in steps_of(repaint_walk(grid, jump_length, resamples), progress, "RePaint"):
        alpha_bar, alpha_bar_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        if not down:
            x = add_noise(x, draw(noise, next(addresses), x), alpha_bar / alpha_bar_prev)
            continue
        prediction = denoiser(x, t, condition, carried)
        carried = prediction.x0 if denoiser.self_conditioning else None
        unknown_part = ddim_step(denoiser, prediction, t, t_prev, lambda _: draw(noise, next(addresses), x), eta)  # noqa: B023
        known_part = add_noise(x0, draw(noise, next(addresses), x), alpha_bar_prev) if t_prev >= 0 else x0
        x = mask * known_part + (1.0 - mask) * unknown_part
        if callback is not None:
            callback(Step(t, t_prev, x, prediction.x0))
    return x


def repaint_walk(grid: Grid, jump_length: int, resamples: int) -> list[tuple[bool, tuple[int, int]]]:
    """Return RePaint's walk over the grid as (down, pair): ``resamples - 1`` jumps up from every ``jump_length``-th level.

    Levels are counted from the clean image. The first jump starts one step above it; no jump passes the grid's top.
    """
    jumps = dict.fromkeys(range(1, len(grid) - jump_length + 1, jump_length), resamples - 1)
    walk, left = [], len(grid)
    while left > 0:
        walk.append((True, grid[len(grid) - left]))
        left -= 1
        if jumps.get(left, 0) > 0:
            jumps[left] -= 1
            for _ in range(jump_length):
                left += 1
                walk.append((False, grid[len(grid) - left]))
    return walk
