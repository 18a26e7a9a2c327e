"""From an image back to the latent that a deterministic sampler would make it from, and back again.

A trajectory is ``{level: x}``: the image at each level of a grid, -1 being the clean one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_core.denoiser import Denoiser, Network, call_network
from diffusion_core.grids import Grid, check_grid, restrict_grid
from diffusion_core.guidance import Autoguidance, ClassifierFreeGuidance
from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.objectives import per_image
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
    """The latent at the grid's first level from which `sample_ddim` with eta 0 leads back to ``x0``.

    Walks the sampling grid upwards. From level s to t, with (x0_hat, eps) = denoiser(x_s, t) (arXiv 2010.02502, section
    4.3 and eq. 13): x_t = sqrt(a_t) x0_hat + sqrt(1 - a_t) eps. Because the network sees x_s where the sampler will show
    it x_t, the round trip has a gap of first order in the step. ``fixed_point_steps`` closes it: x_t <- x_t + w (x_s - step(x_t)),
    step being the sampler's own from t to s. Its fixed point is the exact inverse, which is the equation that AIDI solves by
    iteration (arXiv 2309.04907, section 3); written so, as a residual, it also converges near pure noise, where iterating
    on eps alone stalls. w is 1 at first, then for each image the secant through its last two tries, and halved where its gap
    |x_s - step(x_t)| would grow (Barzilai and Borwein, IMA J. Numer. Anal. 8, 1988, with that safeguard). An image stops once no
    element of its gap is above ``tolerance``, or after that many network calls a level. With ``self_conditioning`` the gap is
    that of a sampler which carries the estimates of this walk; the sampler carries its own, so that some of it stays.

    x0: (B, ...) float32 at the grid's last level (-1, the clean image, or any middle latent). Returns (B, ...). The
    callback sees Step(t, s, x_t, x0_hat) for each step up. Raises ValueError for a grid that does not fit the schedule.
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
            # the last try is not evaluated any more: no long jump there
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
    """(B, 1, ...): <moved, closed> / <closed, closed>, within [1/8, 1e6]: what would have closed the gap best; 1 before any move.

    Where a step is so long that step(x_t) hardly depends on x_t, it takes a large one to close the gap.
    """
    product = (moved * closed).flatten(1).sum(dim=1)
    weight = (product / closed.square().flatten(1).sum(dim=1)).clamp(0.125, 1e6)
    still = moved.flatten(1).abs().amax(dim=1) == 0
    return per_image(torch.where(still | ~torch.isfinite(weight), torch.ones_like(weight), weight), moved)


def invert_trajectory(denoiser: Denoiser, x0: Tensor, grid: Grid, **options: Any) -> Trajectory:
    """Every image of `invert_ddim`, by level: {-1: x0, ..., t: x_t}. ``options`` are those of `invert_ddim`."""
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
    """Sample back with DDIM, eta 0, from the trajectory's latent at level ``start`` (its highest unless given).

    ``options`` are those of `sample_ddim` (condition, callback, progress). Raises ValueError for a level that the
    trajectory or the grid does not have.
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
    """One denoiser a grid step, whose null condition was tuned until guided sampling follows ``trajectory``.

    Null-text inversion (arXiv 2211.09794, algorithm 1). The trajectory is an inversion with guidance scale 1, the pivot;
    from its highest level down, the null of step t minimises |x*_s - step(x_t, t, null)|^2 by ``inner_steps`` of Adam,
    starting from the null of the step before, and x_s = step(x_t, t, null) goes on. `sample_with_denoisers` replays it,
    also with another condition, to edit. Stops a step early once each image's mean squared gap is at most ``tolerance``.

    ``denoiser`` must be guided by `ClassifierFreeGuidance`. For any kind of condition: a null of plain floats (a text
    embedding) is tuned itself, (B, ...) float; a null that is only a mark (class, multi-hot, vector) is tuned as what the
    network's condition embedding makes of it (the modules that hold a ``spec``, a ConditionSpec). The network's weights stay as they are.

    Raises ValueError for an unguided denoiser, guidance scale 1, inner_steps below 0, or a trajectory without one of the
    grid's levels.
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
                if bool(done.all()) or not gap.requires_grad:  # outside a guidance interval the null takes no part
                    break
                gradients = torch.autograd.grad(gap.sum(), null)
                before = [value.detach().clone() for value in null]
                for value, gradient in zip(null, gradients, strict=True):
                    value.grad = gradient
                optimizer.step()
                with torch.no_grad():  # Adam's momentum must not move an image that is done
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
    """DDIM with eta 0 and another denoiser at each step of the grid, as `optimise_null_condition` returns them.

    Raises ValueError unless there is one denoiser a step.
    """
    if len(denoisers) != len(grid):
        raise ValueError(f"{len(grid)} grid steps need as many denoisers, got {len(denoisers)}")
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
    """The modules that turn a condition into numbers: those that hold the ConditionSpec as ``spec``."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    specs = ((module, getattr(module, "spec", None)) for module in modules)
    return [module for module, spec in specs if isinstance(spec, ConditionSpec) and spec.kind != "none"]


def _start_null(guidance: ClassifierFreeGuidance, x: Tensor, t: int) -> list[Tensor]:
    """The null as a list of float tensors, each with one row an image: itself, or what each embedding module makes of it."""
    null = guidance.null_condition.to(x.device).expand(x.shape[0], *guidance.null_condition.shape[1:])
    modules = _embedding_modules(guidance.network)
    if not modules:
        if not null.is_floating_point() or bool(torch.isnan(null).any()):
            raise ValueError(
                "this null condition is a mark, not numbers that can be tuned, and the network has no condition "
                "embedding whose output could be tuned in its place"
            )
        return [null]
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs[module] = output if isinstance(output, Tensor) else output[0]

    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        call_network(guidance.network, x, torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device), null)
    return [outputs[module] for module in modules]


def _guided_by(guidance: ClassifierFreeGuidance, null: list[Tensor]) -> Network:
    """The same guidance with this null: tensors as `_start_null` gives them."""
    modules = _embedding_modules(guidance.network)
    if not modules:
        return dataclasses.replace(guidance, null_condition=null[0])
    weak = _network_with_embeddings(guidance.network, guidance.null_condition, modules, null)
    return Autoguidance(guidance.network, weak, guidance.scale, guidance.rescale, guidance.interval)


def _network_with_embeddings(
    network: Network, null_condition: Tensor, modules: list[nn.Module], embeddings: list[Tensor]
) -> Callable[..., Tensor]:
    """The network, ignoring its condition: each embedding module returns the given (B, ...) tensor instead."""

    def unconditional(x_t: Tensor, t: Tensor, condition: Any = None, self_condition: Tensor | None = None) -> Tensor:
        null = null_condition.to(x_t.device).expand(x_t.shape[0], *null_condition.shape[1:])
        with _outputs_replaced(modules, embeddings):
            return call_network(network, x_t, t, null, self_condition)

    return unconditional


@contextlib.contextmanager
def _outputs_replaced(modules: list[nn.Module], replacements: list[Tensor]) -> Iterator[None]:
    """Each module returns its replacement; of several outputs (tokens and their mask) the first is replaced."""
    with contextlib.ExitStack() as stack:
        for module, replacement in zip(modules, replacements, strict=True):

            def replace(_module: nn.Module, _inputs: Any, output: Any, replacement: Tensor = replacement) -> Any:
                return replacement if isinstance(output, Tensor) else (replacement, *output[1:])

            stack.callback(module.register_forward_hook(replace).remove)
        yield
