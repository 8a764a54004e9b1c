"""Whether a module computes what its class computed when PyTorch, or this package, shipped it.

What stands for a module in a fast form knows its class's arithmetic and its attributes. People also
change what a module does: they patch `_conv_forward` on an instance, derive from `nn.Conv2d` for
weight standardisation or seamless tiling, exchange `nn.ReLU.forward` for all modules or `conv2d` of
`torch.nn.functional`, compile one submodule, register hooks. `is_plain` says no to all of these,
and the module then runs as it is. Inference and training both ask here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_SHIPPED = ("torch.nn.", "deeplab_fast.")
# What a call of a module passes through, on its class and on the instance.
CALLED = (
    "__call__",
    "_wrapped_call_impl",
    "_call_impl",
    "_slow_forward",
    "forward",
    "_conv_forward",
    "_check_input_dim",
    "__getattr__",
)
# Of these, what every class has from nn.Module.
_ENTRANCE = ("__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward")
# What an instance's attribute can stand before: Python looks the others up on the class.
_METHODS = tuple(name for name in CALLED if not name.startswith("__"))
# What a subclass may define anew without changing what a call computes.
_HARMLESS = frozenset(
    {
        "__annotations__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__classcell__",
        "__constants__",
        "__deepcopy__",
        "__copy__",
        "__dict__",
        "__doc__",
        "__eq__",
        "__firstlineno__",
        "__getstate__",
        "__hash__",
        "__init__",
        "__init_subclass__",
        "__jit_unused_properties__",
        "__module__",
        "__parameters__",
        "__orig_bases__",
        "__qualname__",
        "__reduce__",
        "__reduce_ex__",
        "__repr__",
        "__setattr__",
        "__setstate__",
        "__slots__",
        "__static_attributes__",
        "__str__",
        "__weakref__",
        "_get_name",
        "_load_from_state_dict",
        "_save_to_state_dict",
        "_version",
        "cpu",
        "cuda",
        "eval",
        "extra_repr",
        "load_state_dict",
        "requires_grad_",
        "reset_parameters",
        "reset_running_stats",
        "state_dict",
        "to",
        "train",
        "zero_grad",
    }
)
# Functions that the modules which fast forms stand for call by their names.
_FUNCTIONAL = (
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "conv2d",
    "dropout",
    "dropout2d",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "interpolate",
    "leaky_relu",
    "max_pool2d",
    "pad",
    "relu",
    "relu6",
    "silu",
)
_Functions = tuple[object, ...]
# By class: what reads those of `CALLED` that it has, what it read then, whether that is as shipped.
_judged: dict[type, tuple[Callable[[type], object], object, bool]] = {}


class BoundForward:
    """Base of what an instance may have as its `forward` and still compute what its class does.

    Attributes:
        module: the instance; a shallow copy of it has what computes with the original.
        opaque: the module is to run as it is.
    """

    module: nn.Module
    opaque = False

    def segment(self, module: nn.Module) -> Any:
        """What the module is, as a `match.Segment`, where no rule knows its class."""
        raise NotImplementedError

    def origins(self) -> Iterator[Any]:
        """What that depends on, as an `origin.Origin`, or nothing."""
        raise NotImplementedError

    def changes_input(self) -> bool:
        """Whether the class's forward changes the map that it is called with."""
        raise NotImplementedError


def bound_forward(module: nn.Module) -> BoundForward | None:
    """What stands before the forward of a module's class and computes the same, or None."""
    bound = module.__dict__.get("forward")
    return bound if isinstance(bound, BoundForward) and bound.module is module else None


def is_followed(module: nn.Module, entered: bool = False) -> bool:
    """Whether a call of a module of any class runs the forward of its class, and nothing else.

    Args:
        module: the module.
        entered: its call is under way, and with it what hooks it has.
    """
    own = module.__dict__
    cls = type(module)
    return not (
        any(name in own for name in CALLED if name != "forward" or bound_forward(module) is None)
        or module._compiled_call_impl is not None
        or (not entered and runs_hooks(module))
        or any(getattr(cls, name) is not shipped for name, shipped in _ENTRANCE_SHIPPED)
    )


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module computes what its class was shipped to compute, and runs no
    hooks."""
    return is_intact(module) and not runs_hooks(module)


def runs_hooks(module: nn.Module) -> bool:
    """Whether a call of a module now runs anything beside its forward."""
    return has_hooks(module) or (
        # They see gradients only.
        torch.is_grad_enabled() and bool(module._backward_hooks or module._backward_pre_hooks)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calls of a module run anything beside its forward, gradients aside."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_global_hooks() -> bool:
    """Whether every call of a module runs hooks."""
    all_modules = nn.modules.module
    return bool(
        all_modules._global_forward_hooks
        or all_modules._global_forward_pre_hooks
        or all_modules._global_backward_hooks
        or all_modules._global_backward_pre_hooks
    )


def has_transforms() -> bool:
    """Whether something watches or changes the operations that the plain modules run."""
    if torch._C._len_torch_dispatch_stack() or torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if not torch._C._len_torch_function_stack():
        return False
    # torch.device and torch.set_default_device are modes too, without effect on a model's call.
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode).__name__ != "DeviceContext" for mode in modes)


def is_intact(module: nn.Module) -> bool:
    """Whether a call of the module, hooks aside, computes what its class was shipped to compute.

    A class of somebody else's is judged by the class of PyTorch's or of this package that it is
    derived from: it may add to that and initialise it, not define anew what that has.
    """
    if torch.compiler.is_compiling():
        if not _is_intact_when_compiled(module):
            return False
    else:
        own = module.__dict__
        for name in CALLED:
            if name in own and not (name == "forward" and bound_forward(module) is not None):
                return False
    return module._compiled_call_impl is None and is_intact_class(type(module))


def _is_intact_when_compiled(module: nn.Module) -> bool:
    """That no instance attribute stands before what the class calls.

    Dynamo compiles anew when an attribute that was read is exchanged, as it does for the plain
    modules; a test of `module.__dict__` it answers once and for all.
    """
    for name in _METHODS:
        own = getattr(module, name, None)
        if own is None:
            continue
        if getattr(own, "__func__", None) is not getattr(type(module), name, None):
            return False
    return True


def is_intact_class(cls: type) -> bool:
    """The part of `is_intact` that the class answers."""
    judged = _judged.get(cls)
    # Functions compare by identity.
    if judged is None or judged[1] != judged[0](cls):
        read = attrgetter(*[name for name in CALLED if hasattr(cls, name)])
        judged = _judged[cls] = (read, read(cls), _is_as_shipped(cls))
    return judged[2]


# As torch.compiler.assume_constant_result does, which imports the compiler. A compiled model keeps
# the answer, as it keeps the forwards that it was made from.
is_intact_class._dynamo_marked_constant = True  # type: ignore[attr-defined]


def functional() -> _Functions:
    """The functions of torch.nn.functional that modules call, as they are now."""
    return tuple([getattr(F, name, None) for name in _FUNCTIONAL])


def functional_is_intact() -> bool:
    """Whether torch.nn.functional has its own functions where modules look for them."""
    return functional() == _FUNCTIONS_SHIPPED


def _is_as_shipped(cls: type) -> bool:
    derived: list[type] = []
    for ancestor in cls.__mro__:
        # A parametrization computes the weight whenever it is read.
        if ancestor.__module__.startswith("torch.nn.utils."):
            return False
        if not ancestor.__module__.startswith(_SHIPPED):
            derived.append(ancestor)
            continue
        if any(
            name not in _HARMLESS and hasattr(ancestor, name)
            for sub in derived
            for name in vars(sub)
        ):
            return False
        return all(_is_own(ancestor, name) for name in CALLED)
    return False


def _is_own(cls: type, name: str) -> bool:
    """Whether what a class has under a name was defined in its module, or in an ancestor's."""
    for ancestor in cls.__mro__:
        if name not in vars(ancestor):
            continue
        function = vars(ancestor)[name]
        home = sys.modules.get(ancestor.__module__)
        # nn.Module's __call__ has the name of the function that it is.
        names = (name, "_wrapped_call_impl") if name == "__call__" else (name,)
        return (
            home is not None
            # Unlike a name, which functools.wraps copies.
            and getattr(function, "__globals__", None) is vars(home)
            and function.__qualname__ in [f"{ancestor.__qualname__}.{n}" for n in names]
        )
    return True


def _shipped_functions() -> _Functions:
    def is_shipped(function: object) -> bool:
        home = getattr(function, "__globals__", None)
        # Most are Python functions, of this module or made by torch's boolean_dispatch.
        return home is None or home.get("__name__", "").startswith("torch.")

    return tuple(f if is_shipped(f) else None for f in functional())


_FUNCTIONS_SHIPPED = _shipped_functions()
# None where it was exchanged before this package was imported.
_ENTRANCE_SHIPPED = [
    (name, getattr(nn.Module, name) if _is_own(nn.Module, name) else None) for name in _ENTRANCE
]
