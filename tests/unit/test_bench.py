"""The benchmarks themselves: costs, the gate, rows, reports, and what happens when things fail."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

# `pytest` alone, unlike `python -m pytest`, does not look for bench/ in the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import (
    compare,
    costs,
    gate,
    measure,
    providers,
    registry,
    report,
    rows,
    run,
    sanitize,
    worker,
)
from bench.op_cases import OpCase, resnet50_filters
from bench.registry import FORWARD, FORWARD_BACKWARD, Provider, Suite
from deeplab_fast import get_model
from deeplab_fast.dispatch import declare
from deeplab_fast.dispatch.examples import Size
from deeplab_fast.plan.taps import live_taps, output_size
from deeplab_fast.tuning import timing

ROOT = Path(__file__).resolve().parents[2]
SUITE = Suite("quick", "cpu", torch.float32, seconds=0.0, rounds=(2, 2), copies=2)
SMALL = Size(2, 3, 5, 4, 9, 13)


def op_case(op: str, size: Size = SMALL, **options) -> OpCase:
    return OpCase(op=op, size=size, shape="t", suites=(), **options)


def small_project(**options) -> OpCase:
    return op_case("aspp_project", Size(1, 8, 5, 4, filters=6, pooled=4), **options)


# Costs


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [
        (7, 3, 1, 1, 1),  # ordinary
        (7, 3, 1, 2, 2),  # dilated
        (5, 3, 1, 9, 9),  # every tap but the middle one outside
        (9, 3, 2, 1, 1),  # strided
        (10, 7, 3, 2, 1),  # stride that does not divide
        (6, 2, 1, 0, 3),  # no padding
        (1, 3, 1, 36, 36),  # a map of one pixel
        (11, 3, 2, 4, 5),  # strided and dilated
    ],
)
def test_live_taps_by_brute_force(size, kernel, stride, padding, dilation) -> None:
    outputs = range(output_size(size, kernel, stride, padding, dilation))
    inside = [
        0 <= o * stride + k * dilation - padding < size
        for o, k in itertools.product(outputs, range(kernel))
    ]
    assert live_taps(size, kernel, stride, padding, dilation) == sum(inside)


def test_conv_macs_against_a_convolution_of_ones() -> None:
    # Where all is one a convolution adds up one for each live multiply-add; padded with ones it
    # adds up one for each dense one.
    for (h, w), (kh, kw), stride, padding, dilation, groups in (
        ((6, 9), (3, 3), (1, 1), (4, 4), (4, 4), 1),
        ((7, 5), (3, 1), (2, 1), (1, 0), (1, 1), 2),
        ((4, 4), (1, 1), (1, 1), (0, 0), (1, 1), 4),
    ):
        x, weight = torch.ones(2, 4, h, w), torch.ones(8, 4 // groups, kh, kw)
        dense, live = costs.conv_macs(x.shape, weight.shape, stride, padding, dilation)
        assert F.conv2d(x, weight, None, stride, padding, dilation, groups).sum() == live
        padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=1.0)
        assert F.conv2d(padded, weight, None, stride, 0, dilation, groups).sum() == dense


@pytest.mark.parametrize(
    ("side", "rates", "fraction"),
    [
        (65, (12, 24, 36), 0.5784),  # 520 pixels at output stride 8
        (33, (6, 12, 18), 0.5837),  # 513 pixels at output stride 16
        (97, (12, 24, 36), 0.7018),  # 769 pixels at output stride 8
    ],
)
def test_live_fraction_of_the_dilated_branches(side, rates, fraction) -> None:
    dense = live = 0
    for rate in rates:
        d, v = costs.conv_macs(
            (1, 2048, side, side), (256, 2048, 3, 3), (1, 1), (rate, rate), (rate, rate)
        )
        dense, live = dense + d, live + v
    assert round(live / dense, 4) == fraction


def test_resnet50_costs_what_torchvision_publishes() -> None:
    # 178.722 GMAC with the auxiliary head (256 outputs of 3x3x1024 and the 21 of its classifier).
    auxiliary = 65 * 65 * (256 * 9 * 1024 + 21 * 256)
    cost = registry.case("model_logits/r50-os8-520-b1").cost(FORWARD, 4)
    assert (cost.dense_macs + auxiliary) / 1e9 == pytest.approx(178.722, abs=5e-4)


def test_filters_of_resnet50_are_those_of_the_model() -> None:
    with torch.device("meta"):
        model = get_model("deeplabv3_resnet50")
    found = [
        tuple(m.weight.shape)
        for m in model.modules()
        if isinstance(m, nn.Conv2d) and m.bias is None
    ]
    assert sorted(resnet50_filters()) == sorted(found)


def test_costs_of_ops_are_the_bytes_of_their_tensors() -> None:
    case = op_case("aspp_branches", Size(2, 8, 5, 7, filters=4, rates=(2, 6)))
    args = case.setup("cpu", torch.float32)
    tensors = [
        *args.inputs[0],
        *(p for p in args.module.parameters() if p.dim() == 4),
        args.module(*args.inputs[0]),
    ]
    assert case.cost(FORWARD, 4).bytes == sum(t.nbytes for t in tensors)

    loss = op_case("upsample_cross_entropy")
    logits, target = loss.setup("cpu", torch.float32).inputs[0]
    assert loss.cost(FORWARD, 4).bytes == logits.nbytes + target.nbytes
    assert loss.cost(FORWARD_BACKWARD, 4).bytes == 2 * logits.nbytes + target.nbytes


def test_lerps_of_a_separable_interpolation() -> None:
    # Along rows: one for each class, row of logits and output column; then one an output.
    along = [(n, c, y, x) for n in range(2) for c in range(3) for y in range(5) for x in range(13)]
    assert costs.lerps(SMALL) == len(along) + 2 * 3 * 9 * 13


# Registry


def test_quick_has_every_kind_of_work() -> None:
    work = registry.select("quick")
    ops = {case.op for case, _ in work}
    assert {case.kind for case, _ in work} == {"op", "model"}
    assert ops >= {
        "aspp_branches",
        "aspp_project",
        "conv_bn_act",
        "model_labels",
        "model_train",
        "upsample_argmax",
        "upsample_confusion",
        "upsample_cross_entropy",
        "upsample_softmax_add",
    }
    assert {"forward", "forward_backward", "step"} == {mode for _, mode in work}


def test_every_suite_selects_and_patterns_narrow() -> None:
    for name in registry.SUITES:
        assert registry.select(name)
    only = registry.select("gpu", "aspp_head/.* backward")
    assert only and all(c.op == "aspp_head" and m == "backward" for c, m in only)
    with pytest.raises(ValueError, match="not a regular expression"):
        registry.select("cpu", "(")


def test_setup_is_the_same_for_the_same_seed_and_differs_between_sets() -> None:
    case = small_project()
    first, again = (case.setup("cpu", torch.float32, 3, copies=2) for _ in range(2))
    assert torch.equal(first.inputs[0][0], again.inputs[0][0])
    assert not torch.equal(first.inputs[0][0], first.inputs[1][0])
    other = case.setup("cpu", torch.float32, 4)
    assert not torch.equal(first.inputs[0][0], other.inputs[0][0])


def test_setup_rounds_values_to_the_dtype_of_the_case() -> None:
    args = small_project().setup("cpu", torch.bfloat16)
    for t in (*args.inputs[0], *args.module.parameters()):
        assert t.dtype == torch.float32
        assert torch.equal(t, t.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_references_of_all_ops_agree_at_small_odd_shapes(dtype, capsys) -> None:
    # The C++ ops too, where they are built and have the op.
    assert sanitize.check(["reference", "cpu"], "cpu", dtype) == 0
    shown = capsys.readouterr().out
    assert shown.count("reference: ok") == sum(len(c.modes) for c in sanitize.small_cases())


def test_every_declared_op_has_a_case() -> None:
    assert {case.op for case in sanitize.small_cases()} == set(declare.registered_ops())


# The gate


def test_error_of_values_is_a_relative_norm() -> None:
    case, ref = small_project(), torch.tensor([3.0, 4.0])
    found = gate.errors(case, FORWARD, [ref + torch.tensor([0.0, 0.5])], [ref])
    assert found == {"values": pytest.approx(0.1)}


@pytest.mark.parametrize(
    "out",
    [
        torch.tensor([3.0, math.nan]),
        torch.tensor([3.0, math.inf]),
        torch.tensor([3.0]),  # another shape
    ],
    ids=["nan", "inf", "shape"],
)
def test_errors_that_no_limit_allows(out) -> None:
    found = gate.errors(small_project(), FORWARD, [out], [torch.tensor([3.0, 4.0])])
    assert found == {"values": math.inf}


def test_label_errors() -> None:
    case = op_case("upsample_argmax")
    logits = torch.tensor([[1.0, 5.0], [2.0, 3.0], [2.0 - 1e-7, 0.0]]).double()[None, :, None]
    exact = torch.tensor([[[1, 0]]])
    near = torch.tensor([[[2, 0]]])
    wrong = torch.tensor([[[0, 0]]])
    limit = gate.limit(case, FORWARD, "labels", "fp32", 1, None)

    def error(labels: torch.Tensor) -> float:
        return gate.errors(case, FORWARD, [labels], [logits])["labels"]

    assert error(exact) == 0.0
    assert 0.0 < error(near) < limit
    assert error(wrong) > limit
    assert error(torch.tensor([[[3, 0]]])) == math.inf


def test_count_errors() -> None:
    case = op_case("upsample_confusion")
    ref = torch.tensor([[100000, 0], [50000, 50000]])
    one_moved = torch.tensor([[99999, 1], [50000, 50000]])
    lost = torch.tensor([[99999, 0], [50000, 50000]])
    limit = gate.limit(case, FORWARD, "counts", "fp32", 1, None)
    found = [gate.errors(case, FORWARD, [m], [ref])["counts"] for m in (ref, one_moved, lost)]
    assert found[0] == 0.0
    assert 0.0 < found[1] < limit
    assert found[2] == math.inf


def test_low_precision_is_held_to_twice_the_error_of_pytorch() -> None:
    case = small_project()
    alone = gate.limit(case, FORWARD, "values", "bf16", 1, None)
    beside = gate.limit(case, FORWARD, "values", "bf16", 1, 1e-3)
    assert beside == 2e-3 + 2.0**-8 < alone
    # An anchor that is itself far off allows nothing more.
    assert gate.limit(case, FORWARD, "values", "bf16", 1, 1.0) == alone
    assert gate.limit(case, FORWARD, "values", "fp32", 1, 1.0) == case.tolerance("values")


# Measuring


def _provider(name: str, build, baseline: bool = False, missing: str = "") -> Provider:
    return Provider(
        name,
        "made for a test",
        baseline=baseline,
        applies=lambda case, mode: True,
        missing_reason=lambda *_: missing,
        build=build,
        precision=lambda *_: "fp32",
    )


class _Off(nn.Module):
    """A module whose result is off by a relative error."""

    def __init__(self, module: nn.Module, error: float) -> None:
        super().__init__()
        self.module, self.error = module, error

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.module(*inputs) * (1 + self.error)


def _building(error: float):
    def build(case, mode, device, dtype, args):
        module = _Off(args.module, error)
        return providers.runnable(case, mode, args, module, dtype, torch.contiguous_format)

    return build


def _raising(*_):
    raise RuntimeError("out of paper")


def _measured(*chosen: Provider) -> tuple[list[measure.Result], list[rows.Row]]:
    case = small_project()
    results = measure.measure(case, FORWARD, SUITE, chosen, seed=0)
    env = rows.environment("cpu", 0)
    cost = case.cost(FORWARD, 4)
    ceilings = measure.Ceilings(1e9, 1e9)
    return results, list(run.result_rows(env, SUITE, case, FORWARD, results, cost, ceilings))


def test_a_provider_with_a_wrong_result_gets_no_ratio() -> None:
    results, made = _measured(
        registry.provider("eager"),
        _provider("right", _building(1e-7)),
        _provider("wrong", _building(1e-4)),
    )
    assert [r.status for r in results] == ["ok", "ok", "disagrees"]
    by = {name: [r for r in made if r.provider == name] for name in ("right", "wrong")}
    assert {r.agrees for r in by["wrong"]} == {"no"}
    assert {r.agrees for r in by["right"]} == {"yes"}
    assert rows.RATIO in {r.metric for r in by["right"]}
    # Its time is told, as is its error; nothing that praises it.
    assert {r.metric for r in by["wrong"]} == {rows.STATUS, rows.TIME, "error_values"}


def test_a_wrong_baseline_is_no_baseline() -> None:
    results, made = _measured(
        _provider("wrong", _building(1e-3), baseline=True),
        _provider("right", _building(0.0)),
    )
    assert measure.best_baseline(results) is None
    assert rows.RATIO not in {r.metric for r in made}


def test_missing_and_failing_providers_have_rows_with_reasons() -> None:
    results, made = _measured(
        registry.provider("eager"),
        _provider("absent", _raising, missing="it is not installed"),
        _provider("broken", _raising),
    )
    assert [r.status for r in results] == ["ok", "missing", "failed"]
    notes = {r.provider: r.note for r in made if r.metric == rows.STATUS}
    assert notes == {
        "absent": "missing: it is not installed",
        "broken": "failed: RuntimeError: out of paper",
    }


@pytest.mark.parametrize("mode", [FORWARD, FORWARD_BACKWARD])
def test_backends_that_cannot_run_here_are_reported_for_each_op(mode) -> None:
    case = op_case("upsample_cross_entropy", modes=(mode,))
    names = {p.name for p in registry.applicable(case, mode, SUITE)}
    assert {"eager", "channels_last", "autocast", "compile", "triton", "cuda"} <= names
    if not torch.cuda.is_available():
        for name in ("triton", "cuda"):
            assert registry.missing_reason(registry.provider(name), case, mode, SUITE)


def test_left_out_providers_are_missing_with_the_reason() -> None:
    case = small_project(left_out={"quick": {"eager": "it is slow"}})
    reason = registry.missing_reason(registry.provider("eager"), case, FORWARD, SUITE)
    assert reason == "left out of suite quick: it is slow"


def test_nothing_is_begun_when_the_time_is_up() -> None:
    results = measure.measure(
        small_project(),
        FORWARD,
        SUITE,
        [registry.provider("eager"), _provider("other", _raising)],
        seed=0,
        finished=lambda: True,
    )
    assert {(r.status, r.note) for r in results} == {("missing", measure.OUT_OF_TIME)}


def test_rounds_are_interleaved_and_turn() -> None:
    asked = []

    def time_of(call, first, calls) -> float:
        asked.append((call, calls))
        return {"a": 0.01, "b": 0.002}[call]

    runs = {"a": "a", "b": "b"}
    samples = timing.interleaved(runs, time_of, 0.0, (4, 9), sample_seconds=0.01)
    assert {name: len(s) for name, s in samples.items()} == {"a": 4, "b": 4}
    timed = asked[-8:]
    assert [name for name, _ in timed] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    # A sample lasts the time asked for: five calls of 2 ms.
    assert dict(timed) == {"a": 1, "b": 5}


def test_ratios_are_taken_within_rounds() -> None:
    # The machine slows down by ten from the second round on, for both.
    assert timing.ratio([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]) == 2.0


def test_mutated_inputs_are_not_shared() -> None:
    case = op_case("upsample_softmax_add")
    chosen = [registry.provider(name) for name in ("eager", "channels_last", "reference")]
    results = measure.measure(case, FORWARD, SUITE, chosen, seed=0)
    assert [r.status for r in results] == ["ok"] * 3


def test_peak_memory_of_a_child() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the high-water mark of a process cannot be reset on this system")
    case = registry.case("upsample_argmax/65x65x21-520x520-b1")
    with worker.CpuMemory("quick", 0, 1) as memory:
        peak, held, note = memory(case, FORWARD, registry.provider("eager"))
        missing = memory(case, FORWARD, registry.provider("cudagraph"))
    full = 21 * 520 * 520 * 4
    # The full-size logits, the int64 labels, and little else; blocks are counted in pages.
    assert note == ""
    assert full <= peak < 1.25 * full
    assert held < full
    assert missing[:2] == (None, None) and "CUDA" in missing[2]


# Rows


def _row(provider: str = "eager", metric: str = rows.TIME, value: float = 1.5, **kwargs):
    env = kwargs.pop("env", ENVIRONMENT)
    given = {"agrees": "yes", "baseline": provider == "eager", "chosen": provider == "ours"}
    return rows.row(
        env,
        kwargs.pop("suite", "cpu"),
        kwargs.pop("op", "aspp_head"),
        kwargs.pop("case", "os8-65x65-b1"),
        "float32",
        kwargs.pop("mode", FORWARD),
        provider,
        metric,
        value,
        p20=1.0,
        p80=2.0,
        **{**given, **kwargs},
    )


ENVIRONMENT = rows.Environment(
    device="A, 2 cores, AVX2",
    threads=2,
    python="3.11.0",
    torch="2.13.0+cpu",
    triton="3.7.1",
    cuda="",
    commit="0123456789",
    dirty="no",
    date="2026-11-21T20:00:00Z",
    seed=0,
)


def test_rows_survive_the_file(tmp_path) -> None:
    made = [_row(), _row("ours", note='a comma, a "quote"\tand a tab'), _row(value=1.23456789e-7)]
    path = tmp_path / "cpu.csv"
    rows.write(path, made)
    assert rows.read(path) == made
    assert path.read_text("utf-8").splitlines()[0] == ",".join(rows.COLUMNS)
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_other_columns_are_refused(tmp_path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("case,value\na,1\n", "utf-8")
    with pytest.raises(ValueError, match="measure again"):
        rows.read(path)


def test_a_case_measured_again_replaces_its_rows_only(tmp_path) -> None:
    path = tmp_path / "cpu.csv"
    file = rows.RowFile(path)
    file.replace([_row(), _row("ours")])
    file.replace([_row(case="os16-33x33-b1")])
    file = rows.RowFile(path)
    file.replace([_row(value=9.0)])
    kept = {(r.case, r.provider, r.value) for r in rows.read(path)}
    assert kept == {("os8-65x65-b1", "eager", "9"), ("os16-33x33-b1", "eager", "1.5")}


def test_environment_names_the_checkout(monkeypatch) -> None:
    monkeypatch.delenv("DEEPLAB_FAST_BENCH_COMMIT", raising=False)
    env = rows.environment("cpu", 7)
    assert env.torch == torch.__version__ and env.seed == 7
    assert env.dirty in {"yes", "no", ""}
    monkeypatch.setenv("DEEPLAB_FAST_BENCH_COMMIT", "abc")
    assert rows.environment("cpu", 0).commit == "abc"


# Reports


def _file(tmp_path: Path, extra=()) -> Path:
    made = [
        rows.row(
            ENVIRONMENT, "cpu", rows.MACHINE, "matmul-float32-2048", "", "", "", "tflops", 0.1
        ),
        rows.row(ENVIRONMENT, "cpu", rows.MACHINE, "copy-256-MiB", "", "", "", "bandwidth", 20.0),
        _row("eager", value=8.0),
        _row("eager", rows.RATIO, 1.0),
        _row("eager", rows.PEAK, 30.0),
        _row("eager", rows.LIVE, 0.02),
        _row("eager", rows.BANDWIDTH, 2.0),
        _row("ours", value=2.0),
        _row("ours", rows.RATIO, 4.0),
        _row("ours", rows.PEAK, 10.0),
        *extra,
    ]
    path = tmp_path / "cpu.csv"
    rows.write(path, made)
    return path


def test_report_between_markers_is_idempotent(tmp_path) -> None:
    data = _file(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{report.BEGIN}\nstale\n{report.END}\n\nafter\n", "utf-8")
    arguments = [str(data), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    assert "stale" in readme.read_text("utf-8")
    assert report.main(arguments) == 0
    once = readme.read_text("utf-8")
    assert report.main(arguments) == 0
    assert readme.read_text("utf-8") == once
    assert report.main([*arguments, "--check"]) == 0
    assert once.startswith("before\n") and once.endswith("after\n") and "stale" not in once
    assert "| aspp_head os8-65x65-b1 | **8** | 2 (ours) | 4.00x | 30.0 → 10.0 |" in once
    # The conditions of the rows, and what the baseline is.
    for fact in ("A, 2 cores, AVX2", "2 threads", "2.13.0+cpu", "0123456789", "2026-11-21"):
        assert fact in once
    assert registry.provider("eager").description in once


def test_report_refuses_results_that_disagree(tmp_path) -> None:
    wrong = [
        _row("ours", value=1.0, agrees="no", op="conv_bn_act", case="t"),
        _row("ours", rows.STATUS, None, agrees="no", op="conv_bn_act", case="t", note="off by far"),
        _row("eager", value=5.0, op="conv_bn_act", case="t"),
    ]
    found = rows.read(_file(tmp_path, wrong))
    group = next(g for g in report.groups(found) if g.key[1] == "conv_bn_act")
    assert group.value("ours", rows.TIME) is None
    text = report.full_report(found)
    assert "off by far" in text
    lines = "\n".join(report._summary([group]))
    assert "disagrees (ours)" in lines and "Not shown" in lines and "x |" not in lines


def test_report_names_the_strongest_rival_of_each_precision(tmp_path) -> None:
    def figures(provider: str, ms: float, ratio: float, equal: float, note: str = ""):
        given = {
            "suite": "rivals",
            "op": "model_labels",
            "case": "camvid-os16-520-b1",
            "baseline": not provider.startswith("ours"),
            "chosen": provider == "ours-predict",
        }
        yield _row(provider, value=ms, note=note, **given)
        yield _row(provider, rows.RATIO, 4.0 / ms, **given)
        yield _row(provider, rows.PRECISION_RATIO, ratio, **given)
        yield _row(provider, rows.EQUAL, equal, note="7 photos, at least 0.9", **given)
        yield _row(provider, rows.PEAK, ms + 1, **given)
        yield _row(provider, rows.HELD, 10.0, **given)

    made = [
        *figures("channels_last", 9.0, 0.8, 1.0),
        *figures("openvino", 7.0, 1.0, 1.0, "openvino 1.2"),
        *figures("onnxruntime", 8.0, 0.9, 1.0),
        *figures("ours-predict", 5.0, 1.4, 1.0),
        *figures("openvino_int8", 5.0, 0.8, 0.99),
        *figures("onnxruntime_int8", 4.0, 1.0, 0.981234, "onnxruntime 3.4"),
        *figures("ours-predict-int8", 2.0, 2.0, 0.995),
    ]
    made.append(
        _row(
            "ours-predict-bf16",
            rows.STATUS,
            None,
            suite="rivals",
            op="model_labels",
            case="camvid-os16-520-b1",
            agrees="",
            note="missing: no such instructions",
        )
    )
    told_before = _row("eager", value=8.0, op="model_labels", case="camvid-os16-520-b1")
    text = report.readme_table([*rows.read(_file(tmp_path, [told_before])), *made])
    name = "model_labels camvid-os16-520-b1"
    fp32 = f"| {name} | fp32 | openvino | 7 | 100.00% | 5 | 100.00% | 1.40x | 18.0 → 16.0 |"
    int8 = f"| {name} | int8 | onnxruntime_int8 | 4 | 98.12% | 2 | 99.50% | 2.00x | 15.0 → 13.0 |"
    assert fp32 in text and int8 in text
    # Nothing ran in bf16; the case stands in no other suite's table.
    assert text.count(name) == 2
    assert "on 7 photos;" in text
    assert "Missing of deeplab_fast: ours-predict-bf16: no such instructions." in text
    assert "OpenVINO in fp32 (openvino 1.2)" in text and "(onnxruntime 3.4)" in text
    wrong = [dataclasses.replace(r, agrees="no") if r.provider == "openvino" else r for r in made]
    assert f"| {name} | fp32 | onnxruntime | 8 |" in report.readme_table(wrong)


def test_spread_of_two_runs(tmp_path) -> None:
    found = rows.read(_file(tmp_path))
    others = [
        dataclasses.replace(r, value="3.2")
        if r.provider == "ours" and r.metric == rows.RATIO
        else r
        for r in found
    ]
    line, median = report.spread(found, others)
    assert line.split()[-3:] == ["4.000", "3.200", "25.0%"]
    assert median == "median of 1: 25.0% apart"
    with pytest.raises(report.ReportError, match="no ratios"):
        list(report.spread(found, found[:2]))


def test_report_without_markers_or_rows_says_so(tmp_path, capsys) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n", "utf-8")
    assert report.main([str(_file(tmp_path)), "--readme", str(readme)]) == 2
    assert report.BEGIN in capsys.readouterr().err
    assert readme.read_text("utf-8") == "nothing here\n"


def test_report_writes_tables_and_plots(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert report.main([str(_file(tmp_path)), "--out", str(out)]) == 0
    names = {p.name for p in out.iterdir()}
    assert names == {"report.md", "cpu-ratio.svg", "cpu-roofline.svg", "cpu-memory.svg"}
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    assert report.main([str(tmp_path / "cpu.csv"), "--out", str(out)]) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first


# Commands


def test_run_refuses_what_it_cannot_do(capsys, tmp_path) -> None:
    out = ["--out", str(tmp_path)]
    assert run.main(["--suite", "quick"]) == 2
    assert run.main(["--suite", "quick", "-k", "no such case", *out]) == 2
    assert run.main(["--suite", "quick", "--providers", "nobody", *out]) == 2
    if not torch.cuda.is_available():
        assert run.main(["--suite", "gpu", *out]) == 2
    assert "CUDA" in capsys.readouterr().err or torch.cuda.is_available()
    assert list(tmp_path.iterdir()) == []


def test_run_writes_rows_of_a_case(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(measure, "ceilings", lambda suite: (measure.Ceilings(1e9, 1e9), []))
    monkeypatch.setitem(
        registry.SUITES, "quick", dataclasses.replace(registry.SUITES["quick"], rounds=(2, 2))
    )
    arguments = ["--suite", "quick", "--out", str(tmp_path), "-k", "upsample_argmax", "--no-memory"]
    assert run.main([*arguments, "--providers", "eager", "cudagraph", "reference"]) == 0
    found = rows.read(tmp_path / "quick.csv")
    assert {r.provider for r in found} == {"eager", "cudagraph", "reference"}
    metrics = {r.metric for r in found if r.provider == "reference"}
    assert metrics >= {rows.TIME, rows.RATIO, rows.BANDWIDTH, rows.ROOFLINE, "error_labels"}
    assert "upsample_argmax/65x65x21-520x520-b1" in capsys.readouterr().out


def test_compare_names_an_unknown_base(capsys) -> None:
    assert compare.main(["no-such-commit", "-k", "upsample_argmax"]) == 2
    assert "no-such-commit" in capsys.readouterr().err
