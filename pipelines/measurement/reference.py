"""The reference that samples are compared with, as the reference stage wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from diffusion_core.metrics.extractors import FeatureExtractor, ImageClassifier, load_classifier, load_extractor
from diffusion_core.metrics.frechet import frechet_distance
from diffusion_core.metrics.statistics import GaussianStatistics
from diffusion_core.storage import read_json

REMEDY = "run the reference stage again (dvc repro -f reference)"
DESCRIPTION, CLASSIFIER = "reference.json", "classifier.safetensors"
STATISTICS, TEST_FEATURES = "statistics.safetensors", "test_features.safetensors"


@dataclass(frozen=True)
class Reference:
    """The feature extractor, the class network, the statistics of the ``train`` images, and reference.json."""

    extractor: FeatureExtractor
    classifier: ImageClassifier
    statistics: Mapping[str, GaussianStatistics]
    description: Mapping[str, Any]

    @property
    def metric(self) -> str:
        """The metric's name, with the extractor's in it."""
        return f"fid_{self.extractor.name}"

    @property
    def num_features(self) -> int:
        return len(self.statistics["train"].mean)

    def to(self, device: torch.device) -> Reference:
        """Move both networks to the device."""
        self.extractor.to(device)
        self.classifier.to(device)
        return self


def load_reference(folder: Path, data_hash: str) -> Reference:
    """Read artifacts/reference. Raises ValueError if it is damaged or belongs to other data, or a figure is not finite."""
    try:
        description = read_json(folder / DESCRIPTION)
    except ValueError as error:
        raise ValueError(f"{error}: {REMEDY}") from None
    for key in ("data_hash", "extractor", "extractor_digest", "test_fid", "class_counts"):
        if key not in description:
            raise ValueError(f"{folder / DESCRIPTION} lacks {key}: {REMEDY}")
    if description["data_hash"] != data_hash:
        raise ValueError(
            f"{folder} belongs to other data: made of data {description['data_hash'][:12]}, not of {data_hash[:12]}: {REMEDY}"
        )
    try:
        extractor = load_extractor(folder)
        classifier = load_classifier(folder / CLASSIFIER)
    except ValueError as error:
        raise ValueError(f"{error}: {REMEDY}") from None
    if extractor.digest != description["extractor_digest"]:
        raise ValueError(f"{folder} holds the statistics of another extractor: {REMEDY}")
    return Reference(extractor, classifier, load_statistics(folder / STATISTICS), description)


@lru_cache(maxsize=1)
def load_reference_on(folder: str, data_hash: str, device: torch.device) -> Reference:
    """Load the reference onto a device. The last one stays loaded in this process."""
    return load_reference(Path(folder), data_hash).to(device)


@torch.inference_mode()
def num_agreeing(classifier: ImageClassifier, images: Tensor, labels: Tensor) -> int:
    """Return the number of images whose label the class network predicts.

    images: (B, C, H, W) uint8 on the network's device; labels: (B,) on the CPU. Raises ValueError if a logit is not finite, because
    argmax takes NaN for a class.
    """
    logits = classifier(images)[1].cpu()
    if not logits.isfinite().all():
        raise ValueError(f"the class network returned NaN or infinity: its weights are broken: {REMEDY}")
    return int((logits.argmax(dim=1) == labels).sum())


def finite_distance(statistics: GaussianStatistics, real: GaussianStatistics, what: str) -> float:
    """Return the Frechet distance of the statistics of ``what``, such as samples, to ``real``.

    Raises ValueError that names the broken statistics if one holds NaN or infinity or the distance is not finite: NaN compares as
    False with everything, so it could win or lose any comparison later.
    """
    for name, part in ((what, statistics), ("real train images", real)):
        if not (np.isfinite(part.mean).all() and np.isfinite(part.scatter).all()):
            raise ValueError(f"the statistics of the {name} hold NaN or infinity: {REMEDY}")
    distance = frechet_distance(statistics, real)
    if not np.isfinite(distance):
        raise ValueError(f"the FID of the {what} is not finite ({distance}), their features are too large: {REMEDY}")
    return distance


def save_statistics(statistics: Mapping[str, GaussianStatistics], path: Path) -> None:
    """Write named statistics as float64 tensors."""
    tensors: dict[str, np.ndarray] = {}
    for name, part in statistics.items():
        tensors[f"{name}.n"] = np.asarray([part.n], dtype=np.int64)
        tensors[f"{name}.mean"] = np.ascontiguousarray(part.mean)
        tensors[f"{name}.scatter"] = np.ascontiguousarray(part.scatter)
    save_file(tensors, path)


def load_statistics(path: Path) -> dict[str, GaussianStatistics]:
    """Read the file of `save_statistics`. Raises ValueError if it is missing or damaged."""
    try:
        tensors = load_file(path)
        names = [key.removesuffix(".n") for key in tensors if key.endswith(".n")]
        _check_finite(tensors)
        return {
            n: GaussianStatistics(int(tensors[f"{n}.n"][0]), tensors[f"{n}.mean"], tensors[f"{n}.scatter"])
            for n in names
        }
    except (OSError, SafetensorError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}): {REMEDY}") from None


def save_test_features(features: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write the (M, D) float32 features and (M,) int64 labels of the test images into artifacts/reference."""
    tensors: dict[str, np.ndarray] = {"features": features.astype(np.float32), "labels": labels.astype(np.int64)}
    save_file(tensors, folder / TEST_FEATURES)


def load_test_features(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read (features, labels) of `save_test_features`. Raises ValueError if the file is missing or damaged."""
    path = folder / TEST_FEATURES
    try:
        tensors = load_file(path)
        _check_finite(tensors)
        return tensors["features"], tensors["labels"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}): {REMEDY}") from None


def _check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError that names the first tensor with NaN or infinity."""
    for name, values in sorted(tensors.items()):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinity")
