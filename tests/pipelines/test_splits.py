"""The split by content: bounded, disjoint, or refused with the numbers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.preparation.sources import Items
from pipelines.preparation.splits import split_items


def items_of(contents: list[int], labels: list[int]) -> Items:
    return Items(
        labels=np.asarray(labels),
        load=lambda i: Image.new("L", (1, 1), contents[i]),
        digest=lambda i: hashlib.sha256(str(contents[i]).encode()).digest(),
        name=str,
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=12), min_size=2, max_size=4),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_share_of_each_class_is_within_its_largest_group(sizes: list[list[int]], fraction: float, seed: int) -> None:
    contents: list[int] = []
    labels: list[int] = []
    for label, groups in enumerate(sizes):
        for number, size in enumerate(groups):
            contents += [100 * label + number] * size
            labels += [label] * size
    split = split_items(items_of(contents, labels), len(sizes), fraction, seed)
    sides = [{contents[i] for i in split[name]} for name in ("train", "test")]
    assert sides[0].isdisjoint(sides[1])
    for label, groups in enumerate(sizes):
        total, got = sum(groups), sum(labels[i] == label for i in split["test"])
        assert 0 < got < total
        assert abs(got - min(max(round(total * fraction), 1), total - 1)) <= max(groups)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2)), min_size=6, max_size=60), st.floats(0.05, 0.5))
def test_images_of_several_classes_keep_the_bounds_or_are_refused(pairs: list[tuple[int, int]], share: float) -> None:
    contents, labels = [content for content, _ in pairs], [label for _, label in pairs]
    try:
        split = split_items(items_of(contents, labels), 3, share, 0)
    except ValueError as error:
        assert "cannot be split" in str(error)
        return
    assert {contents[i] for i in split["train"]}.isdisjoint({contents[i] for i in split["test"]})
    for label in set(labels):
        total, got = labels.count(label), sum(labels[i] == label for i in split["test"])
        largest = max(pairs.count((content, label)) for content in contents)
        assert 0 < got < total or (got, total) == (0, 1)
        assert abs(got - min(max(round(total * share), 1), total - 1)) <= largest


def test_class_that_is_part_of_another_class_keeps_its_share() -> None:
    contents, labels = [*range(100), *range(50)], [0] * 100 + [1] * 50
    for seed in range(20):
        split = split_items(items_of(contents, labels), 2, 0.2, seed)
        counts = np.bincount(np.asarray(labels)[split["test"]])
        assert abs(counts[0] - 20) <= 1 and abs(counts[1] - 10) <= 1


def test_image_of_a_class_that_has_one_is_a_train_image() -> None:
    split = split_items(items_of([1, 2, 3, 4], [0, 0, 0, 1]), 2, 0.2, 0, ["a", "b"])
    assert 3 in split["train"] and len(split["test"]) == 1


def test_class_of_one_image_and_its_copies_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="class 'b' cannot be split: it has 2 images, 1 of them different"):
        split_items(items_of([1, 2, 3, 4, 4], [0, 0, 0, 1, 1]), 2, 0.2, 0, ["a", "b"])
