"""fold_filters: all layers' filters times the scales of their batch norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import ops, reference
from deeplab_fast.dispatch.errors import DIRECT, norm_error
from deeplab_fast.plan import fold
from deeplab_fast.testing import deterministic

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Half the distance of neighbouring numbers, relative to them: one rounding.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}

LAYERS = [
    pytest.param([(8, 4, 1, 1)], id="one 1x1"),
    pytest.param([(64, 3, 7, 7)], id="stem: 3 channels, 49 taps"),
    pytest.param([(16, 1, 3, 3), (24, 1, 5, 5)], id="depthwise: one channel"),
    pytest.param([(21, 7, 3, 3), (1, 1, 1, 1), (5, 3, 1, 3), (21, 16, 1, 1)], id="odd, one value"),
    pytest.param([(3, 2, 3, 3)] * 200, id="200 layers"),
    pytest.param([(0, 4, 3, 3), (4, 4, 3, 3), (0, 1, 1, 1)], id="layers without filters"),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "strided": lambda w: w.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, ::3],
    "transposed": lambda w: w.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
    "expanded": lambda w: w[:, :1].expand_as(w),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def make(
    layers: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """Filters and scales."""
    weights = [torch.randn(shape).to(dtype) for shape in layers]
    scale = torch.rand(sum(shape[0] for shape in layers), dtype=reference.compute_dtype(dtype))
    return weights, scale + 0.5


def check(weights: Sequence[Tensor], scale: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The results, after they were held against float64: the factors are exact, the product is
    rounded in the dtype of scale (`DIRECT` for float32) and once more where it is stored."""
    results = ops.fold_filters(weights, scale, dtype)
    scales = scale.split([w.shape[0] for w in weights])
    for weight, factor, result in zip(weights, scales, results, strict=True):
        assert result.dtype == dtype and result.shape == weight.shape
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert result.data_ptr() % 16 == 0
        exact = weight.double() * factor.double()[:, None, None, None]
        made = ROUNDING[torch.float64] if scale.dtype == torch.float64 else DIRECT
        assert norm_error(result, exact) <= made + ROUNDING.get(dtype, 2.0**-24)
    return results


@pytest.mark.parametrize("layers", LAYERS)
def test_against_float64(layers) -> None:
    check(*make(layers), torch.float32)


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, to) -> None:
    check(*make([(8, 5, 3, 3), (7, 3, 1, 1)], dtype), to)


@every_layout
def test_layouts_give_the_same_bits(layout) -> None:
    weights, scale = make([(8, 6, 3, 3), (7, 3, 1, 1), (5, 1, 3, 5)])
    given = [layout(w) for w in weights]
    results = check(given, scale, torch.bfloat16)
    expected = ops.fold_filters([w.contiguous() for w in given], scale, torch.bfloat16)
    for result, want in zip(results, expected, strict=True):
        assert torch.equal(result, want)


def test_rounded_once() -> None:
    """1 + 2^-8 lies between two numbers of bfloat16, a little more is above: rounding the scale
    first would lose that."""
    weights, scale = [torch.ones(1, 1, 1, 1)], torch.tensor([1 + 2.0**-8 + 2.0**-20])
    (result,) = ops.fold_filters(weights, scale, torch.bfloat16)
    assert result.item() == 1 + 2.0**-7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_not_finite_as_torch(value) -> None:
    weights, scale = make([(4, 3, 3, 3), (3, 2, 1, 1)])
    weights[0][1, 2, 0, 1] = value
    scale[5] = value
    weights[1][1, 0] = 0.0
    results = ops.fold_filters(weights, scale, torch.float16)
    for w, s, got in zip(weights, scale.split([4, 3]), results, strict=True):
        want = (w * s[:, None, None, None]).half()
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


def test_nothing_is_left_unwritten() -> None:
    """Layers of 189 and 45 values: what lies behind them is zero."""
    weights, scale = make([(21, 1, 3, 3), (5, 1, 3, 3)])
    with deterministic():
        flat = torch.ops.deeplab_fast.fold_filters(weights, scale, torch.float32)
    assert flat.shape == (192 + 48,) and not flat.isnan().any()
    for start, end in ((189, 192), (192 + 45, 192 + 48)):
        assert not flat[start:end].any()


def test_views_do_not_overlap() -> None:
    shapes = [(21, 7, 3, 3), (1, 1, 1, 1), (5, 3, 7, 7)]
    flat = torch.zeros(fold.starts(shapes)[-1])
    for view in fold.views(flat, shapes):
        view += 1
    for start, end in fold.gaps(shapes):
        flat[start:end] += 1
    assert (flat == 1).all()


WEIGHTS, SCALE = make([(4, 3, 3, 3), (2, 4, 1, 1)])


@pytest.mark.parametrize(
    ("weights", "scale", "dtype", "error", "text"),
    [
        pytest.param([], SCALE, torch.float32, ValueError, "at least one layer", id="no layer"),
        pytest.param(
            [WEIGHTS[0][0]], SCALE, torch.float32, ValueError, r"weights\[0\] must be a tensor",
            id="rank",
        ),
        pytest.param(
            [WEIGHTS[0], WEIGHTS[1].half()], SCALE, torch.float32, TypeError,
            r"weights\[1\] has dtype float16; allowed: float32", id="two dtypes",
        ),
        pytest.param(
            [WEIGHTS[0], WEIGHTS[1].to("meta")], SCALE, torch.float32, ValueError,
            r"weights\[1\] is on meta", id="two devices",
        ),
        pytest.param(
            WEIGHTS, SCALE[:5], torch.float32, ValueError, r"shape \[5\], expected \[6\]",
            id="scale too short",
        ),
        pytest.param(
            WEIGHTS, SCALE.double(), torch.float32, TypeError, "scale has dtype float64",
            id="scale of another dtype",
        ),
        pytest.param(WEIGHTS, SCALE, torch.int8, TypeError, "dtype is torch.int8", id="integers"),
    ],
)  # fmt: skip
def test_bad_input(weights, scale, dtype, error, text) -> None:
    with pytest.raises(error, match=text):
        ops.fold_filters(weights, scale, dtype)
    with pytest.raises(error, match=text):
        ops.describe("fold_filters", weights, scale, dtype)


def test_no_gradient_is_lost_in_silence() -> None:
    weights = [w.clone().requires_grad_() for w in WEIGHTS]
    with pytest.raises(RuntimeError, match=r"records no gradient.*torch\.no_grad"):
        ops.fold_filters(weights, SCALE, torch.float32)
    with torch.no_grad():
        assert not any(r.requires_grad for r in ops.fold_filters(weights, SCALE, torch.float32))
    with torch.inference_mode():
        ops.fold_filters(weights, SCALE, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schema_fake_and_strides(dtype) -> None:
    torch.library.opcheck(torch.ops.deeplab_fast.fold_filters, (WEIGHTS, SCALE, dtype))


def test_torch_compile_keeps_it_whole() -> None:
    def run(weights: list[Tensor], scale: Tensor) -> list[Tensor]:
        return ops.fold_filters(weights, scale, torch.bfloat16)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(WEIGHTS, SCALE), run(WEIGHTS, SCALE), strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride()


def test_autocast_changes_nothing() -> None:
    """The dtype of the results is an argument."""
    with torch.autocast("cpu", torch.bfloat16):
        results = ops.fold_filters(WEIGHTS, SCALE, torch.float32)
    for got, want in zip(results, ops.fold_filters(WEIGHTS, SCALE, torch.float32), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_why() -> None:
    why = dlf.why("fold_filters", WEIGHTS, SCALE, torch.bfloat16)
    assert why.chosen == "reference"
    assert "fold_filters (cpu bfloat16 [2, 116], weights=float32)" in str(why)
