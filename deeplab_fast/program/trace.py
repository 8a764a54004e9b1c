"""What a module's forward does with its children: its data flow, from one run on stand-ins.

`trace(module)` calls the forward of the module's class on a shadow of it, whose children record
that they are called and compute nothing, and on a symbol in place of the map. What comes out is the
order of calls of children and of a few functions of PyTorch between them. A forward that does
anything else (reads a number out of a map, uses its own parameters, draws random numbers, leaves
something behind on itself) has no data flow here: `Untraceable` says why. What it decides by the
height and width of its input, as those do that want multiples of 32, is decided as for a common
size; `Flow.holds` says whether other sizes are decided like that.

The module itself, its children and their tensors are not touched, and nothing global is exchanged,
so other threads may run models meanwhile. The flow holds for the module as it is, its mode
included: whoever keeps one compares the module's attributes and children (`staleness.Snapshot`).
"""

from __future__ import annotations

import operator
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import Node as Recorded
from torch.fx.proxy import GraphAppendingTracer, Proxy
from torch.nn.modules.dropout import _DropoutNd

from .intact import CALLED, bound_forward, is_followed, is_plain, runs_hooks
from .origin import Contents, Origin, Reads
from .stand_ins import conv_of, norm_of

_OWN_TENSORS = "its forward computes with tensors of its own"
_DECIDES = "its forward decides by the size or the values of a map"
_IN_PLACE_INPUT = "its forward changes its input in place"
_DRAWS = "its forward draws random numbers"
_MISSING = object()


class Untraceable(Exception):
    """A forward whose data flow is not to be had; says why.

    Attributes:
        changes_input: it changes the map that it is called with.
        origin: what it was found in.
    """

    origin: Origin

    def __init__(self, reason: str, changes_input: bool = False) -> None:
        super().__init__(reason)
        self.changes_input = changes_input


@dataclass(frozen=True, eq=False)
class Node:
    """One value of a data flow.

    Attributes:
        kind: "input"; "call" of `module` on its one input; "item", `options["key"]` of a structured
            value; "group", a list of maps, or a dict with `options["keys"]`; "cat" over channels;
            "add"; "mul"; "resize", F.interpolate with `options`, to the size of its second input
            where it has one; "spread", an expansion of a map of one pixel to that size.
        inputs: the values that it takes.
        module: of a call: a child, or a stand-in for a function; of "resize" the layer that it is.
        options: what else the kind has.
        in_place: its first input has the result afterwards.
    """

    kind: str
    inputs: tuple[Node, ...] = field(default=(), repr=False)
    module: nn.Module | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    in_place: bool = False


@dataclass(frozen=True)
class Flow:
    """The data flow of a forward of one argument.

    Attributes:
        input: its argument.
        nodes: all values but the input, in the order in which they are computed.
        output: what it returns: a node, or lists, tuples and dicts of nodes.
        origin: what it was found in: the module itself, its containers, and children that are
            called with constants beside a map.
        decisions: what was asked of the sizes of the input, and the answers.
    """

    input: Node
    nodes: tuple[Node, ...]
    output: Any
    origin: Origin
    decisions: tuple[tuple[Recorded, bool], ...] = ()

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether the forward does this with an input [N, C, H, W] of that shape."""
        return all(_answer(asked, shape[2:]) is answer for asked, answer in self.decisions)

    @property
    def outputs(self) -> list[Node]:
        """The nodes in the output."""
        return list(leaves(self.output))


def leaves(structure: Any) -> Iterator[Any]:
    """What stands in lists, tuples and dicts, in order."""
    if type(structure) in (list, tuple):
        for each in structure:
            yield from leaves(each)
    elif type(structure) in (dict, OrderedDict):
        for each in structure.values():
            yield from leaves(each)
    else:
        yield structure


def filled(structure: Any, value: Callable[[Any], Any]) -> Any:
    """The structure with `value(leaf)` in place of each of its leaves."""
    cls = type(structure)
    if cls in (list, tuple):
        return cls([filled(each, value) for each in structure])
    if cls in (dict, OrderedDict):
        return cls((key, filled(each, value)) for key, each in structure.items())
    return value(structure)


def trace(module: nn.Module) -> Flow:
    """The data flow of a module's forward, called with one map.

    Raises:
        Untraceable: it has none; says why.
    """
    tracer = _Tracer()
    symbol = tracer.create_proxy("placeholder", "x", (), {})
    drawn: list[bool] = []
    try:
        with _random_numbers() as drawn, warnings.catch_warnings():
            # Of what a forward does with real maps.
            warnings.simplefilter("ignore")
            output = _followed(module, tracer, (symbol,), {}, entered=True)
        if drawn:
            raise tracer.refusal(_DRAWS)
        return _Reader(tracer, symbol.node).flow(output)
    except Untraceable as error:
        # What a forward does with a number that it drew says less than that it drew one.
        reason = Untraceable(_DRAWS) if drawn else error
        reason.origin = tracer.origin()
        raise reason from None


def _followed(
    module: nn.Module,
    tracer: _Tracer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    entered: bool = False,
) -> Any:
    """What a module's forward returns for symbols, its children recorded."""
    tracer.followed.append(module)
    if not is_followed(module, entered):
        raise tracer.refusal(
            f"a {type(module).__name__} has hooks or is called in a way of its own"
        )
    reads = Reads(module)
    if reads.sets:
        raise tracer.refusal("its forward sets variables outside of itself")
    shadow = _shadow(module, tracer)
    contents = tracer.contents(reads)
    try:
        output = type(module).forward(shadow, *args, **kwargs)
    except Exception as error:
        if tracer.refused is None:
            own = isinstance(error, Untraceable)
            raise tracer.refusal(str(error) if own else _reason(error)) from None
    finally:
        changed = contents.put_back()
    if tracer.refused is not None:
        # Also where the forward went on.
        raise tracer.refused
    if tracer.set_attributes():
        raise tracer.refusal("its forward sets attributes of modules")
    if changed:
        raise tracer.refusal("its forward changes a list or dict that it reads, or an object")
    return output


def is_row(module: nn.Module) -> bool:
    """Whether a module runs its children one after another, as nn.Sequential does."""
    # The class of a scripted module has no forward.
    return getattr(type(module), "forward", None) is nn.Sequential.forward


def changes_input(module: nn.Module) -> bool:
    """Whether a module's own forward changes the map that it is called with.

    Known of layers, of sequences, and of modules with a bound forward.
    """
    if is_row(module):
        for member in module._modules.values():
            assert member is not None
            if changes_input(member):
                return True
            if not _hands_on(member):
                return False
        return False
    bound = bound_forward(module)
    if bound is not None:
        return bound.changes_input()
    return bool(getattr(module, "inplace", False))


def _hands_on(module: nn.Module) -> bool:
    """Whether what a module returns may be its input, or a view of it."""
    cls = type(module)
    if is_row(module):
        return all(_hands_on(each) for each in module._modules.values() if each is not None)
    if not cls.__module__.startswith("torch.nn."):
        # Modules that are made of others compute something.
        return not any(True for _ in module.children())
    shares = (nn.Identity, nn.Flatten, nn.Unflatten, _DropoutNd)
    return isinstance(module, shares) or bool(getattr(module, "inplace", False))


def _shares_memory(node: Node) -> bool:
    """Whether a value may share memory with its first input."""
    if node.in_place or node.kind == "spread":
        return True
    return node.module is not None and _hands_on(node.module)


def _has_nothing(structure: Any) -> bool:
    """Whether there is an empty list, tuple or dict in a structure."""
    if type(structure) in (dict, OrderedDict):
        structure = list(structure.values())
    if type(structure) in (list, tuple):
        return not structure or any(map(_has_nothing, structure))
    return False


class _Tracer(GraphAppendingTracer):
    """Records calls of functions and children; what a forward asks of a value is refused."""

    def __init__(self) -> None:
        super().__init__(torch.fx.Graph())
        self._ambient = _ambient()
        self.children: dict[str, nn.Module] = {}
        self.followed: list[nn.Module] = []
        # The first: a forward may catch what is raised in it.
        self.refused: Untraceable | None = None
        # Layers and what their `inplace` was.
        self.flags: list[tuple[nn.Module, bool]] = []
        # What was asked of sizes of the input, and the answers.
        self.decisions: list[tuple[Recorded, bool]] = []
        self._copies: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []
        self._watched = 0

    def refusal(self, reason: str) -> Untraceable:
        """What to raise."""
        if self.refused is None:
            self.refused = Untraceable(reason)
        return self.refused

    def stands(self, copy: nn.Module, module: nn.Module) -> None:
        """Note what stands for a module."""
        self._copies.append((copy, module, dict(vars(copy))))

    def contents(self, reads: Reads) -> Contents:
        """What the forward of the module that was copied last could change."""
        copies = [copy for copy, *_ in self._copies[self._watched :]]
        self._watched = len(self._copies)
        return Contents([v for copy in copies for v in vars(copy).values()] + reads.values())

    def set_attributes(self) -> dict[nn.Module, set[str]]:
        """By module the names of the attributes that the forwards have set or deleted."""
        found: dict[nn.Module, set[str]] = {}
        for copy, module, before in self._copies:
            now = vars(copy)
            names = {
                name
                for name in now.keys() | before.keys()
                if now.get(name, _MISSING) is not before.get(name, _MISSING)
            }
            if names:
                found.setdefault(module, set()).update(names)
        return found

    def origin(self) -> Origin:
        """Of what was recorded."""
        return Origin(self.followed, self.set_attributes(), self.flags)

    def proxy(self, node: Recorded) -> Proxy:
        if _ambient() != self._ambient:
            raise self.refusal("its forward checkpoints, or switches gradients or autocast")
        return _Symbol(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            raise self.refusal(_OWN_TENSORS)
        if isinstance(a, _Held):
            return a
        if isinstance(a, nn.Module):
            raise self.refusal("its forward hands modules to functions")
        return super().create_arg(a)

    def to_bool(self, obj: Proxy) -> bool:
        answer = _answer(obj.node, _COMMON)
        if answer is None:
            raise self.refusal(_DECIDES)
        self.decisions.append((obj.node, answer))
        return answer

    def iter(self, obj: Proxy) -> Iterator[Any]:
        return iter([operator.getitem(obj, i) for i in range(self.count(obj))])

    def count(self, obj: Proxy) -> int:
        """How many sizes a symbol is."""
        count = _sizes_in(obj.node)
        if count is None:
            raise self.refusal(_DECIDES)
        return count

    def keys(self, obj: Proxy) -> Any:
        raise self.refusal(_DECIDES)

    def call(self, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy:
        if len(args) > 1 or kwargs:
            # What it does with constants its own forward says.
            return _followed(child, self, args, kwargs)
        name = f"child{len(self.children)}"
        self.children[name] = child
        return self.create_proxy("call_module", name, args, kwargs)


def _sizes_in(recorded: Recorded) -> int | None:
    """How many sizes a shape of a map, or a part of one, has; None for something else."""
    target, args = recorded.target, recorded.args
    if (target is getattr and args[1] == "shape") or (target == "size" and len(args) == 1):
        return 4
    if target is operator.getitem and isinstance(args[1], slice):
        whole = args[0]
        count = _sizes_in(whole) if isinstance(whole, Recorded) else None
        return None if count is None else len(range(count)[args[1]])
    return None


# Height and width of maps of which decisions are taken: multiples of all that models want.
_COMMON = (512, 512)
_ASKED = (
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
)


def _answer(asked: Recorded, size: Sequence[int]) -> bool | None:
    """What a comparison gives for an input of (height, width); None for something else."""
    answer = _of_sizes(asked, size)
    return answer if isinstance(answer, bool) else None


def _of_sizes(value: Any, size: Sequence[int]) -> Any:
    """The value of what was recorded of the sizes of the input; None where it is of more."""
    if isinstance(value, int):
        return value
    if not isinstance(value, Recorded) or value.op not in ("call_function", "call_method"):
        return None
    source, *rest = value.args
    if isinstance(source, Recorded) and source.op == "placeholder":
        if (value.target is getattr and rest == ["ndim"]) or value.target == "dim":
            return 4
        found = (None, None, *size)
        if (value.target is getattr and rest == ["shape"]) or (value.target == "size" and not rest):
            return found
        at = rest[0] if value.target == "size" else None
        return found[at] if isinstance(at, int) else None
    if value.target is operator.getitem:
        sizes, at = _of_sizes(source, size), rest[0]
        return sizes[at] if isinstance(sizes, tuple) and isinstance(at, (int, slice)) else None
    if value.target in _ASKED and len(rest) == 1:
        left, right = _of_sizes(source, size), _of_sizes(rest[0], size)
        if isinstance(left, int) and isinstance(right, int):
            return value.target(left, right)
    return None


def _ambient() -> tuple[object, ...]:
    """What decides how operations are computed and recorded for gradients."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks, *autocast


class _Held:
    """Stands for a tensor that a module holds: it may be asked what it is, not what it contains."""

    _ASKED = frozenset(
        "device dim dtype element_size is_cuda is_floating_point layout ndim numel requires_grad "
        "shape size".split()
    )

    def __init__(self, tensor: Tensor, owner: nn.Module, name: str, tracer: _Tracer) -> None:
        self._tensor, self.owner, self.name, self._tracer = tensor, owner, name, tracer

    def __getattr__(self, name: str) -> Any:
        if name in self._ASKED:
            return getattr(self._tensor, name)
        raise self._tracer.refusal(_OWN_TENSORS)

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise self._tracer.refusal(_OWN_TENSORS)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        held = next(v for v in leaves([list(args), kwargs or {}]) if isinstance(v, _Held))
        raise held._tracer.refusal(_OWN_TENSORS)

    # Python looks these up on the class.
    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __len__ = __iter__ = __contains__ = __getitem__ = __setitem__ = _refuse
    __int__ = __float__ = __index__ = __neg__ = __abs__ = __invert__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __pow__ = __matmul__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rpow__ = __rmatmul__ = _refuse
    __iadd__ = __isub__ = __imul__ = __itruediv__ = _refuse
    __hash__ = object.__hash__


class _Symbol(Proxy):
    """Stands for a value; whether it requires gradients, the mode says."""

    @property
    def requires_grad(self) -> bool:
        return torch.is_grad_enabled()

    def __len__(self) -> int:
        return self.tracer.count(self)  # type: ignore[attr-defined]

    # What a proxy would record as a sum and a product of their own.
    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


def _copied(module: nn.Module, cls: type, tracer: _Tracer) -> nn.Module:
    """A module of a class with the attributes of another, that computes nothing."""

    def held(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
        return {k: None if t is None else _Held(t, module, k, tracer) for k, t in tensors.items()}

    copy: nn.Module = object.__new__(cls)
    own = {key: value for key, value in vars(module).items() if key not in CALLED}
    own.update(_parameters=held(module._parameters), _buffers=held(module._buffers))
    copy.__dict__.update(own)
    return copy


def _shadow(module: nn.Module, tracer: _Tracer) -> nn.Module:
    """A copy of a module whose children record."""
    shadow = _copied(module, type(module), tracer)
    own = vars(shadow)
    own["_modules"] = {
        name: None if child is None else _recorder(child, tracer)
        for name, child in module._modules.items()
    }
    for name, value in vars(module).items():
        if name != "_modules" and any(isinstance(each, nn.Module) for each in leaves(value)):
            # Children that are attributes too, by themselves or in lists.
            own[name] = filled(value, partial(_attribute, module=module, tracer=tracer))
    tracer.stands(shadow, module)
    return shadow


def _attribute(value: Any, module: nn.Module, tracer: _Tracer) -> Any:
    if not isinstance(value, nn.Module):
        return value
    if any(value is each for each in module.modules()):
        return _recorder(value, tracer)

    def refuse(*args: object) -> None:
        raise tracer.refusal("its forward calls modules that are not registered in it")

    return _recording(value, tracer, refuse)


def _recorder(child: nn.Module, tracer: _Tracer) -> nn.Module:
    """What stands for a child: a container that its parent may walk, or a module to be called."""
    is_list = isinstance(child, (nn.ModuleList, nn.ModuleDict))
    is_sequence = is_row(child)
    bound = bound_forward(child)
    opaque = bound is not None and bound.opaque
    if (is_list or is_sequence) and is_followed(child) and not opaque:
        tracer.followed.append(child)
        return _shadow(child, tracer)
    return _recording(child, tracer, partial(tracer.call, child))


def _recording(child: nn.Module, tracer: _Tracer, call: Callable[..., Any]) -> nn.Module:
    scripted = isinstance(child, torch.jit.ScriptModule)
    # What a scripted module holds lies elsewhere.
    held = nn.Module() if scripted else child
    cls: Any = type(held)
    copy = _copied(held, _recording_class(cls), tracer)

    def direct(args: Any, kwargs: Any) -> Any:
        # Its hooks do not run; where it has none that is a call like others.
        tracer.followed.append(child)
        if runs_hooks(child):
            raise tracer.refusal("its forward calls the forward of a module with hooks")
        return call(args, kwargs)

    copy.__dict__.update(_recorded_call=call, _recorded_forward=direct)
    tracer.stands(copy, child)
    return copy


@cache
def _recording_class(cls: Any) -> type:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_recorded_call"](args, kwargs)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_recorded_forward"](args, kwargs)

    own = {"__call__": call, "forward": forward, "__module__": cls.__module__, "__doc__": None}
    return type(cls)(cls.__name__, (cls,), own)


@contextmanager
def _random_numbers() -> Iterator[list[bool]]:
    """Notes that numbers were drawn, which the generators are put back from, at the end."""
    drawn: list[bool] = []
    generators = [random._inst, torch.default_generator]
    if "numpy" in sys.modules:
        generators.append(sys.modules["numpy"].random.mtrand._rand)
    states = Contents(generators)
    grad = torch.is_grad_enabled()
    try:
        yield drawn
    finally:
        torch.set_grad_enabled(grad)
        if states.put_back():
            drawn.append(True)


def _reason(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, TypeError) and "required positional argument" in text:
        return "its forward takes more than one argument"
    return f"its forward cannot be followed ({type(error).__name__}: {text[:160]})"


@dataclass(frozen=True)
class _Size:
    """Height and width of a value, or what was asked of its shape on the way there."""

    node: Node
    dims: tuple[int, ...]


_ADD = (operator.add, operator.iadd, torch.add)
_MUL = (operator.mul, operator.imul, torch.mul, torch.multiply)
_CAT = (torch.cat, torch.concat, torch.concatenate)
_OF_CAT = {"tensors", "dim"}
_IN_PLACE = (operator.iadd, operator.imul)
_NEUTRAL = ("contiguous",)
_INTERPOLATE = (F.interpolate, F.upsample)
_MODES = ("bilinear", "nearest")
# By function or method: the module that computes the same, from the call's further arguments.
_Make = Callable[..., nn.Module]


def _dropout(cls: type[nn.Module]) -> _Make:
    def make(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
        return cls(p, inplace=inplace).train(bool(training))

    return make


def _activation(cls: type[nn.Module]) -> _Make:
    def make(inplace: bool = False) -> nn.Module:
        return cls(inplace=inplace)

    return make


def _mean(dim: Any = None, keepdim: bool = False, dtype: Any = None) -> nn.Module:
    if dtype is not None or not keepdim or sorted(d % 4 for d in _ints(dim)) != [2, 3]:
        raise Untraceable("its forward takes a mean other than that over rows and columns")
    return nn.AdaptiveAvgPool2d(1)


def _ints(value: Any) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(each, int) for each in values):
        raise Untraceable("its forward computes with sizes of maps")
    return list(values)


def _max_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> nn.Module:
    return nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


def _avg_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> nn.Module:
    return nn.AvgPool2d(
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> nn.Module:
    if (min_val, max_val) == (0, 6):
        return nn.ReLU6(inplace)
    return nn.Hardtanh(min_val, max_val, inplace)


_STAND_INS: dict[Any, _Make] = {
    F.relu: _activation(nn.ReLU),
    torch.relu: nn.ReLU,
    torch.relu_: lambda: nn.ReLU(True),
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(True),
    F.relu6: _activation(nn.ReLU6),
    F.hardtanh: _hardtanh,
    F.hardswish: _activation(nn.Hardswish),
    F.hardsigmoid: _activation(nn.Hardsigmoid),
    F.silu: _activation(nn.SiLU),
    F.sigmoid: nn.Sigmoid,
    torch.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    F.tanh: nn.Tanh,
    torch.tanh: nn.Tanh,
    "tanh": nn.Tanh,
    F.gelu: lambda approximate="none": nn.GELU(approximate),
    F.leaky_relu: lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope, inplace),
    F.elu: lambda alpha=1.0, inplace=False: nn.ELU(alpha, inplace),
    F.dropout: _dropout(nn.Dropout),
    F.dropout2d: _dropout(nn.Dropout2d),
    F.adaptive_avg_pool2d: lambda output_size: nn.AdaptiveAvgPool2d(output_size),
    F.avg_pool2d: _avg_pool,
    F.max_pool2d: _max_pool,
    torch.mean: _mean,
    "mean": _mean,
}


class _Reader:
    """Turns what was recorded into a flow."""

    def __init__(self, tracer: _Tracer, source: Recorded) -> None:
        self._tracer = tracer
        self._input = Node("input")
        self._values: dict[Recorded, Any] = {source: self._input}
        self._nodes: list[Node] = []

    def flow(self, output: Any) -> Flow:
        for recorded in self._tracer.graph.nodes:
            if recorded not in self._values:
                self._values[recorded] = self._value(recorded)
        structure = filled(self._structure(output), self._returned)
        decisions = tuple(self._tracer.decisions)
        flow = Flow(self._input, tuple(self._nodes), structure, self._tracer.origin(), decisions)
        self._check(flow)
        return flow

    def _structure(self, output: Any) -> Any:
        for leaf in leaves(output):
            if not isinstance(leaf, Proxy):
                raise Untraceable(f"its forward returns a {type(leaf).__name__}")
        if _has_nothing(output):
            raise Untraceable("its forward returns no map, or an empty list, tuple or dict")
        return output

    def _returned(self, proxy: Proxy) -> Node:
        # An attribute becomes a node when it is asked for.
        value = self._read(proxy.node)
        if not isinstance(value, Node):
            raise Untraceable("its forward returns sizes of maps")
        return value

    def _read(self, recorded: Recorded) -> Any:
        if recorded not in self._values:
            self._values[recorded] = self._value(recorded)
        return self._values[recorded]

    def _check(self, flow: Flow) -> None:
        users: dict[Node, list[Node]] = {}
        for node in flow.nodes:
            for value in node.inputs:
                users.setdefault(value, []).append(node)
        outputs = flow.outputs
        live = set(outputs)
        for node in reversed(flow.nodes):
            if node in live:
                live.update(node.inputs)
            elif node.kind == "call" or node.in_place:
                raise Untraceable("its forward calls a module whose result it does not use")
        for node in flow.nodes:
            if not node.in_place:
                continue
            changed = node.inputs[0]
            while True:
                if changed is flow.input or changed.kind in ("item", "group"):
                    raise Untraceable(_IN_PLACE_INPUT, True)
                if len(users[changed]) > 1 or changed in outputs:
                    raise Untraceable("its forward changes a map in place that it uses elsewhere")
                if not _shares_memory(changed):
                    break
                changed = changed.inputs[0]

    def _add(self, node: Node) -> Node:
        self._nodes.append(node)
        return node

    def _map(self, value: Any) -> Node:
        if isinstance(value, Recorded):
            value = self._read(value)
        if isinstance(value, _Held):
            raise Untraceable(_OWN_TENSORS)
        if not isinstance(value, Node):
            raise Untraceable("its forward computes with something else than maps")
        return value

    def _value(self, recorded: Recorded) -> Any:
        """The node of what was recorded, a size, or None of what has no value of its own."""
        args, kwargs = recorded.args, dict(recorded.kwargs)
        if recorded.op == "call_module":
            return self._call(recorded.target, args, kwargs)
        target = recorded.target
        if target is getattr or target is operator.getitem:
            return self._part(target, self._any(args[0]), args[1])
        if target in ("size", "dim"):
            source = self._any(args[0])
            if target == "size" and isinstance(source, Node):
                dims = tuple(range(4)) if len(args) == 1 else tuple(_ints(args[1]))
                return _Size(source, tuple(dim % 4 for dim in dims))
        if target is torch._assert:
            return None
        if target == "dim" or (target in _ASKED and _of_sizes(recorded, _COMMON) is not None):
            # Asked for on the way to a decision.
            return None
        first = args[0] if args else kwargs.pop("input", None)
        rest = args[1:]
        if target in _NEUTRAL and not rest and not kwargs:
            return self._map(first)
        if target in _CAT:
            dim = rest[0] if rest else kwargs.get("dim", 0)
            maps = args[0] if args else kwargs.get("tensors")
            if dim not in (1, -3) or not isinstance(maps, Sequence) or kwargs.keys() - _OF_CAT:
                raise Untraceable("its forward concatenates other than by channels")
            return self._add(Node("cat", tuple(self._map(each) for each in maps)))
        for kind, functions, methods in (
            ("add", _ADD, ("add", "add_")),
            ("mul", _MUL, ("mul", "mul_")),
        ):
            if target in functions or target in methods:
                if kwargs or len(rest) != 1:
                    raise Untraceable(f"its forward scales what it {kind}s")
                in_place = target in _IN_PLACE or str(target).endswith("_")
                pair = (self._map(first), self._map(rest[0]))
                return self._add(Node(kind, pair, in_place=in_place))
        if target in _INTERPOLATE:
            return self._resize(first, rest, kwargs)
        if target in (F.batch_norm, F.conv2d):
            module = _layer(target, args[1:], kwargs)
            return self._add(Node("call", (self._map(first),), module))
        if target in ("expand", "expand_as"):
            return self._spread(target, first, rest)
        make = _STAND_INS.get(target)
        if make is None or isinstance(first, (list, tuple)):
            raise Untraceable(f"its forward calls {_name(target)}")
        try:
            module = make(*self._constants(rest), **self._constants(kwargs))
        except (TypeError, ValueError) as error:
            raise Untraceable(f"its forward calls {_name(target)}: {error}") from None
        in_place = bool(getattr(module, "inplace", False))
        return self._add(Node("call", (self._map(first),), module, in_place=in_place))

    def _any(self, value: Any) -> Any:
        return self._read(value) if isinstance(value, Recorded) else value

    def _constants(self, values: Any) -> Any:
        found = list(values.values()) if isinstance(values, dict) else values
        if any(isinstance(each, _Held) for each in leaves(list(found))):
            raise Untraceable(_OWN_TENSORS)
        if any(isinstance(each, Recorded) for each in leaves(list(found))):
            raise Untraceable("its forward computes with sizes of maps")
        return values

    def _call(self, name: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node:
        module = self._tracer.children[name]
        if kwargs or len(args) != 1:
            raise Untraceable(
                f"its forward calls a {type(module).__name__} with other than one argument"
            )
        argument = args[0]
        if isinstance(argument, (list, tuple, dict)):
            entries = argument.values() if isinstance(argument, dict) else argument
            maps = tuple(self._map(each) for each in entries)
            keys = tuple(argument) if isinstance(argument, dict) else None
            argument = self._add(Node("group", maps, options={"keys": keys}))
        else:
            argument = self._map(argument)
        if isinstance(module, nn.Upsample) and is_plain(module) and module.mode in _MODES:
            self._tracer.followed.append(module)
            names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
            options = {name: getattr(module, name) for name in names}
            options = {name: value for name, value in options.items() if value is not None}
            return self._add(Node("resize", (argument,), module, options))
        if hasattr(module, "inplace"):
            self._tracer.flags.append((module, bool(module.inplace)))
        in_place = changes_input(module)
        return self._add(Node("call", (argument,), module, in_place=in_place))

    def _part(self, target: Any, value: Any, key: Any) -> Any:
        if target is getattr:
            if key == "shape" and isinstance(value, Node):
                return _Size(value, tuple(range(4)))
            # Asked for on the way to an assertion or a call, or not at all.
            return None
        if isinstance(value, _Size):
            if isinstance(key, (int, slice)):
                dims = value.dims[key]
                return _Size(value.node, dims if isinstance(dims, tuple) else (dims,))
        elif isinstance(value, Node) and isinstance(key, (int, str)):
            return self._add(Node("item", (value,), options={"key": key}))
        return None

    def _resize(self, x: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Node:
        names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
        options: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        options = {name: value for name, value in options.items() if value is not None}
        size = options.pop("size", None)
        inputs = [self._map(x)]
        if size is not None:
            like = self._size(size)
            if isinstance(like, Node):
                inputs.append(like)
            else:
                options["size"] = like
        self._constants(options)
        if options.get("mode", "nearest") not in _MODES or options.get("antialias"):
            raise Untraceable("its forward interpolates in another mode than bilinear and nearest")
        return self._add(Node("resize", tuple(inputs), options=options))

    def _size(self, size: Any) -> Any:
        """The node whose height and width a size has, or the constant that it is."""
        found = self._any(size)
        if isinstance(found, _Size) and found.dims == (2, 3):
            return found.node
        parts = [self._any(each) for each in size] if isinstance(size, (list, tuple)) else [size]
        if all(isinstance(each, int) for each in parts):
            return size
        if len(parts) == 2 and all(isinstance(each, _Size) for each in parts):
            rows, columns = parts
            if rows.node is columns.node and (rows.dims, columns.dims) == ((2,), (3,)):
                return rows.node
        raise Untraceable("its forward computes with sizes of maps")

    def _spread(self, target: Any, x: Any, args: Sequence[Any]) -> Node:
        if target == "expand_as" and len(args) == 1:
            return self._add(Node("spread", (self._map(x), self._map(args[0]))))
        sizes = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
        if len(sizes) == 4 and all(each == -1 for each in sizes[:2]):
            like = self._size(list(sizes[2:]))
            if isinstance(like, Node):
                return self._add(Node("spread", (self._map(x), like)))
        raise Untraceable("its forward expands a map")


def _layer(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> nn.Module:
    """The layer that F.batch_norm or F.conv2d is with a module's own tensors."""
    names: tuple[str, ...] = ("weight", "bias", "stride", "padding", "dilation", "groups")
    default: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    tensors = names[:2]
    if function is F.batch_norm:
        names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        default = {"training": False, "momentum": 0.1, "eps": 1e-5}
        tensors = names[:4]
    given = {**default, **dict(zip(names, args, strict=False)), **kwargs}
    owners = {v.owner for name in tensors if isinstance(v := given.get(name), _Held)}
    if len(owners) != 1 or any(isinstance(v, Recorded) for v in given.values()):
        raise Untraceable("its forward computes weights")
    (owner,) = owners
    for name in tensors:
        own = {**owner._parameters, **owner._buffers}.get(name)
        value = given.get(name)
        if value is None and own is None:
            continue
        if not isinstance(value, _Held) or value.owner is not owner or value.name != name:
            raise Untraceable(_OWN_TENSORS)
    if set(owner._parameters) != {"weight", "bias"}:
        raise Untraceable(_OWN_TENSORS)
    rest = {name: given[name] for name in names if name not in tensors}
    if function is F.conv2d:
        if isinstance(rest["padding"], str):
            raise Untraceable("its forward pads by name")
        return conv_of(owner, **rest)
    if given.get("running_mean") is None or not isinstance(rest["momentum"], float):
        raise Untraceable("its forward normalises without running statistics")
    return norm_of(owner, bool(rest["training"]), rest["momentum"], rest["eps"])


def _pad(pad: Any, mode: str = "constant", value: float | None = None) -> nn.Module:
    if mode != "constant" or value not in (None, 0) or len(_ints(pad)) != 4:
        raise Untraceable("its forward pads other than rows and columns by zeros")
    return nn.ZeroPad2d(tuple(pad))


_STAND_INS[F.pad] = _pad


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target))
