"""Training checkpoints: tensors in safetensors, the rest in JSON with the tensors' SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from diffusion_core.storage import read_json, sync_folder, write_json
from pipelines.training.loop import TrainState

TENSORS, DESCRIPTION = "checkpoint.safetensors", "checkpoint.json"
ORIGIN = ("torch", "device_type")
"""Entries of the description that tell where the steps before the checkpoint ran."""


def save_checkpoint(state: TrainState, folder: Path, key: str) -> None:
    """Write ``state`` into ``folder``; ``key`` is the fingerprint of the run. The description is written last."""
    tensors: dict[str, Tensor] = {}
    for prefix, values in (("network", state.network.state_dict()), ("ema", state.ema.network.state_dict())):
        tensors |= {f"{prefix}.{name}": value.detach().cpu().contiguous() for name, value in values.items()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
            for name, value in slots.items()
        }
    tensors |= {
        "history.losses": state.losses[: state.step].clone(),
        "history.grad_norms": state.grad_norms[: state.step].clone(),
    }
    path = folder / TENSORS
    save_file(tensors, path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    sync_folder(folder)
    device_type = next(state.network.parameters()).device.type
    origin = dict(zip(ORIGIN, (str(torch.__version__), device_type), strict=True))
    write_json(folder / DESCRIPTION, {"step": state.step, "key": key, "sha256": digest, **origin})


def load_checkpoint(state: TrainState, folder: Path, key: str) -> None:
    """Put the checkpoint's values into ``state``. Raises ValueError if it is torn, damaged or of another run."""
    description = read_json(folder / DESCRIPTION)
    content = _checked(folder, description, key)
    tensors = load(content)
    state.network.load_state_dict(_under("network.", tensors))
    state.ema.network.load_state_dict(_under("ema.", tensors))
    parameters = list(state.network.parameters())
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in _under("optimizer.", tensors).items():
        index, slot = name.split(".", 1)
        like = parameters[int(index)]
        if (
            value.shape == like.shape
        ):  # the fused optimizer needs the strides of the parameter: it walks memory in order
            value = torch.empty_like(like, device="cpu").copy_(value)
        slots.setdefault(int(index), {})[slot] = value
    state.optimizer.load_state_dict({"state": slots, "param_groups": state.optimizer.state_dict()["param_groups"]})
    state.step = int(description["step"])
    state.losses[: state.step] = tensors["history.losses"]
    state.grad_norms[: state.step] = tensors["history.grad_norms"]


def check_checkpoint(folder: Path, key: str) -> int:
    """Return the step of a whole checkpoint. Raises ValueError if it is torn, damaged or of another run."""
    description = read_json(folder / DESCRIPTION)
    _checked(folder, description, key)
    return int(description["step"])


def origin_of(folder: Path) -> dict[str, str]:
    """Return the torch version and the device type of the process that wrote the checkpoint."""
    description = read_json(folder / DESCRIPTION)
    return {name: description[name] for name in ORIGIN}


def _checked(folder: Path, description: Any, key: str) -> bytes:
    try:
        expected, own_key = description["sha256"], description["key"]
    except (KeyError, TypeError):
        raise ValueError(f"{folder / DESCRIPTION} does not describe a checkpoint") from None
    if own_key != key:
        raise ValueError(f"{folder} belongs to run {own_key}, not {key}")
    try:
        content = (folder / TENSORS).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {folder / TENSORS}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(f"{folder / TENSORS} is torn: its SHA-256 is not the one in {DESCRIPTION}")
    return content


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
