"""Inception score: how certain a classifier is of each image, and how varied its predictions are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusion_core.metrics.statistics import check_features


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over the splits; from 1 to the number of classes."""

    mean: float
    std: float


def inception_score(logits: np.ndarray, *, splits: int = 10, seed: int | None = 2020) -> InceptionScore:
    """Return exp of the mean of KL(p(y|x) || p(y)) over ``splits`` parts of the samples (arXiv 1606.03498, section 4).

    logits: (N, classes); computed in float64. The samples are shuffled with ``seed`` in the same way as torch-fidelity
    (None: not shuffled). With another classifier than Inception it is another metric and needs another name.

    Raises ValueError if the logits are not a finite matrix, or there are fewer samples than splits.
    """
    logits = check_features(logits)
    if not 1 <= splits <= len(logits):
        raise ValueError(f"{len(logits)} samples cannot be split into {splits} parts: choose 1 to {len(logits)} splits")
    if seed is not None:
        logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        p = np.exp(part)
        log_marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (part - log_marginal)).sum(axis=1).mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
