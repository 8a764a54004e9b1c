"""What torch.save wrote, read as data: nothing that a file names is imported, looked up or called.

A pickle is a program. This is a machine for the operations that PyTorch's files are made of, on a
table of names: tensors are views of the mapped file, everything else is plain data or inert. Sizes
that a file claims are held against what it has before anything is allocated.

`torch.load(weights_only=True)` runs no foreign code either, but takes the memory that a file
claims: a pickle of 30 bytes calls bytearray(2**30) or torch.Tensor(2**30), which are on its list of
names (PyTorch 2.13).

Classes that the process itself registered, with torch.serialization.add_safe_globals, are no error:
their objects are left out, with `Inert` in their places, and none of their code is run.

Paths are pure ones, of the kind that was written: they are compared and printed, and open nothing.

Formats: the zip archive of PyTorch 1.6 and later (stored entries NAME/data.pkl and NAME/data/KEY),
and the one before it (five pickles, then for each storage its length and its bytes).
"""

from __future__ import annotations

import argparse
import codecs
import math
import mmap
import pickle
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import torch
from torch import Tensor

# What reading may take: a hundred times what published files, with their optimisers, need.
MOST_STEPS = 4_000_000
# Keys that are neither texts nor short whole numbers: a file can choose their hashes. Comparing
# the keys of one hash with each other is what takes long: 10^5 keys take 5 * 10^7 comparisons.
_MOST_KEYS_OF_PARTS, _MOST_OF_ONE_HASH = 100_000, 1_000
_LEAST_BUDGET = 64 << 20
# Beyond it a tensor may not be larger than what is stored of it (buffers that were expanded).
_MOST_EXPANDED = 1 << 20
_MOST_DIMENSIONS = 16
_LOCAL_HEADER = 30

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class PickledError(ValueError):
    """What is wrong with a file; one of the four below."""


class UnreadableError(PickledError):
    """A file that is damaged; the message says how."""


class TooLargeError(PickledError):
    """A file that claims more than it has; the message says what."""


class UnsupportedError(PickledError):
    """A file that may be whole, and has what is not read; the message says what."""


class ForeignObjectError(PickledError):
    """A file that names an object whose code would have to run; `name`: its full name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def read_archive(path: Path) -> object:
    """What a zip archive of torch.save holds.

    Raises:
        UnreadableError, TooLargeError, UnsupportedError, ForeignObjectError: as they say.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file, _mapped(file) as data:
        entries = archive_entries(path)
        prefix = _prefix(entries)
        order = (
            _stored(data, entries[f"{prefix}byteorder"])
            if f"{prefix}byteorder" in entries
            else b"little"
        )
        if order not in (b"little", b"big"):
            raise UnreadableError(f"its byte order is {order[:20]!r}")
        memory = _Memory(path, len(data), swapped=order.decode() != sys.byteorder)
        sizes = sum(entry.file_size for entry in entries.values())
        if sizes > len(data):
            raise TooLargeError(f"its entries claim {sizes} bytes of a file of {len(data)}")

        def storage(kind: _Storage, key: object, numel: int) -> _Elements:
            name = f"{prefix}data/{key}"
            if name not in entries:
                raise UnreadableError(f"it has no entry {name[:100]!r}")
            entry = entries[name]
            nbytes = numel * kind.dtype.itemsize
            if nbytes > entry.file_size:
                raise TooLargeError(
                    f"its entry {name[:100]!r} has {entry.file_size} bytes, {nbytes} are claimed"
                )
            begin = _begin(data, entry) if nbytes else 0
            return memory.elements(begin, numel, kind.dtype)

        code = _stored(data, entries[f"{prefix}data.pkl"])
        return _Machine(code, len(data), lambda pid: _of_archive(pid, storage)).run()[0]


def read_legacy(path: Path) -> object:
    """What a file of torch.save before PyTorch 1.6 holds; errors as of `read_archive`.

    Its storages are read into memory, as torch.load does: each once, and in all less than the file.
    """
    with path.open("rb") as file, _mapped(file) as data:
        at, size = 0, len(data)
        found: list[object] = []
        wanted: dict[object, tuple[_Storage, int]] = {}
        begin_of_result = 0

        def noted(pid: tuple[Any, ...]) -> None:
            kind, key, numel, _ = _of_legacy(pid)
            wanted[key] = (kind, numel)

        # The number, the protocol, the system, the result, the keys in the order of the storages.
        for i in range(5):
            if i == 3:
                begin_of_result = at
            result, at = _Machine(data, len(data), noted if i == 3 else None, at).run()
            found.append(result)
            # Each is held against its type first: a file may have an array in any place.
            if i == 0 and not (type(result) is int and result == _LEGACY_MAGIC):
                raise UnreadableError("it does not begin with the number of PyTorch's files")
            if i == 1 and not (type(result) is int and result == _LEGACY_PROTOCOL):
                raise UnreadableError(f"its protocol is not {_LEGACY_PROTOCOL}")
        system, keys = found[2], found[4]
        little = system.get("little_endian", True) if type(system) is dict else None
        if type(little) is not bool:
            raise UnreadableError("it does not say its byte order")
        where: dict[object, _Elements] = {}
        if type(keys) is not list:
            raise UnreadableError("it has no list of its storages")
        file.seek(at)
        for key in map(_storage_name, keys):
            if key not in wanted or key in where:
                raise UnreadableError("it lists a storage that none of its tensors has, or twice")
            kind, claimed = wanted[key]
            (numel,) = struct.unpack("<q", _part(file.read(8), 0, 8))
            if numel != claimed:
                raise UnreadableError(f"a storage has {numel} elements, {claimed} were expected")
            if numel * kind.dtype.itemsize > size - file.tell():
                raise TooLargeError(
                    f"a storage of {numel * kind.dtype.itemsize} bytes is claimed, of which the "
                    f"file has {size - file.tell()}"
                )
            where[key] = _read_elements(file, numel, kind.dtype, little)

        def elements(pid: tuple[Any, ...]) -> _Elements:
            _, key, _, view = _of_legacy(pid)
            if key not in where:
                raise UnreadableError("it has a storage that is not in its list")
            return where[key] if view is None else where[key].part(*view)

        return _Machine(data, len(data), elements, begin_of_result).run()[0]


def archive_entries(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The entries of a zip archive by name.

    Raises:
        UnreadableError: damaged, or two entries of one name.
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    # It raises what its parts raise for fields that make no sense.
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        struct.error,
        OverflowError,
        EOFError,
    ) as error:
        raise UnreadableError(f"{error}") from error
    found: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        if info.filename in found:
            raise UnreadableError(f"it has two entries of the name {info.filename[:100]!r}")
        found[info.filename] = info
    return found


def archive_text(path: Path, name: str) -> str | None:
    """A stored entry as text; None where there is none. Errors as of `archive_entries`."""
    entry = archive_entries(path).get(name)
    if entry is None:
        return None
    with path.open("rb") as file, _mapped(file) as data:
        return _stored(data, entry).decode("utf-8", "replace")


def _prefix(entries: Mapping[str, zipfile.ZipInfo]) -> str:
    names = [n for n in entries if n == "data.pkl" or n.endswith("/data.pkl")]
    # What torch.save writes has one folder; data.pkl further down is another's.
    names = [n for n in names if n.count("/") == min(n.count("/") for n in names)]
    if len(names) != 1:
        raise UnreadableError(f"it has {len(names)} entries named data.pkl, expected one")
    return names[0].removesuffix("data.pkl")


def _mapped(file: Any) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _part(data: Any, begin: int, length: int) -> bytes:
    found = bytes(data[begin : begin + length])
    if len(found) != length:
        raise UnreadableError("it ends too early")
    return found


def _begin(data: Any, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin in the file."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise UnreadableError(
            f"its entry {entry.filename[:100]!r} is compressed or encrypted, which torch.save does "
            "not do"
        )
    header = _part(data, entry.header_offset, _LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04":
        raise UnreadableError(f"its entry {entry.filename[:100]!r} is not where it should be")
    names, extra = struct.unpack("<HH", header[26:30])
    begin = entry.header_offset + _LOCAL_HEADER + names + extra
    if begin + entry.file_size > len(data) or entry.file_size != entry.compress_size:
        raise UnreadableError(f"its entry {entry.filename[:100]!r} ends behind the file's end")
    return begin


def _stored(data: Any, entry: zipfile.ZipInfo) -> bytes:
    return _part(data, _begin(data, entry), entry.file_size)


@dataclass(frozen=True)
class _Storage:
    """A class of storages."""

    dtype: torch.dtype


@dataclass(frozen=True)
class _Elements:
    """Elements of a storage, [n] of one dtype, in the mapped file."""

    values: Tensor

    def part(self, begin: int, length: int) -> _Elements:
        if begin < 0 or length < 0 or begin + length > len(self.values):
            raise UnreadableError("a view lies beyond its storage")
        return _Elements(self.values[begin : begin + length])


class _Memory:
    """A file, mapped privately: a tensor that is written to keeps its values for itself."""

    def __init__(self, path: Path, size: int, swapped: bool) -> None:
        self._bytes = torch.UntypedStorage.from_file(str(path), False, size)
        self._swapped = swapped
        self._made: dict[tuple[int, int, torch.dtype], _Elements] = {}

    def elements(self, begin: int, numel: int, dtype: torch.dtype) -> _Elements:
        known = self._made.get((begin, numel, dtype))
        if known is not None:
            return known
        nbytes = numel * dtype.itemsize
        if not nbytes:
            made = torch.empty(0, dtype=dtype)
        elif begin < 0 or numel < 0 or begin + nbytes > len(self._bytes):
            raise TooLargeError(
                f"a storage of {nbytes} bytes is claimed, the file has {len(self._bytes)}"
            )
        else:
            # Each has a storage of its own, as what torch.load gives.
            made = _of_storage(self._bytes[begin : begin + nbytes], dtype)
            if self._swapped or made.data_ptr() % dtype.itemsize:
                copied = _of_storage(self._bytes[begin : begin + nbytes], torch.uint8).clone()
                made = (_swapped(copied, dtype) if self._swapped else copied).view(dtype)
        found = self._made[begin, numel, dtype] = _Elements(made)
        return found


def _read_elements(file: BufferedReader, numel: int, dtype: torch.dtype, little: bool) -> _Elements:
    """The next elements of a file in memory of their own: another program may cut the file."""
    raw = torch.empty(numel * dtype.itemsize, dtype=torch.uint8)
    if file.readinto(raw.numpy().data) != len(raw):
        raise UnreadableError("it ends too early")
    swapped = little != (sys.byteorder == "little") and numel > 0
    return _Elements((_swapped(raw, dtype) if swapped else raw).view(dtype))


def _of_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    length = len(storage) // dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(storage, 0, (length,), (1,))


def _swapped(part: Tensor, dtype: torch.dtype) -> Tensor:
    # Of a complex number both parts are turned on their own.
    size = dtype.itemsize // (2 if dtype.is_complex else 1)
    return part.view(-1, size).flip(1).reshape(-1)


# Persistent ids of storages: ("storage", class, key, location, elements), before 1.6 with a view.
def _of_archive(
    pid: tuple[Any, ...], storage: Callable[[_Storage, object, int], _Elements]
) -> _Elements:
    if len(pid) != 5:
        raise UnreadableError(f"a storage is named by {len(pid)} facts, expected 5")
    _, kind, key, _, numel = pid
    return storage(_storage_class(kind), _storage_name(key), _whole(numel))


def _of_legacy(pid: tuple[Any, ...]) -> tuple[_Storage, str | int, int, tuple[int, int] | None]:
    if len(pid) != 6:
        raise UnreadableError(f"a storage is named by {len(pid)} facts, expected 6")
    _, kind, key, _, numel, view = pid
    if view is not None:
        _, begin, length = view
        view = (_whole(begin), _whole(length))
    return _storage_class(kind), _storage_name(key), _whole(numel), view


def _storage_name(key: object) -> str | int:
    # Whole numbers beyond 2^60 have hashes that a file could make collide.
    if type(key) is str or (type(key) is int and abs(key) < 1 << 60):
        return key
    raise UnreadableError("a storage's name is no text")


def _storage_class(kind: object) -> _Storage:
    if not isinstance(kind, _Storage):
        raise UnreadableError("a storage's class is none")
    return kind


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise UnreadableError(f"{str(value)[:40]!r} is no size")
    return value


class _Unfinished:
    """An object between its making and its state (BUILD), which replaces it.

    Attributes:
        places: where the machine remembers it.
    """

    def __init__(self) -> None:
        self.places: list[int] = []

    def finish(self, machine: _Machine, state: Any) -> object:
        """The object with its state."""
        raise NotImplementedError


class Inert:
    """Stands in for an object that is of no use here: nothing is imported, looked up or kept."""

    def __repr__(self) -> str:
        return "Inert()"


class _Ignored(_Unfinished, Inert):
    """An object of a class of the user's: what it is given is left out."""

    def finish(self, machine: _Machine, state: Any) -> object:
        return Inert()


# Of NumPy's array protocol; objects and records are none.
_PLAIN_KINDS = "biufcSU"
_LEFT_OUT_KINDS = "Mm"


class _DType(_Unfinished):
    """numpy.dtype(code) with its byte order."""

    def __init__(self, code: str, order: Literal["<", ">", "=", "|"] = "=") -> None:
        super().__init__()
        self.code, self.order = code, order
        if code[:1] not in (*_PLAIN_KINDS, *_LEFT_OUT_KINDS) or not code[1:].isdecimal():
            raise ForeignObjectError(f"numpy.dtype {code[:40]!r}")

    @property
    def plain(self) -> bool:
        """Whether its values are numbers or texts; dates are left out."""
        return self.code[0] in _PLAIN_KINDS

    def finish(self, machine: _Machine, state: Any) -> object:
        if type(state) is not tuple or len(state) < 5 or state[2:5] != (None, None, None):
            raise ForeignObjectError("numpy.dtype of records")
        if state[1] not in ("<", ">", "=", "|"):
            raise UnreadableError("a dtype has no byte order")
        self.order = state[1]
        return self

    def values(self, data: bytes) -> Any:
        """The numbers or texts of these bytes, in the machine's order."""
        import numpy as np

        text = self.code[0] in "SU"
        if text and not data:
            # Of no texts the length is only claimed.
            return np.empty(0, f"{self.code[0]}1")
        try:
            dtype = np.dtype(self.code).newbyteorder(self.order)
        except TypeError as error:
            raise UnreadableError(f"{error}") from error
        if len(data) % dtype.itemsize:
            raise UnreadableError(f"{len(data)} bytes are no values of {dtype}")
        values = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))
        if text and dtype.kind == "U" and values.view("=u4").max() > sys.maxunicode:
            raise UnreadableError("a text has characters that there are not")
        return values


class _Array(_Unfinished):
    """numpy.ndarray, whose state is (version, shape, dtype, column by column, bytes)."""

    def finish(self, machine: _Machine, state: Any) -> object:
        if type(state) is not tuple or len(state) != 5:
            raise UnreadableError("an array has no state")
        _, shape, dtype, columns, data = state
        if not isinstance(dtype, _DType) or type(shape) is not tuple:
            raise UnreadableError("an array has no dtype or shape")
        if len(shape) > _MOST_DIMENSIONS:
            raise UnreadableError(f"an array has {len(shape)} dimensions")
        sizes = tuple(map(_whole, shape))
        if not isinstance(data, bytes):
            raise ForeignObjectError("numpy.ndarray of objects")
        if not dtype.plain:
            return Inert()
        machine.spend(len(data))
        values = dtype.values(data)
        if math.prod(sizes) != len(values):
            raise UnreadableError(f"an array of shape {sizes} has {len(values)} values")
        return values.reshape(sizes, order="F" if columns else "C")


@dataclass(frozen=True)
class _Function:
    """What a name stands for that a pickle calls."""

    call: Callable[..., object]


class _Machine:
    """Runs one pickle.

    Args:
        data: the bytes.
        size: of the file, by which what is made is bounded.
        storages: from a persistent id to the elements; None where there are none. What returns
            None makes no tensors.
        at: where the pickle begins.
    """

    def __init__(
        self,
        data: Any,
        size: int,
        storages: Callable[[tuple[Any, ...]], _Elements | None] | None,
        at: int = 0,
    ) -> None:
        self._data, self._at = data, at
        self._storages = storages
        self._left = max(_LEAST_BUDGET, 4 * size)
        self._keys: set[Any] = set()
        self._of_one_hash: Counter[int] = Counter()
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> tuple[object, int]:
        """The object, and where the next pickle begins."""
        steps = _STEPS
        try:
            for _ in range(MOST_STEPS):
                code = self._data[self._at]
                self._at += 1
                if code == _STOP:
                    return self._pop(), self._at
                step = steps.get(code)
                if step is None:
                    raise UnreadableError(
                        f"it has the operation {code}, which torch.save does not write; a file of "
                        "another pickle_protocol than 2 has to be saved again with that"
                    )
                step(self)
        except PickledError:
            raise
        # What the operations of a damaged file meet: an empty stack, bytes that are no text.
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            struct.error,
            ValueError,
        ) as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            raise UnreadableError(what) from error
        raise UnsupportedError(f"its pickle has more than {MOST_STEPS} operations")

    def spend(self, bytes_made: int) -> None:
        """Count what is made beside what the file has."""
        self._left -= bytes_made + 64
        if self._left < 0:
            raise UnsupportedError("its pickle makes many times what the file has")

    def _read(self, length: int) -> bytes:
        found = _part(self._data, self._at, length)
        self._at += length
        return found

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + 1000)
        if end < 0:
            raise UnreadableError("it has a name without an end")
        found = bytes(self._data[self._at : end])
        self._at = end + 1
        return found.decode("utf-8")

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        found, self._stack = self._stack, self._marks.pop()
        return found

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _tuple(self, length: int) -> None:
        if len(self._stack) < length:
            raise UnreadableError("its stack is empty")
        self._stack[-length:] = [tuple(self._stack[-length:])]

    def _global(self) -> None:
        module, name = self._line(), self._line()
        if module == "__builtin__":
            module = "builtins"
        full = f"{module}.{name}"
        known = _NAMES.get(full, _missing)
        if known is _missing:
            if full not in _registered():
                raise ForeignObjectError(full)
            known = _LEFT_OUT
        self._push(known)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Function) or type(arguments) is not tuple:
            raise UnreadableError("it calls what is no function")
        self.spend(sys.getsizeof(arguments))
        self._push(function.call(self, *arguments))

    def _build(self) -> None:
        state, made = self._pop(), self._pop()
        if isinstance(made, _Unfinished):
            places, made.places = made.places, []
            done = made.finish(self, state)
            for place in places:
                self._memo[place] = done
            made = done
        elif type(made) is argparse.Namespace:
            if type(state) is not dict or not all(type(k) is str for k in state):
                raise UnreadableError("a Namespace's state is no mapping of names")
            self.spend(len(state) * 100)
            vars(made).update(state)
        elif type(made) is OrderedDict:
            about = state.get("_metadata") if isinstance(state, Mapping) else None
            if isinstance(about, Mapping):
                # As state_dict has it.
                vars(made)["_metadata"] = about
        # Of other objects (tensors with attributes) the state is left out.
        elif not isinstance(made, (Tensor, Inert)):
            raise UnreadableError(f"it gives a state to a {type(made).__name__}")
        self._push(made)

    def _put(self, place: int) -> None:
        value = self._stack[-1]
        if isinstance(value, _Unfinished):
            value.places.append(place)
        self._memo[place] = value

    def _append(self, values: Iterable[Any]) -> None:
        into = self._stack[-1]
        if isinstance(into, _Ignored):
            return
        if type(into) is not list:
            raise UnreadableError(f"it appends to a {type(into).__name__}")
        into.extend(values)

    def _set(self, pairs: list[Any]) -> None:
        into = self._stack[-1]
        if isinstance(into, _Ignored):
            return
        if type(into) not in (dict, OrderedDict, Counter) or len(pairs) % 2:
            raise UnreadableError(f"it sets items of a {type(into).__name__}")
        for i in range(0, len(pairs), 2):
            into[self.key(pairs[i])] = pairs[i + 1]

    def key(self, value: Any) -> Any:
        """A value as key of a mapping: texts, Python's numbers and tuples of them, and the like."""
        found = self._part_of_key(value)
        if not _has_own_hash(found) and found not in self._keys:
            self._of_one_hash[hash(found)] += 1
            if len(self._keys) >= _MOST_KEYS_OF_PARTS:
                raise UnsupportedError(
                    f"more than {_MOST_KEYS_OF_PARTS} keys of it are neither texts nor whole "
                    "numbers below 2^60"
                )
            if self._of_one_hash[hash(found)] > _MOST_OF_ONE_HASH:
                raise UnsupportedError(f"more than {_MOST_OF_ONE_HASH} keys of it have one hash")
            self._keys.add(found)
        return found

    def _part_of_key(self, value: Any) -> Any:
        kind = type(value)
        if _has_own_hash(value):
            return value
        self.spend(0)
        if isinstance(value, tuple) and len(value) <= _MOST_DIMENSIONS:
            return tuple(map(self._part_of_key, value))
        if kind in (int, float, complex, torch.dtype, torch.device) or isinstance(value, PurePath):
            return value
        number = value.item() if kind.__module__ == "numpy" and kind.__name__ != "ndarray" else None
        if type(number) in (bool, int, float, complex):
            return number
        raise UnsupportedError(
            f"a {kind.__name__} is a key of it; keys are texts, numbers, paths, and tuples of at "
            f"most {_MOST_DIMENSIONS} of them"
        )

    def _persistent(self) -> None:
        pid = self._pop()
        if type(pid) is not tuple or not pid or pid[0] not in ("storage", b"storage"):
            raise UnreadableError("it names something that is no storage")
        if self._storages is None:
            raise UnreadableError("it has a storage where there is none")
        self.spend(500)
        self._push(self._storages(pid))


def _has_own_hash(value: object) -> bool:
    """Whether a file cannot choose the hash of a key, or (short whole numbers) hardly."""
    kind = type(value)
    return kind in (str, bytes, bool, type(None)) or (
        type(value) is int and -(1 << 60) < value < 1 << 60
    )


_missing = object()
_STOP = pickle.STOP[0]


def _long(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _text(data: bytes) -> object:
    """A text of Python 2, or bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _steps() -> Iterator[tuple[bytes, Callable[[_Machine], object]]]:
    # The operations of `pickle`, protocol 2, as far as torch.save writes them.
    def sized(form: str, use: Callable[[_Machine, Any], object]) -> Callable[[_Machine], object]:
        unpack, size = struct.Struct(form).unpack, struct.calcsize(form)
        return lambda m: use(m, unpack(m._read(size))[0])

    def pushed(made: Callable[[], object]) -> Callable[[_Machine], object]:
        return lambda m: m._push(made())

    def bytes_of(form: str, made: Callable[[bytes], object]) -> Callable[[_Machine], object]:
        return sized(form, lambda m, n: m._push(made(m._read(n))))

    push, put = _Machine._push, _Machine._put
    yield pickle.PROTO, lambda m: m._read(1)
    yield pickle.NONE, pushed(lambda: None)
    yield pickle.NEWTRUE, pushed(lambda: True)
    yield pickle.NEWFALSE, pushed(lambda: False)
    yield pickle.EMPTY_TUPLE, pushed(tuple)
    yield pickle.EMPTY_LIST, pushed(list)
    yield pickle.EMPTY_DICT, pushed(dict)
    yield pickle.EMPTY_SET, pushed(set)
    yield pickle.BININT, sized("<i", push)
    yield pickle.BININT1, sized("<B", push)
    yield pickle.BININT2, sized("<H", push)
    yield pickle.BINFLOAT, sized(">d", push)
    yield pickle.LONG1, bytes_of("<B", _long)
    yield pickle.BINUNICODE, bytes_of("<I", lambda data: data.decode("utf-8", "surrogatepass"))
    yield pickle.SHORT_BINSTRING, bytes_of("<B", _text)
    yield pickle.BINSTRING, bytes_of("<I", _text)
    yield pickle.BINGET, sized("<B", lambda m, i: m._push(m._memo[i]))
    yield pickle.LONG_BINGET, sized("<I", lambda m, i: m._push(m._memo[i]))
    yield pickle.BINPUT, sized("<B", put)
    yield pickle.LONG_BINPUT, sized("<I", put)
    yield pickle.MARK, _Machine._mark
    yield pickle.TUPLE, lambda m: m._push(tuple(m._since_mark()))
    yield pickle.TUPLE1, lambda m: m._tuple(1)
    yield pickle.TUPLE2, lambda m: m._tuple(2)
    yield pickle.TUPLE3, lambda m: m._tuple(3)
    yield pickle.APPEND, lambda m: m._append([m._pop()])
    yield pickle.APPENDS, lambda m: m._append(m._since_mark())
    yield pickle.SETITEM, lambda m: m._set([m._pop(), m._pop()][::-1])
    yield pickle.SETITEMS, lambda m: m._set(m._since_mark())
    yield pickle.GLOBAL, _Machine._global
    yield pickle.REDUCE, _Machine._reduce
    yield pickle.NEWOBJ, _Machine._reduce
    yield pickle.BUILD, _Machine._build
    yield pickle.BINPERSID, _Machine._persistent


_STEPS = {code[0]: step for code, step in _steps()}


def _rebuilt(
    machine: _Machine,
    elements: object,
    offset: object,
    size: object,
    stride: object,
    grad: object = None,
    hooks: object = None,
    bits: object = None,
) -> Tensor:
    """A tensor of a storage: nothing beyond the storage is in it.

    Nothing is allocated but for views whose conjugate or negative bit is set, which `bits` says:
    their values are computed, and share no storage.
    """
    if elements is None:
        return _no_values(machine)
    view = _view(machine, elements, offset, size, stride)
    if not bits:
        return view
    if type(bits) is not dict or not all(
        name in ("conj", "neg") and type(value) is bool for name, value in bits.items()
    ):
        raise UnreadableError("a tensor has other facts than its conjugate and negative bits")
    if bits.get("conj") and not view.is_complex():
        raise UnreadableError(f"a tensor of {view.dtype} is conjugate")
    if any(bits.values()):
        machine.spend(view.numel() * view.dtype.itemsize)
    view = view.conj().resolve_conj() if bits.get("conj") else view
    return view.neg() if bits.get("neg") else view


def _view(
    machine: _Machine, elements: object, offset: object, size: object, stride: object
) -> Tensor:
    if not isinstance(elements, _Elements) or type(size) is not tuple or type(stride) is not tuple:
        raise UnreadableError("a tensor has no storage, size or stride")
    first, sizes, strides = _whole(offset), tuple(map(_whole, size)), tuple(map(_whole, stride))
    if len(sizes) != len(strides) or len(sizes) > _MOST_DIMENSIONS:
        raise UnreadableError(f"a tensor has {len(sizes)} sizes and {len(strides)} strides")
    values = elements.values
    machine.spend(1000)
    if 0 in sizes:
        if math.prod(n or 1 for n in sizes) >= 1 << 40:
            raise TooLargeError(f"a tensor of shape {list(sizes)} is claimed")
        return values.new_empty(sizes)
    last = first + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if last >= len(values):
        raise TooLargeError(
            f"a tensor of shape {list(sizes)} ends at element {last} of a storage of {len(values)}"
        )
    if (math.prod(sizes) - len(values)) * values.dtype.itemsize > _MOST_EXPANDED:
        raise UnsupportedError(
            f"a tensor of shape {list(sizes)} is claimed, of which {len(values)} elements are "
            "stored; a view that was expanded has to be saved as .contiguous()"
        )
    return values.as_strided(sizes, strides, values.storage_offset() + first)


def _rebuilt_untyped(
    machine: _Machine,
    elements: object,
    offset: object,
    size: object,
    stride: object,
    grad: object,
    hooks: object,
    dtype: object,
    bits: object = None,
) -> Tensor:
    """As `_rebuilt`, of bytes."""
    if elements is None:
        return _no_values(machine)
    if not isinstance(dtype, torch.dtype) or not isinstance(elements, _Elements):
        raise UnreadableError("a tensor has no dtype or storage")
    if elements.values.dtype != dtype:
        raw = elements.values.view(torch.uint8)
        elements = _Elements(raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype))
    return _rebuilt(machine, elements, offset, size, stride, grad, hooks, bits)


def _no_values(machine: _Machine, *_: object) -> Tensor:
    """Stands for a sparse, quantised, nested or meta tensor, which has no plain values."""
    machine.spend(1000)
    return torch.empty(0, device="meta")


def _first(machine: _Machine, value: object, *_: object) -> object:
    if isinstance(value, (Tensor, _Array)):
        return value
    import numpy as np

    if isinstance(value, np.ndarray):
        machine.spend(value.nbytes)
        return torch.from_numpy(value.copy())
    raise UnreadableError(f"a parameter is a {type(value).__name__}")


def _from_type(
    machine: _Machine, function: object, kind: object, arguments: object, *_: object
) -> object:
    """A tensor of a subclass, or one with attributes, as a plain one."""
    if not isinstance(function, _Function) or type(arguments) is not tuple:
        raise UnreadableError("a tensor has nothing that makes it")
    if function.call is _from_type:
        raise UnreadableError("a tensor is made by its own making")
    return function.call(machine, *arguments)


def _encoded(machine: _Machine, text: object, encoding: object = "utf-8") -> bytes:
    """Bytes, as protocol 2 has them."""
    known = ("latin1", "latin-1", "iso-8859-1", "utf-8", "utf8", "ascii")
    if type(text) is not str or encoding not in known:
        raise ForeignObjectError(f"_codecs.encode to {str(encoding)[:40]!r}")
    machine.spend(4 * len(text))
    return codecs.encode(text, str(encoding))


def _copied(kind: Callable[..., Any]) -> Callable[..., object]:
    def make(machine: _Machine, values: Any = ()) -> object:
        if isinstance(values, (list, tuple, set, dict)):
            machine.spend(100 * len(values))
        elif isinstance(values, (bytes, bytearray)) and kind is bytearray:
            machine.spend(len(values))
            return bytearray(values)
        else:
            raise UnreadableError(f"a {kind.__name__} is made of a {type(values).__name__}")
        if kind is bytearray:
            if values:
                raise UnreadableError("a bytearray is made of no bytes")
            return bytearray()
        if kind is Counter and isinstance(values, dict):
            return Counter({machine.key(k): v for k, v in values.items()})
        if kind is OrderedDict:
            pairs = values.items() if isinstance(values, dict) else values
            return OrderedDict((machine.key(k), v) for k, v in pairs)
        return kind(machine.key(v) for v in values)

    return make


def _numbers(kind: Callable[..., Any]) -> Callable[..., object]:
    def make(machine: _Machine, *values: object) -> object:
        if len(values) == 1 and type(values[0]) is tuple:
            values = values[0]
        if len(values) > _MOST_DIMENSIONS or not all(type(v) in (int, float) for v in values):
            raise UnreadableError("what should be numbers is none")
        return kind(values)

    return make


def _path(kind: type[PurePath]) -> Callable[..., object]:
    def make(machine: _Machine, *parts: object) -> object:
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) != len(parts):
            raise UnreadableError("a path is no text")
        machine.spend(sum(map(len, texts)))
        return kind(*texts)

    return make


def _device(machine: _Machine, *facts: object) -> object:
    if not facts or type(facts[0]) is not str or len(facts) > 2:
        raise UnreadableError("a device has no name")
    return torch.device(":".join(str(fact) for fact in facts)[:40])


def _dtype(machine: _Machine, code: object, *_: object) -> object:
    if not isinstance(code, str):
        raise ForeignObjectError("numpy.dtype of records")
    return _DType(code)


def _scalar(machine: _Machine, dtype: object, data: object = b"") -> object:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes):
        raise ForeignObjectError("a numpy scalar that is no number")
    if not dtype.plain:
        return Inert()
    machine.spend(len(data))
    if dtype.code[0] in "SU" and not data:
        return "" if dtype.code[0] == "U" else b""
    values = dtype.values(data)
    if len(values) != 1:
        raise UnreadableError(f"a number has {len(data)} bytes")
    # numpy.str_ and numpy.bytes_ are Python's own with another name.
    return values[0].item() if dtype.code[0] in "SU" else values[0]


def _registered() -> set[str]:
    """Names of the classes and functions that the process gave to add_safe_globals."""
    found = set()
    for entry in torch.serialization.get_safe_globals():
        of, name = entry if isinstance(entry, tuple) else (entry, "")
        found.add(name or f"{of.__module__}.{of.__qualname__}")
    return found


# What stands for a class or function, and for what it makes.
_LEFT_OUT = _Function(lambda machine, *_: _Ignored())


def _names() -> Iterator[tuple[str, object]]:
    numbers = {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
    }
    # Quantised ones make tensors that stand for no numbers (`_no_values`).
    numbers |= {"QInt32": torch.int32, "QInt8": torch.int8}
    numbers |= dict.fromkeys(("QUInt8", "QUInt4x2", "QUInt2x4"), torch.uint8)
    for module in ("torch", "torch.cuda"):
        for name, dtype in numbers.items():
            yield f"{module}.{name}Storage", _Storage(dtype)
    for name in (
        "torch.storage.UntypedStorage",
        "torch.UntypedStorage",
        "torch.cuda.UntypedStorage",
    ):
        yield name, _Storage(torch.uint8)
    for name in (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool "
        "complex128 complex64 complex32 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
        "float8_e8m0fnu qint32 qint8 quint8 quint4x2 quint2x4"
    ).split():
        if hasattr(torch, name):
            yield f"torch.{name}", getattr(torch, name)
    for name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
        yield f"torch._utils.{name}", _Function(_rebuilt)
    yield "torch._utils._rebuild_tensor_v3", _Function(_rebuilt_untyped)
    for name in (
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_device_tensor_from_numpy",
        "_rebuild_device_tensor_from_cpu_tensor",
    ):
        yield f"torch._utils.{name}", _Function(_first)
    yield "torch.nn.parameter.Parameter", _Function(_first)
    yield "torch._tensor._rebuild_from_type_v2", _Function(_from_type)
    for name in (
        "_rebuild_sparse_tensor",
        "_rebuild_sparse_csr_tensor",
        "_rebuild_qtensor",
        "_rebuild_meta_tensor_no_storage",
        "_rebuild_nested_tensor",
        "_rebuild_wrapper_subclass",
    ):
        yield f"torch._utils.{name}", _Function(_no_values)
    yield "torch.Tensor", Inert()
    yield "torch.serialization._get_layout", _Function(lambda machine, *_: Inert())
    for name in ("tensor_affine", "channel_affine", "tensor_symmetric", "channel_symmetric"):
        yield f"torch.per_{name}", Inert()
    yield "torch.per_channel_affine_float_qparams", Inert()
    yield "torch.Size", _Function(_numbers(lambda values: torch.Size(map(_whole, values))))
    yield "torch.device", _Function(_device)
    yield "collections.OrderedDict", _Function(_copied(OrderedDict))
    yield "collections.Counter", _Function(_copied(Counter))
    yield "builtins.set", _Function(_copied(set))
    yield "builtins.bytearray", _Function(_copied(bytearray))
    # What protocol 2 has for b"".
    yield "builtins.bytes", _Function(lambda machine: b"")
    yield "builtins.complex", _Function(_numbers(lambda values: complex(*values)))
    yield "_codecs.encode", _Function(_encoded)
    # What training scripts keep beside the weights: torchvision's and WZMIAOMIAO's a Namespace,
    # others NumPy's numbers and paths.
    yield "argparse.Namespace", _Function(lambda machine: argparse.Namespace())
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath"):
            yield f"{module}.{name}", _Function(_path(PurePosixPath))
        for name in ("WindowsPath", "PureWindowsPath"):
            yield f"{module}.{name}", _Function(_path(PureWindowsPath))
    # NumPy 2 renamed the module; files of both kinds exist.
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        yield f"{module}.scalar", _Function(_scalar)
        yield f"{module}._reconstruct", _Function(lambda machine, *_: _Array())
    yield "numpy.ndarray", Inert()
    yield "numpy.dtype", _Function(_dtype)
    # mmengine's training checkpoints keep their loss curves in HistoryBuffers, whose methods are
    # pickled as calls of getattr; what stands in its place looks nothing up.
    yield "mmengine.logging.history_buffer.HistoryBuffer", _LEFT_OUT
    yield "builtins.getattr", _Function(lambda machine, *_: Inert())


_NAMES: dict[str, object] = dict(_names())
