from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pipelines.data import listing
from pipelines.data.listing import listing_changes, read_image_folder, record_listing, write_listing


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in ("cat/0.png", "cat/1.png", "cat/more/2.JPG", "dog/0.png", 'dog/a, "b"\n.png'):
        save(root / name, name)
    prepare(root)
    return root


def save(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def prepare(root: Path) -> None:
    files = [file for own in read_image_folder(root).parts["all"].values() for file in own]
    write_listing(root.parent, [(file, hashlib.sha256((root / file.path).read_bytes()).hexdigest()) for file in files])
    record_listing(root.parent, root.parent / "records", str(root), files)


def changes(root: Path) -> str | None:
    return listing_changes(root.parent, root.parent / "records")


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


def test_unchanged_folder_is_silent_and_no_image_is_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = listing.file_sha256
    monkeypatch.setattr(listing, "file_sha256", lambda path: read.append(path.name) or digest(path))
    assert changes(images) is None
    assert read == ["listing.csv"]


def test_added_changed_and_removed_images_are_counted(images: Path) -> None:
    save(images / "cat/new.png", "new")
    save(images / "cat/1.png", "of another size")
    (images / "dog/0.png").unlink()
    line = str(changes(images))
    assert "1 added, 1 changed, 1 removed (first: 'cat/new.png')" in line
    assert line.endswith("prepare again with: dvc repro -f prepare")
    prepare(images)
    assert changes(images) is None


def test_change_that_keeps_the_size_is_found(images: Path) -> None:
    path = images / "cat/1.png"
    path.write_text(path.read_text()[::-1])
    touch(path)
    assert "0 added, 1 changed, 0 removed (first: 'cat/1.png')" in str(changes(images))


def test_touched_image_is_not_a_change(images: Path) -> None:
    touch(images / "cat/1.png")
    assert changes(images) is None


def test_renamed_image_is_one_added_and_one_removed(images: Path) -> None:
    (images / "cat/1.png").rename(images / "dog/1.png")
    assert "1 added, 0 changed, 1 removed (first: 'dog/1.png')" in str(changes(images))


def test_only_what_prepare_would_read_counts(images: Path) -> None:
    save(images / "cat/notes.txt", "not an image")
    save(images / ".hidden/0.png", "not a class")
    save(images / "0.png", "without a class")
    (images / "cat/gone.png").symlink_to("nowhere")
    assert changes(images) is None
    save(images / "fox/0.png", "a new class")
    assert "1 added, 0 changed, 0 removed (first: 'fox/0.png')" in str(changes(images))


def test_message_is_one_line_for_any_file_name(images: Path) -> None:
    (images / 'dog/a, "b"\n.png').unlink()
    line = str(changes(images))
    assert "1 removed" in line
    assert "\n" not in line


def test_restored_listing_finds_its_folder(images: Path, tmp_path: Path) -> None:
    first = (tmp_path / "listing.csv").read_bytes()
    save(images / "cat/new.png", "new")
    prepare(images)
    (tmp_path / "listing.csv").write_bytes(first)
    assert "1 added, 0 changed, 0 removed" in str(changes(images))


def test_data_set_without_image_folder_is_silent(tmp_path: Path) -> None:
    assert listing_changes(tmp_path, tmp_path / "records") is None


def test_folder_that_is_gone_or_unknown_cannot_be_compared(images: Path) -> None:
    images.rename(images.with_name("moved"))
    assert f"{images} is not on this machine: it cannot be compared" in str(changes(images))
    for record in (images.parent / "records").iterdir():
        record.write_text("{")
    assert "prepared in another working copy" in str(changes(images))
