"""Convolutions of bf16 maps on the CPU, with weights prepared once.

    conv = Bf16Conv(weight, scale, shift, padding=2, dilation=2)
    y = conv(x)                   # relu(scale * conv2d(x, weight) + shift), in bf16

Maps hold bf16, or the input fp32 that is rounded where it is read. Weights are folded with the
batch norm in fp32 and rounded once. Products accumulate in fp32; shift, residual and activation are
applied in fp32, and the result is rounded once, ties to even; nan stays nan. What runs:

    tiles     3x3 convolutions with stride 1 and padding = dilation by few multiplications. In the
              forms of `ROUNDED` the transformed inputs and weights are rounded to bf16 too; in the
              others, which would multiply that rounding by 4 to 16, products are of fp32
    patches   every other convolution of one group, as one product
    onednn    convolutions of several groups, and those where it is predicted to be faster
    aten      where PyTorch has no oneDNN for bf16, and where a weight is not finite: in fp32
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ext
from ..dispatch import limits
from ..plan.taps import live_taps, output_size
from ..reference import convolution, is_safe
from . import _cpu_forms
from ._cpu_forms import Form, TileForm
from .cpu_rates import Rates, rates
from .prepared import ACTIVATIONS, Plan, activate_, check_weight, fold, pair

DTYPE = torch.bfloat16
# Forms whose factors may be bf16. Measured against float64, on both axes: line2 3.4e-3, line3
# 3.1e-3, tile2 3.6e-3, direct 2.4e-3, but tile4 9.5e-3, tile3 1.2e-2 and tile6 4e-2.
ROUNDED = ("line1", "line2", "line3", "tile2")
_PANEL = 16
_KEPT_CHOICES = 64
_FEW_CHANNELS = 4


@dataclass(frozen=True)
class _Choice:
    kernel: str
    form: str
    macs: int
    weight_bytes: int
    seconds: float
    tiles: TileForm | None = None


class Bf16Conv:
    """y = act(scale * conv2d(x, weight) + shift + residual) of bf16 maps, with prepared weights.

    Safe to call from several threads at a time; can be deep-copied and pickled.

    Args:
        weight: [K, C / groups, R, S], fp32, on the CPU.
        scale, shift: [K], fp32 (the folded batch norm), or None for one and zero.
        stride, padding, dilation, groups, act, max_extra_bytes: as for `PreparedConv`.
        out_dtype: of results and residuals: bfloat16 or float32.

    Raises:
        ValueError: tensors or options that do not fit.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        act: str | None = "relu",
        max_extra_bytes: int | None = None,
        out_dtype: torch.dtype = DTYPE,
    ) -> None:
        check_weight("Bf16Conv", weight)
        self.out_channels = weight.shape[0]
        self.in_channels = weight.shape[1] * groups
        self.stride = pair("Bf16Conv: stride", stride, 1)
        self.padding = pair("Bf16Conv: padding", padding, 0)
        self.dilation = pair("Bf16Conv: dilation", dilation, 1)
        if groups < 1 or self.out_channels % groups:
            raise ValueError(
                f"Bf16Conv: groups={groups} must divide the {self.out_channels} output channels"
            )
        if act not in ACTIVATIONS:
            raise ValueError(f"Bf16Conv: act must be one of {ACTIVATIONS}, got {act!r}")
        if out_dtype not in (DTYPE, torch.float32):
            raise ValueError(
                f"Bf16Conv: out_dtype is {out_dtype}; allowed are torch.bfloat16 and torch.float32"
            )
        self.groups = groups
        self.act = act
        self.max_extra_bytes = max_extra_bytes
        self.out_dtype = out_dtype
        # In fp32, of which forms are made; a second copy is what is rounded.
        self._weight, self.shift = fold("Bf16Conv", weight, scale, shift)
        self._finite = math.isfinite(self._weight.sum().item())
        self._forms: dict[Hashable, Tensor] = {}
        self._choices: dict[Hashable, _Choice] = {}
        self._lock = threading.Lock()

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        out: Tensor | None = None,
        channel_offset: int = 0,
        overwrite_residual: bool = False,
    ) -> Tensor:
        """Run the convolution.

        Args:
            x: [N, C, H, W], bf16, or fp32 that is rounded to it, any strides.
            residual: [N, K, H', W'] of `out_dtype`, any strides, or None.
            out: [N, L, H', W'] of `out_dtype`, contiguous in channels_last, or None for a new one.
            channel_offset, overwrite_residual: as for `PreparedConv`.

        Returns:
            [N, K, H', W'] of `out_dtype` in channels_last; with `out` the view of its channels.

        Raises:
            ValueError: shapes, dtypes, devices or a layout that do not fit.
        """
        return self._run(x, self.shift, residual, out, channel_offset, overwrite_residual)

    def shifted(self, x: Tensor, shifts: Tensor, out: Tensor | None = None) -> Tensor:
        """As a call on x, with shifts [N, K] in fp32 of the images in place of the own shift."""
        return self._run(x, shifts, None, out, 0, False)

    def _run(
        self,
        x: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        out: Tensor | None,
        offset: int,
        overwrite: bool,
    ) -> Tensor:
        shape = self.check_input(x)
        if residual is not None:
            self._check("residual", residual, shape, (self.out_dtype,))
        if out is not None:
            self._check_out(out, offset, shape)
        with torch.no_grad():
            choice = self._choose(x.shape, torch.get_num_threads(), x.dtype)
            if choice.kernel != "patches" or not self._is_planar:
                x = x.contiguous(memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
            if out is None:
                reuses = overwrite and residual is not None and not _shares(residual, x)
                out = residual if reuses else empty(shape, self.out_dtype)
                assert out is not None
            into = out.narrow(1, offset, self.out_channels)
            if choice.kernel in ("tiles", "patches"):
                self._run_own(choice, x, shift, residual, out, offset)
            elif shift.dim() == 1:
                into.copy_(self._run_pytorch(choice, x, shift, residual))
            else:
                for i in range(shape[0]):
                    into[i : i + 1] = self._run_pytorch(choice, x[i : i + 1], shift[i], None)
            return into

    def writes_into(self, shape: Sequence[int]) -> bool:
        """Whether a call on a bf16 input of this shape writes straight into `out`; else the result
        is copied there."""
        return self._choose(shape, torch.get_num_threads(), DTYPE).kernel in ("tiles", "patches")

    def plan(self, shape: Sequence[int], threads: int | None = None) -> Plan:
        """What a call on a bf16 input of this shape runs; arguments as for `PreparedConv.plan`."""
        n, _, height, width = shape
        out_height, out_width = self._output_size(height, width)
        threads = threads or torch.get_num_threads()
        choice = self._choose(shape, threads, DTYPE)
        moved = 2 * n * self.in_channels * height * width
        moved += self.out_dtype.itemsize * n * self.out_channels * out_height * out_width
        return Plan(
            choice.kernel,
            choice.form,
            (n, self.in_channels, height, width),
            threads,
            choice.macs,
            moved + choice.weight_bytes,
            choice.seconds,
            choice.weight_bytes,
        )

    def folded(self) -> tuple[Tensor, Tensor]:
        """(scale * weight [K, C / groups, R, S] in bf16, shift [K] in fp32)."""
        return self._weight.to(DTYPE), self.shift

    @property
    def takes_any_format(self) -> bool:
        """Whether an input of another memory format than channels_last costs no copy, as a rule."""
        return self.groups == 1 and self._is_planar

    @property
    def _is_planar(self) -> bool:
        # Few channels: a patch's rows of taps are longer in planes.
        return 1 < self.in_channels <= _FEW_CHANNELS

    def prepare(self, shape: Sequence[int]) -> None:
        """Prepare the weights that a call on a bf16 input of this shape needs."""
        choice = self._choose(shape, torch.get_num_threads(), DTYPE)
        if choice.tiles is not None:
            self._tile_weights(choice.tiles)
        elif choice.kernel == "patches":
            self._panels()
        elif choice.kernel == "onednn":
            self._reordered(shape)

    @property
    def extra_bytes(self) -> int:
        """Bytes of prepared weights now held beyond the original ones."""
        return sum(t.numel() * t.dtype.itemsize for t in list(self._forms.values()))

    def __getstate__(self) -> dict[str, Any]:
        # Prepared weights come back on demand; those in oneDNN's layout cannot be copied.
        own = ("_lock", "_forms", "_choices")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forms = {}
        self._choices = {}
        self._lock = threading.Lock()

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The shape of the result for an input of this shape.

        Raises:
            ValueError: the input is smaller than the dilated kernel.
        """
        return (shape[0], self.out_channels, *self._output_size(shape[2], shape[3]))

    def _output_size(self, height: int, width: int) -> tuple[int, int]:
        axes = zip(
            (height, width),
            self._weight.shape[2:],
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        h, w = (output_size(*axis) for axis in axes)
        if min(h, w) < 1:
            raise ValueError(
                f"Bf16Conv: a map of {height}x{width} is smaller than the dilated kernel of "
                f"weight {list(self._weight.shape)} with dilation={self.dilation}, "
                f"padding={self.padding}"
            )
        return h, w

    def check_input(self, x: Tensor) -> tuple[int, int, int, int]:
        """The shape of the result for x.

        Raises:
            ValueError: x does not fit.
        """
        self._check("x", x, None, (DTYPE, torch.float32))
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"Bf16Conv: x {list(x.shape)} has {x.shape[1]} channels, the weight wants "
                f"{self.in_channels}"
            )
        return self.output_shape(x.shape)

    def _check(
        self, name: str, x: Tensor, expected: Sequence[int] | None, dtypes: Sequence[torch.dtype]
    ) -> None:
        if not isinstance(x, Tensor):
            raise ValueError(f"Bf16Conv: {name} must be a tensor, got {type(x).__name__}")
        if x.device.type != "cpu" or x.dtype not in dtypes:
            given, *allowed = (str(d).removeprefix("torch.") for d in (x.dtype, *dtypes))
            raise ValueError(
                f"Bf16Conv: {name} is {given} on {x.device}; allowed is {' or '.join(allowed)} on "
                "the CPU"
            )
        if x.dim() != 4 or (expected is not None and tuple(x.shape) != tuple(expected)):
            wanted = "[N, C, H, W]" if expected is None else list(expected)
            raise ValueError(f"Bf16Conv: {name} has shape {list(x.shape)}, expected {wanted}")

    def _check_out(self, out: Tensor, offset: int, shape: Sequence[int]) -> None:
        n, channels, height, width = shape
        self._check("out", out, None, (self.out_dtype,))
        fits = (out.shape[0], *out.shape[2:]) == (n, height, width)
        if not fits or not 0 <= offset <= out.shape[1] - channels:
            raise ValueError(
                f"Bf16Conv: out has shape {list(out.shape)}, expected [{n}, L, {height}, {width}] "
                f"with L >= channel_offset + {channels}, channel_offset={offset}"
            )
        if not out.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"Bf16Conv: out has strides {out.stride()}; make it with "
                "memory_format=torch.channels_last"
            )

    def _choose(self, shape: Sequence[int], threads: int, dtype: torch.dtype) -> _Choice:
        # All that a choice depends on and that can change.
        held = len(self._forms)
        key = (*shape, threads, dtype, _has_onednn(), _has_kernels(), self.max_extra_bytes, held)
        choice = self._choices.get(key)
        if choice is None:
            if len(self._choices) >= _KEPT_CHOICES:
                self._choices.clear()
            choice = self._choices[key] = self._choose_now(shape, threads, dtype)
        return choice

    def _choose_now(self, shape: Sequence[int], threads: int, dtype: torch.dtype) -> _Choice:
        n, _, height, width = shape
        kernel = tuple(self._weight.shape[2:])
        outputs, taps = n * self.out_channels, 1
        for length in self._output_size(height, width):
            outputs *= length
        for axis, length in enumerate((height, width)):
            geometry = (self.stride[axis], self.padding[axis], self.dilation[axis])
            taps *= live_taps(length, kernel[axis], *geometry)
        macs = n * math.prod(self._weight.shape[:2]) * taps
        size = 2 * self._weight.numel()
        onednn = math.inf
        safe = is_safe(shape, self._weight.shape, self.stride, self.padding, self.dilation)
        if self._finite and safe and _has_onednn() and self._allows("onednn", size):
            pointwise = kernel == (1, 1)
            onednn = _cpu_forms.onednn_seconds(macs, threads, pointwise=pointwise, dtype="bfloat16")
        best = _Choice("onednn", "direct", macs, size, onednn)
        if math.isinf(onednn):
            best = _Choice("aten", "direct", macs, 0, macs / 1e9)
        if not self._finite or self.groups != 1 or not _has_kernels():
            return best
        done = outputs * math.prod(self._weight.shape[1:])
        size = 2 * _padded(self.out_channels) * _even(math.prod(self._weight.shape[1:]))
        seconds = _cpu_forms.CALL_SECONDS + done / (own_rates().pixels * threads)
        # Equal rates are decided by the epilogue, which oneDNN leaves a pass of its own.
        if seconds <= 1.1 * best.seconds and self._allows("panels", size):
            best = _Choice("patches", "direct", done, size, seconds)
        same = self.padding == self.dilation and len(set(self.dilation)) == 1
        if kernel == (3, 3) and self.stride == (1, 1) and same and dtype == DTYPE:
            channels = (self.in_channels, self.out_channels)
            size_and_dilation = (height, width, self.dilation[0])
            for form in _forms(n, *channels, *size_and_dilation, threads, own_rates()):
                if form.score < best.seconds and self._allows_tiles(form):
                    rounded = any(is_rounded(*p) for p in form.pairs)
                    size = form.weight_bytes // (2 if rounded else 1)
                    return _Choice("tiles", str(form), form.macs, size, form.seconds, form)
        return best

    def _allows(self, key: Hashable, size: int) -> bool:
        if self.max_extra_bytes is None or key in self._forms:
            return True
        return self.extra_bytes + size <= self.max_extra_bytes

    def _allows_tiles(self, form: TileForm) -> bool:
        missing = [p for p in form.pairs if _key(*p) not in self._forms]
        channels = self.in_channels * _padded(self.out_channels)
        size = sum(
            r.products * c.products * channels * (2 if is_rounded(r, c) else 4) for r, c in missing
        )
        return not missing or self._allows(None, size)

    def _form(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The prepared weights of this key, made by the first thread that needs them."""
        form = self._forms.get(key)
        if form is None:
            with self._lock:
                form = self._forms.get(key)
                if form is None:
                    with torch.inference_mode(False), torch.no_grad():
                        form = self._forms[key] = make()
        return form

    def _tile_weights(self, tiles: TileForm) -> list[Tensor]:
        return [self._form(_key(r, c), partial(_tile, self._weight, r, c)) for r, c in tiles.pairs]

    def _panels(self) -> Tensor:
        return self._form("panels", partial(_panels, self._weight, self._is_planar))

    def _run_own(
        self,
        choice: _Choice,
        x: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        out: Tensor,
        offset: int,
    ) -> None:
        ops = torch.ops.deeplab_fast
        target = (shift, residual, out, offset)
        act = self.act or "none"
        if choice.tiles is None:
            kernel = self._weight.shape[2:]
            patch = (kernel, self.stride, self.padding, self.dilation, self._is_planar)
            ops._conv_pixels_cpu(x, self._panels(), *target, act, *patch)
            return
        numbers = [
            [a.long.number, a.short.number] for a in (choice.tiles.rows, choice.tiles.columns)
        ]
        weights = self._tile_weights(choice.tiles)
        ops._conv_tiles_cpu(x, weights, *target, self.dilation[0], *numbers, act)

    def _run_pytorch(
        self, choice: _Choice, x: Tensor, shift: Tensor, residual: Tensor | None
    ) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if choice.kernel == "aten":
            weight = self._weight.to(DTYPE).float()
            # In channels_last PyTorch skips padding, which a nan makes nan.
            x = x.to(DTYPE).float() if self._finite else x.to(DTYPE).float().contiguous()
            y = convolution(x, weight, shift, *geometry)
            return activate_(y if residual is None else y.add_(residual), self.act)
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        bias = shift if _takes_fp32_bias() else shift.to(DTYPE)
        y = onednn_convolution(x.to(DTYPE), self._reordered(x.shape), bias, *geometry)
        # Rounded before them: residuals and activations that oneDNN fuses lose nan.
        if residual is not None:
            y = y.float().add_(residual)
        return activate_(y, self.act)

    def _reordered(self, shape: Sequence[int]) -> Tensor:
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        weight = self._weight
        return self._form("onednn", lambda: reorder(weight.to(DTYPE), *geometry, list(shape)))


def own_rates() -> Rates:
    """The rates of our kernels for bf16 maps.

    Reckoned from those of fp32, not measured: vdpbf16ps does twice the multiply-adds of an fp32
    instruction, and a map of half the bytes halves what a transform reads or writes of it.
    """
    by = rates("float32")
    if torch.ops.deeplab_fast._conv_bf16_set("") != "avx512_bf16":
        return by
    lines = 0.75 * by.line_seconds
    return replace(by, multiply=2 * by.multiply, pixels=2 * by.pixels, line_seconds=lines)


def onednn_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """oneDNN's convolution of a bf16 map in channels_last with weights in its own layout."""
    geometry = (padding, stride, dilation, groups)
    convolution = torch.ops.mkldnn._convolution_pointwise
    y: Tensor = convolution(x, weight, bias, *geometry, "none", [], "")
    return y


def is_rounded(row: Form, column: Form) -> bool:
    """Whether a pair of forms multiplies in bf16."""
    return row.name in ROUNDED and column.name in ROUNDED


def empty(shape: Sequence[int], dtype: torch.dtype = DTYPE) -> Tensor:
    """A new map in channels_last."""
    return torch.empty(tuple(shape), dtype=dtype, memory_format=torch.channels_last)


def _key(row: Form, column: Form) -> tuple[str, str]:
    return row.name, column.name


def _tile(weight: Tensor, row: Form, column: Form) -> Tensor:
    ops = torch.ops.deeplab_fast
    panels: Tensor = ops._conv_prepare_tiles_cpu(weight, row.number, column.number)
    return ops._conv_panels_bf16_cpu(panels) if is_rounded(row, column) else panels


def _panels(weight: Tensor, planar: bool) -> Tensor:
    """[K, C, R, S] -> [K / 16, pairs of values of a patch, 16, 2], filled up with zeros; a patch is
    [C, R, S] of planes, else [R, S, C]."""
    rows = (weight if planar else weight.permute(0, 2, 3, 1)).flatten(1)
    rows = F.pad(rows, (0, 0, 0, -rows.shape[0] % _PANEL))
    panels = rows.view(-1, _PANEL, rows.shape[1]).transpose(1, 2).contiguous()
    packed: Tensor = torch.ops.deeplab_fast._conv_panels_bf16_cpu(panels)
    return packed


@lru_cache(maxsize=4096)
def _forms(
    images: int,
    channels: int,
    outputs: int,
    height: int,
    width: int,
    dilation: int,
    threads: int,
    by: Rates,
) -> tuple[TileForm, ...]:
    """The candidates, the best first, of both rates of products."""
    shape = (images, channels, outputs, height, width, dilation, threads, True, True)
    rounded = _cpu_forms.tile_forms(*shape, by=by)
    exact = _cpu_forms.tile_forms(*shape, dtype="float32")
    found = [form for form in rounded if all(is_rounded(*p) for p in form.pairs)]
    found += [form for form in exact if not any(is_rounded(*p) for p in form.pairs)]
    return tuple(sorted(found, key=lambda form: form.score))


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _padded(outputs: int) -> int:
    return -(-outputs // _PANEL) * _PANEL


def _even(depth: int) -> int:
    return depth + depth % 2


def _has_onednn() -> bool:
    usable = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return usable and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_kernels() -> bool:
    return not limits.extension(_ext.CPU, "_conv_panels_bf16_cpu")


@cache
def _takes_fp32_bias() -> bool:
    """Whether oneDNN adds a bias of fp32 to a convolution of bf16, else it is rounded."""
    one = torch.ones(1, 1, 1, 1, dtype=DTYPE)
    bias = torch.full((1,), 2.0**-20)
    try:
        y = onednn_convolution(0 * one, one, bias, (0, 0), (1, 1), (1, 1), 1)
    except RuntimeError:
        return False
    return bool(y.item() == 2.0**-20)
