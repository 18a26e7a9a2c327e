"""Pixels keep their meaning: modes, bit depths, colour profiles, transparency."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.data.shards import Manifest, open_split
from pipelines.preparation.data_set import write_data_set
from pipelines.preparation.decoding import Transform
from pipelines.preparation.sources import SourceSettings, open_source

GREY, COLOUR = Transform(8, 1, 0), Transform(8, 3, 0)
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def stored(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The image as Pillow reads it from a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    opened = Image.open(io.BytesIO(buffer.getvalue()))
    opened.load()
    return opened


def png16(colour_type: int, rows: np.ndarray, transparent: tuple[int, ...] = ()) -> Image.Image:
    """A PNG with 16 bits per channel from (H, W, C) values."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = rows.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    clear = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    body = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + clear + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    opened = Image.open(io.BytesIO(content))
    opened.load()
    return opened


def tiff12(values: np.ndarray) -> Image.Image:
    """A grey TIFF with 12 bits per pixel. The width of ``values`` is even."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12) | pairs[:, 1]
    body = b"".join(int(pair).to_bytes(3, "big") for pair in packed)
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (279, len(body))])
    padding = b"\0" * (len(body) % 2)
    start = 8 + len(body) + len(padding)
    content = struct.pack("<2sHI", b"II", 42, start) + body + padding + struct.pack("<H", len(tags) + 1) + entries
    opened = Image.open(io.BytesIO(content + b"\0" * 4))
    opened.load()
    return opened


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
def test_sixteen_bit_grey_is_scaled(kind: str) -> None:
    image = stored(Image.fromarray(RAMP.astype(np.uint16) * 257), kind)
    assert image.mode.startswith("I")
    assert np.array_equal(GREY(image)[..., 0], RAMP)
    assert np.array_equal(COLOUR(image), np.repeat(RAMP[..., None], 3, axis=2))


def test_every_sixteen_bit_mode_is_scaled() -> None:
    values = RAMP.astype(np.uint16) * 257
    for mode, dtype in (("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2")):
        image = Image.frombytes(mode, (8, 8), values.astype(dtype).tobytes())
        assert np.array_equal(GREY(image)[..., 0], RAMP), mode
    big_endian = Image.open(io.BytesIO(struct.pack(">2sHI", b"MM", 42, 8) + _ifd_of(values)))
    assert np.array_equal(GREY(big_endian)[..., 0], RAMP)


def _ifd_of(values: np.ndarray) -> bytes:
    tags = [
        (256, 8),
        (257, 8),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8 + 2 + 9 * 12 + 4),
        (277, 1),
        (278, 8),
        (279, 128),
    ]
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack(">H", 9) + entries + b"\0" * 4 + values.astype(">u2").tobytes()


def test_twelve_bit_tiff_is_scaled_to_its_own_range() -> None:
    image = tiff12(np.linspace(0, 4095, 64).round().astype(int).reshape(8, 8))
    assert image.mode == "I;16"
    assert (GREY(image).min(), GREY(image).max()) == (0, 255)


def test_sixteen_bit_tiff_with_white_as_zero_is_inverted() -> None:
    image = stored(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(GREY(image)[..., 0], 255 - RAMP)


def test_pgm_with_another_maximum_is_scaled() -> None:
    content = b"P5 8 8 1023\n" + np.linspace(0, 1023, 64).round().astype(">u2").tobytes()
    image = Image.open(io.BytesIO(content))
    assert (GREY(image).min(), GREY(image).max()) == (0, 255)


def test_integers_that_fit_16_bits_are_scaled_and_others_refused_with_their_range() -> None:
    values = RAMP.astype(np.int32) * 257
    assert np.array_equal(GREY(stored(Image.fromarray(values), "TIFF"))[..., 0], RAMP)
    assert np.array_equal(COLOUR(Image.fromarray(values))[..., 1], RAMP)
    for other, text in (
        (values - 1, "from -1 to"),
        (values + 1000, "to 65764"),
        (RAMP.astype(np.int32), "8 or 16 bits"),
    ):
        with pytest.raises(ValueError, match=text):
            GREY(stored(Image.fromarray(other), "TIFF"))
    assert (GREY(Image.fromarray(values * 0)) == 0).all()


def test_floats_from_0_to_1_are_scaled_and_others_refused_with_their_range() -> None:
    values = RAMP.astype(np.float32) / np.float32(255)
    assert np.array_equal(GREY(stored(Image.fromarray(values), "TIFF"))[..., 0], RAMP)
    assert np.array_equal(COLOUR(Image.fromarray(values))[..., 2], RAMP)
    for other, text in (
        (values * 255, "from 0 to 252"),
        (values - 0.5, "from -0.5"),
        (values * np.nan, "from nan to nan"),
    ):
        with pytest.raises(ValueError, match=text):
            GREY(stored(Image.fromarray(other), "TIFF"))


def test_transparency_of_sixteen_bit_images_shows_the_background() -> None:
    behind = Transform(8, 3, 77)
    grey = RAMP.astype(np.uint16)[..., None] * 257
    clear = png16(0, grey, (int(grey[2, 3, 0]),))
    expected = RAMP.copy()
    expected[2, 3] = 77
    assert np.array_equal(behind(clear)[..., 0], expected)
    colour = np.stack([grey[..., 0], grey[..., 0] // 2, grey[..., 0] // 3], axis=2)
    shown = behind(png16(2, colour, tuple(int(v) for v in colour[5, 5])))
    assert (shown[5, 5] == 77).all()
    assert np.array_equal(shown[0, 1], colour[0, 1] >> 8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_image_is_turned_as_its_exif_says(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = stored(Image.fromarray(RAMP), kind, exif=exif)
    deep = stored(Image.fromarray(RAMP.astype(np.uint16) * 257), kind, exif=exif)
    assert np.array_equal(GREY(deep), GREY(turned))
    assert not np.array_equal(GREY(deep)[..., 0], RAMP)


def test_every_mode_reads_the_same_at_1_and_3_channels() -> None:
    grey = Image.fromarray(RAMP)
    lab = ImageCms.profileToProfile(
        grey.convert("RGB"), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    images = [grey.convert(mode) for mode in ("L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")]
    images += [grey.convert("RGBA").convert("RGBa"), grey.convert("LA").convert("La"), lab, stored(lab, "TIFF")]
    for image in images:
        shown = COLOUR(image).astype(int)
        assert np.abs(shown - RAMP[..., None]).max() <= 3, image.mode
        assert np.abs(GREY(image)[..., 0] - shown[..., 1]).max() <= 2, image.mode
    one = Image.fromarray(RAMP > 100)
    assert one.mode == "1"
    assert np.array_equal(GREY(one)[..., 0], np.where(RAMP > 100, 255, 0))
    assert np.array_equal(COLOUR(one)[..., 0], GREY(one)[..., 0])


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "RGBa", "La", "1", "L", "PA"])
def test_clear_pixels_show_the_background_in_every_mode(mode: str) -> None:
    if mode in ("P", "1", "L"):
        image = Image.new(mode, (8, 8), 0)
        image.info["transparency"] = 0
    else:
        image = Image.new("RGBA", (8, 8), (200, 200, 200, 0))
        image = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    assert image.mode == mode
    for channels in (1, 3):
        assert (Transform(8, channels, 90)(image) == 90).all()


def test_palette_with_alpha_shows_the_background() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0] * 256, "RGBA")
    assert (Transform(8, 3, 90)(image) == 90).all()


def swapped_profile() -> bytes:
    """sRGB with red and green exchanged."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return content.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def grey_profile(gamma: float) -> bytes:
    """A profile for grey images with this exponent."""
    curve = struct.pack(">4sIIH2x", b"curv", 0, 1, round(gamma * 256))
    white = struct.pack(">4sIIII", b"XYZ ", 0, 0xF6D6, 0x10000, 0xD32D)
    name = struct.pack(">4sII", b"desc", 0, 5) + b"grey\0" + b"\0" * 79
    start = 128 + 4 + 3 * 12
    table, body = struct.pack(">I", 3), b""
    for tag, data in ((b"kTRC", curve), (b"wtpt", white), (b"desc", name)):
        table += struct.pack(">4sII", tag, start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    header = bytearray(128)
    struct.pack_into(">I4sI4s4s4s", header, 0, start + len(body), b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    header[36:40] = b"acsp"
    struct.pack_into(">III", header, 68, 0xF6D6, 0x10000, 0xD32D)
    return bytes(header) + table + body


RED = Image.new("RGB", (8, 8), (255, 0, 0))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_colours_are_converted_from_the_embedded_profile(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    shown, problem = COLOUR.convert(stored(RED, kind, icc_profile=swapped_profile(), **options))
    assert problem is None
    assert np.abs(shown.astype(int) - [0, 255, 0]).max() <= 2
    grey = GREY(stored(RED, kind, icc_profile=swapped_profile(), **options))
    assert abs(int(grey[0, 0, 0]) - 150) <= 2


def test_profile_is_used_with_palettes_and_transparency() -> None:
    half = RED.copy()
    half.putalpha(Image.fromarray(np.where(RAMP < 128, 0, 255).astype(np.uint8)))
    for image in (half, half.convert("PA")):
        image.info["icc_profile"] = swapped_profile()
        shown = Transform(8, 3, 9)(image)
        assert np.abs(shown[7, 7].astype(int) - [0, 255, 0]).max() <= 1
        assert shown[0, 0].tolist() == [9, 9, 9]
    palette = RED.convert("P", palette=Image.Palette.ADAPTIVE)
    shown = COLOUR(stored(palette, "PNG", icc_profile=swapped_profile()))
    assert np.abs(shown.astype(int) - [0, 255, 0]).max() <= 1


def test_grey_profile_changes_grey_images_of_8_and_16_bits() -> None:
    linear = grey_profile(1.0)
    deep = Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16))
    for image in (Image.new("L", (8, 8), 128), Image.new("LA", (8, 8), (128, 255)), deep):
        for transform in (GREY, COLOUR):
            shown, problem = transform.convert(stored(image, "PNG", icc_profile=linear))
            assert problem is None
            assert abs(int(shown[0, 0, 0]) - 188) <= 1, "half of the light is 188 in sRGB"


def test_srgb_profile_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(COLOUR(stored(Image.fromarray(pixels), "PNG", icc_profile=profile)), pixels)
    assert np.array_equal(GREY(stored(Image.fromarray(RAMP), "PNG", icc_profile=profile))[..., 0], RAMP)


@pytest.mark.parametrize(
    ("image", "profile"),
    [
        (RED, b"no profile"),
        (RED, swapped_profile()[:200]),
        (RED, grey_profile(1.0)),
        (RED.convert("CMYK"), swapped_profile()),
        (RED.convert("RGBA"), b"no profile"),
    ],
)
def test_profile_that_cannot_be_used_is_ignored_with_a_reason(image: Image.Image, profile: bytes) -> None:
    without, nothing = COLOUR.convert(image.copy())
    image = image.copy()
    image.info["icc_profile"] = profile
    shown, problem = COLOUR.convert(image)
    assert nothing is None
    assert problem is not None and "profile" in problem
    assert np.array_equal(shown, without)


def prepared(root: Path, folder: Path, skip_broken: bool = False) -> Manifest:
    folder.mkdir(exist_ok=True)
    source = open_source(SourceSettings("folder", root=str(root)))
    return write_data_set(
        folder, source, COLOUR, test_fraction=0.5, max_images=None, skip_broken=skip_broken, shard_size=100, seed=0
    )


def test_manifest_names_ignored_profiles_and_images_without_a_clear_range(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png", icc_profile=b"broken")
    manifest = prepared(tmp_path / "images", tmp_path / "data")
    assert len(manifest.ignored_profiles) == 6
    assert any(name.startswith("cat/0.png (unreadable profile") for name in manifest.ignored_profiles)
    Image.fromarray(np.full((8, 8), 300.0, dtype=np.float32)).save(tmp_path / "images" / "dog" / "far.tiff")
    with pytest.raises(ValueError, match=r"broken image .*dog/far.tiff \(float pixels from 300 to 300"):
        prepared(tmp_path / "images", tmp_path / "data")
    assert (
        prepared(tmp_path / "images", tmp_path / "data", skip_broken=True).skipped[0].startswith("dog/far.tiff (float")
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated_image_uses_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(image, "n_frames", 1) == 2
    assert np.array_equal(COLOUR(image)[0, 0], [255, 0, 0])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow also warns of damaged tags
def test_damaged_files_are_named_whatever_pillow_raises(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    (tmp_path / "images" / "dog").mkdir()
    for number in range(4):
        Image.fromarray(RAMP + number).save(folder / f"whole{number}.png")
        Image.fromarray(RAMP.T + number).save(tmp_path / "images" / "dog" / f"{number}.png")
    for kind in ("png", "gif", "tiff", "bmp", "webp", "ppm", "tga", "ico", "jpg"):
        buffer = io.BytesIO()
        Image.fromarray(RAMP).save(buffer, {"jpg": "JPEG"}.get(kind, kind.upper()))
        for number in range(8):
            content = bytearray(buffer.getvalue())
            for position in rng.integers(0, min(len(content), 120), 6):
                content[position] = rng.integers(0, 256)
            (folder / f"{number}.{kind}").write_bytes(content)
    manifest = prepared(tmp_path / "images", tmp_path / "data", skip_broken=True)
    total = len(list(folder.iterdir())) + 4
    assert sum(manifest.counts.values()) + len(manifest.skipped) == total
    assert len(open_split(tmp_path / "data", "train")) == manifest.counts["train"]
