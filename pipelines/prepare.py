"""Stage 1: a data source becomes uint8 shards, conditions and a manifest."""

from __future__ import annotations

import hashlib

import numpy as np

from diffusion_core.storage import atomic_folder, write_json, write_text
from pipelines.data.shards import SPLITS, Manifest, open_split, write_manifest, write_shards
from pipelines.data.sources import Transform, decode, limit_items, open_source, split_items
from pipelines.params import Params
from pipelines.stage import DATA, METRICS, PLOTS, check_writable, log, run_stage
from pipelines.state import fingerprint
from pipelines.tracking import stage_run


def prepare(params: Params) -> None:
    """Read the data source that params.yaml names and write artifacts/data: shards of uint8 images, their conditions and a manifest."""
    settings = params.prepare
    check_writable(DATA.parent, METRICS, PLOTS)
    source = open_source(settings)
    if len(source.class_names) < 2:
        raise ValueError(
            f"prepare.root: only one class, {source.class_names[0]!r}: a conditional model needs at least two class folders"
        )
    transform = Transform(settings.image_size, settings.channels, settings.background)
    if "all" in source.items:
        whole = source.items["all"]
        chosen = split_items(whole, len(source.class_names), settings.test_fraction, params.seed)
        items = dict.fromkeys(SPLITS, whole)
    else:
        items = source.items
        chosen = {split: np.arange(len(items[split].labels)) for split in SPLITS}
    skipped: list[str] = []
    with atomic_folder(DATA) as folder:
        shards, class_counts = {}, {}
        for split in SPLITS:
            indices = limit_items(items[split].labels, chosen[split], settings.max_images, params.seed)
            images = decode(items[split], indices, transform, settings.on_broken_image == "skip", skipped)
            counter = _Counter(len(source.class_names))
            shards[split] = write_shards(folder, split, counter.count(images), settings.shard_size)
            class_counts[split] = counter.counts.tolist()
            _check_classes(split, class_counts[split], source.class_names, settings.max_images)
        manifest = write_manifest(
            folder,
            counts={split: sum(class_counts[split]) for split in SPLITS},
            class_counts=class_counts,
            shape=[settings.image_size, settings.image_size, settings.channels],
            class_names=list(source.class_names),
            transform=transform.describe(),
            skipped=skipped,
            shards=shards,
        )
    metrics = _write_metrics(manifest)
    with stage_run(params, "prepare", fingerprint("prepare", params, {}), manifest.content_hash) as run:
        run.log_metrics(metrics)
        run.log_artifact(DATA / "manifest.json")
    log.info(
        "%d train and %d test images of %d classes, %d skipped",
        manifest.counts["train"],
        manifest.counts["test"],
        len(manifest.class_names),
        len(skipped),
    )


class _Counter:
    """Counts the labels of the chunks that pass through it."""

    def __init__(self, num_classes: int) -> None:
        self.counts = np.zeros(num_classes, dtype=np.int64)

    def count(self, chunks):
        for images, labels in chunks:
            self.counts += np.bincount(labels, minlength=len(self.counts))
            yield images, labels


def _check_classes(split: str, counts: list[int], names: tuple[str, ...], max_images: int | None) -> None:
    if sum(counts) < 2:
        raise ValueError(
            f"the {split} split has {sum(counts)} images, and at least 2 are needed: add images, or raise prepare.max_images or prepare.test_fraction"
        )
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if split == "train" and empty:
        cause = "raise prepare.max_images" if max_images is not None else "add images of it or remove the class"
        raise ValueError(f"class {empty[0]!r} has no training image: {cause}")


def _write_metrics(manifest: Manifest) -> dict[str, int]:
    digests = {
        split: {hashlib.sha256(row.tobytes()).digest() for shard in open_split(DATA, split).shards for row in shard}
        for split in SPLITS
    }
    metrics = {
        "train_images": manifest.counts["train"],
        "test_images": manifest.counts["test"],
        "classes": len(manifest.class_names),
        "skipped": len(manifest.skipped),
        "test_images_also_in_train": len(digests["train"] & digests["test"]),
    }
    write_json(METRICS / "prepare.json", metrics)
    rows = ["class,split,images"]
    for split in SPLITS:
        rows += [f'"{n}",{split},{c}' for n, c in zip(manifest.class_names, manifest.class_counts[split], strict=True)]
    write_text(PLOTS / "prepare_classes.csv", "\n".join(rows) + "\n")
    return metrics


if __name__ == "__main__":
    run_stage("prepare", prepare)
