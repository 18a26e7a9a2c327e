"""Inversion: from an image to the latent from which a deterministic sampler produces it, and back.

A trajectory is ``{level: x}``: the image at each level of a grid. Level -1 is the clean image.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_core.denoiser import Denoiser
from diffusion_core.grids import Grid, check_grid, restrict_grid
from diffusion_core.guidance import Autoguidance, ClassifierFreeGuidance, null_batch
from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.objectives import Network, per_image
from diffusion_core.samplers import Callback, Step, check_inputs, ddim_step, sample_ddim, steps_of

Trajectory = dict[int, Tensor]


@torch.no_grad()
def invert_ddim(
    denoiser: Denoiser,
    x0: Tensor,
    grid: Grid,
    *,
    condition: Any = None,
    fixed_point_steps: int = 0,
    tolerance: float = 0.0,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Return the latent at the grid's first level from which `sample_ddim` with eta 0 reconstructs ``x0``.

    Walks the sampling grid upwards. From level s to t, with (x0_hat, eps) = denoiser(x_s, t) (arXiv 2010.02502, section
    4.3 and eq. 13): x_t = sqrt(a_t) x0_hat + sqrt(1 - a_t) eps. The network sees x_s here but x_t in the sampler, so the
    round trip has a gap of first order in the step. ``fixed_point_steps`` closes it: x_t <- x_t + w (x_s - step(x_t)), where
    step is the sampler's own step from t to s. Its fixed point is the exact inverse, the solution of AIDI's equation
    (arXiv 2309.04907, section 3). In this residual form the iteration also converges near pure noise, where iterating on
    eps alone stalls. w starts at 1; then each image takes the secant through its last two tries, or half of its last w if its
    gap |x_s - step(x_t)| would grow (Barzilai and Borwein, IMA J. Numer. Anal. 8, 1988, with that safeguard). An image stops
    when no element of its gap is above ``tolerance``, or after ``fixed_point_steps`` network calls per level. With
    ``self_conditioning`` part of the gap stays, because the sampler carries its own estimates and not those of this walk.

    x0: (B, ...) float32 at the grid's last level (-1, the clean image, or any middle latent). Returns (B, ...). The
    callback sees Step(t, s, x_t, x0_hat) for each step up. Raises ValueError if the grid does not fit the schedule, x0 is not a
    float batch, or an option is negative.
    """
    grid = check_inputs(denoiser, x0, grid, "x0")
    if fixed_point_steps < 0 or tolerance < 0:
        raise ValueError(f"fixed_point_steps and tolerance must not be negative, got {fixed_point_steps}, {tolerance}")
    x = x0
    carried = None
    for t, t_prev in steps_of(list(reversed(grid)), progress, "inversion"):
        alpha_bar = denoiser.schedule.alpha_bar(t)
        prediction = denoiser(x, t, condition, carried, level=t_prev)
        x0_hat = prediction.x0
        raised = alpha_bar**0.5 * x0_hat + (1.0 - alpha_bar) ** 0.5 * prediction.eps
        best, residual = raised, torch.zeros_like(raised)
        smallest = per_image(x.new_full((x.shape[0],), torch.inf), x)
        weight = torch.ones_like(smallest)
        for step in range(fixed_point_steps):
            prediction = denoiser(raised, t, condition, carried)
            gap = x - ddim_step(denoiser, prediction, t, t_prev)
            norm = per_image(gap.flatten(1).norm(dim=1), x)
            closer = norm <= smallest
            weight = torch.where(closer, _secant_weight(raised - best, residual - gap), weight / 2.0)
            best, residual = torch.where(closer, raised, best), torch.where(closer, gap, residual)
            x0_hat = torch.where(closer, prediction.x0, x0_hat)
            smallest = torch.where(closer, norm, smallest)
            # the last try is not evaluated: do not let it jump far
            tried = best + (weight.clamp(max=2.0) if step + 1 == fixed_point_steps else weight) * residual
            if tolerance > 0.0:
                done = per_image(residual.flatten(1).abs().amax(dim=1) <= tolerance, x)
                tried = torch.where(done, best, tried)
                if bool(done.all()):
                    raised = tried
                    break
            raised = tried
        x = raised
        carried = x0_hat if denoiser.self_conditioning else None
        if callback is not None:
            callback(Step(t, t_prev, x, x0_hat))
    return x


def _secant_weight(moved: Tensor, closed: Tensor) -> Tensor:
    """Return (B, 1, ...): <moved, closed> / <closed, closed> within [1/8, 1e6], or 1 before the first move.

    This weight would have closed the last gap best. It is large if a step is so long that step(x_t) hardly depends on x_t.
    """
    product = (moved * closed).flatten(1).sum(dim=1)
    weight = (product / closed.square().flatten(1).sum(dim=1)).clamp(0.125, 1e6)
    still = moved.flatten(1).abs().amax(dim=1) == 0
    return per_image(torch.where(still | ~torch.isfinite(weight), torch.ones_like(weight), weight), moved)


def invert_trajectory(denoiser: Denoiser, x0: Tensor, grid: Grid, **options: Any) -> Trajectory:
    """Return every image of `invert_ddim` by level: {-1: x0, ..., t: x_t}. ``options`` are those of `invert_ddim`."""
    grid = check_grid(grid, denoiser.schedule.num_steps)
    trajectory = {grid[-1][1]: x0}
    seen = options.pop("callback", None)

    def keep(step: Step) -> None:
        trajectory[step.t] = step.x
        if seen is not None:
            seen(step)

    invert_ddim(denoiser, x0, grid, callback=keep, **options)
    return trajectory


def reconstruct(
    denoiser: Denoiser, trajectory: Mapping[int, Tensor], grid: Grid, *, start: int | None = None, **options: Any
) -> Tensor:
    """Sample with DDIM, eta 0, from the trajectory's latent at level ``start`` (its highest level by default).

    ``options`` are those of `sample_ddim` (condition, callback, progress). Raises ValueError if the trajectory or the grid
    does not have this level.
    """
    if not trajectory:
        raise ValueError("an empty trajectory has no level to start from")
    start = max(trajectory) if start is None else start
    if start not in trajectory:
        raise ValueError(f"the trajectory has no level {start}; it has {sorted(trajectory)}")
    return sample_ddim(denoiser, trajectory[start], restrict_grid(grid, highest=start), **options)


def optimise_null_condition(
    denoiser: Denoiser,
    trajectory: Mapping[int, Tensor],
    grid: Grid,
    condition: Any,
    *,
    inner_steps: int = 10,
    learning_rate: float = 1e-2,
    tolerance: float = 0.0,
    progress: bool = False,
) -> list[Denoiser]:
    """Return one denoiser per grid step, with a null condition tuned so that guided sampling follows ``trajectory``.

    Null-text inversion (arXiv 2211.09794, algorithm 1). The trajectory is the pivot, an inversion with guidance scale 1.
    From its highest level down, the null of step t minimises |x*_s - step(x_t, t, null)|^2 with ``inner_steps`` of Adam,
    starting from the null of the step before; the next step starts at x_s = step(x_t, t, null). `sample_with_denoisers`
    replays it; another condition edits the image. A step ends early when the mean squared gap of each image is at most
    ``tolerance``.

    ``denoiser`` must be guided by `ClassifierFreeGuidance`. Every kind of condition works. A null of plain floats (a text
    embedding) is tuned itself, (B, ...) float. If the null is only a mark (class, multi-hot, vector), the output of the
    network's condition embedding for it is tuned: the modules with a ConditionSpec as ``spec``. The weights do not change.

    Raises ValueError if the denoiser is not guided, the guidance scale is 1, inner_steps is negative, the trajectory lacks a
    level of the grid or its images differ in shape, or there is not one condition per image.
    """
    guidance = denoiser.network
    if not isinstance(guidance, ClassifierFreeGuidance):
        raise ValueError("null-condition optimisation needs a denoiser whose network is a ClassifierFreeGuidance")
    if guidance.scale == 1.0:
        raise ValueError("at guidance scale 1 the null condition is never used: choose another scale")
    if inner_steps < 0:
        raise ValueError(f"inner_steps must not be negative, got {inner_steps}")
    grid = check_grid(grid, denoiser.schedule.num_steps)
    missing = sorted({level for pair in grid for level in pair} - set(trajectory))
    if missing:
        raise ValueError(f"the trajectory lacks the grid's levels {missing}: invert over the same grid")
    x = trajectory[grid[0][0]]
    shapes = {tuple(trajectory[level].shape) for pair in grid for level in pair}
    if len(shapes) > 1:
        raise ValueError(f"the images of a trajectory must have one shape, got {sorted(shapes)}")
    null = _start_null(guidance, x, grid[0][0])
    tuned: list[Denoiser] = []
    carried = None
    for t, t_prev in steps_of(grid, progress, "null optimisation"):
        aim = trajectory[t_prev]
        with torch.enable_grad():
            null = [value.detach().clone().requires_grad_() for value in null]
            optimizer = torch.optim.Adam(null, lr=learning_rate)
            for _ in range(inner_steps):
                at_t = dataclasses.replace(denoiser, network=_guided_by(guidance, null))
                gap = (ddim_step(at_t, at_t(x, t, condition, carried), t, t_prev) - aim).square().flatten(1).mean(dim=1)
                done = gap.detach() <= tolerance
                if bool(done.all()) or not gap.requires_grad:  # outside a guidance interval the null is not used
                    break
                gradients = torch.autograd.grad(gap.sum(), null)
                before = [value.detach().clone() for value in null]
                for value, gradient in zip(null, gradients, strict=True):
                    value.grad = gradient
                optimizer.step()
                with torch.no_grad():  # Adam's momentum must not move the null of an image that is done
                    for value, former in zip(null, before, strict=True):
                        value.copy_(torch.where(per_image(done, value), former, value))
        null = [value.detach() for value in null]
        tuned.append(dataclasses.replace(denoiser, network=_guided_by(guidance, null)))
        with torch.no_grad():
            prediction = tuned[-1](x, t, condition, carried)
            x = ddim_step(denoiser, prediction, t, t_prev)
        carried = prediction.x0 if denoiser.self_conditioning else None
    return tuned


@torch.no_grad()
def sample_with_denoisers(
    denoisers: Sequence[Denoiser],
    x_T: Tensor,
    grid: Grid,
    *,
    condition: Any = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample with DDIM, eta 0, and one denoiser per grid step, as `optimise_null_condition` returns them.

    Raises ValueError unless there is one denoiser per step.
    """
    if len(denoisers) != len(grid):
        raise ValueError(f"{len(grid)} grid steps need {len(grid)} denoisers, got {len(denoisers)}")
    grid = check_inputs(denoisers[0], x_T, grid) if denoisers else []
    x, carried = x_T, None
    for denoiser, (t, t_prev) in steps_of(list(zip(denoisers, grid, strict=True)), progress, "DDIM"):
        prediction = denoiser(x, t, condition, carried)
        x = ddim_step(denoiser, prediction, t, t_prev)
        carried = prediction.x0 if denoiser.self_conditioning else None
        if callback is not None:
            callback(Step(t, t_prev, x, prediction.x0))
    return x


def _embedding_modules(network: Network) -> list[nn.Module]:
    """Return the modules that embed a condition: those with a ConditionSpec as ``spec``."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    specs = ((module, getattr(module, "spec", None)) for module in modules)
    return [module for module, spec in specs if isinstance(spec, ConditionSpec) and spec.kind != "none"]


def _start_null(guidance: ClassifierFreeGuidance, x: Tensor, t: int) -> list[Tensor]:
    """Return the null as float tensors with one row per image: the null itself, or the output of each embedding module."""
    null = null_batch(guidance.null_condition, x)
    modules = _embedding_modules(guidance.network)
    if not modules:
        if not null.is_floating_point() or bool(torch.isnan(null).any()):
            raise ValueError(
                "this null condition is a mark, not numbers that can be tuned, and the network has no condition "
                "embedding whose output could be tuned instead"
            )
        return [null]
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs[module] = output if isinstance(output, Tensor) else output[0]

    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        guidance.network(x, torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device), null, None)
    return [outputs[module] for module in modules]


def _guided_by(guidance: ClassifierFreeGuidance, null: list[Tensor]) -> Network:
    """Return the same guidance with this null: tensors as `_start_null` returns them."""
    modules = _embedding_modules(guidance.network)
    if not modules:
        return dataclasses.replace(guidance, null_condition=null[0])
    weak = _network_with_embeddings(guidance.network, guidance.null_condition, modules, null)
    return Autoguidance(guidance.network, weak, guidance.scale, guidance.rescale, guidance.interval)


def _network_with_embeddings(
    network: Network, null_condition: Tensor, modules: list[nn.Module], embeddings: list[Tensor]
) -> Network:
    """Return the network with its condition ignored: each embedding module returns the given (B, ...) tensor."""

    def unconditional(x_t: Tensor, t: Tensor, condition: Any = None, self_condition: Tensor | None = None) -> Tensor:
        null = null_batch(null_condition, x_t)
        if any(embedding.shape[0] not in (1, x_t.shape[0]) for embedding in embeddings):
            raise ValueError(
                f"the null condition was tuned for {embeddings[0].shape[0]} images, but there are {x_t.shape[0]}"
            )
        with _outputs_replaced(modules, embeddings):
            return network(x_t, t, null, self_condition)

    return unconditional


@contextlib.contextmanager
def _outputs_replaced(modules: list[nn.Module], replacements: list[Tensor]) -> Iterator[None]:
    """Make each module return its replacement. If a module has several outputs (tokens and their mask), replace the first."""
    with contextlib.ExitStack() as stack:
        for module, replacement in zip(modules, replacements, strict=True):

            def replace(_module: nn.Module, _inputs: Any, output: Any, replacement: Tensor = replacement) -> Any:
                return replacement if isinstance(output, Tensor) else (replacement, *output[1:])

            stack.callback(module.register_forward_hook(replace).remove)
        yield
