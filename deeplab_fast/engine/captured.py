"""A training step as CUDA graphs: what a GPU runs in it is launched at once, not kernel by kernel.

Two graphs of one pool of memory: the forward pass with the loss, and the backward pass. Between and
behind them runs what needs the host, as it does without graphs: Lightning's hooks, the division by
the parts of a step, the scale of fp16, clipping and the check for what is not finite, which must
come before the weights are changed, and the optimizer. That one is left out because its learning
rate is a new number in every step: within a graph it would be a tensor, which of PyTorch's SGD only
the fused form takes and of AdamW the capturable and the fused one, and these round otherwise. Its
foreach form is some dozens of launches; a step has thousands.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deeplab_fast.engine.runner import is_out_of_memory
from deeplab_fast.nn.batch_norm import FROZEN_STATE
from deeplab_fast.program import capture
from deeplab_fast.program.intact import has_global_hooks, has_hooks, is_intact, is_plain

__all__ = ["WARM_UP", "CaptureFailed", "CapturedStep", "reasons_against"]

T = TypeVar("T")
Losses = dict[str, Tensor]
# Batches of a shape before it is captured: as many as torch.cuda.make_graphed_callables runs.
WARM_UP = 3
_PLAIN = (bool, int, float, str, tuple, type(None))


class CaptureFailed(RuntimeError):
    """A training step that cannot be captured; the process cannot go on with its GPU."""


def reasons_against(model: nn.Module, device: torch.device) -> Iterator[str]:
    """Why a training step of a model cannot be captured, or would not be repeated by a replay.

    A replay runs what the GPU ran, not Python. So modules must be PyTorch's and this package's, as
    they were shipped; a class of another package says by a class attribute ``capturable = True``
    that its forward pass does the same in every call, and never waits for the device.
    """
    reason = capture.current().reason(device)
    if reason:
        yield reason
    if os.environ.get("DEEPLAB_FAST_STRICT_LABELS") == "1":
        yield "DEEPLAB_FAST_STRICT_LABELS=1 waits for the device in every step"
    if torch.is_anomaly_enabled():
        yield "anomaly detection looks at every gradient on the host"
    if has_global_hooks():
        yield "global hooks of modules are set"
    for name, module in model.named_modules():
        kind = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, nn.SyncBatchNorm):
            yield f"{kind} shares its statistics with other processes"
        elif isinstance(module, _BatchNorm) and module.momentum is None:
            yield f"{kind} has momentum None, for which the host reads how many batches there were"
        elif type(module).forward is nn.Module.forward and "forward" not in vars(module):
            # A list of modules, which is not called.
            continue
        elif is_intact(module) or getattr(type(module), "capturable", False):
            if has_hooks(module) or module._backward_hooks or module._backward_pre_hooks:
                yield f"{kind} has hooks"
        else:
            yield (
                f"{kind} is not PyTorch's or this package's, or was changed; where it does the "
                "same in every call, give its class the attribute capturable = True"
            )
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            yield f"{name} has hooks"


class CapturedStep:
    """The forward and backward pass of a training step, captured once and then replayed.

    The first `WARM_UP` batches of a shape run without graphs, then it is captured. Other shapes and
    dtypes go on running without. Gradients are those without graphs, to the bit where kernels are
    the same, and so are running statistics, counters of batches, and dropout, whose seed and offset
    are the generator's at each replay.

    The graphs keep the memory of a step, also while something else runs.

    Args:
        model: whose parameters get gradients; not moved while this is used.
        losses: "loss" and its parts of (images, labels), scalars; called while it is captured.
        device: of the model.
        tell: takes a line when something is captured, and when a batch cannot be replayed.

    Raises:
        ValueError: something speaks against it (`reasons_against`).
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[[Tensor, Tensor], Losses],
        device: torch.device,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        for reason in reasons_against(model, device):
            raise ValueError(f"cuda_graph: {reason}; train with cuda_graph=false")
        self._model = model
        self._losses = losses
        self._device = device
        self._tell = tell or (lambda text: None)
        self._capture = capture.current()
        self._seen: Counter[object] = Counter()
        self._graphs: _Graphs | None = None
        self._state: list[object] = []
        # The loss of a replay, behind which Lightning's own arithmetic follows.
        self._leaf: Tensor | None = None
        self._told = False

    def losses(self, x: Tensor, labels: Tensor) -> Losses:
        """`losses(x, labels)`; the values stay as they are. `backward` takes its "loss"."""
        shape = _shape(x, labels)
        self._leaf = None
        if self._graphs is None:
            if self._seen[shape] < WARM_UP:
                self._seen[shape] += 1
                with self._capture.warm_up(self._device):
                    return self._losses(x, labels)
            self._graphs = _Graphs(self._capture, self._model, self._losses, x, labels)
            self._state = _state(self._model)
            self._tell(f"the step of images {list(x.shape)} is captured as CUDA graphs")
        if self._graphs.shape != shape:
            if not self._told:
                self._tell(f"images {list(x.shape)} are of another shape: they run without graphs")
                self._told = True
            return self._losses(x, labels)
        found = self._graphs.forward(x, labels)
        self._leaf = found["loss"].requires_grad_()
        return found

    def backward(self, loss: Tensor) -> None:
        """Gradients of what was made of the last losses' "loss", added to those there are."""
        leaf, self._leaf = self._leaf, None
        if leaf is not None:
            loss.backward()
            assert leaf.grad is not None and self._graphs is not None
            self._graphs.backward(leaf.grad)
        elif self._graphs is None:
            with self._capture.warm_up(self._device):
                loss.backward()
        else:
            loss.backward()

    def renew(self) -> None:
        """Capture anew if the model is no longer what was captured: modes, attributes, what is
        frozen, where its tensors are.

        Raises:
            ValueError: something speaks against it now.
        """
        if self._graphs is None or _state(self._model) == self._state:
            return
        for reason in reasons_against(self._model, self._device):
            raise ValueError(f"cuda_graph: {reason}; train with cuda_graph=false")
        self._tell("the model has changed: its step is captured anew")
        self._graphs = None
        self._seen.clear()

    @property
    def held_bytes(self) -> int:
        """Bytes that the graphs take from the device."""
        return 0 if self._graphs is None else self._graphs.held_bytes


class _Graphs:
    """The two graphs of a shape, with what they read and write."""

    def __init__(
        self,
        maker: capture.Capture,
        model: nn.Module,
        losses: Callable[[Tensor, Tensor], Losses],
        x: Tensor,
        labels: Tensor,
    ) -> None:
        self.shape = _shape(x, labels)
        self._maker = maker
        self._run = losses
        self._device = x.device
        self._pool = maker.pool(x.device)
        self._x, self._labels = x.clone(), labels.clone()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers = list(model.buffers())
        self._written: list[Tensor] = []
        self._losses: Losses = {}
        # Of the forward pass until its backward pass.
        self._loss: Tensor | None = None
        self._grad: Tensor | None = None
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self._replay_forward: capture.Replay | None = None
        self._replay_backward: capture.Replay | None = None
        self._owners: list[object] = []

    def forward(self, x: Tensor, labels: Tensor) -> Losses:
        """Copies of the losses."""
        if self._replay_forward is None:
            # Not copied to: autograd counts changes until the backward pass is captured.
            versions = [b._version for b in self._buffers]
            self._losses, self._replay_forward = self._record(self._forward)
            pairs = zip(self._buffers, versions, strict=True)
            self._written = [b for b, version in pairs if b._version != version]
        else:
            self._x.copy_(x)
            self._labels.copy_(labels)
        self._replay_forward()
        return {name: value.clone() for name, value in self._losses.items()}

    def backward(self, grad: Tensor) -> None:
        """Gradients of the parameters, where that of the loss is `grad`."""
        if self._replay_backward is None:
            self._grad = grad.clone()
            grads, self._replay_backward = self._record(self._backward)
            pairs = zip(self._parameters, grads, strict=True)
            self._pairs = [(p, g) for p, g in pairs if g is not None]
        else:
            assert self._grad is not None
            self._grad.copy_(grad)
        # Of the parts of a step before this one; a replay overwrites.
        before = [
            (g, p.grad.clone() if p.grad is g else p.grad)
            for p, g in self._pairs
            if p.grad is not None
        ]
        self._replay_backward()
        if before:
            now, then = (list(each) for each in zip(*before, strict=True))
            torch._foreach_add_(now, then)
        for parameter, own in self._pairs:
            parameter.grad = own
        # By them a model sees that what it prepared for inference is stale.
        torch.autograd.graph.increment_version(self._written)

    @property
    def held_bytes(self) -> int:
        return self._maker.pool_bytes(self._pool, self._device)

    def _forward(self) -> Losses:
        found = self._run(self._x, self._labels)
        self._loss = found["loss"]
        return {name: value.detach() for name, value in found.items()}

    def _backward(self) -> list[Tensor | None]:
        loss, self._loss = self._loss, None
        assert loss is not None
        before = [p.grad for p in self._parameters]
        # Without gradients to add to, autograd makes them in the memory of the graph.
        for p in self._parameters:
            p.grad = None
        try:
            torch.autograd.backward(loss, self._grad)
            return [p.grad for p in self._parameters]
        finally:
            for p, grad in zip(self._parameters, before, strict=True):
                p.grad = grad

    def _record(self, run: Callable[[], T]) -> tuple[T, capture.Replay]:
        try:
            results, replay, owner = self._maker.record(run, self._device, self._pool)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise CaptureFailed(
                f"the training step cannot be captured as a CUDA graph ({error}); a loss or a "
                "module waits for the device: train with cuda_graph=false"
            ) from error
        self._owners.append(owner)
        return results, replay


def _shape(*tensors: Tensor) -> tuple[object, ...]:
    return tuple((t.shape, t.stride(), t.dtype) for t in tensors)


def _state(model: nn.Module) -> list[object]:
    """What a graph has made constants of."""

    def attributes(module: nn.Module) -> list[tuple[str, object]]:
        return [
            (name, value)
            for name, value in vars(module).items()
            # What a frozen batch norm was asked for is not what it does.
            if isinstance(value, _PLAIN) and name[0] != "_" and name not in FROZEN_STATE
        ]

    modules: list[object] = [(type(m), attributes(m)) for m in model.modules()]
    parameters = [(p.data_ptr(), p.requires_grad) for p in model.parameters()]
    buffers = [b.data_ptr() for b in model.buffers()]
    return [*modules, parameters, buffers, [is_plain(m) for m in model.modules()]]
