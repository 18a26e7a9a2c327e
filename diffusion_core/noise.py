"""Random numbers that are addressed, not consumed.

The number at (seed, stream, step, sample index, element) is a pure function of that address, so that sample k is
the same in a batch of 1 or 256, on one worker or 64, on a CPU or a GPU. It is Philox4x32-10 (Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), written over int64 tensors.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.checks import is_whole

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ten rounds of Philox4x32. ``counter``: four int64 tensors that broadcast, each value in [0, 2^32).

    Returns four int64 tensors of words in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # the 64-bit products; signed wrap keeps their bits
        # in place on new tensors only: several times faster on a CPU than a new tensor per operation
        c0 = (high >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (low >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = high.bitwise_and_(_MASK), low.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class NoiseSource:
    """Random numbers of one seed and one named stream.

    ``seed``: a non-negative integer below 2^63. ``stream`` separates uses, such as sampling and training noise.

    Raises ValueError if the seed, a step or (on a CPU only) a sample index is out of range.
    """

    seed: int
    stream: str = "sample"

    def __post_init__(self) -> None:
        if not is_whole(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"a seed must be a whole number from 0 to 2^63 - 1, got {self.seed!r}")

    def uniform(self, shape: Sequence[int], indices: Tensor, step: int) -> Tensor:
        """Draw uniform numbers in (0, 1), (B, *shape) float64, for the samples ``indices`` ((B,) int64, in [0, 2^32)) at ``step``."""
        words = torch.stack(self._words(math.prod(shape), indices, step), dim=-1).flatten(1)
        return _open_unit(words[:, : math.prod(shape)]).view(-1, *shape)

    def bernoulli(self, share: float, shape: Sequence[int], indices: Tensor, step: int) -> Tensor:
        """Draw booleans, (B, *shape), True with probability ``share`` (rounded to 2^-32), for the samples ``indices`` at ``step``.

        Compares words with an integer, which is faster than `uniform`. Raises ValueError if ``share`` is not in [0, 1].
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"a share must lie in 0 to 1, got {share}")
        words = self._words(math.prod(shape), indices, step)
        below = torch.stack([word < round(share * 2**32) for word in words], dim=-1)
        return below.flatten(1)[:, : math.prod(shape)].reshape(-1, *shape)

    def normal(self, shape: Sequence[int], indices: Tensor, step: int) -> Tensor:
        """Draw standard normals, (B, *shape) float32, by Box and Muller in float64, for the samples ``indices`` at ``step``."""
        first, second, third, fourth = (_open_unit(word) for word in self._words(math.prod(shape), indices, step))
        radius_one, radius_two = torch.sqrt(-2.0 * torch.log(first)), torch.sqrt(-2.0 * torch.log(third))
        angle_one, angle_two = 2.0 * math.pi * second, 2.0 * math.pi * fourth
        values = torch.stack(
            [
                radius_one * torch.cos(angle_one),
                radius_one * torch.sin(angle_one),
                radius_two * torch.cos(angle_two),
                radius_two * torch.sin(angle_two),
            ],
            dim=-1,
        )
        return values.flatten(1)[:, : math.prod(shape)].to(torch.float32).reshape(-1, *shape)

    def for_samples(self, shape: Sequence[int], indices: Tensor) -> Callable[[int], Tensor]:
        """Return the function ``noise(step)`` of these samples, (B, *shape) float32, that a sampler takes as ``noise``."""
        return lambda step: self.normal(shape, indices, step)

    def _words(self, count: int, indices: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return four words per group of four elements, each a tensor (B, ceil(count / 4))."""
        if not 0 <= step <= _MASK:
            raise ValueError(f"the step of a draw must lie in 0 to 2^32 - 1, got {step}")
        if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.dtype not in _INTEGERS:
            raise ValueError("sample indices must be a vector of whole numbers, such as torch.arange(64)")
        if indices.device.type == "cpu" and indices.numel():  # on another device, reading them would wait for it
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high > _MASK:
                raise ValueError(f"sample indices must lie in 0 to 2^32 - 1, got {low} to {high}")
        device = indices.device
        blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=device).view(1, -1)
        rows = indices.to(torch.int64).view(-1, 1)
        stream = torch.full_like(rows, zlib.crc32(self.stream.encode()))
        counter = (blocks.expand(rows.shape[0], -1), rows, torch.full_like(rows, step & _MASK), stream)
        return philox4x32(counter, (self.seed & _MASK, self.seed >> 32))


def _open_unit(words: Tensor) -> Tensor:
    """Map 32-bit words to float64 in the open interval (0, 1)."""
    return (words.to(torch.float64) + 0.5) * 2.0**-32
