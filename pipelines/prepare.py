"""Stage 1: turn a data source into uint8 shards, conditions and a manifest."""

from __future__ import annotations

from diffusion_core.storage import atomic_folder, write_json
from pipelines.data.listing import record_listing
from pipelines.data.shards import SPLITS
from pipelines.identity import identify
from pipelines.params import Params, RunSettings, flatten
from pipelines.preparation.data_set import count_leaked, write_data_set
from pipelines.preparation.decoding import Transform
from pipelines.preparation.sources import SourceSettings, open_source
from pipelines.stage import DATA, LISTING_RECORDS, METRICS, PLOTS, check_writable, log, run_stage
from pipelines.tables import write_csv
from pipelines.tracking import stage_run
from pipelines.workspace import resolve_root


def prepare(params: Params, run: RunSettings) -> None:
    """Read the data source that params.yaml names and write artifacts/data: shards of uint8 images, conditions, a manifest."""
    settings = params.prepare
    check_writable(DATA.parent, METRICS, PLOTS)
    root = str(resolve_root(settings.root)) if settings.root else None
    source = open_source(
        SourceSettings(settings.source, settings.dataset, root, settings.download, settings.dataset_options)
    )
    for group in source.ignored:
        log.info(
            "ignored: %d files %s: %s (first: %r)",
            group.files,
            group.suffix or "without suffix",
            group.reason,
            group.first,
        )
    with atomic_folder(DATA) as folder:
        manifest = write_data_set(
            folder,
            source,
            Transform(settings.image_size, settings.channels, settings.background),
            test_fraction=settings.test_fraction,
            max_images=settings.max_images,
            skip_broken=settings.on_broken_image == "skip",
            shard_size=settings.shard_size,
            seed=params.seed,
        )
    files = [file for items in source.items.values() for file in items.files]
    if files:
        record_listing(DATA, LISTING_RECORDS, next(iter(source.items.values())).root, files)
    if manifest.ignored_profiles:
        log.warning(
            "the colour profiles of %d images were ignored, their pixels read as sRGB (first: %s)",
            len(manifest.ignored_profiles),
            manifest.ignored_profiles[0],
        )
    metrics = {
        "train_images": manifest.counts["train"],
        "test_images": manifest.counts["test"],
        "classes": len(manifest.class_names),
        "skipped": len(manifest.skipped),
        "test_images_also_in_train": count_leaked(DATA),
    }
    write_json(METRICS / "prepare.json", metrics)
    rows = [
        {"class": name, "split": split, "images": count}
        for split in SPLITS
        for name, count in zip(manifest.class_names, manifest.class_counts[split], strict=True)
    ]
    write_csv(PLOTS / "prepare_classes.csv", ["class", "split", "images"], rows)
    used = {"seed": params.seed, **flatten("prepare", settings)}
    # the content may change under the same settings, so it is part of the key
    identity = identify("prepare", used, {"data": manifest.content_hash}, [open_source, write_data_set])
    tags = {"rediffuse.data_hash": manifest.content_hash}
    with stage_run(run.tracking, "prepare", identity.key, settings=used, tags=tags) as tracked:
        tracked.log_metrics(metrics)
        tracked.log_artifact(DATA / "manifest.json")
    log.info(
        "%d train and %d test images of %d classes, %d skipped, %d files ignored",
        manifest.counts["train"],
        manifest.counts["test"],
        len(manifest.class_names),
        len(manifest.skipped),
        sum(group["files"] for group in manifest.ignored),
    )


if __name__ == "__main__":
    run_stage("prepare", prepare)
