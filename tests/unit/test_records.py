"""Records of GPU kernels: the file, what counts where, and what is chosen by them."""

from __future__ import annotations

import ast
import json
import logging
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deeplab_fast as dlf
from deeplab_fast import backends, info, kernels, ops
from deeplab_fast.dispatch import checks, declare, records, sources, trust
from deeplab_fast.dispatch.records import Record, Time

H100 = ("NVIDIA H100 80GB HBM3", (9, 0))
A100 = ("NVIDIA A100-SXM4-80GB", (8, 0))
OP = "upsample_argmax"
SIZES = (16, 21, 65, 65, 520, 520)
TIME = Time(SIZES, 0.5, 1.0, "interpolate, argmax", 2.0)


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file of one's own records, not there yet; none are shipped, all backends can run."""
    path = tmp_path / "own" / "records.json"
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(path))
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(trust, "source", lambda op, backend, capability: f"{op}-{backend}")
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(trust, "_first_uses", {})
    table = {
        name: replace(found, not_supported_reasons=lambda desc: [])
        for name, found in backends.implementations(OP).items()
        if name != "cpu"
    }
    monkeypatch.setitem(declare._implementations, OP, table)
    trust.forget()
    yield path
    trust.forget()


def record(**changes: Any) -> Record:
    versions = records.Versions.here()
    found = Record(
        OP, "triton", "bfloat16", "plain", H100[1], f"{OP}-triton", records.PASSED, "", H100[0],
        versions.driver, versions.torch, versions.triton, "2026-11-27", times=(TIME,),
    )  # fmt: skip
    if changes.get("backend") == "cuda":
        changes.setdefault("source", f"{OP}-cuda")
    return replace(found, **changes)


def write(path: Path, *found: Record) -> None:
    records.write(path, found)
    trust.forget()


def call(gpu: tuple[str, tuple[int, int]] = H100, n: int = 16) -> backends.OpDesc:
    """A call of the op on a GPU."""
    logits = torch.empty(n, 21, 65, 65, dtype=torch.bfloat16, device="meta")
    desc = ops.describe(OP, logits, (520, 520))
    return replace(desc, device="cuda", gpu=gpu[0], capability=gpu[1])


def chosen(**options: Any) -> str:
    return backends.select(call(**options)).backend


def said(backend: str = "triton", **options: Any) -> str:
    (line,) = [
        line for line in str(backends.explain(call(**options))).splitlines() if backend in line[:12]
    ]
    return line


# What is chosen.


def test_without_a_record_pytorch_runs_and_why_says_what_to_do() -> None:
    assert chosen() == "reference"
    assert "not checked on compute capability 9.0; `deeplab-fast tune` checks" in said()
    with dlf.use_backend("triton"):
        assert chosen() == "triton"
        assert said().startswith("-> triton")


def test_a_pass_and_a_gain_here_are_chosen(own: Path) -> None:
    write(own, record())
    assert chosen() == "triton"
    line = said()
    for part in ("-> triton", "2.00x PyTorch's interpolate, argmax", H100[0], "2026-11-27"):
        assert part in line
    assert "yours" in line


def test_the_fastest_of_several_is_chosen(own: Path) -> None:
    faster = replace(TIME, gain=3.0)
    write(own, record(), record(backend="cuda", times=(faster,)))
    assert chosen() == "cuda"
    write(own, record(times=(faster,)), record(backend="cuda"))
    assert chosen() == "triton"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        pytest.param({"times": (replace(TIME, gain=0.9),)}, "passed, slower: 0.90x", id="slower"),
        pytest.param({"times": ()}, "passed, not measured", id="not measured"),
        pytest.param(
            {"verdict": records.FAILED, "reason": "result 0 is off by 1"},
            "failed its checks: result 0 is off by 1",
            id="failed",
        ),
        pytest.param({"source": "before"}, "its sources are not those", id="other sources"),
        pytest.param(
            {"dtype": "float16"}, "not checked on compute capability 9.0", id="other dtype"
        ),
        pytest.param(
            {"form": "return_prob"}, "not checked on compute capability 9.0", id="other form"
        ),
        pytest.param(
            {"backend": "cuda", "capability": (8, 0)},
            "there are records for 8.0",
            id="compiled, passed elsewhere",
        ),
        pytest.param(
            {"backend": "cuda", "driver": "1"},
            "checked with another driver, PyTorch or Triton",
            id="compiled, another driver",
        ),
    ],
)
def test_what_does_not_speak_for_a_kernel(changes: dict, text: str, own: Path) -> None:
    write(own, record(**changes))
    assert chosen() == "reference"
    assert text in said(changes.get("backend", "triton"))


def test_the_nearest_size_answers_for_others(own: Path) -> None:
    small = Time((1, 21, 65, 65, 520, 520), 2.0, 1.0, "interpolate, argmax", 0.5)
    write(own, record(times=(TIME, small)))
    assert [chosen(n=n) for n in (1, 2, 8, 64)] == ["reference", "reference", "triton", "triton"]
    assert "at [16, 21, 65, 65, 520, 520], the nearest measured" in said(n=8)


def test_one_s_own_go_before_shipped_ones(own: Path) -> None:
    write(records.SHIPPED, record())
    assert chosen() == "triton" and "shipped" in said()
    write(own, record(verdict=records.FAILED, reason="it hangs here"))
    assert chosen() == "reference" and "it hangs here" in said()


def test_this_model_s_record_goes_before_another_of_its_capability(own: Path) -> None:
    h200 = record(gpu="NVIDIA H200", times=(replace(TIME, gain=0.5),))
    write(own, h200, record())
    assert chosen() == "triton"
    assert chosen(gpu=("NVIDIA H200", (9, 0))) == "reference"


def test_shipped_records_hold_for_a_minor_version_of_triton(own: Path, monkeypatch) -> None:
    """And for any driver and PyTorch; what was compiled ahead for any Triton."""
    monkeypatch.setattr(records, "installed_triton", lambda: "3.6.2")
    asked = []
    monkeypatch.setattr(trust, "first_use_problem", lambda *given: asked.append(given) or "")
    write(records.SHIPPED, record(driver="1", torch="1", triton="3.6.0"))
    assert chosen() == "triton" and not asked
    write(records.SHIPPED, record(driver="1", torch="1", triton="3.5.0"))
    assert chosen() == "triton" and len(asked) == 1
    write(records.SHIPPED, record(driver="1", torch="1", triton="3.5.0", backend="cuda"))
    assert chosen() == "cuda" and len(asked) == 1


def test_records_can_be_switched_off(own: Path, monkeypatch) -> None:
    write(own, record())
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, "0")
    trust.forget()
    assert chosen() == "reference"
    assert any("left unread" in line for line in info._records())


def test_pytorch_s_own_kernels_need_no_record() -> None:
    x = torch.empty(1, 64, 9, 9, dtype=torch.bfloat16, device="meta")
    vector = torch.empty(32, device="meta")
    weight = torch.empty(32, 64, 3, 3, dtype=torch.bfloat16, device="meta")
    desc = ops.describe("conv_bn_act", x, weight, vector, vector, padding=1)
    desc = replace(desc, device="cuda", capability=(9, 0), gpu=H100[0])
    table = backends.implementations("conv_bn_act")
    # That of the CPU takes no CUDA tensor.
    without = [name for name, i in table.items() if not i.needs_record(desc)]
    assert without == ["reference", "cpu", "cuda"]
    assert table["cpu"].not_supported_reasons(desc)


# The check at first use.


@pytest.mark.parametrize("problem", ["", "off by 1"])
def test_triton_that_passed_elsewhere_is_checked_once(problem, own, monkeypatch, caplog) -> None:
    asked: list[tuple[str, ...]] = []

    def check(*given: str) -> str:
        asked.append(given)
        # Meanwhile another kernel serves.
        assert chosen(gpu=A100) == "reference"
        return problem

    monkeypatch.setattr(checks, "first_use_problem", check)
    write(own, record())
    with caplog.at_level(logging.WARNING, "deeplab_fast"):
        assert [chosen(gpu=A100) for _ in range(3)] == ["reference" if problem else "triton"] * 3
    assert asked == [(OP, "triton", "bfloat16", "plain")]
    assert ("off by 1" in caplog.text) == bool(problem)


def test_why_and_info_do_not_run_the_check(own: Path, monkeypatch) -> None:
    monkeypatch.setattr(trust, "first_use_problem", lambda *given: pytest.fail("it ran"))
    write(own, record())
    assert backends.explain(call(gpu=A100)).chosen == "triton"
    assert "checked here at first use" in said(gpu=A100)


def test_no_check_during_a_capture(own: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    write(own, record())
    assert chosen(gpu=A100) == "reference"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(checks, "first_use_problem", lambda *given: "")
    assert chosen(gpu=A100) == "triton"


def test_the_check_at_first_use_computes(monkeypatch) -> None:
    """On the CPU, with a right and a wrong implementation."""
    table = backends.implementations("batch_stats")
    right = table["reference"].run
    monkeypatch.setattr(checks, "FIRST_USE_DEVICE", "cpu")
    for run, text in ((right, ""), (lambda *args: [t + 1 for t in right(*args)], "is off by")):
        fake = replace(table["reference"], run=run)
        monkeypatch.setitem(declare._implementations, "batch_stats", {**table, "triton": fake})
        problem = checks.first_use_problem("batch_stats", "triton", "bfloat16", "plain")
        assert text in problem and bool(text) == bool(problem)


# Facts of calls.


def test_forms_and_sizes_of_calls() -> None:
    desc = backends.OpDesc(
        "op", "cuda", torch.float32, (2, 3, 4, 5),
        {"act": "relu", "residual": True, "flip": False, "reduction": "mean", "weight": (7, 3, 1),
         "classes": 9, "align_corners": True, "target_dtype": torch.int64},
    )  # fmt: skip
    assert trust.form(desc) == "classes+relu+residual"
    assert trust.sizes(desc) == (2, 3, 4, 5, 7, 3, 1, 9)
    assert trust.form(replace(desc, params={})) == "plain"


@pytest.mark.parametrize(
    ("op", "dtype", "tf32", "name"),
    [
        pytest.param("aspp_branches", torch.float32, True, "tf32", id="a product, rounded"),
        pytest.param("aspp_branches", torch.float32, False, "float32", id="a product, exact"),
        pytest.param("bn_act", torch.float32, True, "float32", id="no product"),
        pytest.param("aspp_branches", torch.bfloat16, True, "bfloat16", id="half"),
    ],
)
def test_names_of_dtypes(op: str, dtype: torch.dtype, tf32: bool, name: str) -> None:
    desc = backends.OpDesc(op, "cuda", dtype, (1, 1, 1, 1))
    assert trust.dtype_name(desc, tf32) == name


# The file.


def test_what_is_written_is_read(own: Path) -> None:
    config = records.Config("pointwise", {"groups": 1}, {"block_m": 64}, 1.1)
    found = [record(configs=(config,)), record(backend="cuda", verdict="failed", reason="crashed")]
    records.write(own, found, "two")
    assert sorted(records.read(own), key=lambda r: r.backend, reverse=True) == found
    assert records.note(own) == "two"
    assert [p.name for p in own.parent.iterdir()] == ["records.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param('{"version": 1, ', "cannot be read", id="cut off"),
        pytest.param("[]", 'no object with a list of "records"', id="a list"),
        pytest.param('{"version": 1}', 'no object with a list of "records"', id="no records"),
        pytest.param('{"version": 9, "records": []}', "version 9, here it is 1", id="version"),
        pytest.param("[" * 100000, "cannot be read", id="deeply nested"),
    ],
)
def test_a_file_that_cannot_be_read_is_said_once(text, reason, own: Path, caplog) -> None:
    own.parent.mkdir()
    own.write_text(text)
    with caplog.at_level(logging.WARNING, "deeplab_fast"):
        assert [chosen() for _ in range(3)] == ["reference"] * 3
    (line,) = [r.getMessage() for r in caplog.records]
    assert reason in line and str(own) in line and "deeplab-fast tune" in line


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"speed": 1}, "unknown field speed", id="unknown"),
        pytest.param({"source": None}, "source is None, expected str", id="null"),
        pytest.param({"capability": [9]}, "capability is [9], expected 2 values", id="one number"),
        pytest.param({"capability": [9, True]}, "expected int", id="bool"),
        pytest.param({"verdict": "maybe"}, "verdict is 'maybe'", id="verdict"),
        pytest.param({"times": [{"ms": 1.0}]}, "Time: missing field", id="nested"),
        pytest.param({"error": float("nan")}, "error is nan, expected a number", id="nan"),
        pytest.param({"bound": float("inf")}, "bound is inf, expected a number", id="inf"),
        pytest.param({"error": 10**400}, "expected", id="an integer beyond floats"),
        pytest.param({"capability": [9, -5]}, "expected a number of at least -1", id="negative"),
    ],
)
def test_a_record_that_does_not_fit_is_left_out(change, reason, own: Path, caplog) -> None:
    records.write(own, [record(), record(backend="cuda")])
    content = json.loads(own.read_text())
    content["records"][1].update(change)
    own.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "deeplab_fast"):
        (kept,) = records.read(own)
    assert kept.backend == "cuda"
    assert reason in caplog.text and "record 1 is left out" in caplog.text


def test_a_later_record_replaces_and_keeps_what_it_did_not_measure() -> None:
    other = replace(TIME, sizes=(1, *SIZES[1:]))
    old, new = record(times=(TIME, other)), record(times=(replace(TIME, gain=5.0),))
    (found,) = records.merged([old], [new])
    assert {t.sizes: t.gain for t in found.times} == {SIZES: 5.0, other.sizes: 2.0}
    failed = replace(new, verdict="failed", times=())
    assert records.merged([old], [failed]) == [failed]
    # Of other GPUs, versions and checkouts each has its own.
    for changes in (
        {"gpu": "NVIDIA H200"}, {"driver": "2"}, {"torch": "2"}, {"triton": "2"}, {"source": "2"},
    ):  # fmt: skip
        assert len(records.merged([old], [record(**changes)])) == 2
    many = [record(source=f"s{i}") for i in range(20)]
    assert [r.source for r in records.merged([], many)] == [f"s{i}" for i in range(12, 20)]


def test_two_environments_keep_their_records(own: Path) -> None:
    """What is tuned beside one PyTorch does not undo what was beside another."""
    write(own, record())
    records.update(own, [record(torch="9.9", verdict=records.FAILED, reason="wrong there")])
    trust.forget()
    assert chosen() == "triton"


def test_of_two_that_count_the_later_does(own: Path) -> None:
    early = record(backend="cuda", driver="1", date="2026-11-01")
    late = record(backend="cuda", driver="2", date="2026-12-01", verdict="failed", reason="hangs")
    write(records.SHIPPED, early, late)
    assert chosen() == "reference"
    write(records.SHIPPED, replace(early, date="2026-12-02"), late)
    assert chosen() == "cuda"


def _update(path: str, number: int) -> None:
    records.update(Path(path), [record(dtype=f"d{number}")])


def test_two_processes_may_write_at_once(own: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_update, args=(str(own), i)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert {r.dtype for r in records.read(own)} == {f"d{i}" for i in range(8)}


def test_a_failed_write_leaves_the_file(own: Path, monkeypatch) -> None:
    records.write(own, [record()])
    before = own.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        records.write(own, [])
    assert own.read_bytes() == before
    assert [p.name for p in own.parent.iterdir()] == ["records.json"]


@pytest.mark.parametrize(
    ("variables", "path"),
    [
        pytest.param({"XDG_CACHE_HOME": "/c"}, "/c/deeplab_fast/records.json", id="cache folder"),
        pytest.param({"XDG_CACHE_HOME": "c"}, "/h/.cache/deeplab_fast/records.json", id="relative"),
        pytest.param({}, "/h/.cache/deeplab_fast/records.json", id="none"),
        pytest.param({records.ENVIRONMENT_VARIABLE: "/f.json"}, "/f.json", id="named"),
    ],
)
def test_where_one_s_own_lie(variables: dict[str, str], path: str, monkeypatch) -> None:
    for name in ("XDG_CACHE_HOME", records.ENVIRONMENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert records.own_path() == Path(path)


def test_what_ships_is_readable_and_says_so_where_it_is_empty() -> None:
    shipped = Path(records.__file__).with_name("shipped.json")
    found = records.read(shipped)
    assert all(r.capability >= (8, 0) and r.commit and r.source for r in found)
    if not found:
        assert "no kernel of this version has run on a GPU" in records.note(shipped)


# Fingerprints.


def test_a_fingerprint_is_of_code(tmp_path: Path) -> None:
    file = tmp_path / "a.py"

    def of(text: str) -> str:
        file.write_text(text)
        return sources.of_files([file])

    first = of(
        '"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n    # why\n    return "# x"  # because\n'
    )
    assert first == of('def f(x):\n\n    return "# x"\n')
    assert first != of('def f(x):\n    return "# y"\n')
    assert of('def f(): "doc"\n') != of("def f(): pass\n")
    file = tmp_path / "a.cu"
    first = of('// why\nint f(int x) { return "//"[x]; } /* and\n more */\n')
    assert first == of('int f(int x)\n{ return "//"[x];\n}')
    assert first != of('int f(int x) { return "/"[x]; }')
    assert sources.of_files([tmp_path / "missing.py"]) == ""


def test_a_compiled_fingerprint_follows_headers(tmp_path: Path) -> None:
    for name in sources.COMPILED.values():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#include "deeplab_fast/common.cuh"\n')
    header = tmp_path / "csrc/include/deeplab_fast/common.cuh"
    header.parent.mkdir(parents=True)
    header.write_text('#include "other.cuh"\n')
    other = header.with_name("other.cuh")
    other.write_text("int a;")
    before = sources.compiled(tmp_path)
    other.write_text("int b;")
    after = sources.compiled(tmp_path)
    assert all(before.values()) and not set(before.values()) & set(after.values())


def test_every_gpu_kernel_has_sources(monkeypatch) -> None:
    for op in backends.registered_ops():
        for backend, implementation in backends.implementations(op).items():
            if backend in ("triton", "cuda") and not implementation.is_pytorch:
                assert sources.family(declare.sources_of(op), backend), f"{op} {backend}"
    root = Path(sources.__file__).resolve().parents[2]
    if (root / "csrc").is_dir():
        assert all(sources.compiled(root).values())
    assert all(sources.of_triton(name) for name in sources.TRITON)


def test_sources_of_triton_kernels_are_closed_under_imports() -> None:
    """Device code of another module is a part of the kernel, as are the indices it computes."""
    folder = Path(kernels.__file__).parent
    for name, files in sources.TRITON.items():
        for file in files:
            if not file.endswith("_kernels.py"):
                continue
            tree = ast.parse((folder / Path(file).name).read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.level and node.module:
                    base = ("kernels", "deeplab_fast")[node.level - 1]
                    module = f"{base}/{node.module.replace('.', '/')}.py"
                    assert module in files, f"{name}: {file} {module}"


def test_the_module_needs_the_standard_library_alone() -> None:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('s', {sources.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# info.


def test_info_before_and_after(own: Path) -> None:
    before = "\n".join(info._records())
    assert "none; `deeplab-fast tune` makes them" in before
    write(own, record(), record(backend="cuda", verdict="failed", reason="killed after 45 s"))
    after = "\n".join(info._records())
    assert f"{H100[0]} (9.0): 2 kernels, 1 passed, 1 faster than PyTorch" in after
    assert "failed: upsample_argmax cuda bfloat16 plain: killed after 45 s" in after
    assert str(own) in after
