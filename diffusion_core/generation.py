"""From a model, labels and a seed to uint8 images: the one path that evaluation, grids, the CLI and serving share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_core.artifact import DiffusionModel
from diffusion_core.grids import make_grid
from diffusion_core.noise import NoiseSource
from diffusion_core.samplers import Step, check_eta, sample_ddim

CPU_BLOCK_SIZE = 16
"""Rows of one network call on a CPU; see `generate`."""


@dataclass(frozen=True)
class SamplerSettings:
    """A sampler setting: DDIM with ``eta`` over ``steps`` steps of a grid, at a guidance scale.

    Raises ValueError for eta outside [0, 1] (or "sigma_hat") and for fewer than one step.
    """

    steps: int = 50
    eta: float | Literal["sigma_hat"] = 0.0
    guidance_scale: float = 1.0
    spacing: str = "trailing"

    def __post_init__(self) -> None:
        check_eta(self.eta)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] floats to uint8, rounded to the nearest level."""
    return ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]; `to_uint8` takes them back exactly."""
    return images.to(torch.float32) / 127.5 - 1.0


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
    """Yield (positions, images): which rows of ``indices`` a block holds, and its (b, C, H, W) uint8 images.

    condition: (N, ...) as the model's network takes it; indices: (N,) int64, the global numbers of the samples. Sample k
    depends on (seed, k, its condition) alone. Its noise is the same bits in any batch. Matrix products round differently
    for another number of rows, so the network is always called with exactly ``block_size`` rows, the last block padded, and
    a sample keeps its row, k modulo the block size: its images are then the same bits too, whoever else is asked for.
    ``block_size`` is 16 on a CPU unless given. ``on_step(positions, step)`` sees every sampling step.
    """
    device = next(model.network.parameters()).device
    block_size = block_size or (CPU_BLOCK_SIZE if device.type == "cpu" else 256)
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
    """All images of `generate` as one (N, C, H, W) uint8 tensor, in the order of ``indices``."""
    images = torch.empty((len(indices), *model.image_shape), dtype=torch.uint8)
    for positions, block in generate(model, condition, indices, settings, **options):
        images[positions] = block
    return images


def _aligned_blocks(indices: Tensor, block_size: int) -> Iterator[Tensor]:
    """(block_size,) int64 positions into ``indices`` a block, -1 where empty: index k sits in row k modulo the block size.

    Distinct indices that share a block of the whole sequence of samples go together; a repeated index starts a block.
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
