"""Stage 2: the class network, the feature extractor, and the features of the real images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
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
from diffusion_core.metrics.statistics import GaussianStatistics, merge_statistics
from diffusion_core.storage import atomic_folder, write_json
from pipelines.data.shards import ImageSplit, open_split, read_manifest
from pipelines.devices import driver_device
from pipelines.identity import identify
from pipelines.measurement.class_network import accuracy, save_class_network, split_features, train_classifier
from pipelines.measurement.reference import DESCRIPTION, STATISTICS, save_statistics, save_test_features
from pipelines.params import Params, RunSettings, flatten
from pipelines.stage import DATA, METRICS, PLOTS, REFERENCE, check_writable, log, run_stage
from pipelines.tables import write_csv
from pipelines.tracking import stage_run


def reference(params: Params, run: RunSettings) -> None:
    """Train the class network, take the feature extractor, and write artifacts/reference: both networks, the statistics of the train images, the features of the test images, and the FID between the two."""
    settings = params.reference
    check_writable(REFERENCE.parent, METRICS, PLOTS)
    manifest = read_manifest(DATA)
    device = driver_device(run.reference.device)
    splits = {split: open_split(DATA, split) for split in ("train", "test")}
    inception = None
    if settings.extractor == INCEPTION:  # before the long work: a wrong file fails at once
        inception = _read_inception(settings.inception_weights, settings.inception_sha256)
        build_inception(inception)
    used = {"seed": params.seed, **flatten("reference", settings)}
    identity = identify(
        "reference",
        {**used, "device_type": device.type},
        {"data": manifest.content_hash},
        [train_classifier, merge_statistics, frechet_distance],
    )
    tags = {"rediffuse.data_hash": manifest.content_hash}
    with stage_run(run.tracking, "reference", identity.key, settings=used, tags=tags) as tracked:
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
            train = merge_statistics(
                GaussianStatistics.from_features(batch) for batch in _features(extractor, splits["train"], device)
            )
            test_features = np.concatenate(list(_features(extractor, splits["test"], device)))
            save_statistics({"train": train}, folder / STATISTICS)
            save_test_features(test_features, splits["test"].labels, folder)
            test_fid = frechet_distance(GaussianStatistics.from_features(test_features), train)
            write_json(
                folder / DESCRIPTION,
                {
                    "data_hash": manifest.content_hash,
                    "transform": dict(manifest.transform),
                    "extractor": extractor.name,
                    "extractor_digest": extractor.digest,
                    "test_fid": test_fid,
                    "counts": {"train": train.n, "test": len(test_features)},
                    "class_counts": list(manifest.class_counts["train"]),
                    "classifier_test_accuracy": right,
                },
            )
        metrics = {
            "classifier_test_accuracy": round(right, 6),
            f"test_fid_{extractor.name}": round(test_fid, 6),
            "test_images": len(test_features),
        }
        write_json(METRICS / "reference.json", metrics)
        rows = [{"step": step, "loss": f"{loss:.6g}"} for step, loss in losses]
        write_csv(PLOTS / "reference_classifier.csv", ["step", "loss"], rows)
        tracked.log_metrics(metrics)
        tracked.log_rows([{"step": step, "classifier/loss": loss} for step, loss in losses])
        tracked.log_artifact(REFERENCE / DESCRIPTION)
    log.info(
        "the class network predicts the label of %.1f%% of the test images; fid_%s of the %d test images: %.4f",
        100 * right,
        extractor.name,
        len(test_features),
        test_fid,
    )


def _read_inception(weights: str | None, sha256: str | None) -> dict[str, torch.Tensor]:
    try:
        return import_inception_weights(Path(weights) if weights else None, sha256)
    except ValueError as error:
        raise ValueError(
            f"{error}; see reference.inception_weights and reference.inception_sha256 in params.yaml"
        ) from None


def _features(extractor: FeatureExtractor, images: ImageSplit, device: torch.device) -> Iterator[np.ndarray]:
    """Yield the features of a split batch by batch, with a progress bar."""
    with tqdm(total=len(images), desc=f"features of {extractor.name}", unit="image", mininterval=5.0) as bar:
        for batch in split_features(extractor, images, device):
            yield batch
            bar.update(len(batch))


def _write_extractor(folder: Path, name: str, classifier: ImageClassifier, inception: dict | None) -> FeatureExtractor:
    if inception is not None:
        return FeatureExtractor(name, save_extractor(folder, name, inception, {}), build_inception(inception))
    digest = save_extractor(folder, name, classifier.state_dict(), classifier.config)
    return FeatureExtractor(name, digest, classifier)


if __name__ == "__main__":
    run_stage("reference", reference)
