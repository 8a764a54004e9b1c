"""The numbers that mask files hold."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from deeplab_fast.data.images import ImageReadError, load_upright, one_line

__all__ = ["read_mask"]

# Formats that change values (some have lossless forms, which the file name does not tell).
_LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")


# As Pillow names TIFF's.
_LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp")


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """The numbers that a mask file holds, [H, W], uint8, or int32 where they need it.

    Palette pictures give their indices; grey ones of 2 and 4 bits their stored values, which Pillow
    spreads over 0..255; colour ones of 8 bits whose three channels are equal, and opaque, that
    channel. A picture is turned by its EXIF orientation. ``.npy`` holds the array; ``.mat`` is
    SBD's form (needs scipy).

    Raises:
        ImageReadError: a file that is missing, damaged, lossy, in colour, partly transparent, or of
            floats; says which.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ImageReadError(str(path), error.strerror or str(error)) from error
    if path.is_dir():
        raise ImageReadError(str(path), "this is a folder")
    if size == 0:
        raise ImageReadError(str(path), "the file is empty (0 bytes)")
    reader = {".npy": _read_npy, ".mat": _read_sbd}.get(path.suffix.lower(), _read_picture)
    try:
        return reader(path)
    except ImageReadError:
        raise
    # Damaged files raise almost any exception type.
    except Exception as error:
        raise ImageReadError(str(path), one_line(error)) from error


def _read_picture(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
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
            raise ImageReadError(str(path), f"{what}{bits}{said}; {_ONE_CHANNEL}")
        load_upright(image)
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


def _equal_channel(values: np.ndarray, mode: str, path: Path) -> np.ndarray:
    if mode != "RGB":
        clear = int((values[..., -1] != 255).sum())
        if clear:
            raise ImageReadError(
                str(path),
                f"{clear} pixels are transparent (mode {mode}), and whether their class numbers "
                "count is not told; store the mask without the alpha channel",
            )
        values = values[..., :-1]
    different = int((values != values[..., :1]).any(-1).sum())
    if different:
        raise ImageReadError(
            str(path),
            f"a colour picture (mode {mode}, red, green and blue differ in {different} pixels); "
            f"{_ONE_CHANNEL}",
        )
    return np.ascontiguousarray(values[..., 0])


def _read_npy(path: Path) -> np.ndarray:
    return _as_labels(np.load(path, allow_pickle=False), path)


def _read_sbd(path: Path) -> np.ndarray:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImageReadError(
            str(path),
            "SBD's .mat files need scipy; install it, or use a SegmentationClassAug folder of PNGs",
        ) from error
    return _as_labels(loadmat(path)["GTcls"]["Segmentation"][0, 0], path)


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
