"""What was found on GPUs so far: files of outcomes, one JSON object a line.

A file is one or more runs, each a line of what ran where and when (unit "run") and then its
outcomes. What `bench.gpu` writes and what the repository keeps (gpu_results.jsonl) have the same
form; in the second the outcomes are the latest answer to each unit, sorted, so that the same
answers are the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from deeplab_fast.dispatch.sources import of_files
from deeplab_fast.tuning.machine import Machine
from deeplab_fast.tuning.runner import ANSWERS, PASSED, TIMED_OUT, Outcome, Unit, read

from .files import ROOT, write_text
from .gpu_measure import CUT_SHORT

STORE = Path(__file__).with_name("gpu_results.jsonl")
RUN = "run"
# Of dispatch/, what checks and measures.
_CHECKING = ("checks", "declare", "errors", "examples")
# Among the facts of an outcome: `harness`.
HARNESS = "harness"
# Of a run, or what only fills caches for units that follow.
_NOT_KEPT = (RUN, "identity", "facts", "compile")
_KEPT_OUTPUT = 400


@dataclass(frozen=True)
class Answer:
    """An outcome, and where and when it came about.

    Attributes:
        outcome: of a unit.
        machine: the GPU.
        date: of the run, UTC, as in ISO 8601.
        commit: of the checkout.
    """

    outcome: Outcome
    machine: Machine
    date: str
    commit: str

    @property
    def key(self) -> tuple[str, str]:
        """What is answered, for which the latest answer counts."""
        return self.outcome.unit, self.machine.gpu

    @property
    def answers(self) -> bool:
        """Whether it says something of its unit."""
        return answers(self.outcome)

    def holds(self, unit: Unit, machine: Machine) -> bool:
        """Whether a unit need not be run again on a machine."""
        mine, other = self.machine, machine
        return (
            self.answers
            # Of unknown sources nothing is known.
            and bool(unit.source)
            and self.outcome.source == unit.source
            and (mine.gpu, mine.capability, mine.torch, mine.triton)
            == (other.gpu, other.capability, other.torch, other.triton)
            # What did not pass may be the fault of what checks it.
            and (self.outcome.verdict == PASSED or self.outcome.facts.get(HARNESS) == harness())
            # Given more time it may end.
            and not (self.outcome.verdict == TIMED_OUT and self.outcome.seconds < unit.limit)
        )


@cache
def harness() -> str:
    """Fingerprint of what checks and measures, apart from what is checked."""
    files = [
        *sorted((ROOT / "deeplab_fast" / "tuning").glob("*.py")),
        # Examples, their exact results and PyTorch's forms stand with the ops.
        *sorted((ROOT / "deeplab_fast" / "ops").glob("*.py")),
        *(ROOT / "deeplab_fast" / "dispatch" / f"{name}.py" for name in _CHECKING),
        *sorted((ROOT / "bench").glob("gpu*.py")),
        *(ROOT / "bench" / f"{name}.py" for name in ("sanitize", "op_cases", "op_modules")),
        ROOT / "tests" / "gpu" / "conftest.py",
        ROOT / "tests" / "helpers" / "gpu_harness.py",
    ]
    return of_files(files)


def answers(outcome: Outcome) -> bool:
    """Whether an outcome says something of its unit, and not only how far it came."""
    return outcome.verdict in ANSWERS and not outcome.reason.startswith(CUT_SHORT)


def run_outcome(machine: Machine, date: str, commit: str, **more: object) -> Outcome:
    """The line that a run begins with."""
    result = {"machine": machine.as_dict(), "date": date, "commit": commit, **more}
    return Outcome(RUN, PASSED, phase=RUN, result=result)


def read_answers(path: Path) -> list[Answer]:
    """The outcomes of a file, in order.

    Raises:
        ValueError: an outcome before the first run.
        OSError: the file cannot be read.
    """
    found: list[Answer] = []
    run: dict[str, Any] | None = None
    for outcome in read(path):
        if outcome.unit == RUN:
            run = outcome.result
        elif outcome.phase in _NOT_KEPT:
            continue
        elif run is None:
            raise ValueError(f"{path.name}: {outcome.unit!r} comes before any line of a run")
        else:
            machine = Machine.from_dict(run["machine"])
            outcome = replace(outcome, result=_rounded(outcome.result))
            found.append(Answer(outcome, machine, run["date"], run["commit"]))
    return found


def _rounded(value: Any) -> Any:
    """A value of JSON with floats to the digits that mean something."""
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def merged(old: Iterable[Answer], new: Iterable[Answer]) -> list[Answer]:
    """The latest answer to each unit on each GPU.

    What says nothing of its unit replaces nothing but its like, and an answer for other sources.
    """
    found = {answer.key: answer for answer in old}
    for answer in new:
        before = found.get(answer.key)
        if before is not None:
            if answer.date < before.date:
                continue
            same_source = before.outcome.source == answer.outcome.source
            if before.answers and not answer.answers and same_source:
                continue
        found[answer.key] = answer
    return list(found.values())


def write(path: Path, kept: Sequence[Answer]) -> None:
    """Put answers in place of a file, under a temporary name first."""
    lines: list[str] = []
    run: Outcome | None = None

    def order(answer: Answer) -> tuple[Any, ...]:
        m = answer.machine
        return m.gpu, answer.date, answer.commit, m.driver, m.torch, m.triton, answer.outcome.unit

    for answer in sorted(kept, key=order):
        here = run_outcome(answer.machine, answer.date, answer.commit)
        if here != run:
            run = here
            lines.append(_line(here))
        lines.append(_line(replace(answer.outcome, output=answer.outcome.output[-_KEPT_OUTPUT:])))
    write_text(path, "".join(lines))


def _line(outcome: Outcome) -> str:
    return json.dumps(outcome.as_dict(), allow_nan=False, default=str) + "\n"
