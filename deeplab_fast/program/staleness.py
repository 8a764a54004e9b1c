"""Whether a model is still what its prepared weights were made from.

`Snapshot.is_current` looks at everything that a program depends on, which for one that holds values
of weights is:

- the modules: identity, class and what its calls pass through, children, attributes (eval mode,
  stride, dilation, eps, ...) and hooks; of forwards that were followed what they read besides;
- their tensors: identity, version counter, storage address, shape, strides;
- the bytes of their tensors. A version counter counts what PyTorch's own in-place operations do; it
  does not see writes through `p.data`, a NumPy view, shared memory or another framework.

The bytes cost one pass over the weights at the speed of memory, the rest one or two microseconds
for each module and tensor. A program that reads the weights anew at every call depends on neither
bytes nor version counters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .intact import bound_forward, has_hooks, is_intact_class
from .match import library_rule
from .network import Runnable

_PARTS = ("backbone", "classifier", "aux_classifier", "module")


def is_dense(tensor: Tensor) -> bool:
    """An ordinary dense tensor."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and (
            tensor.is_contiguous()
            or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        )
    )


class Snapshot:
    """The state of a model with `backbone`, `classifier` and `aux_classifier`, at one time.

    Taken before weights are prepared from the model, so that what is prepared is never older. Only
    modules of PyTorch's and of this package count, and those of classes that add nothing to these:
    others run as they are, and may change their attributes in every call.

    Args:
        model: the model.
        values: the values of its weights count too.
    """

    def __init__(self, model: Runnable, values: bool = True) -> None:
        self._model = model._modules
        self._parts = [(part, model._modules.get(part)) for part in _PARTS]
        inner = [m for _, root in self._parts if root is not None for m in root.modules()]
        watched = {id(m): m for m in inner if _is_watched(m) or has_hooks(m)}.values()
        self._modules = [_module_state(m) for m in watched]
        bound = [forward for m in inner if (forward := bound_forward(m)) is not None]
        self._origins = [origin for forward in bound for origin in forward.origins()]
        classes = {type(m) for m in watched}
        self._classes = [(cls, is_intact_class(cls)) for cls in classes]
        foreign = {base for cls in classes if not is_intact_class(cls) for base in cls.__mro__}
        self._foreign = [(vars(cls), dict(vars(cls))) for cls in foreign if not _is_shipped(cls)]
        held = [
            (holder, key, tensor)
            for m in watched
            for holder in (m._parameters, m._buffers)
            for key, tensor in holder.items()
            # Counts batches of training.
            if key != "num_batches_tracked"
        ]
        self._held = [(holder.get, key, tensor) for holder, key, tensor in held]
        ordinary = [t for _, _, t in held if t is not None and type(t) in (Tensor, nn.Parameter)]
        tensors = {id(t): t for t in ordinary}.values()
        self._places = [(t, type(t), t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]
        # Tensors made in inference mode have no version counter.
        self._versions = [(t, t._version) for t in tensors if values and not t.is_inference()]
        self._bytes: _Bytes | None = None
        if values:
            self._bytes = _Bytes([t.detach() for t in tensors if _has_fp32_bytes(t)])

    def is_of(self, model: Runnable) -> bool:
        """Whether it was taken of this model; a shallow copy has parts of its own."""
        return self._model is model._modules

    def is_current(self) -> bool:
        """Whether nothing has changed since."""
        return self.same_structure() and self.same_tensors() and self.same_bytes()

    # Asked at every call, of 200 modules and 300 tensors: what a loop can look at by itself is not
    # in a function, and is looked up beforehand.

    def same_structure(self) -> bool:
        """Modules, their attributes, hooks and children."""
        try:
            return (
                all([self._model.get(part) is root for part, root in self._parts])
                # Values that are the same object, as the dictionaries of parameters and hooks are,
                # compare at once.
                and all(
                    [
                        now == attributes
                        and type(module) is cls
                        and bool(hooks or pre_hooks) == hooked
                        and bool(backward or pre_backward) == hooked_backward
                        and (not children or tuple(named.items()) == children)
                        and (not containers or all(value == kept for value, kept in containers))
                        for (
                            module,
                            cls,
                            now,
                            attributes,
                            hooks,
                            pre_hooks,
                            hooked,
                            backward,
                            pre_backward,
                            hooked_backward,
                            named,
                            children,
                            containers,
                        ) in self._modules
                    ]
                )
                and all([is_intact_class(cls) == was for cls, was in self._classes])
                and all([now == was for now, was in self._foreign])
                and all([origin.is_current() for origin in self._origins])
            )
        except (RuntimeError, TypeError, ValueError):
            # An attribute that has no equality, such as a tensor, has been exchanged.
            return False

    def same_tensors(self) -> bool:
        """Identity and storage of every tensor, and its version if values count."""
        try:
            return (
                all([get(key) is tensor for get, key, tensor in self._held])
                and all(
                    [
                        t.data_ptr() == address
                        and t.shape == shape
                        and t.stride() == stride
                        and t.dtype is dtype
                        and type(t) is cls
                        for t, cls, address, shape, stride, dtype in self._places
                    ]
                )
                and all([t._version == version for t, version in self._versions])
            )
        except RuntimeError:
            # It is no ordinary tensor any more: one without a storage or a version counter.
            return False

    def same_bytes(self) -> bool:
        """Contents of every tensor, if values count."""
        return self._bytes is None or self._bytes.same()

    @property
    def held_bytes(self) -> int:
        """Bytes of weights that the snapshot itself holds."""
        return 0 if self._bytes is None else self._bytes.held


def _module_state(module: nn.Module) -> tuple[Any, ...]:
    # Settings that could be changed in place, such as return_layers.
    containers = [
        (value, dict(value))
        for key, value in module.__dict__.items()
        if type(value) is dict and (not key.startswith("_") or not is_intact_class(type(module)))
    ]
    return (
        module,
        type(module),
        module.__dict__,
        dict(module.__dict__),
        module._forward_hooks,
        module._forward_pre_hooks,
        has_hooks(module),
        module._backward_hooks,
        module._backward_pre_hooks,
        bool(module._backward_hooks or module._backward_pre_hooks),
        module._modules,
        tuple(module._modules.items()),
        containers,
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether a module changes its attributes only when asked to."""
    cls = type(module)
    return (
        _is_shipped(cls)
        or is_intact_class(cls)
        or bound_forward(module) is not None
        or library_rule(cls) is not None
    )


def _is_shipped(cls: type) -> bool:
    return cls is object or cls.__module__.startswith(("torch.nn.", "deeplab_fast."))


def _has_fp32_bytes(tensor: Tensor) -> bool:
    return is_dense(tensor) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


class _Bytes:
    """The contents of dense tensors: a 64-bit hash of all, or a copy where none is compiled."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._hash: int | None = None
        self._copies: list[Tensor] = []
        if hasattr(torch.ops.deeplab_fast, "_hash_bytes"):
            self._hash = torch.ops.deeplab_fast._hash_bytes(tensors)
        else:
            with torch.inference_mode(False), torch.no_grad():
                self._copies = [t.clone() for t in tensors]

    def same(self) -> bool:
        if self._hash is not None:
            return torch.ops.deeplab_fast._hash_bytes(self._tensors) == self._hash
        # Bit patterns: nan equals itself, and 0.0 differs from -0.0.
        return all(
            torch.equal(now.view(torch.int32), then.view(torch.int32))
            for now, then in zip(self._tensors, self._copies, strict=True)
        )

    @property
    def held(self) -> int:
        return sum(4 * t.numel() for t in self._copies)
