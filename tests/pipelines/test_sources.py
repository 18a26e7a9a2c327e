"""torchvision's data sets: their arguments, their splits, their classes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torchvision.datasets as datasets
from PIL import Image
from scipy.io import savemat

from pipelines.params import parse_params, read_yaml
from pipelines.preparation.data_set import write_data_set
from pipelines.preparation.decoding import Transform
from pipelines.preparation.sources import Source, SourceSettings, open_source
from tests.conftest import ROOT


def opened(name: str, root: Path | str, **options: Any) -> Source:
    return open_source(SourceSettings("torchvision", dataset=name, root=str(root), options=options))


def prepared(source: Source, folder: Path) -> Any:
    folder.mkdir()
    return write_data_set(
        folder, source, Transform(8, 1, 0), test_fraction=0.2, max_images=None, skip_broken=False, shard_size=99, seed=0
    )


def idx_files(folder: Path, prefix: str, labels: np.ndarray, more: int = 0) -> None:
    """Images and labels in the format of MNIST; ``more`` further numbers per label, as QMNIST has them."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(len(prefix)).integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    header = struct.pack(">IIII", 2051, len(labels), 28, 28)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    if more:
        table = np.concatenate([labels[:, None], np.full((len(labels), more), 77)], axis=1).astype(">i4")
        (folder / f"{prefix}-labels-idx2-int").write_bytes(
            struct.pack(">III", 0x0C02, len(labels), more + 1) + table.tobytes()
        )
    else:
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, len(labels)) + labels.astype(np.uint8).tobytes()
        )


@pytest.fixture
def emnist(tmp_path: Path) -> Path:
    """Letters a to z: labels 1 to 26, and a class 0 without images."""
    for part, count in (("train", 52), ("test", 26)):
        idx_files(tmp_path / "EMNIST" / "raw", f"emnist-letters-{part}", np.arange(count) % 26 + 1)
    return tmp_path


def test_emnist_letters_are_prepared_without_their_empty_class(
    emnist: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = opened("EMNIST", emnist, split="letters")
    assert source.class_names == tuple("abcdefghijklmnopqrstuvwxyz")
    assert "'N/A'" in caplog.text
    manifest = prepared(source, tmp_path / "data")
    assert manifest.class_counts == {"train": [2] * 26, "test": [1] * 26}


def test_missing_wrong_and_reserved_options_state_what_the_class_takes(emnist: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "prepare.dataset_options.split: EMNIST needs it; prepare.dataset_options: EMNIST takes split (required)"),
        ({"split": "letters", "spilt": 1}, "prepare.dataset_options.spilt: not an option of EMNIST"),
        ({"split": "letters", "train": True}, "prepare.dataset_options.train: prepare opens both splits"),
        ({"split": "letters", "root": "x"}, "set prepare.root instead"),
        ({"split": "letters", "download": True}, "set prepare.download instead"),
        ({"split": "letters", "transform": "x"}, "not an option of EMNIST"),
        ({"split": "latin"}, "byclass"),
    ]
    for options, text in cases:
        with pytest.raises(ValueError) as caught:
            open_source(SourceSettings("torchvision", dataset="EMNIST", root=str(emnist), options=options))
        assert text in str(caught.value)


def test_class_without_options_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CIFAR10 takes no options"):
        opened("CIFAR10", tmp_path, coarse=True)


def test_svhn_uses_its_train_and_test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 10), ("extra", 30)):
        images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": (np.arange(count) % 10 + 1)[:, None]})
    manifest = prepared(opened("SVHN", tmp_path), tmp_path / "data")
    assert manifest.class_names == tuple("0123456789")
    assert manifest.counts == {"train": 20, "test": 10}
    more = opened("SVHN", tmp_path, split={"train": "extra", "test": "test"})
    assert [len(more.items[part].labels) for part in ("train", "test")] == [30, 10]


def test_flowers_use_the_named_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, 307):
        Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(folder / "jpg" / f"image_{number:05d}.jpg")
    thirds = {"trnid": np.arange(1, 103), "valid": np.arange(103, 205), "tstid": np.arange(205, 307)}
    savemat(folder / "setid.mat", thirds)
    savemat(folder / "imagelabels.mat", {"labels": (np.arange(306) % 102 + 1)[None]})
    assert len(opened("Flowers102", tmp_path).class_names) == 102
    chosen = opened("Flowers102", tmp_path, split={"train": "test", "test": "val"})
    assert chosen.items["test"].load(0).getpixel((0, 0))[0] == pytest.approx(103, abs=2)  # type: ignore[index]
    with pytest.raises(ValueError, match="name two"):
        opened("Flowers102", tmp_path, split="train")


def test_qmnist_takes_its_class_from_the_item(tmp_path: Path) -> None:
    idx_files(tmp_path / "QMNIST" / "raw", "qmnist-train", np.arange(20) % 10, more=7)
    idx_files(tmp_path / "QMNIST" / "raw", "qmnist-test", np.arange(10) % 10, more=7)
    source = opened("QMNIST", tmp_path)
    assert np.array_equal(source.items["train"].labels, np.arange(20) % 10)


class Fake(datasets.VisionDataset):
    """Four grey images of 8 by 8 pixels per class, without a split."""

    classes: ClassVar[list[str]] = ["a", "b"]
    targets: Any = [0, 1] * 4
    given: ClassVar[dict[str, Any]] = {}

    def __init__(self, root: str, size: int, flavour: str = "plain", tags: list[str] | None = None) -> None:
        super().__init__(root)
        Fake.given = {"size": size, "flavour": flavour, "tags": tags}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return Image.new("L", (8, 8), 10 * index), self.targets[index] if self.targets is not None else 0


class Halves(Fake):
    """The same with splits that have names of their own."""

    def __init__(self, root: str, split: str = "first", size: int = 1) -> None:
        if split not in ("first", "second"):
            raise ValueError(f"Unknown value '{split}' for argument split. Valid values are first, second")
        super().__init__(root, size)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(datasets, "Fake", Fake, raising=False)
    monkeypatch.setattr(datasets, "Halves", Halves, raising=False)
    return monkeypatch


def test_options_reach_a_class_without_a_split(fakes: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = opened("Fake", tmp_path, size=3, tags=["x", "y"])
    assert set(source.items) == {"all"}
    assert Fake.given == {"size": 3, "flavour": "plain", "tags": ["x", "y"]}
    with pytest.raises(
        ValueError, match=r"size: Fake needs it; .* size \(required\), flavour \(default 'plain'\), tags"
    ):
        opened("Fake", tmp_path)


def test_class_with_other_names_of_its_splits_says_how_to_give_them(fakes: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Valid values are first, second.*takes split \{train: ..., test: ...\}"):
        opened("Halves", tmp_path)
    assert set(opened("Halves", tmp_path, split={"train": "first", "test": "second"}).items) == {"train", "test"}
    for wrong in ({"train": "first"}, {"train": "first", "test": "first"}, ["first", "second"], None):
        with pytest.raises(ValueError, match=r"prepare.dataset_options.split: given .* name two"):
            opened("Halves", tmp_path, split=wrong)


def test_root_may_begin_with_the_home_folder(
    fakes: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emnist: Path
) -> None:
    monkeypatch.setenv("HOME", str(emnist))
    assert len(opened("EMNIST", "~", split="letters").class_names) == 26


@pytest.mark.parametrize(
    ("targets", "text"),
    [([-1, 0] * 4, "unlabelled images"), ([0.5] * 8, "class-labelled"), ([[0], [1]] * 4, "class-labelled")],
)
def test_labels_that_are_no_classes_are_refused(
    fakes: pytest.MonkeyPatch, tmp_path: Path, targets: Any, text: str
) -> None:
    fakes.setattr(Fake, "targets", targets)
    with pytest.raises(ValueError, match=text):
        opened("Fake", tmp_path, size=1)


def test_blank_and_repeated_class_names_of_a_data_set_are_handled(fakes: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fakes.setattr(Fake, "classes", ["crane", "crane"])
    assert opened("Fake", tmp_path, size=1).class_names == ("crane (0)", "crane (1)")
    fakes.setattr(Fake, "classes", ["a", " "])
    with pytest.raises(ValueError, match="class name of Fake ' ' is blank"):
        opened("Fake", tmp_path, size=1)


def params(**prepare: Any) -> Any:
    tree = read_yaml(ROOT / "params.yaml")
    tree["prepare"] = {**tree["prepare"], **prepare}
    return parse_params(tree).prepare


def test_options_are_plain_values_and_only_for_torchvision() -> None:
    given = {
        "split": {"train": "a", "test": "b"},
        "folds": 3,
        "tags": ["x"],
        "strict": True,
        "share": 0.5,
        "none": None,
    }
    read = params(source="torchvision", dataset="EMNIST", root="data", dataset_options=given)
    assert read.dataset_options == given
    assert params().dataset_options == {}
    with pytest.raises(
        ValueError, match=r"prepare.dataset_options: given .*only with prepare.source torchvision, not digits"
    ):
        params(dataset_options={"split": "letters"})
    for wrong, text in (
        ("letters", "prepare.dataset_options: given 'letters', allowed arguments of the data set's class by name"),
        (["letters"], "prepare.dataset_options: given .'letters'., allowed arguments of the data set's class by name"),
        ({"split": {"a": {"b": 1}}}, "prepare.dataset_options.split: given .*, allowed a string, number"),
    ):
        with pytest.raises(ValueError, match=text):
            params(source="torchvision", dataset="EMNIST", root="data", dataset_options=wrong)


def test_blank_names_in_the_params_are_refused() -> None:
    for wrong in ({"source": "folder", "root": ""}, {"source": "folder", "root": "  "}):
        with pytest.raises(ValueError, match=r"prepare.root: given '.*', allowed a name that is not blank"):
            params(**wrong)
    with pytest.raises(ValueError, match=r"prepare.dataset: given ''"):
        params(source="torchvision", dataset="", root="data")
