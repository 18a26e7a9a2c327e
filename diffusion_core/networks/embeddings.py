"""Time embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoidal_embedding(
    t: Tensor, dim: int, max_period: float = 10_000.0, *, cos_first: bool = False, frequency_shift: float = 0.0
) -> Tensor:
    """Embed (B,) steps as (B, dim) float32: sines then cosines of t at dim / 2 geometric frequencies (arXiv 1706.03762, section 3.5).

    The frequencies are max_period^(-i / (dim / 2 - frequency_shift)), i = 0 .. dim / 2 - 1. DDPM's own code uses a shift of 1
    (the last frequency is 1 / max_period), ADM's a shift of 0 with the cosines first. Raises ValueError if ``dim`` is odd.
    """
    if dim % 2:
        raise ValueError(f"a sinusoidal embedding needs an even size, got {dim}")
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2 - frequency_shift)
    angles = t.to(torch.float32).view(-1, 1) * torch.exp(-math.log(max_period) * exponents).view(1, -1)
    sines, cosines = angles.sin(), angles.cos()
    return torch.cat([cosines, sines] if cos_first else [sines, cosines], dim=1)
