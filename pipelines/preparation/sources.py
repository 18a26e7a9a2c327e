"""Sources of labelled images: scikit-learn's digits, torchvision's data sets with class labels, image folders."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_core.storage import file_sha256
from pipelines.data.listing import Ignored, ImageFile, ImageFolder, read_image_folder

log = logging.getLogger("rediffuse")


@dataclass(frozen=True)
class SourceSettings:
    """The data source: "digits", "torchvision" (``dataset`` in ``root``) or "folder" (``root``/<class>/<image>).

    ``options``: further arguments of the torchvision class. The one that decides the split is {"train": ..., "test": ...}.
    """

    source: str
    dataset: str | None = None
    root: str | None = None
    download: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


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
    ignored: Sequence[Ignored] = ()
    """Files of an image folder that are not read."""


def open_source(settings: SourceSettings) -> Source:
    """Open the source. A ``~`` in its root is the home folder.

    Raises ValueError if it is missing, cannot be read, has no class labels, or a class name is blank or not UTF-8.
    """
    if settings.source == "digits":
        return _digits()
    try:
        root = Path(str(settings.root)).expanduser()
    except RuntimeError as error:
        raise ValueError(f"prepare.root: {settings.root}: {error}") from None
    if settings.source == "torchvision":
        return _torchvision(str(settings.dataset), root, settings.download, settings.options)
    return _folder(root)


def _check_names(names: Sequence[str], what: str) -> None:
    """Raise ValueError if a class name is blank, not UTF-8 or not unique. Warn about names that look alike."""
    alike: dict[str, str] = {}
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{what} {name!a} is not UTF-8: rename it") from None
        if all(mark.isspace() or unicodedata.category(mark) in ("Cc", "Cf") for mark in name):
            raise ValueError(f"{what} {name!a} is blank: give it a visible name")
        other = alike.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), name)
        if other == name:
            continue
        log.warning("%s %r looks like %r: the two are kept apart as different classes", what, name, other)


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


def _torchvision(name: str, root: Path, download: bool, options: Mapping[str, Any]) -> Source:
    from torchvision import datasets

    cls = getattr(datasets, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, datasets.VisionDataset)):
        raise ValueError(
            f"prepare.dataset: torchvision has no data set {name!r} (names are case-sensitive: MNIST, FashionMNIST, CIFAR10, ...)"
        )
    takes = _arguments(cls)
    if "root" not in takes:
        raise ValueError(f"prepare.dataset: {name} reads no folder, so it cannot be prepared")
    variants, shared = _variants(name, takes, options)
    given: dict[str, Any] = {"root": str(root), **shared}
    if "download" in takes:
        given["download"] = download
    parts: dict[str, Items] = {}
    names: tuple[str, ...] = ()
    for split, variant in variants.items():
        try:
            dataset = cls(**given, **variant)
        except Exception as error:
            raise ValueError(
                f"torchvision could not open {name} ({split}) in {root}: {' '.join(str(error).split())}; "
                "put its files there, or set prepare.download to true on a machine with a network"
                + (f"; {_options_of(name, takes)}" if _choices(takes) else "")
            ) from None
        parts[split] = _torchvision_items(dataset, name)
        names = tuple(str(c) for c in getattr(dataset, "classes", ()))
    used = np.unique(np.concatenate([part.labels for part in parts.values()]))
    if used[0] < 0:
        raise ValueError(
            f"prepare.dataset: {name} holds unlabelled images (class {used[0]}): choose a labelled part of it"
        )
    if len(names) <= used[-1]:
        names = tuple(str(i) for i in range(int(used[-1]) + 1))
    elif len(set(names)) < len(names):
        names = tuple(f"{c} ({i})" if names.count(c) > 1 else c for i, c in enumerate(names))
    empty = [names[i] for i in range(len(names)) if i not in set(used.tolist())]
    if empty:  # EMNIST's letters begin with a class "N/A"
        log.warning(
            "%d classes of %s have no images and are dropped: %s", len(empty), name, ", ".join(map(repr, empty[:8]))
        )
        names = tuple(names[i] for i in used)
        parts = {split: replace(part, labels=np.searchsorted(used, part.labels)) for split, part in parts.items()}
    _check_names(names, f"prepare.dataset: the class name of {name}")
    return Source(names, parts)


def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class by name. Those behind ``**kwargs`` are the arguments of the next base class."""
    takes: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                takes.setdefault(parameter.name, parameter)
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            break
    return takes


SET_BY_PREPARE = {"root": "set prepare.root", "download": "set prepare.download"}
NOT_IN_YAML = ("transform", "target_transform", "transforms", "loader", "is_valid_file", "extensions")
"""Arguments that are functions, or that change what an image or a label is."""


def _split_argument(takes: Mapping[str, inspect.Parameter]) -> str | None:
    return next((key for key in ("train", "split") if key in takes), None)


def _choices(takes: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the arguments that prepare.dataset_options may hold, as a message shows them."""
    split = _split_argument(takes)
    shown = []
    for key, parameter in takes.items():
        if key in SET_BY_PREPARE or key in NOT_IN_YAML or (key == split == "train"):
            continue
        if key == split:
            shown.append("split {train: ..., test: ...} (default {train: train, test: test})")
        elif parameter.default is parameter.empty:
            shown.append(f"{key} (required)")
        else:
            shown.append(f"{key} (default {parameter.default!r})")
    return shown


def _options_of(name: str, takes: Mapping[str, inspect.Parameter]) -> str:
    choices = _choices(takes)
    return f"prepare.dataset_options: {name} takes {', '.join(choices) if choices else 'no options'}"


def _variants(
    name: str, takes: Mapping[str, inspect.Parameter], options: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the arguments of each split, and those that all splits share. Raises ValueError if the class does not take one."""
    split = _split_argument(takes)
    shared = dict(options)
    for key in options:
        if key in SET_BY_PREPARE:
            raise ValueError(f"prepare.dataset_options.{key}: {SET_BY_PREPARE[key]} instead")
        if key == split == "train":
            raise ValueError(
                "prepare.dataset_options.train: prepare opens both splits of a data set, and this argument tells them apart: "
                "remove it"
            )
        if key not in takes or key in NOT_IN_YAML:
            raise ValueError(f"prepare.dataset_options.{key}: not an option of {name}; {_options_of(name, takes)}")
    names = shared.pop("split", None) if split == "split" else None
    if (split == "split" and "split" in options) and not (
        isinstance(names, Mapping) and set(names) == {"train", "test"} and names["train"] != names["test"]
    ):
        raise ValueError(
            f"prepare.dataset_options.split: given {names!r}; it tells the two splits of {name} apart, so name two: "
            "{train: train, test: val}"
        )
    missing = [
        key
        for key, parameter in takes.items()
        if parameter.default is parameter.empty and key not in shared and key not in ("root", "download", split)
    ]
    if missing:
        raise ValueError(f"prepare.dataset_options.{missing[0]}: {name} needs it; {_options_of(name, takes)}")
    if split == "train":
        return {"train": {"train": True}, "test": {"train": False}}, shared
    if split == "split":
        return {key: {"split": names[key] if names else key} for key in ("train", "test")}, shared
    return {"all": {}}, shared


def _torchvision_items(dataset: Any, name: str) -> Items:
    refusal = f"prepare.dataset: {name} is not class-labelled: each of its images must have one class index"
    if len(dataset) == 0:
        raise ValueError(f"prepare.dataset: {name} holds no images")
    labels = next((getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key)), None)
    if labels is None or not _are_labels(labels := np.asarray(labels), len(dataset)):
        try:  # QMNIST keeps more than the class in its attribute
            if not isinstance(dataset[0][1], int | np.integer):
                raise ValueError(refusal)
            labels = np.asarray([dataset[i][1] for i in range(len(dataset))])
        except (TypeError, LookupError):
            raise ValueError(refusal) from None
        if not _are_labels(labels, len(dataset)):
            raise ValueError(refusal)
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


def _are_labels(labels: np.ndarray, count: int) -> bool:
    return labels.shape == (count,) and bool(np.issubdtype(labels.dtype, np.integer))


def _folder(root: Path) -> Source:
    if not root.is_dir():
        raise ValueError(f"prepare.root: {root} is not a folder: name the one that holds <class>/<image> files")
    folder = read_image_folder(root)
    if not folder.class_names:
        raise ValueError(f"prepare.root: {root} holds no class folders: images must lie in {root}/<class>/")
    _check_names(folder.class_names, "prepare.root: the name of the class folder")
    parts = {part: _folder_items(part, folder, root) for part in folder.parts}
    return Source(folder.class_names, parts, folder.ignored)


def _folder_items(part: str, folder: ImageFolder, root: Path) -> Items:
    files: list[ImageFile] = []
    labels: list[int] = []
    for label, (name, own) in enumerate(folder.parts[part].items()):
        if not own:
            path = folder.folders[part] / name
            if not path.exists() and part == "test":
                continue  # prepare warns of classes without test images
            if not path.exists():
                raise ValueError(
                    f"prepare.root: {path} does not exist, but the other part of the split has images of {name!r}: add images to "
                    "train, or remove the class"
                )
            inside = [group for group in folder.ignored if (root / group.first).is_relative_to(path)]
            why = "".join(f"; ignored: {group.first!r} ({group.reason})" for group in inside[:3])
            raise ValueError(f"prepare.root: the class folder {path} holds no images: remove it or fill it{why}")
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
