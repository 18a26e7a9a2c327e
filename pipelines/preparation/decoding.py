"""Decode images and bring them to one size and one number of channels."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from pipelines.preparation.sources import Items

CHUNK = 1024
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    UnidentifiedImageError,
    Image.DecompressionBombError,
)
"""Errors of Pillow's decoders for files that they cannot read."""
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, SIGNED = 0, 2
"""Tags of TIFF and their values."""


@dataclass(frozen=True)
class Transform:
    """Conversion to RGB or grey in sRGB over a background, resizing of the shorter side to ``image_size`` (bicubic), centre crop."""

    image_size: int
    channels: int
    background: int

    def describe(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "background": self.background,
            "resize": "shorter side, bicubic",
            "crop": "centre",
        }

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return (H, W, C) uint8. Raises ValueError if the range of the pixels is unclear; see `eight_bits`."""
        return self.convert(image)[0]

    def convert(self, image: Image.Image) -> tuple[np.ndarray, str | None]:
        """Return the pixels, (H, W, C) uint8, and why the image's colour profile was ignored, or None if it was not."""
        image = ImageOps.exif_transpose(eight_bits(image))
        opaque, problem = to_srgb(image)
        if image.has_transparency_data:
            alpha = _with_alpha(image).getchannel("A")
            behind = Image.new("RGBA", image.size, (self.background,) * 3 + (255,))
            opaque = opaque.convert("RGB")
            opaque.putalpha(alpha)
            opaque = Image.alpha_composite(behind, opaque)
        image = opaque.convert("L" if self.channels == 1 else "RGB")
        width, height = image.size
        if (width, height) != (self.image_size, self.image_size):
            scale = self.image_size / min(width, height)
            size = (max(round(width * scale), self.image_size), max(round(height * scale), self.image_size))
            image = image.resize(size, Image.Resampling.BICUBIC)
            left, top = (size[0] - self.image_size) // 2, (size[1] - self.image_size) // 2
            image = image.crop((left, top, left + self.image_size, top + self.image_size))
        pixels = np.asarray(image, dtype=np.uint8).reshape(self.image_size, self.image_size, self.channels)
        return pixels, problem


def is_readable(items: Items, index: int, transform: Transform) -> bool:
    """Return False if the image is broken."""
    try:
        transform(items.load(index))
    except BROKEN:
        return False
    return True


def eight_bits(image: Image.Image) -> Image.Image:
    """Return the image with 8 bits per channel; one that has them comes back as it is.

    16-bit grey is divided by 257, 12-bit TIFF scaled alike. 32-bit integers from 0 to 65535 count as 16-bit grey, floats from
    0 to 1 are multiplied by 255. Raises ValueError, with the range, for other integers and floats, and for integers up to 255,
    which may be 8 or 16 bits.
    """
    clear = image.info.get("transparency")
    if not (image.mode.startswith("I") or image.mode == "F"):
        if isinstance(clear, tuple) and max(clear) > 255:  # a PNG with 16 bits per channel: Pillow gives the upper 8
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        return image
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"float pixels from {low:g} to {high:g}: only 0 to 1 has one meaning, convert it to 8 bits"
            )
        scaled = values * 255.0
    elif image.mode == "I":
        if low < 0 or high > 65535 or (tags.get(SAMPLE_FORMAT) in (SIGNED, (SIGNED,)) and _bits(tags) == 16):
            raise ValueError(f"integer pixels from {low} to {high}: only unsigned 16 bits have one meaning, convert it")
        if 0 < high <= 255 and image.format not in ("PNG", "PPM"):  # Pillow gives these two in 16 bits
            raise ValueError(
                f"32-bit pixels from {low} to {high}: they may mean 8 or 16 bits, convert it to one of them"
            )
        scaled = values / 257.0
    else:
        scaled = values * (255.0 / (2 ** _bits(tags) - 1))
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            scaled = 255.0 - scaled
    grey = Image.fromarray(np.rint(scaled).astype(np.uint8))
    if isinstance(clear, int | float):
        alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        grey = Image.merge("LA", (grey, alpha))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
    if orientation := image.getexif().get(0x0112):
        grey.getexif()[0x0112] = orientation
    return grey


def to_srgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """Return the image without transparency, converted from its embedded colour profile to sRGB.

    A profile that cannot be read, or is for another kind of colours than the image has, is ignored: the second value is the
    reason, otherwise None.
    """
    profile = image.info.get("icc_profile")
    opaque = _with_alpha(image).convert("RGB") if image.has_transparency_data else image
    if opaque.mode == "LAB":
        opaque = opaque.convert("RGB")
    if not profile or image.mode == "LAB":  # LAB is a colour space of its own
        return opaque, None
    grey = image.mode in ("1", "L", "LA", "La")
    try:
        space, convert = _conversion(bytes(profile))
        if space == "GRAY" and grey:
            source = opaque.convert("L")
        elif space == "RGB" and image.mode != "CMYK":
            source = opaque.convert("RGB")
        elif space == "CMYK" and image.mode == "CMYK":
            source = opaque
        else:
            return opaque, f"the profile is for {space} colours, the image has mode {image.mode}"
        converted = ImageCms.applyTransform(source, convert)
        assert converted is not None
        return converted, None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return opaque, f"unreadable profile: {' '.join(str(error).split())}"


@functools.lru_cache(maxsize=64)
def _conversion(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform]:
    """Return the colour space that a profile is for and the conversion from it to sRGB."""
    opened = ImageCms.getOpenProfile(BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space)
    if mode is None:
        raise ValueError(f"it is for {space} colours")
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    return space, ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)


def _with_alpha(image: Image.Image) -> Image.Image:
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _bits(tags: Any) -> int:
    """Return the bits per sample that the tags of a TIFF name, 16 if there are none."""
    bits = tags.get(BITS_PER_SAMPLE, 16)
    return int(bits[0] if isinstance(bits, tuple) else bits)


def decode(
    items: Items,
    indices: np.ndarray,
    transform: Transform,
    skip_broken: bool,
    skipped: list[str],
    ignored_profiles: list[str],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of (images (n, H, W, C) uint8, labels (n,) int64) in the order of ``indices``.

    With ``skip_broken``, broken images are skipped and their names appended to ``skipped``. Otherwise the first one raises
    a ValueError with its name. The names of images whose colour profile was ignored are appended to ``ignored_profiles``.
    """
    shape = (transform.image_size, transform.image_size)
    if items.arrays is not None and items.arrays.shape[1:3] == shape:
        arrays = items.arrays[..., None] if items.arrays.ndim == 3 else items.arrays
        if arrays.shape[-1] == transform.channels:
            for start in range(0, len(indices), CHUNK):
                rows = indices[start : start + CHUNK]
                yield arrays[rows], items.labels[rows]
            return

    def open_image(index: int) -> tuple[np.ndarray, str | None] | str:
        try:
            return transform.convert(items.load(index))
        except BROKEN as error:
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
            return f"{items.name(index)} ({reason})"

    with ThreadPoolExecutor() as pool:
        remaining = iter(indices.tolist())
        while chunk := list(islice(remaining, CHUNK)):
            images, labels = [], []
            for index, result in zip(chunk, pool.map(open_image, chunk), strict=True):
                if not isinstance(result, str):
                    images.append(result[0])
                    labels.append(items.labels[index])
                    if result[1] is not None:
                        ignored_profiles.append(f"{items.name(index)} ({result[1]})")
                elif skip_broken:
                    skipped.append(result)
                else:
                    raise ValueError(
                        f"broken image {Path(items.root, result)}: repair or remove it, or set prepare.on_broken_image to skip"
                    )
            if images:
                yield np.stack(images), np.asarray(labels, dtype=np.int64)
