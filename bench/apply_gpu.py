"""`python -m bench.apply_gpu RESULTS.jsonl ...`: what follows from results of a borrowed GPU.

    RESULTS.jsonl     as `bench.gpu` wrote them, in the order of the runs
    --commit SHA      of the checkout that ran, where it did not know
    --rehearsal DIR   into DIR in place of the repository; results of a stand-in go nowhere else

Rewrites, from all answers so far:

    bench/gpu_results.jsonl               the latest answer to each unit on each GPU
    deeplab_fast/dispatch/shipped.json    records of kernels, by which they are chosen
    README.md, bench/GPU.md               what stands between their markers

Applying the same results again changes nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deeplab_fast.dispatch import records
from deeplab_fast.dispatch.records import Record
from deeplab_fast.tuning import tune
from deeplab_fast.tuning.machine import Machine
from deeplab_fast.tuning.runner import PASSED, Outcome

from . import doubts, gpu_rows, gpu_store, report
from .files import ROOT, write_text
from .gpu_measure import Row
from .gpu_store import Answer

BEGIN = "<!-- gpu:begin -->"
END = "<!-- gpu:end -->"
UNKNOWN = "unknown"
_STAND_IN = "cpu"
_MOST_NAMED = 8
_EMPTY = "Nothing has been measured on a GPU yet."

# (what it is, names of its units), in the order of a loan.
GROUPS = (
    ("every op, backend, dtype and form at small sizes", r"check "),
    (
        "every tile row of the CUDA ASPP, whole and cut; 1000 identical runs; resident programs; "
        "variants",
        r"row |repeat |residency$|variant \w+$",
    ),
    ("programs of whole models against float64; graphs, streams, threads, memory", r"program "),
    ("what PyTorch reaches without compilation", r"pytorch (?!autotuned)"),
    ("our kernels beside PyTorch's in bf16", r"time \w+ bfloat16"),
    ("whole models and training steps", r"ours "),
    ("every form of the convolutions of two models", r"forms "),
    ("the GPU tests by file", r"tests "),
    ("compute-sanitizer", r"(memcheck|racecheck|synccheck) "),
    ("launch configurations", r"configure "),
    ("torch.compile with max-autotune", r"pytorch autotuned"),
    ("times of variants and of tile rows", r"variant \w+ time$|time row "),
    ("every op at all its sizes", r"full "),
    ("our kernels in fp16, fp32 and TF32", r"time \w+ (float16|float32|tf32)"),
    ("what limits tile rows, by ncu", r"profile "),
)
# Ops of the README's table, with their name there; forms that models call.
_SHOWN = {
    ("aspp_branches", "plain"): "ASPP branches",
    ("aspp_project", "plain"): "ASPP projection",
    ("aspp_convs", "plain"): "ASPP in training, forward",
    ("aspp_convs_backward", "plain"): "ASPP in training, backward",
    ("bn_act", "relu+residual"): "batch norm, residual, ReLU",
    ("fold_filters", "half"): "batch norms folded into all filters",
    ("upsample_argmax", "plain"): "upsampling, labels",
    ("upsample_cross_entropy", "plain"): "upsampling, loss and gradient",
    ("upsample_confusion", "plain"): "upsampling, confusion matrix",
    ("upsample_softmax_add", "plain"): "upsampling, sum of probabilities",
}


class ApplyError(ValueError):
    """The results cannot be applied; the message says why."""


@dataclass(frozen=True)
class Files:
    """What is rewritten."""

    store: Path
    shipped: Path
    readme: Path
    page: Path

    @classmethod
    def of_repository(cls) -> Files:
        """Those of the repository."""
        return cls(gpu_store.STORE, records.SHIPPED, ROOT / "README.md", ROOT / "bench" / "GPU.md")

    @classmethod
    def in_folder(cls, folder: Path) -> Files:
        """Copies in a folder, made where they are missing."""
        here = cls.of_repository()
        folder.mkdir(parents=True, exist_ok=True)
        made = cls(*(folder / path.name for path in here.all))
        for original, copy in zip(here.all, made.all, strict=True):
            if not copy.exists() and original.is_file():
                copy.write_bytes(original.read_bytes())
        return made

    @property
    def all(self) -> tuple[Path, ...]:
        """All of them."""
        return self.store, self.shipped, self.readme, self.page


def apply(results: Sequence[Path], files: Files, commit: str = "") -> list[Answer]:
    """Rewrite all files; returns the answers so far.

    Args:
        results: files of `bench.gpu`.
        files: what is rewritten.
        commit: of results that do not know theirs.

    Raises:
        ApplyError: results without a run, or a file without markers.
        OSError: a file cannot be read or written.
    """
    kept = gpu_store.read_answers(files.store) if files.store.is_file() else []
    for path in results:
        found = gpu_store.read_answers(path)
        if not found:
            raise ApplyError(f"{path} has no outcome of any unit")
        if commit:
            found = [replace(a, commit=commit) if a.commit == UNKNOWN else a for a in found]
        kept = gpu_store.merged(kept, found)
    # All or nothing: texts are made before the first file is written.
    readme, page = files.readme.read_text("utf-8"), files.page.read_text("utf-8")
    try:
        new_readme = report.between_markers(readme, readme_table(kept), BEGIN, END)
        new_page = report.between_markers(page, page_part(kept), BEGIN, END)
    except report.ReportError as error:
        raise ApplyError(str(error)) from error
    shipped = records.merged(records.read(files.shipped), records_of(kept))
    gpu_store.write(files.store, kept)
    if shipped:
        records.write(files.shipped, shipped, _note(shipped))
    for path, old, new in ((files.readme, readme, new_readme), (files.page, page, new_page)):
        if new != old:
            write_text(path, new)
    return kept


# Records.


def records_of(kept: Iterable[Answer]) -> list[Record]:
    """The records that follow from answers.

    A check has the times that were measured of the same sources with the same versions. The CUDA
    ASPP passes where all rows of its table do, for any of them may be chosen.
    """
    answered = [a for a in kept if a.answers]
    found: list[Record] = []
    # That at all sizes is the later word.
    checked = sorted(
        (a for a in answered if a.outcome.phase == "check"),
        key=lambda a: a.outcome.unit.startswith("full "),
    )
    by_key: dict[tuple[Any, ...], Answer] = {}
    for a in checked:
        by_key[(a.machine.gpu, *_kernel(a.outcome))] = a
    for a in by_key.values():
        others = [
            b.outcome
            for b in answered
            if b.outcome.phase in ("time", "configure")
            and _versions(b) == _versions(a)
            and _about(b.outcome, a.outcome)
            and _same_sources(b, by_key)
        ]
        (record,) = tune.records_of([a.outcome, *others], a.machine, a.commit)
        record = replace(record, date=a.date[:10], origin=records.SHIPPED_ORIGIN)
        record = _with_rows(record, a, answered)
        if _rows_known(record, a, answered):
            found.append(record)
    return found


def _kernel(o: Outcome) -> tuple[str, ...]:
    return tuple(o.facts[k] for k in ("op", "backend", "dtype", "form"))


def _versions(a: Answer) -> tuple[Any, ...]:
    m = a.machine
    return m.gpu, m.capability, m.torch, m.triton


def _about(other: Outcome, check: Outcome) -> bool:
    op, backend, dtype, form = _kernel(check)
    facts = other.facts
    backends = facts.get("backends", [facts.get("backend")])
    return (facts["op"], facts["dtype"], facts["form"]) == (op, dtype, form) and backend in backends


def _same_sources(a: Answer, checks: dict[tuple[Any, ...], Answer]) -> bool:
    """Whether the kernels of a time or configuration are those that were checked last."""
    facts = a.outcome.facts
    now = []
    for backend in facts.get("backends", [facts.get("backend")]):
        check = checks.get((a.machine.gpu, facts["op"], backend, facts["dtype"], facts["form"]))
        if check is None:
            return False
        now.append(check.outcome.source)
    return a.outcome.source == "+".join(now)


def _with_rows(record: Record, check: Answer, answered: Sequence[Answer]) -> Record:
    if record.backend != "cuda" or record.op not in ("aspp_branches", "aspp_project"):
        return record
    for a in answered:
        o = a.outcome
        if o.phase != "rows" or o.verdict == PASSED or _versions(a) != _versions(check):
            continue
        dtype = re.match(r"row \d+ (\w+) ", o.unit)
        mine = dtype[1] == record.dtype if dtype else o.unit.startswith("repeat ")
        if mine and o.source == record.source and record.verdict == records.PASSED:
            reason = f"{o.unit}: {o.verdict}: {o.reason}"
            record = replace(record, verdict=records.FAILED, reason=reason)
    return record


def _rows_known(record: Record, check: Answer, answered: Sequence[Answer]) -> bool:
    """Whether every row of the table that the CUDA ASPP may choose has an answer; before that a
    pass says too little."""
    if record.backend != "cuda" or record.op not in ("aspp_branches", "aspp_project"):
        return True
    if record.verdict != records.PASSED:
        return True
    sm90 = record.capability == (9, 0)
    numbers = gpu_rows.rows(90 if sm90 else 80)
    if not numbers:
        return False
    known = {
        a.outcome.unit
        for a in answered
        if a.outcome.phase == "rows"
        and _versions(a) == _versions(check)
        and a.outcome.source == record.source
    }
    cases = ("whole", "cut", *["few filters"] * sm90)
    wanted = {f"row {row} {record.dtype} {case}" for row in numbers for case in cases}
    wanted |= {f"repeat row {row}" for row in numbers} if sm90 else set()
    return wanted <= known


def _note(shipped: Sequence[Record]) -> str:
    devices = sorted({(r.gpu, r.date) for r in shipped})
    last = {gpu: date for gpu, date in devices}
    listed = "; ".join(f"{gpu}, {date}" for gpu, date in last.items())
    return (
        f"Checked and measured on: {listed}. deeplab-fast tune checks and measures the kernels on "
        "your GPU."
    )


# The README's table.


def readme_table(kept: Sequence[Answer]) -> str:
    """A table for each GPU, with its conditions; "" without a time."""
    parts = []
    for machine, own in _by_gpu(kept):
        lines = list(_table_rows(own))
        if not lines:
            continue
        parts += [
            "",
            f"**{machine.gpu}.** {_conditions(own)}",
            "",
            "| case | PyTorch, ms | deeplab_fast, ms | speed-up | MiB |",
            "|---|---:|---:|---:|---:|",
            *lines,
            "",
            "Times are medians in milliseconds, of the device's work: each replayed from a CUDA "
            "graph where it can be captured, but for whole models. PyTorch is its fastest form, "
            "convolutions by cuDNN in channels_last. MiB is the peak memory of a call.",
            "",
        ]
    return "\n".join(parts) + "\n" if parts else ""


def _by_gpu(kept: Sequence[Answer]) -> Iterator[tuple[Machine, list[Answer]]]:
    for gpu in sorted({a.machine.gpu for a in kept}):
        own = sorted((a for a in kept if a.machine.gpu == gpu), key=lambda a: a.outcome.unit)
        yield max(own, key=lambda a: a.date).machine, own


def _conditions(own: Sequence[Answer]) -> str:
    def distinct(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(sorted(v for v in values if v)))

    facts = {
        "PyTorch": distinct(a.machine.torch for a in own),
        "Triton": distinct(a.machine.triton for a in own),
        "driver": distinct(a.machine.driver for a in own),
        "dtype": "bfloat16",
        "commit": distinct(a.commit[:10] for a in own),
    }
    listed = ", ".join(f"{name} {value}" for name, value in facts.items() if value)
    return f"Measured with {listed}, {distinct(a.date[:10] for a in own)}."


def _table_rows(own: Sequence[Answer]) -> Iterator[str]:
    known = doubts.Known(a.outcome for a in own)
    ours = known.rows("ours ")
    plain = known.rows("pytorch ") | {k: r for k, r in ours.items() if ": PyTorch" in k}
    groups = dict.fromkeys(what.partition(": ")[0] for what in ours)
    for group in groups:
        mine = [r for what, r in ours.items() if what.startswith(f"{group}: deeplab_fast")]
        theirs = [r for what, r in plain.items() if what.startswith(f"{group}: ")]
        if mine and theirs:
            best, other = (min(rows, key=lambda r: r["ms"]) for rows in (mine, theirs))
            yield _row(group, other["ms"] / best["ms"], other, best)
    for (op, form), name in _SHOWN.items():
        found = known.outcomes.get(f"time {op} bfloat16 {form}")
        for speed in found.result.get("speeds", ()) if found else ():
            if not speed["gains"]:
                continue
            backend = max(speed["gains"], key=lambda b: speed["gains"][b])
            theirs, mine = (speed["contestants"][n] for n in (speed["pytorch"], backend))
            size = "x".join(map(str, speed["sizes"][:4]))
            gain = speed["gains"][backend]
            yield _row(f"{name} {size} ({backend})", gain, theirs, mine)


def _row(case: str, gain: float, before: Row, after: Row) -> str:
    theirs, ours = before["ms"], after["ms"]
    peaks = [r.get("peak_mb", -1) for r in (before, after)]
    memory = "" if min(peaks) < 0 else f"{peaks[0]:.0f} → {peaks[1]:.0f}"
    return f"| {case} | {theirs:.3g} | {ours:.3g} | {gain:.2f}x | {memory} |"


# The page of what is known and what waits.


def page_part(kept: Sequence[Answer]) -> str:
    """What stands between the markers of bench/GPU.md."""
    lines = ["", "## What the next loan runs, in its order", ""]
    gpus = list(_by_gpu(kept))
    for title, pattern in GROUPS:
        own = [a for a in kept if re.match(pattern, a.outcome.unit)]
        waiting = sorted({a.outcome.unit for a in own if not a.answers})
        if not own:
            lines.append(f"- [ ] {title}")
        elif waiting:
            lines.append(f"- [ ] {title}: {_named(waiting)}")
    lines += ["", "## Doubts that it settles", ""]
    still = list(doubts.open_doubts(a.outcome for a in kept)) if kept else list(doubts.DOUBTS)
    lines += [f"- {d.question} ({d.units})" for d in still] or ["None is left."]
    lines += ["", "## Record", ""]
    if not gpus:
        lines += [_EMPTY, ""]
    for machine, own in gpus:
        lines += [f"### {machine.gpu}", "", *_ticks(own), ""]
        if said := doubts.settled(a.outcome for a in own):
            lines += ["Settled:", "", *(f"- {s}" for s in said), ""]
    return "\n".join(lines) + "\n"


def _ticks(own: Sequence[Answer]) -> Iterator[str]:
    for title, pattern in GROUPS:
        mine = [a for a in own if re.match(pattern, a.outcome.unit) and a.answers]
        if not mine:
            continue
        passed = sum(a.outcome.verdict == PASSED for a in mine)
        bad = [a.outcome for a in mine if a.outcome.verdict != PASSED]
        last = max(mine, key=lambda a: a.date)
        counts = f"{passed} passed" + (f", {len(bad)} did not" if bad else "")
        yield f"- [x] {title}: {counts}; {last.date[:10]}, commit {last.commit[:10]}"
        for o in bad[:_MOST_NAMED]:
            yield f"  - {o.unit}: {o.verdict}: {_one_line(o.reason)}"
        if len(bad) > _MOST_NAMED:
            yield f"  - and {len(bad) - _MOST_NAMED} more"


def _named(units: Sequence[str]) -> str:
    shown = ", ".join(units[:_MOST_NAMED])
    rest = len(units) - _MOST_NAMED
    return shown + (f" and {rest} more" if rest > 0 else "")


def _one_line(text: str) -> str:
    # Of a path on the machine that ran it only the name says something.
    text = re.sub(r"(?:/[\w.-]+)+/([\w.-]+)", r"\1", " ".join(text.split()))
    return text[:200]


def main(argv: Sequence[str] | None = None) -> int:
    """Apply; 0, or 2 where the results do not allow it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.apply_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.jsonl")
    parser.add_argument("--commit", default="", metavar="SHA")
    parser.add_argument("--rehearsal", type=Path, metavar="DIR")
    options = parser.parse_args(argv)
    try:
        found = [a for path in options.results for a in gpu_store.read_answers(path)]
        if options.rehearsal is None and any(a.machine.device == _STAND_IN for a in found):
            raise ApplyError(
                "these are results of a stand-in for a GPU; --rehearsal DIR applies them to copies"
            )
        files = Files.of_repository()
        if options.rehearsal is not None:
            files = Files.in_folder(options.rehearsal)
        before = {path: path.read_bytes() if path.is_file() else b"" for path in files.all}
        kept = apply(options.results, files, options.commit)
    except (ValueError, OSError) as error:
        print(f"bench.apply_gpu: error: {error}", file=sys.stderr)
        return 2
    for path in files.all:
        changed = path.is_file() and path.read_bytes() != before[path]
        print(f"{path.name}: {'rewritten' if changed else 'as it was'}")
    for machine, own in _by_gpu(kept):
        print(f"\n{machine.gpu}")
        for said in doubts.settled(a.outcome for a in own):
            print(f"- {said}")
    waiting = [a for a in kept if not a.answers]
    print(f"\n{sum(a.answers for a in kept)} units have an answer, {len(waiting)} wait for one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
