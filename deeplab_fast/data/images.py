"""Reading photos of any common kind as uint8 RGB arrays, and finding them on disk.

Rules that hold for every source, so that the same picture gives the same array whatever it is
stored as:

- 16-bit samples keep their high byte (``v >> 8``, 65535 -> 255). Pillow decodes 16-bit *colour*
  files that way and offers nothing finer, so grey files and ``uint16`` arrays follow it. A picture
  of which at least 99.9 % of the colours' samples use 14 bits or less of the 16 would become dark
  or black, whatever a few pixels without data or saturated ones hold: it is refused, unless it is
  black or ``bits`` says how many a sample has, and then ``v >> (bits - 8)`` is kept.
- Three colours or grey, with or without alpha. Further bands are refused, and a fourth that the
  file does not say is alpha (infrared, as a rule) is never taken for it.
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
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, cast

import numpy as np

from deeplab_fast._documents import printable

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "IMAGE_SUFFIXES",
    "OUT_OF_MEMORY",
    "ImageLike",
    "ImageReadError",
    "as_rgb_array",
    "check_format",
    "exif_orientation",
    "list_images",
    "load_upright",
    "open_regular",
    "picture_name",
    "read_image",
    "shown_name",
]

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
))
# fmt: on

_EXIF_ORIENTATION = 0x0112
# Formats whose decoder starts Ghostscript, or draws by the system.
_RUN_PROGRAMS = frozenset(("EPS", "WMF"))
# Rows that are wider than bytes at a time.
_STRIP = 64
_LONGEST_NAME = 300
_LONGEST_REASON = 500
# Photometric tag of TIFF; 0 is "white is zero", 1 "black is zero", 2 RGB.
_TIFF_PHOTOMETRIC = 262
_TIFF_COLOURS = {0: 1, 1: 1, 2: 3}
_TIFF_SAMPLES = 277
# What samples beyond the colours are: 1 and 2 are alpha.
_TIFF_EXTRA = 338
_TIFF_ALPHA = ((1,), (2,))
# A picture that stays below is of a camera with 14 bits or less, or all but black.
_FEWEST_BITS = 14
# One of so many samples may be above all the same: no data, saturated.
_PER_OUTLIER = 1000


ImageLike: TypeAlias = "str | os.PathLike[str] | np.ndarray | Image.Image"
"""What :func:`as_rgb_array` takes."""

OUT_OF_MEMORY = (
    "not enough memory; use --tile H W, e.g. --tile 513 513 (tile=513), a smaller --size "
    "(preprocess.size), or fewer scales"
)
"""What is said where memory runs out for a photo."""


class ImageReadError(ValueError):
    """A picture that cannot be read: ``path`` (as given) and ``reason`` (one line)."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read the image {shown_name(self.path)}: {self.reason}"


def read_image(source: str | os.PathLike[str] | BinaryIO, *, bits: int | None = None) -> np.ndarray:
    """Reads a picture file as a contiguous uint8 RGB array [H, W, 3], upright.

    Accepts every mode Pillow reads: grey, 1-bit, palette, alpha, CMYK, YCbCr, LAB, 16-bit grey and
    colour, 32-bit integer and float. TIFF kinds that Pillow does not know (float or 32-bit colour)
    go through ``tifffile`` where it is installed. The module's head lists the conversion rules.

    Args:
        source: a path or a seekable binary file object, read from its start.
        bits: of a 16-bit sample those that are used, 8 to 16: 12 for most scientific cameras. None
            is 16, and refuses a picture of which all but 0.1 % of the samples use 14 or less.

    Raises:
        ImageReadError: missing, empty, truncated, damaged or unknown file, a pipe, socket or
            device, a picture of more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` (179 million)
            pixels, one that another program would draw (EPS, WMF), or one whose samples or bands
            are not as the module's head says; names the path and the reason.
        ValueError: ``bits`` that are not 8 to 16, or a source of another type.
    """
    check_bits(bits)
    name = _name_of(source)
    if hasattr(source, "read"):
        return _read(cast(BinaryIO, source), name, bits)
    with open_regular(source) as file:
        return _read(file, name, bits)


def _read(file: BinaryIO, name: str, bits: int | None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as image:
            check_format(image, name)
            _check_bands(image, name)
            deep = _is_deep(image)
            load_upright(image)
            return _from_pil(image, name, bits, deep)
    except ImageReadError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageReadError(name, _too_many_pixels(str(error))) from error
    except Image.UnidentifiedImageError as error:
        return _read_with_tifffile(file, name, bits, error)
    # Pillow's decoders raise almost any exception type on damaged data.
    except Exception as error:
        raise ImageReadError(name, one_line(error)) from error


def check_format(image: Image.Image, name: str) -> None:
    """Raises ImageReadError for an opened file whose decoder runs another program."""
    if image.format in _RUN_PROGRAMS:
        raise ImageReadError(
            name,
            f"a file in the format {image.format}, which is drawn by another program; convert it "
            "to PNG, TIFF or JPEG",
        )


def _too_many_pixels(what: str) -> str:
    return (
        f"{what} Cut it into parts, or raise PIL.Image.MAX_IMAGE_PIXELS if the file is to be "
        "trusted."
    )


def check_bits(bits: int | None) -> None:
    """Raises ValueError for a number of bits that :func:`read_image` does not take."""
    if bits is not None and (
        not isinstance(bits, int) or isinstance(bits, bool) or not 8 <= bits <= 16
    ):
        raise ValueError(
            f"bits is {bits!r}, expected 8 to 16 (those of a 16-bit sample that are used), or None"
        )


def as_rgb_array(obj: ImageLike, *, bits: int | None = None) -> np.ndarray:
    """Turns a picture in any accepted form into a contiguous uint8 RGB array [H, W, 3].

    Args:
        obj: a path (read by :func:`read_image`), a ``PIL.Image``, or an array: [H, W] grey,
            [H, W, 1] grey, [H, W, 2] grey + alpha, [H, W, 3] RGB or [H, W, 4] RGBA, of dtype
            uint8, uint16 (high byte), bool (0/255) or float (0..1, or 0..255).
        bits: as of :func:`read_image`.

    Raises:
        ImageReadError: a path that cannot be read, or values outside the accepted range.
        ValueError: any other type, shape or dtype.
    """
    check_bits(bits)
    if isinstance(obj, (str, os.PathLike)):
        return read_image(obj, bits=bits)
    if isinstance(obj, np.ndarray):
        try:
            return _from_array(obj, "array", bits)
        except MemoryError as error:
            # A view may be larger than all memory.
            raise ImageReadError("array", f"{list(obj.shape)}: {one_line(error)}") from error
    # A PIL image without importing PIL for callers that never use it.
    if hasattr(obj, "getbands") and hasattr(obj, "convert"):
        name = getattr(obj, "filename", "") or "PIL image"
        try:
            _check_bands(obj, str(name))
            return _from_pil(obj, str(name), bits, _is_deep(obj))
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
    folders: dict[str, str] = {}
    problems: list[str] = []
    for entry in entries:
        files, problem = _expand(os.fsdecode(entry))
        if problem:
            problems.append(problem)
        for file in files:
            found.setdefault(_real_path(file, folders), file)
    if problems:
        raise FileNotFoundError("; ".join(problems))
    return list(found.values())


def _real_path(file: Path, folders: dict[str, str]) -> str:
    """A path without links; ``folders`` keeps those of folders, each of which is looked up once."""
    parent = os.path.dirname(file)
    if parent not in folders:
        folders[parent] = os.path.realpath(parent)
    path = os.path.join(folders[parent], file.name)
    return os.path.realpath(path) if os.path.islink(path) else path


def _expand(entry: str) -> tuple[list[Path], str]:
    path, name = Path(entry), shown_name(entry)
    # Other paths may be pictures that cannot be read: whoever reads them says why.
    if os.path.isdir(path):
        files = _walk(path)
        known = " ".join(sorted(IMAGE_SUFFIXES))
        return files, "" if files else f"{name}: no image in this folder (looked for {known})"
    if os.path.lexists(path):
        return [path], ""
    if not _is_pattern(entry):
        return [], f"{name}: no such file or folder"
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
    return files, "" if files else f"{name}: the pattern matches no image"


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
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(files)


def _name_of(source: str | os.PathLike[str] | BinaryIO) -> str:
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        return name if isinstance(name, str) else f"<{type(source).__name__}>"
    if isinstance(source, (str, os.PathLike)):
        return os.fsdecode(source)
    raise ValueError(
        f"expected a path or a seekable binary file, got {type(source).__name__}; open it first, "
        "or pass arrays and PIL images to as_rgb_array"
    )


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A file of pictures or labels, opened for reading, if it is an ordinary one with content.

    Reading a pipe waits for who writes into it, a device may give bytes for ever, and opening one
    may move a tape: so they are told by their kind before they are opened, and what took a name's
    place in between by the file that was opened.

    Raises:
        ImageReadError: missing, not allowed, a folder, pipe, socket or device, or empty.
    """
    name = _name_of(path)
    try:
        found = os.stat(path)
    except OSError as error:
        raise ImageReadError(name, error.strerror or one_line(error)) from error
    # A name with NUL, or one that the file system's encoding has not.
    except ValueError as error:
        raise ImageReadError(name, one_line(error)) from error
    _check_ordinary(found, name)
    try:
        file = open(path, "rb", opener=_without_waiting)
    except OSError as error:
        raise ImageReadError(name, error.strerror or one_line(error)) from error
    try:
        _check_ordinary(os.fstat(file.fileno()), name)
    except BaseException:
        file.close()
        raise
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


_KINDS = (
    (stat.S_ISDIR, "a folder; list_images() expands folders"),
    (stat.S_ISFIFO, "a pipe; expected an ordinary file: write what it gives into one"),
    (stat.S_ISSOCK, "a socket; expected an ordinary file"),
    (lambda mode: not stat.S_ISREG(mode), "a device; expected an ordinary file"),
)


def _check_ordinary(found: os.stat_result, name: str) -> None:
    for is_kind, what in _KINDS:
        if is_kind(found.st_mode):
            raise ImageReadError(name, f"this is {what}")
    if found.st_size == 0:
        raise ImageReadError(name, "the file is empty (0 bytes)")


def one_line(error: BaseException) -> str:
    """What an error says, in one line that can be printed."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    return _printable(" ".join(str(error).split()), _LONGEST_REASON) or type(error).__name__


def shown_name(name: str | os.PathLike[str]) -> str:
    """A file's name as messages have it: what cannot be printed, or moves a terminal's cursor, is
    escaped, and of a long one the middle is left out."""
    return _printable(os.fsdecode(name), _LONGEST_NAME)


def _printable(text: str, most: int) -> str:
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 2 :]}"
    return printable(text)


def picture_name(picture: object, index: int | None) -> str:
    """What messages call a picture: its path, or its place in a list, None for the only one."""
    if isinstance(picture, (str, os.PathLike)):
        return os.fsdecode(picture)
    named = getattr(picture, "filename", "")
    if isinstance(named, (str, os.PathLike)) and os.fsdecode(named):
        return os.fsdecode(named)
    return "the image" if index is None else f"images[{index}]"


def exif_orientation(path: str | os.PathLike[str]) -> int:
    """The EXIF orientation that a picture file is tagged with, 1 to 8: 1 is upright.

    From 5 on height and width change places. 1 also where there is no tag, and for what is no
    picture.
    """
    from PIL import Image

    # Whoever reads the pixels reports a damaged file.
    with suppress(Exception), open_regular(path) as file, Image.open(file) as image:
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


def _check_bands(image: Image.Image, name: str) -> None:
    """Raises ImageReadError for bands of a TIFF that Pillow would drop, or take for alpha."""
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return
    colours = _TIFF_COLOURS.get(tags.get(_TIFF_PHOTOMETRIC, -1))
    samples = tags.get(_TIFF_SAMPLES, 1)
    if colours is None or samples <= colours:
        return
    extra = tags.get(_TIFF_EXTRA, ())
    extra = extra if isinstance(extra, tuple) else (extra,)
    if samples > colours + 1 or extra not in _TIFF_ALPHA:
        raise ImageReadError(name, _too_many_bands(samples))


def _too_many_bands(samples: int) -> str:
    return (
        f"{samples} bands, of which the last is not marked as alpha, expected grey or RGB, with or "
        "without alpha; write the bands that the model was trained on into a file of their own, "
        "e.g. gdal_translate -b 1 -b 2 -b 3"
    )


def _is_deep(image: Image.Image) -> bool:
    """Whether a file that is not decoded yet has 16-bit samples, of which Pillow keeps 8."""
    arguments = [each[3] for each in getattr(image, "tile", ())]
    modes = [args[0] if isinstance(args, tuple) and args else args for args in arguments]
    return any(isinstance(mode, str) and ";16" in mode for mode in modes)


def _from_pil(
    image: Image.Image, name: str, bits: int | None = None, deep: bool = False
) -> np.ndarray:
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        return _grey_to_rgb(_integers_to_uint8(image, name, bits))
    if mode == "F":
        return _grey_to_rgb(_floats_to_uint8(np.asarray(image), name))
    if mode == "RGB" and "transparency" not in image.info:
        return _checked_depth(np.array(image), name, bits, deep)
    if mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        return _on_white(_checked_depth(_to_rgba(image), name, bits, deep))
    if mode == "LAB":
        return np.array(_lab_to_rgb(image))
    return np.array(image.convert("RGB"))


def _checked_depth(pixels: np.ndarray, name: str, bits: int | None, deep: bool) -> np.ndarray:
    """The high bytes [H, W, 3 or 4] that Pillow kept, if what it dropped does not matter."""
    if not deep or not pixels.size:
        return pixels
    if bits is not None and bits < 16:
        raise ImageReadError(
            name,
            f"16-bit colour, of which only the high byte can be read, and {bits} bits were asked "
            "for; store it with 8 bits a sample",
        )
    # One level here is 256 of the file's.
    high, above = _largest(pixels[..., :3], 1 << (_FEWEST_BITS - 8))
    if bits is None and high:
        cure = "store it with 8 bits a sample"
        raise ImageReadError(name, _too_dark(high * 256 + 255, above, cure))
    return pixels


def _largest(values: np.ndarray, limit: int) -> tuple[int, int]:
    """The largest sample and how many at or above ``limit`` it leaves out; 0 where they are many.

    Few are up to one of ``_PER_OUTLIER``.
    """
    high = int(values.max()) if values.size else 0
    if high < limit:
        return high, 0
    low = values < limit
    above = values.size - int(np.count_nonzero(low))
    if above * _PER_OUTLIER > values.size:
        return 0, above
    return int(values.max(where=low, initial=0)), above


def _too_dark(high: int, above: int, cure: str) -> str:
    used = max(8, high.bit_length())
    few = f" but for {above} above (no data, saturated)" if above else ""
    first = f"set those above to {high} and " if above else ""
    return (
        f"16-bit samples up to {high}, of 65535{few}: scaled as 16 bits they would be dark or "
        f"black. Expected more than one in {_PER_OUTLIER} that use more than {_FEWEST_BITS} bits, "
        f"or the number of bits; if they have {used}, {first}{cure}; if the picture is that dark, "
        "say 16 bits"
    )


def _high_byte(values: np.ndarray, name: str, bits: int | None, colours: int) -> np.ndarray:
    """Integers 0..65535 [H, W] or [H, W, C] as uint8; the first ``colours`` of C are no alpha."""
    seen = values[..., :colours] if values.ndim == 3 else values
    if bits is None:
        high, above = _largest(seen, 1 << _FEWEST_BITS)
        if high:
            used = max(8, high.bit_length())
            cure = (
                f"shift them to 8, or use predict --depth {used} or read_image(path, bits={used})"
            )
            raise ImageReadError(name, _too_dark(high, above, cure))
        bits = 16
    if values.size and int(values.max()) >> bits:
        raise ImageReadError(
            name,
            f"samples up to {values.max()}, and {bits} bits hold {(1 << bits) - 1}; expected the "
            "number of bits that all samples have",
        )
    return (values >> (bits - 8)).astype(np.uint8)


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


def _integers_to_uint8(image: Image.Image, name: str, bits: int | None) -> np.ndarray:
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageReadError(
            name,
            f"integer samples from {values.min()} to {values.max()}, outside the 16-bit range "
            "0..65535; store it with 8 or 16 bits a sample",
        )
    if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == 0:
        # Pillow inverts "white is zero" for 8-bit TIFF files but not for 16-bit ones.
        values = (65535 if bits is None else (1 << bits) - 1) - values
    return _high_byte(values, name, bits, 1)


def _floats_to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    if not values.size:
        return values.astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    # Half a level of slack for values that a filter pushed just outside; NaN fails both tests.
    if low >= -0.5 / 255 and high <= 1 + 0.5 / 255:
        factor = 255.0
    elif low >= -0.5 and high <= 255.5:
        factor = 1.0
    else:
        raise ImageReadError(
            name,
            f"float samples from {low:g} to {high:g}, expected finite values in 0..1 or in 0..255; "
            "rescale them first",
        )
    levels = np.empty(values.shape, dtype=np.uint8)
    for rows in _strips(values):
        levels[rows] = np.clip(np.rint(values[rows] * factor), 0, 255)
    return levels


def _strips(pixels: np.ndarray) -> Iterator[slice]:
    """Rows of a picture, some at a time: what is made of them on the way is wider than bytes."""
    for first in range(0, len(pixels), _STRIP):
        yield slice(first, first + _STRIP)


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:]
    if (alpha == 255).all():
        return np.ascontiguousarray(rgba[..., :3])
    mixed = np.empty((*rgba.shape[:2], 3), dtype=np.uint8)
    for rows in _strips(rgba):
        # uint16 holds the largest sum, 255 * 255 + 127.
        weight = alpha[rows].astype(np.uint16)
        mixed[rows] = (rgba[rows, :, :3] * weight + 255 * (255 - weight) + 127) // 255
    return mixed


def _from_array(array: np.ndarray, name: str, bits: int | None = None) -> np.ndarray:
    # A np.matrix keeps two axes whatever is asked of it: np.repeat of it ends the process (2.4).
    array = np.asarray(array)
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
        alpha = array.ndim == 3 and shape[2] in (2, 4)
        pixels = _high_byte(array, name, bits, shape[2] - 1 if alpha else shape[-1])
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
    source: BinaryIO, name: str, bits: int | None, cause: Exception
) -> np.ndarray:
    unknown = "not a picture in a format that Pillow reads"
    source.seek(0)
    head = source.read(4)
    source.seek(0)
    if head == b"":
        raise ImageReadError(name, "the file is empty (0 bytes)") from cause
    if head not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        raise ImageReadError(name, unknown) from cause
    from PIL import Image

    from deeplab_fast.data.tiff import read_first_page

    # As many as Pillow reads.
    most = None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS
    try:
        pixels, samples, extra = read_first_page(source, most)
    except ImportError as error:
        raise ImageReadError(
            name, "a TIFF kind that Pillow does not read; install tifffile to read it"
        ) from error
    # As with Pillow: damaged files raise almost anything.
    except Exception as error:
        raise ImageReadError(name, one_line(error)) from error
    if pixels is None or (
        pixels.ndim == 3 and pixels.shape[2] not in (1, 3) and extra not in _TIFF_ALPHA
    ):
        raise ImageReadError(name, _too_many_bands(samples))
    try:
        return _from_array(pixels, name, bits)
    except ImageReadError:
        raise
    except ValueError as error:
        raise ImageReadError(name, one_line(error)) from error
