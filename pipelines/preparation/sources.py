"""Sources of labelled images: scikit-learn's digits, torchvision's data sets with class labels, image folders."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_core.storage import file_sha256
from pipelines.data.listing import ImageFile, folder_layout, image_files


@dataclass(frozen=True)
class SourceSettings:
    """The data source: "digits", "torchvision" (``dataset`` in ``root``) or "folder" (``root``/<class>/<image>)."""

    source: str
    dataset: str | None = None
    root: str | None = None
    download: bool = False


@dataclass(frozen=True)
class Items:
    """Labelled images that are not decoded yet.

    ``load(i)`` opens image i, ``digest(i)`` gives the SHA-256 of its content, ``name(i)`` its name.
    """

    labels: np.ndarray
    load: Callable[[int], Image.Image]
    digest: Callable[[int], bytes]
    name: Callable[[int], str]
    arrays: np.ndarray | None = None
    """All images, (N, H, W) or (N, H, W, C) uint8, if they are in memory already."""
    files: Sequence[ImageFile] = ()
    """The file of each image, if they come from a folder."""
    root: str = ""
    """The folder that the names are relative to. It stays out of the manifest."""


@dataclass(frozen=True)
class Source:
    """A data set: its class names, and its images by split or all together."""

    class_names: tuple[str, ...]
    items: dict[str, Items]
    """Either {"all": ...} or {"train": ..., "test": ...}."""


def open_source(settings: SourceSettings) -> Source:
    """Open the source. Raises ValueError if it is missing, cannot be read or has no class labels."""
    if settings.source == "digits":
        return _digits()
    if settings.source == "torchvision":
        return _torchvision(str(settings.dataset), str(settings.root), settings.download)
    return _folder(Path(str(settings.root)))


def _from_arrays(arrays: np.ndarray, labels: np.ndarray, name: str) -> Items:
    return Items(
        labels=labels.astype(np.int64),
        load=lambda i: Image.fromarray(arrays[i]),
        digest=lambda i: hashlib.sha256(arrays[i].tobytes()).digest(),
        name=lambda i: f"{name}[{i}]",
        arrays=arrays,
    )


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    return Source(tuple(str(d) for d in range(10)), {"all": _from_arrays(images, bunch.target, "digits")})


def _torchvision(name: str, root: str, download: bool) -> Source:
    from torchvision import datasets

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
    options: dict[str, Any] = {"root": root}
    if "download" in takes:
        options["download"] = download
    items: dict[str, Items] = {}
    names: tuple[str, ...] = ()
    for split, variant in variants.items():
        try:
            dataset = cls(**options, **variant)
        except Exception as error:
            raise ValueError(
                f"torchvision could not open {name} ({split}) in {root}: {' '.join(str(error).split())}; "
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
        digest=lambda i: hashlib.sha256(dataset[i][0].tobytes()).digest(),
        name=lambda i: f"{name}[{i}]",
    )


def _folder(root: Path) -> Source:
    if not root.is_dir():
        raise ValueError(f"prepare.root: {root} is not a folder: name the one that holds <class>/<image> files")
    parts, names = folder_layout(root)
    if not names:
        raise ValueError(f"prepare.root: {root} holds no class folders: images must lie in {root}/<class>/")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"prepare.root: the name of the class folder {name!a} is not UTF-8: rename it") from None
    return Source(tuple(names), {split: _folder_items(part, names, root) for split, part in parts.items()})


def _folder_items(part: Path, names: Sequence[str], root: Path) -> Items:
    files: list[ImageFile] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        own = image_files(part / name, root)
        if not own:
            raise ValueError(f"prepare.root: the class folder {part / name} holds no images: remove it or fill it")
        files += own
        labels += [label] * len(own)
    return Items(
        labels=np.asarray(labels, dtype=np.int64),
        load=lambda i: _open(root / files[i].path),
        digest=functools.cache(lambda i: bytes.fromhex(file_sha256(root / files[i].path))),
        name=lambda i: files[i].path,
        files=files,
        root=str(root),
    )


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image
