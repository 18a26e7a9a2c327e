"""How feature maps lie in memory, and what the allocator does with the memory of those that are done."""

from __future__ import annotations

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = 2**31 - 1


def best_memory_format(device: torch.device | str, dtype: torch.dtype) -> torch.memory_format:
    """The layout in which a UNet that computes in ``dtype`` runs fastest: channels-last, except in bfloat16 on a CPU.

    Convolutions want channels-last everywhere. PyTorch's group norm for CPUs is slow there, in bfloat16 up to 30 times as
    slow (docs/results/core.md), which costs more than the convolutions gain.
    """
    if torch.device(device).type == "cpu" and dtype == torch.bfloat16:
        return torch.contiguous_format
    return torch.channels_last


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed tensors for the next ones, for the rest of this process; says whether it does.

    Every step of a training or sampling run allocates and frees the same feature maps. By default glibc gives large ones
    back to the kernel, which must map and clear their pages again: up to a third of a training step on a CPU
    (docs/results/core.md). The process then never shrinks below its peak. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _NEVER)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
