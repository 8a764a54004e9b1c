"""CUDA graphs without a GPU: a replay runs the captured function again, into the same results."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


class Fence:
    """Writes down what was asked of it."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def record(self) -> None:
        self._done.append("record")

    def wait(self) -> None:
        self._done.append("wait")

    def synchronize(self) -> None:
        self._done.append("synchronize")


class _Owner:
    pass


class StandInCapture:
    """`deeplab_fast.program.capture.Capture` for tensors on the CPU.

    A capture on a GPU runs nothing. Here it runs, which shows where the function writes into what
    it read, as a training step does.

    Args:
        once: the first replay of a capture does nothing, so that both together run once.

    Attributes:
        capturing: what `in_progress` answers outside its own captures: somebody else's capture.
        captures, replays, marks: how many there were.
        pools: pools that were asked for.
        bytes_of_pool: what `pool_bytes` answers.
        bytes_of_device: what `memory` answers.
        device_seconds: what `seconds` answers: None while the device is behind.
        fences: what was done with fences, in order.
        error: raised by the next capture.
        owners: of memory, that are still kept.
    """

    def __init__(self, once: bool = False) -> None:
        self.once = once
        self.capturing = False
        self.captures = self.replays = self.pools = self.marks = 0
        self.bytes_of_pool, self.bytes_of_device = 0, 2**34
        self.device_seconds: float | None = 0.0
        self.fences: list[str] = []
        self.error: Exception | None = None
        # As the current stream is a thread's own.
        self._here = threading.local()
        self.owners: WeakSet[_Owner] = WeakSet()

    def reason(self, device: torch.device) -> str:
        return ""

    def warm_up(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    def in_progress(self) -> bool:
        return self.capturing or getattr(self._here, "recording", False)

    def pool(self, device: torch.device) -> object:
        self.pools += 1
        return object()

    def pool_bytes(self, pool: object, device: torch.device) -> int:
        return self.bytes_of_pool

    def memory(self, device: torch.device) -> int:
        return self.bytes_of_device

    def fence(self, device: torch.device) -> Fence:
        return Fence(self.fences)

    def mark(self, device: torch.device) -> object:
        self.marks += 1
        return object()

    def seconds(self, first: object, last: object) -> float | None:
        return self.device_seconds

    def record(
        self, run: Callable[[], T], device: torch.device, pool: object
    ) -> tuple[T, Callable[[], None], object]:
        def once() -> T:
            self._here.recording = True
            try:
                return run()
            finally:
                self._here.recording = False

        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.captures += 1
        results = once()
        ran = self.once

        def replay() -> None:
            nonlocal ran
            self.replays += 1
            if ran:
                ran = False
                return
            again = once()
            old, new = pytree.tree_leaves(results), pytree.tree_leaves(again)
            for before, after in zip(old, new, strict=True):
                if isinstance(before, Tensor):
                    _overwrite(before, after)

        owner = _Owner()
        self.owners.add(owner)
        return results, replay, owner


def _overwrite(before: Tensor, after: Any) -> None:
    with torch.no_grad():
        before.copy_(after)
