"""Addressed randomness: the published test vectors, the distribution, and independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_core.noise import NoiseSource, philox4x32

# kat_vectors of Random123 (Salmon et al., SC 2011), philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    words = philox4x32([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 5, 5), (3, 32, 32)])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_sample_has_the_same_bits_in_any_batch(shape, kind):
    draw = getattr(NoiseSource(11), kind)
    whole = draw(shape, torch.arange(64), 5)
    for size in (1, 7, 64):
        assert torch.equal(torch.cat([draw(shape, part, 5) for part in torch.arange(64).split(size)]), whole)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(shape, shuffled, 5), whole[shuffled])


def test_normal_numbers_have_the_moments_and_tails_of_a_standard_normal():
    values = NoiseSource(0).normal((1000,), torch.arange(1000), 3).double().flatten()
    count = values.numel()
    moments = [float((values**k).mean()) for k in (1, 2, 3, 4)]
    # the standard errors of the first four moments are sqrt(1, 2, 15, 96) / sqrt(n)
    for moment, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96)):
        assert abs(moment - expected) < 4.5 * math.sqrt(variance / count)
    for bound in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(bound / math.sqrt(2))
        seen = float((values.abs() > bound).double().mean())
        assert abs(seen - share) < 4.5 * math.sqrt(share / count)


@pytest.mark.parametrize(
    "other",
    [
        NoiseSource(1).normal((4096,), torch.tensor([0]), 0),
        NoiseSource(2**40).normal((4096,), torch.tensor([0]), 0),
        NoiseSource(0, "train-noise").normal((4096,), torch.tensor([0]), 0),
        NoiseSource(0).normal((4096,), torch.tensor([1]), 0),
        NoiseSource(0).normal((4096,), torch.tensor([0]), 1),
    ],
    ids=["seed", "high half of the seed", "stream", "sample", "step"],
)
def test_another_seed_stream_sample_or_step_is_uncorrelated(other):
    here = NoiseSource(0).normal((4096,), torch.tensor([0]), 0)
    correlation = float((here * other).mean())
    assert abs(correlation) < 4.5 / math.sqrt(4096)


def test_uniform_numbers_lie_strictly_between_zero_and_one_evenly():
    values = NoiseSource(0).uniform((1000,), torch.arange(300), 0)
    assert values.dtype == torch.float64 and values.shape == (300, 1000)
    assert float(values.min()) > 0.0 and float(values.max()) < 1.0
    counts = torch.bincount((values.flatten() * 20).long(), minlength=20)
    assert float((counts - 15000).abs().max()) < 4.5 * math.sqrt(15000)


def test_noise_for_samples_is_the_source_at_each_step():
    indices = torch.tensor([3, 9])
    noise = NoiseSource(5).for_samples((2, 2), indices)
    assert torch.equal(noise(7), NoiseSource(5).normal((2, 2), indices, 7)) and noise(7).dtype == torch.float32


def test_numbers_do_not_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    NoiseSource(0).normal((10,), torch.arange(3), 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match="from 0 to 2"):
        NoiseSource(seed)


@pytest.mark.parametrize(
    ("indices", "step", "named"),
    [
        (torch.arange(2), -1, "step"),
        (torch.arange(2), 2**32, "step"),
        (torch.tensor([-1]), 0, "indices must lie in 0"),
        (torch.tensor([2**32]), 0, "indices must lie in 0"),
        (torch.tensor([0.7]), 0, "whole numbers"),
        (torch.zeros(2, 2, dtype=torch.int64), 0, "vector"),
        ([0, 1], 0, "vector"),
    ],
)
def test_address_out_of_range_is_refused(indices, step, named):
    with pytest.raises(ValueError, match=named):
        NoiseSource(0).normal((2,), indices, step)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_bernoulli_is_true_where_the_uniform_number_is_below_the_share(share):
    indices = torch.tensor([4, 0, 2**32 - 1])
    drawn = NoiseSource(3).bernoulli(share, (5, 7), indices, 2)
    assert torch.equal(drawn, NoiseSource(3).uniform((5, 7), indices, 2) < share)


def test_share_out_of_range_is_refused():
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="share must lie in 0 to 1"):
            NoiseSource(0).bernoulli(share, (2,), torch.arange(2), 0)
