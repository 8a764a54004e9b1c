"""Convolutions of bf16 maps against float64, in every instruction set there is.

A rounding to bf16 is off by at most 2^-8 of the value, and by 0.42 of that as a root mean square
over values of any size: EPS = 2^-9 bounds the error of a map in its 2-norm. Roundings are
independent, so that the 2-norm of a sum's error is that of its terms' errors. What PyTorch's own
convolution of bf16 maps is off by is held against ours as well.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast import _ext
from deeplab_fast.dispatch.errors import DIRECT, SAVING
from deeplab_fast.ops import _cpu_forms, prepared_bf16
from deeplab_fast.ops._cpu_forms import FORMS
from deeplab_fast.ops.prepared_bf16 import ROUNDED, Bf16Conv
from deeplab_fast.ops.prepared_bf16_aspp import Bf16Aspp, Bf16Project
from deeplab_fast.testing import threads

OPS = torch.ops.deeplab_fast
pytestmark = pytest.mark.skipif(not _ext.CPU.loaded, reason=_ext.CPU.reason)

BF16 = torch.bfloat16
CHANNELS_LAST = torch.channels_last
EPS = 2.0**-9
NAN, INF = float("nan"), float("inf")


def instruction_sets() -> list[str]:
    """Those that multiply bf16, by instructions or by those for fp32, and this processor has."""
    if not _ext.CPU.loaded:
        return []
    before, found = OPS._conv_bf16_set(""), []
    for name in ("baseline", "avx2", "avx512_bf16"):
        with suppress(ValueError):
            found.append(OPS._conv_bf16_set(name))
    OPS._conv_bf16_set(before)
    return found


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = OPS._conv_bf16_set("")
    OPS._conv_bf16_set(request.param)
    yield request.param
    OPS._conv_bf16_set(before)


def error(y: Tensor, expected: Tensor) -> float:
    return (y.double() - expected).norm().item() / (expected.norm().item() or 1.0)


def nhwc(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=CHANNELS_LAST)


def poisoned(shape: Sequence[int], dtype: torch.dtype = BF16) -> Tensor:
    return torch.full(tuple(shape), NAN, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)


def activate(y: Tensor, act: str | None) -> Tensor:
    functions = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, None: lambda t: t}
    return functions[act](y)


def run_patches(
    x: Tensor, weight: Tensor, shift: Tensor, out: Tensor, residual: Tensor | None, **options
) -> Tensor:
    """The C++ op itself: relu(conv(x) + shift + residual)."""
    conv = Bf16Conv(weight, None, shift, **options)
    patch = (weight.shape[2:], conv.stride, conv.padding, conv.dilation, conv._is_planar)
    OPS._conv_pixels_cpu(x, conv._panels(), shift, residual, out, 0, "relu", *patch)
    return out


# (N, C, K, H, W), kernel, options
PATCHES = [
    pytest.param((1, 16, 16, 1, 1), 1, {}, id="one pixel"),
    pytest.param((2, 7, 33, 5, 9), 1, {}, id="odd channels"),
    pytest.param((1, 1, 5, 6, 7), 1, {}, id="one channel"),
    pytest.param((1, 301, 40, 11, 13), 1, {}, id="two chunks, the last one odd"),
    pytest.param((2, 600, 21, 7, 9), 1, {}, id="pixels are copied"),
    pytest.param((2, 24, 17, 9, 10), 3, {"stride": 2, "padding": 1}, id="stride"),
    pytest.param((1, 5, 16, 9, 8), 3, {"padding": 4, "dilation": 4}, id="dilated"),
    pytest.param((0, 3, 4, 2, 2), 1, {}, id="no image"),
]


class TestPatches:
    @pytest.mark.parametrize(("shape", "kernel", "options"), PATCHES)
    def test_is_the_convolution(self, instruction_set, shape, kernel, options) -> None:
        """Of bf16 factors the products are exact: the result is rounded once, or not at all."""
        n, c, k, height, width = shape
        x, shift = nhwc(n, c, height, width), torch.randn(k)
        weight = torch.randn(k, c, kernel, kernel).to(BF16).float()
        product = F.conv2d(x.double(), weight.double(), shift.double(), **options)
        for dtype, bound in ((BF16, EPS), (torch.float32, DIRECT)):
            added = nhwc(*product.shape, dtype=dtype)
            for residual in (None, added):
                out = poisoned(product.shape, dtype)
                y = run_patches(x, weight, shift, out, residual, **options)
                expected = F.relu(product if residual is None else product + residual)
                # Of a few values one may be off by twice what holds on average.
                assert error(y, expected) <= bound * (2 if y.numel() < 100 else 1)

    @pytest.mark.parametrize("channels", [3, 4, 9], ids=["planes", "4 planes", "no planes"])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=str)
    def test_rounds_a_photo(self, instruction_set, channels, layout) -> None:
        x = torch.randn(2, channels, 15, 17).contiguous(memory_format=layout)
        weight, shift = torch.randn(16, channels, 7, 7), torch.randn(16)
        conv = Bf16Conv(weight, None, shift, stride=2, padding=3, act=None)
        assert conv.plan(x.shape).kernel == "patches"
        rounded = [t.to(BF16).double() for t in (x, weight)]
        expected = F.conv2d(*rounded, shift.double(), 2, 3)
        assert error(conv(x), expected) <= EPS

    @pytest.mark.parametrize("outputs", [1, 8, 21, 40], ids=lambda k: f"{k} outputs")
    def test_writes_its_channels_only(self, instruction_set, outputs: int) -> None:
        conv = Bf16Conv(torch.randn(outputs, 9, 1, 1), None, torch.randn(outputs))
        x = nhwc(1, 9, 7, 6)
        alone = conv(x)
        for offset in (0, 3, 16):
            out = nhwc(1, outputs + 19, 7, 6)
            before = out.clone()
            conv(x, out=out, channel_offset=offset)
            assert torch.equal(out[:, offset : offset + outputs], alone)
            assert torch.equal(out[:, :offset], before[:, :offset])
            assert torch.equal(out[:, offset + outputs :], before[:, offset + outputs :])

    def test_rounds_to_nearest_even(self, instruction_set) -> None:
        """Bit patterns of every exponent, and ties, of both signs; denormals apart, which
        avx512_bf16 takes for zero. The shift of a channel is what is rounded."""
        generator = torch.Generator().manual_seed(3)
        upper = torch.arange(0x80, 0x8000, 37, dtype=torch.int32) << 16
        lower = torch.randint(0, 1 << 16, upper.shape, generator=generator, dtype=torch.int32)
        lower[::3] = 0x8000
        shift = (upper | lower).view(torch.float32)
        shift = torch.cat([shift, -shift, torch.tensor([0.0, -0.0, INF, -INF, NAN])])
        # A nan whose bits would be rounded to infinity, and one that would be cut to it.
        odd = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
        shift = torch.cat([shift, odd])
        conv = Bf16Conv(torch.zeros(len(shift), 2, 1, 1), None, shift, act=None)
        y, expected = conv(torch.zeros(1, 2, 1, 1, dtype=BF16)).flatten(), shift.to(BF16)
        assert torch.equal(y.isnan(), shift.isnan())
        assert torch.equal(y[~shift.isnan()], expected[~shift.isnan()])

    def test_weights_are_rounded_as_pytorch_rounds(self) -> None:
        weight = torch.randn(32, 6, 1, 1)
        panels = prepared_bf16._panels(weight, planar=False)
        assert panels.shape == (2, 3, 16, 2)
        found = panels.permute(0, 2, 1, 3).reshape(32, 6)
        assert torch.equal(found, weight.flatten(1).to(BF16))


def amplification(rows: str, columns: str) -> float:
    """By how much the forms multiply independent relative errors of their factors, as a ratio of
    2-norms for inputs and weights that are independent: per axis, the mean over outputs of
    sum_p C[i, p]^2 |B[p]|^2 |A[p]|^2 over the taps of output i, of which a whole line has fewer."""
    square = 1.0
    for name in (rows, columns):
        _, a, b, c, halo = OPS._conv_form(FORMS[name].number)
        products = (c.square() * b.square().sum(1) * a.square().sum(1)).sum()
        outputs = FORMS[name].outputs
        taps = 3 * outputs if halo else max(1, 3 * outputs - 2)
        square *= float(products) / taps
    return math.sqrt(square)


# (N, C, K, H, W), dilation, row forms, column forms
TILES = [
    pytest.param((1, 16, 16, 1, 1), 3, ("line1",) * 2, ("line1",) * 2, id="one pixel"),
    pytest.param((2, 1, 1, 4, 5), 9, ("line1",) * 2, ("tile2",) * 2, id="dilation beyond the map"),
    pytest.param((1, 33, 17, 7, 8), 5, ("line2", "line1"), ("line2",) * 2, id="lines of 2 and 1"),
    pytest.param((2, 20, 40, 8, 7), 3, ("line3", "line2"), ("line3",) * 2, id="lines of 3 and 2"),
    pytest.param((1, 5, 130, 9, 11), 1, ("tile2",) * 2, ("tile2",) * 2, id="tiles, 130 outputs"),
    pytest.param((1, 301, 16, 12, 14), 5, ("tile3",) * 2, ("line3",) * 2, id="two chunks"),
    pytest.param((1, 70, 32, 13, 13), 2, ("tile4",) * 2, ("tile6",) * 2, id="strips, a part left"),
    pytest.param((1, 301, 16, 9, 10), 4, ("line3",) * 2, ("line3",) * 2, id="two odd chunks"),
    pytest.param((3, 16, 15, 17, 5), 4, ("tile6",) * 2, ("tile2",) * 2, id="batch, 15 outputs"),
    pytest.param((0, 8, 8, 5, 5), 1, ("tile2",) * 2, ("tile2",) * 2, id="no image"),
]


def run_tiles(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    dilation: int,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    act: str = "none",
    residual: Tensor | None = None,
    dtype: torch.dtype = BF16,
    block: int = 0,
) -> Tensor:
    out = poisoned((x.shape[0], weight.shape[0], *x.shape[2:]), dtype)

    def occurring(forms: Sequence[str], length: int) -> Sequence[str]:
        several = _cpu_forms.phases(length, dilation)[2] and forms[0] != forms[1]
        return forms if several else forms[:1]

    forms = [FORMS[name] for name in (*rows, *columns)]
    used = [(occurring(rows, x.shape[2])), (occurring(columns, x.shape[3]))]
    rounds = {*rows, *columns} <= set(ROUNDED)
    weights = []
    for row in used[0]:
        for column in used[1]:
            panels = OPS._conv_prepare_tiles_cpu(weight, FORMS[row].number, FORMS[column].number)
            weights.append(OPS._conv_panels_bf16_cpu(panels) if rounds else panels)
    numbers = [[f.number for f in forms[:2]], [f.number for f in forms[2:]]]
    OPS._conv_tiles_cpu(x, weights, shift, residual, out, 0, dilation, *numbers, act, block)
    return out


class TestTiles:
    @pytest.mark.parametrize(("shape", "dilation", "rows", "columns"), TILES)
    def test_is_the_convolution(self, instruction_set, shape, dilation, rows, columns) -> None:
        n, c, k, height, width = shape
        x, weight, shift = nhwc(n, c, height, width), torch.randn(k, c, 3, 3), torch.randn(k)
        product = F.conv2d(x.double(), weight.double(), None, 1, dilation, dilation)
        rounds = {*rows, *columns} <= set(ROUNDED)
        inside = SAVING
        if rounds:
            factor = max(amplification(r, q) for r in rows for q in columns)
            # Both factors of a product; a few terms may all be small, which a large map averages.
            inside = math.sqrt(2) * EPS * factor
        for dtype, of_result in ((BF16, EPS), (torch.float32, 0.0)):
            residual = nhwc(n, k, height, width, dtype=dtype)
            for added in (None, residual):
                y = run_tiles(
                    x, weight, shift, dilation, rows, columns, residual=added, dtype=dtype
                )
                expected = product + shift[:, None, None].double()
                expected = expected if added is None else expected + added
                bound = inside * product.norm() + of_result * expected.norm()
                assert (y.double() - expected).norm() <= bound

    @pytest.mark.parametrize("form", FORMS)
    def test_error_beside_pytorchs(self, form: str) -> None:
        """Of all forms on both axes, with the inputs of a ReLU and the channels of an ASPP."""
        dilation = 4 if not FORMS[form].whole_line else -(-12 // FORMS[form].outputs)
        x, weight = nhwc(1, 512, 12, 12).relu(), torch.randn(16, 512, 3, 3)
        expected = F.conv2d(x.double(), weight.double(), None, 1, dilation, dilation)
        y = run_tiles(x, weight, torch.zeros(16), dilation, (form,) * 2, (form,) * 2)
        theirs = F.conv2d(x, weight.to(BF16), None, 1, dilation, dilation)
        assert error(y, expected) <= 2 * error(theirs, expected) + EPS

    @pytest.mark.parametrize("forms", [("line3", "line3"), ("tile2", "line2"), ("tile6", "tile6")])
    def test_threads_and_blocks_do_not_matter(self, forms: tuple[str, str]) -> None:
        size = 3 * 5 if forms[0] == "line3" else 2 * 5
        x, weight, shift = nhwc(2, 40, size, 10), torch.randn(24, 40, 3, 3), torch.randn(24)
        axes = ((forms[0],) * 2, (forms[1],) * 2)
        expected = run_tiles(x, weight, shift, 5, *axes)
        for count in (1, 2, 3):
            with threads(count):
                for block in (1, 7, 1000, -1, -13):
                    assert torch.equal(run_tiles(x, weight, shift, 5, *axes, block=block), expected)

    @pytest.mark.parametrize("act", ["relu", "relu6", "hardswish", "none"])
    @pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
    @pytest.mark.parametrize("form", ["line3", "tile2", "tile6"])
    def test_what_is_not_finite_stays_so(self, instruction_set, form, value, act) -> None:
        size = FORMS[form].outputs if FORMS[form].whole_line else 9
        x, weight, shift = nhwc(2, 5, size, size), torch.randn(21, 5, 3, 3), torch.randn(21)
        x[0, 2, size // 2, size // 2] = value
        y = run_tiles(x, weight, shift, 1, (form,) * 2, (form,) * 2, act=act)
        expected = F.conv2d(x.float(), weight, shift, padding=1)
        expected = activate(expected, None if act == "none" else act)
        assert y[expected.isnan()].isnan().all()
        assert not y[~expected.isfinite()].isfinite().any()
        assert y[1].isfinite().all()


# (C, K), kernel, options, what runs here
LAYERS = [
    pytest.param((64, 48), 3, {"padding": 2, "dilation": 2}, "tiles", id="3x3 dilated"),
    pytest.param((24, 40), 1, {}, "patches", id="1x1"),
    pytest.param((24, 40), 3, {"stride": 2, "padding": 1}, "patches", id="stride"),
    pytest.param((24, 24), 5, {"padding": 2, "groups": 24}, "aten", id="depthwise"),
]


# Of maps on which each pays.
SIZES = {"tiles": (33, 37), "patches": (13, 17), "aten": (13, 17)}


def layer(c: int, k: int, kernel: int, groups: int = 1) -> tuple[Tensor, ...]:
    return torch.randn(k, c // groups, kernel, kernel), torch.rand(k) + 0.5, torch.randn(k)


@pytest.fixture
def no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of our own, also where oneDNN multiplies bf16."""
    monkeypatch.setattr(prepared_bf16, "_has_onednn", lambda: False)


@pytest.mark.usefixtures("no_onednn")
class TestConv:
    @pytest.mark.parametrize("act", ["relu", "relu6", "hardswish", None])
    @pytest.mark.parametrize(("channels", "kernel", "options", "runs"), LAYERS)
    def test_is_the_layer(self, nan_poison, channels, kernel, options, runs, act) -> None:
        weight, scale, shift = layer(*channels, kernel, options.get("groups", 1))
        x = nhwc(2, channels[0], *SIZES[runs])
        folded = weight.double() * scale.double()[:, None, None, None]
        product = F.conv2d(x.double(), folded, shift.double(), **options)
        residual = nhwc(*product.shape)
        conv = Bf16Conv(weight, scale, shift, act=act, **options)
        assert conv.plan(x.shape).kernel == runs
        assert conv.writes_into(x.shape) == (runs != "aten")
        for added in (None, residual):
            expected = activate(product if added is None else product + added, act)
            y = conv(x, added)
            assert y.dtype == BF16 and y.is_contiguous(memory_format=CHANNELS_LAST)
            rounded = (folded.float().to(BF16), shift.to(BF16))
            theirs = F.conv2d(x, *rounded, **options)
            theirs = activate(theirs if added is None else theirs + added, act)
            # CONTRIBUTING.md's bound of what is below fp32.
            assert error(y, expected) <= 2 * error(theirs, expected) + EPS
            assert torch.equal(copy.deepcopy(conv)(x, added), y)
        assert torch.equal(pickle.loads(pickle.dumps(conv))(x, residual), y)
        fp32 = Bf16Conv(weight, scale, shift, act=act, out_dtype=torch.float32, **options)
        assert error(y, fp32(x, residual.float()).double()) <= EPS

    @pytest.mark.parametrize(("channels", "kernel", "options", "runs"), LAYERS)
    def test_not_finite(self, channels, kernel, options, runs) -> None:
        groups = options.get("groups", 1)
        for value in (NAN, INF):
            for place in ("x", "weight", "shift", "residual"):
                weight, scale, shift = layer(*channels, kernel, groups)
                x = nhwc(2, channels[0], *SIZES[runs])
                residual = nhwc(*F.conv2d(x.float(), weight, **options).shape)
                tensors = {"x": x, "weight": weight, "shift": shift, "residual": residual}
                tensors[place][(-1,) * tensors[place].dim()] = value
                conv = Bf16Conv(weight, scale, shift, **options)
                assert conv.plan(x.shape).kernel == ("aten" if place == "weight" else runs)
                expected = F.conv2d(x.float(), weight * scale[:, None, None, None], **options)
                expected = F.relu(expected + shift[:, None, None] + residual)
                y = conv(x, residual)
                assert not expected.isfinite().all()
                assert y[expected.isnan()].isnan().all()
                assert not y[~expected.isfinite()].isfinite().any()

    def test_overwrites_a_residual_only_beside_another_input(self) -> None:
        conv = Bf16Conv(*layer(64, 64, 3), padding=1)
        x, residual = nhwc(1, 64, 9, 9), nhwc(1, 64, 9, 9)
        expected = conv(x, residual)
        y = conv(x, residual, overwrite_residual=True)
        assert y.data_ptr() == residual.data_ptr() and torch.equal(y, expected)
        expected = conv(x, x)
        y = conv(x, x, overwrite_residual=True)
        assert y.data_ptr() != x.data_ptr() and torch.equal(y, expected)

    def test_bound_on_prepared_weights(self) -> None:
        weight, scale, shift = layer(64, 48, 3)
        conv = Bf16Conv(weight, scale, shift, padding=1, max_extra_bytes=0)
        x = nhwc(1, 64, 33, 33)
        assert conv.plan(x.shape).kernel == "aten"
        conv(x)
        assert conv.extra_bytes == 0
        direct = 2 * weight.numel()
        conv = Bf16Conv(weight, scale, shift, padding=1, max_extra_bytes=direct)
        assert conv.plan(x.shape).kernel == "patches"
        conv.prepare(x.shape)
        assert conv.extra_bytes == direct

    def test_coarse_forms_multiply_in_fp32(self) -> None:
        """Where few channels make them the fastest, as on a processor without bf16."""
        conv = Bf16Conv(*layer(256, 256, 3), padding=1)
        plan = conv.plan((1, 256, 65, 65))
        assert plan.kernel == "tiles"
        conv.prepare((1, 256, 65, 65))
        assert conv.extra_bytes == plan.extra_bytes
        for (row, column), weight in conv._forms.items():
            assert weight.dtype == (BF16 if {row, column} <= set(ROUNDED) else torch.float32)

    @pytest.mark.parametrize(
        ("call", "text"),
        [
            (lambda c, x: c(x.double()), "x is float64 on cpu; allowed is bfloat16 or float32"),
            (lambda c, x: c(x[:, :3]), "has 3 channels, the weight wants 8"),
            (lambda c, x: c(x, x.float()), "residual is float32 on cpu; allowed is bfloat16"),
            (lambda c, x: c(x, x[..., :2]), r"residual has shape \[1, 8, 5, 2\]"),
            (lambda c, x: c(x, out=x.float()), "out is float32 on cpu; allowed is bfloat16"),
            (lambda c, x: c(x, out=x, channel_offset=1), r"L >= channel_offset \+ 8"),
            (lambda c, x: c(x, out=x.contiguous()), "memory_format=torch.channels_last"),
            (lambda c, x: Bf16Conv(*layer(8, 8, 1), out_dtype=torch.half), "out_dtype"),
            (lambda c, x: Bf16Conv(*layer(8, 8, 1), act="gelu"), "act must be one of"),
        ],
        ids=[
            "dtype",
            "channels",
            "residual",
            "its shape",
            "out",
            "offset",
            "layout",
            "result",
            "act",
        ],
    )
    def test_bad_input_is_named(self, call, text: str) -> None:
        conv, x = Bf16Conv(*layer(8, 8, 1)), nhwc(1, 8, 5, 5)
        before = x.clone()
        with pytest.raises(ValueError, match=text):
            call(conv, x)
        assert torch.equal(x, before)


@pytest.mark.parametrize("takes_fp32_bias", [True, False])
def test_what_is_around_onednn(monkeypatch: pytest.MonkeyPatch, takes_fp32_bias: bool) -> None:
    """Its convolution stood in for: where it cannot run, what is done with its result can."""

    def stand_in(x: Tensor, weight: Tensor, bias: Tensor, padding, stride, dilation, groups):
        assert x.dtype == weight.dtype == BF16
        if bias.dtype != BF16 and not takes_fp32_bias:
            raise RuntimeError("bias of another dtype")
        args = (x.float(), weight.float(), bias.float(), stride, padding, dilation, groups)
        return F.conv2d(*args).to(BF16)

    prepared_bf16._takes_fp32_bias.cache_clear()
    monkeypatch.setattr(prepared_bf16, "_has_onednn", lambda: True)
    monkeypatch.setattr(prepared_bf16, "onednn_convolution", stand_in)
    monkeypatch.setattr(Bf16Conv, "_reordered", lambda self, shape: self._weight.to(BF16))
    monkeypatch.setattr(prepared_bf16._cpu_forms, "onednn_seconds", lambda *a, **k: 0.0)
    weight, scale, shift = layer(24, 24, 3, 24)
    x, options = nhwc(2, 24, 9, 11), {"padding": 1, "groups": 24}
    residual = nhwc(2, 24, 9, 11)
    product = F.conv2d(x.double(), weight.double() * scale.double()[:, None, None, None], **options)
    product += shift.double()[:, None, None]
    conv = Bf16Conv(weight, scale, shift, **options)
    assert conv.plan(x.shape).kernel == "onednn" and not conv.writes_into(x.shape)
    out = poisoned((2, 30, 9, 11))
    for added in (None, residual):
        y = conv(x, added, out=out, channel_offset=4)
        expected = F.relu(product if added is None else product + added)
        # Of weights, the sum, and the result; the shift too where it is rounded.
        assert (y.double() - expected).norm() <= math.sqrt(4) * EPS * product.norm()
        assert out[:, :4].isnan().all() and out[:, 28:].isnan().all()
    shifts = torch.randn(2, 24)
    moved = product - shift.double()[:, None, None] + shifts.double()[:, :, None, None]
    y = conv.shifted(x, shifts)
    assert (y.double() - F.relu(moved)).norm() <= math.sqrt(4) * EPS * moved.norm()
    x[1, 3, 4, 5] = NAN
    assert conv(x, residual)[1, 3, 4, 5].isnan()
    prepared_bf16._takes_fp32_bias.cache_clear()


@pytest.mark.usefixtures("no_onednn")
class TestHead:
    @pytest.mark.parametrize("size", [(33, 33), (1, 1), (9, 14)], ids=str)
    def test_aspp_and_projection(self, nan_poison, size: tuple[int, int]) -> None:
        rates = [1, 6, 12, 18]
        weights = [torch.randn(24, 40, 1, 1), *(torch.randn(24, 40, 3, 3) for _ in rates[1:])]
        scales, shifts = ([torch.randn(24) for _ in weights] for _ in range(2))
        x, pooled = nhwc(2, 40, *size), torch.randn(2, 10)
        aspp = Bf16Aspp(weights, scales, shifts, rates)
        y = aspp(x)
        assert len(aspp.plan(x.shape)) == 4
        first = 0
        for w, a, b, d, branch in zip(weights, scales, shifts, rates, aspp.branches, strict=True):
            assert torch.equal(y[:, first : first + 24], branch(x))
            expected = F.conv2d(
                x.double(),
                w.double() * a.double()[:, None, None, None],
                b.double(),
                1,
                d * (w.shape[-1] // 2),
                d,
            )
            # Both factors' roundings, which no form here multiplies by more than 2, and the
            # result's; those that ReLU cuts away leave it smaller than what it is taken of.
            bound = (2 * math.sqrt(2) + 1) * EPS * expected.norm()
            assert (branch(x).double() - F.relu(expected)).norm() <= bound
            first += 24
        weight, scale, shift = torch.randn(17, 106, 1, 1), torch.randn(17), torch.randn(17)
        project = Bf16Project(weight, scale, shift, branch_channels=96, act=None)
        both = torch.cat([y.double(), pooled.double()[:, :, None, None].expand(-1, -1, *size)], 1)
        expected = F.conv2d(both, weight.double() * scale.double()[:, None, None, None])
        expected += shift.double()[:, None, None]
        assert error(project(y, pooled), expected) <= (1 + math.sqrt(2)) * EPS
