"""`deeplab_fast.accelerate`: another library's model, fast in place."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import FunctionType
from typing import TypeVar

import torch
from torch import nn

from . import libraries as libraries
from . import match
from .intact import CALLED, has_hooks, is_followed
from .network import Network
from .probe import sample
from .region import BOUND, Forward, Replicate, Scriptable, forward_of
from .stand_ins import original
from .structure import has_depthwise

logger = logging.getLogger("deeplab_fast")

M = TypeVar("M", bound=nn.Module)
# Names with wildcards, or a function of a module's name and the module.
Filter = str | Sequence[str] | Callable[[str, nn.Module], bool]


def accelerate(
    model: M,
    *,
    training: bool = True,
    inference: bool = True,
    include: Filter | None = None,
    exclude: Filter | None = None,
    strict: bool = False,
) -> M:
    """Make a model of any library faster in place: the same numbers in less time and memory.

    The model stays the object that it is, with its classes, its state_dict keys, its parameters and
    what refers to them. Modules whose forward is a fixed order of calls of their children, joined
    by sums, products, concatenations and interpolations, get a forward bound on the instance, which
    runs

    - in eval mode without gradients (`torch.inference_mode()`, `torch.no_grad()`), in fp32 on a CPU
      and in fp16, bf16 and fp32 on a GPU: folded batch norms, prepared weights, fused sums and
      activations, atrous branches and image pooling joined, as a `DeepLabV3` runs by itself;
    - where gradients are needed: the fused training forms, with the same gradients and running
      statistics and about half of the saved activations.

    What they are is found by structure, not by names of classes. A change of the model (weights,
    attributes, modules, hooks, mode, dtype, device) is noticed at the next call. What is not known,
    has hooks or overrides runs as it is inside of what is accelerated. A forward may ask for the
    height and width of its input: where it would do something else than with 512 x 512 it runs
    itself. Results have the memory format that the module's own forward gives. `torch.compile`,
    exporters, tracing, scripting and torch.func see the modules' own forwards.

    Before a module runs in our forms its results, and in training its gradients, are compared once
    with its own forward, on a small input of its dtype and device: here for the model as it is, and
    at the first call of another kind. One that differs by more than rounding runs as it is, and
    `accelerate_report` has the number.

    Args:
        model: any module, also inside of DDP, FSDP, `torch.compile` or PEFT wrappers, changed in
            place.
        training: run the training forms.
        inference: run the inference forms.
        include: only these modules and what is in them: names with wildcards ("backbone.layer*"),
            or a function of (name, module).
        exclude: not these, nor what is in them.
        strict: raise where a module with parameters is left alone.

    Returns:
        The model itself. A second call with the same arguments changes nothing.

    Raises:
        TypeError: no nn.Module, a scripted one, or a filter of another kind.
        ValueError: a filter that no module fits; with `strict`, modules that are left alone, by
            name with their reasons. The model is then as it was.

    Copies, also deep ones, and pickles of an accelerated model are accelerated too. `restore`
    undoes it. A shallow copy (`copy.copy`) calls the forward of the original until it is itself
    accelerated.
    """
    _check(model)
    if isinstance(model, Network):
        # It runs so by itself.
        model.fused, model.fast = training, inference
        return model
    names = dict(model.named_modules())
    included = _fitting("include", include, names)
    excluded = _fitting("exclude", exclude, names) or set()
    wanted = {n for n in names if (included is None or n in included) and n not in excluded}
    before = [_Bound(module) for module in names.values()]
    # Models of this package that stand in others run so by themselves.
    own = [(name, module) for name, module in names.items() if isinstance(module, Network)]
    inside = {m for _, network in own for m in network.modules()}
    for name, network in own:
        if name in wanted:
            network.fused, network.fast = training, inference
    for name, module in names.items():
        if module not in inside:
            _bind(module, opaque=name not in wanted)
        forward = forward_of(module)
        if forward is not None:
            forward.region.settings = (inference, training)
    _compare(model)
    if strict and (left := _unwanted(model, names, wanted)):
        for each in before:
            each.put_back()
        reasons = "; ".join(f"{row.name or '(the model)'}: {row.how}" for row in left[:8])
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        raise ValueError(
            f"strict: {len(left)} modules would be left alone ({reasons}{more}); exclude them, "
            "change them, or leave strict out"
        )
    return model


class _Bound:
    """What is bound on a module now."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._forward = module, forward_of(module)
        self._settings = None if self._forward is None else self._forward.region.settings
        self._attributes = {name: vars(module)[name] for name in BOUND if name in vars(module)}
        self._own = (module.fused, module.fast) if isinstance(module, Network) else None

    def put_back(self) -> None:
        """Bind that again, and nothing else."""
        if forward_of(self._module) is not self._forward:
            _unbind(self._module)
        vars(self._module).update(self._attributes)
        if self._forward is not None and self._settings is not None:
            self._forward.region.settings = self._settings
        if isinstance(self._module, Network) and self._own is not None:
            self._module.fused, self._module.fast = self._own


def _unwanted(
    model: nn.Module, names: dict[str, nn.Module], wanted: set[str]
) -> list[AccelerateRow]:
    """What has parameters, should run in our forms, and does not."""
    return [
        row
        for row in accelerate_report(model).left_alone
        if row.name in wanted and any(True for _ in names[row.name].parameters())
    ]


def restore(model: M) -> M:
    """Undo `accelerate`: every module runs its own forward, and prepared weights are freed.

    Args:
        model: any module, changed in place.

    Returns:
        The model itself.

    Raises:
        TypeError: no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore takes an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        _unbind(module)
    return model


@dataclass(frozen=True)
class AccelerateRow:
    """One module of a model.

    Attributes:
        name, cls: its qualified name and the name of its class.
        runs: "region": it is entered by a call and runs in our forms; "inside": it runs inside of
            one; "own": its own forward runs, and what is in it is accelerated; "alone": nothing of
            it is accelerated; "unused": it does not run.
        how: what it runs as, or why it does not.
        is_leaf: it has no modules in it.
    """

    name: str
    cls: str
    runs: str
    how: str
    is_leaf: bool


@dataclass(frozen=True)
class AccelerateReport:
    """What runs how in an accelerated model.

    Attributes:
        rows: of every module that has a forward, in the order of `named_modules`.
    """

    rows: tuple[AccelerateRow, ...]

    @property
    def accelerated(self) -> int:
        """Number of modules without modules in them that run in our forms."""
        return sum(row.is_leaf and row.runs == "inside" for row in self.rows)

    @property
    def total(self) -> int:
        """Number of modules without modules in them, of those that run."""
        return sum(row.is_leaf and row.runs != "unused" for row in self.rows)

    @property
    def left_alone(self) -> tuple[AccelerateRow, ...]:
        """Modules that nothing is accelerated of, with the reasons."""
        return tuple(row for row in self.rows if row.runs == "alone")

    def __str__(self) -> str:
        shown = [row for row in self.rows if row.runs != "inside" or not row.is_leaf]
        lines = [f"{self.accelerated} of {self.total} modules run in our forms"]
        heads = {
            "region": "runs in our forms",
            "own": "runs its own forward",
            "alone": "left alone",
            "unused": "does not run",
            "inside": "",
        }
        for row in shown:
            if row.runs == "inside":
                continue
            name = row.name or "(the model)"
            lines.append(f"  {name} ({row.cls}): {heads[row.runs]}: {row.how}")
        return "\n".join(lines)


def accelerate_report(model: nn.Module) -> AccelerateReport:
    """What runs how in a model in its mode, and every module left alone with the reason.

    Args:
        model: any module; one that was not accelerated is left alone as a whole.

    Raises:
        TypeError: no nn.Module, or a scripted one.
    """
    _check(model)
    names = {module: name for name, module in model.named_modules()}
    found: dict[nn.Module, tuple[str, str]] = {}
    # As it is called in its mode.
    with torch.set_grad_enabled(model.training):
        _explain_calls(model, found)
    rows = []
    for module, name in names.items():
        is_leaf = not any(True for _ in module.children())
        if _holds_only(module):
            continue
        runs, how = found.get(module) or _unfound(module, found)
        rows.append(AccelerateRow(name, type(module).__name__, runs, how, is_leaf))
    return AccelerateReport(tuple(rows))


def _holds_only(module: nn.Module) -> bool:
    """Whether a module has no forward, as nn.ModuleList and nn.ModuleDict have none."""
    # The class of a scripted module has no forward.
    return getattr(type(module), "forward", None) is nn.Module.forward


def _unfound(module: nn.Module, found: dict[nn.Module, tuple[str, str]]) -> tuple[str, str]:
    """Of a module that neither runs in our forms by itself nor is left to its own forward."""
    if any(found.get(m, ("", ""))[0] in ("region", "inside") for m in module.modules()):
        return "inside", "a part of what it stands in"
    return "unused", "no call in this mode comes to it"


def _check(model: object) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"got {type(model).__name__}; accelerate takes an nn.Module that is not scripted: "
            "accelerate the model that it was made from"
        )


def _fitting(what: str, wanted: Filter | None, names: dict[str, nn.Module]) -> set[str] | None:
    """The names of the modules that a filter fits, and of what is in them."""
    if wanted is None:
        return None
    if callable(wanted):
        roots = [name for name, module in names.items() if wanted(name, module)]
        if not roots:
            raise ValueError(
                f"{what} is a function that is true of none of the {len(names)} modules; give one "
                "of (name, module) that is, or leave it out"
            )
    else:
        is_many = isinstance(wanted, Iterable) and not isinstance(wanted, str)
        patterns: list[str] = list(wanted) if is_many else [wanted]  # type: ignore[list-item]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(
                f"{what} is {wanted!r}; expected names of modules with wildcards, or a function of "
                "(name, module)"
            )
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                some = ", ".join(list(names)[1:6])
                raise ValueError(
                    f"{what}={pattern!r} fits no module; there are {len(names)}: {some}, ..."
                )
        roots = [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]
    return {n for n in names if any(not r or n == r or n.startswith(f"{r}.") for r in roots)}


def _bind(module: nn.Module, opaque: bool) -> None:
    forward = forward_of(module)
    if forward is not None and forward.opaque == opaque:
        return
    _unbind(module)
    if not (_has_own_forward(module) and (opaque or _is_made_of_others(module))):
        return
    # A plain attribute: nn.Module's own setting of it knows parameters and modules only.
    vars(module)["forward"] = Forward(module, opaque)
    vars(module)["_replicate_for_data_parallel"] = Replicate(module)
    vars(module)["__prepare_scriptable__"] = Scriptable(module)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a call of a module runs a function that is the forward of its class."""
    if any(name in vars(module) for name in CALLED) or isinstance(module, torch.jit.ScriptModule):
        return False
    forward = inspect.getattr_static(type(module), "forward", None)
    return isinstance(forward, FunctionType) and not _holds_only(module)


def _is_made_of_others(module: nn.Module) -> bool:
    """Whether a module is anything else than a layer of PyTorch's: other libraries' layers call
    functions of PyTorch, some with weights of their own."""
    is_layer = type(module).__module__.startswith("torch.nn.")
    return not is_layer or any(True for _ in module.children())


def _unbind(module: nn.Module) -> None:
    # Also that of the module which this one is a shallow copy of.
    forward = vars(module).get("forward")
    if isinstance(forward, Forward):
        if forward.module is module:
            forward.region.path.drop()
        for name in BOUND:
            vars(module).pop(name, None)


def _compare(module: nn.Module) -> None:
    """Compare what is entered by calls with its own forward, each kind of call once."""
    forward = forward_of(module)
    if forward is not None and not forward.opaque and _runs(forward):
        samples = [x for x in (sample(module), sample(module, even=True)) if x is not None]
        x = next(filter(forward.own().takes, samples), None)
        if x is None:
            return
        modes = {m: m.training for m in module.modules()}
        fine = True
        try:
            for kind, wanted in (
                ("inference", forward.region.fast),
                ("training", forward.region.fused),
            ):
                if not wanted:
                    continue
                trains = kind == "training"
                if module.training != trains:
                    # What `train` of a class does besides is not wanted here. Norms that are frozen
                    # in a model that trains stay so.
                    for m in modes:
                        m.training = trains
                with torch.inference_mode(False), torch.set_grad_enabled(trains):
                    fine = not forward.region.check(kind, x) and fine
        finally:
            for m, mode in modes.items():
                m.training = mode
        if fine:
            return
    for child in module.children():
        _compare(child)


def _runs(forward: Forward) -> bool:
    """Whether a call of the module runs in our forms, as far as its structure decides that."""
    return not (forward.why_plainly() or forward.own().is_one_layer)


def _explain_calls(module: nn.Module, found: dict[nn.Module, tuple[str, str]]) -> None:
    """What happens where a module is called from outside of our forms."""
    if module in found:
        return
    if isinstance(module, Network):
        by_itself = {"inference": module.fast, "training": module.fused}
        calls = " and ".join(kind for kind, runs in by_itself.items() if runs) or "no call"
        found[module] = ("region", f"a model of this package, by itself: {calls}")
        _explain([item for *_, item in module.parts()], found)
        return
    forward = forward_of(module)
    if forward is not None and not forward.opaque and _runs(forward):
        region = forward.region
        refused = {v.reason for v in region.verdicts.values() if v.reason}
        kinds = zip(("inference", "training"), region.settings, strict=True)
        wanted = [kind for kind, is_wanted in kinds if is_wanted]
        run = [kind for kind in wanted if kind not in region.reasons]
        if not refused and (run or not wanted):
            calls = " and ".join(run) or "no call"
            for kind in wanted:
                if kind in region.reasons:
                    calls += f", {kind} by its own forward ({region.reasons[kind]})"
            before = len(found)
            _explain([forward.own().segment], found)
            parts = Counter(how for runs, how in list(found.values())[before:] if runs == "inside")
            if not parts.keys() - {"as it is"}:
                helped = any(runs == "region" for runs, _ in list(found.values())[before:])
                found[module] = ("own" if helped else "alone", "no layer in it has a form here")
                return
            named = [(parts[name], name) for name in _COUNTED if parts[name]]
            told = ", ".join(f"{n} {name}{'s' * (n > 1)}" for n, name in named)
            found[module] = ("region", f"{calls}" + (f"; {told}" if told else ""))
            return
        reason = "; ".join(sorted(refused or {region.reasons[kind] for kind in wanted}))
    else:
        reason = why_plain(module)
    children = list(module.children())
    for child in children:
        _explain_calls(child, found)
    helped = any(found[m][0] in ("region", "inside") for m in module.modules() if m in found)
    found[module] = ("own" if helped else "alone", reason)


def _explain(items: Iterable[match.Item], found: dict[nn.Module, tuple[str, str]]) -> None:
    """What happens to items inside of our forms."""
    items = list(items)
    for module in _layers(items):
        found.setdefault(module, ("inside", "as it is"))
    for part in match.segments(items):
        if isinstance(part, match.Unit):
            segments = [s for s in (part.conv, part.norm, part.act, part.pool) if s is not None]
            how = " + ".join(_KINDS[type(s)] for s in segments)
            for segment in segments:
                found[original(segment.module)] = ("inside", how)
        elif isinstance(part, match.Plain):
            _explain_calls(part.module, found)
        elif isinstance(part, match.Free):
            found.setdefault(part.module, ("inside", "as it is"))
        else:
            kind = _KINDS.get(type(part), "parts")
            if isinstance(part, match.Block) and has_depthwise(part.modules):
                kind = "inverted residual"
            found.setdefault(part.module, ("inside", kind))
            if isinstance(part, match.Graph):
                resizes = [s.node.module for s in part.stages if s.node.kind == "resize"]
                found.update((m, ("inside", "interpolation")) for m in resizes if m is not None)
            _explain(_parts(part), found)


def _layers(items: Iterable[match.Item]) -> Iterator[nn.Module]:
    """Those that are rows of what they call: other libraries' activations, and identities."""
    for item in items:
        segment = match.segment_of(item)
        if isinstance(segment, match.Members):
            if not any(True for _ in segment.module.children()):
                yield segment.module
            yield from _layers(segment.modules)


_KINDS: dict[type, str] = {
    match.Conv: "convolution",
    match.Norm: "batch norm",
    match.Act: "activation",
    match.Pool: "max pooling",
    match.Block: "residual block",
    match.SqueezeExcite: "squeeze-excitation",
    match.Pooling: "image pooling",
    match.Aspp: "ASPP",
}


# What is told of a region.
_COUNTED = ("residual block", "inverted residual", "squeeze-excitation", "ASPP")


def _parts(segment: match.Segment) -> Iterator[match.Item]:
    if isinstance(segment, match.Block):
        yield from segment.modules
        yield from [each for each in (segment.shortcut, segment.act) if each is not None]
    elif isinstance(segment, match.SqueezeExcite):
        yield from (segment.pool, *segment.fc1, *segment.fc2, segment.gate)
    elif isinstance(segment, match.Pooling):
        yield from (segment.pool, *segment.modules)
    elif isinstance(segment, match.Aspp):
        yield from (*segment.branches, segment.project)
    elif isinstance(segment, match.Sum):
        yield from segment.branches
    elif isinstance(segment, match.Features):
        for modules, _ in segment.stages:
            yield from modules
    elif isinstance(segment, match.Graph):
        for stage in segment.stages:
            yield from stage.items


def why_plain(module: nn.Module) -> str:
    """Why a module runs as it is."""
    forward = forward_of(module)
    if forward is not None:
        if forward.opaque:
            return "it was excluded, or not included"
        if why := forward.why_plainly():
            return why
        if not isinstance(forward.own().segment, match.Plain):
            return "it is one layer, which joins nothing"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if has_hooks(module):
        return "it has forward hooks"
    own = [n for n in CALLED if n in vars(module) and (n != "forward" or forward is None)]
    if own:
        return f"{own[0]} was exchanged on the instance"
    if module._compiled_call_impl is not None:
        return "it was compiled by itself"
    if not is_followed(module):
        return "its class is called in another way than nn.Module"
    if match.rule_of_class(type(module)) is not None and not isinstance(
        match.segment_of(module), match.Plain
    ):
        return "it is part of nothing that runs in our forms"
    if isinstance(module, nn.Conv2d):
        return "a convolution with another padding than by zeros, or with weights of another kind"
    return f"no rule knows a {type(module).__name__}"
