"""3x3 convolutions with fewer multiplications, for wide feature maps on a CPU (Winograd's minimal filtering, arXiv 1509.09308).

The map is cut into overlapping 6x6 tiles; each tile and the kernel are transformed, multiplied point by point (36 matrix
products over the channels), and transformed back to 4x4 outputs: 36 multiplications in place of 144. PyTorch's CPU
convolution runs at the speed of its matrix product on processors with AVX2, so that only fewer multiplications make it
faster there. With AVX-512 oneDNN's convolution is left alone: on the processor measured (AMD, Zen 5) it is more than twice as
fast as the matrix product, which goes through MKL (docs/results/core.md).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_CHANNELS = 128
MIN_PIXELS = 1024
"""Below either, moving the transformed tiles and kernel costs more than the multiplications saved."""
_TILE = 4
_POINTS = (0.0, 2 / 3, -2 / 3, 4 / 3, -4 / 3)
"""Where the polynomials are evaluated, and at infinity. The choice decides how many digits are lost (arXiv 1803.10986): with the
usual 0, 1, -1, 2, -2 the error is 5 times that of these."""


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d(in_channels, out_channels, 3, padding=1)``, by fewer multiplications where that is faster.

    The same weights under the same names, and the same result to rounding; other devices and types, processors with
    AVX-512 and narrow layers take PyTorch's own convolution.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if (
            torch.compiler.is_compiling()
            or min(self.in_channels, self.out_channels) < MIN_CHANNELS
            or x.device.type != "cpu"
            or torch.backends.cpu.get_cpu_capability() == "AVX512"
            or x.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or x.shape[-1] % _TILE
            or x.shape[-2] % _TILE
            or x.numel() < MIN_PIXELS * self.in_channels
        ):
            return super().forward(x)
        assert self.bias is not None
        return winograd_conv(x, self.weight, self.bias)


def winograd_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=1)`` for x (B, C, H, W) float32, H and W multiples of 4, and weight (O, C, 3, 3).

    Returns (B, O, H, W) in channels-last memory. Differentiable once.
    """
    return _Winograd.apply(x, weight, bias)


class _Winograd(torch.autograd.Function):
    """With d, g, y a tile, the kernel and the output: y = A^T [(G g G^T) * (B^T d B)] A (arXiv 1509.09308, eq. 8)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, _transformed_kernel(weight)).add_(bias.view(1, -1, 1, 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:  # the convolution with the kernel turned round
            grad_x = _convolve(grad, _transformed_kernel(weight.transpose(0, 1).flip(2, 3)))
        if ctx.needs_input_grad[1]:
            (B, out, H, W), kernel = grad.shape, _matrices()[0]
            blocks = grad.permute(0, 2, 3, 1).reshape(B, H // _TILE, _TILE, W // _TILE, _TILE, out)
            blocks = blocks.permute(2, 4, 0, 1, 3, 5).reshape(_TILE * _TILE, -1)
            products = (_matrices()[2].T @ blocks).view(-1, B * H * W // _TILE**2, out)
            transformed = torch.bmm(products.transpose(1, 2), _transformed_tiles(x))  # (36, O, C)
            size = _TILE + 2
            grad_weight = torch.einsum("ak,aboc,bl->ockl", kernel, transformed.view(size, size, out, -1), kernel)
        return grad_x, grad_weight, grad.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[2] else None


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """x: (B, C, H, W); kernel: (36, C, O), transformed."""
    B, _, H, W = x.shape
    products = torch.bmm(_transformed_tiles(x), kernel).view(kernel.shape[0], -1)
    output = (_matrices()[2] @ products).view(_TILE, _TILE, B, H // _TILE, W // _TILE, -1)
    return output.permute(2, 3, 0, 4, 1, 5).reshape(B, H, W, -1).permute(0, 3, 1, 2)


def _transformed_tiles(x: Tensor) -> Tensor:
    """(36, B H W / 16, C): B^T d B of every 6x6 tile of the padded map."""
    B, C, H, W = x.shape
    size, data = _TILE + 2, _matrices()[1]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    batch, row, column, channel = padded.stride()
    # B^T d B one side after the other: half the work of one product with the Kronecker square
    tiles = padded.as_strided((size, B, H + 2, W // _TILE, C), (column, batch, row, _TILE * column, channel))
    tiles = (data @ tiles.reshape(size, -1)).view(size, B, H + 2, W // _TILE, C)
    within, batch, row, column, channel = tiles.stride()
    tiles = tiles.as_strided(
        (size, size, B, H // _TILE, W // _TILE, C), (row, within, batch, _TILE * row, column, channel)
    )
    return (data @ tiles.reshape(size, -1)).view(size * size, -1, C)


def _transformed_kernel(weight: Tensor) -> Tensor:
    """(36, C, O): G g G^T of a kernel (O, C, 3, 3)."""
    kernel = _matrices()[0]
    out, C = weight.shape[:2]
    return (torch.kron(kernel, kernel) @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(-1, C, out)


@lru_cache(maxsize=1)
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """(G (6, 3), B^T (6, 6), A^T x A^T (16, 36)) of F(4x4, 3x3) by Toom and Cook's construction from the points."""
    size = _TILE + 2
    points = torch.tensor(_POINTS, dtype=torch.float64)
    kernel, data, output = (
        torch.zeros(shape, dtype=torch.float64) for shape in ((size, 3), (size, size), (_TILE, size))
    )
    for i, point in enumerate(_POINTS):
        others = torch.cat([points[:i], points[i + 1 :]])
        kernel[i] = point ** torch.arange(3) / (point - others).prod()
        data[i, : size - 1] = _polynomial(others)
        output[:, i] = point ** torch.arange(_TILE)
    kernel[-1, -1] = output[-1, -1] = 1.0
    data[-1] = _polynomial(points)
    return kernel.float(), data.float(), torch.kron(output, output).float()


def _polynomial(roots: Tensor) -> Tensor:
    """Coefficients, lowest first, of the product of (x - root)."""
    coefficients = torch.ones(1, dtype=torch.float64)
    for root in roots:
        shifted = torch.cat([torch.zeros(1, dtype=torch.float64), coefficients])
        coefficients = shifted - root * torch.cat([coefficients, torch.zeros(1, dtype=torch.float64)])
    return coefficients
