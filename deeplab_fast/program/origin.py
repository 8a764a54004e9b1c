"""What the data flow of a forward depends on beside its code: where it was found, and whether that
is still as it was.

A forward is free to read attributes of its module, what is in these, attributes of its class,
globals and closures. All that it reads by name is looked at, in the functions that it calls too.
"""

from __future__ import annotations

import dis
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from operator import is_
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .intact import runs_hooks

_MISSING = object()
_CONTAINERS = (list, dict, set, OrderedDict, deque)
# Containers in containers, and objects in objects.
_DEPTH = 4
# Functions that a forward calls, and those call.
_FUNCTIONS = 200
_SHIPPED = ("torch.", "deeplab_fast.", "typing", "collections")


class Reads:
    """What the forward of a module's class reads by name beside its arguments.

    Attributes:
        names: all names in its code and in that of the functions that it calls.
        sets: it sets variables outside of itself.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names: set[str] = set()
        self.sets = False
        self._read: list[tuple[Mapping[str, Any], str, Any]] = []
        self._cells: list[tuple[CellType, Any]] = []
        cls = type(module)
        own = [c for c in cls.__mro__ if c is not object and not _is_shipped(c.__module__)]
        seen: set[FunctionType] = set()
        waiting: list[Any] = [cls.forward]
        while waiting and len(seen) < _FUNCTIONS:
            function = _function(waiting.pop())
            if function is None or function in seen or _is_shipped(function.__module__ or ""):
                continue
            seen.add(function)
            names, sets = _names(function.__code__)
            self.names |= names
            self.sets |= sets
            waiting += self._looked_up(function, names, [vars(c) for c in own], vars(module))

    def _looked_up(
        self,
        function: FunctionType,
        names: frozenset[str],
        classes: Sequence[Mapping[str, Any]],
        attributes: Mapping[str, Any],
    ) -> Iterator[Any]:
        """Notes what a function reads, and gives it."""
        spaces: list[Mapping[str, Any]] = [function.__globals__, *classes]
        for name in names & function.__globals__.keys():
            value = function.__globals__[name]
            if isinstance(value, (ModuleType, type)) or _is_object(value):
                spaces.append(vars(value))
        for space in spaces:
            for name in names & space.keys():
                self._read.append((space, name, space[name]))
                yield space[name]
        for cell in function.__closure__ or ():
            value = cell.cell_contents if _is_filled(cell) else _MISSING
            self._cells.append((cell, value))
            yield value
        yield from [attributes[name] for name in names & attributes.keys()]
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            yield value

    def values(self) -> list[Any]:
        """What was read outside of the module."""
        return [value for *_, value in self._read] + [value for _, value in self._cells]

    def is_current(self) -> bool:
        """Whether the names still have these values."""
        return all([space.get(name, _MISSING) is value for space, name, value in self._read]) and (
            all([_is_filled(cell) and cell.cell_contents is value for cell, value in self._cells])
        )


class Contents:
    """What is in containers and objects.

    Args:
        values: containers, objects, and others, which are passed over.
        names: attributes of objects that count; None for all, the state of generators of random
            numbers too.
    """

    def __init__(self, values: Iterable[Any], names: set[str] | None = None) -> None:
        self._kept: list[tuple[Any, Any]] = []
        self._states: list[tuple[Callable[[], Any], Callable[[Any], Any], Any]] = []
        self._names = names
        seen: set[int] = set()
        for value in values:
            self._add(value, seen, _DEPTH)

    def _add(self, value: Any, seen: set[int], depth: int) -> None:
        if depth == 0 or id(value) in seen:
            return
        if isinstance(value, tuple):
            inside: Iterable[Any] = value
        elif isinstance(value, _CONTAINERS):
            self._kept.append((value, value.copy()))
            inside = list(value.values() if isinstance(value, dict) else value)
        elif self._names is None and (state := _generator(value)) is not None:
            get, put = state
            self._states.append((get, put, get()))
            return
        elif _is_object(value):
            attributes = vars(value)
            if self._names is not None:
                inside = [attributes.get(name, _MISSING) for name in sorted(self._names)]
                inside = [each for each in inside if each is not _MISSING]
                if inside:
                    self._kept.append((_Named(attributes, self._names), None))
            else:
                self._kept.append((attributes, attributes.copy()))
                inside = list(attributes.values())
        else:
            return
        seen.add(id(value))
        for each in inside:
            self._add(each, seen, depth - 1)

    def is_current(self) -> bool:
        """Whether the same is in them."""
        return all([_is_same(value, before) for value, before in self._kept])

    def put_back(self) -> bool:
        """Undo changes; whether there were any."""
        changed = False
        for value, before in self._kept:
            if not _is_same(value, before):
                changed = True
                value.clear()
                (value.update if isinstance(value, (dict, set)) else value.extend)(before)
        for get, put, before in self._states:
            if not _is_equal(get(), before):
                changed = True
                put(before)
        return changed


class _Named:
    """Attributes of an object that are looked at."""

    def __init__(self, attributes: dict[str, Any], names: set[str]) -> None:
        self._read = [(name, attributes[name]) for name in names & attributes.keys()]
        self._attributes = attributes

    def is_current(self) -> bool:
        return all([self._attributes.get(name, _MISSING) is value for name, value in self._read])


class Origin:
    """What a flow was found in, or why there is none.

    Args:
        modules: those whose forwards are in it, the one that is called first.
        changed: names of attributes that the forwards set, by module, which do not count.
        flags: layers and the values of their `inplace`.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        changed: Mapping[nn.Module, set[str]] | None = None,
        flags: Iterable[tuple[nn.Module, bool]] = (),
    ) -> None:
        changed = changed or {}
        # A module under two names once.
        self._modules = [
            _State(module, changed.get(module, set()), entered=i == 0)
            for i, module in enumerate(dict.fromkeys(modules))
        ]
        self._flags = list(flags)

    def is_current(self) -> bool:
        """Whether nothing has changed since."""
        try:
            return all([state.is_current() for state in self._modules]) and all(
                [vars(layer).get("inplace", False) == value for layer, value in self._flags]
            )
        except (RuntimeError, TypeError, ValueError):
            # Something without equality was exchanged.
            return False


class _State:
    """One of these modules. Asked at every call of every block: what is not there costs nothing."""

    def __init__(self, module: nn.Module, changed: set[str], entered: bool) -> None:
        self._module = module
        self._cls, self._forward = type(module), type(module).forward
        self._hooked = None if entered else runs_hooks(module)
        self._reads = Reads(module)
        self._attributes, self._changed = vars(module), changed
        kept = {k: v for k, v in self._attributes.items() if k not in changed}
        self._names, self._values = kept.keys(), list(kept.values())
        self._children = tuple(module._modules.items())
        self._tensors = [
            (held, list(held.values())) for held in (module._parameters, module._buffers) if held
        ]
        own = [v for k, v in kept.items() if k not in _OF_MODULES]
        self._contents = Contents(own + self._reads.values(), self._reads.names)

    def is_current(self) -> bool:
        module, attributes = self._module, self._attributes
        if self._changed:
            attributes = {k: v for k, v in attributes.items() if k not in self._changed}
        return (
            type(module) is self._cls
            and self._cls.forward is self._forward
            and attributes.keys() == self._names
            and all(map(is_, attributes.values(), self._values))
            and tuple(module._modules.items()) == self._children
            and all(
                [
                    len(held) == len(tensors) and all(map(is_, held.values(), tensors))
                    for held, tensors in self._tensors
                ]
            )
            and (self._hooked is None or runs_hooks(module) == self._hooked)
            and self._reads.is_current()
            and self._contents.is_current()
        )


# What nn.Module has of its own, which is looked at by itself.
_OF_MODULES = frozenset(vars(nn.Module()))


@cache
def _names(code: CodeType) -> tuple[frozenset[str], bool]:
    """Names in code and in what is defined in it; whether it sets variables outside of it."""
    names = set(code.co_names)
    sets = False
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            sets = True
        elif instruction.opname in ("STORE_DEREF", "DELETE_DEREF"):
            sets |= instruction.argval in code.co_freevars
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner, inner_sets = _names(constant)
            names |= inner
            # A comprehension or a lambda may set what the code around it has.
            sets |= inner_sets
    return frozenset(names), sets


def _function(value: Any) -> FunctionType | None:
    """The Python function that a value is, or runs."""
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


def _is_shipped(name: str) -> bool:
    return f"{name}.".startswith(_SHIPPED)


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _is_object(value: Any) -> bool:
    """Whether a value has attributes of its own that somebody may change."""
    cls = type(value)
    return (
        not isinstance(value, (nn.Module, Tensor, type, ModuleType, FunctionType, MethodType))
        and isinstance(getattr(value, "__dict__", None), dict)
        # Loggers remember whom they were asked for.
        and not _is_shipped(cls.__module__)
        and cls.__module__ not in ("logging", "builtins", "functools")
    )


def _generator(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How the state of a generator of random numbers is read and set."""
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return value.get_state, value.set_state
    if numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None


def _is_equal(a: Any, b: Any) -> bool:
    """Of states of generators: numbers and texts, tensors, arrays, and tuples and dicts of them."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_is_equal, a, b))
    equal = a == b
    # Of arrays each element.
    return bool(equal.all() if hasattr(equal, "all") else equal)


def _is_same(value: Any, before: Any) -> bool:
    """Whether the same objects are in a container; what stands in for a map has no equality."""
    if isinstance(value, _Named):
        return value.is_current()
    if len(value) != len(before):
        return False
    if isinstance(value, dict):
        return list(value) == list(before) and all(map(is_, value.values(), before.values()))
    if isinstance(value, set):
        return value == before
    return all(map(is_, value, before))
