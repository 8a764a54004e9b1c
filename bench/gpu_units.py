"""Units of a loan about whole programs: PyTorch's own, models, tests, sanitizer; and all phases."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from deeplab_fast.dispatch import records, sources
from deeplab_fast.dispatch.declare import gpu_ops
from deeplab_fast.tuning import tune
from deeplab_fast.tuning.runner import Unit

from . import doubts, gpu_checks, gpu_ours, gpu_programs, gpu_pytorch
from .files import ROOT
from .gpu_cases import CASES, GpuCase
from .gpu_loan import LEAST_SECONDS, MEASURE_SECONDS, NORMED, UPSAMPLED, Loan, Phase
from .gpu_measure import digest, fingerprint, tiny, unit
from .gpu_op_units import (
    first_configurations,
    full_checks,
    more_configurations,
    more_times,
    profiles,
    row_times,
    row_units,
    rows_here,
    sm90_rows,
    smoke,
    time_units,
    variant_times,
)

_HEADS = ((16, 65, 8), (1, 65, 8), (16, 33, 16))
_STEPS = (GpuCase("r50", 16, 16, 513, 513), GpuCase("r101", 16, 16, 513, 513))
# Models before a training step, and those whose forms are measured, the most telling first.
_FIRST_CASES = 4
_FORMS = tuple(case for case in CASES if case.backbone != "r101" and case.height == 520)
# Of a whole model in all its ways, of which some are searched for.
_MODEL_SECONDS = 45.0
_PROGRAM_SECONDS = 25.0


def pytorch_units(loan: Loan) -> list[Unit]:
    """What PyTorch reaches, without compilation."""
    found = [_pytorch(loan, "ceilings", gpu_pytorch.ceilings)]

    def heads(given: Sequence[tuple[int, int, int]]) -> None:
        for batch, side, output_stride in given:
            name = f"head b{batch} {side}x{side}"
            found.append(_pytorch(loan, name, gpu_pytorch.head, batch, side, output_stride))

    def convolutions(batch: int, side: int) -> None:
        rates = gpu_pytorch.rates_of(8 if side == 65 else 16)
        name = f"convolution b{batch} {side}x{side}"
        found.append(_pytorch(loan, name, gpu_pytorch.convolutions, batch, side, rates))

    def steps(given: Sequence[GpuCase]) -> None:
        for one in given:
            found.append(_pytorch(loan, f"training {one}", gpu_pytorch.training, one))

    heads(_HEADS[:2])
    convolutions(16, 65)
    steps(_STEPS[:1])
    convolutions(1, 65)
    for one in UPSAMPLED:
        name = "upsampling b{} {} classes {} to {}".format(*one)
        found.append(_pytorch(loan, name, gpu_pytorch.upsampling, *one))
    for shape in NORMED:
        name = f"batch norm {'x'.join(map(str, shape))}"
        found.append(_pytorch(loan, name, gpu_pytorch.batch_norm, *shape))
    heads(_HEADS[2:])
    convolutions(16, 33)
    convolutions(1, 33)
    steps(_STEPS[1:])
    return found


# What PyTorch is measured on, and by.
_MEASURED_BY = (
    "gpu_pytorch",
    "gpu_cases",
    "model_cases",
    "op_cases",
    "op_modules",
    "providers",
    "registry",
)


def _pytorch(loan: Loan, what: str, function: Callable[..., dict[str, Any]], *args: object) -> Unit:
    name = f"pytorch {what}"
    source = fingerprint(*(ROOT / "bench" / f"{name}.py" for name in _MEASURED_BY))
    return _timed(name, partial(function, loan.machine, *args), "pytorch", source)


def _timed(name: str, run: Callable[[], dict[str, Any]], phase: str, source: str) -> Unit:
    return unit(name, run, MEASURE_SECONDS, phase, alone=True, least=LEAST_SECONDS, source=source)


def program_units(loan: Loan) -> list[Unit]:
    """Programs of whole models, checked: families by PyTorch's kernels, what a GPU alone has, then
    by this package's."""
    source = _package("gpu_checks")
    found = [_program(loan, family, "auto", source) for family in gpu_checks.FAMILIES]
    for name, check in gpu_checks.CHECKS.items():
        found.append(_checked(f"program {name}", partial(check, loan.machine), source))
    # In a rehearsal neither can run.
    backend_names = () if tiny(loan.machine) else ("triton", "cuda")
    for backend in backend_names:
        found += [_program(loan, family, backend, source) for family in gpu_checks.FORCED]
    return found


def _program(loan: Loan, family: str, backend: str, source: str) -> Unit:
    run = partial(gpu_checks.numbers, loan.machine, family, backend)
    return _checked(f"program {family} {backend}", run, source)


def _checked(name: str, run: Callable[[], dict[str, Any]], source: str) -> Unit:
    # Neither the memory nor a capture is another's.
    alone = name.endswith(("memory", "capture"))
    return unit(name, run, _PROGRAM_SECONDS, "program", alone=alone, source=source)


def _package(*names: str) -> str:
    """Of files of bench/, and of the package as a whole."""
    folders = ROOT / "deeplab_fast", ROOT / "kernels"
    package = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return fingerprint(*(ROOT / "bench" / f"{name}.py" for name in names), *package)


def model_units(loan: Loan) -> list[Unit]:
    """Whole models by the records so far: inference, a training step, forms of convolutions."""
    recorded = None if loan.listing else loan.write_records()
    winners = "\n".join(
        sorted(
            f"{r.op} {r.backend} {r.dtype} {r.form} {r.source}"
            for r in loan.records()
            if r.verdict == records.PASSED and any(t.gain >= 1 for t in r.times)
        )
    )
    # Of the kernels that run in it, too.
    source = f"{_package('gpu_ours', 'gpu_cases')}-{digest(winners)}"
    machine = loan.machine

    def ours(name: str, run: Callable[[], dict[str, Any]]) -> Unit:
        return _timed(f"ours {name}", run, "ours", source)

    def inference(case: GpuCase) -> Unit:
        run = partial(gpu_ours.model, machine, recorded, case)
        return replace(ours(f"inference {case}", run), limit=_MODEL_SECONDS)

    def training(case: GpuCase) -> Unit:
        return ours(f"training {case}", partial(gpu_ours.training, machine, recorded, case))

    checked = all(
        loan.passed(f"check {op} triton bfloat16 relu") for op in ("conv_bn_act", "bn_act")
    )

    def forms(case: GpuCase) -> Unit:
        run = partial(gpu_ours.forms, machine, case, checked)
        return _timed(f"forms {case}", run, "forms", source)

    return [
        *map(inference, CASES[:_FIRST_CASES]),
        training(_STEPS[0]),
        *map(forms, _FORMS[:2]),
        *map(inference, CASES[_FIRST_CASES:]),
        *map(forms, _FORMS[2:]),
        *map(training, _STEPS[1:]),
    ]


def test_units(loan: Loan) -> list[Unit]:
    """The GPU tests file by file; what compiles for max-autotune meanwhile, for its unit."""
    files = gpu_programs.test_files()
    warm = _autotune(loan, *_HEADS[0], warm=True)
    found = [] if loan.passed(_autotune(loan, *_HEADS[0]).name) else [warm]
    for part in (gpu_programs.MAIN, *(p for p in gpu_programs.PARTS if p != "large"), "large"):
        for file in files:
            if part in gpu_programs.parts_of(file):
                found.append(_test(loan, file, part))
    return found


def _test(loan: Loan, file: str, part: str) -> Unit:
    name = f"tests {file} {part}"
    limit = 90.0

    def run() -> dict[str, Any]:
        return gpu_programs.tests(file, part, loan.deadline(limit))

    prints = [sources.of_files([gpu_programs.TESTS / f"{file}.py"])]
    for op in _tested(file):
        prints += [tune.source(loan.machine, op, backend) for backend in tune.BACKENDS]
    alone, source = part == "large", digest("\n".join(prints))
    return unit(name, run, limit, "tests", alone=alone, least=5.0, source=source)


# The kernels that files of GPU tests are about, by the beginning of their names.
_TESTED = {
    "test_aspp_training": ("training",),
    "test_aspp": ("branches", "project", "pointwise"),
    "test_conv": ("branches", "project", "pointwise"),
    "test_batch_norm": ("batch_norm",),
    "test_fold": ("fold",),
    "test_upsample": ("upsample",),
}


def _tested(file: str) -> list[str]:
    """The ops that a file of GPU tests is about; all, where its name does not tell."""
    about = next((found for start, found in _TESTED.items() if file.startswith(start)), ())
    return [op.name for op in gpu_ops() if not about or op.sources in about]


def sanitizer_units(loan: Loan) -> list[Unit]:
    """compute-sanitizer's tools over all ops, and over forced rows of the ASPP."""
    found = []
    machine = loan.machine
    reason = "" if tiny(machine) else gpu_programs.missing("compute-sanitizer")
    rows_there = (
        any(row in rows_here(machine) for row in sm90_rows()) if rows_here(machine) else False
    )
    for tool in gpu_programs.TOOLS:
        for what in ("cuda", "rows", "triton"):
            if what == "rows" and not rows_there:
                continue
            found.append(_sanitizer(loan, tool, what, reason))
    return found


def _sanitizer(loan: Loan, tool: str, what: str, missing: str) -> Unit:
    name, limit = f"{tool} {what}", 68.0

    def run() -> dict[str, Any]:
        return gpu_programs.sanitizer(loan.machine, tool, what, loan.deadline(limit))

    ops = ("aspp_branches",) if what == "rows" else tuple(dict(tune.forms_of(loan.plan.works)))
    backend = "triton" if what == "triton" else "cuda"
    prints = [tune.source(loan.machine, op, backend) for op in ops]
    facts = {"missing": missing} if missing else {}
    source = digest("\n".join(prints))
    return unit(name, run, limit, "sanitizer", least=5.0, source=source, facts=facts)


def autotuned(loan: Loan) -> list[Unit]:
    """The head and two models by torch.compile with max-autotune."""
    return [_autotune(loan, *_HEADS[0]), *(_autotuned_model(loan, one) for one in CASES[:2])]


def _autotuned_model(loan: Loan, case: GpuCase) -> Unit:
    name = f"autotuned model {case}"
    return replace(_pytorch(loan, name, gpu_pytorch.autotuned_model, case), limit=300.0, least=60.0)


def _autotune(loan: Loan, batch: int, side: int, output_stride: int, warm: bool = False) -> Unit:
    what = f"autotuned head b{batch} {side}x{side}"
    given = (batch, side, output_stride, warm)
    unit = _pytorch(loan, what, gpu_pytorch.autotuned_head, *given)
    if warm:
        name = f"compile {what}"
        # What it makes is found in Triton's cache; as an answer it says nothing.
        return replace(unit, name=name, limit=170.0, alone=False, phase="compile", least=20.0)
    return replace(unit, limit=200.0, least=20.0)


def more_autotuned(loan: Loan) -> list[Unit]:
    """The other heads whose branches are faster by ours."""
    gains = doubts.Known(loan.outcomes.values()).gains("time aspp_branches bfloat16 plain")
    found = []
    for batch, side, output_stride in _HEADS[1:]:
        own = [g for size, g in gains.items() if size.startswith(f"{batch}x2048x{side}x{side}")]
        if loan.listing or any(max(g.values(), default=0) >= 1 for g in own):
            found.append(_autotune(loan, batch, side, output_stride))
    return found


PHASES = (
    Phase("smoke", "every op, backend, dtype and form at small sizes", 38, smoke, 12),
    Phase("rows", "every tile row of the CUDA ASPP, identical runs, variants", 16, row_units, 12),
    Phase("programs", "programs of whole models, checked", 22, program_units, 8),
    Phase("pytorch", "what PyTorch reaches without compilation", 50, pytorch_units),
    Phase("times", "our kernels beside PyTorch's, bf16", 65, time_units),
    Phase("models", "whole models and training steps by the records, forms", 100, model_units),
    Phase("tests", "the GPU tests by file", 80, test_units, 6),
    Phase("sanitizer", "compute-sanitizer on small shapes", 50, sanitizer_units, 5),
    Phase("configurations", "of ASPP and 1x1 at four shapes", 55, first_configurations, 14),
    Phase("autotune", "torch.compile with max-autotune: a head, two models", 40, autotuned),
)  # fmt: skip
# (name, what is known -> what is done).
RULES = (
    Phase("variants", "a variant of the sm_90a code is right: its time beside the default's", 0,
          variant_times),
    Phase("row times", "a row of sm_90a is right, whole and cut: its time at three shapes", 0,
          row_times),
    Phase("autotune", "our branches are faster at a shape: max-autotune of the head there", 0,
          more_autotuned),
    Phase("full", "an op is right at two small sizes: all its sizes", 0, full_checks, 12),
    Phase("dtypes", "an op is right in fp16, fp32 or TF32: its times there", 0, more_times),
    Phase("configurations", "a Triton kernel is faster than PyTorch: its configurations at all "
          "sizes", 0, more_configurations, 14),
    Phase("profiles", "a row of sm_90a is right: what limits it, by ncu", 0, profiles),
)  # fmt: skip


def units_of(phase: Phase, loan: Loan) -> list[Unit]:
    """The units of a phase; one that cannot be planned must not end the others."""
    try:
        return phase.units(loan)
    except Exception:
        if loan.listing:
            raise
        print(f"{phase.name}: cannot be planned\n{traceback.format_exc()}", flush=True)
        return []
