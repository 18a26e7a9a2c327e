"""Labels of the samples that are measured: the classes in the shares of the real images, one address per sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 times the conjugate of the golden ratio, (sqrt(5) - 1) / 2."""


def sample_labels(class_counts: Sequence[int], indices: np.ndarray, seed: int) -> np.ndarray:
    """Return the (N,) int64 labels of the samples ``indices`` ((N,) integers from 0).

    The label of sample k is the class at u_k = frac(offset(seed) + k (sqrt(5) - 1) / 2) of the cumulative class shares, in exact
    64-bit arithmetic. It depends only on (seed, k), and the classes of any run of consecutive samples have the shares of
    ``class_counts`` to within a few samples, because the sequence has low discrepancy (Niederreiter, 1992, section 3.1).
    """
    assert sum(class_counts) > 0 and min(class_counts) >= 0, class_counts
    classes = np.flatnonzero(np.asarray(class_counts))
    total = sum(class_counts)
    edges = [(below << 64) // total for below in accumulate(count for count in class_counts if count)]
    offset = int.from_bytes(hashlib.sha256(f"sample-labels/{seed}".encode()).digest()[:8], "little")
    points = indices.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(offset)  # wraps: modulo 2^64
    return classes[np.searchsorted(np.asarray(edges[:-1], dtype=np.uint64), points, side="right")].astype(np.int64)
