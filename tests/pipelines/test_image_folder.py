"""Image folders: what is read, what is ignored and reported, which folders are splits, and which names are refused."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.listing import listing_changes, read_image_folder
from pipelines.data.shards import Manifest, read_manifest
from pipelines.preparation.data_set import write_data_set
from pipelines.preparation.decoding import Transform
from pipelines.preparation.sources import SourceSettings, open_source
from pipelines.prepare import prepare
from pipelines.stage import DATA, LISTING_RECORDS, run_stage
from tests.conftest import Project

DOT, NO_FORMAT = "name or folder that starts with a dot", "suffix of no image format"


def save(path: Path, seed: int | None = None) -> None:
    """Save an image of 8 by 8 pixels. The same seed gives the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path, "PNG")


def write(path: Path, text: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of three images."""
    for name in ("cat", "dog"):
        for number in range(3):
            save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def paths(root: Path, part: str = "all") -> dict[str, list[str]]:
    return {name: [file.path for file in own] for name, own in read_image_folder(root).parts[part].items()}


def ignored(root: Path) -> dict[tuple[str, str], tuple[int, str]]:
    return {(group.reason, group.suffix): (group.files, group.first) for group in read_image_folder(root).ignored}


def prepared(root: Path, folder: Path, **options: object) -> Manifest:
    folder.mkdir(exist_ok=True)
    settings = {"test_fraction": 0.3, "max_images": None, "skip_broken": False, "shard_size": 100, "seed": 0, **options}
    source = open_source(SourceSettings("folder", root=str(root)))
    return write_data_set(folder, source, Transform(8, 1, 0), **settings)  # type: ignore[arg-type]


def test_dot_names_and_macosx_are_ignored_at_every_depth(root: Path) -> None:
    for folder in (root, root / "cat", root / "cat" / "deep"):
        for name in ("._a.png", ".hidden/b.png", ".hidden/more/c.PNG", "__MACOSX/d.png", "__MACOSX/cat/._e.png"):
            save(folder / name)
    assert paths(root) == {name: [f"{name}/{n}.png" for n in range(3)] for name in ("cat", "dog")}
    assert ignored(root) == {(DOT, ".png"): (9, "._a.png"), ("in __MACOSX", ".png"): (6, "__MACOSX/cat/._e.png")}


def test_dot_names_and_macosx_are_ignored_in_a_split(root: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat/0.png", "dog/0.png", "__MACOSX/0.png", ".git/0.png", "cat/.x.png"):
            save(root.parent / "split" / part / name)
    split = root.parent / "split"
    assert read_image_folder(split).class_names == ("cat", "dog")
    assert paths(split, "test") == {"cat": ["test/cat/0.png"], "dog": ["test/dog/0.png"]}
    assert {key: count for key, (count, _) in ignored(split).items()} == {(DOT, ".png"): 4, ("in __MACOSX", ".png"): 2}


def test_every_file_that_is_not_read_is_counted_by_reason_and_suffix(root: Path) -> None:
    for name in (
        "cat/a.txt",
        "cat/b.TXT",
        "dog/deep/c.txt",
        "dog/Thumbs.db",
        "cat/noext",
        "cat/trailing.",
        "readme.md",
    ):
        write(root / name)
    save(root / "0.png")
    (root / "cat" / "gone.png").symlink_to("nowhere")
    (root / "cat" / "self.png").symlink_to("self.png")
    (root / "lost").symlink_to("nowhere")
    os.mkfifo(root / "dog" / "pipe.png")
    assert sum(len(own) for own in paths(root).values()) == 6
    assert ignored(root) == {
        (NO_FORMAT, ".txt"): (3, "cat/a.txt"),
        (NO_FORMAT, ".db"): (1, "dog/Thumbs.db"),
        ("no suffix", ""): (2, "cat/noext"),
        ("outside the class folders", ".md"): (1, "readme.md"),
        ("outside the class folders", ".png"): (1, "0.png"),
        ("broken link", ".png"): (2, "cat/gone.png"),
        ("broken link", ""): (1, "lost"),
        ("not a regular file", ".png"): (1, "dog/pipe.png"),
    }


def test_linked_files_subfolders_and_class_folders_are_read(root: Path, tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path / "elsewhere" / "more" / f"{number}.png")
    (root / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "one.png").symlink_to(tmp_path / "elsewhere" / "more" / "0.png")
    save(tmp_path / "foxes" / "0.png")
    (root / "fox").symlink_to(tmp_path / "foxes")
    assert paths(root)["cat"][3:] == ["cat/linked/more/0.png", "cat/linked/more/1.png", "cat/one.png"]
    assert paths(root)["fox"] == ["fox/0.png"]
    assert ignored(root) == {}


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "../dog", "deep", "/"])
def test_link_to_a_folder_of_the_tree_or_above_adds_nothing(root: Path, target: str) -> None:
    save(root / "cat" / "deep" / "3.png")
    before = paths(root)
    (root / "cat" / "a_link").symlink_to(target)
    (root / "dog" / "z_link").symlink_to(root / "cat")
    assert paths(root) == before
    assert ignored(root)["link to a folder that is read already or lies above", ""] == (2, "cat/a_link")


def test_folder_that_two_links_reach_is_read_once(root: Path, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    for name in ("dog/a", "cat/z", "cat/y"):
        (root / name).symlink_to(tmp_path / "elsewhere")
    assert paths(root)["cat"][3:] == ["cat/y/0.png"]
    assert len(paths(root)["dog"]) == 3
    assert ignored(root)["link to a folder that is read already or lies above", ""] == (3, "cat/y/loop")


def test_folder_reached_below_two_different_links_is_read_once(root: Path, tmp_path: Path) -> None:
    save(tmp_path / "outer" / "inner" / "0.png")
    (root / "cat" / "inner").symlink_to(tmp_path / "outer" / "inner")
    (root / "cat" / "outer").symlink_to(tmp_path / "outer")
    assert paths(root)["cat"][3:] == ["cat/inner/0.png"]
    assert ignored(root) == {("folder that is read already", ""): (1, "cat/outer/inner")}


def test_class_folder_that_is_a_link_to_another_class_is_refused(root: Path) -> None:
    (root / "ant").symlink_to("cat")
    with pytest.raises(ValueError, match=r"the class folder .*ant is a link to .*cat, which is read already"):
        read_image_folder(root)


def test_class_folder_with_ignored_files_only_names_them(root: Path) -> None:
    write(root / "fox" / "0")
    with pytest.raises(ValueError, match=r"fox holds no images.*'fox/0' \(no suffix\)"):
        open_source(SourceSettings("folder", root=str(root)))


def test_log_manifest_and_listing_agree_on_what_was_ignored(
    project: Project, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(root / "cat" / "notes.txt")
    save(root / "dog" / os.fsdecode(b"caf\xe9.png"))
    write(root / "dog" / os.fsdecode(b"caf\xe9"))
    monkeypatch.chdir(project.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setattr(sys, "argv", ["prepare"])
    project.change(prepare__source="folder", prepare__root="~/images", prepare__max_images=None)
    with caplog.at_level(logging.INFO, "rediffuse"):
        run_stage("prepare", prepare)
    manifest = read_manifest(DATA)
    assert manifest.counts["train"] + manifest.counts["test"] == 7
    assert [tuple(group.values()) for group in manifest.ignored] == [
        ("no suffix", "", 1, os.fsdecode(b"dog/caf\xe9")),
        (NO_FORMAT, ".txt", 1, "cat/notes.txt"),
    ]
    lines = [record.getMessage() for record in caplog.records]
    assert f"ignored: 1 files .txt: {NO_FORMAT} (first: 'cat/notes.txt')" in lines
    assert "7 images" not in lines and any("2 files ignored" in line for line in lines)
    assert listing_changes(DATA, LISTING_RECORDS) is None, "the root with ~ is found again"
    for name in ("0.png", "1.png"):
        save(root / "train" / "cat" / name)
        save(root / "val" / "cat" / name)
    assert "which two are the split?" in str(listing_changes(DATA, LISTING_RECORDS))


def test_manifest_without_the_new_fields_can_be_read(root: Path, tmp_path: Path) -> None:
    prepared(root, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["ignored"], tree["ignored_profiles"]
    path.write_text(json.dumps(tree))
    assert (read_manifest(tmp_path / "data").ignored, read_manifest(tmp_path / "data").ignored_profiles) == ([], [])


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "val"),
        ("train", "valid"),
        ("train", "validation"),
        ("Train", "Test"),
        ("TRAIN", "Val"),
        ("train", "testing"),
        ("training", "validation"),
    ],
)
def test_split_is_recognised_under_its_usual_names(tmp_path: Path, train: str, test: str) -> None:
    for part in (train, test):
        for name in ("cat", "dog"):
            save(tmp_path / part / name / "0.png")
    write(tmp_path / "README.md")
    save(tmp_path / ".cache" / "x.png")
    assert read_image_folder(tmp_path).class_names == ("cat", "dog")
    assert paths(tmp_path, "train") == {name: [f"{train}/{name}/0.png"] for name in ("cat", "dog")}
    assert paths(tmp_path, "test") == {name: [f"{test}/{name}/0.png"] for name in ("cat", "dog")}


@pytest.mark.parametrize(
    ("folders", "question"),
    [
        (("train/cat", "val/cat", "test/cat"), "which two are the split"),
        (("train/cat", "Train/cat", "test/cat"), "which two are the split"),
        (("train/cat", "test/cat", "unlabeled"), "which two are the split"),
        (("train", "val"), "train holds no class folders"),
        (("train/cat", "val"), "val holds no class folders"),
        (("train/cat", "train/dog"), "part of a split, or a class"),
        (("Val/cat", "other/cat"), "part of a split, or a class"),
        (("train_set/cat", "train_set/dog", "test_set/cat", "test_set/dog"), "part of a split, or a class"),
        (("seg_train/cat", "seg_test/cat"), "part of a split, or a class"),
        (("train/cat", "train/dog", "train", "dev/cat"), "part of a split, or a class"),
    ],
)
def test_unclear_split_is_refused_with_a_question(tmp_path: Path, folders: tuple[str, ...], question: str) -> None:
    for folder in folders:
        save(tmp_path / folder / "0.png")
    with pytest.raises(ValueError, match=f"prepare.root: .*{question}"):
        open_source(SourceSettings("folder", root=str(tmp_path)))


def test_class_that_one_part_of_a_split_lacks(tmp_path: Path) -> None:
    for folder in ("train/cat", "train/dog", "val/cat"):
        save(tmp_path / folder / "0.png")
    source = open_source(SourceSettings("folder", root=str(tmp_path)))
    assert source.class_names == ("cat", "dog")
    assert source.items["test"].labels.tolist() == [0]
    save(tmp_path / "val" / "owl" / "0.png")
    with pytest.raises(
        ValueError, match="train/owl does not exist, but the other part of the split has images of 'owl'"
    ):
        open_source(SourceSettings("folder", root=str(tmp_path)))


def test_train_that_holds_images_is_a_class_beside_others(tmp_path: Path) -> None:
    for name in ("bus", "car", "train"):
        save(tmp_path / name / "0.png")
    assert read_image_folder(tmp_path).class_names == ("bus", "car", "train")


@pytest.mark.parametrize("name", [" ", "\t", "\u00a0", "\u200b", "\n"])
def test_blank_class_name_is_refused_and_shown(root: Path, name: str) -> None:
    save(root / name / "0.png")
    with pytest.raises(ValueError, match=r"prepare.root: .* is blank") as caught:
        open_source(SourceSettings("folder", root=str(root)))
    assert ascii(name) in str(caught.value)


@pytest.mark.parametrize(
    "names", [("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("stra\u00dfe", "STRASSE"), ("a ", "a")]
)
def test_names_that_look_alike_stay_two_classes_with_a_warning(
    tmp_path: Path, names: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        save(tmp_path / name / "0.png")
    source = open_source(SourceSettings("folder", root=str(tmp_path)))
    assert source.class_names == tuple(sorted(names))
    assert "are kept apart" in caplog.text


def test_home_folder_of_an_unknown_user_is_named() -> None:
    with pytest.raises(ValueError, match=r"prepare.root: ~nobody-here/images"):
        open_source(SourceSettings("folder", root="~nobody-here/images"))


def test_copies_that_fill_a_class_are_refused_with_the_numbers(tmp_path: Path) -> None:
    for number in range(10):
        save(tmp_path / "images" / "cat" / f"{number}.png", seed=7)
        save(tmp_path / "images" / "dog" / f"{number}.png")
    with pytest.raises(ValueError, match="class 'cat' cannot be split: it has 10 images, 1 of them different"):
        prepared(tmp_path / "images", tmp_path / "data")


def test_group_larger_than_the_share_stays_in_train(tmp_path: Path) -> None:
    for number in range(16):
        save(tmp_path / "images" / "cat" / f"copy{number}.png", seed=7)
        save(tmp_path / "images" / "dog" / f"{number}.png")
    for number in range(4):
        save(tmp_path / "images" / "cat" / f"{number}.png")
    for seed in range(8):
        manifest = prepared(tmp_path / "images", tmp_path / "data", test_fraction=0.2, seed=seed)
        assert manifest.class_counts == {"train": [16, 13], "test": [4, 3]}


def test_class_whose_images_all_break_in_test_is_named(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            save(tmp_path / "split" / part / name / "0.png")
            save(tmp_path / "split" / part / name / "1.png")
    for number in range(2):
        write(tmp_path / "split" / "test" / "dog" / f"{number}.png")
    prepared(tmp_path / "split", tmp_path / "data", skip_broken=True)
    assert "1 classes have no test image: 'dog'" in caplog.text


def test_copies_of_a_broken_file_do_not_count_in_the_split(root: Path, tmp_path: Path) -> None:
    for number in range(20):
        write(root / "cat" / f"empty{number}.png", "")
    manifest = prepared(root, tmp_path / "data", skip_broken=True)
    assert manifest.class_counts == {"train": [2, 2], "test": [1, 1]}
    assert len(manifest.skipped) == 20
    with pytest.raises(ValueError, match=r"broken image .*cat/empty0.png \(not an image\)"):
        prepared(root, tmp_path / "data")
