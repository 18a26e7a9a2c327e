from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.pictures import labels_by_column, picture_of, png


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_picture_shows_every_image_in_its_place_on_white(channels: int, mode: str) -> None:
    images = torch.arange(5 * channels, dtype=torch.uint8).view(5, channels, 1, 1).expand(5, channels, 4, 6) * 10
    picture = picture_of(images, columns=3, scale=2, gap=1)
    assert picture.mode == mode
    pixels = np.asarray(picture).reshape(2 * 9 + 1, 3 * 13 + 1, channels)
    expected = np.full_like(pixels, 255)
    for index in range(5):
        top, left = 1 + (index // 3) * 9, 1 + (index % 3) * 13
        expected[top : top + 8, left : left + 12] = images[index, :, 0, 0].numpy()
    assert np.array_equal(pixels, expected)


def test_small_images_are_enlarged_to_32_pixels_and_large_ones_are_kept() -> None:
    assert picture_of(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), columns=2, gap=0).size == (64, 32)
    assert picture_of(torch.zeros(2, 3, 9, 5, dtype=torch.uint8), columns=1, gap=0).size == (20, 72)
    assert picture_of(torch.zeros(2, 3, 40, 20, dtype=torch.uint8), columns=2, gap=0).size == (40, 40)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_image_has_its_gap_and_without_gap_is_the_image_itself(channels: int) -> None:
    image = torch.randint(0, 256, (1, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own = image[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(picture_of(image, 1, scale=1, gap=0)).reshape(own.shape), own)
    framed = np.asarray(picture_of(image, 1, scale=1, gap=2)).reshape(12, 12, channels)
    assert np.array_equal(framed[2:-2, 2:-2], own)
    assert (framed[:2] == 255).all()
    assert (framed[:, -2:] == 255).all()


def test_png_holds_the_pixels_of_the_picture() -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(picture)))), np.asarray(picture))


def test_each_column_of_a_picture_has_one_class() -> None:
    labels = labels_by_column(3, rows=2)
    assert labels.view(2, 3).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert labels_by_column(100, rows=2).view(2, 12)[0].tolist() == list(range(12)), "the first 12 classes"


def test_importing_the_module_does_not_import_torchvision() -> None:
    code = "import sys, pipelines.pictures; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
