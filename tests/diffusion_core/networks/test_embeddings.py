import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.networks.embeddings import sinusoidal_embedding


@given(t=st.integers(0, 4000), half=st.integers(2, 64), cos_first=st.booleans(), shift=st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_embedding_is_the_formula_written_out(t, half, cos_first, shift):
    sines, cosines = [], []
    for i in range(half):
        frequency = 10_000.0 ** (-i / (half - shift))
        sines.append(math.sin(t * frequency))
        cosines.append(math.cos(t * frequency))
    expected = torch.tensor(cosines + sines if cos_first else sines + cosines)
    got = sinusoidal_embedding(torch.tensor([t]), 2 * half, cos_first=cos_first, frequency_shift=shift)[0]
    # float32 angles up to 4000 are exact to 2.4e-4, their frequencies to some 1e-6 relative
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="even size"):
        sinusoidal_embedding(torch.tensor([0]), 5)
