"""The C++ CPU convolution kernels against the definition, in every instruction set there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import _ext, ops, reference
from deeplab_fast.dispatch.errors import DIRECT, SAVING
from deeplab_fast.ops import _cpu_forms
from deeplab_fast.ops._cpu_forms import FORMS
from deeplab_fast.ops.aspp_convs import aspp_convs
from deeplab_fast.plan.taps import live_taps, output_size
from deeplab_fast.testing import cpu_instruction_sets, deterministic, threads

OPS = torch.ops.deeplab_fast
pytestmark = pytest.mark.skipif(not _ext.CPU.loaded, reason=_ext.CPU.reason)

CHANNELS_LAST = torch.channels_last
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(params=cpu_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    OPS._cpu_instruction_set(request.param)
    yield request.param
    OPS._cpu_instruction_set("auto")


def relative_error(y: Tensor, expected: Tensor) -> float:
    scale = expected.norm().item() or 1.0
    return (y.double() - expected).norm().item() / scale


def activate(y: Tensor, act: str) -> Tensor:
    functions = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "none": lambda t: t}
    return functions[act](y)


def assert_shows(y: Tensor, expected: Tensor) -> None:
    """Nothing that PyTorch says is nan or infinite is hidden."""
    assert y[expected.isnan()].isnan().all()
    assert not y[~expected.isfinite()].isfinite().any()


def nhwc(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=CHANNELS_LAST)


def prepared(weight: Tensor, x: Tensor, dilation: int, rows, columns) -> list[Tensor]:
    """Weights for the forms (long, short) that occur on each axis."""

    def occurring(forms: Sequence[str], length: int) -> list[int]:
        short = _cpu_forms.phases(length, dilation)[2]
        names = forms if short and forms[0] != forms[1] else forms[:1]
        return [FORMS[name].number for name in names]

    pairs = [(r, c) for r in occurring(rows, x.shape[2]) for c in occurring(columns, x.shape[3])]
    return [OPS._conv_prepare_tiles_cpu(weight, r, c) for r, c in pairs]


def run_tiles(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    dilation: int,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    act: str = "relu",
    residual: Tensor | None = None,
    out: Tensor | None = None,
    offset: int = 0,
    block: int = 0,
) -> Tensor:
    n, _, height, width = x.shape
    if out is None:
        shape = (n, weight.shape[0], height, width)
        out = torch.full(shape, float("nan")).contiguous(memory_format=CHANNELS_LAST)
    weights = prepared(weight, x, dilation, rows, columns)
    numbers = [[FORMS[name].number for name in forms] for forms in (rows, columns)]
    OPS._conv_tiles_cpu(x, weights, shift, residual, out, offset, dilation, *numbers, act, block)
    return out


class TestForms:
    @pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
    def test_matrices_give_the_three_tap_filter(self, form: _cpu_forms.Form) -> None:
        name, a, b, c, halo = OPS._conv_form(form.number)
        assert (name, tuple(a.shape)) == (form.name, (form.products, form.inputs))
        assert c.shape[0] == form.outputs
        assert (halo == 0) == form.whole_line
        # Output i is the sum over taps k of w[k] * x[i + k - 1], input j being x[j - halo].
        toeplitz = torch.zeros(form.outputs, 3, form.inputs, dtype=torch.float64)
        for i in range(form.outputs):
            for k in range(3):
                if 0 <= i + k - 1 + halo < form.inputs:
                    toeplitz[i, k, i + k - 1 + halo] = 1
        product = torch.einsum("ip,pk,pj->ikj", c, b, a)
        # The largest entries are below 100, sums have 8 terms.
        assert (product - toeplitz).abs().max() < 1e-13

    def test_every_form_is_known_to_python(self) -> None:
        with pytest.raises(ValueError, match=f"number {len(FORMS)}"):
            OPS._conv_form(len(FORMS))
        assert [form.number for form in FORMS.values()] == list(range(len(FORMS)))

    @pytest.mark.parametrize("dilation", [1, 2, 3, 5, 7, 12, 40])
    @pytest.mark.parametrize("length", [1, 2, 6, 7, 12, 33])
    def test_axes_cover_every_output(self, length: int, dilation: int) -> None:
        samples, long, short = _cpu_forms.phases(length, dilation)
        assert long * samples + short * (samples - 1) == length
        assert long + short == min(length, dilation)
        axes = _cpu_forms.axes(length, dilation)
        assert len(axes) == len(set(axes)) > 0
        for axis in axes:
            covered = sum(form.outputs * tiles for form, tiles in axis.tiles)
            assert covered >= length
            assert axis.short == axis.long or short

    @pytest.mark.parametrize(
        "geometry",
        [(7, 3, 1, 1, 1), (7, 3, 2, 1, 1), (33, 3, 1, 12, 12), (5, 3, 1, 9, 9), (9, 7, 2, 3, 1)],
        ids=["same", "stride", "dilation", "larger than the map", "7 taps"],
    )
    def test_taps_inside(self, geometry: tuple[int, ...]) -> None:
        length, kernel, stride, padding, dilation = geometry
        out = output_size(*geometry)
        expected = sum(
            0 <= i * stride + t * dilation - padding < length
            for i in range(out)
            for t in range(kernel)
        )
        assert live_taps(*geometry) == expected


# (N, C, K, H, W), dilation, row forms, column forms
TILES = [
    pytest.param((1, 16, 16, 1, 1), 3, ("line1",) * 2, ("line1",) * 2, id="one pixel"),
    pytest.param((2, 1, 1, 4, 5), 9, ("line1",) * 2, ("tile2",) * 2, id="dilation beyond the map"),
    pytest.param((1, 33, 17, 7, 8), 5, ("line2", "line1"), ("line2",) * 2, id="lines of 2 and 1"),
    pytest.param((2, 20, 40, 8, 7), 3, ("line3", "line2"), ("line3",) * 2, id="lines of 3 and 2"),
    pytest.param((1, 5, 130, 9, 11), 1, ("tile2",) * 2, ("tile4",) * 2, id="mixed, 130 outputs"),
    pytest.param((1, 300, 16, 12, 14), 5, ("tile3",) * 2, ("line3",) * 2, id="two chunks"),
    pytest.param((1, 70, 32, 13, 13), 2, ("tile4",) * 2, ("tile6",) * 2, id="strips, a part left"),
    pytest.param((3, 16, 15, 17, 5), 4, ("tile6",) * 2, ("tile3",) * 2, id="batch, 15 outputs"),
    pytest.param((0, 8, 8, 5, 5), 1, ("tile2",) * 2, ("tile2",) * 2, id="no image"),
]
every_tiling = pytest.mark.parametrize(("shape", "dilation", "rows", "columns"), TILES)


class TestTiles:
    @every_tiling
    def test_is_the_convolution(self, instruction_set, shape, dilation, rows, columns) -> None:
        n, c, k, height, width = shape
        x, residual = nhwc(n, c, height, width), nhwc(n, k, height, width)
        weight, shift = torch.randn(k, c, 3, 3), torch.randn(k)
        product = F.conv2d(x.double(), weight.double(), shift.double(), 1, dilation, dilation)
        for act, added in (("relu", None), ("none", residual), ("relu6", None)):
            y = run_tiles(x, weight, shift, dilation, rows, columns, act=act, residual=added)
            expected = activate(product if added is None else product + added, act)
            assert relative_error(y, expected) <= SAVING

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("channels", [64, 2048])
    def test_error(self, form: str, channels: int) -> None:
        """Of all forms on both axes, the rounding of ReLU inputs up to the ASPP's channels."""
        dilation = 4 if not FORMS[form].whole_line else -(-12 // FORMS[form].outputs)
        x = nhwc(1, channels, 12, 12).relu()
        weight = torch.randn(16, channels, 3, 3)
        expected = F.conv2d(x.double(), weight.double(), None, 1, dilation, dilation)
        y = run_tiles(x, weight, torch.zeros(16), dilation, (form,) * 2, (form,) * 2, act="none")
        # conv_run.h has the measured errors; those of the small forms stay below a direct one's.
        bound = {"tile6": SAVING, "tile4": DIRECT, "tile3": 3e-6}.get(form, 1e-6)
        assert relative_error(y, expected) <= bound

    def test_threads_and_blocks_do_not_matter(self) -> None:
        x, weight, shift = nhwc(2, 40, 19, 23), torch.randn(24, 40, 3, 3), torch.randn(24)
        expected = run_tiles(x, weight, shift, 2, ("tile4",) * 2, ("tile3",) * 2)
        for count in (1, 2, 3, 5):
            with threads(count):
                for block in (0, 1, 7, 1000, -1, -13, -1000):
                    y = run_tiles(x, weight, shift, 2, ("tile4",) * 2, ("tile3",) * 2, block=block)
                    assert torch.equal(y, expected), (count, block)

    @pytest.mark.parametrize("outputs", [1, 8, 16, 21], ids=lambda k: f"{k} outputs")
    def test_writes_its_channels_only(self, instruction_set, outputs: int) -> None:
        x, weight, shift = nhwc(1, 9, 7, 6), torch.randn(outputs, 9, 3, 3), torch.randn(outputs)
        alone = run_tiles(x, weight, shift, 2, ("tile2",) * 2, ("tile3",) * 2)
        for offset in (0, 3, 16):
            out = nhwc(1, outputs + 19, 7, 6)
            before = out.clone()
            run_tiles(x, weight, shift, 2, ("tile2",) * 2, ("tile3",) * 2, out=out, offset=offset)
            assert torch.equal(out[:, offset : offset + outputs], alone)
            assert torch.equal(out[:, :offset], before[:, :offset])
            assert torch.equal(out[:, offset + outputs :], before[:, offset + outputs :])

    @pytest.mark.parametrize("act", ["relu", "relu6", "hardswish", "none"])
    @pytest.mark.parametrize("value", NOT_FINITE, ids=str)
    @pytest.mark.parametrize("form", FORMS)
    def test_what_is_not_finite_stays_so(self, instruction_set, form, value, act) -> None:
        """Outputs of the same tile may become nan; no other may."""
        size = FORMS[form].outputs if FORMS[form].whole_line else 9
        # 21 channels: whole vectors and a rest. The second image is clean.
        x, weight, shift = nhwc(2, 5, size, size), torch.randn(21, 5, 3, 3), torch.randn(21)
        x[0, 2, size // 2, size // 2] = value
        y = run_tiles(x, weight, shift, 1, (form,) * 2, (form,) * 2, act=act)
        assert_shows(y, activate(F.conv2d(x, weight, shift, padding=1), act))
        assert y[1].isfinite().all()
        x, shift[4] = nhwc(2, 5, size, size), value
        residual = nhwc(2, 21, size, size)
        residual[1, 20, 0, 0] = value
        y = run_tiles(x, weight, shift, 1, (form,) * 2, (form,) * 2, act=act, residual=residual)
        expected = activate(F.conv2d(x, weight, shift, padding=1) + residual, act)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"x": lambda x: x.double()}, "x must be a float32 map"),
            ({"x": lambda x: x.contiguous()}, "in channels_last"),
            ({"rows": ("line1",) * 2}, "form line1 does not cover phases of 3 samples"),
            ({"act": "gelu"}, "act must be relu"),
            ({"offset": 5}, "has no place for 8 channels from 5"),
            ({"dilation": 0}, r"dilation must be from 1 to 2\^31 - 1, got \[0\]"),
            ({"residual": torch.randn(1, 8, 2, 2)}, "residual"),
        ],
        ids=["dtype", "layout", "form", "act", "slice", "dilation", "residual"],
    )
    def test_bad_input_is_named(self, change: dict, text: str) -> None:
        x = nhwc(1, 4, 6, 6)
        out = nhwc(1, 10, 6, 6)
        rows = change.get("rows", ("tile2",) * 2)
        weights = prepared(torch.randn(8, 4, 3, 3), x, 2, rows, ("tile2",) * 2)
        before = out.clone()
        with pytest.raises(ValueError, match=text):
            OPS._conv_tiles_cpu(
                change.get("x", lambda t: t)(x),
                weights,
                torch.randn(8),
                change.get("residual"),
                out,
                change.get("offset", 0),
                change.get("dilation", 2),
                [FORMS[name].number for name in rows],
                [FORMS["tile2"].number] * 2,
                change.get("act", "relu"),
            )
        assert torch.equal(out, before)

    def test_weights_of_another_form_are_refused(self) -> None:
        x, out = nhwc(1, 4, 6, 6), nhwc(1, 8, 6, 6)
        weight = OPS._conv_prepare_tiles_cpu(torch.randn(8, 4, 3, 3), 3, 3)
        with pytest.raises(ValueError, match="do not fit x"):
            OPS._conv_tiles_cpu(
                x, [weight], torch.zeros(8), None, out, 0, 1, [5, 5], [5, 5], "relu"
            )
        with pytest.raises(ValueError, match="expected 1 prepared weights, got 0"):
            OPS._conv_tiles_cpu(x, [], torch.zeros(8), None, out, 0, 1, [3, 3], [3, 3], "relu")


@st.composite
def tilings(draw: st.DrawFn) -> tuple:
    height, width, dilation = (draw(st.integers(1, 20)) for _ in range(3))
    sizes = (draw(st.integers(1, 2)), draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    rows, columns = (draw(st.sampled_from(_cpu_forms.axes(n, dilation))) for n in (height, width))
    return (*sizes, height, width), dilation, rows, columns, draw(st.integers(-9, 9))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(tilings())
def test_any_shape(drawn: tuple) -> None:
    (n, c, k, height, width), dilation, rows, columns, block = drawn
    torch.manual_seed(c * 41 + k)
    x, weight, shift = nhwc(n, c, height, width), torch.randn(k, c, 3, 3), torch.randn(k)
    names = [(axis.long.name, axis.short.name) for axis in (rows, columns)]
    y = run_tiles(x, weight, shift, dilation, *names, act="none", block=block)
    expected = F.conv2d(x.double(), weight.double(), shift.double(), 1, dilation, dilation)
    # What is added up, in the norm that its sum has on average: one output may cancel.
    options = (1, dilation, dilation)
    terms = F.conv2d(x.double() ** 2, weight.double() ** 2, shift.double() ** 2, *options)
    assert (y - expected).norm() <= SAVING * max(terms.sum().sqrt(), expected.norm())


class TestPixels:
    @pytest.mark.parametrize(
        "shape",
        [
            (1, 16, 16, 1, 1),
            (2, 7, 33, 5, 9),
            (1, 300, 40, 11, 13),
            (2, 512, 21, 7, 9),
            (0, 3, 4, 2, 2),
        ],
        ids=["one pixel", "odd channels", "two chunks", "rows not prefetched", "no image"],
    )
    def test_is_the_convolution(self, instruction_set, shape) -> None:
        n, c, k, height, width = shape
        x, residual = nhwc(n, c, height, width), nhwc(n, k, height, width)
        weight = torch.randn(k, c, 1, 1)
        panels = F.pad(weight.flatten(1), (0, 0, 0, -k % 16)).view(-1, 16, c).transpose(1, 2)
        for shift in (torch.randn(k), torch.randn(n, k)):
            out = nhwc(n, k + 5, height, width)
            before = out.clone()
            OPS._conv_pixels_cpu(x, panels.contiguous(), shift, residual, out, 2, "relu")
            product = F.conv2d(x.double(), weight.double())
            added = shift.double().expand(n, k)[:, :, None, None] + residual
            assert relative_error(out[:, 2 : 2 + k], F.relu(product + added)) <= DIRECT
            assert torch.equal(out[:, :2], before[:, :2])
            assert torch.equal(out[:, 2 + k :], before[:, 2 + k :])

    @pytest.mark.parametrize("act", ["relu", "relu6", "hardswish", "none"])
    @pytest.mark.parametrize("value", NOT_FINITE, ids=str)
    def test_what_is_not_finite_stays_so(self, instruction_set, value, act) -> None:
        """Of one pixel, one channel's shift and one value of the residual; two chunks of depth."""
        n, c, k = 2, 300, 21
        x, residual, shift = nhwc(n, c, 5, 7), nhwc(n, k, 5, 7), torch.randn(n, k)
        x[0, 299, 1, 2] = shift[1, 20] = residual[1, 3, 4, 4] = value
        weight, out = torch.randn(k, c, 1, 1), nhwc(n, k, 5, 7)
        panels = F.pad(weight.flatten(1), (0, 0, 0, -k % 16)).view(-1, 16, c).transpose(1, 2)
        OPS._conv_pixels_cpu(x, panels.contiguous(), shift, residual, out, 0, act)
        expected = activate(F.conv2d(x, weight) + shift[:, :, None, None] + residual, act)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=CHANNELS_LAST),
    "contiguous": lambda x: x,
    "strided": lambda x: x.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, ::3],
    "slice": lambda x: torch.cat([x, x, x], 1).contiguous(memory_format=CHANNELS_LAST)[
        :, x.shape[1] : 2 * x.shape[1]
    ],
    "expanded": lambda x: x[..., :1].expand(x.shape),
}

# [N, C, K, H, W], kernel, stride, padding, dilation
PATCHES = [
    pytest.param((2, 3, 24, 17, 19), (7, 7), (2, 2), (3, 3), (1, 1), id="7x7 of a photo"),
    pytest.param((1, 3, 8, 12, 9), (3, 3), (2, 2), (0, 1), (1, 1), id="3x3 of a photo"),
    pytest.param((1, 1, 17, 9, 8), (5, 5), (1, 1), (2, 2), (1, 1), id="one channel"),
    pytest.param((2, 20, 40, 9, 11), (3, 3), (2, 2), (1, 1), (1, 1), id="3x3 with a stride"),
    pytest.param((1, 70, 16, 7, 6), (3, 3), (1, 2), (2, 4), (2, 3), id="dilated, in chunks"),
    pytest.param((2, 40, 21, 9, 8), (1, 1), (2, 2), (0, 0), (1, 1), id="1x1 with a stride"),
    pytest.param((1, 530, 24, 4, 5), (1, 1), (3, 3), (0, 0), (1, 1), id="stride above the kernel"),
    pytest.param((1, 6, 9, 2, 3), (3, 5), (1, 1), (4, 6), (3, 2), id="kernel beyond the map"),
    pytest.param((1, 17, 1, 1, 1), (1, 1), (1, 1), (1, 1), (1, 1), id="one pixel, padded 1x1"),
    pytest.param((0, 3, 8, 5, 5), (3, 3), (2, 2), (1, 1), (1, 1), id="no image"),
]
every_patch = pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "dilation"), PATCHES)


def run_patches(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    *,
    act: str = "relu",
    residual: Tensor | None = None,
    margin: int = 0,
) -> Tensor:
    """The convolution, into channels from `margin` on of a map that is nan before."""
    k, kernel = weight.shape[0], weight.shape[2:]
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    size = [output_size(*axis) for axis in sizes]
    out = torch.full((x.shape[0], k + 2 * margin, *size), float("nan"))
    out = out.contiguous(memory_format=CHANNELS_LAST)
    planar = x.shape[1] <= 4
    if not planar and x.stride(1) != 1:
        x = x.contiguous(memory_format=CHANNELS_LAST)
    rows = (weight if planar else weight.permute(0, 2, 3, 1)).flatten(1)
    panels = F.pad(rows, (0, 0, 0, -k % 16)).unflatten(0, (-1, 16)).mT.contiguous()
    geometry = (list(kernel), stride, padding, dilation, planar)
    OPS._conv_pixels_cpu(x, panels, shift, residual, out, margin, act, *geometry)
    assert out[:, :margin].isnan().all() and out[:, margin + k :].isnan().all()
    return out[:, margin : margin + k]


class TestPatches:
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    @every_patch
    def test_is_the_convolution(
        self, instruction_set, shape, kernel, stride, padding, dilation, layout
    ) -> None:
        n, c, k, height, width = shape
        geometry = (stride, padding, dilation)
        x, weight, shift = (
            torch.randn(n, c, height, width),
            torch.randn(k, c, *kernel),
            torch.randn(k),
        )
        x = layout(x)
        product = F.conv2d(x.double(), weight.double(), shift.double(), *geometry)
        y = run_patches(x, weight, shift, *geometry, act="none", margin=3)
        # Of few values all may be small differences of large terms.
        terms = F.conv2d(x.double().abs(), weight.double().abs(), shift.double().abs(), *geometry)
        norm = max(product.norm().item(), terms.norm().item() / 16)
        assert (y.double() - product).norm().item() <= DIRECT * norm

    # Widths of register tiles: halves of panels, one and two panels, a rest that fills no vector.
    @pytest.mark.parametrize("outputs", [1, 8, 16, 21, 24, 32, 40])
    @pytest.mark.parametrize("channels", [1, 3, 17, 64, 300])
    def test_every_ending(self, instruction_set, channels: int, outputs: int) -> None:
        """Activations and residuals, which are compiled for whole tiles of 6, 12 or 24 rows."""
        x, residual = nhwc(1, channels, 7, 9), nhwc(1, outputs, 7, 9)
        weight, shift = torch.randn(outputs, channels, 1, 1), torch.randn(outputs)
        product = F.conv2d(x.double(), weight.double(), shift.double())
        scale = F.conv2d(x.double().abs(), weight.double().abs()).norm()
        for act in ("none", "relu", "relu6", "hardswish"):
            for added in (None, residual):
                y = run_patches(x, weight, shift, act=act, residual=added)
                expected = activate(product if added is None else product + added, act)
                assert (y.double() - expected).norm() <= DIRECT / 4 * scale

    @pytest.mark.parametrize("channels", [3, 70], ids=["planar", "channels one behind another"])
    def test_threads_and_layouts_do_not_matter(self, channels: int) -> None:
        weight, shift = torch.randn(40, channels, 3, 3), torch.randn(40)
        x = torch.randn(2, channels, 23, 31)
        expected = run_patches(x, weight, shift, (2, 2), (1, 1))
        for name in ("channels_last", "contiguous", "strided", "slice"):
            for count in (1, 2, 3, 7):
                with threads(count):
                    y = run_patches(LAYOUTS[name](x), weight, shift, (2, 2), (1, 1))
                assert torch.equal(y, expected), (name, count)

    @pytest.mark.parametrize("act", ["relu", "relu6", "hardswish", "none"])
    @pytest.mark.parametrize("value", NOT_FINITE, ids=str)
    def test_what_is_not_finite_stays_so(self, instruction_set, value, act) -> None:
        """In whole tiles and in the rows and channels that fill none."""
        x, residual, shift = nhwc(1, 20, 13, 15), nhwc(1, 21, 7, 8), torch.randn(21)
        x[0, 3, 0, 4] = x[0, 3, 12, 14] = residual[0, 3, 2, 2] = residual[0, 20, 6, 7] = value
        shift[16] = value
        weight, geometry = torch.randn(21, 20, 3, 3), ((2, 2), (1, 1))
        for added in (None, residual):
            y = run_patches(x, weight, shift, *geometry, act=act, residual=added)
            product = F.conv2d(x.double(), weight.double(), shift.double(), *geometry)
            expected = activate(product if added is None else product + added, act)
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.isinf(), expected.isinf())

    @pytest.mark.parametrize(
        ("geometry", "text"),
        [
            (((3, 3), (1, 1), (0, 0), (3, 3)), "no result for x .* dilation"),
            (((1, 1), (0, 1), (0, 0), (1, 1)), r"stride must be from 1 to 2\^31 - 1, got \[0, 1\]"),
            (((3,), (1, 1), (0, 0), (1, 1)), r"kernel must be 2 numbers, got \[3\]"),
            (((1, 1), (1, 1), (0, 2**31), (1, 1)), "padding must be from 0 to"),
            (((3, 3), (1, 1), (1, 1), (1, 1)), "prepared weights .* do not fit x"),
            (((1, 1), (2, 2), (0, 0), (1, 1)), "out .* has no place for 16 channels"),
        ],
        ids=["kernel", "stride", "one number", "padding", "weight", "out"],
    )
    def test_what_does_not_fit_is_refused(self, geometry, text: str) -> None:
        x, out, panels = nhwc(1, 4, 5, 5), nhwc(1, 16, 5, 5), torch.zeros(1, 4, 16)
        with pytest.raises(ValueError, match=text):
            OPS._conv_pixels_cpu(x, panels, torch.zeros(16), None, out, 0, "none", *geometry)
        with pytest.raises(ValueError, match="channels must lie one behind another"):
            OPS._conv_pixels_cpu(x.contiguous(), panels, torch.zeros(16), None, out, 0, "none")


class TestBackend:
    """The public ops on backend "cpu"."""

    @pytest.mark.parametrize("place", ["weight", "weight of a live tap", "x", "grad"])
    @pytest.mark.parametrize("dilation", [2, 18], ids=["some taps outside", "dead taps"])
    @pytest.mark.parametrize("op", ["conv2d", "aspp_convs"])
    def test_nan_in_training(self, op, dilation, place) -> None:
        """PyTorch multiplies the padding of maps as small as this one, and 0 * nan is nan."""
        x, weight = nhwc(1, 64, 5, 9), torch.randn(32, 64, 3, 3)
        grad = nhwc(1, 32, 5, 9)
        target = {
            "weight": weight[3, 7, 0, 2:],
            "weight of a live tap": weight[3, 7, 1, 1:2],
            "x": x[0, 5, 2, 2:3],
            "grad": grad[0, 5, 2, 2:3],
        }[place]
        target.fill_(float("nan"))
        leaves = x.requires_grad_(), weight.requires_grad_()
        expected = F.conv2d(x, weight, None, 1, dilation, dilation)
        with dlf.use_backend("cpu"):
            if op == "conv2d":
                y = ops.conv2d(x, weight, padding=dilation, dilation=dilation)
            else:
                y, *_ = aspp_convs(x, [weight], [dilation], stats=False)
            assert_shows(y, expected)
            found = torch.autograd.grad(y, leaves, grad)
        for got, want in zip(found, torch.autograd.grad(expected, leaves, grad), strict=True):
            assert_shows(got, want)
            assert got.isfinite().any()

    @pytest.mark.parametrize(
        ("shape", "kernel", "options"),
        [
            ((2, 16, 24, 33, 20), 3, {"padding": 2, "dilation": 2}),
            ((1, 256, 256, 17, 17), 3, {"padding": 1}),
            ((2, 3, 8, 15, 15), 7, {"stride": 2, "padding": 3}),
            ((1, 130, 40, 9, 9), 1, {}),
            ((2, 12, 12, 9, 9), 3, {"padding": 1, "groups": 12}),
            ((1, 4, 4, 5, 5), 3, {"padding": 4, "dilation": 4}),
        ],
        ids=["dilated", "tiles in one call", "stem", "1x1", "depthwise", "larger than the map"],
    )
    @pytest.mark.parametrize("act", ["relu", None], ids=["relu", "identity"])
    def test_conv_bn_act(self, shape, kernel, options, act) -> None:
        n, c, k, height, width = shape
        x = torch.randn(n, c, height, width)
        weight = torch.randn(k, c // options.get("groups", 1), kernel, kernel)
        scale, shift = torch.rand(k) + 0.5, torch.randn(k)
        double = [t.double() for t in (x, weight, scale, shift)]
        residual = torch.randn_like(reference.conv_bn_act(*double, **options).float())
        expected = reference.conv_bn_act(*double, **options, residual=residual.double(), act=act)
        with dlf.use_backend("cpu"):
            y = ops.conv_bn_act(x, weight, scale, shift, **options, residual=residual, act=act)
            again = ops.conv_bn_act(x, weight, scale, shift, **options, residual=residual, act=act)
        assert relative_error(y, expected) <= SAVING
        assert torch.equal(y, again)
        assert y.is_contiguous(memory_format=CHANNELS_LAST)

    def test_weights_changed_in_place_are_seen(self) -> None:
        """Also through .data, which no version counter shows."""
        x, weight = torch.randn(1, 64, 17, 17), torch.randn(64, 64, 3, 3)
        one, zero = torch.ones(64), torch.zeros(64)
        with dlf.use_backend("cpu"):
            y = ops.conv_bn_act(x, weight, one, zero, padding=1)
            weight.data.neg_()
            negated = ops.conv_bn_act(x, weight, one, zero, padding=1, act=None)
        assert torch.equal(F.relu(-negated), y)

    def test_aspp(self) -> None:
        x = torch.randn(2, 20, 13, 11)
        weights = [torch.randn(6, 20, 1, 1), *(torch.randn(6, 20, 3, 3) for _ in range(3))]
        scales, shifts = ([torch.randn(6) for _ in weights] for _ in range(2))
        dilations = [1, 2, 4, 12]
        double = [[t.double() for t in list_] for list_ in (weights, scales, shifts)]
        expected = reference.aspp_branches(x.double(), *double, dilations)
        pooled, projection = torch.randn(2, 5), torch.randn(7, 29, 1, 1)
        scale, shift = torch.randn(7), torch.randn(7)
        with dlf.use_backend("cpu"):
            y = ops.aspp_branches(x, weights, scales, shifts, dilations)
            z = ops.aspp_project(y, pooled, projection, scale, shift)
        assert relative_error(y, expected) <= SAVING
        arguments = (t.double() for t in (y, pooled, projection, scale, shift))
        assert relative_error(z, reference.aspp_project(*arguments)) <= DIRECT

    def test_it_is_the_automatic_choice_for_float32_only(self) -> None:
        weight, one = torch.randn(4, 3, 3, 3), torch.ones(4)
        assert dlf.why("conv_bn_act", torch.randn(1, 3, 5, 5), weight, one, one).chosen == "cpu"
        why = dlf.why("conv_bn_act", torch.randn(1, 3, 5, 5).double(), weight.double(), one, one)
        assert why.chosen == "reference"
        assert "takes float32 only, the input is float64" in str(why)


class TestWeightGradient:
    @staticmethod
    def expected(grad: Tensor, x: Tensor, kernel: int, stride: int, dilation: int) -> Tensor:
        filters = torch.zeros(grad.shape[1], x.shape[1], kernel, kernel, dtype=torch.float64)
        filters.requires_grad_()
        padding = dilation * (kernel // 2)
        y = F.conv2d(x.double(), filters, None, stride, padding, dilation)
        return torch.autograd.grad(y, filters, grad.double())[0]

    # [N, C, H, W] of x, filters, kernel, stride, dilation
    @pytest.mark.parametrize("spreads", [False, True], ids=["windows", "spread"])
    @pytest.mark.parametrize(
        ("shape", "filters", "kernel", "stride", "dilation"),
        [
            pytest.param((2, 5, 7, 6), 3, 1, 1, 1, id="1x1"),
            pytest.param((2, 5, 7, 6), 3, 1, 2, 1, id="1x1 with a stride and a rest"),
            pytest.param((2, 5, 9, 9), 3, 1, 3, 1, id="1x1 with a stride that fits"),
            pytest.param((2, 5, 7, 6), 3, 3, 1, 1, id="3x3"),
            pytest.param((3, 4, 9, 11), 2, 3, 1, 4, id="some taps in a part of the map"),
            pytest.param((2, 4, 3, 9), 2, 3, 1, 5, id="rows of taps outside"),
            pytest.param((2, 4, 3, 3), 2, 3, 1, 20, id="the middle tap alone"),
            pytest.param((2, 4, 1, 1), 2, 3, 1, 1, id="one pixel"),
            pytest.param((1, 1, 6, 5), 1, 3, 1, 2, id="one channel, one filter"),
            pytest.param((0, 4, 5, 5), 2, 3, 1, 1, id="no image"),
            pytest.param((2, 70, 33, 31), 65, 3, 1, 6, id="copied in threads"),
        ],
    )
    def test_is_pytorchs(self, shape, filters, kernel, stride, dilation, spreads) -> None:
        x = nhwc(*shape)
        n, _, height, width = shape
        grad = nhwc(n, filters, (height - 1) // stride + 1, (width - 1) // stride + 1)
        with deterministic():
            # Tensors that C++ makes are filled with nan.
            found = OPS._conv_weight_gradient_cpu(grad, x, kernel, stride, dilation, spreads)
        expected = self.expected(grad, x, kernel, stride, dilation)
        assert found.is_contiguous(memory_format=CHANNELS_LAST) and found.shape == expected.shape
        assert relative_error(found, expected) <= DIRECT
        for count in (1, 2):
            with threads(count):
                again = OPS._conv_weight_gradient_cpu(grad, x, kernel, stride, dilation, spreads)
            assert torch.equal(again, found)

    @pytest.mark.parametrize("value", NOT_FINITE)
    @pytest.mark.parametrize("spreads", [False, True], ids=["windows", "spread"])
    def test_a_gradient_that_is_not_finite_shows(self, value, spreads) -> None:
        """In all taps of its filter, as padding times it does in PyTorch, and in no other's."""
        x, grad = nhwc(1, 4, 5, 5), nhwc(1, 3, 5, 5)
        grad[0, 1, 0, 0] = value
        found = OPS._conv_weight_gradient_cpu(grad, x, 3, 1, 2, spreads)
        assert found[1].isnan().all() and found[::2].isfinite().all()

    def test_what_does_not_fit_is_refused(self) -> None:
        x = nhwc(1, 4, 5, 5)
        with pytest.raises(ValueError, match="kernel must be 1, or 3 with stride 1, got 3 with"):
            OPS._conv_weight_gradient_cpu(x, x, 3, 2, 1, False)
        with pytest.raises(ValueError, match=r"grad \[1, 4, 5, 5\] does not fit x .* at stride 2"):
            OPS._conv_weight_gradient_cpu(x, x, 1, 2, 1, False)
        with pytest.raises(ValueError, match=r"x must be a float32 map .* in channels_last"):
            OPS._conv_weight_gradient_cpu(x, x.contiguous(), 1, 1, 1, False)


# [N, C, H, W] of x, kernel, padding, dilation
DEPTHWISE = [
    pytest.param((2, 16, 9, 11), (3, 3), (1, 1), (1, 1), id="3x3, channels of one block"),
    pytest.param(
        (2, 19, 9, 11), (5, 5), (4, 4), (2, 2), id="5x5 dilated, a block that is not full"
    ),
    pytest.param((1, 5, 6, 7), (7, 7), (9, 9), (3, 3), id="7x7, channels that fill no vector"),
    pytest.param((2, 17, 1, 1), (3, 3), (1, 1), (1, 1), id="one pixel"),
    pytest.param((3, 33, 7, 5), (3, 3), (20, 20), (20, 20), id="dilation beyond the map"),
    pytest.param((1, 4, 2, 3), (3, 3), (2**31 - 1,) * 2, (2**31 - 1,) * 2, id="largest dilation"),
    pytest.param((1, 4, 1, 5), (2, 2), (1, 1), (2, 1), id="no row of taps meets the map"),
    pytest.param((2, 18, 6, 30), (5, 3), (0, 2), (1, 1), id="rows unlike columns"),
    pytest.param((1, 20, 8, 8), (4, 6), (7, 0), (3, 1), id="even kernels, padding beyond the taps"),
    pytest.param((1, 16, 3, 700), (1, 5), (0, 0), (1, 3), id="a row of several runs"),
    pytest.param((2, 2, 4, 4), (1, 1), (2, 2), (1, 1), id="a padded 1x1"),
    pytest.param((0, 3, 5, 6), (3, 3), (1, 1), (1, 1), id="no image"),
    pytest.param((2, 3, 0, 6), (3, 3), (2, 2), (1, 1), id="no row"),
]
every_depthwise = pytest.mark.parametrize(("shape", "kernel", "padding", "dilation"), DEPTHWISE)


class TestDepthwiseGradients:
    @staticmethod
    def tensors(shape, kernel, padding, dilation) -> tuple[Tensor, Tensor, Tensor]:
        """(grad, x, weight)"""
        n, c, *size = shape
        axes = zip(size, kernel, (1, 1), padding, dilation, strict=True)
        return (
            nhwc(n, c, *(output_size(*axis) for axis in axes)),
            nhwc(*shape),
            torch.randn(c, 1, *kernel),
        )

    @staticmethod
    def expected(grad, x, weight, padding, dilation) -> tuple[Tensor, Tensor]:
        """Tap by tap, over the pixels for which it lies inside the map."""
        grad, x, weight = grad.double(), x.double(), weight.double()
        to_x, to_weight = torch.zeros_like(x), torch.zeros_like(weight)
        for row in range(weight.shape[2]):
            for column in range(weight.shape[3]):
                offsets = [
                    t * d - p for t, d, p in zip((row, column), dilation, padding, strict=True)
                ]
                # Outputs q with an input q + offset.
                sizes = zip(grad.shape[2:], x.shape[2:], offsets, strict=True)
                spans = [(max(0, -o), min(out, size - o), o) for out, size, o in sizes]
                if any(first >= last for first, last, _ in spans):
                    continue
                of_grad = (..., *(slice(first, last) for first, last, _ in spans))
                of_x = (..., *(slice(first + o, last + o) for first, last, o in spans))
                to_x[of_x] += weight[:, 0, row, column, None, None] * grad[of_grad]
                to_weight[:, 0, row, column] = (grad[of_grad] * x[of_x]).sum((0, 2, 3))
        return to_x, to_weight

    @every_depthwise
    def test_is_the_definition(self, instruction_set, shape, kernel, padding, dilation) -> None:
        tensors = self.tensors(shape, kernel, padding, dilation)
        with deterministic():
            # Tensors that C++ makes are filled with nan.
            found = OPS._depthwise_gradients_cpu(*tensors, padding, dilation, True, True)
        expected = self.expected(*tensors, padding, dilation)
        for got, want in zip(found, expected, strict=True):
            assert got.shape == want.shape
            assert relative_error(got, want) <= DIRECT
        assert found[0].is_contiguous(memory_format=CHANNELS_LAST)
        for to_x, to_weight in ((True, False), (False, True), (False, False)):
            some = OPS._depthwise_gradients_cpu(*tensors, padding, dilation, to_x, to_weight)
            for asked, got, whole in zip((to_x, to_weight), some, found, strict=True):
                assert torch.equal(got, whole) if asked else got.numel() == 0

    def test_the_definition_is_pytorchs(self) -> None:
        grad, x, weight = self.tensors((2, 6, 9, 8), (5, 3), (3, 1), (2, 1))
        leaves = x.double().requires_grad_(), weight.double().requires_grad_()
        y = F.conv2d(*leaves, None, 1, (3, 1), (2, 1), 6)
        found = torch.autograd.grad(y, leaves, grad.double())
        for got, want in zip(found, self.expected(grad, x, weight, (3, 1), (2, 1)), strict=True):
            assert relative_error(got, want) < 1e-14

    @pytest.mark.parametrize("size", [(120, 300), (700, 40)], ids=["long rows", "many rows"])
    def test_long_sums(self, instruction_set, size) -> None:
        """Sums over a whole map are not those of one accumulator."""
        geometry = ((3, 3), (1, 1), (1, 1))
        tensors = self.tensors((1, 9, *size), *geometry)
        found = OPS._depthwise_gradients_cpu(*tensors, *geometry[1:], True, True)
        for got, want in zip(found, self.expected(*tensors, *geometry[1:]), strict=True):
            assert relative_error(got, want) <= DIRECT

    def test_threads_do_not_matter(self) -> None:
        geometry = ((5, 5), (4, 4), (2, 2))
        tensors = self.tensors((3, 40, 13, 17), *geometry)
        expected = OPS._depthwise_gradients_cpu(*tensors, *geometry[1:], True, True)
        for count in (1, 2, 3, 7):
            with threads(count):
                found = OPS._depthwise_gradients_cpu(*tensors, *geometry[1:], True, True)
            assert all(map(torch.equal, found, expected))

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_the_public_op(self, layout) -> None:
        """x and the gradient in any strides; what is chosen by itself."""
        grad, x, weight = self.tensors((2, 19, 9, 11), (5, 5), (4, 4), (2, 2))
        leaves = layout(x).requires_grad_(), layout(weight).requires_grad_()
        options = {"padding": 4, "dilation": 2, "groups": 19}
        why = dlf.why("conv2d_backward", *leaves, **options)
        assert why.chosen == "cpu"
        y = ops.conv2d(*leaves, **options)
        found = torch.autograd.grad(y, leaves, layout(grad))
        doubles = (t.detach().double() for t in (layout(grad), *leaves))
        expected = self.expected(*doubles, (4, 4), (2, 2))
        for got, want in zip(found, expected, strict=True):
            assert relative_error(got, want) <= DIRECT

    @pytest.mark.parametrize(
        "options",
        [
            {"groups": 8, "stride": 2, "padding": 1},
            {"groups": 4, "padding": 1},
            {"groups": 8, "padding": 4, "kernel": 9},
        ],
        ids=["stride", "groups of channels", "9x9"],
    )
    def test_what_is_left_to_pytorch(self, options) -> None:
        kernel = options.pop("kernel", 3)
        x, weight = nhwc(1, 8, 9, 9), torch.randn(8, 8 // options["groups"], kernel, kernel)
        why = dlf.why("conv2d_backward", x, weight, **options)
        assert why.chosen == "reference" and "depthwise ones with stride 1" in str(why)

    @pytest.mark.parametrize("value", NOT_FINITE, ids=str)
    @pytest.mark.parametrize("place", ["weight", "x", "grad"])
    @pytest.mark.parametrize(
        ("kernel", "dilation"), [(3, 1), (3, 2), (5, 2), (3, 9)], ids=["3x3", "2", "5x5", "beyond"]
    )
    def test_what_is_not_finite_shows(
        self, instruction_set, kernel, dilation, place, value
    ) -> None:
        """In the channel that it is of, and in no other."""
        padding = kernel // 2 * dilation
        geometry = (kernel, kernel), (padding,) * 2, (dilation,) * 2
        grad, x, weight = self.tensors((2, 19, 9, 7), *geometry)
        target = {"weight": weight[17, 0, 0], "x": x[1, 17, 0], "grad": grad[1, 17, 0]}[place]
        target[0] = value
        leaves = x.requires_grad_(), weight.requires_grad_()
        y = F.conv2d(*leaves, None, 1, *geometry[1:], 19)
        expected = torch.autograd.grad(y, leaves, grad)
        with torch.no_grad():
            found = OPS._depthwise_gradients_cpu(grad, x, weight, *geometry[1:], True, True)
        for got, want in zip(found, expected, strict=True):
            assert_shows(got, want)
        others = [c for c in range(19) if c != 17]
        assert found[0][:, others].isfinite().all() and found[1][others].isfinite().all()

    @pytest.mark.parametrize(
        ("changed", "text"),
        [
            ({"x": torch.zeros(1, 4, 5, 5)}, r"x must be a float32 map .* in channels_last"),
            ({"grad": nhwc(1, 4, 5, 6)}, r"grad \[1, 4, 5, 6\] does not fit x .* and weight"),
            ({"grad": nhwc(2, 4, 5, 5)}, r"grad \[2, 4, 5, 5\] does not fit x"),
            ({"weight": torch.zeros(4, 2, 3, 3)}, r"weight must be float32 \[4, 1, R, S\]"),
            ({"weight": torch.zeros(4, 1, 9, 9)}, "R and S from 1 to 7"),
            ({"weight": torch.zeros(4, 1, 3, 3).double()}, "got Double"),
            ({"padding": (1,)}, r"padding must be 2 numbers, got \[1\]"),
            ({"dilation": (0, 1)}, r"dilation must be from 1 to 2\^31 - 1"),
        ],
        ids=["layout", "size", "images", "groups", "kernel", "dtype", "one number", "no dilation"],
    )
    def test_what_does_not_fit_is_refused(self, changed, text: str) -> None:
        given = {
            "grad": nhwc(1, 4, 5, 5),
            "x": nhwc(1, 4, 5, 5),
            "weight": torch.zeros(4, 1, 3, 3),
            "padding": (1, 1),
            "dilation": (1, 1),
        } | changed
        with pytest.raises(ValueError, match=text):
            OPS._depthwise_gradients_cpu(**given, to_x=True, to_weight=True)
