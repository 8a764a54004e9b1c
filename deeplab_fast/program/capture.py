"""CUDA graphs as PyTorch has them, behind what a stand-in without a GPU can do too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch

T = TypeVar("T")
Replay = Callable[[], None]


class Fence(Protocol):
    """A point in the work of a device that work on any stream can wait for."""

    def record(self) -> None:
        """Put it behind what the current stream has to do so far."""

    def wait(self) -> None:
        """Let the current stream wait for it."""

    def synchronize(self) -> None:
        """Let the host wait for it."""


class Capture(Protocol):
    """What graphs of a device are made with."""

    def reason(self, device: torch.device) -> str:
        """Why a device has no graphs; "" where it has."""

    def warm_up(self, device: torch.device) -> AbstractContextManager[None]:
        """In which to run what is captured later, and its backward pass, as PyTorch asks."""

    def in_progress(self) -> bool:
        """Whether the current stream is being captured, by whomever."""

    def pool(self, device: torch.device) -> object:
        """A pool of memory that graphs which never run at the same time share."""

    def pool_bytes(self, pool: object, device: torch.device) -> int:
        """Bytes that a pool takes from the device."""

    def memory(self, device: torch.device) -> int:
        """Bytes that the device has."""

    def fence(self, device: torch.device) -> Fence:
        """A fence that nothing is in front of."""

    def mark(self, device: torch.device) -> object:
        """A moment in the work of the current stream."""

    def seconds(self, first: object, last: object) -> float | None:
        """From mark to mark on the device, None where it has not come there yet."""

    def record(
        self, run: Callable[[], T], device: torch.device, pool: object
    ) -> tuple[T, Replay, object]:
        """Capture a function that was run before.

        Its results are the tensors into which every replay writes anew. What it read must stay
        where it is while there are replays. It begins with waiting for the device; a thread that
        waits for the whole device meanwhile (torch.cuda.synchronize) ends it with an error.

        Returns:
            The results, a function that replays on the current stream, and what owns the memory.
        """


class _CudaFence:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def synchronize(self) -> None:
        self._event.synchronize()


class CudaCapture:
    """`Capture` by torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        # One a device: each keeps the memory that it has allocated.
        self._side: dict[torch.device, torch.cuda.Stream] = {}

    def reason(self, device: torch.device) -> str:
        return "" if device.type == "cuda" else f"{device.type} has no CUDA graphs"

    @contextmanager
    def warm_up(self, device: torch.device) -> Iterator[None]:
        # What autograd keeps of a parameter belongs to the stream that first used it, and a capture
        # cannot wait for the default stream.
        side = self._side.get(device)
        if side is None:
            side = self._side[device] = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            yield
        torch.cuda.current_stream(device).wait_stream(side)

    def in_progress(self) -> bool:
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def pool(self, device: torch.device) -> object:
        return torch.cuda.graph_pool_handle()

    def pool_bytes(self, pool: object, device: torch.device) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == pool)

    def memory(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).total_memory

    def fence(self, device: torch.device) -> Fence:
        return _CudaFence(device)

    def mark(self, device: torch.device) -> object:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def seconds(self, first: object, last: object) -> float | None:
        start, end = cast(torch.cuda.Event, first), cast(torch.cuda.Event, last)
        return start.elapsed_time(end) / 1e3 if end.query() else None

    def record(
        self, run: Callable[[], T], device: torch.device, pool: object
    ) -> tuple[T, Replay, object]:
        graph = torch.cuda.CUDAGraph()
        # PyTorch's default is one for all devices, and stays the current one where a capture fails.
        stream = torch.cuda.Stream(device)
        with (
            _one_at_a_time,
            torch.cuda.device(device),
            torch.cuda.stream(stream),
            _own_workspaces(),
            # Other threads may allocate meanwhile.
            torch.cuda.graph(
                graph, pool=cast(Any, pool), stream=stream, capture_error_mode="thread_local"
            ),
        ):
            results = run()
        return results, graph.replay, graph


# A capture begins with waiting for the device, which ends a capture of another thread.
_one_at_a_time = threading.Lock()


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Graphs that may run at the same time must not have cuBLAS's workspace of a stream in common.

    As torch._inductor.cudagraph_trees does.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


C = TypeVar("C", bound=Capture)
_current: Capture = CudaCapture()


def current() -> Capture:
    """What graphs are made with here."""
    return _current


@contextmanager
def using(capture: C) -> Iterator[C]:
    """Make graphs with something else, until the block ends."""
    global _current
    before = _current
    _current = capture
    try:
        yield capture
    finally:
        _current = before
