"""A module of another library that runs in our forms: what stands in its instance's `forward`.

`Forward` is bound on an instance by `accelerate`. A call with one map, or one list, tuple or dict
of maps, runs by a `Region`: in inference by a program with prepared weights, as a `DeepLabV3` does
by itself, where gradients are needed by the training forms. Everything else, and every call that
something speaks against, runs the forward of the module's class, in which the modules inside, bound
as well, run in our forms as far as they can.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import match, training
from .calibration import Calibration
from .fast_path import FastPath
from .formats import in_plain_format, is_channels_last
from .intact import BoundForward
from .layers import Heads, Run, Step
from .probe import differing
from .staleness import Snapshot
from .structure import is_map, segment_of_flow
from .trace import Flow, Untraceable, changes_input, filled, leaves, trace

logger = logging.getLogger("deeplab_fast")


class _Thread(threading.local):
    """Of one thread: whether classes' forwards run, and the regions whose calls are under way."""

    def __init__(self) -> None:
        self.plainly = False
        self.running: set[int] = set()


_thread = _Thread()
# Where a value stands in lists, tuples and dicts.
_Path = tuple[tuple[type, Any], ...]


@contextmanager
def plainly() -> Iterator[None]:
    """Calls in this thread run the forwards of the classes."""
    before, _thread.plainly = _thread.plainly, True
    try:
        yield
    finally:
        _thread.plainly = before


class Forward(BoundForward):
    """Stands in `module.forward` and computes what the class's forward does.

    Looks like that to whoever asks for its code or signature: exporters and trainers do. A deep
    copy or a pickle of the module has one of its own.

    Args:
        module: the module.
        opaque: run the class's forward in any case, also inside of other modules.
    """

    def __init__(self, module: nn.Module, opaque: bool = False) -> None:
        self.module, self.opaque = module, opaque
        self.region = Region(module, self)
        # By mode, and whether gradients are recorded: (what it was found in, the flow or why there
        # is none).
        self._flows: dict[tuple[bool, bool], tuple[_Origin, Flow | Untraceable]] = {}
        # By mode, and whether gradients are recorded: what of the module decides it, and it.
        self._segments: dict[tuple[bool, bool], tuple[Snapshot, match.Segment]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if len(args) == 1 and not (kwargs or self.opaque or recorded):
            result = self.region.call(args[0])
            if result is not _PLAIN:
                return result
        return type(self.module).forward(self.module, *args, **kwargs)

    def segment(self, module: nn.Module) -> match.Segment:
        """What the module is; `match.Plain` where its forward has no data flow."""
        rule = match.rule_of_class(type(module))
        if rule is not None:
            return rule(module)
        mode = (module.training, torch.is_grad_enabled())
        known = self._segments.get(mode)
        if known is None or not (known[0].same_structure() and known[0].same_tensors()):
            # Read before it is found, so that it is never older.
            snapshot = Snapshot(self.region, values=False)
            known = self._segments[mode] = snapshot, self._found(module)
        return known[1]

    def _found(self, module: nn.Module) -> match.Segment:
        flow = self.flow()
        return (
            match.Plain(module) if isinstance(flow, Untraceable) else segment_of_flow(module, flow)
        )

    def flow(self) -> Flow | Untraceable:
        """The data flow of the module as it is now, or why it has none."""
        mode = (self.module.training, torch.is_grad_enabled())
        known = self._flows.get(mode)
        if known is None or not known[0].is_current():
            found: Flow | Untraceable
            try:
                found = trace(self.module)
            except Untraceable as reason:
                found = reason
            followed = (self.module,) if isinstance(found, Untraceable) else found.followed
            known = self._flows[mode] = (_Origin(followed), found)
        return known[1]

    def changes_input(self) -> bool:
        """Whether the class's forward changes the map that it is called with."""
        module = self.module
        if match.rule_of_class(type(module)) is not None:
            first = next(module.children(), None)
            is_row = type(module).forward is nn.Sequential.forward
            return is_row and first is not None and changes_input(first)
        flow = self.flow()
        return isinstance(flow, Untraceable) and flow.changes_input

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._of_class())

    def _of_class(self) -> MethodType:
        return MethodType(type(self.module).forward, self.module)

    def __getattr__(self, name: str) -> Any:
        if "module" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._of_class(), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return _bound(copy.deepcopy(self.module, memo), self.opaque, self.region.settings)

    def __reduce__(self) -> tuple[Callable[..., Forward], tuple[Any, ...]]:
        return _bound, (self.module, self.opaque, self.region.settings)


def _bound(module: nn.Module, opaque: bool, settings: tuple[bool, bool]) -> Forward:
    forward = Forward(module, opaque)
    forward.region.settings = settings
    return forward


def forward_of(module: nn.Module) -> Forward | None:
    """What `accelerate` bound on a module, or None."""
    found = module.__dict__.get("forward")
    return found if isinstance(found, Forward) else None


class _Origin:
    """What a flow was found in: modules, their attributes, children and classes."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._kept = [
            (
                module,
                type(module),
                type(module).forward,
                dict(vars(module)),
                dict(module._modules),
                [(v, v.copy()) for v in vars(module).values() if type(v) in (list, dict, set)],
            )
            for module in modules
        ]

    def is_current(self) -> bool:
        try:
            return all(
                type(module) is cls
                and cls.forward is forward
                and vars(module) == attributes
                and module._modules == children
                and all(value == before for value, before in containers)
                for module, cls, forward, attributes, children, containers in self._kept
            )
        except (RuntimeError, TypeError, ValueError):
            # An attribute without equality, such as a tensor, was exchanged.
            return False


class _Nothing:
    """The result of a call that has to run the class's forward."""


_PLAIN = _Nothing()


class Region:
    """One module as the fast path and the training forms run it; a `network.Runnable`.

    Attributes:
        fast: run programs in inference.
        fused: run the training forms.
        verdicts: what the comparison with the plain path said, by kind of call, dtypes and device:
            "", or why the module runs plainly.
    """

    calibration: Calibration | None = None
    cuda_graphs: bool | None = None
    max_extra_bytes: int | None = None
    precision = "fp32"

    def __init__(self, module: nn.Module, forward: Forward) -> None:
        self._modules = {"module": module}
        self._forward = forward
        self.fast = self.fused = True
        self.path = FastPath()
        self.verdicts: dict[tuple[Any, ...], str] = {}

    @property
    def settings(self) -> tuple[bool, bool]:
        """(fast, fused)."""
        return self.fast, self.fused

    @settings.setter
    def settings(self, values: tuple[bool, bool]) -> None:
        if values != self.settings:
            self.path.drop()
        self.fast, self.fused = values

    @property
    def module(self) -> nn.Module:
        """The module that it runs."""
        return self._modules["module"]

    @property
    def training(self) -> bool:
        """The module's mode."""
        return self.module.training

    def parameters(self) -> Iterator[nn.Parameter]:
        """The module's."""
        return self.module.parameters()

    def buffers(self) -> Iterator[Tensor]:
        """The module's."""
        return self.module.buffers()

    def parts(self, aux: bool = True) -> list[tuple[str, nn.Module, match.Item]]:
        """The module, whose hooks run outside of what is bound."""
        return [("", self.module, self._forward.segment(self.module))]

    def assembled(self, steps: Sequence[Step]) -> tuple[Step, Heads]:
        """A program's results, by place."""
        return _Results(*steps), ()

    def call(self, x: Any) -> Any:
        """The module's result for x, or `_PLAIN`."""
        maps = list(leaves(x))
        # What runs as it is inside of its own region runs by the forward of its class.
        if _thread.plainly or id(self) in _thread.running:
            return _PLAIN
        if not maps or not all(map(is_map, maps)):
            return _PLAIN
        first = maps[0]
        if any(t.dtype != first.dtype or t.device != first.device for t in maps):
            return _PLAIN
        if training.needs_gradients(self.module, maps):
            run, kind = (self._train, "training") if self.fused else (None, "")
        else:
            run, kind = (self._infer, "inference") if self.fast else (None, "")
        if run is None or training.transformed() or self._forward.changes_input():
            return _PLAIN
        if self._verdict(kind, x, first):
            return _PLAIN
        return self._entered(run, x)

    def _entered(self, run: Callable[[Any], Any], x: Any) -> Any:
        _thread.running.add(id(self))
        try:
            return run(x)
        finally:
            _thread.running.discard(id(self))

    def check(self, kind: str, x: Any) -> str:
        """Why calls like that on x run plainly after a comparison; "" where they need not."""
        return self._verdict(kind, x, next(leaves(x)))

    def _verdict(self, kind: str, x: Any, first: Tensor) -> str:
        device = first.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (kind, self.training, first.dtype, device, autocast)
        known = self.verdicts.get(key)
        if known is None:
            # Also what runs inside of the comparison.
            self.verdicts[key] = "is being compared"
            try:
                run = partial(self._entered, self._train if kind == "training" else self._infer)
                found = differing(self.module, x, run, _PLAIN, kind == "training", plainly)
            except BaseException:
                del self.verdicts[key]
                raise
            if found is None:
                # Nothing was compared: the plain path refuses the call, or ours does.
                del self.verdicts[key]
                return ""
            if found:
                name = type(self.module).__name__
                logger.warning("accelerate: %s runs its plain modules: %s", name, found)
            known = self.verdicts[key] = found
        return known

    def _infer(self, x: Any) -> Any:
        first = next(leaves(x))
        if first.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return _PLAIN
        results = self.path.logits(self, x, True)
        return _PLAIN if results is None else _rebuilt(results, x)

    def _train(self, x: Any) -> Any:
        first = next(leaves(x))
        segment = self._forward.segment(self.module)
        if isinstance(segment, match.Plain) or not training.has_kernels(first):
            return _PLAIN
        given = filled(x, lambda t: t.contiguous(memory_format=torch.channels_last))
        same = {id(new): old for new, old in zip(leaves(given), leaves(x), strict=True)}
        result = _flat(training.run(segment, given))
        own = {path: y for path, y in result.items() if id(y) not in same}
        weight = next((p for p in self.module.parameters() if p.dim() == 4), None)
        last = weight is not None and is_channels_last(weight)
        formatted = in_plain_format(own, first, last)
        return _nested({path: formatted.get(path, same.get(id(y))) for path, y in result.items()})


class _Results:
    """A step whose results are told apart by their place, where its inputs are returned too."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def __call__(self, x: Any, run: Run) -> dict[Any, Any]:
        given = {id(leaf): i for i, leaf in enumerate(leaves(x))}
        results = OrderedDict()
        for path, value in _flat(self._step(x, run)).items():
            place = given.get(id(value))
            results[path if place is None else (*path, (_Given, place))] = value
        return results


class _Given:
    """Marks a result that is an input as it came."""


def _flat(structure: Any, path: _Path = ()) -> dict[_Path, Any]:
    """The leaves of lists, tuples and dicts by their place."""
    cls = type(structure)
    if cls in (list, tuple):
        entries = list(enumerate(structure))
    elif cls in (dict, OrderedDict):
        entries = list(structure.items())
    else:
        return {path: structure}
    return {k: v for key, each in entries for k, v in _flat(each, (*path, (cls, key))).items()}


def _nested(flat: dict[_Path, Any]) -> Any:
    """The inverse of `_flat`."""
    if () in flat:
        return flat[()]
    cls = next(iter(flat))[0][0]
    groups: dict[Any, dict[_Path, Any]] = OrderedDict()
    for path, value in flat.items():
        groups.setdefault(path[0][1], {})[path[1:]] = value
    values = {key: _nested(group) for key, group in groups.items()}
    return cls(values.values()) if cls in (list, tuple) else cls(values)


def _rebuilt(results: dict[Any, Tensor], x: Any) -> Any:
    given = list(leaves(x))
    flat = OrderedDict()
    for path, value in results.items():
        if path and path[-1][0] is _Given:
            flat[path[:-1]] = given[path[-1][1]]
        else:
            flat[path] = value
    return _nested(flat)


class Replicate:
    """Stands before `_replicate_for_data_parallel`: a replica runs by its own parameters.

    torch.nn.DataParallel copies a module's attributes, what is bound to the module too.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self) -> nn.Module:
        replica: Any = type(self._module)._replicate_for_data_parallel(self._module)
        for name in ("forward", "_replicate_for_data_parallel"):
            replica.__dict__.pop(name, None)
        return replica

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicate:
        return Replicate(copy.deepcopy(self._module, memo))

    def __reduce__(self) -> tuple[type[Replicate], tuple[nn.Module]]:
        return Replicate, (self._module,)
