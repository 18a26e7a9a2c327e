"""Turn a source of images into the prepared data set."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipelines.data.listing import write_listing
from pipelines.data.shards import SPLITS, Manifest, open_split, write_manifest, write_shards
from pipelines.preparation.decoding import Transform, decode, is_readable
from pipelines.preparation.sources import Source
from pipelines.preparation.splits import limit_items, split_items

log = logging.getLogger("rediffuse")


def write_data_set(
    folder: Path,
    source: Source,
    transform: Transform,
    *,
    test_fraction: float,
    max_images: int | None,
    skip_broken: bool,
    shard_size: int,
    seed: int,
) -> Manifest:
    """Write the shards of both splits, the manifest and, for an image folder, the listing of its files.

    A source without splits of its own gives ``test_fraction`` of its images to test. ``max_images`` limits each split.
    Raises ValueError if there are too few classes or images, or an image is broken and ``skip_broken`` is False.
    """
    names = source.class_names
    if len(names) < 2:
        raise ValueError(
            f"prepare.root: only one class, {names[0]!r}: a conditional model needs at least two class folders"
        )
    if "all" in source.items:
        whole = source.items["all"]
        chosen = split_items(
            whole, len(names), test_fraction, seed, names, lambda index: is_readable(whole, index, transform)
        )
        items = dict.fromkeys(SPLITS, whole)
    else:
        items = source.items
        chosen = {split: np.arange(len(items[split].labels)) for split in SPLITS}
    skipped: list[str] = []
    profiles: list[str] = []
    shards, class_counts = {}, {}
    for split in SPLITS:
        indices = limit_items(items[split].labels, chosen[split], max_images, seed)
        counter = _Counter(decode(items[split], indices, transform, skip_broken, skipped, profiles), len(names))
        shards[split] = write_shards(folder, split, counter, shard_size)
        class_counts[split] = counter.counts.tolist()
        _check_classes(split, class_counts[split], names, max_images)
    listed = [(file, part.digest(i).hex()) for part in source.items.values() for i, file in enumerate(part.files)]
    if listed:
        write_listing(folder, listed)
    return write_manifest(
        folder,
        counts={split: sum(class_counts[split]) for split in SPLITS},
        class_counts=class_counts,
        shape=[transform.image_size, transform.image_size, transform.channels],
        class_names=list(names),
        transform=transform.describe(),
        skipped=skipped,
        shards=shards,
        ignored=[asdict(group) for group in source.ignored],
        ignored_profiles=profiles,
    )


def count_leaked(folder: Path) -> int:
    """Return the number of different test images that are also in the train split."""
    train, test = (
        {hashlib.sha256(row.tobytes()).digest() for shard in open_split(folder, split).shards for row in shard}
        for split in SPLITS
    )
    return len(train & test)


class _Counter:
    """Chunks of images and labels that are counted by class as they pass through."""

    def __init__(self, chunks: Iterator[tuple[np.ndarray, np.ndarray]], num_classes: int) -> None:
        self.chunks = chunks
        self.counts = np.zeros(num_classes, dtype=np.int64)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.chunks:
            self.counts += np.bincount(labels, minlength=len(self.counts))
            yield images, labels


def _check_classes(split: str, counts: list[int], names: tuple[str, ...], max_images: int | None) -> None:
    if sum(counts) < 2:
        raise ValueError(
            f"the {split} split has {sum(counts)} images, and at least 2 are needed: "
            "add images, or raise prepare.max_images or prepare.test_fraction"
        )
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if split == "train" and empty:
        cause = "raise prepare.max_images" if max_images is not None else "add images of it or remove the class"
        raise ValueError(f"class {empty[0]!r} has no training image: {cause}")
    if empty:
        log.warning("%d classes have no test image: %s", len(empty), ", ".join(map(repr, empty[:8])))
