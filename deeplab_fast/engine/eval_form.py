"""Models run as in eval mode while others train, switch or change them: nothing on them is set.

A model whose modules are all in eval mode is called as it is. Of one that is not, a *view* is
called: a second set of module objects with the same classes, hooks, attributes and the very same
parameters and buffers, all in eval mode. So a thread that trains a model keeps its modes and its
running statistics while another one predicts with it.
"""

from __future__ import annotations

import functools
import gc
import threading
import types
import weakref
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

__all__ = ["ModeGate", "eval_form", "eval_logits", "eval_view", "gate_of"]

M = TypeVar("M", bound=nn.Module)

# What lies behind an attribute and cannot lead to a module of the model by itself.
_ENDS = (str, bytes, int, float, complex, type, types.ModuleType, types.CodeType, Tensor)
# Objects that are looked at behind one attribute before it counts as unknown.
_MOST_OBJECTS = 2000


class ModeGate:
    """Calls of a model in one mode, and changes of its mode: a change waits for calls under way.

    Calls do not wait for each other. A change that is made within a call waits for nothing: two of
    them would wait for each other.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._calling: Counter[int] = Counter()
        self._changing: int | None = None
        self._depth = 0

    # An interrupt may come in every wait: what is entered then is left again.

    @contextmanager
    def calling(self) -> Iterator[None]:
        """While the model is called."""
        own, entered = threading.get_ident(), False
        try:
            with self._free:
                # One that calls already goes on: the change waits for it.
                while self._changing not in (None, own) and not self._calling[own]:
                    self._free.wait()
                self._calling[own] += 1
                entered = True
            yield
        finally:
            with self._free:
                self._calling[own] -= entered
                if not self._calling[own]:
                    del self._calling[own]
                self._free.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """While its mode is changed."""
        own, entered = threading.get_ident(), False
        try:
            with self._free:
                if own not in self._calling:
                    while self._changing not in (None, own):
                        self._free.wait()
                    self._changing, self._depth, entered = own, self._depth + 1, True
                    while self._calling:
                        self._free.wait()
            yield
        finally:
            with self._free:
                self._depth -= entered
                if not self._depth:
                    self._changing = None
                self._free.notify_all()


_lock = threading.RLock()
_gates: weakref.WeakKeyDictionary[nn.Module, ModeGate] = weakref.WeakKeyDictionary()
_views: weakref.WeakKeyDictionary[nn.Module, _View] = weakref.WeakKeyDictionary()


def gate_of(model: nn.Module) -> ModeGate:
    """The gate of a model; those of this package pass it in ``train()`` and ``eval()``."""
    with _lock:
        return _gates.setdefault(model, ModeGate())


def eval_logits(model: Any, x: Tensor) -> Tensor:
    """The logits of a model as in eval mode, [N, 3, H, W] -> [N, C, h, w], from any thread.

    Args:
        model: with ``forward_logits``; an ``engine.adapter.AdaptedModel`` also with
            ``forward_logits_of(model, x)``, whose ``model`` is the one that has modes.
    """
    if not isinstance(model, nn.Module):
        return model.forward_logits(x)
    called: Any = model
    if hasattr(model, "forward_logits_of"):
        with eval_form(called.model) as form:
            return called.forward_logits_of(form, x)
    with eval_form(called) as form:
        return form.forward_logits(x)


@contextmanager
def eval_form(model: M) -> Iterator[M]:
    """What to call in place of a model, as in eval mode: itself, or a view.

    A model of this package that is called itself waits with changes of its mode meanwhile. Where
    there is no view (see :func:`eval_view`) the model itself is in eval mode meanwhile, for all
    threads, and gets its modes back after the last of them.
    """
    with gate_of(model).calling():
        if _is_in_eval_mode(model):
            yield model
            return
    view = eval_view(model)
    if view is not None:
        yield view
        return
    with _switched(model):
        yield model


def eval_view(model: M, *, kept: bool = True) -> M | None:
    """The model in eval mode on its own parameters and buffers, as other module objects.

    What is changed in place on parameters, buffers and hooks, or exchanged among them, is changed
    on both; other attributes of the view are its own: what a forward sets is set there. Hooks are
    called with the view's modules.

    Args:
        model: any module.
        kept: take the view of an earlier call where the model is as it was; False makes a new one,
            for a caller that changes it.

    Returns:
        None where a view could do something else than the model: its code may reach modules of the
        original (a closure, a hook that holds the model, a compiled or scripted module), a class
        has a ``train()`` of its own, which may do more than set flags, or parameters that are made
        by the first call.
    """
    with _lock:
        known = _views.get(model) if kept else None
        if known is not None and known.is_current():
            return cast(M, known.view)
        made = _made(model)
        if made is None:
            return None
        if kept and not made.holds_model:
            _views[model] = made
        return cast(M, made.view)


def _is_in_eval_mode(model: nn.Module) -> bool:
    """Whether all of it is, and not for the time of another thread's call only."""
    with _switching:
        return model not in _switches and not any(m.training for m in model.modules())


@dataclass(frozen=True)
class _Source:
    """A module as it was when its view was made."""

    # Not the module: what is kept for a model must not keep it.
    module: weakref.ref[nn.Module]
    cls: type
    attributes: dict[str, Any]
    children: tuple[tuple[str, nn.Module | None], ...]

    def is_current(self) -> bool:
        module = self.module()
        if module is None or type(module) is not self.cls:
            return False
        now, before = vars(module), self.attributes
        return (
            len(now) == len(before)
            and all(
                name in now and (name in _MODES or _is_same(now[name], value))
                for name, value in before.items()
            )
            and tuple(module._modules.items()) == self.children
        )


def _is_same(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if isinstance(before, weakref.ReferenceType) and before() is now:
        return True
    return bool(now == before)


@dataclass(frozen=True)
class _View:
    """A view, and what it was made from."""

    view: nn.Module
    sources: tuple[_Source, ...]
    # Of hooks, and of modules: with copies.
    containers: tuple[tuple[Any, Any], ...]
    # What it was made from holds the model, which a cache would keep for ever.
    holds_model: bool

    def is_current(self) -> bool:
        try:
            return all([source.is_current() for source in self.sources]) and all(
                now == before for now, before in self.containers
            )
        except (RuntimeError, TypeError, ValueError):
            # An attribute that has no equality has been exchanged.
            return False


# A frozen batch norm remembers the mode that was asked for.
_MODES = ("training", "asked_mode")
# Parameters, buffers, hooks.
_SHARED = frozenset(vars(nn.Module())) - {"_modules", "training"}
# The hooks that a call without gradients runs.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _made(model: nn.Module) -> _View | None:
    modules = list(model.modules())
    if any(not _is_known(module) for module in modules):
        return None
    # A class of torch.fx makes another class in its __new__.
    views: dict[int, nn.Module] = {id(m): object.__new__(type(m)) for m in modules}
    sources, containers, holds_model = [], [], False
    for module in modules:
        view = views[id(module)]
        attributes = dict(vars(module))
        own: dict[str, Any] = {}
        for name, value in attributes.items():
            if name == "_modules":
                own[name] = {k: v if v is None else views[id(v)] for k, v in value.items()}
                continue
            if name in _SHARED:
                if name in _HOOKS:
                    if value and _reaches(value, views):
                        return None
                    containers.append((value, value.copy()))
                own[name] = value
                continue
            in_view = getattr(type(value), "in_eval_view", None)
            if in_view is not None:
                own[name] = in_view(value, view)
                # It may hold the module, as what `accelerate` binds does.
                attributes[name] = weakref.ref(value)
                continue
            try:
                own[name] = _mapped(value, views)
            except _Unknown:
                return None
            if own[name] is not value:
                holds_model = holds_model or _reaches(value, {id(model)}, views)
                containers.append((value, _copied(value)))
        own["training"] = False
        vars(view).update(own)
        children = tuple(attributes["_modules"].items())
        sources.append(_Source(weakref.ref(module), type(module), attributes, children))
    return _View(views[id(model)], tuple(sources), tuple(containers), holds_model)


def _copied(value: Any) -> Any:
    """Lists, dicts and sets in new ones, as deep as `_mapped` goes."""
    if type(value) in (list, tuple, set):
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value


class _Unknown(Exception):
    """A value that may lead to a module of the original."""


def _mapped(value: Any, views: dict[int, nn.Module]) -> Any:
    """The value with the view's modules in place of the model's; itself where it has none."""
    if isinstance(value, _ENDS) or value is None:
        return value
    if isinstance(value, nn.Module):
        return views.get(id(value), value)
    if type(value) in (list, tuple, set):
        items = [_mapped(item, views) for item in value]
        same = all(a is b for a, b in zip(items, value, strict=True))
        return value if same else type(value)(items)
    if type(value) is dict:
        values = {key: _mapped(item, views) for key, item in value.items()}
        return value if all(values[key] is value[key] for key in value) else values
    if isinstance(value, types.MethodType):
        owner = _mapped(value.__self__, views)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        func, args, keywords = (_mapped(part, views) for part in parts)
        if (func, args, keywords) == parts:
            return value
        return functools.partial(func, *args, **keywords)
    if _reaches(value, views):
        raise _Unknown
    return value


def _reaches(value: object, wanted: Container[int], ends: Container[int] = ()) -> bool:
    """Whether an object holds one of these, by id, or too much to tell; not by way of `ends`."""
    seen: dict[int, object] = {}
    ahead = [value]
    while ahead:
        each = ahead.pop()
        if id(each) in wanted:
            return True
        if isinstance(each, _ENDS) or id(each) in seen or id(each) in ends:
            continue
        # Kept, so that no other object gets its id.
        seen[id(each)] = each
        if len(seen) > _MOST_OBJECTS:
            return True
        if isinstance(each, types.FunctionType):
            ahead += [each.__closure__, each.__defaults__, each.__kwdefaults__]
            if not (each.__module__ or "").startswith(("torch.", "numpy.")):
                ahead += [each.__globals__.get(name) for name in _names(each.__code__)]
        elif not isinstance(each, weakref.ReferenceType):
            ahead += gc.get_referents(each)
        elif (target := each()) is not None:
            ahead.append(target)
    return False


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that a function's code, and that of functions in it, may look up globally."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


# Whose `train()` and `eval()` set nothing but flags.
_SET_FLAGS = (
    "torch.nn.",
    "deeplab_fast.",
    "segmentation_models_pytorch.base.model",
    "transformers.modeling_utils",
)


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, (nn.modules.lazy.LazyModuleMixin, torch.jit.ScriptModule)):
        return False
    # Those of transformers cast kernels in train() where they are in use.
    return not getattr(module, "use_kernels", False) and all(
        next(base for base in type(module).__mro__ if name in vars(base)).__module__.startswith(
            _SET_FLAGS
        )
        for name in ("train", "eval")
    )


class _Switch:
    """A model in eval mode for the time of calls.

    Attributes:
        training: the modules that were in training mode.
        threads: calls under way.
        done: set when the model is in eval mode, or could not be put into it.
        error: why it could not.
    """

    def __init__(self, training: list[nn.Module]) -> None:
        self.training = training
        self.threads = 0
        self.done = threading.Event()
        self.error: BaseException | None = None


_switching = threading.Lock()
_switches: weakref.WeakKeyDictionary[nn.Module, _Switch] = weakref.WeakKeyDictionary()


@contextmanager
def _switched(model: nn.Module) -> Iterator[None]:
    """The model itself in eval mode; every submodule gets its own mode back."""
    with _switching:
        switch = _switches.get(model)
        first = switch is None
        if switch is None:
            # Submodules may differ in mode, e.g. frozen batch norms of a model in training.
            switch = _Switch([module for module in model.modules() if module.training])
            _switches[model] = switch
        switch.threads += 1
    try:
        if first:
            # Without the lock: eval() may wait for calls, which ask for modes themselves.
            try:
                # An exported program has the mode that it was exported in.
                with suppress(NotImplementedError):
                    model.eval()
            except BaseException as error:
                switch.error = error
                raise
            finally:
                switch.done.set()
        else:
            switch.done.wait()
            if switch.error is not None:
                raise switch.error
        yield
    finally:
        with _switching:
            switch.threads -= 1
            if not switch.threads:
                del _switches[model]
                for module in switch.training:
                    module.training = True
