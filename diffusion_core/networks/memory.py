"""The memory layout of feature maps, and the allocator's treatment of freed ones."""

from __future__ import annotations

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = 2**31 - 1


def best_memory_format(device: torch.device | str, dtype: torch.dtype) -> torch.memory_format:
    """Return the fastest memory layout of a UNet that computes in ``dtype``: channels-last, except in bfloat16 on a CPU.

    Convolutions are fastest in channels-last. But PyTorch's bfloat16 group norm for CPUs is up to 30 times slower in it
    (docs/results/core.md), which costs more than the convolutions gain.
    """
    if torch.device(device).type == "cpu" and dtype == torch.bfloat16:
        return torch.contiguous_format
    return torch.channels_last


def keep_freed_memory() -> bool:
    """Make glibc keep the memory of freed tensors for the rest of this process. Returns whether it does.

    Every step of a training or sampling run allocates and frees the same feature maps. By default glibc returns large ones
    to the kernel, which must map and clear their pages again: up to a third of a training step on a CPU
    (docs/results/core.md). The process then never shrinks below its peak. Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _NEVER)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
