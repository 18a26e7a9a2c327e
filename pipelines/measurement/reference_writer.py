"""The computation of the reference: the class network, the feature extractor, and the features of the real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_core.metrics.extractors import FeatureExtractor, ImageClassifier, build_inception, save_extractor
from diffusion_core.metrics.statistics import GaussianStatistics, merge_statistics
from diffusion_core.storage import write_json
from pipelines.data.shards import ImageSplit, Manifest
from pipelines.measurement.class_network import accuracy, save_class_network, split_features, train_classifier
from pipelines.measurement.reference import (
    DESCRIPTION,
    STATISTICS,
    finite_distance,
    save_statistics,
    save_test_features,
)


def write_reference(
    folder: Path,
    manifest: Manifest,
    splits: Mapping[str, ImageSplit],
    *,
    extractor_name: str,
    inception: Mapping[str, Tensor] | None,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    on_step: Callable[[int, float], None],
) -> None:
    """Write the files that `load_reference` and `load_test_features` read into ``folder``.

    ``splits``: the train and test images; ``inception``: its weights, or None if the class network is the extractor; ``steps``,
    ``batch_size``, ``on_step``: see `train_classifier`.
    """
    classifier = train_classifier(
        splits["train"],
        manifest.shape,
        len(manifest.class_names),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        device=device,
        on_step=on_step,
    )
    right = accuracy(classifier, splits["test"], device)
    save_class_network(classifier.cpu(), folder)
    extractor = _save_extractor(folder, extractor_name, classifier, inception).to(device)
    train = merge_statistics(
        GaussianStatistics.from_features(batch) for batch in _features(extractor, splits["train"], device)
    )
    test_features = np.concatenate(list(_features(extractor, splits["test"], device)))
    save_statistics({"train": train}, folder / STATISTICS)
    save_test_features(test_features, splits["test"].labels, folder)
    write_json(
        folder / DESCRIPTION,
        {
            "data_hash": manifest.content_hash,
            "transform": dict(manifest.transform),
            "extractor": extractor.name,
            "extractor_digest": extractor.digest,
            "test_fid": finite_distance(GaussianStatistics.from_features(test_features), train, "test images"),
            "counts": {"train": train.n, "test": len(test_features)},
            "class_counts": list(manifest.class_counts["train"]),
            "classifier_test_accuracy": right,
        },
    )


def _features(extractor: FeatureExtractor, images: ImageSplit, device: torch.device) -> Iterator[np.ndarray]:
    """Yield the features of a split batch by batch, with a progress bar."""
    with tqdm(total=len(images), desc=f"features of {extractor.name}", unit="image", mininterval=5.0) as bar:
        for batch in split_features(extractor, images, device):
            yield batch
            bar.update(len(batch))


def _save_extractor(
    folder: Path, name: str, classifier: ImageClassifier, inception: Mapping[str, Tensor] | None
) -> FeatureExtractor:
    if inception is not None:
        return FeatureExtractor(name, save_extractor(folder, name, inception, {}), build_inception(inception))
    digest = save_extractor(folder, name, classifier.state_dict(), classifier.config)
    return FeatureExtractor(name, digest, classifier)
