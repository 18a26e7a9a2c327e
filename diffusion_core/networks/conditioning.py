"""Conditions of a sample, their null values, and the layers that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_core.checks import is_whole

KINDS = ("none", "class", "classes", "multi_hot", "vector", "tokens")


@dataclass(frozen=True)
class ConditionSpec:
    """The kind and size of a condition.

    =============  =======================================================================  ===========================
    kind           a batch                                                                  null
    =============  =======================================================================  ===========================
    ``class``      (B,) int64 in [0, size)                                                  ``size``
    ``classes``    (B, len(sizes)) int64, several attributes: column i in [0, sizes[i])     ``sizes[i]``, per attribute
    ``multi_hot``  (B, size) float in [0, 1]; fractions mix attributes                      -1 everywhere
    ``vector``     (B, size) float, any reals                                               NaN everywhere
    ``tokens``     (B, length, size) float; shorter sequences end in rows of NaN            NaN everywhere
    ``none``       no condition                                                             (B, 0)
    =============  =======================================================================  ===========================

    The null is a value of the tensor itself, so that conditions of all kinds are batched, dropped and guided alike.
    ``sizes`` belongs to ``classes`` (``size`` is then the number of attributes), ``length`` to ``tokens``.

    Raises ValueError if the kind is unknown, or a size is missing, out of range or not one of this kind.
    """

    kind: str = "none"
    size: int = 0
    sizes: Sequence[int] = ()
    length: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown condition kind {self.kind!r}: choose one of {', '.join(KINDS)}")
        object.__setattr__(self, "sizes", tuple(self.sizes))
        for name, value in (("size", self.size), ("length", self.length), *(("sizes", size) for size in self.sizes)):
            if not is_whole(value):
                raise ValueError(f"{name} of a condition must be a whole number, got {value!r}")
        if self.kind == "classes":
            if not self.sizes or min(self.sizes) < 1 or self.size not in (0, len(self.sizes)):
                raise ValueError(
                    "a condition of kind 'classes' needs sizes, the number of classes of each attribute, "
                    f"got sizes {list(self.sizes)} and size {self.size}"
                )
            object.__setattr__(self, "size", len(self.sizes))
        elif self.sizes:
            raise ValueError(f"sizes belongs to a condition of kind 'classes': omit it for {self.kind!r}")
        if self.kind != "none" and self.size < 1:
            raise ValueError(f"a condition of kind {self.kind!r} needs a size of at least 1, got {self.size}")
        if (self.kind == "tokens") != (self.length > 0):
            raise ValueError(
                "length, the number of tokens, must be at least 1 for a condition of kind 'tokens' and omitted for "
                f"other kinds, got kind {self.kind!r} and length {self.length}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; ``ConditionSpec(**spec.as_dict()) == spec``."""
        record: dict[str, Any] = {"kind": self.kind, "size": self.size}
        if self.sizes:
            record["sizes"] = list(self.sizes)
        if self.length:
            record["length"] = self.length
        return record

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one condition, without the batch dimension."""
        if self.kind == "class":
            return ()
        return (self.length, self.size) if self.kind == "tokens" else (self.size,)

    def null(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Return a batch of ``batch`` null conditions."""
        if self.kind == "class":
            return torch.full((batch,), self.size, dtype=torch.int64, device=device)
        if self.kind == "classes":
            return torch.tensor(self.sizes, dtype=torch.int64, device=device).repeat(batch, 1)
        fill = {"multi_hot": -1.0, "none": 0.0}.get(self.kind, float("nan"))
        return torch.full((batch, *self.shape), fill, device=device)

    def drop(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """Return ``condition`` with the null in the rows that ``dropped`` ((B,) bool) marks (arXiv 2207.12598, algorithm 1).

        Raises ValueError if the condition has another shape or type, or the mask is not one flag per row.
        """
        self.check_shape(condition)
        if dropped.shape != condition.shape[:1] or dropped.dtype != torch.bool:
            raise ValueError(
                f"dropped must be one flag for each of {condition.shape[0]} conditions, got {dropped.dtype} {tuple(dropped.shape)}"
            )
        mask = dropped.view(-1, *([1] * (condition.ndim - 1)))
        return torch.where(mask, self.null(condition.shape[0], condition.device).to(condition.dtype), condition)

    def check_shape(self, condition: Tensor) -> None:
        """Raise ValueError unless ``condition`` has the shape and type of a batch of this kind. Reads no values."""
        if not isinstance(condition, Tensor):
            raise ValueError(f"a condition must be a tensor with one row per image, got {type(condition).__name__}")
        if self.kind == "none":
            if condition.ndim != 2 or condition.shape[1] != 0:
                raise ValueError(
                    f"this network takes no condition: pass None, not a tensor of shape {tuple(condition.shape)}"
                )
            return
        if tuple(condition.shape[1:]) != self.shape or condition.ndim < 1:
            raise ValueError(
                f"a {self.kind} condition must have shape (B{''.join(f', {n}' for n in self.shape)}), got {tuple(condition.shape)}"
            )
        integer = self.kind in ("class", "classes")
        if integer == (condition.is_floating_point() or condition.dtype == torch.bool):
            raise ValueError(
                f"a {self.kind} condition must hold {'integers' if integer else 'floats'}, got {condition.dtype}: "
                f"convert it with .{'long' if integer else 'float'}()"
            )

    def check(self, condition: Tensor) -> None:
        """Raise ValueError unless ``condition`` is a batch of this kind. Reads the values, which waits for a GPU."""
        self.check_shape(condition)
        if self.kind in ("class", "classes"):
            sizes = self.sizes or (self.size,)
            for index, (size, column) in enumerate(zip(sizes, condition.view(-1, len(sizes)).unbind(1), strict=True)):
                if column.numel() and bool(((column < 0) | (column > size)).any()):
                    which = f" of attribute {index}" if self.sizes else ""
                    raise ValueError(
                        f"class labels{which} must lie in 0 to {size - 1}, got {int(column.min())} to {int(column.max())}"
                    )
        elif self.kind == "multi_hot":
            null = (condition == -1).all(dim=1)
            if not bool((null | ((condition >= 0) & (condition <= 1)).all(dim=1)).all()):
                raise ValueError("a multi_hot condition must hold values from 0 to 1 (or -1 in a whole row, the null)")
        elif self.kind in ("vector", "tokens"):
            null = condition.isnan().all(dim=-1)
            if not bool((null | condition.isfinite().all(dim=-1)).all()):
                what = "vector" if self.kind == "vector" else "token"
                raise ValueError(
                    f"a {what} of the condition is partly NaN, or infinite: only a whole {what} may be NaN"
                )
            if self.kind == "tokens" and bool((null[:, :-1] & ~null[:, 1:]).any()):
                raise ValueError("tokens of NaN are padding and must come after the last token of a sequence")


class ConditionEmbedding(nn.Module):
    """Embedding of a condition of any kind except tokens, (B, dim), with a learned vector for its null.

    The embeddings of several classes are summed. The null of a multi-hot or real vector starts at ``null_init``.
    Raises ValueError if the kind is "none" or "tokens".
    """

    def __init__(self, spec: ConditionSpec, dim: int, *, null_init: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        if spec.kind == "class":
            self.table = nn.Embedding(spec.size + 1, dim)
        elif spec.kind == "classes":
            self.tables = nn.ModuleList([nn.Embedding(size + 1, dim) for size in spec.sizes])
        elif spec.kind in ("multi_hot", "vector"):
            self.project = nn.Sequential(nn.Linear(spec.size, dim), nn.SiLU(), nn.Linear(dim, dim))
            self.null_embedding = nn.Parameter(torch.full((dim,), null_init))
        else:
            raise ValueError(f"a condition of kind {spec.kind!r} has no embedding as one vector")

    def forward(self, condition: Tensor | None, batch: int, device: torch.device) -> Tensor:
        condition = _given_or_null(self.spec, condition, batch, device)
        if self.spec.kind == "class":
            return self.table(condition.long())
        if self.spec.kind == "classes":
            return torch.stack([table(ids) for table, ids in zip(self.tables, condition.long().unbind(1))]).sum(dim=0)
        is_null = torch.isnan(condition[:, :1]) if self.spec.kind == "vector" else condition[:, :1] < 0
        filled = torch.where(is_null, torch.zeros_like(condition), condition).to(self.null_embedding.dtype)
        embedding = self.project(filled)
        return torch.where(is_null, self.null_embedding.to(embedding.dtype), embedding)


class TokenSequence(nn.Module):
    """The tokens of a condition and their mask, as cross-attention reads them.

    ``forward`` returns (tokens (B, length, size), mask (B, 1, 1, length) bool, True for tokens to attend to). Padding is
    zeroed and masked; a null sequence becomes one learned token, so that every image has a token to attend to.
    """

    def __init__(self, spec: ConditionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.null_token = nn.Parameter(0.02 * torch.randn(spec.size))

    def forward(self, condition: Tensor | None, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        condition = _given_or_null(self.spec, condition, batch, device)
        missing = condition[..., 0].isnan()
        is_null = missing.all(dim=1)
        first = torch.arange(self.spec.length, device=condition.device) == 0
        null_slot = is_null[:, None] & first
        tokens = torch.where(missing[..., None], torch.zeros_like(condition), condition)
        tokens = torch.where(null_slot[..., None], self.null_token.to(tokens.dtype), tokens)
        return tokens.to(self.null_token.dtype), (~missing | null_slot)[:, None, None, :]


def _given_or_null(spec: ConditionSpec, condition: Tensor | None, batch: int, device: torch.device) -> Tensor:
    if condition is None:
        return spec.null(batch, device)
    if torch.compiler.is_compiling() or (isinstance(condition, Tensor) and condition.device.type != "cpu"):
        spec.check_shape(condition)
    else:  # reading the values costs nothing on a CPU
        spec.check(condition)
    if condition.shape[0] != batch:
        raise ValueError(f"{condition.shape[0]} conditions were given for {batch} images: give one per image")
    return condition
