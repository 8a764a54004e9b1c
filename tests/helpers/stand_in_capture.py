"""CUDA graphs without a GPU: a replay runs the captured function again, into the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


class StandInCapture:
    """`deeplab_fast.program.capture.Capture` for tensors on the CPU.

    Attributes:
        capturing: what `in_progress` answers outside its own captures: somebody else's capture.
        captures, replays: how many there were.
        pools: pools that were asked for.
        bytes_of_pool: what `pool_bytes` answers.
    """

    def __init__(self) -> None:
        self.capturing = False
        self.captures = self.replays = self.pools = 0
        self.bytes_of_pool = 0
        self._own = False

    def in_progress(self) -> bool:
        return self.capturing or self._own

    def pool(self, device: torch.device) -> object:
        self.pools += 1
        return object()

    def pool_bytes(self, pool: object, device: torch.device) -> int:
        return self.bytes_of_pool

    def record(
        self, run: Callable[[], T], device: torch.device, pool: object
    ) -> tuple[T, Callable[[], None], object]:
        def once() -> T:
            self._own = True
            try:
                return run()
            finally:
                self._own = False

        self.captures += 1
        results = once()

        def replay() -> None:
            self.replays += 1
            again = once()
            old, new = pytree.tree_leaves(results), pytree.tree_leaves(again)
            for before, after in zip(old, new, strict=True):
                if isinstance(before, Tensor):
                    _overwrite(before, after)

        return results, replay, object()


def _overwrite(before: Tensor, after: Any) -> None:
    with torch.no_grad():
        before.copy_(after)
