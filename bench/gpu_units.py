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

from . import doubts, gpu_ours, gpu_programs, gpu_pytorch
from .files import ROOT
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
# (backbone, output stride, batch, side), the most telling first.
_MODELS = (("r50", 8, 1, 520), ("r50", 8, 16, 520), ("r50", 16, 16, 513), ("r101", 8, 16, 520))
_STEPS = (("r50", 16, 16, 513), ("r101", 16, 16, 513))


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

    def models(given: Sequence[tuple[str, int, int, int]]) -> None:
        for one in given:
            found.append(_pytorch(loan, f"model {_model_name(*one)}", gpu_pytorch.model, *one))

    def steps(given: Sequence[tuple[str, int, int, int]]) -> None:
        for one in given:
            found.append(
                _pytorch(loan, f"training {_model_name(*one)}", gpu_pytorch.training, *one)
            )

    heads(_HEADS[:2])
    models(_MODELS[:1])
    convolutions(16, 65)
    models(_MODELS[1:2])
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
    models(_MODELS[2:])
    steps(_STEPS[1:])
    return found


def _model_name(backbone: str, output_stride: int, batch: int, side: int) -> str:
    return f"{backbone} os{output_stride} b{batch} {side}"


# What PyTorch is measured on, and by.
_CASES = ("gpu_pytorch", "model_cases", "op_cases", "op_modules", "providers", "registry")


def _pytorch(loan: Loan, what: str, function: Callable[..., dict[str, Any]], *args: object) -> Unit:
    name = f"pytorch {what}"
    source = fingerprint(*(ROOT / "bench" / f"{name}.py" for name in _CASES))
    return _timed(name, partial(function, loan.machine, *args), "pytorch", source)


def _timed(name: str, run: Callable[[], dict[str, Any]], phase: str, source: str) -> Unit:
    return unit(name, run, MEASURE_SECONDS, phase, alone=True, least=LEAST_SECONDS, source=source)


def model_units(loan: Loan) -> list[Unit]:
    """Whole models by the records so far: inference, and a training step."""
    recorded = None if loan.listing else loan.write_records()
    winners = "\n".join(
        sorted(
            f"{r.op} {r.backend} {r.dtype} {r.form} {r.source}"
            for r in loan.records()
            if r.verdict == records.PASSED and any(t.gain >= 1 for t in r.times)
        )
    )
    folders = ROOT / "deeplab_fast", ROOT / "kernels"
    package = sorted(path for folder in folders for path in folder.rglob("*.py"))
    files = [ROOT / "bench" / "gpu_ours.py", *package]
    # Of the package as a whole, and of the kernels that run in it.
    source = f"{fingerprint(*files)}-{digest(winners)}"
    found = []
    for kind, function, given in (
        ("labels", gpu_ours.model, _MODELS[:2]),
        ("training", gpu_ours.training, _STEPS[:1]),
        ("labels", gpu_ours.model, _MODELS[2:]),
        ("training", gpu_ours.training, _STEPS[1:]),
    ):
        for one in given:
            name = f"ours {kind} {_model_name(*one)}"
            run = partial(function, loan.machine, recorded, *one)
            found.append(_timed(name, run, "ours", source))
    return found


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
    """The head by torch.compile with max-autotune."""
    return [_autotune(loan, *_HEADS[0])]


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
    Phase("pytorch", "what PyTorch reaches without compilation", 75, pytorch_units),
    Phase("times", "our kernels beside PyTorch's, bf16", 75, time_units),
    Phase("models", "whole models and training steps by the records", 45, model_units),
    Phase("tests", "the GPU tests by file", 90, test_units, 6),
    Phase("sanitizer", "compute-sanitizer on small shapes", 56, sanitizer_units, 5),
    Phase("configurations", "of ASPP and 1x1 at four shapes", 80, first_configurations, 14),
    Phase("autotune", "torch.compile with max-autotune, one head", 40, autotuned),
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
