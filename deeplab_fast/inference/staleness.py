"""Whether a model is still what its prepared weights were made from.

`Snapshot.is_current` looks at everything that a program depends on:

- the modules: identity, class, children, attributes (eval mode, stride, dilation, eps, ...) and
  forward hooks;
- their tensors: identity, version counter, storage address, shape, strides;
- the bytes of their tensors. A version counter counts what PyTorch's own in-place operations do; it
  does not see writes through `p.data`, a NumPy view, shared memory or another framework.

The bytes cost one pass over the weights at the speed of memory, the rest some microseconds for each
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Snapshot"]


class Snapshot:
    """The state of modules and tensors at one time.

    Args:
        modules: their attributes, hooks and children count.
        tensors: (a module's parameters or buffers, key): the entries whose values count, None too.
        facts: (container, a copy of what it held).

    The bytes are taken at once: what is prepared afterwards is never older than they are.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        tensors: Sequence[tuple[dict[str, Any], str]],
        facts: Sequence[tuple[Any, Any]] = (),
    ) -> None:
        self._modules = [_ModuleState(m) for m in {id(m): m for m in modules}.values()]
        self._facts = tuple(facts)
        entries = {(id(holder), key): (holder, key) for holder, key in tensors}
        self._tensors = [
            (holder, key, tensor, _identity(tensor))
            for holder, key in entries.values()
            for tensor in [holder.get(key)]
        ]
        values = {id(t): t for _, _, t, _ in self._tensors if t is not None}
        self._bytes = _Bytes([t.detach() for t in values.values()])

    def is_current(self) -> bool:
        """Whether nothing has changed since."""
        return self.same_structure() and self.same_tensors() and self.same_bytes()

    def same_structure(self) -> bool:
        """Modules, their attributes, hooks and children."""
        try:
            return all([state.same() for state in self._modules]) and all(
                container == held for container, held in self._facts
            )
        except (RuntimeError, ValueError, TypeError):
            # An attribute that cannot be compared, such as a tensor, has been exchanged.
            return False

    def same_tensors(self) -> bool:
        """Identity, version and storage of every tensor."""
        return all(
            [
                holder.get(key) is tensor and _identity(tensor) == identity
                for holder, key, tensor, identity in self._tensors
            ]
        )

    def same_bytes(self) -> bool:
        """Contents of every tensor."""
        return self._bytes.same()

    @property
    def held_bytes(self) -> int:
        """Bytes that the snapshot itself holds."""
        return self._bytes.held


class _ModuleState:
    __slots__ = ("attributes", "children", "cls", "hooked", "hooks", "module", "now")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cls = type(module)
        self.now = module.__dict__
        self.attributes = dict(module.__dict__)
        self.children = tuple(module._modules.items())
        self.hooks = (module._forward_hooks, module._forward_pre_hooks)
        self.hooked = self._has_hooks()

    def _has_hooks(self) -> bool:
        before, after = self.hooks
        return bool(before or after)

    def same(self) -> bool:
        # Values that are the same object, as the dictionaries of parameters are, compare at once.
        return (
            self.now == self.attributes
            and type(self.module) is self.cls
            and self._has_hooks() == self.hooked
            and (not self.children or tuple(self.module._modules.items()) == self.children)
        )


def _identity(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    # Tensors made in inference mode have no version counter.
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class _Bytes:
    """The contents of dense tensors: a 64-bit hash of all, or a copy where none is compiled."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._hash = self._copies = None
        if hasattr(torch.ops.deeplab_fast, "_hash_bytes"):
            self._hash = torch.ops.deeplab_fast._hash_bytes(tensors)
        else:
            with torch.inference_mode(False), torch.no_grad():
                self._copies = [t.clone() for t in tensors]

    def same(self) -> bool:
        if self._copies is None:
            return torch.ops.deeplab_fast._hash_bytes(self._tensors) == self._hash
        # Bit patterns: nan equals itself, and 0.0 differs from -0.0.
        return all(
            torch.equal(_bits(now), _bits(then))
            for now, then in zip(self._tensors, self._copies, strict=True)
        )

    @property
    def held(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._copies or ())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor
