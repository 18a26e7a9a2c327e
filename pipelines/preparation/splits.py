"""Choose the images of each split."""

from __future__ import annotations

import hashlib

import numpy as np

from pipelines.preparation.sources import Items


def split_items(items: Items, num_classes: int, test_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Return the indices of train and test: disjoint, stratified by class, the same images for any order of the items.

    Images with the same content stay in the same split.
    """
    digests = [items.digest(i) for i in range(len(items.labels))]
    groups: dict[bytes, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    test: list[int] = []
    for label in range(num_classes):
        own = [digest for digest, members in groups.items() if items.labels[members[0]] == label]
        own.sort(key=lambda digest: hashlib.sha256(seed.to_bytes(8, "little") + digest).digest())
        total = sum(len(groups[digest]) for digest in own)
        wanted = min(max(round(total * test_fraction), 1), total - 1)
        taken = 0
        for digest in own[:-1]:
            if taken >= wanted:
                break
            test += groups[digest]
            taken += len(groups[digest])
    held_out = np.zeros(len(digests), dtype=bool)
    held_out[test] = True
    return {"train": np.flatnonzero(~held_out), "test": np.flatnonzero(held_out)}


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
