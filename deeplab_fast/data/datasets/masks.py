"""The numbers that mask files hold."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from deeplab_fast.data.classes import Colour
from deeplab_fast.data.datasets.sbd import read_sbd
from deeplab_fast.data.images import (
    ImageReadError,
    check_format,
    load_upright,
    one_line,
    open_regular,
)

__all__ = ["ColourError", "read_mask"]

# Formats that change values (some have lossless forms, which the file name does not tell).
_LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")


# As Pillow names TIFF's.
_LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp")


class ColourError(ValueError):
    """Colours that stand for no class.

    Attributes:
        path: of the mask.
        colours: pixels by colour.
        palette: whether they are a palette's, so that numbers may be meant.
    """

    def __init__(self, path: str, colours: Mapping[Colour, int], palette: bool = False) -> None:
        super().__init__(path, colours, palette)
        self.path = path
        self.colours = dict(colours)
        self.palette = palette

    @property
    def cure(self) -> str:
        """What to do with a palette, "" without one."""
        if not self.palette:
            return ""
        return (
            "; this palette picture is read by its colours: where its indices are the class "
            "numbers, leave --mask-colours out"
        )

    def __str__(self) -> str:
        return f"{self.path}: {len(self.colours)} colours that stand for no class{self.cure}"


def read_mask(
    path: str | os.PathLike[str],
    colours: Mapping[Colour, int] | None = None,
    *,
    unknown: int | None = None,
) -> np.ndarray:
    """The numbers that a mask file holds, [H, W], uint8, or int32 where they need it.

    Without ``colours`` palette pictures give their indices; grey ones of 2 and 4 bits their stored
    values, which Pillow spreads over 0..255; colour ones of 8 bits whose three channels are equal,
    and opaque, that channel. A picture is turned by its EXIF orientation. ``.npy`` holds the array;
    ``.mat`` is SBD's form.

    Args:
        path: the file.
        colours: numbers that exact colours (R, G, B) of 8 bits stand for, in grey pictures those
            with three equal parts, in palette pictures those of the palette, whose order is any.
            Arrays give their numbers all the same.
        unknown: what a colour stands for that ``colours`` has not.

    Raises:
        ImageReadError: a file that is missing, damaged, lossy, partly transparent, of floats or,
            without ``colours``, in colour; says which.
        ColourError: colours that ``colours`` has not, without ``unknown``.
    """
    path = Path(path)
    reader = {".npy": _read_npy, ".mat": _read_sbd}.get(path.suffix.lower())
    with open_regular(path) as file:
        try:
            if reader is not None:
                return reader(file, path)
            return _read_picture(file, path, colours, unknown)
        except (ImageReadError, ColourError):
            raise
        # Damaged files raise almost any exception type.
        except Exception as error:
            raise ImageReadError(str(path), one_line(error)) from error


def _read_picture(
    file: BinaryIO, path: Path, colours: Mapping[Colour, int] | None, unknown: int | None
) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as image:
        check_format(image, str(path))
        kind = image.format
        if kind == "TIFF" and image.info.get("compression") in _LOSSY_COMPRESSIONS:
            kind = f"TIFF with {image.info['compression']} compression"
        if kind != image.format or kind in _LOSSY_FORMATS:
            raise ImageReadError(
                str(path), f"{kind} does not keep class numbers; store masks as PNG"
            )
        mode = image.mode
        # Decoding empties the list of tiles, which alone tells the bits a pixel.
        tile = image.tile[0] if image.tile else None
        arguments = "" if tile is None else tile.args
        raw_mode = str(arguments[0] if isinstance(arguments, tuple) else arguments)
        if kind == "PPM" and (mode == "1" or (tile is not None and tile.codec_name != "raw")):
            raise ImageReadError(
                str(path),
                "a PBM, or a PGM in text or with a largest value other than 255, whose numbers "
                "Pillow changes; store masks as PNG",
            )
        if mode == "F":
            raise ImageReadError(
                str(path), "float samples; a mask holds class numbers: store it with integers"
            )
        wide = "16" in raw_mode and not mode.startswith("I")
        if wide or mode not in (*_MASK_MODES, *_EQUAL_CHANNELS):
            bits = " of 16 bits a channel" if wide else ""
            # Pillow opens it as RGBA.
            grey = raw_mode.startswith("LA")
            what = "a grey picture with transparency" if grey else "a colour picture"
            said = "" if grey else f" (mode {mode})"
            hint = "" if grey else f"; {_COLOURS_HINT} in pictures of 8 bits"
            raise ImageReadError(str(path), f"{what}{bits}{said}; {_ONE_CHANNEL}{hint}")
        load_upright(image)
        if colours and mode in ("P", "L", "1", *_EQUAL_CHANNELS):
            rgba = np.asarray(image.convert("RGBA"))
            _opaque(rgba, mode, path)
            return _of_colours(rgba, path, colours, unknown, palette=mode == "P")
        values = np.asarray(image)
    if mode in _EQUAL_CHANNELS:
        return _equal_channel(values, mode, path)
    if raw_mode in ("L;2", "L;4"):
        return values // (85 if raw_mode == "L;2" else 17)
    return _as_labels(values, path)


_MASK_MODES = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L")


# Modes of several channels that may hold one number in all of them.
_EQUAL_CHANNELS = ("RGB", "RGBA", "LA")


_ONE_CHANNEL = "a mask holds class numbers in one channel, grey or palette"


_COLOURS_HINT = "where colours stand for classes, --mask-colours FILE names them"


def _opaque(values: np.ndarray, mode: str, path: Path) -> np.ndarray:
    """The channels without alpha, which must be 255 throughout."""
    if mode in ("RGBA", "LA", "P"):
        clear = int((values[..., -1] != 255).sum())
        if clear:
            raise ImageReadError(
                str(path),
                f"{clear} pixels are transparent (mode {mode}), and whether their class numbers "
                "count is not told; store the mask without transparency",
            )
        values = values[..., :-1]
    return values


def _equal_channel(values: np.ndarray, mode: str, path: Path) -> np.ndarray:
    values = _opaque(values, mode, path)
    different = int((values != values[..., :1]).any(-1).sum())
    if different:
        raise ImageReadError(
            str(path),
            f"a colour picture (mode {mode}, red, green and blue differ in {different} pixels); "
            f"{_ONE_CHANNEL}; {_COLOURS_HINT}",
        )
    return np.ascontiguousarray(values[..., 0])


def _of_colours(
    values: np.ndarray,
    path: Path,
    colours: Mapping[Colour, int],
    unknown: int | None,
    *,
    palette: bool,
) -> np.ndarray:
    """Numbers by colour of uint8 [H, W, 4], whatever the fourth channel holds."""
    height, width = values.shape[:2]
    codes = np.ascontiguousarray(values).view("<u4").ravel() & 0xFFFFFF
    # Masks are made of runs of one colour, of which one each is looked up.
    starts = np.flatnonzero(np.concatenate(([True], codes[1:] != codes[:-1])))
    heads, lengths = codes[starts], np.diff(starts, append=len(codes))
    known = sorted((red | green << 8 | blue << 16, n) for (red, green, blue), n in colours.items())
    keys = np.array([code for code, _ in known], dtype=np.uint32)
    numbers = np.array([n for _, n in known], dtype=np.int32)
    places = np.searchsorted(keys, heads).clip(max=len(keys) - 1)
    found, heads_known = numbers[places], keys[places] == heads
    if not heads_known.all():
        if unknown is None:
            missing = ~heads_known
            other, inverse = np.unique(heads[missing], return_inverse=True)
            counts = np.bincount(inverse, lengths[missing]).astype(int)
            shown = ((c & 255, c >> 8 & 255, c >> 16) for c in other.tolist())
            found_here = dict(zip(shown, counts.tolist(), strict=True))
            raise ColourError(str(path), found_here, palette)
        found = np.where(heads_known, found, unknown)
    fits = found.min() >= 0 and found.max() <= 255
    found = found.astype(np.uint8 if fits else np.int32)
    return np.repeat(found, lengths).reshape(height, width)


def _read_npy(file: BinaryIO, path: Path) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, by_columns, dtype = readers[version](file)
    # Whatever evaluating a wrong header raises.
    except Exception as error:
        raise ImageReadError(str(path), f"no array of numpy.save: {one_line(error)}") from error
    # Before anything of the size that the header claims is made.
    if len(shape) != 2 or min(shape) < 1:
        raise ImageReadError(str(path), f"an array {list(shape)[:5]}, expected [H, W]")
    if dtype.kind not in "biu":
        raise ImageReadError(str(path), f"an array of {dtype!s:.60}, expected integers")
    size = math.prod(shape) * dtype.itemsize
    have = os.fstat(file.fileno()).st_size - file.tell()
    if size != have:
        raise ImageReadError(
            str(path),
            f"{have} bytes of values, and an array {list(shape)} of {dtype} has {size}; the file "
            "is damaged or was cut: store it again",
        )
    values = np.frombuffer(file.read(), dtype)
    values = values.reshape(shape[::-1]).T if by_columns else values.reshape(shape)
    return _as_labels(np.array(values, order="C"), path)


def _read_sbd(file: BinaryIO, path: Path) -> np.ndarray:
    return _as_labels(np.ascontiguousarray(read_sbd(file)), path)


def _as_labels(values: np.ndarray, path: Path) -> np.ndarray:
    if values.ndim != 2 or not values.size:
        raise ImageReadError(str(path), f"an array {list(values.shape)}, expected [H, W]")
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if not np.issubdtype(values.dtype, np.integer):
        raise ImageReadError(str(path), f"an array of {values.dtype}, expected integers")
    limits = np.iinfo(np.int32)
    if values.min() < limits.min or values.max() > limits.max:
        raise ImageReadError(str(path), f"values from {values.min()} to {values.max()}")
    return values.astype(np.int32)
