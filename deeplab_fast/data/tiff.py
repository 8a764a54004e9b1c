"""TIFF kinds that Pillow does not know, by tifffile: float and 32-bit colour."""

from __future__ import annotations

import io
import lzma
import math
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import tifffile

__all__ = ["read_first_page"]

# Of grey or RGB with alpha.
_MOST_SAMPLES = 4
_NONE, _DEFLATE, _LZMA = (1,), (8, 32946), (34925,)


def read_first_page(
    source: BinaryIO, most: int | None
) -> tuple[np.ndarray | None, int, tuple[int, ...]]:
    """The first page as [H, W] or [H, W, C], its samples, and what those beyond the colours are.

    None in the place of pixels for more than four samples, whose values are not read.

    Args:
        source: read from its start.
        most: pixels that are read, None for any number.

    Raises:
        ImportError: tifffile is not installed.
        ValueError: more pixels, or strips and tiles that the file does not hold, or that unpack to
            more than the picture has: both are found before memory is taken for them.
        Exception: almost any, by tifffile, for a damaged file.
    """
    import tifffile

    with tifffile.TiffFile(source) as file:
        page: Any = file.pages.first
        extra = tuple(int(each) for each in page.extrasamples)
        samples = int(page.samplesperpixel)
        if samples > _MOST_SAMPLES:
            return None, samples, extra
        pixels = page.imagedepth * page.imagelength * page.imagewidth
        if most is not None and pixels > most:
            raise ValueError(
                f"{pixels} pixels, and {most} are read. Cut it into parts, or raise "
                "PIL.Image.MAX_IMAGE_PIXELS if the file is to be trusted."
            )
        _check_segments(page, source)
        values = np.asarray(page.asarray())
        # S: samples, stored before the rows in files with separate colour planes.
        if page.axes == "SYX":
            values = values.transpose(1, 2, 0)
        return values, samples, extra


def _check_segments(page: tifffile.TiffPage, source: BinaryIO) -> None:
    """Raises ValueError for strips or tiles that are not in the file, or unpack to too much."""
    size = source.seek(0, io.SEEK_END)
    places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if any(begin < 0 or count < 0 or begin + count > size for begin, count in places):
        raise ValueError("strips or tiles beyond the end of the file; it was cut or is damaged")
    item = 0 if page.dtype is None else page.dtype.itemsize
    if page.compression in _NONE:
        wanted = page.imagelength * page.imagewidth * page.samplesperpixel * page.bitspersample
        if sum(count for _, count in places) * 8 < wanted:
            raise ValueError("fewer values than the picture has pixels; it was cut or is damaged")
    if page.compression not in (*_DEFLATE, *_LZMA):
        return
    # tifffile alone unpacks these without an end.
    most = math.prod(page.tile or (page.rowsperstrip, page.imagewidth)) * page.samplesperpixel
    most *= max(1, item) * page.imagedepth
    for begin, count in places:
        source.seek(begin)
        packed = source.read(count)
        unpacker: Any = (
            lzma.LZMADecompressor() if page.compression in _LZMA else zlib.decompressobj()
        )
        if len(unpacker.decompress(packed, most + 1)) > most:
            raise ValueError(f"a strip or tile that unpacks to more than its {most} bytes")
