import numpy as np
import pytest
import torch

from diffusion_core.checks import check_images, is_whole


def test_integers_of_python_and_numpy_are_whole_and_floats_are_not():
    assert is_whole(3) and is_whole(np.int64(3))
    assert not is_whole(3.0) and not is_whole(np.float32(3)) and not is_whole("3") and not is_whole(None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_batches_of_floats_pass(dtype):
    check_images(torch.zeros(2, 3, dtype=dtype))
    check_images(torch.zeros(2, 3, 4, 4, dtype=dtype))


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(3), np.zeros((2, 3)), [[0.0]], None]
)
def test_anything_except_a_batch_of_floats_is_refused_by_name(images):
    with pytest.raises(ValueError, match="x_T must be a"):
        check_images(images, "x_T")
