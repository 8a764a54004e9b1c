"""Timing of calls side by side: rounds in which each has its turn, and CUDA graphs of calls.

What the machine does meanwhile (a clock that falls, a neighbour) then meets all alike, and ratios
are taken within a round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# Shortest sample: on a CPU the clock and the scheduler, on a GPU the events show below it.
SAMPLE_SECONDS = {"cpu": 10e-3, "cuda": 1e-3}
# Warm-up, after the call whose result was compared, ends when this many calls in a row differ by
# less than this fraction, or after these seconds.
STABLE_CALLS = 3
STABLE_SPREAD = 0.1
WARM_UP_SECONDS = 2.0

Clock = Callable[[Callable[[int], Any], int, int], float]


def cpu_clock(call: Callable[[int], Any], first: int, calls: int) -> float:
    """Mean seconds of `calls` calls, the first with inputs number `first`."""
    start = time.perf_counter()
    for i in range(first, first + calls):
        call(i)
    return (time.perf_counter() - start) / calls


def cuda_clock(call: Callable[[int], Any], first: int, calls: int) -> float:
    """As `cpu_clock`, between two events on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(first, first + calls):
        call(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def clock(device: str) -> Clock:
    """The clock of a device."""
    return cuda_clock if device == "cuda" else cpu_clock


def warm_up(call: Callable[[int], Any], time_of: Clock, most: float = WARM_UP_SECONDS) -> float:
    """Call until times are stable or `most` seconds are over; returns the last in seconds."""
    times: list[float] = []
    while True:
        times.append(time_of(call, len(times), 1))
        last = times[-STABLE_CALLS:]
        stable = len(last) == STABLE_CALLS and max(last) <= (1 + STABLE_SPREAD) * min(last)
        if stable or sum(times) > most:
            return times[-1]


def interleaved(
    runs: Mapping[str, Callable[[int], Any]],
    time_of: Clock,
    seconds: float,
    rounds: tuple[int, int],
    sample_seconds: float,
) -> dict[str, list[float]]:
    """One sample of each run in each round, in an order that turns by one every round.

    Args:
        runs: by name; called with a running number.
        time_of: the clock.
        seconds: of all rounds together, as far as `rounds` allows.
        rounds: (fewest, most).
        sample_seconds: a sample is the mean of as many calls as take this long.

    Returns:
        name -> seconds of a call, one for each round.
    """
    if not runs:
        return {}
    once = {name: warm_up(call, time_of) for name, call in runs.items()}
    calls = {name: max(1, math.ceil(sample_seconds / t)) for name, t in once.items()}
    round_seconds = sum(calls[name] * t for name, t in once.items())
    count = min(max(rounds[0], int(seconds / round_seconds)), rounds[1])
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(count):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(time_of(runs[name], i * calls[name], calls[name]))
    return samples


def ratio(baseline: Sequence[float], samples: Sequence[float]) -> float:
    """How many times faster: the median over rounds of baseline / sample."""
    return statistics.median(b / s for b, s in zip(baseline, samples, strict=True))


def peak_bytes(call: Callable[[], object]) -> int:
    """Most memory of a call on the GPU beyond what was there before; it was called before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the calls, one behind the other.

    Raises:
        RuntimeError: one of them cannot be captured. PyTorch 2.11 is then left as if a capture went
            on, so that no other should be tried in this process.
    """
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except BaseException:
        torch.cuda.set_stream(before)
        raise
    return graph
