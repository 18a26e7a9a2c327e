"""Conditions written by a person (names, indices, numbers), encoded as the tensors that a network takes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_core.networks.conditioning import ConditionSpec


def encode_classes(labels: Sequence[int | float | str], class_names: Sequence[str]) -> Tensor:
    """Return (N,) int64 class indices for labels, which are class names.

    A number is the name that it is written as: 3, 3.0 and "3" are the class named 3, not the class at index 3. For indices use
    `encode_class_indices`. Raises ValueError that names the first unknown label and the nearest names, if a label is a bool or
    missing, or if there are no class names.
    """
    if not class_names:
        raise ValueError("this model has no class names: give class indices instead of labels")
    positions = _positions(class_names)
    return torch.tensor([_position_of(label, positions) for label in labels], dtype=torch.int64)


def encode_class_indices(indices: Sequence[int | float | str], size: int, what: str = "class index") -> Tensor:
    """Return (N,) int64 for indices given as whole numbers, or as the text of one. ``what`` is their name in errors.

    Raises ValueError that names the first one that is not a whole number from 0 to ``size - 1``; a bool is not one.
    """
    return torch.tensor([_checked_index(index, size, what) for index in indices], dtype=torch.int64)


def encode_conditions(
    conditions: Sequence[Any],
    spec: ConditionSpec,
    class_names: Sequence[str] = (),
    attributes: Mapping[str, Sequence[str]] | None = None,
) -> Tensor:
    """Return a batch of conditions of the kind ``spec``; None becomes the null condition.

    class      a class name
    classes    {attribute: class name}, with the null for a missing attribute, or a list with one class per attribute
    multi_hot  a list of attribute names, or {attribute: weight from 0 to 1} to mix
    vector     a sequence of ``size`` numbers
    tokens     up to ``length`` rows of ``size`` numbers

    ``class_names`` name the classes of kind class or the attributes of kind multi_hot; ``attributes`` name those of kind
    classes and their classes. With names, a number is the name that it is written as (see `encode_classes`). Without names,
    indices take their place. Raises ValueError that names the first wrong condition.
    """
    if spec.kind == "none":
        raise ValueError("this network takes no condition: it was built without one")
    batch = spec.null(len(conditions))
    find = _finder(class_names, spec.size)
    for row, condition in enumerate(conditions):
        if condition is None:
            continue
        if spec.kind == "class":
            batch[row] = find(condition)
        elif spec.kind == "classes":
            for column, index in _classes(condition, attributes or {}, spec.sizes, row):
                batch[row, column] = index
        elif spec.kind == "multi_hot":
            given = [condition] if isinstance(condition, str | Real) else condition
            pairs = list(given.items()) if isinstance(given, Mapping) else [(name, 1.0) for name in given]
            positions = [find(name) for name, _ in pairs]
            if len(set(positions)) < len(positions):
                raise ValueError(
                    f"condition {row} names an attribute twice: a list holds names, each once; give {{name: weight}} for values"
                )
            batch[row] = 0.0
            for position, (_, weight) in zip(positions, pairs, strict=True):
                batch[row, position] = float(weight)
        elif spec.kind == "vector":
            batch[row] = _numbers(condition, spec, row)
        else:
            value = _numbers(condition, spec, row)
            batch[row, : len(value)] = value
    spec.check(batch)
    return batch


def _classes(
    condition: Any, attributes: Mapping[str, Sequence[str]], sizes: Sequence[int], row: int
) -> list[tuple[int, int]]:
    """Return (column, class index) for each attribute that the condition names."""
    if not isinstance(condition, Mapping):
        if isinstance(condition, str | Real) or len(condition) != len(sizes):
            raise ValueError(
                f"condition {row} is {condition!r}: give one class for each of "
                f"{', '.join(attributes or map(str, range(len(sizes))))}, or a mapping"
            )
        condition = dict(zip(attributes or range(len(sizes)), condition, strict=True))
    find_column = _finder(list(attributes), len(sizes), "attribute")
    classes = list(attributes.values())
    found = []
    for attribute, label in condition.items():
        column = find_column(attribute)
        found.append((column, _finder(classes[column] if classes else (), sizes[column])(label)))
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


def _finder(names: Sequence[str], size: int, what: str = "label") -> Callable[[Any], int]:
    """Return a function that maps a name to its index. Without names, it checks and returns the given index."""
    if not names:
        return lambda index: _checked_index(index, size)
    positions = _positions(names)
    return lambda label: _position_of(label, positions, what)


def _positions(names: Sequence[str]) -> dict[str, int]:
    return {name: position for position, name in enumerate(names)}


def _position_of(label: Any, positions: Mapping[str, int], what: str = "label") -> int:
    """Return the position of the name that ``label`` is written as. Raises ValueError if there is none."""
    label = label.item() if isinstance(label, Tensor) and label.ndim == 0 else label
    for text in _spellings(label, what):
        if text in positions:
            return positions[text]
    hint = "" if isinstance(label, str) else "; a number is read as a name, indices are a separate input"
    raise ValueError(f"unknown {what} {label!r}: {_known(str(label), list(positions))}{hint}")


def _spellings(label: Any, what: str) -> list[str]:
    """Return the names that a label may stand for, the likeliest first: 3.0 is also written 3, and " cat " is also cat."""
    if isinstance(label, bool | np.bool_):
        raise ValueError(f"the {what} {label} is a bool: give a name")
    if label is None or (isinstance(label, Real) and label != label):
        raise ValueError(f"a {what} is missing ({label}): give a name")
    if not isinstance(label, str | Real):
        raise ValueError(f"the {what} {label!r} is a {type(label).__name__}: give a name")
    text = str(label)
    return [text, text.strip(), re.sub(r"^(-?\d+)\.0+$", r"\1", text.strip())]


def _known(text: str, names: list[str]) -> str:
    """Return the part of an error that says which names are nearest to ``text``, and which ones there are."""
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(name.casefold(), []).append(name)
    near = difflib.get_close_matches(text.strip().casefold(), folded, n=5, cutoff=0.5)
    nearest = f"the nearest are {', '.join(repr(name) for key in near for name in folded[key])}; " if near else ""
    return f"{nearest}the {len(names)} names are {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"


def _checked_index(index: Any, size: int, what: str = "class index") -> int:
    """Return an index, given as a whole number or as its text. Raises ValueError if it is not from 0 to size - 1."""
    number = index = index.item() if isinstance(index, Tensor) and index.ndim == 0 else index
    if isinstance(index, str) and re.fullmatch(r"\s*\d+(\.0+)?\s*", index):
        number = float(index)
    whole = isinstance(number, Integral) or (isinstance(number, Real) and float(number).is_integer())
    whole = whole and not isinstance(number, bool | np.bool_)
    if not whole or not 0 <= number < size:
        raise ValueError(f"unknown {what} {index!r}: it must be a whole number from 0 to {size - 1}")
    return int(number)
