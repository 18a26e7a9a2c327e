"""Condition encoding: what a person writes against the tensors of each kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_core.condition_encoding import encode_class_indices, encode_classes, encode_conditions
from diffusion_core.networks.conditioning import ConditionSpec

NAN = float("nan")
VOCABULARIES = {
    "none": (ConditionSpec("none"), {}),
    "class": (ConditionSpec("class", 3), {"class_names": ("cat", "dog", "owl")}),
    "classes": (
        ConditionSpec("classes", sizes=(2, 3)),
        {"attributes": {"sex": ("f", "m"), "hair": ("dark", "fair", "none")}},
    ),
    "multi_hot": (ConditionSpec("multi_hot", 3), {"class_names": ("hat", "smile", "glasses")}),
    "vector": (ConditionSpec("vector", 2), {}),
    "tokens": (ConditionSpec("tokens", 2, length=3), {}),
}


@pytest.mark.parametrize(
    ("kind", "written", "expected"),
    [
        ("class", ["owl", "cat", None], torch.tensor([2, 0, 3])),
        ("classes", [{"hair": "fair"}, ["m", "none"], None], torch.tensor([[2, 1], [1, 2], [2, 3]])),
        (
            "multi_hot",
            [["hat", "glasses"], {"smile": 0.25}, None],
            torch.tensor([[1, 0, 1], [0, 0.25, 0], [-1, -1, -1.0]]),
        ),
        ("vector", [[1, -2.5], None], torch.tensor([[1, -2.5], [NAN, NAN]])),
        ("tokens", [[[1, 2]], None], torch.tensor([[[1, 2], [NAN, NAN], [NAN, NAN]], [[NAN, NAN]] * 3])),
    ],
)
def test_conditions_are_encoded_as_the_network_takes_them(kind, written, expected):
    spec, vocabulary = VOCABULARIES[kind]
    encoded = encode_conditions(written, spec, **vocabulary)
    torch.testing.assert_close(encoded, expected, equal_nan=True, rtol=0, atol=0)
    spec.check(encoded)


@pytest.mark.parametrize(
    ("kind", "written", "named"),
    [
        ("class", "cow", "unknown label 'cow'.*cat, dog, owl"),
        ("class", 0, "unknown label 0: .*a number is read as a name"),
        ("class", True, "the label True is a bool"),
        ("classes", {"hair": 1}, "unknown label 1"),
        ("classes", 3, "one class for each of sex, hair"),
        ("multi_hot", [True, False, True], "the label True is a bool"),
        ("multi_hot", 1, "unknown label 1"),
        ("classes", {"eyes": "blue"}, "unknown attribute 'eyes'"),
        ("classes", {"hair": "blue"}, "unknown label 'blue'"),
        ("classes", "m", "one class for each of sex, hair"),
        ("classes", ["m"], "one class for each of sex, hair"),
        ("class", float("inf"), "unknown label inf"),
        ("vector", "ab", "not a table of numbers"),
        ("multi_hot", {"hat": 2.0}, "0 to 1"),
        ("vector", [1.0], "2 numbers"),
        ("tokens", [[1.0, 2.0]] * 4, "1 to 3 rows of 2"),
        ("none", "cat", "takes no condition"),
    ],
)
def test_conditions_outside_the_vocabulary_are_refused_with_the_remedy(kind, written, named):
    spec, vocabulary = VOCABULARIES[kind]
    with pytest.raises(ValueError, match=named):
        encode_conditions([written], spec, **vocabulary)


@pytest.mark.parametrize(
    ("spec", "written", "expected"),
    [
        (ConditionSpec("class", 3), [2, "0", 1.0, None], torch.tensor([2, 0, 1, 3])),
        (ConditionSpec("classes", sizes=(2, 3)), [[1, 2], {"1": 0}], torch.tensor([[1, 2], [2, 0]])),
        (ConditionSpec("multi_hot", 3), [[0, 2], {1: 0.5}, 1], torch.tensor([[1, 0, 1], [0, 0.5, 0], [0, 1, 0]])),
    ],
)
def test_indices_are_the_vocabulary_without_names(spec, written, expected):
    torch.testing.assert_close(encode_conditions(written, spec), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("spec", "written", "named"),
    [
        (ConditionSpec("class", 3), 3, "unknown class index 3: .*from 0 to 2"),
        (ConditionSpec("class", 3), True, "unknown class index True"),
        (ConditionSpec("class", 3), "cat", "unknown class index 'cat'"),
        (ConditionSpec("classes", sizes=(2, 3)), [1, 3], "unknown class index 3: .*from 0 to 2"),
        (ConditionSpec("multi_hot", 3), [True, False, True], "unknown class index True"),
    ],
)
def test_what_is_no_index_is_refused_without_names(spec, written, named):
    with pytest.raises(ValueError, match=named):
        encode_conditions([written], spec)


@pytest.mark.parametrize("label", [3, 3.0, "3", " 3 ", "3.0", np.int64(3), np.float32(3.0), torch.tensor(3)])
def test_number_is_the_name_that_it_is_written_as(label):
    assert encode_classes([label], ["7", "cat", "3"]).tolist() == [2]


def test_names_are_found_exactly_before_they_are_simplified():
    names = ["3", "3.0", " 3", "0.5", "x:y", "a+b", "c,d", "e=f", "\u00e9"]
    encoded = encode_classes([*names, 3.0, 0.5, 3], names)
    assert encoded.dtype == torch.int64 and encoded.tolist() == [*range(9), 1, 3, 0]


@pytest.mark.parametrize("label", ["cow", 0, 2, -1, 0.5, "", "0", float("inf")])
def test_class_outside_the_vocabulary_is_refused_with_the_names(label):
    with pytest.raises(ValueError, match=r"unknown label .*the 3 names are cat, dog, owl"):
        encode_classes(["cat", label], ["cat", "dog", "owl"])


@pytest.mark.parametrize(
    ("label", "named"),
    [
        (True, "label True is a bool"),
        (np.bool_(False), "label False is a bool"),
        (None, "a label is missing"),
        (NAN, "a label is missing"),
        (["cat"], "is a list"),
        (b"cat", "is a bytes"),
    ],
)
def test_label_that_is_neither_text_nor_a_number_is_refused(label, named):
    with pytest.raises(ValueError, match=named):
        encode_classes([label], ["True", "False", "None", "nan", "cat"])


def test_unknown_name_is_answered_with_the_nearest_ones():
    names = [f"class {i:03d}" for i in range(100)] + ["Siamese cat"]
    with pytest.raises(
        ValueError, match="unknown label 'SIAMESE_CAT': the nearest are 'Siamese cat'; the 101 names are class 000, "
    ):
        encode_classes(["SIAMESE_CAT"], names)
    with pytest.raises(ValueError, match="the nearest are '007'"):
        encode_classes([7], ["006", "007"])


def test_labels_need_class_names():
    with pytest.raises(ValueError, match="no class names: give class indices"):
        encode_classes([0], [])


@pytest.mark.parametrize("index", [2, 2.0, "2", " 2 ", "2.0", np.int64(2), torch.tensor(2)])
def test_class_index_is_a_whole_number_or_its_text(index):
    encoded = encode_class_indices([index, 0], 3)
    assert encoded.dtype == torch.int64 and encoded.tolist() == [2, 0]


@pytest.mark.parametrize(
    "index",
    [3, -1, 0.5, True, np.bool_(True), None, NAN, float("inf"), "cat", "", "-1", "1e0", "0x1", 10**400, "9" * 400],
)
def test_what_is_no_class_index_is_refused(index):
    with pytest.raises(ValueError, match=r"unknown class index .* whole number from 0 to 2"):
        encode_class_indices([index], 3)


def test_attribute_that_is_named_twice_is_refused() -> None:
    spec = ConditionSpec("multi_hot", 10)
    names = [str(index) for index in range(10)]
    for condition in ([0, 0, 0, 1, 0, 0, 0, 0, 0, 0], {"3": 1.0, 3: 0.2}):
        with pytest.raises(ValueError, match="names an attribute twice"):
            encode_conditions([condition], spec, names)
