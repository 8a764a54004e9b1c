"""The upsampling ops that give labels, counts and sums: argmax, confusion, softmax_add."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import _ext, backends, ops, reference
from deeplab_fast.testing import cpu_instruction_sets, deterministic, threads

OPS = torch.ops.deeplab_fast
# Unit roundoff of float32.
U = 2.0**-24

# (N, C, h, w), (H, W)
SHAPES = [
    pytest.param((1, 21, 5, 6), (40, 48), id="up by 8"),
    pytest.param((2, 21, 9, 7), (65, 50), id="no integer ratio, not square, batch"),
    pytest.param((1, 5, 33, 20), (17, 9), id="down, rows without outputs"),
    pytest.param((1, 4, 5, 40), (33, 17), id="up and down"),
    pytest.param((1, 7, 6, 6), (7, 7), id="ratio close to 1: sources do not fit one vector"),
    pytest.param((2, 3, 6, 9), (6, 9), id="ratio 1"),
    pytest.param((2, 3, 1, 1), (5, 6), id="one source pixel"),
    pytest.param((1, 3, 4, 5), (1, 1), id="one output pixel"),
    pytest.param((1, 3, 2, 2), (150, 70), id="bands cut into parts"),
    pytest.param((1, 1, 3, 2), (9, 9), id="1 class"),
    pytest.param((1, 2, 3, 2), (9, 9), id="2 classes"),
    pytest.param((1, 150, 3, 5), (40, 50), id="150 classes"),
    pytest.param((1, 300, 3, 4), (9, 11), id="300 classes: wide labels"),
    pytest.param((0, 4, 3, 3), (7, 7), id="no image"),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, ::3],
    "transposed": lambda x: x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INSTRUCTION_SETS = cpu_instruction_sets()
every_shape = pytest.mark.parametrize(("shape", "size"), SHAPES)
compiled_sets = pytest.mark.parametrize("implementation", INSTRUCTION_SETS, indirect=True)
both_alignments = pytest.mark.parametrize(
    "align_corners", [False, True], ids=["centres", "corners"]
)


def interpolation_error(x: Tensor, size: tuple[int, int], align_corners: bool) -> float:
    """What an upsampled logit of `x` may be off, by design's rule: twice the error of PyTorch's
    own path, and one rounding per operation (two products and a sum, along rows and columns).
    """
    exact = reference.upsample(x.double(), size, align_corners)
    if x.dtype == torch.float64 or exact.numel() == 0:
        return 1e-12
    error = (reference.upsample(x.float(), size, align_corners) - exact).abs().max()
    return 2 * error.item() + 6 * U * x.abs().max().item()


def softmax_error(x: Tensor, size: tuple[int, int], align_corners: bool) -> float:
    """What a probability may be off: 2 max|dz|, an exponential within 2.2 roundings, the sum of C
    terms and the division.
    """
    if x.dtype == torch.float64:
        return 1e-12
    return 2 * interpolation_error(x, size, align_corners) + (x.shape[1] + 6) * U


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)


def make_target(n: int, size: tuple[int, int], classes: int, ignore_index: int = 255) -> Tensor:
    target = torch.randint(0, classes, (n, *size))
    return torch.where(torch.rand(n, *size) < 0.2, ignore_index, target)


class TestArgmax:
    @staticmethod
    def check(x: Tensor, size: tuple[int, int], align_corners: bool) -> None:
        labels, prob = ops.upsample_argmax(x, size, align_corners=align_corners, return_prob=True)
        assert labels.shape == prob.shape == (x.shape[0], *size)
        assert labels.dtype == (torch.uint8 if x.shape[1] <= 256 else torch.int64)
        assert prob.dtype == reference.compute_dtype(x.dtype)
        full = reference.upsample(x.double(), size, align_corners)
        # Two logits are compared, each off by its error; another class may win by that much.
        chosen = full.gather(1, labels.long()[:, None])
        slack = 2 * interpolation_error(x, size, align_corners)
        assert (full.amax(1, keepdim=True) - chosen <= slack).all()
        expected = full.softmax(1).amax(1)
        tolerance = softmax_error(x, size, align_corners)
        torch.testing.assert_close(prob.double(), expected, rtol=0, atol=tolerance)
        without = ops.upsample_argmax(x, size, align_corners=align_corners)
        assert torch.equal(without, labels)

    @compiled_sets
    @both_alignments
    @every_shape
    def test_against_float64(self, implementation, shape, size, align_corners) -> None:
        self.check(make(shape), size, align_corners)

    @both_alignments
    @every_dtype
    def test_dtypes(self, implementation, dtype, align_corners) -> None:
        self.check(make((2, 21, 9, 7), dtype), (65, 50), align_corners)

    @every_layout
    def test_layouts_give_the_same_bits(self, compiled, layout) -> None:
        x = make((2, 21, 9, 7))
        expected = ops.upsample_argmax(x, (65, 50), return_prob=True)
        for got, want in zip(
            ops.upsample_argmax(layout(x), (65, 50), return_prob=True), expected, strict=True
        ):
            assert torch.equal(got, want)
            assert got.is_contiguous()

    @both_alignments
    @pytest.mark.parametrize("size", [(6, 9), (48, 72), (31, 40)], ids=str)
    def test_the_first_of_equal_logits_wins(self, implementation, size, align_corners) -> None:
        """Equal maps are interpolated equally. Small integers at ratio 1 are exact anyway."""
        x = torch.randint(-2, 3, (2, 4, 6, 9)).float()
        x = x.repeat(1, 2, 1, 1)
        labels = ops.upsample_argmax(x, size, align_corners=align_corners)
        assert labels.max() < 4
        if size == (6, 9):
            assert torch.equal(labels.long(), x.argmax(1))
        constant = torch.zeros(1, 5, 3, 3)
        assert not ops.upsample_argmax(constant, size, align_corners=align_corners).any()

    def test_signed_zeros_are_equal(self, implementation) -> None:
        x = torch.tensor([-0.0, 0.0, -0.0]).view(1, 3, 1, 1)
        assert not ops.upsample_argmax(x, (2, 9)).any()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    def test_not_finite_logits_as_torch(self, implementation, value) -> None:
        """Equal neighbours keep infinity out of `inf - inf`; NaN counts as the largest."""
        x = make((1, 6, 4, 5))
        x[0, 2] = value
        x[0, 4, 1:3, 2:] = value
        full = reference.upsample(x, (4, 5), False)
        assert torch.equal(ops.upsample_argmax(x, (4, 5)).long(), full.argmax(1))
        full = reference.upsample(x, (31, 40), False)
        chosen = full.gather(1, ops.upsample_argmax(x, (31, 40)).long()[:, None])[:, 0]
        best = full.amax(1)
        assert torch.equal(chosen.isnan(), best.isnan())
        finite = best.isfinite()
        torch.testing.assert_close(chosen[finite], best[finite])
        where = full.isnan()
        first = torch.where(where.any(1), where.int().argmax(1), -1)
        labels = ops.upsample_argmax(x, (31, 40)).long()
        assert torch.equal(labels[first >= 0], first[first >= 0])

    def test_thread_count_changes_nothing(self, compiled) -> None:
        x = make((2, 21, 17, 15))
        with threads(1):
            one = ops.upsample_argmax(x, (130, 120), return_prob=True)
        with threads(2):
            two = ops.upsample_argmax(x, (130, 120), return_prob=True)
        assert all(map(torch.equal, one, two))


class TestProbabilitiesOfNoNumbers:
    """Labels, the top probability and the sum of all, as of the upsampled logits in PyTorch."""

    @pytest.mark.parametrize(
        "size",
        [(8, 10), (4, 5), (8, 5), (4, 10)],
        ids=["up", "ratio 1: no neighbours", "ratio 1 of columns", "ratio 1 of rows"],
    )
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    @pytest.mark.parametrize(
        "classes", [slice(2, 3), slice(None)], ids=["one class", "all classes"]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_as_torch(self, implementation, dtype, classes, value, size) -> None:
        x = make((2, 6, 4, 5)).to(dtype)
        x[0, classes, 1, 2] = value
        labels, prob = ops.upsample_argmax(x, size, return_prob=True)
        full = F.interpolate(x.float(), size, mode="bilinear")
        softmax = full.softmax(1)
        assert torch.equal(
            labels.long()[softmax[:, 0].isnan()], full.argmax(1)[softmax[:, 0].isnan()]
        )
        torch.testing.assert_close(prob, softmax.amax(1), equal_nan=True)
        for flip in (False, True):
            accumulator = torch.zeros(2, 6, *size)
            ops.upsample_softmax_add(accumulator, x, flip=flip)
            expected = softmax.flip(-1) if flip else softmax
            torch.testing.assert_close(accumulator, expected, equal_nan=True)


class TestConfusion:
    @staticmethod
    def expected(x: Tensor, target: Tensor, ignore_index: int, **options: bool) -> Tensor:
        """Counts of the labels that upsample_argmax gives."""
        labels = ops.upsample_argmax(x, target.shape[1:], **options).long()
        matrix = torch.zeros(x.shape[1], x.shape[1], dtype=torch.int64)
        for t, p in zip(target.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if t != ignore_index:
                matrix[t, p] += 1
        return matrix

    @compiled_sets
    @both_alignments
    @every_shape
    def test_counts(self, implementation, shape, size, align_corners) -> None:
        ignore = 255 if shape[1] <= 255 else -1
        x, target = make(shape), make_target(shape[0], size, shape[1], ignore)
        matrix = ops.upsample_confusion(x, target, ignore_index=ignore, align_corners=align_corners)
        assert matrix.dtype == torch.int64
        expected = self.expected(x, target, ignore, align_corners=align_corners)
        assert torch.equal(matrix, expected)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
    @pytest.mark.parametrize("ignore_index", [255, 1], ids=["outside", "a class"])
    def test_label_dtypes_and_ignored_class(self, implementation, dtype, ignore_index) -> None:
        x, target = make((2, 4, 5, 5)), make_target(2, (23, 31), 4, ignore_index).to(dtype)
        # Strided labels too.
        target = target.transpose(1, 2).contiguous().transpose(1, 2)
        matrix = ops.upsample_confusion(x, target, ignore_index=ignore_index)
        assert torch.equal(matrix, self.expected(x, target, ignore_index))

    @pytest.mark.parametrize("ignore_index", [257, -255], ids=["above", "negative"])
    def test_uint8_labels_do_not_wrap_to_ignore_index(self, implementation, ignore_index) -> None:
        """257 and -255 are 1 in eight bits; class 1 is not ignored."""
        x, target = make((1, 3, 5, 5)), make_target(1, (9, 11), 3, 1).to(torch.uint8)
        assert (target == 1).any()
        matrix = ops.upsample_confusion(x, target, ignore_index=ignore_index)
        assert torch.equal(matrix, self.expected(x, target, ignore_index))

    def test_more_classes_than_tables_for_each_thread(self, compiled) -> None:
        """6000^2 counts take 288 MB: the threads share one table."""
        x = torch.zeros(1, 6000, 1, 1)
        x[0, 4321] = 1
        target = torch.full((1, 2, 3), 5999)
        matrix = ops.upsample_confusion(x, target)
        assert matrix[5999, 4321] == matrix.sum() == 6

    def test_not_finite_logits(self, implementation) -> None:
        x, target = make((1, 4, 5, 5)), make_target(1, (23, 31), 4)
        x[0, 2, 1, 1] = float("nan")
        assert torch.equal(ops.upsample_confusion(x, target), self.expected(x, target, 255))

    def test_thread_count_changes_nothing(self, compiled) -> None:
        x, target = make((2, 21, 17, 15)), make_target(2, (130, 120), 21)
        with threads(1):
            one = ops.upsample_confusion(x, target)
        with threads(2):
            assert torch.equal(ops.upsample_confusion(x, target), one)


ACCUMULATORS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "view": lambda x: F.pad(x, (3, 2, 1, 1))[:, :, 1:-1, 3:-2],
    "reversed classes last": lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
}


class TestSoftmaxAdd:
    @staticmethod
    def check(accumulator: Tensor, x: Tensor, flip: bool, align_corners: bool) -> None:
        before = accumulator.double().clone()
        size = accumulator.shape[-2:]
        result = ops.upsample_softmax_add(accumulator, x, flip=flip, align_corners=align_corners)
        assert result is accumulator
        prob = reference.upsample(x.double(), size, align_corners).softmax(1)
        expected = before + (prob.flip(-1) if flip else prob)
        # The sum is below 2 and rounded once more.
        tolerance = softmax_error(x, size, align_corners)
        tolerance += 0 if accumulator.dtype == torch.float64 else 2 * U
        torch.testing.assert_close(accumulator.double(), expected, rtol=0, atol=tolerance)

    @compiled_sets
    @pytest.mark.parametrize("flip", [False, True], ids=["as is", "flipped"])
    @both_alignments
    @every_shape
    def test_against_float64(self, implementation, shape, size, align_corners, flip) -> None:
        accumulator = torch.rand(*shape[:2], *size)
        self.check(accumulator, make(shape), flip, align_corners)

    @every_dtype
    @pytest.mark.parametrize("to", [torch.float32, torch.float64], ids=str)
    def test_dtypes(self, implementation, dtype, to) -> None:
        self.check(torch.rand(2, 21, 29, 35).to(to), make((2, 21, 5, 4), dtype), True, False)

    @compiled_sets
    @every_layout
    @pytest.mark.parametrize("place", ACCUMULATORS.values(), ids=ACCUMULATORS)
    def test_layouts(self, implementation, layout, place) -> None:
        accumulator = place(torch.rand(2, 5, 29, 35))
        self.check(accumulator, layout(make((2, 5, 5, 4))), True, False)

    def test_writes_nothing_around_a_view(self, implementation) -> None:
        canvas = torch.zeros(2, 5, 33, 40)
        ops.upsample_softmax_add(canvas[:, :, 2:-2, 3:-4], make((2, 5, 5, 4)))
        assert canvas[:, :, 2:-2, 3:-4].min() > 0
        canvas[:, :, 2:-2, 3:-4] = 0
        assert not canvas.any()

    def test_shared_memory_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"share memory; pass a clone\(\)"):
            ops.upsample_softmax_add(torch.zeros(1, 1, 8, 8).expand(1, 3, 8, 8), make((1, 3, 2, 2)))

    def test_thread_count_changes_nothing(self, compiled) -> None:
        x = make((2, 21, 17, 15))
        results = []
        for count in (1, 2):
            with threads(count):
                results.append(ops.upsample_softmax_add(torch.ones(2, 21, 130, 120), x))
        assert torch.equal(*results)


@compiled_sets
def test_exponential_and_logarithm_are_within_their_bound(implementation) -> None:
    """The documented 1.1 and 1 units in the last place, on a dense sample."""

    def error(got: Tensor, exact: Tensor) -> float:
        unit = torch.exp2(torch.floor(torch.log2(exact.abs())) - 23)
        return ((got.double() - exact) / unit).abs().max().item()

    x = torch.cat([torch.linspace(-87.3, 0, 1_000_001), -torch.logspace(-9, 1.9, 200_001)])
    x = x[x >= -87.3]
    assert error(OPS._exp_nonpositive_cpu(x), x.double().exp()) <= 1.1
    special = OPS._exp_nonpositive_cpu(torch.tensor([float("nan"), float("-inf"), -88.0, 0.0]))
    assert special[0].isnan()
    assert special[1:].tolist() == [0, 0, 1]
    x = torch.cat([torch.linspace(1, 4, 500_001)[1:], torch.logspace(0.1, 9, 100_001)])
    assert error(OPS._log_from_one_cpu(x), x.double().log()) <= 1
    special = OPS._log_from_one_cpu(torch.tensor([float("nan"), 1.0]))
    assert special[0].isnan()
    assert special[1] == 0


def _calls() -> dict[str, tuple[Callable, tuple, tuple]]:
    """Public function, its arguments, and the arguments of the registered op."""
    x, target = make((2, 5, 4, 3)), make_target(2, (17, 14), 5)
    accumulator = torch.rand(2, 5, 17, 14)
    return {
        "upsample_argmax": (ops.upsample_argmax, (x, (17, 14)), (x, 17, 14, False, True)),
        "upsample_confusion": (ops.upsample_confusion, (x, target), (x, target, 255, False)),
        "upsample_softmax_add": (
            ops.upsample_softmax_add,
            (accumulator, x),
            (accumulator, x, True, False),
        ),
    }


@pytest.mark.parametrize("name", _calls())
class TestEveryOp:
    def test_opcheck(self, compiled, name: str) -> None:
        torch.library.opcheck(getattr(OPS, name).default, _calls()[name][2])

    def test_compile_fullgraph(self, compiled, name: str) -> None:
        torch.compiler.reset()
        op, args, _ = _calls()[name]
        expected = op(*(a.clone() if isinstance(a, Tensor) else a for a in args))
        compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*args), expected)

    def test_export(self, compiled, name: str) -> None:
        op, args, _ = _calls()[name]

        class Call(torch.nn.Module):
            def forward(self, *args):
                return op(*args)

        program = torch.export.export(Call(), args)
        assert any(f"deeplab_fast.{name}" in str(node.target) for node in program.graph.nodes)
        expected = op(*(a.clone() if isinstance(a, Tensor) else a for a in args))
        assert torch.equal(program.module()(*args), expected)

    def test_outputs_are_written_whole(self, compiled, name: str, nan_poison: None) -> None:
        op, args, _ = _calls()[name]
        expected = op(*(a.clone() if isinstance(a, Tensor) else a for a in args))
        with deterministic():
            result = op(*args)
        assert torch.equal(result, expected)
        assert result.float().isfinite().all()

    def test_autocast_does_not_round(self, compiled, name: str) -> None:
        op, args, _ = _calls()[name]
        expected = op(*(a.clone() if isinstance(a, Tensor) else a for a in args))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(op(*args), expected)

    def test_the_cpu_backend_runs_by_default(self, compiled, name: str) -> None:
        _, args, _ = _calls()[name]
        with dlf.use_backend("auto"):
            assert dlf.why(name, *args).chosen == "cpu"

    def test_cuda_and_triton_say_why_they_cannot_run(self, name: str) -> None:
        _, args, _ = _calls()[name]
        reasons = dict(dlf.why(name, *args).rows)
        if "cuda" in backends.implementations(name):
            assert "needs CUDA tensors, the input is on cpu" in reasons["cuda"][0]
        assert reasons["triton"]


class TestRandomShapes:
    """Shapes at random: every op agrees with the reference in float64."""

    shapes = given(
        n=st.integers(0, 2),
        c=st.integers(1, 12),
        h=st.integers(1, 12),
        w=st.integers(1, 12),
        height=st.integers(1, 50),
        width=st.integers(1, 50),
        align_corners=st.booleans(),
        seed=st.integers(0, 2**31),
    )

    @settings(max_examples=60, deadline=None)
    @shapes
    def test_agree(self, n, c, h, w, height, width, align_corners, seed) -> None:
        if not _ext.CPU.loaded:
            pytest.skip(_ext.CPU.reason)
        torch.manual_seed(seed)
        size = (height, width)
        with dlf.use_backend("cpu"):
            x, target = make((n, c, h, w)), make_target(n, size, c)
            TestArgmax.check(x, size, align_corners)
            options = {"align_corners": align_corners}
            expected = TestConfusion.expected(x, target, 255, **options)
            assert torch.equal(ops.upsample_confusion(x, target, **options), expected)
            TestSoftmaxAdd.check(torch.rand(n, c, *size), x, bool(seed % 2), align_corners)


class TestInstructionSets:
    @pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
    def test_was_run(self, compiled, name: str) -> None:
        if name not in INSTRUCTION_SETS:
            pytest.skip(f"this processor does not have {name}")
        with pytest.raises(ValueError, match="allowed: baseline, avx2, avx512"):
            OPS._cpu_instruction_set(name + "?")

    def test_the_default_of_convolutions_is_no_wider_than_was_measured(self, compiled) -> None:
        assert OPS._cpu_instruction_set("") in ("avx2", "baseline")


class TestChoice:
    @pytest.mark.parametrize(
        ("size", "chosen"),
        [
            pytest.param((8, 8), "cpu", id="enlarged"),
            pytest.param((2, 40), "cpu", id="enlarged in one direction"),
            pytest.param((4, 5), "reference", id="same size"),
            pytest.param((2, 3), "reference", id="shrunk"),
        ],
    )
    def test_pytorch_runs_what_is_not_enlarged(self, size, chosen) -> None:
        if not _ext.CPU.loaded:
            pytest.skip(_ext.CPU.reason)
        x = make((1, 3, 4, 5))
        why = dlf.why("upsample_argmax", x, size)
        assert why.chosen == chosen
        assert ("use_backend('cpu') runs it all the same" in str(why)) == (chosen != "cpu")
        with dlf.use_backend("cpu"):
            assert dlf.why("upsample_argmax", x, size).chosen == "cpu"


class TestMissingExtension:
    @pytest.mark.parametrize("op", ["upsample_argmax", "upsample_cross_entropy"])
    def test_reason(self, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
        missing = _ext.Extension("deeplab_fast._C", False, "not built: no compiler", {})
        monkeypatch.setattr(_ext, "CPU", missing)
        desc = backends.OpDesc(op, "cpu", torch.float32, (1, 3, 4, 4), {"size": (32, 32)})
        reasons = backends.implementations(op)["cpu"].not_supported_reasons(desc)
        assert reasons == ["not built: no compiler"]
        assert backends.select(desc).backend == "reference"
