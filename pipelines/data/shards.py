"""The prepared data set: uint8 image shards, conditions and a manifest; read by memory mapping.

The shards' `conditions` are class labels today: (n,) int64.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_core.storage import atomic_path, file_sha256, read_json, write_json

MANIFEST_VERSION = 1
SPLITS = ("train", "test")
IGNORED_FIELDS = {"reason": str, "suffix": str, "files": int, "first": str}


@dataclass(frozen=True)
class Manifest:
    """Contents of the data set. ``shape`` is (H, W, C); ``shards`` names the files of each split, in order.

    ``ignored``: files of the image folder that were not read, counted by reason and suffix; ``ignored_profiles``: images
    whose colour profile could not be used. Both are empty in a manifest of an older version of the prepare stage.
    """

    counts: Mapping[str, int]
    class_counts: Mapping[str, Sequence[int]]
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    transform: Mapping[str, Any]
    skipped: Sequence[str]
    shards: Mapping[str, Sequence[Mapping[str, Any]]]
    content_hash: str
    ignored: Sequence[Mapping[str, Any]] = ()
    ignored_profiles: Sequence[str] = ()


def write_shards(
    folder: Path, split: str, chunks: Iterable[tuple[np.ndarray, np.ndarray]], shard_size: int
) -> list[dict[str, Any]]:
    """Write (images (n, H, W, C) uint8, labels (n,) int64) chunks as shards of ``shard_size``. Returns their descriptions."""
    described = []
    for number, (images, labels) in enumerate(_rechunk(chunks, shard_size)):
        entry: dict[str, Any] = {"count": len(images)}
        for kind, array in (("images", images), ("conditions", labels)):
            path = folder / f"{split}-{number:05d}-{kind}.npy"
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.save(file, np.ascontiguousarray(array), allow_pickle=False)
            entry[kind] = path.name
            entry[f"{kind}_sha256"] = file_sha256(path)
        described.append(entry)
    return described


def write_manifest(folder: Path, **fields: Any) -> Manifest:
    """Write manifest.json. Its content hash covers the shards, the classes, the shape and the transform."""
    identity = {key: fields[key] for key in ("shape", "class_names", "transform", "shards")}
    content_hash = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    write_json(folder / "manifest.json", {"version": MANIFEST_VERSION, **fields, "content_hash": content_hash})
    return read_manifest(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json. Raises ValueError, with the missing or wrong entry, if it does not fit."""
    path = folder / "manifest.json"
    remedy = "run the prepare stage again (dvc repro -f prepare)"
    tree = read_json(path)
    if not isinstance(tree, dict) or tree.get("version") != MANIFEST_VERSION:
        found = tree.get("version") if isinstance(tree, dict) else None
        raise ValueError(f"{path}: version {found}, this rediffuse reads {MANIFEST_VERSION}: {remedy}")
    try:
        manifest = Manifest(
            counts={split: int(tree["counts"][split]) for split in SPLITS},
            class_counts={split: [int(n) for n in tree["class_counts"][split]] for split in SPLITS},
            shape=(int(tree["shape"][0]), int(tree["shape"][1]), int(tree["shape"][2])),
            class_names=tuple(str(name) for name in tree["class_names"]),
            transform=dict(tree["transform"]),
            skipped=list(tree["skipped"]),
            shards={split: [dict(shard) for shard in tree["shards"][split]] for split in SPLITS},
            content_hash=str(tree["content_hash"]),
            ignored=[
                {key: kind(group[key]) for key, kind in IGNORED_FIELDS.items()} for group in tree.get("ignored", [])
            ],
            ignored_profiles=[str(name) for name in tree.get("ignored_profiles", [])],
        )
        for split in SPLITS:
            described = sum(int(shard["count"]) for shard in manifest.shards[split])
            if described != manifest.counts[split]:
                raise ValueError(f"{split} has {manifest.counts[split]} images, its shards {described}")
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: lacks or misstates {error}: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}: {remedy}") from None
    return manifest


@dataclass(frozen=True)
class ImageSplit:
    """One split: memory-mapped images and their labels."""

    shards: Sequence[np.ndarray]
    starts: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return (B, C, H, W) uint8 images (channels last in memory) and (B,) int64 labels, in the order of ``indices``."""
        height, width, channels = self.shards[0].shape[1:]
        images = np.empty((len(indices), height, width, channels), dtype=np.uint8)
        which = np.searchsorted(self.starts, indices, side="right") - 1
        for shard in np.unique(which):
            rows = np.flatnonzero(which == shard)
            images[rows] = self.shards[shard][indices[rows] - self.starts[shard]]
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images and labels in order, in batches."""
        for start in range(0, len(self), batch_size):
            yield self.gather(np.arange(start, min(start + batch_size, len(self))))


def open_split(folder: Path, split: str) -> ImageSplit:
    """Map a split's shards into memory.

    Raises ValueError if a file is missing or does not match the manifest, or a label is outside of the manifest's classes.
    """
    manifest = read_manifest(folder)
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for shard in manifest.shards[split]:
        for kind, into in (("images", images), ("conditions", labels)):
            path = folder / str(shard[kind])
            try:
                array = np.load(path, mmap_mode="r" if kind == "images" else None, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"cannot read {path} ({error}): run the prepare stage again") from None
            expected = (shard["count"], *manifest.shape) if kind == "images" else (shard["count"],)
            if array.shape != expected:
                raise ValueError(
                    f"{path} holds {array.shape}, the manifest says {expected}: run the prepare stage again"
                )
            classes = len(manifest.class_names)
            if kind == "conditions" and len(array) and not 0 <= array.min() <= array.max() < classes:
                raise ValueError(  # a GPU would fail later, in a kernel
                    f"{path} holds labels from {array.min()} to {array.max()}, the data set has {classes} classes: run the prepare stage again"
                )
            into.append(array)
    counts = [len(part) for part in labels]
    return ImageSplit(images, np.cumsum([0, *counts[:-1]]), np.concatenate(labels))


def _rechunk(chunks: Iterable[tuple[np.ndarray, np.ndarray]], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    held = 0
    for chunk_images, chunk_labels in chunks:
        while len(chunk_images):
            take = min(size - held, len(chunk_images))
            images.append(chunk_images[:take])
            labels.append(chunk_labels[:take])
            chunk_images, chunk_labels = chunk_images[take:], chunk_labels[take:]
            held += take
            if held == size:
                yield np.concatenate(images), np.concatenate(labels)
                images, labels, held = [], [], 0
    if held:
        yield np.concatenate(images), np.concatenate(labels)
