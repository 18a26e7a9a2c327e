from __future__ import annotations

import csv
import gzip
import hashlib
import os
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipelines.data.listing import listing_changes
from pipelines.data.shards import open_split, read_manifest, write_manifest, write_shards
from pipelines.preparation.data_set import write_data_set
from pipelines.preparation.decoding import Transform
from pipelines.preparation.sources import Items, SourceSettings, open_source
from pipelines.preparation.splits import limit_items, split_items
from pipelines.prepare import prepare
from pipelines.stage import DATA, LISTING_RECORDS, run_stage
from pipelines.tables import read_csv
from tests.conftest import SHARED_DATA, Project


def tree_hash(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def items_of(images: np.ndarray, labels: np.ndarray) -> Items:
    return Items(
        labels=labels,
        load=lambda i: Image.fromarray(images[i]),
        digest=lambda i: hashlib.sha256(images[i].tobytes()).digest(),
        name=lambda i: str(i),
        arrays=images,
    )


def save_images(folder: Path, count: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")


@pytest.fixture
def run_prepare(project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(project.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "argv", ["prepare"])
    return lambda: run_stage("prepare", prepare)


def test_same_input_and_params_give_byte_identical_outputs(project: Project, run_prepare) -> None:
    run_prepare()
    first = tree_hash(project.folder / "artifacts/data")
    run_prepare()
    assert tree_hash(project.folder / "artifacts/data") == first
    project.change(prepare__max_images=500)
    run_prepare()
    assert tree_hash(project.folder / "artifacts/data") != first


def test_shards_give_back_every_image_and_label(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (103, 4, 4, 3), dtype=np.uint8), rng.integers(0, 7, 103)
    chunks = [(images[a:b], labels[a:b]) for a, b in ((0, 50), (50, 51), (51, 103))]
    shards = write_shards(tmp_path, "train", chunks, 25)
    assert [shard["count"] for shard in shards] == [25, 25, 25, 25, 3]
    fields = {
        "class_counts": {"train": [103], "test": [0]},
        "class_names": list("abcdefg"),
        "transform": {},
        "skipped": [],
    }
    write_manifest(
        tmp_path, counts={"train": 103, "test": 0}, shape=[4, 4, 3], shards={"train": shards, "test": []}, **fields
    )
    split = open_split(tmp_path, "train")
    assert isinstance(split.shards[0], np.memmap)
    order = rng.permutation(103)
    got, got_labels = split.gather(order)
    assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), images[order])
    assert np.array_equal(got_labels.numpy(), labels[order])

    path = tmp_path / str(shards[1]["conditions"])
    changed = np.load(path)
    changed[3] = 7
    np.save(path, changed)
    with pytest.raises(
        ValueError, match=r"holds labels from \d to 7, the data set has 7 classes: run the prepare stage"
    ):
        open_split(tmp_path, "train")


def test_split_is_stratified_disjoint_and_independent_of_the_order_of_files() -> None:
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (300, 5, 5), dtype=np.uint8), np.repeat(np.arange(3), 100)
    split = split_items(items_of(images, labels), 3, 0.2, seed=0)
    assert sorted([*split["train"], *split["test"]]) == list(range(300))
    assert np.bincount(labels[split["test"]]).tolist() == [20, 20, 20]
    order = rng.permutation(300)
    shuffled = split_items(items_of(images[order], labels[order]), 3, 0.2, seed=0)
    assert {images[i].tobytes() for i in split["test"]} == {images[order][i].tobytes() for i in shuffled["test"]}
    assert not np.array_equal(split_items(items_of(images, labels), 3, 0.2, seed=1)["test"], split["test"])


def test_copies_of_an_image_stay_on_one_side() -> None:
    rng = np.random.default_rng(2)
    once = rng.integers(0, 256, (40, 5, 5), dtype=np.uint8)
    images, labels = np.concatenate([once, once, once]), np.tile(np.repeat([0, 1], 20), 3)
    split = split_items(items_of(images, labels), 2, 0.25, seed=0)
    sides = [{images[i].tobytes() for i in split[name]} for name in ("train", "test")]
    assert sides[0] & sides[1] == set()
    assert len(split["test"]) == 30


def test_limit_keeps_every_class() -> None:
    labels = np.asarray([0] * 90 + [1] * 9 + [2])
    kept = limit_items(labels, np.arange(100), 12, seed=0)
    assert np.bincount(labels[kept]).tolist() == [6, 5, 1]
    assert np.array_equal(kept, np.sort(kept))


def test_transparent_pixels_show_the_background() -> None:
    clear = Image.new("RGBA", (6, 6), (255, 0, 0, 0))
    assert (Transform(6, 3, 128)(clear) == 128).all()
    palette = Image.new("P", (6, 6), 0)
    palette.putpalette([255, 0, 0] * 256)
    palette.info["transparency"] = 0
    assert (Transform(6, 1, 7)(palette) == 7).all()


def test_photo_is_turned_resized_and_cropped_to_its_centre() -> None:
    wide = np.zeros((10, 40, 3), dtype=np.uint8)
    wide[:, 15:25] = 255
    assert (Transform(10, 1, 0)(Image.fromarray(wide)) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter
    upright = Image.fromarray(np.vstack([np.zeros((4, 8), np.uint8), np.full((4, 8), 255, np.uint8)]))
    upright.getexif()[0x0112] = 6
    turned = Transform(8, 1, 0)(upright)[..., 0]
    assert (turned[:, :4] == 255).all()
    assert (turned[:, 4:] == 0).all()


def mnist_files(root: Path, counts: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    for prefix, count in counts.items():
        raw = root / "MNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


def test_torchvision_set_of_60000_images_is_prepared_in_seconds(project: Project, run_prepare, tmp_path: Path) -> None:
    mnist_files(tmp_path, {"train": 60000, "t10k": 10000})
    project.change(
        prepare__source="torchvision",
        prepare__dataset="MNIST",
        prepare__root=str(tmp_path),
        prepare__download=False,
        prepare__image_size=28,
        prepare__max_images=None,
    )
    began = time.monotonic()
    run_prepare()
    assert time.monotonic() - began < 30
    manifest = read_manifest(project.folder / "artifacts/data")
    assert manifest.counts == {"train": 60000, "test": 10000}
    assert manifest.class_names[3] == "3 - three"
    assert str(tmp_path) not in (project.folder / "artifacts/data/manifest.json").read_text(), "no path of this machine"


def test_image_folder_with_its_own_split_keeps_it(project: Project, run_prepare, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            save_images(tmp_path / "images" / split / name, count)
    project.change(prepare__source="folder", prepare__root=str(tmp_path / "images"), prepare__channels=3)
    run_prepare()
    manifest = read_manifest(project.folder / "artifacts/data")
    assert manifest.class_names == ("cat", "dog")
    assert manifest.counts == {"train": 12, "test": 6}
    listed = read_csv(project.folder / "artifacts/data/listing.csv")
    assert len(listed) == 18
    for row in listed:
        content = (tmp_path / "images" / row["path"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (str(len(content)), hashlib.sha256(content).hexdigest())


def test_data_set_without_class_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FakeData"):
        open_source(SourceSettings("torchvision", dataset="FakeData", root=str(tmp_path)))


def test_digits_keep_their_content_hash(tmp_path: Path) -> None:
    manifest = write_data_set(
        tmp_path,
        open_source(SourceSettings("digits")),
        Transform(8, 1, 0),
        test_fraction=0.2,
        max_images=None,
        skip_broken=False,
        shard_size=16384,
        seed=0,
    )
    assert manifest.content_hash == "b009c344428f48de35d8f8dd37a1b36378534442d1512c26a1ee25fc499c428f"
    assert not (tmp_path / "listing.csv").exists(), "digits have no files"


AWKWARD = [
    'cat "big"',
    "dog, small",
    "line\nbreak",
    "carriage\rreturn",
    "ends with\n",
    "'single'",
    "<b>&amp;",
    "ünï 日本",
]


def test_class_names_with_quotes_commas_and_line_breaks_survive_prepare(
    project: Project, run_prepare, tmp_path: Path
) -> None:
    for name in AWKWARD:
        save_images(tmp_path / "images" / name, 5)
    project.change(
        prepare__source="folder", prepare__root=str(tmp_path / "images"), prepare__channels=3, prepare__max_images=None
    )
    run_prepare()
    data = project.folder / "artifacts/data"
    assert read_manifest(data).class_names == tuple(sorted(AWKWARD))
    plot = project.folder / "plots/prepare_classes.csv"
    expected = [(name, split, count) for split, count in (("train", "4"), ("test", "1")) for name in sorted(AWKWARD)]
    assert [tuple(row.values()) for row in read_csv(plot)] == expected
    with open(plot, newline="", encoding="utf-8") as file:
        assert [tuple(row.values()) for row in csv.DictReader(file)] == expected
    assert [tuple(row) for row in pd.read_csv(plot, dtype=str).to_numpy()] == expected
    assert {row["path"].split("/")[0] for row in read_csv(data / "listing.csv")} == set(AWKWARD)


def test_class_folder_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    for name in (b"cat", b"caf\xe9"):
        save_images(tmp_path / os.fsdecode(name), 2)
    with pytest.raises(ValueError, match=r"caf.* is not UTF-8"):
        open_source(SourceSettings("folder", root=str(tmp_path)))


def test_run_of_a_repeated_prepare_shows_the_new_counts_and_hash(project: Project, run_prepare, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save_images(tmp_path / "images" / name, 5)
    project.change(
        prepare__source="folder", prepare__root=str(tmp_path / "images"), prepare__channels=3, prepare__max_images=None
    )
    run_prepare()
    save_images(tmp_path / "images" / "cat", 9, seed=1)
    run_prepare()
    manifest = read_manifest(project.folder / "artifacts/data")
    client = MlflowClient(f"sqlite:///{project.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("rediffuse")
    newest = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])[0]
    assert newest.data.tags["rediffuse.data_hash"] == manifest.content_hash
    assert newest.data.metrics["train_images"] == manifest.counts["train"] == 11


def test_prepare_names_the_changes_of_its_image_folder_until_it_runs_again(
    project: Project, run_prepare, tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        save_images(tmp_path / "images" / name, 5)
    project.change(prepare__source="folder", prepare__root=str(tmp_path / "images"), prepare__channels=3)
    run_prepare()
    data, records = project.folder / DATA, project.folder / LISTING_RECORDS
    assert listing_changes(data, records) is None
    save_images(tmp_path / "images" / "cat", 6)
    assert "1 added, 0 changed, 0 removed (first: 'cat/5.png')" in str(listing_changes(data, records))
    run_prepare()
    assert listing_changes(data, records) is None


@pytest.mark.skipif(not (SHARED_DATA / "FashionMNIST").exists(), reason="the shared data sets are not on this machine")
def test_real_fashion_mnist_arrives_unchanged(project: Project, run_prepare, tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (SHARED_DATA / "FashionMNIST" / "raw").iterdir():
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    project.change(
        prepare__source="torchvision", prepare__dataset="FashionMNIST", prepare__root=str(tmp_path), prepare__image_size=28,
        prepare__max_images=None,
    )  # fmt: skip
    run_prepare()
    split = open_split(project.folder / "artifacts/data", "test")
    content = (raw / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert split.shards[0].tobytes() == content
    assert read_manifest(project.folder / "artifacts/data").class_names[9] == "Ankle boot"
