"""Where images come from: scikit-learn's digits, torchvision's class-labelled data sets, image folders."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.params import Prepare

CHUNK = 1024


@dataclass(frozen=True)
class Transform:
    """To RGB or grey over a background, the shorter side resized to ``image_size`` (bicubic), the centre cropped."""

    image_size: int
    channels: int
    background: int

    def describe(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "background": self.background,
            "resize": "shorter side, bicubic",
            "crop": "centre",
        }

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(H, W, C) uint8."""
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            behind = Image.new("RGBA", image.size, (self.background,) * 3 + (255,))
            image = Image.alpha_composite(behind, image)
        image = image.convert("L" if self.channels == 1 else "RGB")
        width, height = image.size
        if (width, height) != (self.image_size, self.image_size):
            scale = self.image_size / min(width, height)
            size = (max(round(width * scale), self.image_size), max(round(height * scale), self.image_size))
            image = image.resize(size, Image.Resampling.BICUBIC)
            left, top = (size[0] - self.image_size) // 2, (size[1] - self.image_size) // 2
            image = image.crop((left, top, left + self.image_size, top + self.image_size))
        return np.asarray(image, dtype=np.uint8).reshape(self.image_size, self.image_size, self.channels)


@dataclass(frozen=True)
class Items:
    """Labelled images that are not decoded yet. ``load(i)`` opens image i, ``content(i)`` gives its bytes, ``name(i)`` its name."""

    labels: np.ndarray
    load: Callable[[int], Image.Image]
    content: Callable[[int], bytes]
    name: Callable[[int], str]
    arrays: np.ndarray | None = None
    """(N, H, W) or (N, H, W, C) uint8, where all images are in memory already."""
    root: str = ""
    """What the names are relative to: it stays out of the manifest."""


@dataclass(frozen=True)
class Source:
    """A data set: its classes, its images, and which belong to which split (None: it has no split of its own)."""

    class_names: tuple[str, ...]
    items: dict[str, Items]
    """Either {"all": ...} or {"train": ..., "test": ...}."""


def open_source(prepare: Prepare) -> Source:
    """The source that the settings name. Raises ValueError where it is missing, unreadable or not class-labelled."""
    if prepare.source == "digits":
        return _digits()
    if prepare.source == "torchvision":
        return _torchvision(prepare)
    return _folder(prepare)


def split_items(items: Items, num_classes: int, test_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of train and test: stratified by class, without overlap, the same for any order of the files.

    Images with the same content go to the same side together.
    """
    digests = [hashlib.sha256(items.content(i)).digest() for i in range(len(items.labels))]
    groups: dict[bytes, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    test: list[int] = []
    for label in range(num_classes):
        own = [digest for digest, members in groups.items() if items.labels[members[0]] == label]
        own.sort(key=lambda digest: hashlib.sha256(seed.to_bytes(8, "little") + digest).digest())
        total = sum(len(groups[digest]) for digest in own)
        wanted = min(max(round(total * test_fraction), 1), total - 1)
        taken = 0
        for digest in own[:-1]:
            if taken >= wanted:
                break
            test += groups[digest]
            taken += len(groups[digest])
    held_out = np.zeros(len(digests), dtype=bool)
    held_out[test] = True
    return {"train": np.flatnonzero(~held_out), "test": np.flatnonzero(held_out)}


def limit_items(labels: np.ndarray, indices: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    """At most so many of the indices, classes in turn so that each is kept; in the order given."""
    if most is None or len(indices) <= most:
        return indices
    shuffled = np.random.default_rng(seed).permutation(indices)
    turn = np.empty(len(shuffled), dtype=np.int64)
    for label in np.unique(labels[shuffled]):
        rows = np.flatnonzero(labels[shuffled] == label)
        turn[rows] = np.arange(len(rows))
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:most]])


def decode(
    items: Items, indices: np.ndarray, transform: Transform, skip_broken: bool, skipped: list[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of (images (n, H, W, C) uint8, labels (n,)) in the order of ``indices``.

    A broken image is named in a ValueError, or appended to ``skipped`` and left out.
    """
    shape = (transform.image_size, transform.image_size)
    if items.arrays is not None and items.arrays.shape[1:3] == shape:
        arrays = items.arrays[..., None] if items.arrays.ndim == 3 else items.arrays
        if arrays.shape[-1] == transform.channels:
            for start in range(0, len(indices), CHUNK):
                rows = indices[start : start + CHUNK]
                yield arrays[rows], items.labels[rows]
            return

    def open_image(index: int) -> np.ndarray | str:
        try:
            return transform(items.load(index))
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
            return f"{items.name(index)} ({reason})"

    with ThreadPoolExecutor() as pool:
        remaining = iter(indices.tolist())
        while chunk := list(islice(remaining, CHUNK)):
            images, labels = [], []
            for index, result in zip(chunk, pool.map(open_image, chunk), strict=True):
                if isinstance(result, np.ndarray):
                    images.append(result)
                    labels.append(items.labels[index])
                elif skip_broken:
                    skipped.append(result)
                else:
                    raise ValueError(
                        f"broken image {Path(items.root, result)}: repair or remove it, or set prepare.on_broken_image to skip"
                    )
            if images:
                yield np.stack(images), np.asarray(labels, dtype=np.int64)


def _from_arrays(arrays: np.ndarray, labels: np.ndarray, name: str) -> Items:
    return Items(
        labels=labels.astype(np.int64),
        load=lambda i: Image.fromarray(arrays[i]),
        content=lambda i: arrays[i].tobytes(),
        name=lambda i: f"{name}[{i}]",
        arrays=arrays,
    )


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    return Source(tuple(str(d) for d in range(10)), {"all": _from_arrays(images, bunch.target, "digits")})


def _torchvision(prepare: Prepare) -> Source:
    from torchvision import datasets

    name = str(prepare.dataset)
    cls = getattr(datasets, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, datasets.VisionDataset)):
        raise ValueError(
            f"prepare.dataset: torchvision has no data set {name!r} (names are case-sensitive: MNIST, FashionMNIST, CIFAR10, ...)"
        )
    takes = inspect.signature(cls.__init__).parameters
    if "train" in takes:
        variants: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in takes:
        variants = {"train": {"split": "train"}, "test": {"split": "test"}}
    else:
        variants = {"all": {}}
    options: dict[str, Any] = {"root": prepare.root}
    if "download" in takes:
        options["download"] = prepare.download
    items: dict[str, Items] = {}
    names: tuple[str, ...] = ()
    for split, variant in variants.items():
        try:
            dataset = cls(**options, **variant)
        except Exception as error:
            raise ValueError(
                f"torchvision could not open {name} ({split}) in {prepare.root}: {' '.join(str(error).split())}; "
                "put its files there, or set prepare.download to true on a machine with a network"
            ) from None
        items[split] = _torchvision_items(dataset, name)
        names = tuple(str(c) for c in getattr(dataset, "classes", ()))
    top = max(int(part.labels.max()) for part in items.values()) + 1
    return Source(names if len(names) >= top else tuple(str(i) for i in range(top)), items)


def _torchvision_items(dataset: Any, name: str) -> Items:
    labels = next((getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key)), None)
    if labels is None:
        labels = [dataset[i][1] for i in range(len(dataset))]
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or len(labels) != len(dataset):
        raise ValueError(f"prepare.dataset: {name} is not class-labelled: each of its images must have one class index")
    data = getattr(dataset, "data", None)
    arrays = None
    if data is not None:
        arrays = np.asarray(data)
        if arrays.dtype != np.uint8 or arrays.ndim not in (3, 4) or (arrays.ndim == 4 and arrays.shape[-1] != 3):
            arrays = None
    if arrays is not None:
        return _from_arrays(arrays, labels, name)
    return Items(
        labels=labels.astype(np.int64),
        load=lambda i: dataset[i][0],
        content=lambda i: dataset[i][0].tobytes(),
        name=lambda i: f"{name}[{i}]",
    )


def _folder(prepare: Prepare) -> Source:
    root = Path(str(prepare.root))
    if not root.is_dir():
        raise ValueError(f"prepare.root: {root} is not a folder: name the one that holds <class>/<image> files")
    parts = {split: root / split for split in ("train", "test")}
    children = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if children == {"train", "test"} and all(_class_folders(path) for path in parts.values()):
        names = sorted({path.name for part in parts.values() for path in _class_folders(part)})
        items = {split: _folder_items(path, names, split=True) for split, path in parts.items()}
    else:
        names = [path.name for path in _class_folders(root)]
        items = {"all": _folder_items(root, names)}
    if not names:
        raise ValueError(f"prepare.root: {root} holds no class folders: images must lie in {root}/<class>/")
    return Source(tuple(names), items)


def _class_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _folder_items(root: Path, names: Sequence[str], *, split: bool = False) -> Items:
    Image.init()
    known = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        folder = root / name
        found = sorted(folder.rglob("*")) if folder.is_dir() else []
        own = [path for path in found if path.suffix.lower() in known and path.is_file()]
        if not own:
            raise ValueError(f"prepare.root: the class folder {folder} holds no images: remove it or fill it")
        paths += own
        labels += [label] * len(own)
    return Items(
        labels=np.asarray(labels, dtype=np.int64),
        load=lambda i: _open(paths[i]),
        content=lambda i: paths[i].read_bytes(),
        name=lambda i: str(paths[i].relative_to(root.parent if split else root)),
        root=str(root.parent if split else root),
    )


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image
