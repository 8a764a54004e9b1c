"""Fuzz tests: how many examples they try, and what a reader may answer a hostile input with.

DEEPLAB_FAST_FUZZ=N tries N examples each in place of the few of CI, the same ones every time; the
counts are printed at the end of the run. Memory is bounded from outside (`ulimit -v`).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, settings

T = TypeVar("T")

# Longer texts nobody reads: what came is shortened in a message.
LONGEST_MESSAGE = 4000

# (name of the reader, "accepted" or the error's type) -> inputs.
COUNTS: Counter[tuple[str, str]] = Counter()


def examples(few: int) -> settings:
    """Decorator of a `given` test: `few` examples in CI, derandomized and without a time for each.

    >>> @examples(50)
    ... @given(st.binary())
    ... def test_reader(data): ...
    """
    return settings(
        max_examples=int(os.environ.get("DEEPLAB_FAST_FUZZ", few)),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def rows(few: int) -> int:
    """How many inputs a loop of its own tries, as `examples`."""
    return int(os.environ.get("DEEPLAB_FAST_FUZZ", few))


def answer(
    name: str,
    read: Callable[[], T],
    *errors: type[BaseException],
    seconds: float = 10.0,
    memory: int = 1 << 30,
) -> T | BaseException:
    """What a reader gives for an input, or the clear error that it raises; else AssertionError.

    Args:
        name: of the reader, in the counts.
        read: reads the input.
        errors: the clear types, exactly or by inheritance, that it may raise. Their message is not
            empty, not longer than `LONGEST_MESSAGE`, and without control characters but newlines.
        seconds: the longest that it may take. What hangs is ended by pytest's own bound.
        memory: bytes by which the process's resident memory may grow at its peak.
    """
    began, before = time.perf_counter(), _resident_now()
    found: T | BaseException
    try:
        found = read()
        outcome = "accepted"
    except errors as error:
        # The frames hold what was read.
        found, outcome = error.with_traceback(None), type(error).__name__
        _check_message(error)
    except Exception as error:
        COUNTS[name, "traceback"] += 1
        what = f"{name}: no clear error but {type(error).__name__}: {error}"[:2000]
        raise AssertionError(what) from error
    taken, grown = time.perf_counter() - began, _resident_peak() - before
    if taken > seconds:
        COUNTS[name, "hang"] += 1
    if grown > memory:
        COUNTS[name, "memory"] += 1
    assert taken <= seconds, f"{name}: {taken:.1f} s, at most {seconds} s are allowed"
    assert grown <= memory, f"{name}: {grown >> 20} MiB more, at most {memory >> 20} are allowed"
    COUNTS[name, outcome] += 1
    return found


def refused(name: str, read: Callable[[], object], *errors: type[BaseException]) -> str:
    """The message of the clear error that a reader must raise."""
    found = answer(name, read, *errors)
    assert isinstance(found, BaseException), f"{name}: accepted"
    return str(found)


def summary() -> list[str]:
    """The counts as lines."""
    names = sorted({name for name, _ in COUNTS})
    lines = []
    for name in names:
        kinds = {kind: n for (of, kind), n in sorted(COUNTS.items()) if of == name}
        told = ", ".join(f"{kind} {n}" for kind, n in kinds.items())
        lines.append(f"{name}: {sum(kinds.values())} inputs: {told}")
    return lines


def _check_message(error: BaseException) -> None:
    text = str(error)
    assert text, f"{type(error).__name__} without a message"
    assert len(text) <= LONGEST_MESSAGE, f"a message of {len(text)} characters: {text[:200]}"
    control = sorted({c for c in text if not c.isprintable() and c not in "\n\t"})
    assert not control, f"a message with {control}: {text[:500]!r}"


def _resident_now() -> int:
    """Resident bytes; the peak counts from here on."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    return _status("VmRSS")


def _resident_peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith(key)), 0)
