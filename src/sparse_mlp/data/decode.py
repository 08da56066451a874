"""Image files of any format and mode as 8-bit grey or RGB, upright."""

from __future__ import annotations

import functools
import os
import re
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageCms

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode by number of channels."""

# Formats that hold pictures and are decoded without another program: Pillow hands EPS to Ghostscript. JPEG 2000 is left
# out because a file that was cut after its header passes for a whole one.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "MPO", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")

_BITS, _PHOTOMETRIC = ExifTags.Base.BitsPerSample, ExifTags.Base.PhotometricInterpretation  # tags of TIFF

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image with this EXIF orientation upright."""


class BadImageError(OSError):
    """An image that cannot be read; the message is one line and names the file."""


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read; AVIF and WebP depend on how Pillow was built."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def image_endings() -> frozenset[str]:
    """Endings of the files that are taken for images, lower case with the dot."""
    return frozenset(end for end, name in Image.registered_extensions().items() if name in image_formats())


def display_name(path: str | os.PathLike[str]) -> str:
    """A file name that any terminal or file takes: control characters and bytes that are not UTF-8 are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: found[0].encode("unicode_escape").decode(), text)


def read_image(path: Path, channels: int) -> Image.Image:
    """Decode an image file as grey (1) or RGB (3), whole, upright by its EXIF orientation.

    Anything but a regular file is refused unopened, for a pipe would block. Raises BadImageError naming the file.
    """
    shown = display_name(path)
    if not path.is_file():
        reason = "not a regular file" if path.exists() else "there is no such file"
        raise BadImageError(f"cannot read image {shown}: {reason}")
    try:
        with path.open("rb") as file:
            return decode_image(file, channels, shown)
    except BadImageError:
        raise
    except OSError as error:
        raise BadImageError(f"cannot read image {shown}: {error.strerror}") from error


def decode_image(file: IO[bytes], channels: int, name: str) -> Image.Image:
    """As `read_image`, from an open file; `name` is what an error calls it.

    Never from a path: Pillow would map the file into memory, where it confuses the sides of a TIFF that lies on one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of it also refuses, or it does not matter to the pixels
            with Image.open(file, formats=image_formats()) as image:
                if image.format == "GIF":
                    _check_end(file)
                image.load()
                return convert_image(image, channels)
    # Pillow's decoders raise whatever the damage leads to: OSError, SyntaxError, ValueError, struct.error, EOFError...
    except Exception as error:
        raise BadImageError(f"cannot read image {name}: {_reason(error, name)}") from error


def _reason(error: Exception, name: str) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        ending = Path(name).suffix.lower()
        known = ending in Image.registered_extensions() and ending not in image_endings()
        return f"images ending in {ending} are not read" if known else "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; Pillow takes it for a decompression bomb"
    return display_name(str(error).split("\n")[0] or type(error).__name__)


def _check_end(file: IO[bytes]) -> None:
    """An animation whose first picture is whole may be cut short later on, which Pillow takes for its end."""
    position = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
    if not file.read().rstrip(b"\0").endswith(b";"):
        raise BadImageError("the file is truncated")
    file.seek(position)


def convert_image(image: Image.Image, channels: int) -> Image.Image:
    """An image of any of Pillow's modes as 8-bit grey (1) or RGB (3), upright by its EXIF orientation.

    Black and white stay black and white: 16-bit values are scaled by their range. Transparency is dropped, as in
    torchvision and timm. Raises BadImageError for 32-bit integers and floating point numbers, which have no
    agreed value for white.
    """
    orientation = _exif_orientation(image)
    image = _to_eight_bit(image)
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
        image.info = {}  # with the orientation, which would turn it again
    return image


def read_orientation(file: IO[bytes]) -> int:
    """EXIF orientation, 1 to 8, of an open image file: how `decode_image` turns it; 1 where it has none."""
    position = file.tell()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=image_formats()) as image:
                found = _exif_orientation(image)
    except Exception:  # a damaged file: `decode_image` names it
        found = None
    file.seek(position)
    return found if found in UPRIGHT else 1


def _exif_orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    # A damaged EXIF block raises different types; the pixels are not affected.
    except Exception:
        return None


def exif_turn(file: IO[bytes]) -> Image.Transpose | None:
    """How `decode_image` turns the image in an open file, which is left at its start; None for one that is upright."""
    file.seek(0)
    return UPRIGHT.get(read_orientation(file))


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """The same picture in a mode that Pillow converts to grey and to RGB without loss of meaning."""
    mode = image.mode
    if mode.startswith("I;16"):
        black, white = _range(image)
        return _scale(image, black, white)
    if mode == "I" and image.format == "PPM":  # a PGM of more than 8 bits, scaled to 16 by Pillow
        return _scale(image, 0, 65_535)
    if mode in ("I", "F"):
        kind = "32-bit integers" if mode == "I" else "floating point numbers"
        raise BadImageError(f"{kind} (mode {mode}) have no agreed white; save it with 8 or 16 bits")
    if mode in ("La", "RGBa"):  # colours multiplied by the transparency
        return image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    if mode in ("P", "PA"):  # by way of RGBA, or Pillow warns of transparency in bytes
        return image.convert("RGBA")
    if mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None
        return converted
    return image.convert("RGB") if mode in ("CMYK", "YCbCr", "HSV", "RGBX") else image


def _range(image: Image.Image) -> tuple[int, int]:
    """The values of black and white. Of TIFF Pillow gives 12 bits the mode of 16, and leaves 0 for white as it is."""
    tags = getattr(image, "tag_v2", {})
    most = 2 ** int(np.ravel(tags.get(_BITS, 16))[0]) - 1
    return (most, 0) if tags.get(_PHOTOMETRIC) == 0 else (0, most)


def _scale(image: Image.Image, black: int, white: int) -> Image.Image:
    values = (np.asarray(image).astype(np.float32) - black) * (255 / (white - black))
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))


def image_from(value: Any, channels: int, name: str) -> Image.Image:
    """A PIL image, uint8 tensor (C, H, W) or uint8 array (H, W, C) or (H, W) as a PIL image, grey (1) or RGB (3).

    Raises BadImageError, which calls it `name`, for anything else.
    """
    if isinstance(value, Image.Image):
        if 0 in value.size:
            raise BadImageError(f"{name} is empty: {value.size[0]} x {value.size[1]} pixels")
        try:
            return convert_image(value, channels)
        except BadImageError as error:
            raise BadImageError(f"{name}: {error}") from error
    array = value.permute(1, 2, 0).numpy() if hasattr(value, "permute") and value.ndim == 3 else np.asarray(value)
    planes = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or planes not in (1, 3, 4):
        found = f"{type(value).__name__} of {array.dtype} {tuple(np.shape(value))}"
        allowed = "a PIL image, a uint8 tensor (C, H, W) or a uint8 array (H, W, C)"
        raise BadImageError(f"{name} is {found}, not {allowed}; normalisation is left to this library")
    if not array.size:
        raise BadImageError(f"{name} is empty: {array.shape[1]} x {array.shape[0]} pixels")
    return convert_image(Image.fromarray(array[..., 0] if array.ndim == 3 and planes == 1 else array), channels)
