"""The DDPM / ADM UNet: residual blocks at several resolutions, attention at chosen ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusion_core.checks import is_whole
from diffusion_core.networks.blocks import (
    RESAMPLINGS,
    CrossAttention,
    Downsample,
    ResidualBlock,
    SelfAttention,
    Upsample,
    group_norm,
    silu_of,
)
from diffusion_core.networks.conditioning import ConditionEmbedding, ConditionSpec, TokenSequence
from diffusion_core.networks.embeddings import sinusoidal_embedding


class UNet(nn.Module):
    """The network of DDPM (arXiv 2006.11239, appendix B) with ADM's scale-shift blocks (arXiv 2105.05233).

    ``channels`` times each of ``multipliers`` is the width of a level; each level has half the size of the one before and
    ``num_res_blocks`` blocks (one more on the way up). Attention is at the levels whose size is in ``attention_sizes`` and,
    unless ``middle_attention`` is off, in the middle. The condition's embedding is added to the time embedding;
    cross-attention, next to each self-attention, reads a sequence of tokens.

    ``scale_shift``         the embedding scales and shifts each block's second norm; otherwise it is added before it (DDPM)
    ``resampling``          between levels: "conv", "pool" (no weights), or "residual" (inside a residual block, ADM)
    ``learned_variance``    2 C output channels: the prediction, then the interpolation v of arXiv 2102.09672, eq. 15
    ``self_conditioning``   the input is x_t and the last estimate of x0 (arXiv 2208.04202), or zeros without one
    ``dropout``             the share of numbers that each block's `Dropout` zeroes in training
    ``head_dim``            channels of an attention head; None for a single head

    ``norm_eps``, ``cos_first``, ``frequency_shift``, ``asymmetric_downsampling`` and ``middle_attention_norm`` exist so that
    networks trained elsewhere compute the same here (`diffusers_weights`).

    Raises ValueError if ``image_size`` cannot be halved once per level after the first, an option is out of range, or the
    condition is of kind tokens and the network has no attention.
    """

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        image_size: int,
        image_channels: int,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_sizes: Sequence[int] = (16,),
        head_dim: int | None = None,
        groups: int = 32,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resampling: str = "conv",
        learned_variance: bool = False,
        self_conditioning: bool = False,
        middle_attention: bool = True,
        middle_attention_norm: bool = True,
        norm_eps: float = 1e-5,
        cos_first: bool = False,
        frequency_shift: float = 0.0,
        asymmetric_downsampling: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("image_channels", image_channels),
            ("channels", channels),
            ("num_res_blocks", num_res_blocks),
            ("groups", groups),
            *(("multipliers", multiplier) for multiplier in multipliers),
        ):
            if not is_whole(value) or value < 1:
                raise ValueError(f"{name} must be whole numbers of at least 1, got {value!r}")
        if not multipliers or channels % 2:
            raise ValueError(
                f"a UNet needs at least one level and an even number of channels, got multipliers {list(multipliers)} "
                f"and channels {channels}"
            )
        check_image_size(image_size, len(multipliers))
        if resampling not in RESAMPLINGS:
            raise ValueError(f"unknown resampling {resampling!r}: choose one of {', '.join(RESAMPLINGS)}")
        if asymmetric_downsampling and resampling != "conv":
            raise ValueError(f"asymmetric_downsampling is an option of resampling 'conv', not of {resampling!r}")
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "image_channels": image_channels,
            "channels": channels,
            "multipliers": list(multipliers),
            "num_res_blocks": num_res_blocks,
            "attention_sizes": list(attention_sizes),
            "head_dim": head_dim,
            "groups": groups,
            "dropout": dropout,
            "scale_shift": scale_shift,
            "resampling": resampling,
            "learned_variance": learned_variance,
            "self_conditioning": self_conditioning,
            "middle_attention": middle_attention,
            "middle_attention_norm": middle_attention_norm,
            "norm_eps": norm_eps,
            "cos_first": cos_first,
            "frequency_shift": frequency_shift,
            "asymmetric_downsampling": asymmetric_downsampling,
        }
        embedding_dim = 4 * channels
        self.condition = condition
        self.channels = channels
        self.image_channels = image_channels
        self.self_conditioning = self_conditioning
        self.learned_variance = learned_variance
        self.time_mlp = nn.Sequential(
            nn.Linear(channels, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.tokens = TokenSequence(condition) if condition.kind == "tokens" else None
        self.condition_embedding = (
            ConditionEmbedding(condition, embedding_dim) if condition.kind not in ("none", "tokens") else None
        )
        self.conv_in = nn.Conv2d((2 if self_conditioning else 1) * image_channels, channels, 3, padding=1)

        def residual(in_channels: int, out_channels: int, resample: str | None = None) -> ResidualBlock:
            return ResidualBlock(
                in_channels,
                out_channels,
                embedding_dim,
                groups=groups,
                dropout=dropout,
                scale_shift=scale_shift,
                eps=norm_eps,
                resample=resample,
            )

        def stage(block: nn.Module, width: int, attend: bool, norm: bool = True) -> nn.ModuleList:
            """Return [block, self-attention or identity], followed by cross-attention if the condition is of tokens."""
            if not attend:
                return nn.ModuleList([block, nn.Identity()])
            parts = [block, SelfAttention(width, head_dim=head_dim, groups=groups, eps=norm_eps, norm=norm)]
            if condition.kind == "tokens":
                parts.append(CrossAttention(width, condition.size, head_dim=head_dim, groups=groups, eps=norm_eps))
            return nn.ModuleList(parts)

        def smaller(width: int) -> nn.Module:
            if resampling == "residual":
                return residual(width, width, "down")
            return Downsample(width, resampling=resampling, asymmetric=asymmetric_downsampling)

        def larger(width: int) -> nn.Module:
            return residual(width, width, "up") if resampling == "residual" else Upsample(width, resampling=resampling)

        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        width, size, skips = channels, image_size, [channels]
        for level, multiplier in enumerate(multipliers):
            for _ in range(num_res_blocks):
                block = residual(width, channels * multiplier)
                width = channels * multiplier
                self.down.append(stage(block, width, size in attention_sizes))
                skips.append(width)
            if level < len(multipliers) - 1:
                self.down.append(nn.ModuleList([smaller(width)]))
                skips.append(width)
                size //= 2
        first, *attentions = stage(residual(width, width), width, middle_attention, middle_attention_norm)
        self.middle = nn.ModuleList([first, attentions[0], residual(width, width), *attentions[1:]])
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(num_res_blocks + 1):
                block = residual(width + skips.pop(), channels * multiplier)
                width = channels * multiplier
                self.up.append(stage(block, width, size in attention_sizes))
            if level > 0:
                self.up.append(nn.ModuleList([larger(width)]))
                size *= 2
        if condition.kind == "tokens" and not any(isinstance(module, CrossAttention) for module in self.modules()):
            raise ValueError(
                "a condition of kind tokens needs attention, and this network has none: put the size of a level into "
                f"attention_sizes, which is {list(attention_sizes)}, or turn middle_attention on"
            )
        self.norm_out = group_norm(width, groups, norm_eps)
        self.conv_out = nn.Conv2d(width, (2 if learned_variance else 1) * image_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, self_condition: Tensor | None = None
    ) -> Tensor:
        """x_t: (B, C, H, W); t: (B,) int64; condition: a batch of the ConditionSpec, or None for the null; self_condition: like x_t.

        Returns (B, C, H, W), or (B, 2 C, H, W) with a learned variance. Raises ValueError if a tensor has another shape or type,
        self_condition is given to a network without self-conditioning, or (on a CPU only) the condition is out of range.
        """
        check_inputs(x_t, t, self.image_channels, self.conv_in.weight)
        factor = 2 ** (len(self.config["multipliers"]) - 1)
        if x_t.shape[2] % factor or x_t.shape[3] % factor:
            raise ValueError(
                f"this network halves images {factor.bit_length() - 1} times: height and width must be multiples of {factor}, "
                f"got {tuple(x_t.shape[2:])}"
            )
        if self.condition.kind == "none" and condition is not None:
            self.condition.check_shape(condition)
        embedding = self.time_mlp(
            sinusoidal_embedding(
                t,
                self.channels,
                cos_first=self.config["cos_first"],
                frequency_shift=self.config["frequency_shift"],
            ).to(self.conv_in.weight.dtype)
        )
        if self.condition_embedding is not None:
            embedding = embedding + self.condition_embedding(condition, x_t.shape[0], x_t.device)
        embedding = silu_of(embedding)
        tokens = None if self.tokens is None else self.tokens(condition, x_t.shape[0], x_t.device)
        h = self.conv_in(join_self_condition(x_t, self_condition, self.self_conditioning))
        skips = [h]
        for modules in _stages(self.down):
            h = _run(modules, h, embedding, tokens)
            skips.append(h)
        first, attention, last, *cross = self.middle
        h = _run((first, attention, *cross, last), h, embedding, tokens)
        for modules in _stages(self.up):
            if len(modules) > 1:
                h = torch.cat([h, skips.pop()], dim=1)
            h = _run(modules, h, embedding, tokens)
        return self.conv_out(silu_of(self.norm_out(h)))


def _run(modules: Iterable[nn.Module], h: Tensor, embedding: Tensor, tokens: tuple[Tensor, Tensor] | None) -> Tensor:
    for module in modules:
        if isinstance(module, ResidualBlock):
            h = module(h, embedding)
        elif isinstance(module, CrossAttention):
            assert tokens is not None
            h = module(h, *tokens)
        else:
            h = module(h)
    return h


def _stages(modules: nn.ModuleList) -> Iterable[nn.ModuleList]:
    return cast("Iterable[nn.ModuleList]", modules)


def join_self_condition(x_t: Tensor, self_condition: Tensor | None, self_conditioning: bool) -> Tensor:
    """Return the network's input: x_t, and with self-conditioning the last estimate of x0 (zeros without one) after it.

    Raises ValueError if an estimate is given to a network without self-conditioning, or has another shape than x_t.
    """
    if not self_conditioning:
        if self_condition is not None:
            raise ValueError("this network takes no self_condition: build it with self_conditioning=True, or pass None")
        return x_t
    if self_condition is not None and self_condition.shape != x_t.shape:
        raise ValueError(
            f"self_condition has shape {tuple(self_condition.shape)}, but x_t has {tuple(x_t.shape)}: they must be equal"
        )
    return torch.cat([x_t, torch.zeros_like(x_t) if self_condition is None else self_condition], dim=1)


def check_inputs(x_t: Tensor, t: Tensor, image_channels: int, weight: Tensor) -> None:
    """Raise ValueError unless x_t is (B, image_channels, H, W) in the type of ``weight``, and t is () or (B,)."""
    if x_t.ndim != 4 or x_t.shape[1] != image_channels:
        raise ValueError(f"this network takes images (B, {image_channels}, H, W), got {tuple(x_t.shape)}")
    if x_t.dtype != weight.dtype and not torch.is_autocast_enabled(x_t.device.type):
        raise ValueError(
            f"the network's weights are {weight.dtype}, but x_t is {x_t.dtype}: convert one of them with .to(...)"
        )
    if not isinstance(t, Tensor) or t.shape not in ((), (x_t.shape[0],)):
        got = tuple(t.shape) if isinstance(t, Tensor) else repr(t)
        raise ValueError(f"t must be a tensor of one step for each of {x_t.shape[0]} images, got {got}")


def check_image_size(image_size: int, num_levels: int) -> None:
    """Raise ValueError unless the image can be halved ``num_levels - 1`` times."""
    factor = 2 ** (num_levels - 1)
    if not is_whole(image_size) or image_size < factor or image_size % factor:
        raise ValueError(
            f"a UNet with {num_levels} levels halves the image {num_levels - 1} times, so image_size must be a multiple of "
            f"{factor}, got {image_size}"
        )
