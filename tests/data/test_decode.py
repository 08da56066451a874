from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, features

from sparse_mlp.data import BadImageError, read_image
from sparse_mlp.data.decode import convert_image, image_endings, image_formats

# Every mode of Pillow, and its values for black, middle grey and white; None: refused.
MODES = {
    "1": None,
    "L": (0, 128, 255),
    "LA": ((0, 255), (128, 255), (255, 255)),
    "La": ((0, 255), (128, 255), (255, 255)),
    "P": None,
    "PA": None,
    "RGB": ((0, 0, 0), (128, 128, 128), (255, 255, 255)),
    "RGBA": ((0, 0, 0, 255), (128, 128, 128, 255), (255, 255, 255, 255)),
    "RGBa": ((0, 0, 0, 255), (128, 128, 128, 255), (255, 255, 255, 255)),
    "RGBX": ((0, 0, 0, 0), (128, 128, 128, 0), (255, 255, 255, 0)),
    "CMYK": ((0, 0, 0, 255), (0, 0, 0, 127), (0, 0, 0, 0)),
    "YCbCr": ((0, 128, 128), (128, 128, 128), (255, 128, 128)),
    "HSV": ((0, 0, 0), (0, 0, 128), (0, 0, 255)),
    "LAB": ((0, 128, 128), (137, 128, 128), (255, 128, 128)),
    "I;16": (0, 32896, 65535),
    "I;16L": (0, 32896, 65535),
    "I;16B": (0, 32896, 65535),
    "I;16N": (0, 32896, 65535),
}
WRONG = {"I": 32896, "F": 0.5}


def three(mode: str) -> Image.Image:
    """Three pixels: black, middle grey (in mode 1 black) and white."""
    if mode == "1":
        return Image.fromarray(np.array([[0, 0, 255]], dtype=np.uint8)).convert("1")
    if mode in ("P", "PA"):
        image = Image.new("P", (3, 1))
        image.putpalette([255, 255, 255, 128, 128, 128, 0, 0, 0])
        image.putdata([2, 1, 0])
        return image.convert("PA") if mode == "PA" else image
    image = Image.new(mode, (3, 1))
    for x, value in enumerate(MODES[mode]):
        image.putpixel((x, 0), value)
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_black_grey_and_white_of_every_mode_stay_what_they_are(mode: str, channels: int):
    if mode == "LAB" and not features.check("littlecms2"):
        pytest.skip("Pillow without littlecms")
    pixels = np.asarray(convert_image(three(mode), channels)).reshape(3, channels)
    expected = [0, 0 if mode == "1" else 128, 255]
    assert np.abs(pixels.astype(int) - np.array(expected)[:, None]).max() <= 1


@pytest.mark.parametrize("mode", WRONG)
def test_modes_without_a_white_are_refused(mode: str):
    with pytest.raises(BadImageError, match="no agreed white; save it with 8 or 16 bits"):
        convert_image(Image.new(mode, (2, 2), WRONG[mode]), 1)


def test_the_table_has_every_mode_of_pillow():
    known = set(MODES) | set(WRONG)
    possible = {f"{base}{end}" for base in ("I;16", "I;32") for end in ("", "L", "B", "N", "S")} | set(Image.ENCODERS)
    possible |= {
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "LAB",
        "I",
        "F",
    }
    missing = []
    for mode in possible - known:
        try:
            Image.new(mode, (1, 1))
            missing.append(mode)
        except (ValueError, KeyError):
            pass
    assert missing == []


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path, transparency: int | bytes):
    image = three("P")
    image.save(tmp_path / "a.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.asarray(read_image(tmp_path / "a.png", 3))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("grey.png", np.array([[0, 257 * 77, 65535]], dtype=np.uint16), [0, 77, 255]),
        ("grey.tiff", np.array([[0, 257 * 77, 65535]], dtype=np.uint16), [0, 77, 255]),
        ("grey.pgm", np.array([[0, 257 * 77, 65535]], dtype=np.uint16), [0, 77, 255]),
        ("float.tiff", np.array([[0, 0.3, 1]], dtype=np.float32), "floating point numbers"),
        ("int.tiff", np.array([[0, 77, 255]], dtype=np.int32), "32-bit integers"),
    ],
)
def test_grey_files_of_more_than_eight_bits(tmp_path: Path, name: str, values: np.ndarray, expected: list[int] | str):
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    if isinstance(expected, str):
        with pytest.raises(BadImageError, match=expected) as error:
            read_image(tmp_path / name, 3)
        assert name in str(error.value) and "\n" not in str(error.value)
    else:
        assert np.asarray(read_image(tmp_path / name, 1))[0].tolist() == expected
        assert np.asarray(read_image(tmp_path / name, 3))[0, :, 1].tolist() == expected


@pytest.mark.parametrize(
    ("bits", "photometric", "pixels", "expected"),
    [
        (16, 1, b"\0\0\xff\xff", [0, 255]),
        (16, 0, b"\0\0\xff\xff", [255, 0]),
        (12, 1, b"\x00\x0f\xff\0", [0, 255]),
        (8, 0, b"\0\xff\0\0", [255, 0]),
    ],
)
def test_tiff_says_how_many_bits_there_are_and_which_end_is_white(
    tmp_path: Path, bits: int, photometric: int, pixels: bytes, expected: list[int]
):
    """Two pixels in a file written by hand: header, pixels, one directory of tags."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1), (279, 4)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 12) + pixels + directory + bytes(4))
    assert np.asarray(read_image(tmp_path / "a.tif", 1))[0].tolist() == expected


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_come_upright(tmp_path: Path, ending: str, orientation: int):
    lying = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((16, 16), np.uint8)))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a.{ending}"
    lying.save(path, exif=exif)
    with path.open("rb") as file:  # from a path Pillow confuses the sides of a TIFF
        expected = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("L"))
    found = read_image(path, 1)
    assert np.array_equal(np.asarray(found), expected)
    assert found.size == ((48, 32) if orientation < 5 else (32, 48))
    assert np.array_equal(np.asarray(convert_image(found, 1)), expected), "turned once, however often it is converted"


def test_damaged_exif_does_not_make_a_bad_image(tmp_path: Path):
    Image.new("L", (8, 8), 90).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage")
    assert np.asarray(read_image(tmp_path / "a.jpg", 1)).mean() == 90


def encoded(ending: str) -> bytes:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    content = io.BytesIO()
    more = {"save_all": True, "append_images": [image.rotate(90)]} if ending == ".gif" else {}
    image.save(content, Image.registered_extensions()[ending], **more)
    return content.getvalue()


SAVED = (".gif", ".png", ".jpg", ".webp", ".avif", ".bmp", ".tif", ".ppm", ".tga", ".qoi", ".pcx")


@pytest.mark.parametrize("ending", [end for end in SAVED if end in image_endings()])
def test_a_file_cut_anywhere_is_a_bad_image_or_the_whole_one(tmp_path: Path, ending: str):
    content, path = encoded(ending), tmp_path / f"a{ending}"
    path.write_bytes(content)
    whole = np.asarray(read_image(path, 3))
    readable = []
    for length in range(0, len(content), 1 + len(content) // 150):
        path.write_bytes(content[:length])
        try:
            image = read_image(path, 3)
        except BadImageError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            readable.append(length)
            assert np.array_equal(np.asarray(image), whole)
    assert all(length > len(content) - 40 for length in readable), "only a trailer or checksum may be missing"


def test_a_decompression_bomb_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("1", (60, 60)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        BadImageError, match=r"a.png: more than 2,000 pixels; Pillow takes it for a decompression bomb$"
    ):
        read_image(tmp_path / "a.png", 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert read_image(tmp_path / "a.png", 3).size == (60, 60), "large, and no bomb: no warning either"


def test_a_pipe_is_not_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadImageError, match="not a regular file"):
        read_image(tmp_path / "a.png", 3)


def test_postscript_is_not_handed_to_another_program(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    with pytest.raises(BadImageError, match=r"images ending in \.eps are not read$"):
        read_image(tmp_path / "a.eps", 3)
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(BadImageError, match=r"not an image$"):
        read_image(tmp_path / "a.jpg", 3)
    assert "EPS" not in image_formats() and ".eps" not in image_endings()


def test_common_endings_are_read():
    assert {".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm"} <= image_endings()
