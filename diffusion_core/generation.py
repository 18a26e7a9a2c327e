"""Generation of uint8 images from a model, conditions and a seed, with one address per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_core.artifact import DiffusionModel
from diffusion_core.grids import make_grid
from diffusion_core.images import to_uint8
from diffusion_core.noise import NoiseSource
from diffusion_core.samplers import Step, check_eta, sample_ddim


@dataclass(frozen=True)
class SamplerSettings:
    """A sampler setting: DDIM with ``eta`` over ``steps`` steps of a grid, at a guidance scale.

    Raises ValueError if eta is not in [0, 1] or "sigma_hat", or steps is below 1.
    """

    steps: int = 50
    eta: float | Literal["sigma_hat"] = 0.0
    guidance_scale: float = 1.0
    spacing: str = "trailing"

    def __post_init__(self) -> None:
        check_eta(self.eta)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def rows_per_call(device_type: str, num_samples: int) -> int:
    """Return the default number of rows per network call.

    16 on a CPU; otherwise the smallest power of two that holds ``num_samples``, at most 256.
    """
    if device_type == "cpu":
        return 16
    return min(256, 1 << max(num_samples - 1, 0).bit_length())


@torch.inference_mode()
def generate(
    model: DiffusionModel,
    condition: Tensor,
    indices: Tensor,
    settings: SamplerSettings,
    *,
    seed: int,
    block_size: int | None = None,
    on_step: Callable[[Tensor, Step], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (positions, images) per block: its rows of ``indices``, and their (b, C, H, W) uint8 images.

    condition: (N, ...) as the model's network takes it; indices: (N,) int64, the global numbers of the samples. Sample k
    depends only on (seed, k, its condition), and its noise is bit-identical in any batch. Matrix products round differently
    for different numbers of rows, so every network call has exactly ``block_size`` rows, with the last block padded, and
    sample k is always in row k modulo ``block_size``. Its image is then bit-identical for any batch composition at one
    block size. Across block sizes, bit-identity is not promised on a GPU. ``block_size``: `rows_per_call` by default.
    ``on_step(positions, step)`` sees every sampling step.
    """
    device = next(model.network.parameters()).device
    block_size = block_size or rows_per_call(device.type, len(indices))
    denoiser = model.denoiser(settings.guidance_scale)
    grid = make_grid(settings.spacing, model.schedule.num_steps, settings.steps)
    source = NoiseSource(seed)
    shape = model.image_shape
    for rows in _aligned_blocks(indices, block_size):
        taken = rows >= 0
        positions = rows[taken]
        filled = torch.where(taken, rows, positions[0])
        block_indices, block_condition = indices[filled].to(device), condition[filled].to(device)
        x_T = source.normal(shape, block_indices, model.schedule.num_steps)
        x_T = x_T.contiguous(memory_format=torch.channels_last)

        def noise(t: int, block_indices: Tensor = block_indices) -> Tensor:
            return source.normal(shape, block_indices, t)

        def callback(step: Step, taken: Tensor = taken, positions: Tensor = positions) -> None:
            if on_step is not None:
                on_step(positions, step._replace(x=step.x[taken], x0=step.x0[taken]))

        images = sample_ddim(
            denoiser,
            x_T,
            grid,
            noise,
            eta=settings.eta,
            condition=block_condition,
            callback=callback if on_step is not None else None,
        )
        yield positions, to_uint8(images)[taken.to(device)].cpu()


def generate_images(
    model: DiffusionModel, condition: Tensor, indices: Tensor, settings: SamplerSettings, **options
) -> Tensor:
    """Return all images of `generate` as one (N, C, H, W) uint8 tensor, in the order of ``indices``."""
    images = torch.empty((len(indices), *model.image_shape), dtype=torch.uint8)
    for positions, block in generate(model, condition, indices, settings, **options):
        images[positions] = block
    return images


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
