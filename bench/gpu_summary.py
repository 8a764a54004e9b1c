"""What a loan prints: last of all its headline ratios, doubts, counts and failures; its units."""

from __future__ import annotations

from collections.abc import Iterator

from deeplab_fast.tuning.runner import NOT_RUN, PASSED, Outcome

from . import doubts
from .gpu_loan import DTYPES, Loan

# Of the output a machine may keep the end alone.
_MOST_FAILURES = 24
_MOST_HEADLINES = 60


def table(loan: Loan) -> str:
    """Headline ratios and failures, last what a reader must know; at most some 100 lines."""
    lines = ["", f"{loan.machine.gpu}: {loan.machine.torch}, Triton {loan.machine.triton}", ""]
    lines += list(_headlines(loan))[:_MOST_HEADLINES]
    lines += ["", "doubts:"]
    lines += [
        f"  {s.doubt.name}: {s.answer} ({s.detail})" for s in doubts.settled(loan.outcomes.values())
    ]
    lines += ["", *_counts(loan), "", *_failures(loan)]
    return "\n".join(lines)


def _headlines(loan: Loan) -> Iterator[str]:
    for o in loan.of("ours", "pytorch"):
        if o.phase == "pytorch" and not o.unit.startswith(("pytorch ceil", "pytorch auto")):
            continue
        if o.unit.startswith("ours inference"):
            yield from _fastest(o)
            continue
        for row in o.result.get("rows", ()):
            if "ms" in row:
                facts = ("tflops", "gb_per_s", "peak_mb", "device_ms", "wall_over_device")
                more = "".join(f", {f} {row[f]:.4g}" for f in facts if f in row)
                yield f"{row['what']}: {row['ms']:.4g} ms{more}"
    for o in loan.of("time"):
        if o.facts.get("dtype") != DTYPES[0]:
            continue
        for speed in o.result.get("speeds", ()):
            size = "x".join(map(str, speed["sizes"][:4]))
            plain = speed["contestants"][speed["pytorch"]]["ms"]
            gains = ", ".join(f"{b} {g:.2f}x" for b, g in speed["gains"].items())
            yield f"{o.facts['op']} {o.facts['form']} {size}: PyTorch {plain:.3g} ms, {gains}"


def _fastest(o: Outcome) -> Iterator[str]:
    """Of each group of a unit PyTorch's fastest way, ours as built, and our fastest."""
    groups: dict[str, dict[str, float]] = {}
    for row in o.result.get("rows", ()):
        if "ms" in row:
            group, _, name = row["what"].partition(": ")
            groups.setdefault(group, {})[name] = row["ms"]
    for group, ms in groups.items():
        theirs = [name for name in ms if name.startswith("PyTorch")]
        mine = [name for name in ms if name not in theirs]
        chosen = [min(names, key=lambda n: ms[n]) for names in (theirs, mine) if names]
        named = dict.fromkeys([chosen[0], *mine[:1], chosen[-1]])
        yield f"{group}: " + ", ".join(f"{name} {ms[name]:.4g} ms" for name in named)


def _counts(loan: Loan) -> Iterator[str]:
    phases = dict.fromkeys(o.phase for o in loan.outcomes.values())
    for phase in phases:
        own = [o for o in loan.of(phase)]
        verdicts = dict.fromkeys(o.verdict for o in own)
        counted = ", ".join(f"{sum(o.verdict == v for o in own)} {v}" for v in verdicts)
        seconds = sum(o.seconds for o in own if o in loan.fresh)
        yield f"{phase}: {counted}; {seconds:.0f} s of processes"


def _failures(loan: Loan) -> Iterator[str]:
    # What only fills caches is counted above.
    every = [o for o in loan.outcomes.values() if o.phase != "compile"]
    bad = [o for o in every if o.verdict not in (PASSED, NOT_RUN)]
    if len(bad) > _MOST_FAILURES:
        yield f"the last {_MOST_FAILURES} of {len(bad)}:"
    for o in bad[-_MOST_FAILURES:]:
        yield f"{o.unit}: {o.verdict}: {o.reason[:160]}"
    missed = [o for o in every if o.verdict == NOT_RUN]
    yield f"{len(bad)} did not pass, {len(missed)} were not run"


def listed(loan: Loan) -> str:
    """Units by phase, with a mark where there is an answer."""
    lines, before = [], ""
    for phase, unit, waiting in loan.listed:
        if phase != before:
            lines.append(f"{phase}")
            before = phase
        lines.append(f"  {' ' if waiting else 'x'} {unit.name}")
    count = sum(waits for _, _, waits in loan.listed)
    lines.append(f"{count} of {len(loan.listed)} units wait for an answer")
    return "\n".join(lines)
