"""Reading photos of any common kind as uint8 RGB arrays, and finding them on disk.

Rules that hold for every source, so that the same picture gives the same array whatever it is
stored as:

- 16-bit samples keep their high byte (``v >> 8``, 65535 -> 255). Pillow decodes 16-bit *colour*
  files that way and offers nothing finer, so grey files and ``uint16`` arrays follow it.
- Transparency is composited on white, as an image viewer shows it: the colours stored under
  transparent pixels are arbitrary and must not reach the network.
- Floats are either 0..1 (multiplied by 255) or 0..255 (kept), by their largest value, and rounded.
- Files are turned upright by their EXIF orientation. An open ``PIL.Image`` is taken as it is, so
  that the result has the size the caller sees.
- Of an animation or a multi-page file the first picture is read.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageLike",
    "ImageReadError",
    "as_rgb_array",
    "exif_orientation",
    "list_images",
    "load_upright",
    "read_image",
]

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
))
# fmt: on

_EXIF_ORIENTATION = 0x0112
# Photometric tag of TIFF; 0 is "white is zero".
_TIFF_PHOTOMETRIC = 262


ImageLike: TypeAlias = "str | os.PathLike[str] | np.ndarray | Image.Image"
"""What :func:`as_rgb_array` takes."""


class ImageReadError(ValueError):
    """A picture that cannot be read: ``path`` (as given) and ``reason`` (one line)."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read the image {self.path}: {self.reason}"


def read_image(source: str | os.PathLike[str] | BinaryIO) -> np.ndarray:
    """Reads a picture file as a contiguous uint8 RGB array [H, W, 3], upright.

    Accepts every mode Pillow reads: grey, 1-bit, palette, alpha, CMYK, YCbCr, LAB, 16-bit grey and
    colour, 32-bit integer and float. TIFF kinds that Pillow does not know (float or 32-bit colour)
    go through ``tifffile`` where it is installed. The module's head lists the conversion rules.

    Args:
        source: a path or a seekable binary file object, read from its start.

    Raises:
        ImageReadError: missing, empty, truncated, damaged or unknown file, or one larger than
            ``PIL.Image.MAX_IMAGE_PIXELS`` allows; names the path and the reason.
    """
    from PIL import Image

    name = _name_of(source)
    if not hasattr(source, "read"):
        _check_path(source, name)
    try:
        with Image.open(source) as image:
            load_upright(image)
            return _from_pil(image, name)
    except ImageReadError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageReadError(
            name, f"{error} Raise PIL.Image.MAX_IMAGE_PIXELS if the file is to be trusted."
        ) from error
    except Image.UnidentifiedImageError as error:
        return _read_with_tifffile(source, name, error)
    # Pillow's decoders raise almost any exception type on damaged data.
    except Exception as error:
        raise ImageReadError(name, one_line(error)) from error


def as_rgb_array(obj: ImageLike) -> np.ndarray:
    """Turns a picture in any accepted form into a contiguous uint8 RGB array [H, W, 3].

    Args:
        obj: a path (read by :func:`read_image`), a ``PIL.Image``, or an array: [H, W] grey,
            [H, W, 1] grey, [H, W, 2] grey + alpha, [H, W, 3] RGB or [H, W, 4] RGBA, of dtype
            uint8, uint16 (high byte), bool (0/255) or float (0..1, or 0..255).

    Raises:
        ImageReadError: a path that cannot be read, or values outside the accepted range.
        ValueError: any other type, shape or dtype.
    """
    if isinstance(obj, (str, os.PathLike)):
        return read_image(obj)
    if isinstance(obj, np.ndarray):
        return _from_array(obj, "array")
    # A PIL image without importing PIL for callers that never use it.
    if hasattr(obj, "getbands") and hasattr(obj, "convert"):
        name = getattr(obj, "filename", "") or "PIL image"
        try:
            return _from_pil(obj, str(name))
        except ImageReadError:
            raise
        # An opened but not yet decoded file fails here, with almost any exception type.
        except Exception as error:
            raise ImageReadError(str(name), one_line(error)) from error
    raise ValueError(
        f"expected an image as a path, a PIL image or a numpy array, got {type(obj).__name__}; "
        "convert it first (a tensor: pass it to predict directly as uint8 [N,3,H,W])"
    )


def list_images(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Path]:
    """Expands files, folders and glob patterns into a list of picture files without repeats.

    A file is kept whatever its suffix. A folder stands for every file below it with a suffix in
    ``IMAGE_SUFFIXES``, sorted, hidden ones left out, links followed. A pattern (``*``, ``?``,
    ``[...]``, ``**``) is expanded likewise; one that ends with a suffix, as in ``*.dat``, keeps
    that suffix.

    Raises:
        FileNotFoundError: an entry that gives nothing; every such entry is named with its reason.
        ValueError: no entry at all.
    """
    entries = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not entries:
        raise ValueError("no image given: pass files, folders or glob patterns")
    found: dict[str, Path] = {}
    problems: list[str] = []
    for entry in entries:
        files, problem = _expand(os.fspath(entry))
        if problem:
            problems.append(problem)
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    if problems:
        raise FileNotFoundError("; ".join(problems))
    return list(found.values())


def _expand(entry: str) -> tuple[list[Path], str]:
    path = Path(entry)
    if path.is_file():
        return [path], ""
    if path.is_dir():
        files = _walk(path)
        known = " ".join(sorted(IMAGE_SUFFIXES))
        return files, "" if files else f"{entry}: no image in this folder (looked for {known})"
    if not _is_pattern(entry):
        return [], f"{entry}: no such file or folder"
    suffix = Path(entry).suffix
    any_suffix = bool(suffix) and not _is_pattern(suffix)
    files = []
    for match in sorted(glob.glob(entry, recursive=True)):
        match_path = Path(match)
        if match_path.is_dir():
            # "**" already lists what lies below a folder.
            files += [] if "**" in entry else _walk(match_path)
        elif any_suffix or match_path.suffix.lower() in IMAGE_SUFFIXES:
            files.append(match_path)
    return files, "" if files else f"{entry}: the pattern matches no image"


def _is_pattern(text: str) -> bool:
    return any(sign in text for sign in "*?[")


def _walk(folder: Path) -> list[Path]:
    files: list[Path] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(root, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(files)


def _name_of(source: str | os.PathLike[str] | BinaryIO) -> str:
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        return name if isinstance(name, str) else f"<{type(source).__name__}>"
    return os.fspath(source)


def _check_path(source: str | os.PathLike[str], name: str) -> None:
    path = Path(source)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ImageReadError(name, error.strerror or one_line(error)) from error
    except ValueError as error:
        raise ImageReadError(name, one_line(error)) from error
    if path.is_dir():
        raise ImageReadError(name, "this is a folder; list_images() expands folders")
    if path.is_file() and size == 0:
        raise ImageReadError(name, "the file is empty (0 bytes)")


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    return " ".join(str(error).split()) or type(error).__name__


def exif_orientation(path: str | os.PathLike[str]) -> int:
    """The EXIF orientation that a picture file is tagged with, 1 to 8: 1 is upright.

    From 5 on height and width change places. 1 also where there is no tag, and for what is no
    picture.
    """
    from PIL import Image

    # Whoever reads the pixels reports a damaged file.
    with suppress(Exception), Image.open(path) as image:
        found = image.getexif().get(_EXIF_ORIENTATION, 1)
        return found if found in range(1, 9) else 1
    return 1


def load_upright(image: Image.Image) -> None:
    """Decodes a picture that was opened from a file and turns it, in place, by its orientation."""
    from PIL import ImageOps

    # Pillow maps an uncompressed TIFF into memory at the size that it will be turned to, which
    # scrambles it (seen in 13.0); without a name it reads the file.
    if image.format == "TIFF" and hasattr(image, "filename"):
        image.filename = ""
    image.load()

    # Damaged EXIF data does not make the pixels unreadable.
    with suppress(Exception):
        # A copy would lose the TIFF tags.
        ImageOps.exif_transpose(image, in_place=True)


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if mode.startswith("I;16") or mode == "I":
        return _grey_to_rgb(_integers_to_uint8(image, name))
    if mode == "F":
        return _grey_to_rgb(_floats_to_uint8(np.asarray(image), name))
    if mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        return _on_white(_to_rgba(image))
    if mode == "LAB":
        return np.array(_lab_to_rgb(image))
    return np.array(image.convert("RGB"))


def _to_rgba(image: Image.Image) -> np.ndarray:
    # "La" converts to "LA" only, "RGBa" to "RGBA" only.
    if image.mode == "La":
        image = image.convert("LA")
    return np.asarray(image if image.mode == "RGBA" else image.convert("RGBA"))


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


def _integers_to_uint8(image: Image.Image, name: str) -> np.ndarray:
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageReadError(
            name,
            f"integer samples from {values.min()} to {values.max()}, outside the 16-bit range "
            "0..65535; store it with 8 or 16 bits a sample",
        )
    if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == 0:
        # Pillow inverts "white is zero" for 8-bit TIFF files but not for 16-bit ones.
        values = 65535 - values
    return (values >> 8).astype(np.uint8)


def _floats_to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    if not values.size:
        return values.astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    # Half a level of slack for values that a filter pushed just outside; NaN fails both tests.
    if low >= -0.5 / 255 and high <= 1 + 0.5 / 255:
        scaled = values * 255.0
    elif low >= -0.5 and high <= 255.5:
        scaled = values
    else:
        raise ImageReadError(
            name,
            f"float samples from {low:g} to {high:g}, expected finite values in 0..1 or in 0..255; "
            "rescale them first",
        )
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:]
    if (alpha == 255).all():
        return np.ascontiguousarray(rgba[..., :3])
    # uint16 holds the largest sum, 255 * 255 + 127.
    weight = alpha.astype(np.uint16)
    mixed = rgba[..., :3] * weight + 255 * (255 - weight)
    return ((mixed + 127) // 255).astype(np.uint8)


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    shape = tuple(array.shape)
    allowed = "[H,W], [H,W,1], [H,W,2], [H,W,3] or [H,W,4]"
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 2, 3, 4)):
        hint = (
            "; channels come last: use array.transpose(1, 2, 0)"
            if array.ndim == 3 and shape[0] in (1, 3, 4)
            else ""
        )
        raise ValueError(f"image array has shape {list(shape)}, expected {allowed}{hint}")
    if 0 in shape:
        raise ValueError(f"image array has shape {list(shape)}: it has no pixels")
    if array.dtype == np.uint16:
        pixels = (array >> 8).astype(np.uint8)
    elif array.dtype == np.bool_:
        pixels = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        pixels = _floats_to_uint8(array, name)
    elif array.dtype == np.uint8:
        pixels = array
    else:
        raise ValueError(
            f"image array has dtype {array.dtype}, expected uint8, uint16, bool or float; "
            "convert it, e.g. array.astype('uint8') for values in 0..255"
        )
    if pixels.ndim == 2 or shape[2] == 1:
        return _grey_to_rgb(pixels.reshape(shape[:2]))
    if shape[2] == 2:
        return _on_white(np.concatenate([pixels[..., :1]] * 3 + [pixels[..., 1:]], axis=2))
    if shape[2] == 4:
        return _on_white(pixels)
    return np.ascontiguousarray(pixels)


def _read_with_tifffile(
    source: str | os.PathLike[str] | BinaryIO, name: str, cause: Exception
) -> np.ndarray:
    unknown = "not a picture in a format that Pillow reads"
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            head = file.read(4)
    else:
        source.seek(0)
        head = source.read(4)
        source.seek(0)
    if head == b"":
        raise ImageReadError(name, "the file is empty (0 bytes)") from cause
    if head not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        raise ImageReadError(name, unknown) from cause
    try:
        import tifffile
    except ImportError as error:
        raise ImageReadError(
            name, "a TIFF kind that Pillow does not read; install tifffile to read it"
        ) from error
    try:
        with tifffile.TiffFile(source) as file:
            pixels = np.asarray(file.pages[0].asarray())
            # S: samples, stored before the rows in files with separate colour planes.
            if file.pages[0].axes == "SYX":
                pixels = pixels.transpose(1, 2, 0)
    # As with Pillow: damaged files raise almost anything.
    except Exception as error:
        raise ImageReadError(name, one_line(error)) from error
    try:
        return _from_array(pixels, name)
    except ImageReadError:
        raise
    except ValueError as error:
        raise ImageReadError(name, one_line(error)) from error
