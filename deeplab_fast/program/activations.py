"""The memory of a program's maps on the CPU: one block for each call that runs at a time.

Maps above malloc's threshold are faulted in page by page whenever they are made anew (a MobileNetV3
at 1024x2048: 65,507 faults, a fifth of the time). Here every map of a call gets its place in one
block, which is kept for the calls that follow; places of maps that do not live at the same time
overlap. What a call returns lies in memory of its own.
"""

from __future__ import annotations

import copy
import math
import mmap
import threading
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layers import CHANNELS_LAST, Layer, Program, execute

# A block above this size is given back after the call: there faults are a small part of it.
KEPT_BYTES = 1 << 30
# Blocks kept, for as many threads that call at a time.
_KEPT_BLOCKS = 4
# Calls in a row that need less than a quarter of a block, until a smaller one takes its place.
_PATIENCE = 16
# Shapes whose plans are remembered.
_KEPT_PLANS = 64
_ALIGNMENT = 256
_PAGE = 4096


class Activations:
    """Runs a program with its maps in memory that stays.

    Safe to call from several threads; copies and pickles have none of the memory.

    Args:
        program: of layers on the CPU.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._lock = threading.Lock()
        self._blocks: list[_Block] = []
        self._plans: OrderedDict[Any, Places] = OrderedDict()

    def logits(self, x: Any, aux: bool) -> dict[str, Tensor]:
        """As `Program.logits`, to the bit."""
        program = self._program
        # A module that runs as it is may keep its input.
        if program.has_plain_layers or not isinstance(x, Tensor) or x.numel() == 0:
            return program.logits(x, aux=aux)
        places = self._places(x.shape, aux)
        block = self._take(places.size)
        try:
            maps = program.maps(x, _Run(places, block.views(places), x), aux)
        finally:
            self._give(block)
        return program.formatted(maps, x)

    def free(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._blocks.clear()

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks that no call uses now."""
        return sum(block.size for block in list(self._blocks))

    def _places(self, shape: torch.Size, aux: bool) -> Places:
        # What a layer runs, and so whether it writes into a given map, depends on threads.
        key = (shape, aux, torch.get_num_threads())
        places = self._plans.get(key)
        if places is None:
            places = plan(self._program, shape, aux)
            with self._lock:
                self._plans[key] = places
                while len(self._plans) > _KEPT_PLANS:
                    self._plans.popitem(last=False)
        return places

    def _take(self, size: int) -> _Block:
        with self._lock:
            fitting = [b for b in self._blocks if size <= b.size]
            found = min(fitting, key=lambda b: b.size, default=None)
            if found is not None:
                self._blocks.remove(found)
                found.spared = found.spared + 1 if found.size > 4 * size else 0
                # One that is much too large is not held on to.
                found = None if found.spared >= _PATIENCE else found
            elif self._blocks:
                # The new one, which is larger, serves its calls too.
                self._blocks.pop(0)
        return _Block(size) if found is None else found

    def _give(self, block: _Block) -> None:
        with self._lock:
            if block.size <= KEPT_BYTES and len(self._blocks) < _KEPT_BLOCKS:
                self._blocks.append(block)

    def __deepcopy__(self, memo: dict[int, Any]) -> Activations:
        return Activations(copy.deepcopy(self._program, memo))

    def __reduce__(self) -> tuple[type[Activations], tuple[Program]]:
        return Activations, (self._program,)


@dataclass(frozen=True)
class Place:
    """Where a call's result lies.

    Attributes:
        offset: in bytes; None where the layer makes its result itself.
        shape, dtype: of the result, in channels_last.
    """

    offset: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Places:
    """The places of all maps of a program for inputs of one shape.

    Attributes:
        calls: the layers in the order in which they run, with the place of the result.
        input: the place of the input in channels_last; None where no layer needs it so.
        size: of the block, in bytes.
    """

    calls: tuple[tuple[Layer, Place], ...]
    input: Place | None
    size: int


def plan(program: Program, shape: Sequence[int], aux: bool = True) -> Places:
    """The places for inputs [N, C, H, W], by when each map is last read.

    The largest maps are placed first, each at the lowest offset where nothing lies that lives at
    the same time.
    """
    recorder = _Recorder(tuple(shape))
    maps: Any = program.maps(recorder.source, recorder, aux)
    # What is returned, or may share memory with it, outlives the call.
    kept = _slots(maps.values())
    size = _pack([slot for slot in recorder.slots if slot not in kept])
    calls = tuple(
        (layer, Place(None if slot is None else slot.offset, shape, layer.result_dtype))
        for layer, shape, slot in recorder.calls
    )
    x = recorder.input
    place = None if x is None else Place(x.offset, recorder.source.shape, torch.float32)
    return Places(calls, place, size)


class _Slot:
    """Memory of one map, or of several that overwrite each other, from call to call."""

    def __init__(self, size: int, first: int) -> None:
        self.size, self.first, self.last = size, first, first
        self.offset: int | None = None


class _Value:
    """A map while a program is recorded, with the slots that it may share memory with."""

    def __init__(self, shape: tuple[int, ...], slots: set[_Slot]) -> None:
        self.shape, self.slots = shape, slots


def _slots(values: Iterable[_Value | None]) -> set[_Slot]:
    return {slot for value in values if value is not None for slot in value.slots}


class _Recorder:
    """The `run` of a program that computes nothing."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.source = _Value(shape, set())
        self.calls: list[tuple[Layer, tuple[int, ...], _Slot | None]] = []
        self.slots: list[_Slot] = []
        self.input: _Slot | None = None

    def __call__(self, layer: Layer, *values: Any) -> Any:
        shapes = tuple(None if value is None else value.shape for value in values)
        if self.source in values and not layer.takes_any_format and self.input is None:
            self.input = self._slot(self.source.shape, torch.float32)
            self.source.slots.add(self.input)
        read = _slots(values)
        for slot in read:
            slot.last = len(self.calls)
        shape = tuple(layer.output_shape(*shapes))
        own: _Slot | None = None
        if layer.writes_into(*shapes):
            own = self._overwritten(layer, values, shape)
            own = own or self._slot(shape, layer.result_dtype)
        self.calls.append((layer, shape, own))
        return _Value(shape, read if own is None else {own})

    def _slot(self, shape: Sequence[int], dtype: torch.dtype) -> _Slot:
        slot = _Slot(math.prod(shape) * dtype.itemsize, len(self.calls))
        self.slots.append(slot)
        return slot

    def _overwritten(
        self, layer: Layer, values: Sequence[Any], shape: tuple[int, ...]
    ) -> _Slot | None:
        """The slot of the map that a result takes the memory of."""
        if layer.overwrites is None or layer.overwrites >= len(values):
            return None
        value = values[layer.overwrites]
        if value is None or value is self.source or value.shape != shape or len(value.slots) != 1:
            return None
        (slot,) = value.slots
        if slot in _slots(v for i, v in enumerate(values) if i != layer.overwrites):
            return None
        return slot if slot.size == math.prod(shape) * layer.result_dtype.itemsize else None


def _pack(slots: Sequence[_Slot]) -> int:
    """Give each slot its offset; the bytes that they take in all."""
    placed: list[tuple[int, int, _Slot]] = []
    for slot in sorted(slots, key=lambda slot: -slot.size):
        offset = 0
        size = -(-slot.size // _ALIGNMENT) * _ALIGNMENT
        for begin, end, other in placed:
            if other.last < slot.first or slot.last < other.first:
                continue
            if begin >= offset + size:
                break
            offset = max(offset, end)
        slot.offset = offset
        insort(placed, (offset, offset + size, slot), key=lambda place: place[:2])
    return max((end for _, end, _ in placed), default=0)


class _Block:
    """Memory that places are cut out of."""

    def __init__(self, size: int) -> None:
        self.size = -(-max(size, 1) // _PAGE) * _PAGE
        # Private: a forked process writes into pages of its own.
        private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
        memory = mmap.mmap(-1, self.size, flags=private) if private else mmap.mmap(-1, self.size)
        # Calls in a row that needed less than a quarter of it.
        self.spared = 0
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Not every kernel has them.
            with suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._views: dict[int, tuple[Places, list[Tensor | None]]] = {}
        with torch.inference_mode(False):
            # It keeps the memory mapped.
            self._bytes = torch.frombuffer(memory, dtype=torch.uint8)

    def views(self, places: Places) -> list[Tensor | None]:
        """The place of the input, then those of all results."""
        known = self._views.get(id(places))
        if known is None:
            if len(self._views) >= _KEPT_PLANS:
                self._views.clear()
            with torch.inference_mode(False):
                own = [places.input, *(place for _, place in places.calls)]
                known = self._views[id(places)] = places, [self._view(place) for place in own]
        return known[1]

    def _view(self, place: Place | None) -> Tensor | None:
        if place is None or place.offset is None:
            return None
        n, c, h, w = place.shape
        size = math.prod(place.shape) * place.dtype.itemsize
        flat = self._bytes[place.offset : place.offset + size].view(place.dtype)
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)


class _Run:
    """The `run` of a program whose results go to their places."""

    def __init__(self, places: Places, views: Sequence[Tensor | None], x: Tensor) -> None:
        self._calls = iter(zip(places.calls, views[1:], strict=True))
        self._x, self._place = x, views[0]
        self.execute = execute
        self._converted: Tensor | None = None

    def __call__(self, layer: Layer, *tensors: Tensor | None) -> Tensor:
        (planned, _), out = next(self._calls)
        assert planned is layer, layer.name
        if not layer.takes_any_format:
            tensors = tuple(self._in_format(t) if t is self._x else t for t in tensors)
        options = {} if out is None else {"out": out}
        return self.execute(layer, *tensors, **options)

    def _in_format(self, x: Tensor) -> Tensor:
        if self._converted is None:
            if self._place is None or x.is_contiguous(memory_format=CHANNELS_LAST):
                self._converted = x.contiguous(memory_format=CHANNELS_LAST)
            else:
                self._converted = self._place.copy_(x)
        return self._converted
