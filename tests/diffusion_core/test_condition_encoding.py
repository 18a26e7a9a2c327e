"""Condition encoding: what a person writes against the tensors of each kind."""

from __future__ import annotations

import pytest
import torch

from diffusion_core.condition_encoding import encode_classes, encode_conditions
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
        ("class", ["owl", 0, None], torch.tensor([2, 0, 3])),
        ("classes", [{"hair": "fair"}, ["m", 2], None], torch.tensor([[2, 1], [1, 2], [2, 3]])),
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
        ("class", 3, "indices 0 to 2"),
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
        (ConditionSpec("class", 3), [2, "0", None], torch.tensor([2, 0, 3])),
        (ConditionSpec("classes", sizes=(2, 3)), [[1, 2], {"1": 0}], torch.tensor([[1, 2], [2, 0]])),
        (ConditionSpec("multi_hot", 3), [[0, 2], {1: 0.5}], torch.tensor([[1, 0, 1], [0, 0.5, 0]])),
    ],
)
def test_indices_are_the_vocabulary_without_names(spec, written, expected):
    torch.testing.assert_close(encode_conditions(written, spec), expected, rtol=0, atol=0)


def test_classes_are_encoded_from_names_and_indices():
    encoded = encode_classes(["owl", 0, " dog ", "1", 2.0], ["cat", "dog", "owl"])
    assert encoded.dtype == torch.int64 and encoded.tolist() == [2, 0, 1, 1, 2]


def test_name_that_looks_like_an_index_is_read_as_a_name():
    assert encode_classes(["7", 0], ["cat", "7"]).tolist() == [1, 0]


@pytest.mark.parametrize("label", ["cow", 3, -1, 0.5, None, ""])
def test_class_outside_the_vocabulary_is_refused_with_the_names(label):
    with pytest.raises(ValueError, match=r"unknown label .*indices 0 to 2 and the names cat, dog, owl"):
        encode_classes(["cat", label], ["cat", "dog", "owl"])
