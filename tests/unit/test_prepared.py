"""Convolutions with prepared weights: every kind of layer, layout, copy and bound."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from deeplab_fast import _ext, reference
from deeplab_fast.dispatch.errors import DIRECT, SAVING
from deeplab_fast.ops import _cpu_forms, prepared
from deeplab_fast.ops.prepared import PreparedConv
from deeplab_fast.ops.prepared_aspp import PreparedAspp, PreparedProject
from deeplab_fast.testing import threads

CHANNELS_LAST = torch.channels_last
needs_kernels = pytest.mark.skipif(not _ext.CPU.loaded, reason=_ext.CPU.reason)


def relative_error(y: Tensor, expected: Tensor) -> float:
    scale = expected.norm().item() or 1.0
    return (y.double() - expected).norm().item() / scale


def layer(c: int, k: int, kernel: int | tuple[int, int], groups: int = 1) -> tuple[Tensor, ...]:
    sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
    return torch.randn(k, c // groups, *sizes), torch.rand(k) + 0.5, torch.randn(k)


def expected_of(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, **options
) -> Tensor:
    act = options.pop("act", "relu")
    y = F.conv2d(x.double(), weight.double(), **options)
    y = y * scale.double()[:, None, None] + shift.double()[:, None, None]
    y = y if residual is None else y + residual.double()
    functions = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, None: lambda t: t}
    return functions[act](y)


# (N, C, K, H, W), kernel, options
LAYERS = [
    pytest.param((1, 3, 16, 17, 19), 7, {"stride": 2, "padding": 3}, id="stem"),
    pytest.param((2, 64, 64, 33, 17), 3, {"padding": 1}, id="3x3"),
    pytest.param((1, 48, 40, 33, 33), 3, {"padding": 4, "dilation": 4}, id="3x3 dilated"),
    pytest.param((1, 64, 32, 5, 9), 3, {"padding": 18, "dilation": 18}, id="beyond the map"),
    pytest.param((1, 64, 32, 1, 1), 3, {"padding": 2, "dilation": 2}, id="one pixel"),
    pytest.param((2, 16, 24, 9, 9), 3, {"padding": 1, "stride": 2}, id="stride"),
    pytest.param((1, 64, 64, 17, 9), 3, {"padding": (2, 1), "dilation": (2, 1)}, id="anisotropic"),
    pytest.param((1, 32, 16, 21, 8), 3, {"padding": 0}, id="no padding"),
    pytest.param((2, 256, 21, 9, 7), 1, {}, id="1x1"),
    pytest.param((1, 24, 40, 9, 9), 1, {"stride": 2}, id="1x1 with stride"),
    pytest.param((2, 24, 24, 9, 9), 5, {"padding": 2, "groups": 24}, id="depthwise"),
    pytest.param((1, 24, 16, 9, 9), 3, {"padding": 1, "groups": 4}, id="groups"),
    pytest.param((1, 8, 8, 6, 7), (1, 3), {"padding": (0, 1)}, id="1x3"),
    pytest.param((0, 64, 64, 33, 33), 3, {"padding": 1}, id="no image"),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=CHANNELS_LAST),
    "strided": lambda x: x.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, ::3],
    "slice": lambda x: torch.cat([x, x], 1).contiguous(memory_format=CHANNELS_LAST)[
        :, x.shape[1] :
    ],
}


class TestConv:
    # A kernel of our own and oneDNN's.
    @pytest.mark.parametrize("kernel", [3, 1])
    def test_overwrites_a_residual_only_beside_another_input(self, kernel) -> None:
        torch.manual_seed(0)
        weight, scale, shift = layer(64, 64, kernel)
        options = {"padding": kernel // 2}
        conv = PreparedConv(weight, scale, shift, **options)
        x, residual = (torch.randn(1, 64, 20, 20).to(memory_format=CHANNELS_LAST) for _ in range(2))
        expected = expected_of(x, weight, scale, shift, residual, **options)
        y = conv(x, residual, overwrite_residual=True)
        assert y.data_ptr() == residual.data_ptr()
        assert relative_error(y, expected) <= SAVING
        expected = expected_of(x, weight, scale, shift, x, **options)
        y = conv(x, x, overwrite_residual=True)
        assert y.data_ptr() != x.data_ptr()
        assert relative_error(y, expected) <= SAVING

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    @pytest.mark.parametrize(("shape", "kernel", "options"), LAYERS)
    def test_is_the_layer(self, nan_poison, shape, kernel, options, layout) -> None:
        n, c, k, height, width = shape
        weight, scale, shift = layer(c, k, kernel, options.get("groups", 1))
        x = layout(torch.randn(n, c, height, width))
        conv = PreparedConv(weight, scale, shift, **options)
        expected = expected_of(x, weight, scale, shift, None, **options)
        y = conv(x)
        assert y.is_contiguous(memory_format=CHANNELS_LAST)
        assert relative_error(y, expected) <= SAVING
        residual = layout(torch.randn(expected.shape))
        with_residual = expected_of(x, weight, scale, shift, residual, **options)
        before = residual.clone()
        assert relative_error(conv(x, residual), with_residual) <= SAVING
        assert torch.equal(residual, before)
        assert relative_error(conv(x, residual, overwrite_residual=True), with_residual) <= SAVING

        out = torch.randn(n, k + 9, *expected.shape[2:]).contiguous(memory_format=CHANNELS_LAST)
        untouched = out.clone()
        into = conv(x, out=out, channel_offset=4)
        assert into.data_ptr() == out[:, 4 : 4 + k].data_ptr()
        assert relative_error(out[:, 4 : 4 + k], expected) <= SAVING
        assert torch.equal(out[:, :4], untouched[:, :4])
        assert torch.equal(out[:, 4 + k :], untouched[:, 4 + k :])

    @pytest.mark.parametrize("act", ["relu", "relu6", "hardswish", None], ids=str)
    @pytest.mark.parametrize(
        ("c", "kernel"), [(64, 3), (256, 1), (16, 1)], ids=["tiles", "pixels", "onednn"]
    )
    def test_activations(self, act: str | None, c: int, kernel: int) -> None:
        weight, scale, shift = layer(c, 32, kernel)
        x, residual = torch.randn(1, c, 33, 21), torch.randn(1, 32, 33, 21)
        options = {"padding": kernel // 2, "act": act}
        conv = PreparedConv(weight, scale * 0.1, shift, **options)
        for added in (None, residual):
            expected = expected_of(x, weight, scale * 0.1, shift, added, **options)
            assert relative_error(conv(x, added), expected) <= SAVING

    def test_scale_and_shift_can_be_left_out(self) -> None:
        weight = layer(8, 8, 3)[0]
        x = torch.randn(1, 8, 6, 6)
        y = PreparedConv(weight, None, None, padding=1, act=None)(x)
        assert relative_error(y, F.conv2d(x.double(), weight.double(), padding=1)) <= DIRECT

    def test_shapes_change_from_call_to_call(self) -> None:
        weight, scale, shift = layer(64, 32, 3)
        conv = PreparedConv(weight, scale, shift, padding=6, dilation=6)
        for n, height, width in [(1, 33, 33), (2, 7, 40), (1, 1, 1), (1, 65, 33), (1, 33, 33)]:
            x = torch.randn(n, 64, height, width)
            expected = expected_of(x, weight, scale, shift, None, padding=6, dilation=6)
            assert relative_error(conv(x), expected) <= SAVING

    def test_holds_a_snapshot(self) -> None:
        weight, scale, shift = layer(16, 16, 3)
        conv = PreparedConv(weight, scale, shift, padding=1)
        x = torch.randn(1, 16, 40, 40)
        expected = conv(x)
        for tensor in (weight, scale, shift):
            tensor.fill_(float("nan"))
        assert torch.equal(conv(x), expected)
        # Weights that are prepared only now come from the snapshot as well.
        assert not conv(x[:, :, :9]).isnan().any()

    @pytest.mark.parametrize(
        "copied",
        [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
        ids=["deepcopy", "pickle"],
    )
    @pytest.mark.parametrize(("c", "kernel"), [(64, 3), (256, 1), (16, 1)], ids=str)
    def test_copies(self, copied, c: int, kernel: int) -> None:
        conv = PreparedConv(*layer(c, 32, kernel), padding=kernel // 2, act="relu6")
        x = torch.randn(1, c, 33, 33)
        expected = conv(x)
        other = copied(conv)
        assert other.extra_bytes == 0
        assert torch.equal(other(x), expected)
        assert other.extra_bytes == conv.extra_bytes
        assert conv.plan(x.shape).extra_bytes == conv.extra_bytes

    def test_inference_mode_on_either_side(self) -> None:
        weight, scale, shift = layer(64, 64, 3)
        x = torch.randn(1, 64, 33, 33)
        expected = PreparedConv(weight, scale, shift, padding=1)(x)
        with torch.inference_mode():
            inside = PreparedConv(weight.clone(), scale, shift, padding=1)
            assert torch.equal(inside(x), expected)
        assert torch.equal(inside(x), expected)
        assert not inside(x).requires_grad
        outside = PreparedConv(weight.requires_grad_(), scale, shift, padding=1)
        with torch.inference_mode():
            assert torch.equal(outside(x.clone()), expected)

    def test_many_threads_prepare_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        conv = PreparedConv(*layer(64, 48, 3), padding=2, dilation=2)
        xs = [torch.randn(1, 64, size, 33) for size in (33, 34, 35, 33)]
        expected = [copy.deepcopy(conv)(x) for x in xs]
        made: list[object] = []
        make = PreparedConv._form

        def counted(self, key, function):
            return make(self, key, lambda: made.append(key) or function())

        monkeypatch.setattr(PreparedConv, "_form", counted)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(5):
                    for x, y in zip(xs, expected, strict=True):
                        assert torch.equal(conv(x), y)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures
        assert len(made) == len(set(made)) > 0

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"weight": torch.randn(4, 3, 3, 3).double()}, "weight is float64 on cpu; allowed is"),
            ({"weight": torch.randn(4, 3, 3, 3, device="meta")}, "on meta; allowed is float32"),
            ({"weight": torch.randn(4, 3)}, r"expected \[K, C, R, S\]"),
            ({"scale": torch.randn(3)}, r"scale has shape \[3\], expected \[4\]"),
            ({"groups": 3}, "groups=3 must divide the 4 output channels"),
            ({"stride": 0}, "stride must be an int or a pair of ints from 1 to 2147483647, got 0"),
            ({"padding": (1, -1)}, "padding must be"),
            ({"dilation": (1, 2, 3)}, "dilation must be"),
            ({"act": "gelu"}, "act must be one of"),
        ],
        ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
    )
    def test_bad_layers_are_named(self, arguments: dict, text: str) -> None:
        given = {"weight": torch.randn(4, 3, 3, 3), "scale": torch.ones(4), "shift": None}
        with pytest.raises(ValueError, match=text):
            PreparedConv(**(given | arguments))

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"x": torch.randn(1, 4, 6, 6)}, "has 4 channels, the weight wants 3"),
            ({"x": torch.randn(1, 3, 6, 6).half()}, "x is float16 on cpu; allowed is float32"),
            ({"x": torch.randn(3, 6, 6)}, r"expected \[N, C, H, W\]"),
            ({"x": torch.randn(1, 3, 2, 6)}, "smaller than the dilated kernel"),
            (
                {"residual": torch.randn(1, 4, 6, 6)},
                r"residual has shape .* expected \[1, 4, 4, 4\]",
            ),
            ({"out": torch.randn(1, 4, 4, 4)}, "make it with memory_format=torch.channels_last"),
            ({"out": torch.randn(1, 4, 4, 5)}, r"expected \[1, L, 4, 4\]"),
            ({"out": torch.randn(1, 5, 4, 4), "channel_offset": 2}, "channel_offset=2"),
        ],
        ids=["channels", "dtype", "rank", "size", "residual", "layout", "out", "slice"],
    )
    def test_bad_calls_are_named(self, arguments: dict, text: str) -> None:
        conv = PreparedConv(torch.randn(4, 3, 3, 3), None, None)
        with pytest.raises(ValueError, match=text):
            conv(**({"x": torch.randn(1, 3, 6, 6)} | arguments))


class TestBounds:
    @needs_kernels
    # Panels are larger than a weight whose outputs fill none.
    @pytest.mark.parametrize(
        ("c", "k", "kernel"), [(64, 32, 3), (256, 40, 1)], ids=["tiles", "pixels"]
    )
    def test_memory_is_bounded(self, c: int, k: int, kernel: int) -> None:
        weight, scale, shift = layer(c, k, kernel)
        free = PreparedConv(weight, scale, shift, padding=kernel // 2)
        x = torch.randn(1, c, 33, 33)
        expected = free(x)
        assert free.plan(x.shape).extra_bytes == free.extra_bytes > 0
        for bound in (0, 4 * weight.numel(), free.extra_bytes - 1, free.extra_bytes):
            options = {"padding": kernel // 2, "max_extra_bytes": bound}
            conv = PreparedConv(weight, scale, shift, **options)
            assert relative_error(conv(x), expected.double()) <= SAVING
            conv(torch.randn(1, c, 40, 17))
            conv(torch.randn(1, c, 2, 2))
            assert conv.extra_bytes <= bound
        assert conv.plan(x.shape).kernel == free.plan(x.shape).kernel

    @needs_kernels
    @pytest.mark.parametrize(
        ("shape", "kernel", "options"),
        [
            ((1, 40, 48, 9, 9), 1, {}),
            ((1, 20, 32, 9, 9), 3, {"stride": 2}),
            ((1, 3, 21, 9, 9), 7, {"stride": 2, "padding": 3}),
        ],
        ids=["1x1", "3x3", "7x7 of planes, outputs that fill no panel"],
    )
    def test_panels_take_the_weights_place(self, shape, kernel, options) -> None:
        n, c, k, height, width = shape
        weight, scale, shift = layer(c, k, kernel)
        conv = PreparedConv(weight, scale, shift, **options)
        before, x = conv.weight, torch.randn(n, c, height, width)
        y = conv(x)
        assert conv.extra_bytes == 4 * (-k % 16) * c * kernel**2
        assert torch.equal(conv.weight, before) and conv.weight is not before
        assert torch.equal(copy.deepcopy(conv)(x), y)
        assert torch.equal(conv(x.contiguous(memory_format=CHANNELS_LAST)), y)

    @needs_kernels
    def test_writes_into(self) -> None:
        """Whatever has one group and finite weights; what cannot gives the same in `out`."""
        x = torch.randn(1, 24, 9, 9)
        for groups, kernel, written in ((1, 1, True), (1, 3, True), (2, 3, False)):
            conv = PreparedConv(*layer(24, 32, kernel, groups), stride=2, groups=groups)
            assert conv.writes_into(x.shape) == written
            out = torch.empty_like(conv(x))
            assert conv(x, out=out).data_ptr() == out.data_ptr()
            assert torch.equal(out, conv(x))

    @needs_kernels
    def test_branches_share_a_bound(self) -> None:
        weights = [torch.randn(48, 64, 1, 1), *(torch.randn(48, 64, 3, 3) for _ in range(3))]
        ones, zeros = [torch.ones(48)] * 4, [torch.zeros(48)] * 4
        x = torch.randn(1, 64, 49, 49)
        free = PreparedAspp(weights, ones, zeros, [1, 6, 12, 18])
        expected = free(x)
        assert {plan.kernel for plan in free.plan(x.shape)[1:]} == {"tiles"}
        bound = free.extra_bytes // 2
        aspp = PreparedAspp(weights, ones, zeros, [1, 6, 12, 18], bound)
        assert relative_error(aspp(x), expected.double()) <= SAVING
        assert 0 < aspp.extra_bytes <= bound

    @needs_kernels
    def test_plan_is_what_runs(self) -> None:
        """The prepared weights that a call leaves behind are those of its plan."""
        conv = PreparedConv(*layer(96, 64, 3), padding=12, dilation=12)
        for size in (33, 65, 13):
            fresh = copy.deepcopy(conv)
            plan = fresh.plan((1, 96, size, size))
            assert plan.extra_bytes > 0
            fresh(torch.randn(1, 96, size, size))
            assert fresh.extra_bytes == plan.extra_bytes
            ahead = copy.deepcopy(conv)
            ahead.prepare((1, 96, size, size))
            assert ahead.extra_bytes == plan.extra_bytes
            assert f"{plan.kernel} {plan.form} [1, 96, {size}, {size}]" in str(plan)

    @pytest.mark.parametrize(
        ("rate", "form", "products"),
        [
            (12, "tile6 x tile6", 144 * 64),
            # 17 phases of 3 samples; the 7 of 2 run as such too, for a third of the weights.
            (24, "line3 x line3", (24 * 4) ** 2),
            # 29 phases of 2 samples and 7 of 1.
            (36, "line2/line1 x line2/line1", (29 * 3 + 7) ** 2),
        ],
    )
    def test_forms_of_the_aspp(self, rate: int, form: str, products: int) -> None:
        """65x65, 2048 to 256 channels, with their counts of products."""
        best = _cpu_forms.tile_forms(1, 2048, 256, 65, 65, rate, 2, reuse=True, coarse=True)[0]
        assert str(best) == form
        assert best.macs == products * 2048 * 256
        # The dense count has 9 products for each pixel.
        assert best.macs < 0.27 * 9 * 65 * 65 * 2048 * 256

    def test_without_kernels_and_without_onednn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight, scale, shift = layer(64, 32, 3)
        x, residual = torch.randn(2, 64, 33, 20), torch.randn(2, 32, 33, 20)
        expected = expected_of(x, weight, scale, shift, residual, padding=1)
        monkeypatch.setattr(prepared, "_has_kernels", lambda: False)
        conv = PreparedConv(weight, scale, shift, padding=1)
        assert conv.plan(x.shape).kernel == "onednn"
        assert relative_error(conv(x, residual), expected) <= DIRECT
        monkeypatch.setattr(prepared, "_has_onednn", lambda: False)
        conv = PreparedConv(weight, scale, shift, padding=1)
        assert conv.plan(x.shape).kernel == "aten"
        assert relative_error(conv(x, residual), expected) <= DIRECT
        project = PreparedProject(torch.randn(8, 40, 1, 1), None, None, branch_channels=32)
        y = project(residual, torch.randn(2, 8))
        assert conv.extra_bytes == 0
        assert y.shape == (2, 8, 33, 20)


NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
# (C, K), kernel, options, what runs where all is finite
PATHS = [
    pytest.param((3, 16), 7, {"stride": 2, "padding": 3}, "patches", id="stem"),
    pytest.param((24, 32), 1, {}, "pixels", id="1x1"),
    pytest.param((24, 32), 1, {"stride": 2}, "patches", id="1x1 with stride"),
    pytest.param((24, 32), 3, {"stride": 2, "padding": 1}, "patches", id="3x3 with stride"),
    pytest.param((24, 32), 3, {"padding": 1, "groups": 2}, "onednn", id="groups"),
    pytest.param((128, 32), 1, {}, "pixels", id="1x1 of many channels"),
    pytest.param((64, 32), 3, {"padding": 1}, "tiles", id="3x3"),
    pytest.param((64, 32), 3, {"padding": 3, "dilation": 3}, "tiles", id="3x3 dilated"),
    pytest.param((24, 24), 3, {"padding": 1, "groups": 24}, "depthwise", id="depthwise"),
    pytest.param((24, 24), 5, {"padding": 2, "groups": 24}, "depthwise", id="depthwise 5x5"),
]


class TestNotFinite:
    """Where the plain modules give nan or infinity the prepared forms give no finite value."""

    @staticmethod
    def assert_shows(y: Tensor, expected: Tensor) -> None:
        assert y[expected.isnan()].isnan().all()
        assert not y[~expected.isfinite()].isfinite().any()

    @needs_kernels
    @pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
    @pytest.mark.parametrize("act", prepared.ACTIVATIONS, ids=str)
    @pytest.mark.parametrize(("channels", "kernel", "options", "runs"), PATHS)
    def test_convolution(self, channels, kernel, options, runs, act, residual) -> None:
        groups = options.get("groups", 1)
        for value in NOT_FINITE:
            for place in ("x", "weight", "scale", "shift", "residual")[: 4 + residual]:
                weight, scale, shift = layer(*channels, kernel, groups)
                x = torch.randn(2, channels[0], 13, 17)
                z = torch.randn_like(F.conv2d(x, weight, **options)) if residual else None
                tensors = {"x": x, "weight": weight, "scale": scale, "shift": shift, "residual": z}
                tensors[place].view(-1)[-1] = value
                y = F.conv2d(x, weight, **options) * scale[:, None, None] + shift[:, None, None]
                y = y if z is None else y + z
                conv = PreparedConv(weight, scale, shift, act=act, **options)
                finite = place not in ("weight", "scale")
                assert conv.plan(x.shape).kernel == (runs if finite else "aten")
                # Activations may make infinity finite, but not nan.
                expected = prepared.activate_(y, act)
                assert expected.isnan().any() or value == value
                self.assert_shows(conv(x, z), expected)

    @pytest.mark.parametrize("act", ["relu", "relu6"])
    def test_result_over_the_residual(self, act) -> None:
        weight, scale, shift = layer(24, 32, 1)
        residual = torch.randn(1, 32, 5, 5).contiguous(memory_format=CHANNELS_LAST)
        residual[0, 3, 2, 2] = float("nan")
        conv = PreparedConv(weight, scale, shift, act=act)
        y = conv(torch.randn(1, 24, 5, 5), residual, overwrite_residual=True)
        assert y.isnan().nonzero().tolist() == [[0, 3, 2, 2]]

    @pytest.mark.parametrize("value", NOT_FINITE, ids=str)
    def test_a_weight_that_meets_nothing_but_padding(self, value) -> None:
        """PyTorch multiplies the padding of maps as small as this one, and 0 * nan is nan."""
        weight, scale, shift = layer(64, 32, 3)
        weight[7, 5, 0, 2] = value
        x, options = torch.randn(1, 64, 5, 9), {"padding": 18, "dilation": 18}
        expected = F.relu(F.conv2d(x, weight * scale[:, None, None, None], shift, **options))
        assert expected[:, 7].isnan().all()
        assert torch.equal(
            PreparedConv(weight, scale, shift, **options)(x).isnan(), expected.isnan()
        )
        aspp = PreparedAspp([weight] * 2, [scale] * 2, [shift] * 2, [18, 18])
        assert torch.equal(aspp(x)[:, 32:].isnan(), expected.isnan())

    def test_huge_weights_are_finite(self) -> None:
        """Their sum is not, which only chooses another algorithm."""
        weight = torch.full((2, 2, 1, 1), 3e38)
        y = PreparedConv(weight, None, None, act=None)(torch.full((1, 2, 4, 4), 1e-30))
        torch.testing.assert_close(y, torch.full((1, 2, 4, 4), 6e8), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("act", prepared.ACTIVATIONS, ids=str)
    @pytest.mark.parametrize("place", ["branches", "pooled", "weight", "of pooled", "shift"])
    def test_projection(self, place, act) -> None:
        weight, scale, shift = layer(40, 8, 1)
        branches, pooled = torch.randn(2, 32, 5, 6), torch.randn(2, 8)
        target = {
            "branches": branches[1, 3, 2:3, 2],
            "pooled": pooled[1, :1],
            "weight": weight[3, 4, 0],
            "of pooled": weight[3, 35, 0],
            "shift": shift[3:4],
        }[place]
        target.fill_(float("nan"))
        concat = torch.cat([branches, pooled[:, :, None, None].expand(-1, -1, 5, 6)], 1)
        y = F.conv2d(concat, weight) * scale[:, None, None] + shift[:, None, None]
        project = PreparedProject(weight, scale, shift, branch_channels=32, act=act)
        expected = prepared.activate_(y, act)
        assert expected.isnan().any() and not expected.isnan().all()
        assert torch.equal(project(branches, pooled).isnan(), expected.isnan())


class TestHead:
    @pytest.mark.parametrize("n", [0, 1, 3])
    @pytest.mark.parametrize("size", [(33, 33), (1, 1), (9, 14)], ids=str)
    def test_aspp_and_projection(self, nan_poison, n: int, size: tuple[int, int]) -> None:
        rates = [1, 6, 12, 18]
        weights = [torch.randn(24, 40, 1, 1), *(torch.randn(24, 40, 3, 3) for _ in rates[1:])]
        scales, shifts = ([torch.randn(24) for _ in weights] for _ in range(2))
        x, pooled = torch.randn(n, 40, *size), torch.randn(n, 10)
        aspp = PreparedAspp(weights, scales, shifts, rates)
        double = [[t.double() for t in tensors] for tensors in (weights, scales, shifts)]
        expected = reference.aspp_branches(x.double(), *double, rates)
        y = aspp(x)
        assert y.is_contiguous(memory_format=CHANNELS_LAST)
        assert relative_error(y, expected) <= SAVING
        assert len(aspp.plan(x.shape)) == 4

        weight, scale, shift = torch.randn(17, 106, 1, 1), torch.randn(17), torch.randn(17)
        project = PreparedProject(weight, scale, shift, branch_channels=96)
        arguments = [t.double() for t in (y, pooled, weight, scale, shift)]
        assert relative_error(project(y, pooled), reference.aspp_project(*arguments)) <= DIRECT
        assert torch.equal(copy.deepcopy(aspp)(x), y)
        assert torch.equal(copy.deepcopy(project)(y, pooled), project(y, pooled))

    def test_threads_do_not_matter(self) -> None:
        weights = [torch.randn(16, 64, 1, 1), torch.randn(16, 64, 3, 3)]
        aspp = PreparedAspp(weights, [torch.ones(16)] * 2, [torch.zeros(16)] * 2, [1, 6])
        x = torch.randn(1, 64, 33, 33)
        results = []
        for count in (1, 2, 4):
            with threads(count):
                results.append(aspp(x))
        assert all(relative_error(y, results[0].double()) <= SAVING for y in results)

    def test_bad_input_is_named(self) -> None:
        weights = [torch.randn(4, 3, 1, 1), torch.randn(4, 3, 5, 5)]
        vectors = [torch.ones(4)] * 2
        with pytest.raises(ValueError, match=r"weights\[1\] has shape"):
            PreparedAspp(weights, vectors, vectors, [1, 2])
        with pytest.raises(ValueError, match=r"got \[2, 2, 2, 1\]"):
            PreparedAspp(weights, vectors, vectors, [1])
        with pytest.raises(ValueError, match="branch_channels=9"):
            PreparedProject(torch.randn(4, 8, 1, 1), None, None, branch_channels=9)
        project = PreparedProject(torch.randn(4, 8, 1, 1), None, None, branch_channels=6)
        with pytest.raises(ValueError, match=r"expected \[1, 2\]"):
            project(torch.randn(1, 6, 2, 2), torch.randn(1, 3))


@pytest.mark.parametrize(
    ("c", "k", "size"),
    [
        pytest.param(9, 1, 15, id="one filter"),
        pytest.param(36, 6, 1, id="one pixel"),
    ],
)
@pytest.mark.parametrize("reuse", [False, True], ids=["once", "prepared"])
@pytest.mark.parametrize("act", ["relu", None])
def test_residual_that_is_dense_in_both_formats(c, k, size, reuse, act) -> None:
    """PyTorch 2.11 raised "could not create a memory" where it was to add it."""
    weight, scale, shift = layer(c, k, 3)
    x, residual = torch.randn(2, c, size, size), torch.randn(2, k, size, size)
    options = {"padding": 3, "dilation": 3, "act": act}
    y = PreparedConv(weight, scale, shift, **options, reuse=reuse)(x, residual)
    expected = expected_of(x, weight, scale, shift, residual, **options)
    assert relative_error(y, expected) <= SAVING


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(0, 2),
    c=st.integers(1, 70),
    k=st.integers(1, 40),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    dilation=st.integers(1, 20),
    reuse=st.booleans(),
)
def test_any_dilated_layer(n, c, k, height, width, dilation, reuse) -> None:
    torch.manual_seed(c + k)
    weight, scale, shift = layer(c, k, 3)
    x, residual = torch.randn(n, c, height, width), torch.randn(n, k, height, width)
    options = {"padding": dilation, "dilation": dilation}
    y = PreparedConv(weight, scale, shift, **options, reuse=reuse)(x, residual)
    expected = expected_of(x, weight, scale, shift, residual, **options)
    # A few values may all be small differences of large terms: they are held against those.
    few = y.numel() < 100
    terms = [t.abs() for t in (x, weight, scale, shift, residual)]
    norm = (expected_of(*terms, **options) if few else expected).norm()
    assert (y.double() - expected).norm() <= SAVING * norm
