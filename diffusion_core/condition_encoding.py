"""Conditions written by a person (names, indices, numbers), encoded as the tensors that a network takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_core.networks.conditioning import ConditionSpec


def encode_classes(labels: Sequence[int | str], class_names: Sequence[str]) -> Tensor:
    """Return (N,) int64 class indices for labels given as indices or class names.

    A label that equals a class name is that class, also if it is an integer.
    Raises ValueError that names the first label outside the vocabulary.
    """
    return torch.tensor([_index_of(label, class_names) for label in labels], dtype=torch.int64)


def encode_conditions(
    conditions: Sequence[Any],
    spec: ConditionSpec,
    class_names: Sequence[str] = (),
    attributes: Mapping[str, Sequence[str]] | None = None,
) -> Tensor:
    """Return a batch of conditions of the kind ``spec``; None becomes the null condition.

    class      an index or a class name
    classes    {attribute: index or class name}, with the null for a missing attribute. Without names: a list of indices
    multi_hot  a list of attribute names or indices, or {attribute: weight from 0 to 1} to mix
    vector     a sequence of ``size`` numbers
    tokens     up to ``length`` rows of ``size`` numbers

    ``class_names`` name the classes of kind class or the attributes of kind multi_hot; ``attributes`` name those of kind
    classes and their classes. Without names, only indices are known. Raises ValueError that names the first wrong condition.
    """
    if spec.kind == "none":
        raise ValueError("this network takes no condition: it was built without one")
    batch = spec.null(len(conditions))
    names = class_names or [str(index) for index in range(spec.size)]
    columns = attributes or {str(i): [str(n) for n in range(size)] for i, size in enumerate(spec.sizes)}
    for row, condition in enumerate(conditions):
        if condition is None:
            continue
        if spec.kind == "class":
            batch[row] = _index_of(condition, names)
        elif spec.kind == "classes":
            for column, index in _classes(condition, columns, row):
                batch[row, column] = index
        elif spec.kind == "multi_hot":
            given = [condition] if isinstance(condition, str) else condition
            weights = given if isinstance(given, Mapping) else dict.fromkeys(given, 1.0)
            batch[row] = 0.0
            for name, weight in weights.items():
                batch[row, _index_of(name, names)] = float(weight)
        elif spec.kind == "vector":
            batch[row] = _numbers(condition, spec, row)
        else:
            value = _numbers(condition, spec, row)
            batch[row, : len(value)] = value
    spec.check(batch)
    return batch


def _classes(condition: Any, attributes: Mapping[str, Sequence[str]], row: int) -> list[tuple[int, int]]:
    """Return (column, class index) for each attribute that the condition names."""
    if not isinstance(condition, Mapping):
        if isinstance(condition, str) or len(condition) != len(attributes):
            raise ValueError(
                f"condition {row} is {condition!r}: give one class for each of {', '.join(attributes)}, or a mapping"
            )
        condition = dict(zip(attributes, condition, strict=True))
    classes = list(attributes.values())
    found = []
    for attribute, label in condition.items():
        column = _index_of(attribute, list(attributes), "attribute")
        found.append((column, _index_of(label, classes[column])))
    return found


def _numbers(condition: Any, spec: ConditionSpec, row: int) -> Tensor:
    """Return the condition as (size,) or (rows, size) float32."""
    try:
        value = torch.as_tensor(condition, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"condition {row} is not a table of numbers: {condition!r}") from None
    rows = value.shape[:1] if spec.kind == "tokens" else ()
    if value.shape != (*rows, spec.size) or (rows and not 1 <= rows[0] <= spec.length):
        allowed = f"1 to {spec.length} rows of {spec.size}" if spec.kind == "tokens" else f"{spec.size} numbers"
        raise ValueError(f"condition {row} has shape {tuple(value.shape)}: a {spec.kind} condition must have {allowed}")
    return value


def _index_of(label: Any, names: Sequence[str], what: str = "label") -> int:
    """Return the position of a label given as an index or a name. Raises ValueError if the vocabulary does not have it."""
    text = str(label).strip()
    if text in names:
        return list(names).index(text)
    if _is_index(label) and 0 <= int(label) < len(names):
        return int(label)
    raise ValueError(
        f"unknown {what} {label!r}: the model knows the indices 0 to {len(names) - 1}"
        f" and the names {', '.join(list(names)[:12])}{', ...' if len(names) > 12 else ''}"
    )


def _is_index(label: Any) -> bool:
    try:
        return float(label) == int(label)
    except (TypeError, ValueError, OverflowError):
        return False
