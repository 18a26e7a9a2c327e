"""Choose the images of each split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipelines.preparation.sources import Items


def split_items(
    items: Items,
    num_classes: int,
    test_fraction: float,
    seed: int,
    class_names: Sequence[str] | None = None,
    readable: Callable[[int], bool] = lambda index: True,
) -> dict[str, np.ndarray]:
    """Return the indices of train and test: disjoint, stratified by class, the same images for any order of the items.

    Images with the same content stay in the same split. The test share of each class differs from ``test_fraction`` by at
    most the largest group of such images, and both splits get images of each class. The image of a class that has only one is
    a train image.
    ``readable`` tells if image i can be decoded: copies of a broken file do not count, and stay in train.
    Raises ValueError, with the numbers, if the copies of images do not allow that.
    """
    digests = [items.digest(i) for i in range(len(items.labels))]
    counts: dict[bytes, Counter[int]] = {}
    for digest, label in zip(digests, items.labels.tolist(), strict=True):
        counts.setdefault(digest, Counter())[label] += 1
    first = {digest: index for index, digest in reversed(list(enumerate(digests)))}
    counts = {digest: group for digest, group in counts.items() if group.total() == 1 or readable(first[digest])}
    order = sorted(counts, key=lambda digest: hashlib.sha256(seed.to_bytes(8, "little") + digest).digest())
    totals = [0] * num_classes
    for group in counts.values():
        for label, count in group.items():
            totals[label] += count
    wanted = [min(max(round(total * test_fraction), 1), total - 1) for total in totals]
    test = _choose(counts, order, wanted)
    if _out_of_bounds(counts, test, totals, wanted):
        # groups that several classes share must fit all of them: they come first
        test = _choose(counts, sorted(order, key=lambda digest: len(counts[digest]) == 1), wanted)
    for label, taken in _out_of_bounds(counts, test, totals, wanted):
        sizes = [group[label] for group in counts.values() if label in group]
        name = str(label) if class_names is None else class_names[label]
        raise ValueError(
            f"class {name!r} cannot be split: it has {totals[label]} images, {len(sizes)} of them different, one of them "
            f"{max(sizes)} times; copies stay in one split, so {taken} would be test images instead of {wanted[label]}: "
            "add different images, or remove copies, also those in other classes"
        )
    held_out = np.array([digest in test for digest in digests], dtype=bool)
    return {"train": np.flatnonzero(~held_out), "test": np.flatnonzero(held_out)}


def _choose(counts: Mapping[bytes, Counter[int]], order: Sequence[bytes], wanted: Sequence[int]) -> set[bytes]:
    """Return the groups of the test split: in order, each that fits, and at least one of each class that has several."""
    test: set[bytes] = set()
    taken: Counter[int] = Counter()
    by_class: dict[int, list[bytes]] = {}
    for digest in order:
        for label in counts[digest]:
            by_class.setdefault(label, []).append(digest)
        if all(taken[label] + count <= wanted[label] for label, count in counts[digest].items()):
            test.add(digest)
            taken.update(counts[digest])
    for label, own in by_class.items():
        if taken[label] == 0 and len(own) > 1:
            smallest = min(own, key=lambda digest: (len(counts[digest]), counts[digest][label]))
            test.add(smallest)
            taken.update(counts[smallest])
    return test


def _out_of_bounds(
    counts: Mapping[bytes, Counter[int]], test: set[bytes], totals: Sequence[int], wanted: Sequence[int]
) -> list[tuple[int, int]]:
    """Return (class, number of its test images) for each class with an empty split, or a share that is off by more than a group."""
    taken: Counter[int] = Counter()
    largest: Counter[int] = Counter()
    for digest, group in counts.items():
        for label, count in group.items():
            largest[label] = max(largest[label], count)
        if digest in test:
            taken.update(group)
    return [
        (label, taken[label])
        for label, total in enumerate(totals)
        if total > 1 and (not 0 < taken[label] < total or abs(taken[label] - wanted[label]) > largest[label])
    ]


def limit_items(labels: np.ndarray, indices: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """Keep at most ``limit`` indices, balanced across classes, sorted. None keeps them all, in the order given."""
    if limit is None or len(indices) <= limit:
        return indices
    shuffled = np.random.default_rng(seed).permutation(indices)
    turn = np.empty(len(shuffled), dtype=np.int64)
    for label in np.unique(labels[shuffled]):
        rows = np.flatnonzero(labels[shuffled] == label)
        turn[rows] = np.arange(len(rows))
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:limit]])
