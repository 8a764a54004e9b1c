"""Depthwise convolutions and inverted residuals in strips, in every instruction set there is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast import _ext
from deeplab_fast.dispatch.errors import DIRECT
from deeplab_fast.ops.prepared import PreparedConv, depthwise_taps, padded, panels
from deeplab_fast.ops.prepared_inverted_residual import Folded, PreparedInvertedResidual
from deeplab_fast.program.cpu_layers import InvertedResidualLayer
from deeplab_fast.program.inference import fold
from deeplab_fast.program.layers import SamePadding
from deeplab_fast.testing import cpu_instruction_sets, threads

OPS = torch.ops.deeplab_fast
needs_kernels = pytest.mark.skipif(not _ext.CPU.loaded, reason=_ext.CPU.reason)
CHANNELS_LAST = torch.channels_last
NAN, INF = float("nan"), float("inf")
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "none": lambda t: t,
}


@pytest.fixture(params=cpu_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = OPS._cpu_instruction_set("")
    OPS._cpu_instruction_set(request.param)
    yield request.param
    OPS._cpu_instruction_set(before)


def relative_error(y: Tensor, expected: Tensor) -> float:
    scale = expected.norm().item() or 1.0
    return (y.double() - expected).norm().item() / scale


def nhwc(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=CHANNELS_LAST)


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, NAN).contiguous(memory_format=CHANNELS_LAST)


# (N, C, H, W), kernel, stride, (top, bottom, left, right), dilation
DEPTHWISE = [
    pytest.param((1, 24, 19, 23), 3, 1, (1, 1, 1, 1), 1, id="3x3"),
    pytest.param((2, 72, 17, 21), 5, 2, (2, 2, 2, 2), 1, id="5x5 with stride"),
    pytest.param((1, 40, 18, 20), 3, 2, (0, 1, 0, 1), 1, id="padded below and on the right"),
    pytest.param((1, 16, 12, 30), 5, 1, (4, 4, 4, 4), 2, id="dilated"),
    pytest.param((1, 8, 5, 6), 3, 1, (9, 9, 9, 9), 9, id="dilated beyond the map"),
    pytest.param((2, 136, 1, 1), 5, 1, (2, 2, 2, 2), 1, id="one pixel"),
    pytest.param((1, 21, 9, 13), 3, 1, (1, 1, 1, 1), 1, id="channels that fill no vector"),
    pytest.param((1, 3, 9, 13), 3, 2, (1, 1, 1, 1), 1, id="fewer channels than a vector has"),
    pytest.param((1, 16, 9, 40), 7, 3, (3, 3, 3, 3), 1, id="7x7 with stride 3"),
    pytest.param((1, 16, 11, 11), 3, 1, (0, 0, 0, 0), 1, id="no padding"),
    pytest.param((1, 16, 9, 11), 1, 4, (0, 0, 0, 0), 1, id="1x1 with a stride beyond it"),
    pytest.param((0, 16, 9, 11), 3, 1, (1, 1, 1, 1), 1, id="no image"),
]


def run_depthwise(
    x: Tensor, weight: Tensor, shift: Tensor, stride: int, padding, dilation: int, act: str
) -> Tensor:
    top, bottom, left, right = padding
    sizes = [
        (length + extra - dilation * (weight.shape[2] - 1) - 1) // stride + 1
        for length, extra in zip(x.shape[2:], (top + bottom, left + right), strict=True)
    ]
    out = poisoned(*x.shape[:2], *sizes)
    geometry = ([stride] * 2, [top, left], [dilation] * 2)
    nothing = (None, None, None, out, 0, None)
    OPS._inverted_residual_cpu(
        x, None, None, depthwise_taps(weight), shift, *nothing, *geometry, "none", act, "none"
    )
    return out


@needs_kernels
class TestDepthwise:
    @pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "dilation"), DEPTHWISE)
    def test_is_the_convolution(
        self, instruction_set, shape, kernel, stride, padding, dilation
    ) -> None:
        torch.manual_seed(0)
        channels = shape[1]
        x, weight = nhwc(*shape), torch.randn(channels, 1, kernel, kernel)
        shift = torch.randn(channels)
        top, bottom, left, right = padding
        exact = F.conv2d(
            F.pad(x, [left, right, top, bottom]).double(),
            weight.double(),
            shift.double(),
            stride,
            0,
            dilation,
            channels,
        )
        for act, function in ACTS.items():
            y = run_depthwise(x, weight, shift, stride, padding, dilation, act)
            assert relative_error(y, function(exact)) <= DIRECT

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_what_is_not_finite_shows(self, instruction_set, value: float) -> None:
        x, weight = nhwc(1, 24, 9, 12), torch.randn(24, 1, 3, 3)
        x[0, 5, 4, 6] = value
        weight[5, 0, 0, 0] = 0.0
        for act, function in ACTS.items():
            y = run_depthwise(x, weight, torch.zeros(24), 1, (1, 1, 1, 1), 1, act)
            expected = function(F.conv2d(x, weight, None, 1, 1, 1, 24))
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.isinf(), expected.isinf())

    def test_threads_do_not_change_bits(self) -> None:
        x, weight = nhwc(2, 72, 65, 70), torch.randn(72, 1, 5, 5)
        results = []
        for count in (1, 2, 3, 4):
            with threads(count):
                results.append(
                    run_depthwise(x, weight, torch.zeros(72), 1, (2, 2, 2, 2), 1, "relu")
                )
        assert all(torch.equal(y, results[0]) for y in results)

    def test_prepared_convolution_takes_it(self) -> None:
        weight = torch.randn(21, 1, 3, 3)
        conv = PreparedConv(weight, None, None, stride=2, padding=1, groups=21, act=None)
        x, residual = nhwc(1, 21, 9, 10), nhwc(1, 21, 5, 5)
        assert conv.plan(x.shape).kernel == "depthwise"
        assert conv.writes_into(x.shape)
        expected = F.conv2d(x.double(), weight.double(), None, 2, 1, 1, 21) + residual
        assert relative_error(conv(x, residual), expected) <= DIRECT
        # Into the residual's own memory, where some channels are written twice.
        assert relative_error(conv(x, residual, out=residual), expected) <= DIRECT

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"depthwise": torch.zeros(3, 3, 8)}, r"depthwise must be .* \[R, S, 16\]"),
            ({"stride": [0, 1]}, "stride and dilation must be from 1 to"),
            ({"act": "gelu"}, "act must be relu"),
            ({"out": poisoned(1, 4, 5, 5)}, "has no place"),
        ],
        ids=["not padded", "stride", "act", "out"],
    )
    def test_refuses(self, change, message: str) -> None:
        given = {"depthwise": torch.zeros(3, 3, 16), "stride": [1, 1], "act": "relu"}
        given |= {"out": poisoned(1, 8, 5, 5)} | change
        with pytest.raises(ValueError, match=message):
            OPS._inverted_residual_cpu(
                nhwc(1, 8, 5, 5), None, None, given["depthwise"], torch.zeros(8), None, None, None,
                given["out"], 0, None, given["stride"], [1, 1], [1, 1], "none", given["act"], ""
            )  # fmt: skip


class Case:
    """A block with random weights, and what it computes in float64."""

    def __init__(self, c: int, k: int, out: int, kernel: int, squeeze: bool, **options) -> None:
        def folded(outputs: int, channels: int, size: int, act: str | None) -> Folded:
            weight = torch.randn(outputs, channels, size, size) / (channels * size * size) ** 0.5
            # Shifts that show where padding is taken for act(shift).
            return Folded(weight, torch.rand(outputs) + 0.5, torch.randn(outputs) + 1, act)

        self.expand = None if c == k else folded(k, c, 1, "relu6")
        self.depthwise = folded(k, 1, kernel, "hardswish")
        self.project = folded(out, k, 1, None)
        self.options = options
        mix = torch.randn(k, k) / k**0.5
        self.squeeze = (
            (lambda means: torch.sigmoid(means @ mix.to(means.dtype))) if squeeze else None
        )

    def prepared(self, **options) -> PreparedInvertedResidual:
        parts = (self.expand, self.depthwise, self.project)
        return PreparedInvertedResidual(*parts, squeeze=self.squeeze, **self.options, **options)

    def exact(self, x: Tensor, residual: Tensor | None, sides=None, dtype=torch.float64) -> Tensor:
        def conv(part: Folded, y: Tensor, **options) -> Tensor:
            y = F.conv2d(y, part.weight.to(dtype), **options)
            scale, shift = (v.to(dtype)[:, None, None] for v in (part.scale, part.shift))
            return ACTS[part.act or "none"](y * scale + shift)

        y = x.to(dtype)
        y = y if self.expand is None else conv(self.expand, y)
        options = dict(self.options)
        if sides is not None:
            y = F.pad(y, sides)
            options["padding"] = 0
        y = conv(self.depthwise, y, groups=y.shape[1], **options)
        if self.squeeze is not None:
            y = y * self.squeeze(y.mean((2, 3)))[:, :, None, None]
        y = conv(self.project, y)
        return y if residual is None else y + residual.to(dtype)


# (N, C, H, W), channels, outputs, kernel, squeeze, options
BLOCKS = [
    pytest.param((1, 16, 40, 70), 64, 24, 3, False, {"stride": (2, 2), "padding": (1, 1)}, id="v3"),
    pytest.param((2, 24, 37, 33), 72, 40, 5, True, {"padding": (2, 2)}, id="squeeze"),
    pytest.param((1, 16, 21, 30), 16, 16, 3, False, {"padding": (1, 1)}, id="no expansion"),
    pytest.param((1, 21, 9, 11), 35, 13, 3, False, {"padding": (1, 1)}, id="odd channels"),
    pytest.param(
        (1, 48, 17, 19), 160, 48, 5, False, {"padding": (4, 4), "dilation": (2, 2)}, id="dilated"
    ),
    pytest.param((2, 16, 1, 1), 96, 24, 5, True, {"padding": (2, 2)}, id="one pixel"),
    pytest.param((1, 8, 3, 4), 40, 8, 3, False, {"padding": (9, 9), "dilation": (9, 9)}, id="far"),
    pytest.param((1, 16, 9, 12), 32, 8, 1, False, {"stride": (3, 3)}, id="rows between"),
    pytest.param((0, 16, 9, 12), 32, 8, 3, True, {"padding": (1, 1)}, id="no image"),
]


class TestBlocks:
    @pytest.mark.parametrize(("shape", "k", "out", "kernel", "squeeze", "options"), BLOCKS)
    @needs_kernels
    def test_is_its_convolutions(
        self, instruction_set, nan_poison, shape, k, out, kernel, squeeze, options
    ) -> None:
        torch.manual_seed(0)
        case = Case(shape[1], k, out, kernel, squeeze, **options)
        block = case.prepared()
        x = nhwc(*shape)
        assert block.writes_into(shape)
        expected = case.exact(x, None)
        assert tuple(expected.shape) == block.output_shape(shape)
        assert relative_error(block(x), expected) <= DIRECT
        # Any memory format, into a given map, with a residual.
        residual, into = torch.randn(expected.shape), poisoned(*expected.shape)
        y = block(x.contiguous(), residual, out=into)
        assert y is into
        assert relative_error(y, expected + residual) <= DIRECT

    @pytest.mark.parametrize("size", [18, 19, 20], ids=lambda size: f"{size} pixels")
    @pytest.mark.parametrize("missing", [False, True], ids=["strips", "convolutions"])
    @needs_kernels
    def test_same_padding(self, monkeypatch, size: int, missing: bool) -> None:
        torch.manual_seed(0)
        if missing:
            monkeypatch.setattr(_ext, "CPU", replace(_ext.CPU, loaded=False, reason="left out"))
        case = Case(16, 48, 16, 5, False, stride=(2, 2), padding=(2, 2))
        x = nhwc(1, 16, size, size + 1)
        sides = SamePadding((5, 5), (2, 2), (1, 1)).sides(x.shape)
        y = case.prepared()(x, sides=sides)
        assert relative_error(y, case.exact(x, None, sides)) <= DIRECT

    @needs_kernels
    @pytest.mark.parametrize("squeeze", [False, True])
    def test_threads_do_not_change_bits(self, squeeze: bool) -> None:
        torch.manual_seed(0)
        # Strips at all numbers of threads, and groups of channels.
        for shape, k in (((1, 24, 60, 90), 96), ((1, 80, 17, 17), 480)):
            case = Case(shape[1], k, shape[1], 5, squeeze, padding=(2, 2))
            block, x = case.prepared(), nhwc(*shape)
            results = []
            for count in (1, 2, 3, 4):
                with threads(count):
                    results.append(block(x, x))
            assert all(torch.equal(y, results[0]) for y in results)

    @needs_kernels
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    @pytest.mark.parametrize("squeeze", [False, True])
    def test_what_is_not_finite_in_the_input_shows(self, value: float, squeeze: bool) -> None:
        torch.manual_seed(0)
        case = Case(16, 64, 16, 3, squeeze, padding=(1, 1))
        x = nhwc(1, 16, 20, 24)
        x[0, 3, 9, 11] = value
        y, expected = case.prepared()(x, x), case.exact(x, x, dtype=torch.float32)
        assert y[expected.isnan()].isnan().all()
        assert not y[~expected.isfinite()].isfinite().any()
        assert torch.equal(y.isfinite(), expected.isfinite())

    @pytest.mark.parametrize("part", ["expand", "depthwise", "project"])
    def test_weights_that_are_not_finite_run_as_convolutions(self, part: str) -> None:
        torch.manual_seed(0)
        case = Case(8, 24, 8, 3, False, padding=(1, 1))
        getattr(case, part).weight[2, 0, 0, 0] = NAN
        block, x = case.prepared(), nhwc(1, 8, 6, 7)
        assert not block.writes_into(x.shape)
        expected = case.exact(x, x, dtype=torch.float32)
        assert torch.equal(block(x, x).isnan(), expected.isnan())

    def test_bound_on_prepared_weights(self) -> None:
        case = Case(8, 24, 8, 3, False, padding=(1, 1))
        x = nhwc(1, 8, 6, 7)
        bounded, free = case.prepared(max_extra_bytes=0), case.prepared()
        for block in (bounded, free):
            assert relative_error(block(x), case.exact(x, None)) <= DIRECT
        assert bounded.extra_bytes == 0 and not bounded.writes_into(x.shape)
        assert [plan.kernel for plan in bounded.plan(x.shape)] != ["strips"]
        if _ext.CPU.loaded:
            (plan,) = free.plan(x.shape)
            assert plan.kernel == "strips"
            taps = 9 * padded(24)
            assert free.extra_bytes == plan.extra_bytes == 4 * (taps + 9 * 32 + 24 * 16)
            live = (6 * 3 - 2) * (7 * 3 - 2)
            assert plan.macs == 6 * 7 * 24 * (8 + 8) + 24 * live

    def test_copies(self) -> None:
        case = Case(8, 24, 8, 3, False, padding=(1, 1))
        block, x = case.prepared(), nhwc(1, 8, 6, 7)
        expected = block(x)
        for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert torch.equal(other(x), expected)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((24, 8, 1, 1), (24, 1, 3, 3), (8, 16, 1, 1)), "same channels"),
            (((24, 8, 3, 3), (24, 1, 3, 3), (8, 24, 1, 1)), "no 1x1"),
            (((24, 8, 1, 1), (24, 2, 3, 3), (8, 24, 1, 1)), "depthwise"),
        ],
        ids=["channels", "expansion", "groups"],
    )
    def test_refuses_weights(self, shapes, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PreparedInvertedResidual(*(Folded(torch.ones(s), None, None, None) for s in shapes))

    def test_refuses_maps(self) -> None:
        block = Case(8, 24, 8, 3, False).prepared()
        with pytest.raises(ValueError, match=r"expected \[N, 8, H, W\]"):
            block(nhwc(1, 7, 6, 7))
        with pytest.raises(ValueError, match="smaller than the dilated kernel"):
            block(nhwc(1, 8, 2, 7))


@needs_kernels
def test_scaled_pixels(instruction_set) -> None:
    torch.manual_seed(0)
    x, weight, scale, shift = nhwc(2, 40, 7, 9), torch.randn(21, 40, 1, 1), torch.rand(2, 40), None
    shift = torch.randn(21)
    residual, out = nhwc(2, 21, 7, 9), poisoned(2, 21, 7, 9)
    OPS._scaled_pixels_cpu(x, panels(weight), scale, shift, residual, out, "relu")
    exact = F.conv2d((x * scale[:, :, None, None]).double(), weight.double(), shift.double())
    assert relative_error(out, F.relu(exact + residual)) <= DIRECT
    # Nothing times what is infinite is nan, as in x * scale.
    x[0, 4], scale[0, 4] = INF, 0.0
    OPS._scaled_pixels_cpu(x, panels(weight), scale, shift, None, out, "relu")
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_what_scaling_refuses() -> None:
    x, weight, out = nhwc(2, 40, 7, 9), panels(torch.randn(21, 40, 1, 1)), nhwc(2, 21, 7, 9)
    scale, shift = torch.rand(2, 40), torch.randn(21)
    with pytest.raises(ValueError, match="scale"):
        OPS._scaled_pixels_cpu(x, weight, scale[:1], shift, None, out, "relu")
    with pytest.raises(ValueError, match="shift must be a vector"):
        OPS._scaled_pixels_cpu(x, weight, scale, shift.expand(2, 21).clone(), None, out, "relu")


class TestPrograms:
    @staticmethod
    def names(model: nn.Module) -> list[str]:
        program, reason = fold(model)
        assert program is not None, reason
        return [layer.name for layer in program.layers if isinstance(layer, InvertedResidualLayer)]

    @pytest.mark.parametrize(
        ("name", "blocks"),
        [
            ("deeplabv3_mobilenet_v3_large", [f"backbone.{i}" for i in range(1, 16)]),
            ("deeplabv3_efficientnet_lite0", [f"backbone.block{i}" for i in range(16)]),
            (
                "deeplabv3_mobilenet_v2_tf",
                ["backbone.expanded_conv", *(f"backbone.expanded_conv_{i}" for i in range(1, 17))],
            ),
        ],
        ids=["MobileNetV3", "EfficientNet-Lite", "MobileNetV2"],
    )
    def test_blocks_are_one_layer(self, name: str, blocks: list[str]) -> None:
        assert self.names(getattr(dlf, name)(num_classes=2).eval()) == blocks

    def test_other_blocks_are_layers_of_their_own(self) -> None:
        torch.manual_seed(0)
        model = dlf.deeplabv3_mobilenet_v3_large(num_classes=2).eval()
        blocks = model.backbone
        # An activation behind the projection, where x is added; none of the depthwise convolution;
        # squeeze-excitation before it; a convolution of pairs of channels.
        blocks["3"].block[2].append(nn.ReLU())
        blocks["4"].block[1].append(nn.Dropout(0.5).train())
        blocks["5"].block[1], blocks["5"].block[2] = blocks["5"].block[2], blocks["5"].block[1]
        blocks["7"].block[1][0] = nn.Conv2d(240, 240, 3, 2, padding=1, groups=120, bias=False)
        assert self.names(model) == [f"backbone.{i}" for i in range(1, 16) if i not in (3, 4, 5, 7)]
        x = torch.randn(1, 3, 65, 49)
        blocks["4"].block[1][-1].eval()
        with torch.no_grad():
            y = model(x)["out"]
            model.fast = False
            expected = model.double()(x.double())["out"]
        assert relative_error(y, expected) <= DIRECT * 60**0.5
