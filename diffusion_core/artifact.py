"""A DiffusionModel and its directory: model.safetensors (the weights) and model.json (everything else)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion_core.denoiser import Denoiser
from diffusion_core.guidance import ClassifierFreeGuidance
from diffusion_core.networks import build_network
from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.objectives import check_objective
from diffusion_core.schedules import NoiseSchedule, make_schedule
from diffusion_core.storage import atomic_folder, file_sha256, read_json, write_json

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
"""The keys of model.json and their JSON types."""


@dataclass(frozen=True)
class DiffusionModel:
    """A trained network with everything that sampling needs.

    ``network_config`` rebuilds the network. Vocabulary of the condition: ``class_names`` are the classes of kind class, or the
    attributes of kind multi_hot; ``attributes`` are those of kind classes, as {attribute: its class names};
    ``condition_source`` names the source of a vector or tokens, such as a text encoder. `condition_encoding` uses them.
    ``condition_dropout`` is the share of training images whose condition was dropped; guidance needs it above 0.
    ``provenance`` records where the model comes from; nothing depends on it.

    Raises ValueError if the vocabulary or the image shape does not fit the network, the objective does not fit the schedule,
    or condition_dropout is outside 0 to 1.
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
            raise ValueError(f"condition_dropout must be a share from 0 to 1, got {self.condition_dropout}")
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
            raise ValueError("class_names holds a name twice: names must be distinct")
        if self.attributes and tuple(len(names) for names in self.attributes.values()) != spec.sizes:
            raise ValueError(
                f"attributes has {[len(names) for names in self.attributes.values()]} classes, but the condition of kind "
                f"{spec.kind!r} has sizes {list(spec.sizes)}"
            )

    @property
    def condition(self) -> ConditionSpec:
        """The kind and size of the network's condition."""
        return ConditionSpec(**self.network_config.get("condition") or {"kind": "none"})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        return self.image_channels, self.image_size, self.image_size

    def to(self, device: torch.device | str) -> DiffusionModel:
        """Move the network to ``device`` in place and return the model."""
        self.network.to(device)
        return self

    def denoiser(self, guidance_scale: float = 1.0, clip: float | None = 1.0) -> Denoiser:
        """Return a denoiser, guided if ``guidance_scale`` is not 1.

        Raises ValueError if a guided model has no condition or was trained without condition dropout.
        """
        takes = {name: True for name in ("self_conditioning", "learned_variance") if self.network_config.get(name)}
        if guidance_scale == 1.0:
            return Denoiser(self.network, self.schedule, self.objective, clip, **takes)
        if self.condition.kind == "none":
            raise ValueError(f"guidance_scale {guidance_scale:g} needs a model with a condition: use guidance_scale 1")
        if self.condition_dropout == 0.0:
            raise ValueError(
                f"guidance_scale {guidance_scale:g} needs a model trained with condition dropout, but this one has "
                "condition_dropout 0: use guidance_scale 1, or train with condition_dropout above 0"
            )
        device = next(self.network.parameters()).device
        guided = ClassifierFreeGuidance(self.network, self.condition.null(1, device), guidance_scale)
        return Denoiser(guided, self.schedule, self.objective, clip, **takes)

    def save(self, folder: Path) -> str:
        """Write the directory atomically and return the SHA-256 of the weights file.

        Raises ValueError if JSON cannot represent the provenance.
        """
        try:
            json.dumps(dict(self.provenance))
        except TypeError as error:
            raise ValueError(f"provenance must hold only JSON values (strings, numbers, lists): {error}") from None
        with atomic_folder(Path(folder)) as temporary:
            weights = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
            save_file(weights, temporary / "model.safetensors")
            digest = file_sha256(temporary / "model.safetensors")
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
        """Load and check the directory. The network is in evaluation mode, channels-last. Older schema versions load too.

        Raises ValueError that names the file and its fault: missing, damaged, contradictory, or written by a newer version.
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
    """Return the content of model.json in the current schema, with every key present and of its type."""
    if not isinstance(description, dict) or "schema_version" not in description:
        raise ValueError(f"{path} does not describe a diffusion model: it has no schema_version")
    version = description["schema_version"]
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{path}: schema_version must be a whole number from 1, got {version!r}")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path.parent} was written by a newer rediffuse (schema {version}; this version reads up to "
            f"{SCHEMA_VERSION}): upgrade rediffuse"
        )
    if version < 2:  # schema 1 had a vocabulary for kind class only
        description = {**description, "attributes": {}, "condition_source": ""}
    missing = sorted(_KEYS.keys() - description.keys())
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    for key, kind in _KEYS.items():
        if not isinstance(description[key], kind) or isinstance(description[key], bool):
            raise ValueError(f"{path}: {key} has the wrong type, {type(description[key]).__name__}")
    for key in ("size", "channels"):
        if not isinstance(description["image"].get(key), int):
            raise ValueError(f"{path}: image.{key} must be a whole number, got {description['image'].get(key)!r}")
    for key, names in (("class_names", description["class_names"]), *description["attributes"].items()):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            where = key if key == "class_names" else f"attributes.{key}"
            raise ValueError(f"{path}: {where} must be a list of names, got {names!r}")
    return description


def _load_weights(network: nn.Module, path: Path, sha256: str) -> None:
    """Load the file into ``network`` after checking its hash, names, shapes, dtypes and values."""
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if digest != sha256:
        raise ValueError(
            f"{path} is damaged or belongs to another model: its SHA-256 is {digest}, but model.json has {sha256}"
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
        raise ValueError(f"{path} does not fit the network in model.json: it {' and '.join(found)}")
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{path} does not fit the network in model.json: {name} is {list(value.shape)}, "
                f"but the network has {list(expected[name].shape)}"
            )
        if value.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(
                f"{path} does not fit the network in model.json: {name} is {value.dtype}, but the network has "
                f"{expected[name].dtype}"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: {name} holds NaN or infinity: training diverged; use an earlier checkpoint")
    network.load_state_dict(weights)
