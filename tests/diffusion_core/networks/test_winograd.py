import pytest
import torch
import torch.nn.functional as F

from diffusion_core.networks import winograd
from diffusion_core.networks.winograd import Conv3x3, winograd_conv


@pytest.mark.parametrize("shape", [(2, 5, 7, 8, 12), (1, 1, 1, 4, 4), (3, 16, 4, 16, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradients_are_those_of_the_convolution(shape, layout):
    B, C, out, H, W = shape
    torch.manual_seed(0)
    tensors = [torch.randn(B, C, H, W).to(memory_format=layout), torch.randn(out, C, 3, 3), torch.randn(out)]
    upstream = torch.randn(B, out, H, W)
    fast = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    output, expected = winograd_conv(*fast), F.conv2d(*exact, padding=1)
    torch.testing.assert_close(output.double(), expected, atol=1e-4, rtol=1e-5)
    for got, wanted in zip(
        torch.autograd.grad(output, fast, upstream), torch.autograd.grad(expected, exact, upstream.double())
    ):
        torch.testing.assert_close(got.double(), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


def test_rounding_error_stays_in_the_sixth_digit():
    torch.manual_seed(0)
    layer = Conv3x3(256, 256)
    x = torch.randn(2, 256, 16, 16)
    with torch.no_grad():
        exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
        fast = winograd_conv(x, layer.weight, layer.bias)
    assert (fast - exact).abs().max() < 4e-6 * exact.abs().max()


@pytest.mark.parametrize(
    ("channels", "size", "used"), [(128, 32, True), (128, 16, False), (64, 32, False), (128, 34, False)]
)
def test_wide_and_large_maps_alone_take_the_fast_path(channels, size, used, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(winograd, "winograd_conv", lambda *a: calls.append(1) or winograd_conv(*a))
    layer, x = Conv3x3(channels, channels), torch.randn(1, channels, size, size)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), atol=2e-5, rtol=0)
        assert bool(calls) == used
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.double()(x.double()).dtype == torch.float64
    assert len(calls) == used
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_processors_with_fast_convolutions_keep_them(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(winograd, "winograd_conv", lambda *a: pytest.fail("Winograd's path was taken"))
    with torch.no_grad():
        assert Conv3x3(128, 128)(torch.randn(1, 128, 32, 32)).shape == (1, 128, 32, 32)
