"""CUDA graphs of one model: whole calls, captured where launches take longer than the GPU's work.

A graph is of one input shape and dtype and of the settings that kernels were chosen by. All graphs
of a model have one pool of memory, as they never run at the same time: each replay waits on the
device for the one before, on whatever stream that was. Inputs are copied in, in the layout and
dtype that the network wants, and results copied out, in the layout that the caller wants; so
neither is an extra pass, and a later call does not overwrite what an earlier one returned.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import capture
from .layers import CHANNELS_LAST

logger = logging.getLogger("deeplab_fast")

# Graphs of a model, and shapes whose calls are counted.
_MOST_GRAPHS = 8
_MOST_SHAPES = 64
# Without a bound that the user sets, graphs take at most this part of the device's memory.
_PART_OF_MEMORY = 1 / 16
# Launches dominate where enqueueing a call takes this part of the time from its first kernel to its
# last: a GPU with work of its own to do would fall behind the host.
_DOMINATES = 0.7
# Calls in a row that must say so, of the first ones of a shape.
_AGREE, _MEASURED = 2, 16
# A shape that was thrown out for others so often is not captured again.
_MOST_CAPTURES = 3

Maps = dict[str, Tensor]
# (maps, whether they must be copied) -> results
Finish = Callable[[Maps, bool], Maps]


@dataclass
class Graph:
    """A captured call: what is written before a replay, what it writes, and what owns them."""

    x: Tensor
    maps: Maps
    replay: capture.Replay
    owner: object


@dataclass
class _Seen:
    """What is known of a shape.

    Attributes:
        calls: that were run kernel by kernel.
        dominated: of these in a row, measured, those that launches dominated.
        pending: (seconds that the host took, marks on the device) of the last one.
        captures: that there were.
        refused: it is not to be captured.
    """

    calls: int = 0
    dominated: int = 0
    pending: tuple[float, object, object] | None = None
    captures: int = 0
    refused: bool = False


@dataclass
class Graphs:
    """The graphs of a model on a device."""

    device: torch.device
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _graphs: OrderedDict[Hashable, Graph] = field(default_factory=OrderedDict)
    _seen: OrderedDict[Hashable, _Seen] = field(default_factory=OrderedDict)
    _pool: object = None
    _fence: capture.Fence | None = None
    _given_up: bool = False
    _bound: int | None = None

    def run(
        self,
        step: Callable[[Tensor], Maps],
        finish: Finish,
        key: Hashable,
        x: Tensor,
        dtype: torch.dtype,
        wanted: bool | None,
        max_bytes: int | None,
    ) -> Maps:
        """finish(step(x)), by a graph where that pays.

        Args:
            step: of x in channels_last.
            finish: copies, where it is told to.
            key: calls with equal keys run the same kernels on the same memory.
            x: of any layout.
            dtype: that step takes.
            wanted: True captures at the second call, False never, None where launches dominate.
            max_bytes: bound on the memory of all graphs, None for a part of the device's.
        """

        def eager() -> Maps:
            return finish(step(x.to(dtype=dtype, memory_format=CHANNELS_LAST)), False)

        if wanted is False or max_bytes != self._bound:
            self._start_anew(max_bytes)
        graphs = capture.current()
        if wanted is False or max_bytes == 0 or self._given_up or graphs.in_progress():
            return eager()
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None and self._is_due(key, wanted):
                graph = self._capture(step, key, x, dtype, max_bytes)
            if graph is not None:
                self._graphs.move_to_end(key)
                return self._replay(graph, finish, x)
            measured = None if wanted else self._open(key)
        if measured is None:
            return eager()
        start, first = time.perf_counter(), graphs.mark(self.device)
        results = eager()
        took = time.perf_counter() - start
        measured.pending = (took, first, graphs.mark(self.device))
        return results

    def drop(self) -> None:
        """Free all graphs."""
        with self._lock:
            self._drop()

    def _start_anew(self, max_bytes: int | None) -> None:
        with self._lock:
            if max_bytes != self._bound:
                self._bound = max_bytes
                self._seen.clear()
            self._drop()

    def give_up(self) -> bool:
        """Free all graphs, and make no more; False where there were none."""
        with self._lock:
            had, self._given_up = bool(self._graphs), True
            self._drop()
        if had and self.device.type == "cuda":
            torch.cuda.empty_cache()
        return had

    @property
    def held_bytes(self) -> int:
        """Bytes that the graphs hold."""
        with self._lock:
            return self._bytes() if self._graphs else 0

    def __reduce__(self) -> tuple[type[Graphs], tuple[torch.device]]:
        # A copy captures its own.
        return Graphs, (self.device,)

    def __len__(self) -> int:
        return len(self._graphs)

    def _open(self, key: Hashable) -> _Seen | None:
        """The shape of a call that may show that launches dominate, else None: the first call
        compiles and searches, and one that was measured is looked at first."""
        seen = self._seen[key]
        is_open = not seen.refused and 1 < seen.calls <= _MEASURED and seen.pending is None
        return seen if is_open else None

    def _is_due(self, key: Hashable, wanted: bool | None) -> bool:
        """Count a call; whether it is to be captured."""
        seen = self._seen.setdefault(key, _Seen())
        self._seen.move_to_end(key)
        if len(self._seen) > _MOST_SHAPES:
            self._seen.popitem(last=False)
        seen.calls += 1
        if seen.refused or seen.captures >= _MOST_CAPTURES:
            return False
        if wanted:
            return seen.calls > 1
        if seen.pending is not None:
            host, first, last = seen.pending
            device = capture.current().seconds(first, last)
            if device is None:
                # The GPU has not come to the last call yet: it is behind the host.
                seen.dominated = 0
                return False
            seen.pending = None
            seen.dominated = seen.dominated + 1 if host >= _DOMINATES * device else 0
        return seen.dominated >= _AGREE

    def _capture(
        self,
        step: Callable[[Tensor], Maps],
        key: Hashable,
        x: Tensor,
        dtype: torch.dtype,
        max_bytes: int | None,
    ) -> Graph | None:
        seen, graphs = self._seen[key], capture.current()
        seen.captures += 1
        try:
            # Written again by calls in either mode.
            with torch.inference_mode(False), torch.no_grad():
                own = torch.empty(
                    x.shape, dtype=dtype, device=x.device, memory_format=CHANNELS_LAST
                )
                if self._pool is None:
                    self._pool, self._fence = graphs.pool(self.device), graphs.fence(self.device)
                own.copy_(x)
                # Of this thread: handles and plans of cuDNN and cuBLAS are a thread's own.
                with graphs.warm_up(self.device):
                    step(own)
                graph = Graph(own, *graphs.record(lambda: step(own), self.device, self._pool))
        except torch.OutOfMemoryError:
            seen.refused = True
            self._drop()
            logger.info("no CUDA graph of inputs %s: there is no memory for it", list(x.shape))
            return None
        except RuntimeError as error:
            # A second one would not fare better, and PyTorch may not be over this one.
            self._given_up = True
            self._drop()
            logger.warning(
                "a CUDA graph of inputs %s could not be captured, and none is made any more (set "
                "cuda_graphs = False): %s",
                list(x.shape),
                " ".join(str(error).split())[:300],
            )
            return None
        alone = not self._graphs
        self._graphs[key] = graph
        limit = graphs.memory(self.device) * _PART_OF_MEMORY if max_bytes is None else max_bytes
        if self._bytes() > limit:
            # Memory of one graph goes back only with that of all.
            self._drop()
            if alone:
                seen.refused = True
                logger.info(
                    "no CUDA graph of inputs %s: its memory exceeds %d MB",
                    list(x.shape),
                    limit // 10**6,
                )
            return None
        if len(self._graphs) > _MOST_GRAPHS:
            self._wait()
            self._graphs.popitem(last=False)
        return graph

    def _replay(self, graph: Graph, finish: Finish, x: Tensor) -> Maps:
        assert self._fence is not None
        self._fence.wait()
        if graph.x.is_cuda:
            # It may be freed with the model while this stream still reads it.
            graph.x.record_stream(torch.cuda.current_stream(self.device))
        graph.x.copy_(x)
        graph.replay()
        results = finish(graph.maps, True)
        self._fence.record()
        return results

    def _drop(self) -> None:
        self._wait()
        self._graphs.clear()
        self._pool = self._fence = None

    def _wait(self) -> None:
        if self._fence is not None and self._graphs:
            self._fence.synchronize()

    def _bytes(self) -> int:
        inputs = sum(graph.x.nbytes for graph in self._graphs.values())
        return inputs + capture.current().pool_bytes(self._pool, self.device)
