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
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import match, training
from .calibration import Calibration
from .fast_path import FastPath, reasons
from .formats import is_channels_last
from .intact import BoundForward, bound_forward
from .layers import Heads, Run, Step
from .origin import Origin
from .probe import UNCOMPARED, Found, differing
from .staleness import Snapshot
from .structure import compute, is_map, segment_of_flow, without_last_resizes
from .trace import Flow, Node, Untraceable, changes_input, filled, is_row, leaves, trace

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
        # By mode: the flow or why there is none.
        self._flows: dict[_Mode, Flow | Untraceable] = {}
        # By mode: what of the module decides it, and it.
        self._segments: dict[_Mode, tuple[Snapshot, _Own]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if len(args) + len(kwargs) == 1 and not (self.opaque or recorded):
            forward = type(self.module).forward
            if args or next(iter(kwargs)) == _first_name(forward):
                result = self.region.call(args[0] if args else next(iter(kwargs.values())))
                if result is not _PLAIN:
                    return result
        return type(self.module).forward(self.module, *args, **kwargs)

    def segment(self, module: nn.Module) -> match.Segment:
        """What the module is as a part of others; `match.Plain` where its forward has no data
        flow, or one for maps of some sizes only."""
        rule = match.rule_of_class(type(module))
        if rule is not None:
            return rule(module)
        own = self.own()
        return match.Plain(module) if own.flow is not None and own.flow.decisions else own.segment

    def own(self) -> _Own:
        """What the module is where it is called."""
        module = self.module
        rule = match.rule_of_class(type(module))
        if rule is not None:
            return _Own(None, rule(module))
        mode = _mode(module)
        known = self._segments.get(mode)
        if known is None or not (known[0].same_structure() and known[0].same_tensors()):
            # Read before it is found, so that it is never older.
            snapshot = Snapshot(self.region, values=False)
            flow = self.flow()
            if isinstance(flow, Untraceable):
                own = _Own(None, match.Plain(module))
            else:
                own = _Own(flow, segment_of_flow(module, flow))
            known = self._segments[mode] = snapshot, own
        return known[1]

    def flow(self) -> Flow | Untraceable:
        """The data flow of the module as it is now, or why it has none."""
        mode = _mode(self.module)
        known = self._flows.get(mode)
        if known is None or not known.origin.is_current():
            if known is not None:
                # What was compared was another forward.
                self.region.forget()
            try:
                known = trace(self.module)
            except Untraceable as reason:
                known = reason
            self._flows[mode] = known
        return known

    def origins(self) -> Iterator[Origin]:
        """What the flow was found in, where a rule does not say what the module is."""
        if match.rule_of_class(type(self.module)) is None:
            yield self.flow().origin

    def changes_input(self) -> bool:
        """Whether the class's forward changes the map that it is called with."""
        module = self.module
        if match.rule_of_class(type(module)) is not None:
            return is_row(module) and changes_input(module)
        flow = self.flow()
        return isinstance(flow, Untraceable) and flow.changes_input

    def why_plainly(self) -> str:
        """Why the class's forward runs whatever it is called with; "" where it need not."""
        if match.rule_of_class(type(self.module)) is not None:
            return "its forward changes its input in place" if self.changes_input() else ""
        flow = self.flow()
        return str(flow) if isinstance(flow, Untraceable) else ""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._of_class())

    def _of_class(self) -> MethodType:
        return MethodType(type(self.module).forward, self.module)

    def __getattr__(self, name: str) -> Any:
        if "module" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._of_class(), name)

    def in_eval_view(self, view: nn.Module) -> Forward:
        """Of a view of the module: one of its own, which computes what was compared for this."""
        forward = _bound(view, self.opaque, self.region.settings)
        forward.region.verdicts = self.region.verdicts
        return forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return _bound(copy.deepcopy(self.module, memo), self.opaque, self.region.settings)

    def __reduce__(self) -> tuple[Callable[..., Forward], tuple[Any, ...]]:
        return _bound, (self.module, self.opaque, self.region.settings)


class _Own:
    """What a module is.

    Attributes:
        flow: what that was found in; None where a rule says it, or nothing.
        segment: it.
        inner, resizes: as `structure.without_last_resizes` has them.
        is_one_layer: there is nothing in it that could be joined.
    """

    def __init__(self, flow: Flow | None, segment: match.Segment) -> None:
        self.flow, self.segment = flow, segment
        self.inner, self.resizes = without_last_resizes(segment)
        parts = [p for p in match.segments([segment]) if not isinstance(p, match.Free)]
        self.is_one_layer = len(parts) < 2 and all(map(_is_one_layer, parts))

    def takes(self, x: Any) -> bool:
        """Whether the module does with a call's argument what it was followed with."""
        if isinstance(x, Tensor):
            return self.flow is None or self.flow.holds(x.shape)
        # A forward may ask what it was given, which was one map.
        return _takes_lists([self.segment]) and not (self.flow is not None and self.flow.decisions)


_Mode = tuple[bool, ...]


def _mode(module: nn.Module) -> _Mode:
    """What a forward may ask for and decide by."""
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    return (module.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


@cache
def _first_name(forward: Callable[..., Any]) -> str | None:
    """The name of a forward's first argument behind the module, where it can be given by name."""
    try:
        own = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return None
    named = len(own) > 1 and own[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    return own[1].name if named else None


def _bound(module: nn.Module, opaque: bool, settings: tuple[bool, bool]) -> Forward:
    forward = Forward(module, opaque)
    forward.region.settings = settings
    return forward


def forward_of(module: nn.Module) -> Forward | None:
    """What `accelerate` bound on a module, or None."""
    found = bound_forward(module)
    return found if isinstance(found, Forward) else None


class _Nothing:
    """The result of a call that has to run the class's forward."""


_PLAIN = _Nothing()


class Region:
    """One module as the fast path and the training forms run it; a `network.Runnable`.

    Attributes:
        fast: run programs in inference.
        fused: run the training forms.
        verdicts: what the comparison with the plain path said, by kind of call, dtypes, device,
            structure and memory formats.
        reasons: by kind of call why the last one ran plainly without a comparison, where it did.
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
        self.verdicts: dict[tuple[Any, ...], Found] = {}
        self.reasons: dict[str, str] = {}

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
        return [("", self.module, self._forward.own().inner)]

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
        # Those of other classes give results of their classes.
        if any(type(t) not in (Tensor, nn.Parameter) for t in maps):
            return _PLAIN
        first = maps[0]
        if any(t.dtype != first.dtype or t.device != first.device for t in maps):
            return _PLAIN
        if training.needs_gradients(self.module, maps):
            run, kind = (self._train, "training") if self.fused else (None, "")
        else:
            run, kind = (self._infer, "inference") if self.fast else (None, "")
        if run is None or training.transformed() or self._forward.why_plainly():
            return _PLAIN
        own = self._forward.own()
        if own.is_one_layer or not own.takes(x):
            return _PLAIN
        found = self._verdict(kind, x, own)
        if found is None or found.reason:
            return _PLAIN
        try:
            result = self._run(run, own, x, found.channels_last)
        except ValueError:
            if not _misfits(own.segment, x):
                raise
            # Its own forward has the error for that.
            return _PLAIN
        if result is _PLAIN:
            if kind not in self.reasons and (reason := self._why_not(kind, first)):
                self.reasons[kind] = reason
            return _PLAIN
        self.reasons.pop(kind, None)
        return result

    def _run(
        self,
        run: Callable[[_Own, Any], Any],
        own: _Own,
        x: Any,
        channels_last: Sequence[bool | None] | None = None,
    ) -> Any:
        """The result in the memory formats of that of the module's own forward."""
        _thread.running.add(id(self))
        try:
            result = run(own, x)
        finally:
            _thread.running.discard(id(self))
        return result if result is _PLAIN else self._formatted(result, own, x, channels_last)

    def check(self, kind: str, x: Any) -> str:
        """Why calls like that on x run plainly by what the module is, or after a comparison; ""
        where they need not, and where nothing was compared."""
        if why := self._forward.why_plainly():
            self.reasons[kind] = why
            return why
        found = self._verdict(kind, x, self._forward.own())
        return "" if found is None else found.reason

    def forget(self) -> None:
        """What comparisons said, but those that are under way."""
        self.verdicts = {k: found for k, found in self.verdicts.items() if found is _COMPARING}

    def _verdict(self, kind: str, x: Any, own: _Own) -> Found | None:
        """None where nothing could be compared: the module's own forward has an error for the call,
        or our forms do not run."""
        first = next(leaves(x))
        device = first.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        formats = tuple([is_channels_last(t) for t in leaves(x)])
        weights = _in_channels_last(self.module)
        places = tuple(_flat(x))
        key = (kind, self.training, first.dtype, device, autocast, places, formats, weights)
        known = self.verdicts.get(key)
        if known is not None:
            return known
        # Before anything is copied.
        if kind == "inference" and (reason := self._reason_against(first)):
            self.reasons[kind] = reason
            return None
        # Also what runs inside of the comparison.
        self.verdicts[key] = _COMPARING
        try:
            run = partial(self._run, self._train if kind == "training" else self._infer, own)
            found = differing(self.module, x, run, _PLAIN, kind == "training", plainly)
        finally:
            del self.verdicts[key]
        self.reasons.pop(kind, None)
        if found is None:
            if reason := self._why_not(kind, first):
                self.reasons[kind] = reason
            return None
        if found is UNCOMPARED:
            return found
        if found.reason:
            name = type(self.module).__name__
            logger.warning("accelerate: %s runs its plain modules: %s", name, found.reason)
        self.verdicts[key] = found
        return found

    def _formatted(
        self, result: Any, own: _Own, x: Any, channels_last: Sequence[bool | None] | None
    ) -> Any:
        """The result in the memory formats that the module's own forward gives, interpolated where
        that comes last, inputs in it as they came, and tensors that are in it twice once."""
        if channels_last is None:
            last = _in_channels_last(self.module) or is_channels_last(next(leaves(x)))
            channels_last = [last if is_map(y) else None for y in leaves(result)]
        made: dict[tuple[int, Node | None], Any] = {(id(t), None): t for t in leaves(x)}
        formats = iter(channels_last)
        resizes = iter(own.resizes)

        def formatted(y: Any) -> Any:
            resize = next(resizes, None)
            last = next(formats) if isinstance(y, Tensor) else None
            if (id(y), resize) not in made:
                memory_format = torch.channels_last if last else torch.contiguous_format
                z = y if last is None else y.contiguous(memory_format=memory_format)
                made[id(y), resize] = z
                if resize is not None:
                    made[id(y), resize] = compute(resize, [z, x][: len(resize.inputs)])
            return made[id(y), resize]

        return filled(result, formatted)

    def _reason_against(self, x: Tensor) -> str:
        """Why programs do not run on maps like x, before any is made; "" where they do."""
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        return next(reasons(self, x), "")

    def _why_not(self, kind: str, x: Tensor) -> str:
        """Why our forms do not run; "" where its own forward does not."""
        if kind == "inference":
            return next(iter(self.path.reasons(self, x)), "")
        return "" if training.has_kernels(x) else "the training forms have no kernels here"

    def _infer(self, own: _Own, x: Any) -> Any:
        first = next(leaves(x))
        if first.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return _PLAIN
        results = self.path.logits(self, x, True)
        return _PLAIN if results is None else _rebuilt(results, x)

    def _train(self, own: _Own, x: Any) -> Any:
        first = next(leaves(x))
        segment = own.inner
        if isinstance(segment, match.Plain) or not training.has_kernels(first):
            return _PLAIN
        given = filled(x, lambda t: t.contiguous(memory_format=torch.channels_last))
        same = {id(new): old for new, old in zip(leaves(given), leaves(x), strict=True)}
        return filled(training.run(segment, given), lambda y: same.get(id(y), y))


def _misfits(segment: match.Segment, x: Any) -> bool:
    """Whether a layer that reads x takes maps with other channels."""
    if not isinstance(x, Tensor):
        return False
    return any(_channels(unit) != x.shape[1] for unit in _readers([segment]))


def _readers(items: Sequence[match.Item]) -> Iterator[match.Unit]:
    """Convolutions and norms that read what items in a row are called with."""
    first = next(iter(match.segments(items)), None)
    if isinstance(first, match.Unit):
        yield first
    elif isinstance(first, match.Block):
        yield from _readers(first.modules)
    elif isinstance(first, match.Aspp):
        for branch in first.branches:
            yield from _readers([branch])
    elif isinstance(first, match.Graph):
        for stage in first.stages:
            if stage.items and first.source in stage.inputs:
                yield from _readers(stage.items)


def _is_one_layer(part: match.Part) -> bool:
    if isinstance(part, match.Unit):
        return sum(each is not None for each in (part.conv, part.norm, part.act, part.pool)) == 1
    return isinstance(part, match.Plain)


def _takes_lists(items: Sequence[match.Item]) -> bool:
    """Whether what reads the input of items in a row may read lists and dicts of maps."""
    first = next(iter(match.segments(items)), None)
    if not isinstance(first, match.Graph):
        return first is None or type(first) is match.Plain
    return all(
        _takes_lists(stage.items) if stage.items else stage.node.kind in ("item", "group")
        for stage in first.stages
        if first.source in stage.inputs
    )


def _channels(unit: match.Unit) -> int:
    if unit.conv is not None:
        return unit.conv.module.weight.shape[1] * unit.conv.module.groups
    assert unit.norm is not None
    return unit.norm.module.num_features


def _in_channels_last(module: nn.Module) -> bool:
    """Whether a module's filters are, as far as they say: those of 1x1 are that and contiguous."""
    for weight in module.parameters():
        if not is_lazy(weight) and weight.dim() == 4:
            last = weight.is_contiguous(memory_format=torch.channels_last)
            if last != weight.is_contiguous():
                return last
    return False


# Of a comparison that is under way, in which the forwards of the classes run.
_COMPARING = Found("it is being compared")


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


class _Copier:
    """Stands on an instance before a method that makes a copy of the module, which has the
    forward of its class."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self) -> nn.Module:
        raise NotImplementedError

    def in_eval_view(self, view: nn.Module) -> _Copier:
        """Of a view of the module."""
        return type(self)(view)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Copier:
        return type(self)(copy.deepcopy(self._module, memo))

    def __reduce__(self) -> tuple[type[_Copier], tuple[nn.Module]]:
        return type(self), (self._module,)


class Replicate(_Copier):
    """Before `_replicate_for_data_parallel`: a replica runs by its own parameters.

    torch.nn.DataParallel copies a module's attributes, what is bound to the module too.
    """

    def __call__(self) -> nn.Module:
        replica: Any = type(self._module)._replicate_for_data_parallel(self._module)
        return _without_bound(replica)


class Scriptable(_Copier):
    """Before `__prepare_scriptable__`: torch.jit.script compiles forwards by their source."""

    def __call__(self) -> nn.Module:
        module: Any = self._module
        prepare = getattr(type(module), "__prepare_scriptable__", None)
        if prepare is not None and (prepared := prepare(module)) is not module:
            return prepared
        plain = module.__new__(type(module))
        vars(plain).update(vars(module))
        # In which torch.jit.script puts what it makes of the children.
        vars(plain)["_modules"] = module._modules.copy()
        return _without_bound(plain)


def _without_bound(module: nn.Module) -> nn.Module:
    for name in BOUND:
        vars(module).pop(name, None)
    return module


# Attributes of an instance that `accelerate` sets.
BOUND = ("forward", "_replicate_for_data_parallel", "__prepare_scriptable__")
