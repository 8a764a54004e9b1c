"""SBD's masks: the array ``GTcls.Segmentation`` of a MATLAB file (level 5)."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

__all__ = ["read_sbd"]

_HEAD = 128
# What a file may hold when its compressed parts are unpacked; SBD's largest holds 1 MB.
_MOST_BYTES = 1 << 26
_LONGEST_NAMES = 1 << 16
_MATRIX, _COMPRESSED = 14, 15
_STRUCT = 2
# Types of stored values: int8 to uint32, float, double, 64-bit integers.
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
_STORED |= {12: "i8", 13: "u8"}
# Classes of arrays of integers and what they hold.
_INTEGERS = {8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4"}


class _WrongFile(ValueError):
    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; expected a MATLAB file (level 5) with GTcls.Segmentation")


def read_sbd(file: BinaryIO) -> np.ndarray:
    """The integers of ``GTcls.Segmentation``, [H, W].

    The values are read as bytes and nothing is made of a size that the file only claims. Other
    variables and fields are passed over unread.

    Raises:
        ValueError: another file, or a damaged one.
    """
    head = file.read(_HEAD)
    order = {b"IM": "<", b"MI": ">"}.get(head[126:128])
    if order is None:
        raise _WrongFile("the file's head is not that of a MATLAB file")
    data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise _WrongFile(f"the file is larger than {_MOST_BYTES} bytes")
    for element in _variables(data, order):
        matrix = _Matrix.of(element, order)
        if matrix.name == "GTcls" and matrix.kind == _STRUCT:
            return matrix.field("Segmentation").integers()
    raise _WrongFile("the file has no struct GTcls")


def _variables(data: bytes, order: str) -> Iterator[bytes]:
    left = _MOST_BYTES
    for kind, content in _elements(data, order):
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(content, left)
            left -= len(unpacked)
            if unpacker.unconsumed_tail:
                raise _WrongFile(f"the file unpacks to more than {_MOST_BYTES} bytes")
            yield from (inner for kind, inner in _elements(unpacked, order) if kind == _MATRIX)
        elif kind == _MATRIX:
            yield content


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of elements that follow each other."""
    place = 0
    while place + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}2I", data, place)
        if kind >> 16:
            # Up to four bytes stand in the tag itself.
            kind, size, begin = kind & 0xFFFF, kind >> 16, place + 4
            end = place + 8
            if size > 4:
                raise _WrongFile(f"a short element of {size} bytes")
        else:
            begin = place + 8
            # Compressed ones are not padded to 8 bytes.
            end = begin + (size if kind == _COMPRESSED else -(-size // 8) * 8)
        if begin + size > len(data):
            raise _WrongFile(f"an element of {size} bytes where {len(data) - begin} are left")
        yield kind, data[begin : begin + size]
        place = end


@dataclass(frozen=True)
class _Matrix:
    """An array of a MATLAB file: its class, shape, name, and the elements that hold its values."""

    kind: int
    shape: tuple[int, ...]
    name: str
    values: list[tuple[int, bytes]]
    order: str

    @classmethod
    def of(cls, content: bytes, order: str) -> _Matrix:
        elements = list(_elements(content, order))
        if len(elements) < 3 or len(elements[0][1]) != 8 or len(elements[1][1]) % 4:
            raise _WrongFile("an array without class, shape and name")
        flags, _ = struct.unpack(f"{order}2I", elements[0][1])
        sizes = elements[1][1]
        shape = struct.unpack(f"{order}{len(sizes) // 4}i", sizes)
        return cls(flags & 0xFF, shape, elements[2][1].decode("latin-1"), elements[3:], order)

    def field(self, name: str) -> _Matrix:
        """A field of a struct with one element."""
        if math.prod(self.shape) != 1 or len(self.values) < 2:
            raise _WrongFile(f"{self.name} is a struct of shape {list(self.shape)[:5]}")
        (_, length), (_, names) = self.values[:2]
        if len(length) != 4 or len(names) > _LONGEST_NAMES:
            raise _WrongFile(f"{self.name} has no names of fields")
        (step,) = struct.unpack(f"{self.order}i", length)
        if step < 1:
            raise _WrongFile(f"{self.name} has no names of fields")
        found = [names[i : i + step].split(b"\0")[0] for i in range(0, len(names), step)]
        fields = dict(zip(found, self.values[2:], strict=False))
        kind, content = fields.get(name.encode(), (0, b""))
        if kind != _MATRIX:
            raise _WrongFile(f"{self.name} has no field {name}")
        return self.of(content, self.order)

    def integers(self) -> np.ndarray:
        """The values of a matrix of integers, [H, W]."""
        dtype = _INTEGERS.get(self.kind)
        if dtype is None or len(self.shape) != 2 or not self.values:
            raise _WrongFile(f"an array of class {self.kind} and shape {list(self.shape)[:5]}")
        kind, content = self.values[0]
        # Values may be stored in a narrower type than their array's.
        stored = _STORED.get(kind)
        if stored is None or len(content) != math.prod(self.shape) * np.dtype(stored).itemsize:
            raise _WrongFile(f"{len(content)} bytes for an array {list(self.shape)}")
        values = np.frombuffer(content, self.order + stored).astype(dtype)
        return values.reshape(self.shape[::-1]).T
