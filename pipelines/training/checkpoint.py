"""Training checkpoints: tensors in safetensors, the rest in JSON with the tensors' SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from diffusion_core.storage import file_sha256, read_json, sync_folder, write_json
from pipelines.training.loop import TrainState

TENSORS, DESCRIPTION = "checkpoint.safetensors", "checkpoint.json"
ORIGIN = ("torch", "device_type")
"""Description entries for the torch version and device type of the writing process."""


class CheckpointMismatchError(ValueError):
    """A whole checkpoint whose tensors do not fit the network or the settings."""


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
    digest = file_sha256(path)
    sync_folder(folder)
    device_type = next(state.network.parameters()).device.type
    origin = dict(zip(ORIGIN, (str(torch.__version__), device_type), strict=True))
    write_json(folder / DESCRIPTION, {"step": state.step, "key": key, "sha256": digest, **origin})


def load_checkpoint(state: TrainState, folder: Path, key: str) -> None:
    """Put the checkpoint's values into ``state``.

    Raises ValueError if it is torn, damaged or of another run, and CheckpointMismatchError if it does not fit; ``state`` is then
    unchanged.
    """
    description = read_json(folder / DESCRIPTION)
    content = _checked(folder, description, key)
    tensors = load(content)
    _check_fit(state, tensors, int(description["step"]), folder)
    state.network.load_state_dict(_under("network.", tensors))
    state.ema.network.load_state_dict(_under("ema.", tensors))
    parameters = list(state.network.parameters())
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in _under("optimizer.", tensors).items():
        index, slot = name.split(".", 1)
        like = parameters[int(index)]
        if value.shape == like.shape:
            # the fused optimizer walks memory in order, so its state needs the parameter's strides
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


def _check_fit(state: TrainState, tensors: dict[str, Tensor], step: int, folder: Path) -> None:
    """Raise CheckpointMismatchError if the tensors are not those of ``state`` after ``step`` steps."""
    networks = {"network": state.network, "ema": state.ema.network}
    expected = {
        f"{prefix}.{name}": value.shape
        for prefix, network in networks.items()
        for name, value in network.state_dict().items()
    }
    for index, parameter in enumerate(state.network.parameters() if step else ()):
        expected[f"optimizer.{index}.step"] = torch.Size([])
        expected |= {f"optimizer.{index}.{name}": parameter.shape for name in ("exp_avg", "exp_avg_sq")}
    expected |= {f"history.{name}": torch.Size([step]) for name in ("losses", "grad_norms")}
    different = sorted(
        name for name in expected.keys() | tensors.keys()
        if name not in tensors or expected.get(name) != tensors[name].shape
    )  # fmt: skip
    if step > len(state.losses) or different:
        reason = f"{different[0]} differs" if different else f"{step} steps are more than {len(state.losses)}"
        raise CheckpointMismatchError(f"the checkpoint {folder} does not fit the network or the settings: {reason}")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
