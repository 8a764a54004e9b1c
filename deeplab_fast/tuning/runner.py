"""Units of work in processes of their own, within a budget: what one loses, no other does.

A kernel that hangs is not interrupted, and one that writes where it must not breaks the CUDA
context of its process for good. So each unit is a child with a hard time limit: a function in a
fork of this process, which has imported what the units need and has made no CUDA context (a fork
cannot use its parent's). A child leads a session of its own and is killed with whatever it started
there. One that the kernel does not let go (a driver that waits) is left behind, not waited for.

Outcomes are appended to a file as they come, one JSON object a line, so that whatever ends this
process leaves what was found.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import math
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._documents import parse_json
from ..dispatch.errors import Wrong, one_line

PASSED = "passed"
FAILED = "failed"
CRASHED = "crashed"
TIMED_OUT = "timed out"
ERROR = "error"
NOT_RUN = "not run"
# What says something of the unit; what was not run, or could not be found out, says nothing.
ANSWERS = (PASSED, FAILED, CRASHED, TIMED_OUT)

# How often children are looked at, and how long one that was killed is waited for.
_POLL_SECONDS = 0.02
_REAP_SECONDS = 2.0
# So long before a child is killed it prints where it is; on a busy machine that takes a while.
_BEFORE_END = 0.5
# What a child says that it goes on; no byte of JSON.
_PROGRESS = b"\0"
# Of 64 KiB, each time that a child is looked at.
_MOST_READS = 64
# Of what a child printed an outcome keeps so much of the beginning, where a crash says what it was,
# and of the end, where an error does.
_KEPT = 3000
_LEFT_OUT = b"\n[...]\n"
_EXIT_FAILED = 1
# Why a unit was not begun.
NO_TIME = "no time was left"


@dataclass(frozen=True)
class Unit:
    """One thing to find out.

    Attributes:
        name: of its own among all units, and the same from run to run.
        limit: seconds after which it is killed, since it began or called `progress` last.
        run: called in a fork; returns a dict of what JSON can hold, raises `Wrong` where the answer
            is no.
        least: seconds that must be left for it to begin.
        alone: nothing runs beside it, because it measures time.
        phase: what it belongs to, for whoever reads its outcome.
        source: fingerprint of what it depends on; an answer holds for as long as it stays.
        facts: what its outcome repeats, for whoever reads it.
    """

    name: str
    limit: float
    run: Callable[[], dict[str, Any]] = field(compare=False)
    least: float = 2.0
    alone: bool = False
    phase: str = ""
    source: str = ""
    facts: dict[str, Any] = field(default_factory=dict, compare=False)


class Budget:
    """Seconds that a run has, and the parts of them that its phases take.

    Attributes:
        seconds: in all.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = self._part_ends = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds that are left of all."""
        return max(0.0, self._started + self.seconds - time.monotonic())

    def part(self, seconds: float) -> float:
        """Seconds for the next phase: its part, and what those before it left of theirs."""
        self._part_ends += seconds
        return min(self.left, max(0.0, self._part_ends - time.monotonic()))


@dataclass(frozen=True)
class Outcome:
    """What became of a unit.

    Attributes:
        unit: its name.
        verdict: PASSED, FAILED, CRASHED, TIMED_OUT, ERROR (an exception other than `Wrong`) or
            NOT_RUN.
        reason: why it did not pass; "" where it did.
        seconds: it took.
        phase, source, facts: the unit's.
        result: what it returned.
        output: the beginning and the end of what it printed, where it did not pass.
    """

    unit: str
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    phase: str = ""
    source: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    output: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON has it, without what is empty."""
        fields = {
            "unit": self.unit, "verdict": self.verdict, "reason": self.reason,
            "seconds": round(self.seconds, 3), "phase": self.phase, "source": self.source,
            "facts": self.facts, "result": self.result, "output": self.output,
        }  # fmt: skip
        return {k: _finite(v) for k, v in fields.items() if v or k in ("unit", "verdict")}


def _finite(value: object) -> object:
    """A value as JSON can hold it: nan and inf, which it cannot, as text."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def run(
    units: Sequence[Unit],
    *,
    seconds: float,
    jobs: int = 1,
    out: Path | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run units in the order given.

    Args:
        units: their names differ.
        seconds: for all of them; nothing runs longer by more than a few seconds.
        jobs: children side by side, but for units that are to run alone.
        out: file that outcomes are appended to, a line each.
        on_outcome: called with each as it comes.

    Returns:
        The outcomes of all units, in the order in which they came.

    Raises:
        ValueError: two units of one name.
        KeyboardInterrupt: after all children are gone.
    """
    names = [unit.name for unit in units]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"units of the same name: {', '.join(twice)}")
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for outcome in _outcomes(units, jobs, end):
        outcomes.append(outcome)
        if out is not None:
            append(out, outcome)
        on_outcome(outcome)
    return outcomes


def append(path: Path, outcome: Outcome) -> None:
    """Add an outcome to a file as one line, whole or not at all, on the disk."""
    line = json.dumps(outcome.as_dict(), allow_nan=False, default=str) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Outcome]:
    """The outcomes in a file, in order; a line that was cut off is left out."""
    found = []
    for line in path.read_text("utf-8", "replace").splitlines():
        with suppress(ValueError, TypeError):
            found.append(Outcome(**parse_json(line)))
    return found


# Of a child, where its answer goes, and its limit.
_answer: int | None = None
_limit = 0.0


def progress() -> None:
    """Say, in a child, that it does not hang: its limit begins anew."""
    if _answer is not None:
        os.write(_answer, _PROGRESS)
        _say_where_before(time.monotonic() + _limit)


def _say_where_before(deadline: float) -> None:
    left = deadline - time.monotonic() - _BEFORE_END
    faulthandler.dump_traceback_later(max(_POLL_SECONDS, left), file=2)


class _Child:
    """A unit that runs.

    Args:
        unit: the unit.
        end: when it must be gone, by time.monotonic().
    """

    def __init__(self, unit: Unit, end: float) -> None:
        self.unit = unit
        self.started = time.monotonic()
        self.end_of_all = end
        self.deadline = min(self.started + unit.limit, end)
        self.killed = False
        self.answer = b""
        self.printed_first = self.printed_last = b""
        answer_in, answer_out = os.pipe()
        printed_in, printed_out = os.pipe()
        # What was not written yet would be written by the child as well.
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(answer_in)
            os.close(printed_in)
            _in_child(unit, self.started + unit.limit, answer_out, printed_out)
        os.close(answer_out)
        os.close(printed_out)
        self.pipes = {answer_in: "answer", printed_in: "printed"}
        for descriptor in self.pipes:
            os.set_blocking(descriptor, False)

    def poll(self) -> Outcome | None:
        """The outcome, once there is one."""
        self._read()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self._kill()
            self._read()
            self._close()
            return self._ended(os.waitstatus_to_exitcode(status))
        now = time.monotonic()
        if now < self.deadline:
            return None
        self._kill()
        if now < self.deadline + _REAP_SECONDS:
            return None
        self._close()
        return self._cut("; the system still holds the process")

    def end(self) -> None:
        """Kill the child and wait for it as long as for any."""
        self.deadline = self.end_of_all = time.monotonic()
        while self.poll() is None:
            time.sleep(_POLL_SECONDS)

    def _kill(self) -> None:
        self.killed = self.killed or time.monotonic() >= self.deadline
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _read(self) -> None:
        for descriptor in list(self.pipes):
            # A child that prints without end must not keep its parent from its deadline.
            with suppress(BlockingIOError):
                for _ in range(_MOST_READS):
                    data = os.read(descriptor, 1 << 16)
                    if not data:
                        break
                    if self.pipes[descriptor] == "answer":
                        self.answer += data.replace(_PROGRESS, b"")
                        if _PROGRESS in data and not self.killed:
                            anew = time.monotonic() + self.unit.limit
                            self.deadline = min(anew, self.end_of_all)
                    else:
                        room = _KEPT - len(self.printed_first)
                        self.printed_first += data[:room]
                        self.printed_last += data[room:]
                        if len(self.printed_last) > _KEPT:
                            self.printed_last = _LEFT_OUT + self.printed_last[-_KEPT:]

    def _close(self) -> None:
        for descriptor in self.pipes:
            os.close(descriptor)
        self.pipes = {}

    def _ended(self, code: int) -> Outcome:
        answer: dict[str, Any] = {}
        with suppress(ValueError):
            answer = json.loads(self.answer)
        result = answer.get("result", {})
        if code == 0 and answer:
            return self._outcome(PASSED, "", result)
        if code == _EXIT_FAILED and answer:
            return self._outcome(answer["verdict"], answer["reason"], result)
        if self.killed:
            return self._cut()
        if code < 0:
            name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
            return self._outcome(CRASHED, f"ended by signal {name}")
        return self._outcome(CRASHED, f"ended with exit status {code}")

    def _cut(self, more: str = "") -> Outcome:
        # Only its own limit is an answer about a unit; the end of the budget is none.
        seconds = self.deadline - self.started
        if self.deadline >= self.end_of_all:
            return self._outcome(NOT_RUN, f"cut off after {seconds:.0f} s, no time was left{more}")
        return self._outcome(TIMED_OUT, f"killed after {seconds:.0f} s{more}")

    def _outcome(self, verdict: str, reason: str, result: dict[str, Any] | None = None) -> Outcome:
        unit = self.unit
        printed = (self.printed_first + self.printed_last).decode("utf-8", "replace")
        return Outcome(
            unit.name, verdict, reason, time.monotonic() - self.started, unit.phase, unit.source,
            unit.facts, result or {}, "" if verdict == PASSED else printed,
        )  # fmt: skip


def _in_child(unit: Unit, deadline: float, answer: int, printed: int) -> None:
    """What a fork does; never returns. The deadline is by time.monotonic()."""
    global _answer, _limit
    code = _EXIT_FAILED
    try:
        os.setsid()
        die_with_parent()
        # The standard handlers: this process's ask for a clean end, which children have no part in.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        _answer, _limit = answer, unit.limit
        # Where it was when it crashed, or shortly before it is killed. Enabled already it would
        # keep its handlers, which others replace unnoticed (Lightning's end of a training).
        faulthandler.disable()
        faulthandler.enable(2)
        _say_where_before(deadline)
        content: dict[str, Any]
        try:
            content, code = {"result": _finite(unit.run())}, 0
        except Wrong as wrong:
            content = {"verdict": FAILED, "reason": str(wrong), "result": wrong.facts}
        except Exception as error:
            traceback.print_exc()
            content = {"verdict": ERROR, "reason": one_line(error, 500)}
        sys.stdout.flush()
        with open(answer, "w", encoding="utf-8") as file:
            json.dump(content, file, default=str)
    except BaseException:
        traceback.print_exc()
        code = _EXIT_FAILED + 1
    finally:
        # No handlers of this process's exit: they are its own. Not a CUDA context's either, whose
        # end may wait for a kernel for ever.
        sys.stderr.flush()
        os._exit(code)


def die_with_parent() -> None:
    """Have the system kill this process when the one that forked it is gone (Linux): a kernel that
    hangs would keep the GPU for ever."""
    set_death_signal = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _outcomes(units: Sequence[Unit], jobs: int, end: float) -> Iterator[Outcome]:
    waiting = list(units)
    running: list[_Child] = []
    try:
        while waiting or running:
            while waiting and _may_begin(waiting[0], running, jobs):
                unit = waiting.pop(0)
                left = end - time.monotonic()
                if left < unit.least:
                    yield _not_run(unit, NO_TIME)
                else:
                    running.append(_Child(unit, end))
            for child in list(running):
                outcome = child.poll()
                if outcome is not None:
                    running.remove(child)
                    yield outcome
            if running:
                pipes = [descriptor for child in running for descriptor in child.pipes]
                # A pipe that its writers closed is always ready; the time between looks bounds it.
                select.select(pipes, [], [], _POLL_SECONDS)
                time.sleep(_POLL_SECONDS / 4)
    finally:
        for child in running:
            child.end()


def _may_begin(unit: Unit, running: Sequence[_Child], jobs: int) -> bool:
    if not running:
        return True
    if unit.alone or any(child.unit.alone for child in running):
        return False
    return len(running) < jobs


def _not_run(unit: Unit, reason: str) -> Outcome:
    return Outcome(unit.name, NOT_RUN, reason, 0.0, unit.phase, unit.source, unit.facts)
