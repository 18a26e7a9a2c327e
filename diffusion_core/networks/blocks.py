"""Residual, attention, down- and up-sampling blocks of the UNets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.networks.dropout import Dropout

RESAMPLINGS = ("conv", "pool", "residual")
"""Ways to change the size between the levels of a UNet: a convolution (DDPM), pooling and repeating alone, or a residual
block (ADM, arXiv 2105.05233)."""


def group_norm(channels: int, groups: int = 32, eps: float = 1e-5) -> nn.GroupNorm:
    """Return a GroupNorm whose number of groups is the largest divisor of ``channels`` up to ``groups``."""
    return nn.GroupNorm(max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0), channels, eps=eps)


def silu_of(fresh: Tensor) -> Tensor:
    """Return the SiLU of a tensor that nothing else uses, in place if no gradient is recorded."""
    return F.silu(fresh, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """Two rounds of norm, SiLU and convolution around a shortcut; the embedding enters at the second norm.

    The DDPM block (arXiv 2006.11239, appendix B). With ``scale_shift`` the embedding scales and shifts the second norm's
    output (adaptive group normalisation, arXiv 2105.05233, section 3); otherwise it is added before that norm. ``resample``
    "up" or "down" doubles or halves the size before the first convolution and in the shortcut (ADM).
    The last convolution starts at zero, so that a new block is the identity (or its 1x1 shortcut).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        *,
        groups: int = 32,
        dropout: float = 0.0,
        scale_shift: bool = True,
        eps: float = 1e-5,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = group_norm(in_channels, groups, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_dim, (2 if scale_shift else 1) * out_channels)
        self.norm2 = group_norm(out_channels, groups, eps)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, in_channels, H, W); embedding: (B, embedding_dim), after its SiLU. Returns (B, out_channels, H', W')."""
        h = silu_of(self.norm1(x))
        if self.resample == "up":
            h, x = _repeat(h), _repeat(x)
        elif self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        h = self.conv1(h)
        embedded = self.embedding(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1.0 + scale)
        else:
            h = self.norm2(h + embedded)
        return self.shortcut(x) + self.conv2(self.dropout(silu_of(h)))


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels of a feature map, with PyTorch's fused kernel, around a shortcut."""

    def __init__(
        self, channels: int, *, head_dim: int | None = None, groups: int = 32, eps: float = 1e-5, norm: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = _num_heads(channels, head_dim)
        self.norm = group_norm(channels, groups, eps) if norm else nn.Identity()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, channels, H, W). Returns the same shape."""
        projected = self.qkv(_pixels(self.norm(x)))
        query, key, value = (_heads(part, self.num_heads) for part in projected.chunk(3, dim=2))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + _feature_map(self.project(_joined(mixed)), x)


class CrossAttention(nn.Module):
    """Multi-head attention from the pixels of a feature map to a sequence of tokens, around a shortcut (arXiv 2112.10752, section 3.3)."""

    def __init__(
        self, channels: int, token_dim: int, *, head_dim: int | None = None, groups: int = 32, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.num_heads = _num_heads(channels, head_dim)
        self.norm = group_norm(channels, groups, eps)
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(token_dim, 2 * channels)
        self.project = nn.Linear(channels, channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """x: (B, channels, H, W); tokens: (B, L, token_dim); mask: (B, 1, 1, L) bool, True for tokens to attend to. Returns x's shape."""
        query = _heads(self.query(_pixels(self.norm(x))), self.num_heads)
        key, value = (_heads(part, self.num_heads) for part in self.key_value(tokens).chunk(2, dim=2))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + _feature_map(self.project(_joined(mixed)), x)


class Downsample(nn.Module):
    """Halve the size by a strided 3x3 convolution, or by averaging if ``resampling`` is "pool".

    ``asymmetric``: pad the convolution at the right and bottom only, as in DDPM's original code.
    """

    def __init__(self, channels: int, *, resampling: str = "conv", asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)
            if resampling == "conv"
            else nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.asymmetric:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Double the size by nearest neighbours, followed by a 3x3 convolution unless ``resampling`` is "pool"."""

    def __init__(self, channels: int, *, resampling: str = "conv") -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if resampling == "conv" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_repeat(x))


def _repeat(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _num_heads(channels: int, head_dim: int | None) -> int:
    if head_dim is None:
        return 1
    if head_dim < 1 or channels % head_dim:
        raise ValueError(f"attention over {channels} channels cannot have heads of {head_dim}: choose a divisor")
    return channels // head_dim


def _pixels(x: Tensor) -> Tensor:
    """Reshape (B, C, H, W) to (B, H W, C), without a copy if the map is channels-last."""
    return x.flatten(2).transpose(1, 2)


def _feature_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Reshape (B, H W, C) to the shape of ``like``."""
    return tokens.transpose(1, 2).reshape(like.shape)


def _heads(tokens: Tensor, num_heads: int) -> Tensor:
    """Split (B, N, C) into (B, heads, N, C / heads)."""
    return tokens.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _joined(heads: Tensor) -> Tensor:
    """Join (B, heads, N, d) to (B, N, heads d)."""
    return heads.transpose(1, 2).flatten(2)
