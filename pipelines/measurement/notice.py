"""The notice that a FID carries if it comes from too few images for its features."""

from __future__ import annotations

from collections.abc import Mapping

MARK = "few images"
"""Stands beside a figure whose notice is given elsewhere."""


def few_images_notice(num_features: int, counts: Mapping[str, int]) -> str | None:
    """Return one sentence if a set of images is not larger than the number of features, else None.

    ``counts``: the number of images of each set that a FID compares, by its name in the sentence. n images span n - 1 directions of
    the features. With no more images than features the covariance lacks full rank, and FID's bias, which falls as 1 / n
    (arXiv 1911.07023), dominates the figure.
    """
    few = [f"{count} {name}" for name, count in counts.items() if count <= num_features]
    if not few:
        return None
    return (
        f"{' and '.join(few)}: not more than the {num_features} features of the extractor, so the covariance lacks full rank and "
        "the FID is biased upwards; compare it only with figures of the same counts"
    )


def marked(notice: str | None) -> str:
    """Return the text that follows a figure in a log line: `MARK` in brackets if there is a notice."""
    return f" ({MARK})" if notice else ""
