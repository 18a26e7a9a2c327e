"""Device, threads and precision of a process. Ray assigns the devices of tasks, trials and workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffusion_core.networks.memory import keep_freed_memory


def prepare_process(threads: int) -> torch.device:
    """Prepare a Ray task, trial or actor to compute, and return the device that Ray assigned to it.

    On a CPU the process takes ``threads`` threads and keeps freed memory. Raises ValueError if Ray assigned a GPU that torch cannot
    use, or several GPUs.
    """
    use_full_float32()
    device = assigned_device()
    if device.type == "cpu":
        prepare_cpu(threads)
    return device


def use_full_float32() -> None:
    """Switch TF32 off, so that float32 means the same on every device. PyTorch rounds convolutions on a GPU to TF32 by default."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def deterministic() -> Iterator[None]:
    """Let the block compute the same bits in every run on the same type of GPU. Raises RuntimeError for an operation that cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it before its first product
    former = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(former[0])
        torch.backends.cudnn.benchmark = former[1]


def prepare_cpu(threads: int) -> None:
    """Take ``threads`` threads, and keep freed memory for the next tensors."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def assigned_device() -> torch.device:
    """The CPU if Ray assigned no GPU to this process, else the GPU. Ray does not hide GPUs from tasks that asked for none.

    Raises ValueError if Ray assigned a GPU that torch cannot use, or several GPUs.
    """
    import ray

    ids = ray.get_gpu_ids()
    if not ids:
        return torch.device("cpu")
    if len(ids) > 1:
        raise ValueError(f"Ray assigned {len(ids)} GPUs to one process, which computes on one: ask for at most 1")
    if not torch.cuda.is_available():
        raise ValueError(
            f"Ray assigned GPU {ids[0]} to this process, but torch {torch.__version__} cannot use it: install a driver and a "
            "torch build that fit each other, or set the GPUs to 0 in run.yaml"
        )
    return torch.device("cuda:0")


def driver_device(device: str = "auto") -> torch.device:
    """The device of a process that Ray did not start: ``auto`` is cuda if there is a GPU.

    Raises ValueError if ``device`` is cuda and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("reference.device in run.yaml: given cuda, but torch sees no GPU here: set auto or cpu")
    use_full_float32()
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def has_bf16(device: torch.device) -> bool:
    """Return True if the device multiplies bf16 natively: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(flag)) for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def best_precision(device: torch.device) -> str:
    """Return bf16 if the device multiplies it natively, else fp32. Raises ValueError for a GPU that torch cannot use."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"Ray offers GPUs, but torch {torch.__version__} cannot use them: install a driver and a torch build that fit each "
            "other, or set the GPUs to 0 in run.yaml"
        )
    return "bf16" if has_bf16(device) else "fp32"
