"""Class agreement: the share of generated images that a classifier assigns to their class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusion_core.metrics.statistics import check_features


@dataclass(frozen=True)
class ClassAgreement:
    """Share of images whose most likely class is the requested one: overall, and (classes,) per class (NaN without images)."""

    overall: float
    per_class: np.ndarray


def class_agreement(logits: np.ndarray, labels: np.ndarray) -> ClassAgreement:
    """Compare a classifier's (N, classes) logits with the (N,) requested class indices.

    Raises ValueError if the logits are not a finite matrix, or the labels are not N integers in [0, classes).
    """
    logits, labels = check_features(logits), np.asarray(labels)
    classes = logits.shape[1]
    if labels.shape != (len(logits),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{len(logits)} images need {len(logits)} integer labels, got {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must lie in 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    right = logits.argmax(axis=1) == labels
    asked = np.bincount(labels, minlength=classes)
    with np.errstate(invalid="ignore"):
        per_class = np.bincount(labels, weights=right, minlength=classes) / asked
    return ClassAgreement(float(right.mean()), per_class)
