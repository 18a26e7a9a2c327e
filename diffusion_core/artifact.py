"""A DiffusionModel and its directory: model.safetensors (EMA weights) and model.json (everything else)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_core.denoiser import Denoiser
from diffusion_core.guidance import ClassifierFreeGuidance
from diffusion_core.networks import build_network
from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.objectives import check_objective
from diffusion_core.schedules import NoiseSchedule, make_schedule
from diffusion_core.storage import atomic_folder, read_json, write_json

SCHEMA_VERSION = 2
_KEYS: dict[str, type | tuple[type, ...]] = {
    "schema_version": int,
    "network": dict,
    "schedule": dict,
    "objective": str,
    "image": dict,
    "class_names": list,
    "attributes": dict,
    "condition_source": str,
    "condition_dropout": (int, float),
    "weights_sha256": str,
    "provenance": dict,
}
"""What model.json holds, and of which JSON type."""


@dataclass(frozen=True)
class DiffusionModel:
    """A trained network with all that is needed to sample from it.

    ``network_config`` rebuilds the network. The condition's vocabulary, where it has one: ``class_names`` are the classes of a
    condition of kind class, or the attributes of a multi-hot one; ``attributes`` name the several classes of kind classes, as
    {attribute: its class names}; ``condition_source`` says what makes a real vector or tokens (a text encoder, say).
    ``condition_dropout`` is the share of training images whose condition was dropped: guidance needs it above 0.
    ``provenance`` says where the model comes from and takes part in nothing.

    Raises ValueError for a vocabulary that is not the network's, an image of another shape than the network's, an objective
    that the schedule cannot carry, or a share outside 0 to 1.
    """

    network: nn.Module
    network_config: Mapping[str, Any]
    schedule: NoiseSchedule
    objective: str
    image_size: int
    image_channels: int
    class_names: Sequence[str] = ()
    condition_dropout: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    condition_source: str = ""

    def __post_init__(self) -> None:
        check_objective(self.objective, self.schedule)
        if not 0.0 <= self.condition_dropout <= 1.0:
            raise ValueError(f"condition_dropout is a share from 0 to 1, got {self.condition_dropout}")
        for name, value in (("image_size", self.image_size), ("image_channels", self.image_channels)):
            if self.network_config.get(name, value) != value:
                raise ValueError(f"{name} is {value}, but the network is built for {self.network_config[name]}")
        spec = self.condition
        if spec.kind in ("class", "multi_hot") and self.class_names and len(self.class_names) != spec.size:
            raise ValueError(
                f"{len(self.class_names)} class_names were given for a {spec.kind} condition of size {spec.size}"
            )
        if self.class_names and spec.kind not in ("class", "multi_hot"):
            raise ValueError(
                f"class_names name the classes of a condition of kind class or multi_hot; this network's is {spec.kind!r}"
            )
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names holds a name twice: labels could not be told apart")
        if self.attributes and tuple(len(names) for names in self.attributes.values()) != spec.sizes:
            raise ValueError(
                f"attributes has {[len(names) for names in self.attributes.values()]} classes, but the condition of kind "
                f"{spec.kind!r} has sizes {list(spec.sizes)}"
            )

    @property
    def condition(self) -> ConditionSpec:
        return ConditionSpec(**self.network_config.get("condition") or {"kind": "none"})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.image_channels, self.image_size, self.image_size

    def to(self, device: torch.device | str) -> DiffusionModel:
        self.network.to(device)
        return self

    def denoiser(self, guidance_scale: float = 1.0, clip: float | None = 1.0) -> Denoiser:
        """A denoiser with classifier-free guidance. Raises ValueError for guidance on a model that never dropped its condition."""
        takes = {name: True for name in ("self_conditioning", "learned_variance") if self.network_config.get(name)}
        if guidance_scale == 1.0:
            return Denoiser(self.network, self.schedule, self.objective, clip, **takes)
        if self.condition.kind == "none" or self.condition_dropout == 0.0:
            raise ValueError(
                f"guidance_scale {guidance_scale:g} needs a model that was trained with its condition dropped at times: "
                "set train.condition_dropout above 0 and train again, or use guidance_scale 1"
            )
        device = next(self.network.parameters()).device
        guided = ClassifierFreeGuidance(self.network, self.condition.null(1, device), guidance_scale)
        return Denoiser(guided, self.schedule, self.objective, clip, **takes)

    def class_labels(self, labels: Sequence[int | str]) -> Tensor:
        """(N,) int64 class indices of labels given as indices or class names.

        Raises ValueError that names the first label outside the vocabulary.
        """
        names = self.class_names or [str(index) for index in range(self.condition.size)]
        return torch.tensor([_index_of(label, names) for label in labels], dtype=torch.int64)

    def encode_conditions(self, conditions: Sequence[Any]) -> Tensor:
        """A batch of conditions as the network takes them, from what a person writes; None is the null condition.

        class      an index or a class name
        classes    {attribute: index or class name}; an attribute that is left out is null. Without names: a list of indices
        multi_hot  a list of attribute names or indices, or {attribute: weight from 0 to 1} to mix
        vector     a sequence of ``size`` numbers; tokens: up to ``length`` rows of them

        Raises ValueError that names the first condition outside the vocabulary.
        """
        spec = self.condition
        if spec.kind == "none":
            raise ValueError("this model takes no condition: it was trained without one")
        batch = spec.null(len(conditions))
        for row, condition in enumerate(conditions):
            if condition is None:
                continue
            if spec.kind == "class":
                batch[row] = self.class_labels([condition])[0]
            elif spec.kind == "classes":
                attributes = self.attributes or {
                    str(i): [str(n) for n in range(size)] for i, size in enumerate(spec.sizes)
                }
                if not isinstance(condition, Mapping) and (
                    isinstance(condition, str) or len(condition) != len(attributes)
                ):
                    raise ValueError(
                        f"condition {row} is {condition!r}: give one class for each of {', '.join(attributes)}, or a mapping"
                    )
                given = condition if isinstance(condition, Mapping) else dict(zip(attributes, condition, strict=True))
                for attribute, label in given.items():
                    column = _index_of(attribute, list(attributes), "attribute")
                    batch[row, column] = _index_of(label, list(attributes.values())[column])
            elif spec.kind == "multi_hot":
                names = [condition] if isinstance(condition, str) else condition
                weights = condition if isinstance(condition, Mapping) else dict.fromkeys(names, 1.0)
                batch[row] = 0.0
                for name, weight in weights.items():
                    batch[row, int(self.class_labels([name])[0])] = float(weight)
            else:
                try:
                    value = torch.as_tensor(condition, dtype=torch.float32)
                except (TypeError, ValueError, RuntimeError):
                    raise ValueError(f"condition {row} is not a table of numbers: {condition!r}") from None
                rows = value.shape[:1] if spec.kind == "tokens" else ()
                if value.shape != (*rows, spec.size) or (rows and not 1 <= rows[0] <= spec.length):
                    raise ValueError(
                        f"condition {row} has shape {tuple(value.shape)}: a {spec.kind} condition has "
                        + (
                            f"1 to {spec.length} rows of {spec.size}"
                            if spec.kind == "tokens"
                            else f"{spec.size} numbers"
                        )
                    )
                if rows:
                    batch[row, : rows[0]] = value
                else:
                    batch[row] = value
        spec.check(batch)
        return batch

    def save(self, folder: Path) -> str:
        """Write the directory, whole or not at all; returns the SHA-256 of the weights file.

        Raises ValueError for a provenance that JSON cannot carry.
        """
        try:
            json.dumps(dict(self.provenance))
        except TypeError as error:
            raise ValueError(f"provenance must hold what JSON carries (strings, numbers, lists): {error}") from None
        with atomic_folder(Path(folder)) as temporary:
            weights = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
            save_file(weights, temporary / "model.safetensors")
            digest = hashlib.sha256((temporary / "model.safetensors").read_bytes()).hexdigest()
            write_json(
                temporary / "model.json",
                {
                    "schema_version": SCHEMA_VERSION,
                    "network": dict(self.network_config),
                    "schedule": dict(self.schedule.config),
                    "objective": self.objective,
                    "image": {"size": self.image_size, "channels": self.image_channels},
                    "class_names": list(self.class_names),
                    "attributes": {name: list(names) for name, names in self.attributes.items()},
                    "condition_source": self.condition_source,
                    "condition_dropout": self.condition_dropout,
                    "weights_sha256": digest,
                    "provenance": dict(self.provenance),
                },
            )
        return digest

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> DiffusionModel:
        """Read and check the directory; the network comes in evaluation mode. Older schema versions are read too.

        Raises ValueError that names the file and what in it is missing, damaged, contradictory or of a newer version.
        """
        folder = Path(folder)
        path = folder / "model.json"
        description = _current_description(read_json(path), path)
        try:
            schedule = make_schedule(**description["schedule"])
            network = build_network(description["network"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: schedule or network: {error}") from None
        _load_weights(network, folder / "model.safetensors", description["weights_sha256"])
        network = network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
        try:
            return cls(
                network=network,
                network_config=description["network"],
                schedule=schedule,
                objective=description["objective"],
                image_size=description["image"]["size"],
                image_channels=description["image"]["channels"],
                class_names=tuple(description["class_names"]),
                condition_dropout=description["condition_dropout"],
                provenance=description["provenance"],
                attributes={name: tuple(names) for name, names in description["attributes"].items()},
                condition_source=description["condition_source"],
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def _current_description(description: Any, path: Path) -> dict[str, Any]:
    """What model.json says, brought to today's schema, every key there and of its type."""
    if not isinstance(description, dict) or "schema_version" not in description:
        raise ValueError(f"{path} does not describe a diffusion model: it has no schema_version")
    version = description["schema_version"]
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{path}: schema_version must be a whole number from 1, got {version!r}")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path.parent} was written by a newer rediffuse (schema {version}, this one reads up to "
            f"{SCHEMA_VERSION}): upgrade rediffuse"
        )
    if version < 2:  # the vocabulary was that of one class alone
        description = {**description, "attributes": {}, "condition_source": ""}
    missing = sorted(_KEYS.keys() - description.keys())
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    for key, kind in _KEYS.items():
        if not isinstance(description[key], kind) or isinstance(description[key], bool):
            raise ValueError(f"{path}: {key} is of the wrong type, {type(description[key]).__name__}")
    for key in ("size", "channels"):
        if not isinstance(description["image"].get(key), int):
            raise ValueError(f"{path}: image.{key} must be a whole number, got {description['image'].get(key)!r}")
    for key, names in (("class_names", description["class_names"]), *description["attributes"].items()):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            where = key if key == "class_names" else f"attributes.{key}"
            raise ValueError(f"{path}: {where} must be a list of names, got {names!r}")
    return description


def _load_weights(network: nn.Module, path: Path, sha256: str) -> None:
    """Fill ``network`` from the file, once its hash, names, shapes, types and values are found right."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if digest != sha256:
        raise ValueError(
            f"{path} is damaged or belongs to another model: its SHA-256 is {digest}, model.json says {sha256}"
        )
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    expected = network.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        found = [f"lacks {', '.join(missing[:3])}"] * bool(missing) + [f"holds {', '.join(unknown[:3])}"] * bool(
            unknown
        )
        raise ValueError(f"{path} does not fit the network of model.json: it {' and '.join(found)}")
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{path} does not fit the network of model.json: {name} is {list(value.shape)}, "
                f"the network has {list(expected[name].shape)}"
            )
        if value.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(
                f"{path} does not fit the network of model.json: {name} is {value.dtype}, the network has {expected[name].dtype}"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: {name} holds NaN or infinity: the training diverged; use an earlier checkpoint")
    network.load_state_dict(weights)


def _index_of(label: Any, names: Sequence[str], what: str = "label") -> int:
    """The position of a label given as an index or a name. Raises ValueError for one outside the vocabulary."""
    text = str(label).strip()
    if text in names:
        return list(names).index(text)
    if _is_index(label) and 0 <= int(label) < len(names):
        return int(label)
    raise ValueError(
        f"unknown {what} {label!r}: the model knows the indices 0 to {len(names) - 1}"
        f" and the names {', '.join(list(names)[:12])}{', ...' if len(names) > 12 else ''}"
    )


def _is_index(label: Any) -> bool:
    try:
        return float(label) == int(label)
    except (TypeError, ValueError, OverflowError):
        return False
