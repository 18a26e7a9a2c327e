from __future__ import annotations

import pytest
import torch

from diffusion_core.networks.blocks import ResidualBlock, SelfAttention, group_norm


@pytest.mark.parametrize(
    ("channels", "groups", "expected"), [(64, 32, 32), (24, 32, 24), (20, 8, 5), (7, 4, 1), (48, 32, 24)]
)
def test_group_norm_has_the_largest_number_of_groups_that_divides_the_channels(
    channels: int, groups: int, expected: int
) -> None:
    assert group_norm(channels, groups).num_groups == expected


def test_new_residual_block_is_its_shortcut() -> None:
    x, embedding = torch.randn(2, 8, 6, 6), torch.randn(2, 16)
    assert torch.equal(ResidualBlock(8, 8, 16, groups=4)(x, embedding), x)
    block = ResidualBlock(8, 12, 16, groups=4)
    assert torch.allclose(block(x, embedding), block.shortcut(x))


def test_new_attention_is_the_identity_and_a_trained_one_is_plain_softmax_attention() -> None:
    x = torch.randn(2, 8, 3, 3)
    attention = SelfAttention(8, head_dim=4, groups=4)
    assert torch.equal(attention(x), x)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = attention.norm(x).flatten(2).transpose(1, 2)
    query, key, value = (part.view(2, 9, 2, 4).transpose(1, 2) for part in attention.qkv(tokens).chunk(3, dim=-1))
    weights = torch.softmax(query @ key.transpose(-1, -2) / 2.0, dim=-1)
    expected = x + attention.project((weights @ value).transpose(1, 2).reshape(2, 9, 8)).transpose(1, 2).reshape(
        x.shape
    )
    assert torch.allclose(attention(x), expected, atol=1e-5)


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="heads of 5"):
        SelfAttention(8, head_dim=5)
