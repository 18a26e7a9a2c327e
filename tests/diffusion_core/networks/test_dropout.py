import contextlib

import pytest
import torch
from torch import nn

from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.dropout import Dropout, addressed_dropout
from diffusion_core.networks.unet import UNet
from diffusion_core.noise import NoiseSource


def two_layers(p=0.3):
    return nn.ModuleList([Dropout(p), nn.Identity(), Dropout(p)])


def kept(layer, positions, *, network=None, seed=0, step=4, shape=(3, 5, 5)):
    """Return which numbers of a batch of ones ``layer`` keeps."""
    with addressed_dropout(network or layer, seed=seed, step=step, positions=positions):
        return layer(torch.ones(len(positions), *shape)) != 0


def unet():
    torch.manual_seed(0)
    network = UNet(
        condition=ConditionSpec(), image_size=8, image_channels=3, channels=16, multipliers=(1, 2), num_res_blocks=1,
        attention_sizes=(4,), groups=8, dropout=0.4,
    )  # fmt: skip
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def gradient(network, x, t, positions, split, step=9):
    """Return the gradient of a loss over the global batch, accumulated over parts of ``split`` images."""
    network.zero_grad()
    for part in torch.arange(len(x)).split(split):
        with addressed_dropout(network, seed=3, step=step, positions=positions[part]):
            network(x[part], t[part]).square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


@pytest.mark.parametrize("split", [1, 3, 4])
def test_gradient_with_dropout_does_not_depend_on_how_the_batch_is_split(split):
    network = unet()
    x, t = torch.randn(8, 3, 8, 8), torch.arange(8) * 100
    positions = torch.tensor([5, 0, 7, 1, 2, 6, 3, 4])
    whole = gradient(network, x, t, positions, 8)
    torch.testing.assert_close(gradient(network, x, t, positions, split), whole, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(gradient(network, x, t, positions, 8, step=10), whole, atol=1e-3, rtol=1e-4)


def test_mask_of_an_image_follows_its_position_and_a_resumed_step_has_the_same_mask():
    layer = Dropout(0.3)
    whole = kept(layer, torch.arange(16))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept(layer, order), whole[order])
    assert torch.equal(kept(Dropout(0.3), torch.arange(16)), whole)
    for other in (kept(layer, torch.arange(16), step=5), kept(layer, torch.arange(16), seed=1)):
        assert float((other == whole).double().mean()) == pytest.approx(0.3**2 + 0.7**2, abs=0.06)


def test_each_layer_has_a_stream_of_its_own():
    network, positions = two_layers(), torch.arange(8)
    for layer, stream in ((network[0], "train-dropout/0"), (network[2], "train-dropout/1")):
        expected = NoiseSource(0, stream).uniform((3, 5, 5), positions, 4) >= 0.3
        assert torch.equal(kept(layer, positions, network=network), expected)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_dropped_numbers_is_p_and_the_mean_stays(p):
    layer, x = Dropout(p), torch.full((100, 1000), 2.0)
    with addressed_dropout(layer, seed=0, step=0, positions=torch.arange(100)):
        output = layer(x)
    dropped = output == 0
    assert float(dropped.double().mean()) == pytest.approx(p, abs=4.5 * (p * (1 - p) / 1e5) ** 0.5)
    torch.testing.assert_close(output[~dropped], torch.full_like(output[~dropped], 2.0 / (1.0 - p)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_and_type_stay_and_the_gradient_has_the_same_mask(dtype):
    layer = Dropout(0.5)
    x = torch.randn(4, 3, 6, 6).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    with addressed_dropout(layer, seed=0, step=0, positions=torch.arange(4)):
        output = layer(x)
    output.sum().backward()
    assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last)
    mask = kept(layer, torch.arange(4), step=0, shape=(3, 6, 6))
    torch.testing.assert_close(x.grad, 2.0 * mask.to(dtype))


def test_evaluation_mode_and_p_0_change_nothing():
    for layer in (Dropout(0.5).eval(), Dropout(0.0)):
        x = torch.randn(4, 10)
        with addressed_dropout(layer, seed=0, step=0, positions=torch.arange(4)):
            assert torch.equal(layer(x), x)
        assert torch.equal(layer(x), x)


def test_outside_of_the_context_masks_are_those_of_pytorch_even_after_an_error():
    network, x = two_layers(), torch.ones(2, 50)
    with (
        contextlib.suppress(RuntimeError),
        addressed_dropout(network, seed=0, step=0, positions=torch.arange(2)),
    ):
        raise RuntimeError
    torch.manual_seed(0)
    expected = nn.functional.dropout(x, 0.3)
    torch.manual_seed(0)
    assert torch.equal(network[0](x), expected)


def test_inner_context_gives_the_address_of_the_outer_one_back():
    layer, positions = Dropout(0.5), torch.arange(4)
    before = kept(layer, positions, step=1)
    with addressed_dropout(layer, seed=0, step=1, positions=positions):
        kept(layer, positions, step=2)
        assert torch.equal(layer(torch.ones(4, 3, 5, 5)) != 0, before)


def test_network_under_distributed_data_parallel_uses_the_address(tmp_path):
    network = unet()
    x, t, positions = torch.randn(4, 3, 8, 8), torch.arange(4), torch.tensor([9, 2, 4, 7])
    with addressed_dropout(network, seed=0, step=1, positions=positions):
        expected = network(x, t)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network)
        with addressed_dropout(network, seed=0, step=1, positions=positions):
            assert torch.equal(wrapped(x, t), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_batch_that_does_not_fit_the_positions_and_bad_shares_are_refused():
    layer = Dropout(0.5)
    with (
        pytest.raises(ValueError, match="3 positions, but the batch has 2 rows"),
        addressed_dropout(layer, seed=0, step=0, positions=torch.arange(3)),
    ):
        layer(torch.ones(2, 4))
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout must lie in 0 to 1"):
            Dropout(p)
