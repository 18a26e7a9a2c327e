"""The image files of a folder, and what changed among them since the prepare stage read them.

The prepare stage writes ``listing.csv`` beside the shards: path relative to the folder, size and SHA-256 of each image
file. The folder's place and the files' modification times differ between machines, so they are recorded outside the
data set.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffusion_core.storage import file_sha256, read_json, write_json
from pipelines.tables import read_csv, write_csv

LISTING = "listing.csv"


@dataclass(frozen=True)
class ImageFile:
    """An image file. ``path`` is relative to the image folder, ``modified_ns`` its modification time in nanoseconds."""

    path: str
    size: int
    modified_ns: int


def folder_layout(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the folder of each split and the class names, sorted.

    The splits are train and test if ``root`` holds only these two folders and both hold class folders. Otherwise the
    only key is "all", and the class folders lie in ``root``.
    """
    parts = {name: root / name for name in ("train", "test")}
    if set(_folders(root)) == set(parts) and all(_folders(part) for part in parts.values()):
        return parts, sorted({name for part in parts.values() for name in _folders(part)})
    return {"all": root}, _folders(root)


def image_files(folder: Path, root: Path) -> list[ImageFile]:
    """Return the image files in ``folder`` and below, sorted by path. A file is an image if Pillow reads its suffix."""
    prefix = os.path.join(root, "")  # noqa: PTH118
    found: list[ImageFile] = []
    pending = [os.fspath(folder)] if folder.is_dir() else []
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif _has_image_suffix(entry.name) and entry.is_file():
                    state = entry.stat()
                    found.append(ImageFile(entry.path.removeprefix(prefix), state.st_size, state.st_mtime_ns))
    return sorted(found, key=lambda file: file.path.split("/"))


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
        found = {file.path: file for file in _all_files(root)}
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
    if not (added or changed or removed):
        return None
    first = (added + changed + removed)[0]
    return (
        f"the image folder {root} has changed since prepare: {len(added)} added, {len(changed)} changed, "
        f"{len(removed)} removed (first: {first!r}); prepare again with: dvc repro -f prepare"
    )


def _all_files(root: Path) -> list[ImageFile]:
    parts, names = folder_layout(root)
    return [file for part in parts.values() for name in names for file in image_files(part / name, root)]


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _has_image_suffix(name: str) -> bool:
    stem, _, suffix = name.rpartition(".")  # a Path per file would take most of the time of the walk
    return stem != "" and f".{suffix.lower()}" in _suffixes()


@functools.cache
def _suffixes() -> frozenset[str]:
    Image.init()
    return frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN)


def _record_path(data_dir: Path, records: Path) -> Path:
    return records / f"{file_sha256(data_dir / LISTING)[:16]}.json"
