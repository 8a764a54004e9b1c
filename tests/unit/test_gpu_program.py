"""What runs on a borrowed GPU, rehearsed: units pass, hang, crash, are wrong and run out of time on
a stand-in, and what follows from the results is written into copies."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

# `pytest` alone, unlike `python -m pytest`, does not look for bench/ in the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import apply_gpu, doubts, gpu, gpu_programs, gpu_rows, gpu_store, report
from bench.gpu_loan import CHECK_SECONDS, Loan, Phase
from bench.gpu_measure import CUT_SHORT
from bench.gpu_op_units import first_configurations, more_configurations
from bench.gpu_store import Answer
from bench.gpu_units import more_autotuned, units_of
from deeplab_fast.dispatch import records
from deeplab_fast.tuning.machine import STAND_IN, Machine
from deeplab_fast.tuning.runner import (
    CRASHED,
    ERROR,
    FAILED,
    NOT_RUN,
    PASSED,
    TIMED_OUT,
    Budget,
    Outcome,
    Unit,
    append,
    read,
    run,
)

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine("cuda", "NVIDIA H100", (9, 0), 132, 81559, "580", "2.11.0", "3.6.0")
DATE = "2026-12-01T10:00:00+00:00"


class Rehearsal:
    """Runs of `bench.gpu` on a stand-in.

    Attributes:
        out: folder of results.
        store: what is known from runs before.
    """

    def __init__(self, folder: Path) -> None:
        self.out, self.store = folder / "out", folder / "store.jsonl"
        self.stand_in = folder / "stand-in.json"

    def start(
        self, only: str, *arguments: str, faults: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Begin a run.

        Args:
            only: units.
            arguments: further ones.
            faults: part of a unit's name -> what happens to it.
        """
        self.stand_in.write_text(json.dumps({"faults": faults or {}}), "utf-8")
        env = {**os.environ, STAND_IN: str(self.stand_in), "PYTHONPATH": str(ROOT)}
        # In the process that forks: it must not so much as ask for a device.
        code = (
            "import os, sys, torch\n"
            "parent, before = os.getpid(), torch._C._cuda_getDeviceCount\n"
            "def asked():\n"
            "    assert os.getpid() != parent, 'CUDA in the process that forks'\n"
            "    return before()\n"
            "torch._C._cuda_getDeviceCount = asked\n"
            "from bench import gpu\n"
            "sys.exit(gpu.main())\n"
            if hasattr(__import__("torch")._C, "_cuda_getDeviceCount")
            else "import sys\nfrom bench import gpu\nsys.exit(gpu.main())\n"
        )
        command = [sys.executable, "-c", code, "--out", str(self.out), "--store", str(self.store)]
        return subprocess.Popen(
            [*command, "--only", only, *arguments],
            cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, only: str, *arguments: str, faults: dict[str, str] | None = None) -> str:
        """A run to its end; what it printed."""
        process = self.start(only, *arguments, faults=faults)
        text, _ = process.communicate(timeout=300)
        assert process.returncode in (0, 1) and "were not run" in text, text
        return text

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """The last outcome of each unit."""
        return {o.unit: o for o in read(self.out / "results.jsonl")}

    @property
    def lines(self) -> list[str]:
        """Lines of the file of results."""
        return (self.out / "results.jsonl").read_text("utf-8").splitlines()


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal(tmp_path)


ARGMAX = r"(check|time) upsample_argmax .*bfloat16"


def test_results_survive_every_fault_and_are_applied_once(rehearsal, tmp_path, capsys) -> None:
    """A kernel that hangs, one that crashes, one that is wrong, and units that fail otherwise."""
    only = rf"^({ARGMAX}|(row|repeat row) 3|residency|pytorch (ceil|upsampling b16 21 classes 65))"
    faults = {
        "check upsample_argmax triton bfloat16 return": "wrong",
        "check upsample_argmax cuda": "crash",
        "row 3 bfloat16 cut": "hang",
        "row 3 float16 cut": "wrong",
        "ceilings": "wrong",
        "upsampling b16": "slow",
    }
    text = rehearsal.run(only, "--budget", "70", faults=faults)
    found = rehearsal.outcomes
    assert found["check upsample_argmax triton bfloat16 plain"].verdict == PASSED
    wrong = found["check upsample_argmax triton bfloat16 return_prob"]
    assert wrong.verdict == FAILED and "is off by" in wrong.reason
    for form in ("plain", "return_prob"):
        crashed = found[f"check upsample_argmax cuda bfloat16 {form}"]
        assert crashed.verdict == CRASHED and "SIGSEGV" in crashed.reason
    assert found["row 3 bfloat16 whole"].verdict == PASSED
    # Where a tile goes wrong: its class of taps, and where in the pattern of a swizzle.
    row = found["row 3 float16 cut"]
    assert row.verdict == FAILED
    assert re.search(r"image 1, row 32 \(mod 8 = 0\).*class \d+ \(\dx\d taps\)", row.reason)
    assert found["repeat row 3"].verdict == PASSED
    assert found["residency"].result["rows"][0]["assumed"] == 66
    # What hangs has an answer only if its own limit ended it.
    assert found["row 3 bfloat16 cut"].verdict in (TIMED_OUT, NOT_RUN)
    assert found["pytorch upsampling b16 21 classes 65 to 513"].verdict == PASSED
    # Only what passed is measured.
    times = {o.unit: o for o in found.values() if o.phase == "time"}
    assert list(times) == ["time upsample_argmax bfloat16 plain"]
    assert times["time upsample_argmax bfloat16 plain"].facts["backends"] == ["triton"]
    # Failures are the last that is printed.
    assert "row 3 float16 cut: failed" in text[-3000:]

    results = rehearsal.out / "results.jsonl"
    assert apply_gpu.main([str(results)]) == 2
    assert "stand-in" in capsys.readouterr().err
    folder = tmp_path / "applied"
    arguments = [str(results), "--rehearsal", str(folder), "--commit", "0123456789"]
    assert apply_gpu.main(arguments) == 0
    once = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(once) == {"gpu_results.jsonl", "shipped.json", "README.md", "GPU.md"}
    assert apply_gpu.main(arguments) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == once
    kept = {(r.backend, r.form): r for r in records.read(folder / "shipped.json", "shipped")}
    assert kept["triton", "plain"].verdict == PASSED and len(kept["triton", "plain"].times) == 1
    assert kept["triton", "return_prob"].verdict == FAILED
    assert "SIGSEGV" in kept["cuda", "plain"].reason
    page = once["GPU.md"].decode()
    assert "row 3 float16 cut: failed: aspp_branches" in page
    assert "upsampling, labels" in once["README.md"].decode()


def test_the_budget_holds_whatever_hangs_and_the_second_run_goes_on(rehearsal) -> None:
    hanging = "check upsample_confusion triton bfloat16 plain"
    only = rf"^({ARGMAX}|{hanging}|row 3 bfloat16 (whole|few))"
    faults = {"check upsample_confusion": "hang", "row 3": "hang"}
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "from bench import gpu"], cwd=ROOT, check=True)
    importing = time.monotonic() - begin
    # Longer on a busy machine, but shorter than the limit of what hangs, which begins afterwards.
    budget = round(CHECK_SECONDS + importing)
    rehearsal.run(only, "--budget", str(budget), faults=faults)
    assert time.monotonic() - begin - importing < budget + 10 + importing
    first = rehearsal.outcomes
    # What was cut off by the end of the budget is no answer.
    assert first[hanging].verdict == NOT_RUN and first["row 3 bfloat16 whole"].verdict == NOT_RUN
    passed = {name for name, o in first.items() if o.verdict == PASSED and o.phase == "check"}
    assert passed
    # The second takes what has no answer, and what follows from the answers.
    count = len(rehearsal.lines)
    follows = "full check upsample_argmax triton bfloat16 plain"
    text = rehearsal.run(rf"{only}|{follows}", "--second", "--budget", "30")
    again = {json.loads(line)["unit"] for line in rehearsal.lines[count:]}
    assert not passed & again
    assert {hanging, "row 3 bfloat16 whole", follows} <= again
    assert "full: an op is right" in text
    assert rehearsal.outcomes["row 3 bfloat16 whole"].verdict == PASSED


def test_a_run_that_is_killed_leaves_whole_lines(rehearsal) -> None:
    only = r"^check upsample_(argmax|softmax_add) triton"
    process = rehearsal.start(only, "--budget", "60")
    path = rehearsal.out / "results.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text("utf-8").count('"passed"') >= 4:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert rehearsal.lines and all(json.loads(line) for line in rehearsal.lines)
    found = [o for o in read(path) if o.phase == "check"]
    assert len([o for o in found if o.verdict == PASSED]) >= 2
    # Where a disk was full half a line is left out, and no other.
    path.write_bytes(path.read_bytes() + b'{"unit": "x", "verd')
    assert len(gpu_store.read_answers(path)) == len(found)


def test_what_has_an_answer_is_not_run_again(rehearsal, tmp_path) -> None:
    only = r"^(check upsample_softmax_add triton bfloat16|pytorch ceilings)"
    rehearsal.run(only, "--budget", "90")
    kept = gpu_store.merged([], gpu_store.read_answers(rehearsal.out / "results.jsonl"))
    gpu_store.write(rehearsal.store, kept)
    assert {a.outcome.unit for a in kept} == {
        "check upsample_softmax_add triton bfloat16 plain",
        "check upsample_softmax_add triton bfloat16 flip",
        "pytorch ceilings",
    }
    count = len(rehearsal.lines)
    # Of one unit the code has changed since.
    changed = [
        replace(a, outcome=replace(a.outcome, source="before")) if i == 1 else a
        for i, a in enumerate(kept)
    ]
    gpu_store.write(rehearsal.store, changed)
    rehearsal.run(only, "--budget", "90")
    again = {json.loads(line)["unit"] for line in rehearsal.lines[count:]}
    assert again == {gpu_store.RUN, changed[1].outcome.unit}


# What follows from outcomes, without a run.


def outcome(unit: str, verdict: str = PASSED, phase: str = "", **fields) -> Outcome:
    return Outcome(unit, verdict, phase=phase or unit.split()[0], **{"source": "s", **fields})


def answer(o: Outcome, date: str = DATE, machine: Machine = MACHINE) -> Answer:
    return Answer(o, machine, date, "abcdef")


def checked(backend: str = "triton", verdict: str = PASSED, source: str = "s", **facts) -> Outcome:
    facts = {
        "op": "aspp_branches",
        "backend": backend,
        "dtype": "bfloat16",
        "form": "plain",
    } | facts
    name = f"check {facts['op']} {backend} {facts['dtype']} {facts['form']}"
    return outcome(name, verdict, source=source, facts=facts)


def timed(gain: float, source: str = "s", backend: str = "triton") -> Outcome:
    contestants = {
        "cuDNN": {"ms": 2.0, "peak_mb": 30.0, "graphed": True, "problem": ""},
        backend: {"ms": 2.0 / gain, "peak_mb": 20.0, "graphed": True, "problem": ""},
    }
    speed = {"sizes": [16, 2048, 65, 65, 256], "pytorch": "cuDNN", "contestants": contestants,
             "gains": {backend: gain}}  # fmt: skip
    facts = {"op": "aspp_branches", "dtype": "bfloat16", "form": "plain", "backends": [backend]}
    return outcome("time aspp_branches bfloat16 plain", source=source, facts=facts,
                   result={"speeds": [speed]})  # fmt: skip


def test_the_latest_answer_counts_and_says_more_than_none() -> None:
    old, new = answer(outcome("u", FAILED)), answer(outcome("u"), "2026-12-02T10:00:00+00:00")
    assert gpu_store.merged([old], [new]) == [new]
    assert gpu_store.merged([new], [old]) == [new]
    for nothing in (
        outcome("u", NOT_RUN),
        outcome("u", ERROR),
        outcome("u", FAILED, reason=f"{CUT_SHORT} at test_x"),
    ):
        assert gpu_store.merged([new], [answer(nothing, "2026-12-03")]) == [new]
        # Of other sources it says that there is no answer for these.
        changed = answer(replace(nothing, source="t"), "2026-12-03")
        assert gpu_store.merged([new], [changed]) == [changed]
    elsewhere = answer(outcome("u"), machine=replace(MACHINE, gpu="NVIDIA H200"))
    assert len(gpu_store.merged([old], [elsewhere])) == 2


def test_an_answer_holds_for_its_sources_machine_and_limit() -> None:
    unit = Unit("u", 20, dict, source="s")
    assert answer(outcome("u")).holds(unit, MACHINE)
    assert not answer(outcome("u")).holds(replace(unit, source="t"), MACHINE)
    assert not answer(outcome("u")).holds(unit, replace(MACHINE, triton="3.7.1"))
    assert not answer(outcome("u", ERROR)).holds(unit, MACHINE)
    mine = {gpu_store.HARNESS: gpu_store.harness()}
    killed = answer(outcome("u", TIMED_OUT, seconds=20.1, facts=mine))
    # What did not pass may have been the fault of what checked it, which has changed since.
    for verdict in (FAILED, CRASHED, TIMED_OUT):
        assert answer(outcome("u", verdict, seconds=99, facts=mine)).holds(unit, MACHINE)
        before = outcome("u", verdict, seconds=99, facts={gpu_store.HARNESS: "before"})
        assert not answer(before).holds(unit, MACHINE)
    assert killed.holds(unit, MACHINE) and not killed.holds(replace(unit, limit=40), MACHINE)


def test_the_store_is_sorted_and_comes_back(tmp_path) -> None:
    given = [
        answer(outcome("b", output="x" * 5000)),
        answer(outcome("a"), "2026-12-02T10:00:00+00:00"),
        answer(outcome("a"), machine=replace(MACHINE, gpu="A100", capability=(8, 0))),
    ]
    for order in (given, given[::-1]):
        gpu_store.write(tmp_path / "store", order)
        back = gpu_store.read_answers(tmp_path / "store")
        assert [(a.machine.gpu, a.outcome.unit) for a in back] == [
            ("A100", "a"), ("NVIDIA H100", "b"), ("NVIDIA H100", "a"),
        ]  # fmt: skip
        assert all(len(a.outcome.output) <= 400 for a in back)
        assert {a.date for a in back} == {a.date for a in given}
    with pytest.raises(ValueError, match="before any line of a run"):
        append(tmp_path / "loose", outcome("a"))
        gpu_store.read_answers(tmp_path / "loose")


def test_records_follow_from_answers_of_the_same_sources() -> None:
    kept = [answer(checked()), answer(timed(2.0))]
    (record,) = apply_gpu.records_of(kept)
    assert (record.date, record.commit, record.gpu) == ("2026-12-01", "abcdef", "NVIDIA H100")
    assert record.verdict == PASSED and record.times[0].gain == 2.0
    # A time of a kernel that has changed since is not that of this one.
    (record,) = apply_gpu.records_of([answer(checked(source="t")), answer(timed(2.0))])
    assert record.times == ()
    (record,) = apply_gpu.records_of([answer(checked()), answer(outcome("x", NOT_RUN, "check"))])
    assert record.verdict == PASSED
    # The word of all sizes is the later one.
    full = replace(checked(verdict=FAILED), unit=f"full {checked().unit}", reason="wrong")
    for order in ([answer(full), answer(checked())], [answer(checked()), answer(full)]):
        (record,) = apply_gpu.records_of(order)
        assert record.verdict == FAILED


@pytest.mark.parametrize(
    ("row", "dtype", "verdict"),
    [
        ("row 3 bfloat16 cut", "bfloat16", FAILED),
        ("row 3 float16 cut", "bfloat16", PASSED),
        ("repeat row 4", "float16", FAILED),
    ],
)
def test_the_cuda_aspp_passes_where_all_its_rows_do(row, dtype, verdict) -> None:
    wrong = answer(outcome(row, TIMED_OUT, "rows", reason="killed after 20 s"))
    right = [answer(o) for o in every_row() if o.unit != row]
    kept = [answer(checked("cuda", dtype=dtype)), answer(checked("triton", dtype=dtype)), wrong]
    kept += right
    cuda, triton = sorted(apply_gpu.records_of(kept), key=lambda r: r.backend)
    assert (cuda.verdict, triton.verdict) == (verdict, PASSED)
    assert verdict == PASSED or row in cuda.reason


@pytest.mark.parametrize("missing", ["row 3 bfloat16 whole", "row 6 bfloat16 few", "repeat row 3"])
def test_without_an_answer_for_every_row_there_is_no_record_of_the_cuda_aspp(missing: str) -> None:
    kept = [answer(checked("cuda")), answer(checked("triton"))]
    kept += [answer(o) for o in every_row() if not o.unit.startswith(missing)]
    (record,) = apply_gpu.records_of(kept)
    assert record.backend == "triton"


def every_row() -> list[Outcome]:
    """Passes of all rows of sm_90a."""
    numbers = gpu_rows.rows(gpu_rows.SM90)
    names = [
        f"row {row} {dtype} {case}"
        for row in numbers
        for dtype in gpu_rows.DTYPES
        for case in ("whole", "cut", "few filters")
    ]
    names += [f"repeat row {row}" for row in numbers]
    return [outcome(name, PASSED, "rows") for name in names]


def rows(unit: str, **ms: float) -> Outcome:
    found = [{"what": what, "ms": value} for what, value in ms.items()]
    return outcome(unit, result={"rows": found})


def convolution(last: float) -> Outcome:
    name = "convolution b16 65x65 rate {}: forward"
    return rows("pytorch convolution b16 65x65", **{name.format(12): 1.0, name.format(36): last})


def folded(ms: float) -> Outcome:
    """40e6 values, 240 MB: 3000 GB a second in 0.08 ms."""
    speed = {"sizes": [60, 40_000_000], "contestants": {"triton": {"ms": ms}}, "gains": {}}
    return outcome("time fold_filters bfloat16 float32", result={"speeds": [speed]})


def form(**ms: float) -> Outcome:
    """Ten layers of a class of convolutions whose rule takes "cudnn"."""
    found = [
        {"what": f"form r50 1x3x9x9 to 8 3x3: {name}", "ms": value, "count": 10, "rule": "cudnn"}
        for name, value in ms.items()
    ]
    return outcome("forms r50", result={"rows": found})


def inference(*ms: float) -> Outcome:
    """Of a model as built, without graphs, with them, and frozen with them."""
    names = ("", ", no graphs", ", graphs", " optimize, graphs")
    found = [
        {"what": f"labels r50: deeplab_fast{name}", "ms": value}
        for name, value in zip(names, ms, strict=False)
    ]
    return outcome("ours inference r50", result={"rows": found})


COPY = {"what": "ceiling: copy", "ms": 1.0, "gb_per_s": 3000.0}
FEW = [f"row {row} {dtype} few filters" for row in range(3, 7) for dtype in gpu_rows.DTYPES]


@pytest.mark.parametrize(
    ("doubt", "outcomes", "expected"),
    [
        ("fence", [outcome("variant nofence", FAILED)], "needed"),
        ("fence", [outcome("variant nofence")], None),
        (
            "fence",
            [outcome("variant nofence"), rows("variant default time", a=1.1),
             rows("variant nofence time", a=1.0)],
            "slower",
        ),
        (
            "fence",
            [outcome("variant nofence"), rows("variant default time", a=1.0),
             rows("variant nofence time", a=1.0)],
            "free",
        ),
        ("acquire", [outcome("repeat row 3")], "equal"),
        ("acquire", [outcome("repeat row 3", FAILED)], None),
        (
            "acquire",
            [outcome("repeat row 3", FAILED), outcome("variant acquire_cluster")],
            "cured",
        ),
        ("acquire", [outcome("repeat row 3", NOT_RUN)], None),
        ("box", [outcome(name) for name in FEW], "yes"),
        ("box", [outcome(name) for name in FEW[1:]], None),
        ("box", [outcome(FEW[0], CRASHED)], "no"),
        ("resident", [outcome("residency", FAILED, reason="row 3")], "no"),
        ("padding", [convolution(0.99)], "yes"),
        ("padding", [convolution(0.5)], "no"),
        (
            "launch",
            [outcome("ours training r50", result={"rows": [
                {"what": "step: deeplab_fast", "ms": 60.0, "wall_over_device": 1.5, "kernels": 9}
            ]})],
            "yes",
        ),
        ("fold", [folded(0.08), outcome("pytorch ceilings", result={"rows": [COPY]})], "yes"),
        ("fold", [folded(0.2), outcome("pytorch ceilings", result={"rows": [COPY]})], "no"),
        ("fold", [folded(0.08)], None),
        (
            "graph",
            [outcome("ours training r50", result={"rows": [
                {"what": "step: deeplab_fast", "ms": 60.0},
                {"what": "step: deeplab_fast, CUDA graph", "ms": 50.0},
            ]})],
            "yes",
        ),
        (
            "graph",
            [outcome("ours training r50", result={"rows": [
                {"what": "step: deeplab_fast", "ms": 60.0},
                {"what": "step: deeplab_fast, CUDA graph", "problem": "not captured"},
            ]})],
            None,
        ),
        ("forms", [form(cudnn=1.0, other=1.02)], "yes"),
        ("forms", [form(cudnn=1.2, other=1.0)], "no"),
        # A form that cannot run has no time.
        ("forms", [form(other=1.0)], None),
        ("automatic", [inference(1.0, 1.0, 0.98)], "yes"),
        ("automatic", [inference(1.0, 1.0, 0.5)], "no"),
        ("automatic", [inference(0.6, 1.0)], None),
        ("share", [inference(1.0, 1.0, 1.0, 0.85)], "yes"),
        ("share", [inference(1.0, 1.0, 1.0, 0.95)], "no"),
        ("rule", [outcome("configure pointwise x", result={"ms": {}})], "yes"),
        (
            "gather",
            [outcome("profile row 4", result={"rows": [{"what": "k", "issue slots": "91.2 %"}]})],
            "yes",
        ),
    ],
)  # fmt: skip
def test_doubts_and_what_follows(doubt, outcomes, expected) -> None:
    found = {s.doubt.name: s for s in doubts.settled(outcomes)}
    if expected is None:
        assert doubt not in found
        assert doubt in {d.name for d in doubts.open_doubts(outcomes)}
        return
    assert found[doubt].answer == expected
    text = str(found[doubt])
    assert f"Settled: {expected}" in text and found[doubt].doubt.follows[expected] in text


def test_the_page_and_the_table_are_those_of_the_store() -> None:
    kept = gpu_store.read_answers(gpu_store.STORE) if gpu_store.STORE.is_file() else []
    files = apply_gpu.Files.of_repository()
    for path, part in (
        (files.page, apply_gpu.page_part(kept)),
        (files.readme, apply_gpu.readme_table(kept)),
    ):
        text = path.read_text("utf-8")
        assert report.between_markers(text, part, apply_gpu.BEGIN, apply_gpu.END) == text


def test_the_page_ticks_what_was_answered_and_lists_what_waits() -> None:
    where = "/somewhere/else/deep/file.py:3"
    kept = [
        answer(checked()),
        answer(replace(checked("cuda", FAILED), reason=f"raises Error at {where}")),
        answer(outcome("tests test_upsample_gpu main", NOT_RUN)),
        answer(timed(1.5)),
    ]
    text = apply_gpu.page_part(kept)
    assert "- [x] every op, backend, dtype and form at small sizes: 1 passed, 1 did not" in text
    assert "check aspp_branches cuda bfloat16 plain: failed: raises Error at file.py:3" in text
    assert "- [ ] the GPU tests by file: tests test_upsample_gpu main" in text
    assert "- [ ] what PyTorch reaches" in text
    table = apply_gpu.readme_table(kept)
    assert "| ASPP branches 16x2048x65x65 (triton) | 2 | 1.33 | 1.50x | 30 → 20 |" in table
    assert "PyTorch 2.11.0, Triton 3.6.0, driver 580" in table
    assert apply_gpu.readme_table(kept[:1]) == ""


# Programs.


def test_every_gpu_test_is_in_one_part() -> None:
    for file in gpu_programs.test_files():
        text = (gpu_programs.TESTS / f"{file}.py").read_text("utf-8")
        names = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
        assert names
        parts = gpu_programs.parts_of(file)
        for name in names:
            chosen = [part for part in parts if _selects(gpu_programs.expression(part), name)]
            assert chosen == [gpu_programs.part_of(name)]


def _selects(expression: str, name: str) -> bool:
    """What pytest's -k does with words, `and`, `or`, `not` and parentheses."""
    words = set(re.findall(r"\w+", expression)) - {"and", "or", "not"}
    return bool(eval(expression, {word: word in name for word in words}))


def test_reports_of_pytest_are_counted() -> None:
    text = (
        "tests/gpu/test_a.py::test_one[torch.float16] PASSED [ 33%]\n"
        "tests/gpu/test_a.py::test_two FAILED [ 66%]\n"
        "FAILED tests/gpu/test_a.py::test_two - AssertionError: 3 values\n"
        "==== 1 failed, 1 passed, 2 skipped, 4 deselected in 3.21s ====\n"
    )
    found = gpu_programs.test_result(text)
    assert (found["passed"], found["skipped"], found["failures"]) == (1, 2, 1)
    assert found["failed"] == {"test_two": "AssertionError: 3 values"}
    # Cut off: what had passed by then.
    cut = text.partition("tests/gpu/test_a.py::test_two")[0]
    assert gpu_programs.test_result(cut)["passed"] == 1


def test_reports_of_compute_sanitizer_are_counted() -> None:
    text = (
        "========= COMPUTE-SANITIZER\n"
        "upsample_argmax/up forward bfloat16 cuda: ok (labels error 0.0e+00)\n"
        "========= Invalid __global__ read of size 4 bytes\n"
        "=========     at kernel+0x10\n"
        "========= ERROR SUMMARY: 2 errors\n"
    )
    found = gpu_programs.sanitizer_result(text)
    assert (found["ok"], found["errors"]) == (1, 2)
    assert found["first"].startswith("Invalid __global__ read of size 4 bytes")
    assert gpu_programs.sanitizer_result("========= ERROR SUMMARY: 0 errors")["errors"] == 0
    hazards = "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)"
    assert gpu_programs.sanitizer_result(hazards)["errors"] == 3


def test_profiles_are_read() -> None:
    names = ["ID", "Kernel Name", *gpu_programs.METRICS]
    lines = [names, ["", "", "us", "%", "%", "Mbyte", "Mbyte"],
             ["0", "aspp_sm90_kernel", "301.5", "42.1", "80.2", "900", "80"]]  # fmt: skip
    text = "==PROF== Connected\n" + "\n".join(
        ",".join(f'"{cell}"' for cell in line) for line in lines
    )
    (row,) = gpu_programs.profile_rows(text)
    assert row["time"] == "301.5 us" and row["issue slots"] == "42.1 %"
    assert gpu_programs.profile_rows("==ERROR== no permission") == []


def test_a_phase_that_cannot_be_planned_ends_no_other(tmp_path, capsys) -> None:
    def broken(loan: Loan) -> list[Unit]:
        raise AttributeError("no table")

    loan = Loan(MACHINE, tmp_path, Budget(9), [])
    assert units_of(Phase("rows", "", 1, broken), loan) == []
    assert "rows: cannot be planned" in capsys.readouterr().out


def test_units_are_listed_without_extensions() -> None:
    """A build that failed on the GPU machine costs the units of what was not built alone."""
    environment = {**os.environ, "DEEPLAB_FAST_DISABLE_EXT": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--list"],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=True,
    )  # fmt: skip
    assert "check aspp_branches triton bfloat16 plain" in done.stdout
    assert " row 3" not in done.stdout


def test_units_are_listed_without_a_gpu(capsys) -> None:
    assert gpu.main(["--list", "--only", "pytorch|ours|tests"]) == 0
    text = capsys.readouterr().out
    assert "pytorch ceilings" in text and "tests test_upsample_gpu large" in text
    assert gpu.main(["--list", "--only", "("]) == 2
    assert "error" in capsys.readouterr().err


def test_the_script_needs_a_gpu_and_says_so(tmp_path) -> None:
    env = {**os.environ, "PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    env.pop(STAND_IN, None)
    env |= {"OUT": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": ""}
    script = ROOT / "bench" / "gpu.sh"
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stdout
    log = (tmp_path / "out" / "gpu.log").read_text("utf-8")
    assert "bench.gpu: " in log and "exit status 2" in log


def test_configurations_are_measured_of_what_comes_near_pytorch(tmp_path) -> None:
    loan = Loan(MACHINE, tmp_path, Budget(1), [])
    near, far = timed(0.9), timed(0.5)
    assert first_configurations(loan) == []
    loan.outcomes = {o.unit: o for o in (checked(), near)}
    units = first_configurations(loan)
    configured = [u.name for u in units if u.phase == "configure"]
    # At the smallest and the largest map, each after its candidates were compiled.
    assert len(configured) == 2 and all("aspp_branches bfloat16 plain" in n for n in configured)
    assert "16x2048x65x65" in configured[0] and "1x2048x33x33" not in configured[0]
    assert {u.name.removeprefix("compile ").rpartition(" ")[0] for u in units[:-2]} == {
        name.removeprefix("configure ") for name in configured
    }
    assert all(u.alone for u in units[-2:])
    assert more_configurations(loan) == []
    loan.outcomes[far.unit] = far
    assert first_configurations(loan) == []
    loan.outcomes[near.unit] = timed(1.2)
    assert len([u for u in more_configurations(loan) if u.phase == "configure"]) == len(
        [w for w in loan.plan.works if w.op == "aspp_branches"]
    )
    # What has an answer is not compiled for again.
    done = first_configurations(loan)[-1]
    loan.outcomes[done.name] = outcome(done.name, phase="configure", facts=done.facts)
    about = done.name.removeprefix("configure ")
    assert not [u for u in first_configurations(loan) if u.name.startswith(f"compile {about}")]


def test_heads_are_autotuned_where_our_branches_win(tmp_path) -> None:
    loan = Loan(MACHINE, tmp_path, Budget(1), [])
    won = timed(1.2)
    won.result["speeds"][0]["sizes"] = [1, 2048, 65, 65, 256]
    for gain, expected in ((won, ["pytorch autotuned head b1 65x65"]), (timed(1.2), [])):
        loan.outcomes = {o.unit: o for o in (checked(), gain)}
        assert [u.name for u in more_autotuned(loan)] == expected


def test_what_hangs_or_crashes_says_where(tmp_path) -> None:
    units = [
        Unit("hang", 3.0, partial(time.sleep, 30)),
        Unit("crash", 20.0, partial(ctypes.string_at, 0)),
    ]
    hung, crashed = run(units, seconds=30)
    assert (hung.verdict, crashed.verdict) == (TIMED_OUT, CRASHED)
    assert "in _in_child" in hung.output and "Segmentation fault" in crashed.output


def test_a_crash_says_where_after_others_took_the_handler() -> None:
    """As Lightning does at the end of a training, when faulthandler is enabled already."""
    code = """if True:
        import ctypes, faulthandler, functools, signal
        from deeplab_fast.tuning.runner import Unit, run
        faulthandler.enable()
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        (crashed,) = run([Unit("crash", 20.0, functools.partial(ctypes.string_at, 0))], seconds=30)
        print(crashed.output)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Segmentation fault" in done.stdout and "in _in_child" in done.stdout
