"""The context UNet: two levels; the condition multiplies the features and the time is added to them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.checks import is_whole
from diffusion_core.networks.blocks import group_norm
from diffusion_core.networks.conditioning import ConditionEmbedding, ConditionSpec
from diffusion_core.networks.embeddings import sinusoidal_embedding
from diffusion_core.networks.unet import check_inputs, join_self_condition


class ContextUNet(nn.Module):
    """A small UNet for small images: on the way up, features become ``context * features + time`` at each level.

    The context is a class, several attributes at once (several class ids, or a multi-hot vector whose fractions mix
    attributes), or a real vector. Its null multiplies by about 1 at the start of training.

    GroupNorm (arXiv 1803.08494) replaces the BatchNorm that such networks often use. BatchNorm's statistics mix all images
    and noise levels of a batch, so that the prediction of an image would depend on the rest of the batch. In sampling, all
    images of a batch have the same noise level, which running averages over all levels do not fit. And each distributed
    worker would have its own running averages. GroupNorm normalises each image by itself.

    ``image_size`` is any even number: a map of odd size is halved rounding up, and cropped on the way up.

    Raises ValueError if the size is odd or the condition is of kind tokens (this network has no attention).
    """

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        image_size: int,
        image_channels: int,
        channels: int = 64,
        groups: int = 8,
        self_conditioning: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("image_channels", image_channels), ("channels", channels), ("groups", groups)):
            if not is_whole(value) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if channels % 2:
            raise ValueError(f"context_unet needs an even number of channels, got {channels}")
        if not is_whole(image_size) or image_size < 2 or image_size % 2:
            raise ValueError(f"context_unet needs an even image_size of at least 2, got {image_size}")
        if condition.kind == "tokens":
            raise ValueError("context_unet takes no condition of kind 'tokens': it has no attention, unlike unet")
        self.condition = condition
        self.channels = channels
        self.image_size, self.image_channels = image_size, image_channels
        self.self_conditioning = self_conditioning
        self.bottom_size = (image_size // 2 + 1) // 2
        in_channels = (2 if self_conditioning else 1) * image_channels
        self.conv_in = _ConvBlock(in_channels, channels, groups, residual=True)
        self.down1 = _ConvBlock(channels, channels, groups)
        self.down2 = _ConvBlock(channels, 2 * channels, groups)
        self.time1, self.time2 = _mlp(channels, 2 * channels), _mlp(channels, channels)
        if condition.kind != "none":
            self.context1 = ConditionEmbedding(condition, 2 * channels, null_init=1.0)
            self.context2 = ConditionEmbedding(condition, channels, null_init=1.0)
        self.up0 = nn.Sequential(
            nn.ConvTranspose2d(2 * channels, 2 * channels, self.bottom_size, self.bottom_size),
            group_norm(2 * channels, groups),
            nn.SiLU(),
        )
        self.up1 = _UpBlock(4 * channels, channels, groups)
        self.up2 = _UpBlock(2 * channels, channels, groups)
        self.out = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            group_norm(channels, groups),
            nn.SiLU(),
            nn.Conv2d(channels, image_channels, 3, padding=1),
        )

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, self_condition: Tensor | None = None
    ) -> Tensor:
        """x_t: (B, C, H, W); t: (B,) int64; condition: a batch of the ConditionSpec, or None for the null; self_condition: like x_t.

        Returns (B, C, H, W). Raises ValueError as `UNet.forward` does.
        """
        check_inputs(x_t, t, self.image_channels, self.up1.up.weight)
        if x_t.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"this network takes images of size {self.image_size}, got {tuple(x_t.shape[2:])}")
        if self.condition.kind == "none" and condition is not None:
            self.condition.check_shape(condition)
        time = sinusoidal_embedding(t, self.channels).to(self.up1.up.weight.dtype)
        time1, time2 = self.time1(time)[:, :, None, None], self.time2(time)[:, :, None, None]
        x = self.conv_in(join_self_condition(x_t, self_condition, self.self_conditioning))
        down1 = F.max_pool2d(self.down1(x), 2)
        down2 = F.max_pool2d(self.down2(down1), 2, ceil_mode=True)
        half = down1.shape[-1]
        hidden = F.silu(F.avg_pool2d(down2, self.bottom_size))
        up = self.up0(hidden)
        if self.condition.kind != "none":
            context1 = self.context1(condition, x_t.shape[0], x_t.device)[:, :, None, None]
            context2 = self.context2(condition, x_t.shape[0], x_t.device)[:, :, None, None]
            up = self.up1(context1 * up + time1, down2, half)
            up = self.up2(context2 * up + time2, down1, 2 * half)
        else:
            up = self.up2(self.up1(up + time1, down2, half) + time2, down1, 2 * half)
        return self.out(torch.cat([up, x], dim=1))


class _ConvBlock(nn.Module):
    """Two convolutions with GroupNorm and SiLU; ``residual`` adds the second to the first."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.first = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1), group_norm(out_channels, groups), nn.SiLU()
        )
        self.second = nn.Sequential(
            nn.Conv2d(out_channels, out_channels, 3, padding=1), group_norm(out_channels, groups), nn.SiLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(first)
        return (first + second) / 2**0.5 if self.residual else second


class _UpBlock(nn.Module):
    """A transposed convolution of (features, skip) to twice the size, cropped to ``size``, and two convolution blocks."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, 2)
        self.blocks = nn.Sequential(
            _ConvBlock(out_channels, out_channels, groups), _ConvBlock(out_channels, out_channels, groups)
        )

    def forward(self, x: Tensor, skip: Tensor, size: int) -> Tensor:
        return self.blocks(self.up(torch.cat([x, skip], dim=1))[..., :size, :size])


def _mlp(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features))
