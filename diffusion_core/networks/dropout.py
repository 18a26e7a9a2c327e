"""Dropout whose mask is addressed by (seed, step, position in the global batch), so that it does not depend on rank or batch split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.noise import NoiseSource


@dataclass(frozen=True)
class _Address:
    source: NoiseSource
    step: int
    positions: Tensor


class Dropout(nn.Module):
    """Zero each number with probability ``p`` and divide the rest by 1 - p (JMLR 15, 2014), in training mode only.

    Uses PyTorch's generator outside of `addressed_dropout`. Raises ValueError if p is not in [0, 1).
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout must lie in 0 to 1 (1 excluded), got {p}")
        self.p = p
        self._address: _Address | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, ...) floats. Returns the same shape. Raises ValueError if B is not the number of addressed positions."""
        if not self.training or self.p == 0.0:
            return x
        if self._address is None:
            return F.dropout(x, self.p, training=True)
        source, step, positions = self._address.source, self._address.step, self._address.positions
        if len(x) != len(positions):
            raise ValueError(f"addressed_dropout has {len(positions)} positions, but the batch has {len(x)} rows")
        dropped = source.bernoulli(self.p, x.shape[1:], positions, step)
        return x * ~dropped / (1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


@contextmanager
def addressed_dropout(network: nn.Module, *, seed: int, step: int, positions: Tensor) -> Iterator[None]:
    """Give the mask of each `Dropout` in ``network`` an address while the block runs.

    Row k of a batch gets the mask of ``positions[k]`` at ``step``: image ``positions[k]`` of the global batch has the same mask on
    any rank, for any world size, and after a restart. The i-th Dropout of ``network.modules()`` draws from the stream
    "train-dropout/i". All forward passes of the block share their masks, such as the two passes of self-conditioning.

    network: the bare network, also if DistributedDataParallel calls it. positions: (B,) int64 on the network's device.
    Raises ValueError if the seed is out of range; a forward pass raises it if positions or step are, or if the batch does not
    have B rows.
    """
    layers = [module for module in network.modules() if isinstance(module, Dropout)]
    before = [layer._address for layer in layers]
    addresses = [_Address(NoiseSource(seed, f"train-dropout/{i}"), step, positions) for i in range(len(layers))]
    try:
        for layer, address in zip(layers, addresses, strict=True):
            layer._address = address
        yield
    finally:
        for layer, previous in zip(layers, before, strict=True):
            layer._address = previous
