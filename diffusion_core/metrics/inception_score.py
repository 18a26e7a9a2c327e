"""Inception score: how sure a classifier is of each image, and how varied its answers are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusion_core.metrics.statistics import check_features


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over the splits; 1 is the least, the number of classes the most."""

    mean: float
    std: float


def inception_score(logits: np.ndarray, *, splits: int = 10, seed: int | None = 2020) -> InceptionScore:
    """exp of the mean of KL(p(y|x) || p(y)) in each of ``splits`` parts of the samples (arXiv 1606.03498, section 4).

    logits: (N, classes) of the classifier, in float64 inside. The samples are shuffled with ``seed`` as torch-fidelity
    shuffles them (None: not at all). A score with another classifier than Inception is another metric: name it so.

    Raises ValueError for logits that are no finite matrix, or fewer samples than splits.
    """
    logits = check_features(logits)
    if not 1 <= splits <= len(logits):
        raise ValueError(f"{len(logits)} samples cannot be split {splits} ways: choose 1 to {len(logits)} splits")
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
