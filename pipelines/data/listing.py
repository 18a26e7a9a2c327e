"""The image files of a folder, and what changed among them since the prepare stage read them.

One rule holds at every depth: names that start with a dot and ``__MACOSX`` are ignored, symbolic links to files and folders
are followed, and every file that is not read is counted by reason and suffix.

The prepare stage writes ``listing.csv`` beside the shards: path relative to the folder, size and SHA-256 of each image
file. The folder's place and the files' modification times differ between machines, so they are recorded outside the
data set.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffusion_core.storage import file_sha256, read_json, write_json
from pipelines.tables import read_csv, write_csv

LISTING = "listing.csv"
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")
"""Names of folders that make a split, in any case."""
SPLIT_WORD = re.compile(
    r"(?<![^\W_])(train|training|test|testing|val|valid|validation|dev|eval)(?![^\W_])", re.IGNORECASE
)
"""A word in the name of a folder that may be a part of a split, such as seg_train or test-set."""


@dataclass(frozen=True)
class ImageFile:
    """An image file. ``path`` is relative to the image folder, ``modified_ns`` its modification time in nanoseconds."""

    path: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Ignored:
    """Files that are not read, for one reason and with one suffix. ``first`` is one of them, relative to the image folder."""

    reason: str
    suffix: str
    files: int
    first: str


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder by split and class, each list sorted by path, and the files that are ignored.

    The splits are train and test, or "all" if the folder has no split of its own.
    """

    class_names: tuple[str, ...]
    parts: Mapping[str, Mapping[str, Sequence[ImageFile]]]
    folders: Mapping[str, Path]
    """The folder of each split, which holds its class folders."""
    ignored: Sequence[Ignored]


def read_image_folder(root: Path, count_ignored: bool = True) -> ImageFolder:
    """Find the images of ``root``. A file is an image if Pillow reads its suffix.

    ``root`` holds class folders, or a folder for train and one for test that hold class folders. A folder that several links
    reach is read once. Folders with ignored names are walked only if ``count_ignored``.
    Raises ValueError if it is unclear whether folders are classes or a split, or if a class folder is a link to a folder that
    is read already.
    """
    walk = _Walk(root, count_ignored)
    folders = _layout(root, walk.folders_of(root))
    if "all" not in folders:
        for folder in folders.values():
            walk.report_outside(folder)
    walk.report_outside(root)
    by_part = {part: walk.folders_of(folder) for part, folder in folders.items()}
    names = tuple(sorted({name for own in by_part.values() for name in own}))
    owners = [(part, name) for part, own in by_part.items() for name in own]
    found = walk.read_classes({(part, name): folders[part] / name for part, name in owners})
    parts = {part: {name: found.get((part, name), []) for name in names} for part in folders}
    return ImageFolder(names, parts, folders, walk.ignored())


def write_listing(data_dir: Path, files: Iterable[tuple[ImageFile, str]]) -> None:
    """Write listing.csv. Each file comes with the SHA-256 of its content, in hexadecimal."""
    rows = ({"path": file.path, "bytes": file.size, "sha256": digest} for file, digest in files)
    write_csv(data_dir / LISTING, ["path", "bytes", "sha256"], rows)


def record_listing(data_dir: Path, records: Path, root: str, files: Sequence[ImageFile]) -> None:
    """Record in the folder ``records`` which image folder the listing describes, and when its files were modified.

    ``files`` are those of ``write_listing``, in the same order. Each listing has its own record, so a listing
    that DVC restores finds its folder.
    """
    modified = [file.modified_ns for file in files]
    write_json(_record_path(data_dir, records), {"root": root, "modified_ns": modified})


def listing_changes(data_dir: Path, records: Path) -> str | None:
    """Compare the image folder with the listing in ``data_dir``.

    Returns one line that counts the added, changed and removed images, or says why the folder cannot be compared.
    Returns None if nothing changed or the data set does not come from an image folder. Only files of the same size and
    another modification time are read. Raises ValueError if listing.csv is damaged.
    """
    if not (data_dir / LISTING).exists():
        return None
    listed = read_csv(data_dir / LISTING)
    try:
        record = read_json(_record_path(data_dir, records))
        root = Path(record["root"])
        modified = dict(zip((row["path"] for row in listed), record["modified_ns"], strict=True))
    except (ValueError, KeyError, TypeError):
        return f"{data_dir} was prepared in another working copy: its image folder cannot be compared"
    if not root.is_dir():
        return f"the image folder {root} is not on this machine: it cannot be compared with {data_dir}"
    try:
        folder = read_image_folder(root, count_ignored=False)
        found = {file.path: file for part in folder.parts.values() for own in part.values() for file in own}
        added = [path for path in found if path not in modified]
        removed = [path for path in modified if path not in found]
        changed = [
            row["path"]
            for row in listed
            if (file := found.get(row["path"])) is not None
            and (
                str(file.size) != row["bytes"]
                or (file.modified_ns != modified[file.path] and file_sha256(root / file.path) != row["sha256"])
            )
        ]
    except OSError as error:
        return f"the image folder {root} cannot be compared with {data_dir}: {error.filename}: {error.strerror}"
    except ValueError as error:
        return f"the image folder {root} has changed since prepare: {error}"
    if not (added or changed or removed):
        return None
    first = (added + changed + removed)[0]
    return (
        f"the image folder {root} has changed since prepare: {len(added)} added, {len(changed)} changed, "
        f"{len(removed)} removed (first: {first!r}); prepare again with: dvc repro -f prepare"
    )


class _Walk:
    """A walk through an image folder that follows links and enters each folder once.

    Folders are told apart by their real path. The folders above the root count as entered, so that a link to one of them is
    not followed.
    """

    def __init__(self, root: Path, count_ignored: bool) -> None:
        self.prefix = os.path.join(root, "")  # noqa: PTH118
        self.count_ignored = count_ignored
        real = Path(os.path.realpath(root))
        self.entered = {str(folder) for folder in (real, *real.parents)}
        self.counts: dict[tuple[str, str], tuple[int, str]] = {}

    def folders_of(self, folder: Path) -> list[str]:
        """Return the names of the folders in ``folder`` that are not ignored, sorted; links are followed."""
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if _reason_of_name(e.name) is None and stat.S_ISDIR(_mode(e)))

    def report_outside(self, folder: Path) -> None:
        """Count the ignored entries of ``folder``: files, broken links, and folders with ignored names."""
        with os.scandir(folder) as entries:
            for entry in entries:
                mode = _mode(entry)
                if (reason := _reason_of_name(entry.name)) is not None:
                    self._ignore_tree(entry, reason)
                elif not stat.S_ISDIR(mode):
                    self._ignore(entry.path, "outside the class folders" if mode else "broken link")

    def read_classes(self, folders: Mapping[tuple[str, str], Path]) -> dict[tuple[str, str], list[ImageFile]]:
        """Return the images of each class folder, sorted by path.

        Folders come before links to them: the class folders, then class folders that are links, then links below them.
        """
        found: dict[tuple[str, str], list[ImageFile]] = {owner: [] for owner in folders}
        links: list[tuple[tuple[str, str], str]] = []
        for owner in sorted(folders, key=lambda owner: folders[owner].is_symlink()):
            real = os.path.realpath(folders[owner])
            if real in self.entered:
                raise ValueError(
                    f"prepare.root: the class folder {folders[owner]} is a link to {real}, which is read already or lies "
                    "above: remove the link"
                )
            links += self._read(os.fspath(folders[owner]), real, owner, found[owner])
        while links:
            further = []
            for owner, path in sorted(links, key=lambda link: link[1].split("/")):
                real = os.path.realpath(path)
                if real in self.entered:
                    self._ignore(path, "link to a folder that is read already or lies above", suffix="")
                else:
                    further += self._read(path, real, owner, found[owner])
            links = further
        return {owner: sorted(files, key=lambda file: file.path.split("/")) for owner, files in found.items()}

    def ignored(self) -> list[Ignored]:
        return [
            Ignored(reason, suffix, count, first) for (reason, suffix), (count, first) in sorted(self.counts.items())
        ]

    def _read(
        self, path: str, real: str, owner: tuple[str, str], found: list[ImageFile]
    ) -> list[tuple[tuple[str, str], str]]:
        """Add the images in a folder and below to ``found``. Return the linked folders there."""
        links = []
        pending = [(path, real)]
        while pending:
            path, real = pending.pop()
            if real in self.entered:  # below a linked folder, the tree may meet one that is read already
                self._ignore(path, "folder that is read already", suffix="")
                continue
            self.entered.add(real)
            with os.scandir(path) as entries:
                for entry in entries:
                    if (reason := _reason_of_name(entry.name)) is not None:
                        self._ignore_tree(entry, reason)
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append((entry.path, f"{real}/{entry.name}"))
                    elif not (mode := _mode(entry)):
                        self._ignore(entry.path, "broken link")
                    elif stat.S_ISDIR(mode):
                        links.append((owner, entry.path))
                    elif not stat.S_ISREG(mode):
                        self._ignore(entry.path, "not a regular file")
                    elif (suffix := _suffix(entry.name)) in _suffixes():
                        state = entry.stat()
                        found.append(ImageFile(entry.path.removeprefix(self.prefix), state.st_size, state.st_mtime_ns))
                    else:
                        self._ignore(entry.path, "suffix of no image format" if suffix else "no suffix")
        return links

    def _ignore_tree(self, entry: os.DirEntry[str], reason: str) -> None:
        if not entry.is_dir(follow_symlinks=False):
            self._ignore(entry.path, reason)
        elif self.count_ignored:
            for folder, _, names in os.walk(entry.path):
                for name in names:
                    self._ignore(os.path.join(folder, name), reason)  # noqa: PTH118

    def _ignore(self, path: str, reason: str, suffix: str | None = None) -> None:
        suffix = _suffix(path.rpartition("/")[2]) if suffix is None else suffix
        path = path.removeprefix(self.prefix)
        count, first = self.counts.get((reason, suffix), (0, path))
        self.counts[reason, suffix] = (count + 1, min(first, path))


def _layout(root: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each split: {"train": ..., "test": ...}, or {"all": root} if the folders are classes."""
    train = [name for name in names if name.lower() in TRAIN_NAMES]
    test = [name for name in names if name.lower() in TEST_NAMES]
    if train and test:
        if len(names) > 2:
            raise ValueError(
                f"prepare.root: {root} holds {_quoted(names)}: which two are the split? prepare reads one folder for train and "
                f"one for test ({', '.join(TEST_NAMES)}). Move the others away, or make a folder that holds links to the two"
            )
        parts = {"train": root / train[0], "test": root / test[0]}
        for part in parts.values():
            if not any(_class_like(part)):
                raise ValueError(
                    f"prepare.root: {root} holds {_quoted(names)}, which is a split, but {part} holds no class folders: "
                    f"images must lie in {part}/<class>/"
                )
        return parts
    for name in (*train, *test, *(name for name in names if SPLIT_WORD.search(name) and name not in (*train, *test))):
        inside = list(_class_like(root / name))
        if 2 * sum(inside) > len(inside):
            raise ValueError(
                f"prepare.root: {root / name} holds more folders than images: is it a part of a split, or a class? "
                "For a split, set prepare.root to it (prepare.test_fraction then holds out test images), or name the two folders "
                "train and test, with nothing else beside them. For a class, rename it"
            )
    return {"all": root}


def _class_like(folder: Path) -> Iterator[bool]:
    """Yield True for each folder in ``folder`` and False for each image; nothing for ignored names and other files."""
    with os.scandir(folder) as entries:
        for entry in entries:
            mode = _mode(entry)
            if _reason_of_name(entry.name) is None and stat.S_ISDIR(mode):
                yield True
            elif stat.S_ISREG(mode) and _reason_of_name(entry.name) is None and _suffix(entry.name) in _suffixes():
                yield False


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _reason_of_name(name: str) -> str | None:
    """Return why a file or folder of this name is ignored with all that it holds, or None."""
    if name.startswith("."):
        return "name or folder that starts with a dot"
    return "in __MACOSX" if name == "__MACOSX" else None


def _mode(entry: os.DirEntry[str]) -> int:
    """Return the type of what an entry leads to, 0 for a broken link."""
    if not entry.is_symlink():
        if entry.is_dir(follow_symlinks=False):
            return stat.S_IFDIR
        if entry.is_file(follow_symlinks=False):
            return stat.S_IFREG
    try:
        return stat.S_IFMT(entry.stat().st_mode)
    except OSError:
        return 0


def _suffix(name: str) -> str:
    """Return the suffix in lower case with its dot, or "". A Path per file would take most of the time of the walk."""
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if stem.strip(".") and dot and suffix else ""


@functools.cache
def _suffixes() -> frozenset[str]:
    Image.init()
    return frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN)


def _record_path(data_dir: Path, records: Path) -> Path:
    return records / f"{file_sha256(data_dir / LISTING)[:16]}.json"
