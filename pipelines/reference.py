"""Stage 2: the feature extractor, the statistics of the real images, and the floor."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from diffusion_core.metrics.extractors import (
    INCEPTION,
    FeatureExtractor,
    ImageClassifier,
    build_inception,
    import_inception_weights,
    save_extractor,
)
from diffusion_core.metrics.frechet import frechet_distance
from diffusion_core.storage import atomic_folder, write_json, write_text
from pipelines.data.shards import open_split, read_manifest
from pipelines.evaluation.reference import (
    accuracy,
    save_class_network,
    save_statistics,
    split_statistics,
    train_classifier,
)
from pipelines.params import Params
from pipelines.stage import DATA, METRICS, PLOTS, REFERENCE, check_writable, log, run_stage
from pipelines.state import fingerprint
from pipelines.tracking import stage_run


def reference(params: Params) -> None:
    """Train the class network, take the feature extractor, and write artifacts/reference: real statistics and the FID of real test against real train images."""
    settings = params.reference
    check_writable(REFERENCE.parent, METRICS, PLOTS)
    manifest = read_manifest(DATA)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = {split: open_split(DATA, split) for split in ("train", "test")}
    key = fingerprint("reference", params, {"data": manifest.content_hash})
    inception = None
    if settings.extractor == INCEPTION:  # before the long work: a wrong file fails at once
        path = Path(settings.inception_weights) if settings.inception_weights else None
        inception = import_inception_weights(path, settings.inception_sha256)
        build_inception(inception)
    with stage_run(params, "reference", key, manifest.content_hash) as run:
        losses: list[tuple[int, float]] = []

        def on_step(step: int, loss: float) -> None:
            losses.append((step, loss))
            if step % 200 == 0 or step == settings.classifier_steps:
                log.info("class network: step %d/%d  loss %.4f", step, settings.classifier_steps, loss)

        classifier = train_classifier(
            splits["train"],
            manifest.shape,
            len(manifest.class_names),
            steps=settings.classifier_steps,
            batch_size=settings.classifier_batch_size,
            seed=params.seed,
            device=device,
            on_step=on_step,
        )
        right = accuracy(classifier, splits["test"], device)
        with atomic_folder(REFERENCE) as folder:
            save_class_network(classifier.cpu(), folder)
            extractor = _write_extractor(folder, settings.extractor, classifier, inception).to(device)
            total = sum(len(split) for split in splits.values())
            with tqdm(total=total, desc=f"features of {extractor.name}", unit="image", mininterval=5.0) as bar:
                statistics = {
                    name: split_statistics(extractor, split, device, bar.update) for name, split in splits.items()
                }
            save_statistics(statistics, folder / "statistics.safetensors")
            floor = frechet_distance(statistics["test"], statistics["train"])
            write_json(
                folder / "reference.json",
                {
                    "data_hash": manifest.content_hash,
                    "transform": dict(manifest.transform),
                    "extractor": extractor.name,
                    "extractor_digest": extractor.digest,
                    "floor": floor,
                    "counts": {name: part.n for name, part in statistics.items()},
                    "class_counts": list(manifest.class_counts["train"]),
                    "classifier_test_accuracy": right,
                },
            )
        metrics = {"classifier_test_accuracy": round(right, 6), f"floor_fid_{extractor.name}": round(floor, 6)}
        write_json(METRICS / "reference.json", metrics)
        write_text(PLOTS / "reference_classifier.csv", "step,loss\n" + "".join(f"{s},{v:.6g}\n" for s, v in losses))
        run.log_metrics(metrics)
        run.log_rows([{"step": step, "classifier/loss": loss} for step, loss in losses])
        run.log_artifact(REFERENCE / "reference.json")
    log.info("class network: %.1f%% of the test images; floor: %s %.4f", 100 * right, f"fid_{extractor.name}", floor)


def _write_extractor(folder: Path, name: str, classifier: ImageClassifier, inception: dict | None) -> FeatureExtractor:
    if inception is not None:
        return FeatureExtractor(name, save_extractor(folder, name, inception, {}), build_inception(inception))
    digest = save_extractor(folder, name, classifier.state_dict(), classifier.config)
    return FeatureExtractor(name, digest, classifier)


if __name__ == "__main__":
    run_stage("reference", reference)
