"""Generation of uint8 images from a model, conditions and a seed, with one address per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion_core.artifact import DiffusionModel
from diffusion_core.checks import is_whole
from diffusion_core.denoiser import Denoiser
from diffusion_core.grids import SPACINGS, Grid, make_grid
from diffusion_core.images import to_uint8
from diffusion_core.noise import NoiseSource
from diffusion_core.objectives import Network
from diffusion_core.samplers import Step, check_eta, sample_ddim

MOST_INDICES = 2**32
"""Sample indices are below this: `NoiseSource` addresses its noise with 32 bits of them."""


class NonFiniteOutputError(ValueError):
    """The network returned NaN or infinity."""


@dataclass(frozen=True)
class SamplerSettings:
    """A sampler setting: DDIM with ``eta`` over ``steps`` steps of a grid, at a guidance scale.

    Raises ValueError if eta is not in [0, 1] or "sigma_hat", steps is not a whole number of at least 1, the guidance scale is
    not finite, or the spacing is unknown.
    """

    steps: int = 50
    eta: float | Literal["sigma_hat"] = 0.0
    guidance_scale: float = 1.0
    spacing: str = "trailing"

    def __post_init__(self) -> None:
        check_eta(self.eta)
        if not is_whole(self.steps) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"steps must be at least 1 and a whole number, got {self.steps!r}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"a guidance scale must be a finite number, got {self.guidance_scale}")
        if self.spacing not in SPACINGS:
            raise ValueError(f"unknown grid spacing {self.spacing!r}: choose one of {', '.join(SPACINGS)}")


def default_settings(model: DiffusionModel) -> SamplerSettings:
    """Return the settings for a model about which nothing else is known: deterministic DDIM with at most 50 steps."""
    return SamplerSettings(steps=min(50, model.schedule.num_steps))


def rows_per_call(device_type: str, num_samples: int) -> int:
    """Return the default number of rows per network call.

    16 on a CPU; otherwise the smallest power of two that holds ``num_samples``, at most 256.
    """
    if device_type == "cpu":
        return 16
    return min(256, 1 << max(num_samples - 1, 0).bit_length())


def generate(
    model: DiffusionModel,
    condition: Tensor | None,
    indices: Tensor,
    settings: SamplerSettings,
    *,
    seed: int,
    block_size: int | None = None,
    on_step: Callable[[Tensor, Step], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (positions, images) per block: its rows of ``indices``, and their (b, C, H, W) uint8 images.

    condition: (N, ...) as the model's network takes it, or None for the null condition; indices: (N,) int64, the global numbers
    of the samples. Sample k depends only on (seed, k, its condition), and its noise is bit-identical in any batch. Matrix products
    round differently for different numbers of rows, so every network call has exactly ``block_size`` rows, with the last block
    padded, and sample k is always in row k modulo ``block_size``. Its image is then bit-identical for any batch composition at one
    block size. Across block sizes, bit-identity is not promised on a GPU. ``block_size``: `rows_per_call` by default.
    ``on_step(positions, step)`` sees every sampling step. A network in half precision computes in it; the sampler uses float32.

    Raises ValueError, before it samples, if the conditions, their number, the indices or the settings do not fit; and
    `NonFiniteOutputError` at the end of a block in which the network returned NaN or infinity.
    """
    device = next(model.network.parameters()).device
    block_size = rows_per_call(device.type, len(indices)) if block_size is None else block_size
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    _check_indices(indices)
    if condition is None:
        if settings.guidance_scale != 1.0:
            raise ValueError("guidance needs a condition to guide towards: give one, or use guidance_scale 1")
        condition = model.condition.null(len(indices))
    model.condition.check(condition)
    if len(condition) != len(indices):
        raise ValueError(f"{len(condition)} conditions were given for {len(indices)} indices: give one per sample")
    denoiser = _in_its_precision(model).denoiser(settings.guidance_scale)
    grid = make_grid(settings.spacing, model.schedule.num_steps, settings.steps)
    source = NoiseSource(seed)
    return _generate(
        denoiser, model.image_shape, grid, source, condition, indices, settings.eta, block_size, device, on_step
    )


@torch.inference_mode()
def _generate(
    denoiser: Denoiser,
    shape: tuple[int, int, int],
    grid: Grid,
    source: NoiseSource,
    condition: Tensor,
    indices: Tensor,
    eta: float | Literal["sigma_hat"],
    block_size: int,
    device: torch.device,
    on_step: Callable[[Tensor, Step], None] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sample the blocks of `generate`."""
    for rows in _aligned_blocks(indices, block_size):
        taken = rows >= 0
        positions = rows[taken]
        filled = torch.where(taken, rows, positions[0])
        block_indices, block_condition = indices[filled].to(device), condition[filled].to(device)
        x_T = source.normal(shape, block_indices, denoiser.schedule.num_steps)
        x_T = x_T.contiguous(memory_format=torch.channels_last)
        watched = _WatchedNetwork(denoiser.network, torch.full((block_size,), -1, device=device))

        def noise(t: int, block_indices: Tensor = block_indices) -> Tensor:
            return source.normal(shape, block_indices, t)

        def callback(step: Step, taken: Tensor = taken, positions: Tensor = positions) -> None:
            if on_step is not None:
                on_step(positions, step._replace(x=step.x[taken], x0=step.x0[taken]))

        images = sample_ddim(
            replace(denoiser, network=watched),
            x_T,
            grid,
            noise,
            eta=eta,
            condition=block_condition,
            callback=callback if on_step is not None else None,
        )
        watched.check(block_indices, block_condition)
        yield positions, to_uint8(images)[taken.to(device)].cpu()


def generate_images(
    model: DiffusionModel, condition: Tensor | None, indices: Tensor, settings: SamplerSettings, **options
) -> Tensor:
    """Return all images of `generate` as one (N, C, H, W) uint8 tensor, in the order of ``indices``."""
    images = torch.empty((len(indices), *model.image_shape), dtype=torch.uint8)
    for positions, block in generate(model, condition, indices, settings, **options):
        images[positions] = block
    return images


class _WatchedNetwork:
    """A network that records for each row the first step at which its output is not finite, without waiting for a GPU.

    ``failed_at``: (B,) int64, -1 in every row at first.
    """

    def __init__(self, network: Network, failed_at: Tensor) -> None:
        self.network = network
        self.failed_at = failed_at

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any, self_condition: Tensor | None = None) -> Tensor:
        output = self.network(x_t, t, condition, self_condition)
        if isinstance(output, Tensor) and output.shape[:1] == t.shape:  # the denoiser refuses anything else
            failed = (self.failed_at < 0) & ~output.isfinite().flatten(1).all(dim=1)
            self.failed_at = torch.where(failed, t, self.failed_at)
        return output

    def check(self, indices: Tensor, condition: Tensor) -> None:
        """Raise `NonFiniteOutputError` that names the step, the sample and the condition that failed first."""
        failed_at = self.failed_at.cpu()
        step, row = (int(value) for value in failed_at.max(dim=0))
        if step < 0:
            return
        samples = indices.cpu()[failed_at >= 0].unique()
        others = f" and for {len(samples) - 1} more samples" if len(samples) > 1 else ""
        raise NonFiniteOutputError(
            f"the network returned NaN or infinity at step t = {step} for sample {int(indices[row])} with condition "
            f"{_shown(condition[row])}{others}: its weights diverged, or its precision is too low for them"
        )


class _InItsPrecision(nn.Module):
    """A network with weights of another dtype than float32, in the call form of a float32 network."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, x_t: Tensor, t: Tensor, condition: Any, self_condition: Tensor | None = None) -> Tensor:
        last = None if self_condition is None else self_condition.to(self.dtype)
        output = self.network(x_t.to(self.dtype), t, condition, last)
        return output.to(x_t.dtype) if isinstance(output, Tensor) else output  # the denoiser refuses anything else


def _in_its_precision(model: DiffusionModel) -> DiffusionModel:
    dtype = next(model.network.parameters()).dtype
    return model if dtype == torch.float32 else replace(model, network=_InItsPrecision(model.network, dtype))


def _check_indices(indices: Tensor) -> None:
    if (
        not isinstance(indices, Tensor)
        or indices.ndim != 1
        or indices.is_floating_point()
        or indices.dtype == torch.bool
    ):
        raise ValueError("indices must be an (N,) tensor of whole numbers, one per sample")
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= MOST_INDICES):
        raise ValueError(
            f"sample indices must lie in 0 to {MOST_INDICES - 1}, got {int(indices.min())} to {int(indices.max())}"
        )


def _shown(condition: Tensor) -> str:
    text = str(condition.tolist())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _aligned_blocks(indices: Tensor, block_size: int) -> Iterator[Tensor]:
    """Yield (block_size,) int64 positions into ``indices``, -1 in empty rows; index k is in row k modulo ``block_size``.

    Indices with the same k // block_size share a block; a repeated index starts another one.
    """
    pending: dict[int, list[Tensor]] = {}
    for position, index in enumerate(indices.tolist()):
        blocks = pending.setdefault(index // block_size, [])
        row = index % block_size
        for block in blocks:
            if block[row] < 0:
                break
        else:
            block = torch.full((block_size,), -1, dtype=torch.int64)
            blocks.append(block)
        block[row] = position
    for blocks in pending.values():
        yield from blocks
