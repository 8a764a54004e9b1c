"""Convolutions with weights prepared once, for inference in fp32 on the CPU.

    conv = PreparedConv(weight, scale, shift, padding=2, dilation=2)
    y = conv(x)                   # relu(scale * conv2d(x, weight) + shift)
    print(conv.plan(x.shape))     # what runs for this shape, and its cost

The objects take a snapshot of their weights: they do not follow later changes of the tensors that
they were made from. Where PyTorch's modules give nan or infinity, the result is not finite either:
a nan in the input, the weight, scale, shift or residual stays nan through every activation. An
infinite or nan input spreads to all outputs of its tile where tiles are used. What runs is chosen
for each shape by the cost model of `_cpu_forms`:

    tiles    3x3 convolutions with stride 1 and padding = dilation by few multiplications
    pixels   1x1 convolutions as one matrix product, written straight into a channel slice
    depthwise  each channel by its own filter, with any stride
    onednn   everything else, and those where it is predicted to be faster
    aten     where PyTorch has no oneDNN, and where a weight is not finite: what such a weight makes
             of padding depends on the algorithm, and here it is PyTorch's choice
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ext
from ..dispatch import limits
from ..plan.taps import live_taps, output_size
from . import _cpu_forms
from ._cpu_forms import TileForm

ACTIVATIONS = ("relu", "relu6", "hardswish", None)


@dataclass(frozen=True)
class Plan:
    """What one call runs.

    Attributes:
        kernel: what computes it: "tiles", "pixels", "depthwise", "strips" (of
            `prepared_inverted_residual`), "onednn" or "aten"; on a GPU one of `folded_conv`.
        form: the algorithm: "direct", or the forms along rows x columns, phases of the larger
            number of samples / the others.
        shape: of the input, [N, C, H, W].
        threads: that the prediction is for.
        macs: multiply-adds that are done; taps outside the map are not.
        bytes: of input, output and weights.
        predicted_seconds: by the cost model; on a GPU the least that operations and bytes take,
            None where its rates are not known.
        extra_bytes: of the prepared weights that the call needs beyond the original ones.
    """

    kernel: str
    form: str
    shape: tuple[int, int, int, int]
    threads: int
    macs: int
    bytes: int
    predicted_seconds: float | None
    extra_bytes: int

    def __str__(self) -> str:
        ms = "-" if self.predicted_seconds is None else f"{self.predicted_seconds * 1e3:.2f}"
        return (
            f"{self.kernel} {self.form} {list(self.shape)}: {self.macs / 1e9:.3f} GMAC, "
            f"{self.bytes / 1e6:.1f} MB, {ms} ms predicted on "
            f"{self.threads} threads, {self.extra_bytes / 1e6:.1f} MB of prepared weights"
        )


@dataclass(frozen=True)
class _Choice:
    kernel: str
    form: str
    macs: int
    weight_bytes: int
    seconds: float
    tiles: TileForm | None = None


class PreparedConv:
    """y = act(scale * conv2d(x, weight) + shift + residual), with prepared weights.

    Safe to call from several threads at a time; can be deep-copied and pickled.

    Args:
        weight: [K, C / groups, R, S], fp32, on the CPU.
        scale, shift: [K] (the folded batch norm), or None for one and zero.
        stride, padding, dilation: an int for rows and columns, or a pair (rows, columns).
        groups: as in torch.nn.functional.conv2d.
        act: "relu", "relu6", "hardswish", or None for the identity.
        max_extra_bytes: bound on `extra_bytes`; None for no bound. Forms that need more are not
            chosen.
        reuse: False where the object serves one call only: then the time of preparing weights
            counts when the algorithm is chosen.
        coarse: allow the form with an error of 5e-6 in place of 1.4e-6, where few layers follow
            that amplify it.

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
        reuse: bool = True,
        coarse: bool = False,
    ) -> None:
        check_weight("PreparedConv", weight)
        self.out_channels = weight.shape[0]
        self.in_channels = weight.shape[1] * groups
        self.stride = pair("PreparedConv: stride", stride, 1)
        self.padding = pair("PreparedConv: padding", padding, 0)
        self.dilation = pair("PreparedConv: dilation", dilation, 1)
        if groups < 1 or self.out_channels % groups:
            raise ValueError(
                f"PreparedConv: groups={groups} must divide the {self.out_channels} output channels"
            )
        if act not in ACTIVATIONS:
            raise ValueError(f"PreparedConv: act must be one of {ACTIVATIONS}, got {act!r}")
        self.groups = groups
        self.act = act
        self.max_extra_bytes = max_extra_bytes
        self.reuse = reuse
        self.coarse = coarse
        self._weight, self.shift = fold("PreparedConv", weight, scale, shift)
        # No sum of what is not finite is finite. One of huge weights may overflow, which costs them
        # a slower algorithm and nothing else.
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
            x: [N, C, H, W], fp32, any strides.
            residual: [N, K, H', W'], fp32, any strides, or None.
            out: [N, L, H', W'], fp32, contiguous in channels_last, or None for a new tensor.
            channel_offset: the result goes to channels [channel_offset, channel_offset + K) of
                `out`.
            overwrite_residual: the result may take residual's memory, which saves the page faults
                of a new map. Without effect with `out`, and where x lies in the same memory.

        Returns:
            [N, K, H', W'] in channels_last; with `out` the view of its channels.

        Raises:
            ValueError: shapes, dtypes, devices or a layout that do not fit.
        """
        shape = self.check_input(x)
        if residual is not None:
            _check_map("PreparedConv", "residual", residual, shape)
        into = None if out is None else _slice("PreparedConv", out, channel_offset, shape)
        with torch.no_grad():
            x = x.contiguous(memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
            choice = self._choose(x.shape, torch.get_num_threads(), into is not None)
            overwrite = (
                overwrite_residual
                and residual is not None
                and residual.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
            )
            if choice.kernel in _OWN:
                # The depthwise kernel writes some channels twice, and would add their residual so.
                overwrite = overwrite and choice.kernel != "depthwise"
                if out is None:
                    out, channel_offset = residual if overwrite else empty(shape), 0
                    assert out is not None
                elif (
                    residual is not None
                    and choice.kernel == "depthwise"
                    and _overlap(out, residual)
                ):
                    residual = residual.clone()
                self._run_own(choice, x, self.shift, residual, out, channel_offset)
                return out.narrow(1, channel_offset, self.out_channels) if into is None else into
            y = self._run_pytorch(choice, x, self.shift, residual, overwrite and into is None)
            if into is None:
                return y.contiguous(memory_format=torch.channels_last)
            into.copy_(y)
        return into

    def writes_into(self, shape: Sequence[int]) -> bool:
        """Whether a call on an input of this shape writes straight into `out`; else the result is
        copied there."""
        return self._choose(shape, torch.get_num_threads(), False).kernel in _OWN

    def shifted(self, x: Tensor, shifts: Tensor, out: Tensor | None = None) -> Tensor:
        """As a call on x, with shifts [N, K] of the images in place of the own shift; `out` as for
        a call, of the result's shape."""
        shape = self.check_input(x)
        with torch.no_grad():
            x = x.contiguous(memory_format=torch.channels_last)
            choice = self._choose(x.shape, torch.get_num_threads(), True)
            y = empty(shape) if out is None else _slice("PreparedConv", out, 0, shape)
            if choice.kernel == "pixels":
                self._run_own(choice, x, shifts, None, y, 0)
                return y
            for image in range(shape[0]):
                one = slice(image, image + 1)
                y[one] = self._run_pytorch(choice, x[one], shifts[image], None)
            return y

    def plan(
        self, shape: Sequence[int], threads: int | None = None, *, into_slice: bool = False
    ) -> Plan:
        """What a call on an input of this shape runs.

        Args:
            shape: of the input, [N, C, H, W].
            threads: None for the number that PyTorch uses now.
            into_slice: whether the call is given `out`.
        """
        n, _, height, width = shape
        out_height, out_width = self._output_size(height, width)
        threads = threads or torch.get_num_threads()
        choice = self._choose(shape, threads, into_slice)
        moved = n * self.in_channels * height * width
        moved += n * self.out_channels * out_height * out_width
        return Plan(
            choice.kernel,
            choice.form,
            (n, self.in_channels, height, width),
            threads,
            choice.macs,
            4 * moved + (choice.weight_bytes or 4 * self._weight.numel()),
            choice.seconds,
            choice.weight_bytes,
        )

    @property
    def weight(self) -> Tensor:
        """scale * weight."""
        return self._weight

    @property
    def kernel(self) -> tuple[int, int]:
        """Taps along rows and columns."""
        return self._weight.shape[2], self._weight.shape[3]

    @property
    def is_finite(self) -> bool:
        """Whether the weight is finite; else PyTorch's convolution runs."""
        return self._finite

    def prepare(self, shape: Sequence[int], *, into_slice: bool = False) -> None:
        """Prepare the weights that such a call needs; arguments as for `plan`."""
        choice = self._choose(shape, torch.get_num_threads(), into_slice)
        if choice.kernel == "tiles":
            self._tile_weights(choice)
        elif choice.kernel == "pixels":
            self._pixel_weight()
        elif choice.kernel == "depthwise":
            self._depthwise_weight()
        elif choice.kernel == "onednn":
            self._reordered(shape)

    @property
    def extra_bytes(self) -> int:
        """Bytes of prepared weights now held beyond the original ones."""
        return sum(_bytes(t) for t in list(self._forms.values()))

    def __getstate__(self) -> dict[str, Any]:
        # Prepared weights come back on demand; those in oneDNN's layout cannot be copied.
        own = ("_lock", "_forms", "_choices")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forms = {}
        self._choices = {}
        self._lock = threading.Lock()

    def _output_size(self, height: int, width: int) -> tuple[int, int]:
        h, w = (
            output_size(*axis)
            for axis in zip(
                (height, width),
                self._weight.shape[2:],
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        )
        if min(h, w) < 1:
            raise ValueError(
                f"PreparedConv: a map of {height}x{width} is smaller than the dilated kernel of "
                f"weight {list(self._weight.shape)} with dilation={self.dilation}, "
                f"padding={self.padding}"
            )
        return h, w

    def check_input(self, x: Tensor) -> tuple[int, int, int, int]:
        """The shape of the result for x.

        Raises:
            ValueError: x does not fit.
        """
        _check_map("PreparedConv", "x", x)
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"PreparedConv: x {list(x.shape)} has {x.shape[1]} channels, the weight wants "
                f"{self.in_channels}"
            )
        return (x.shape[0], self.out_channels, *self._output_size(x.shape[2], x.shape[3]))

    def _choose(self, shape: Sequence[int], threads: int, into_slice: bool) -> _Choice:
        # All that a choice depends on and that can change.
        key = (*shape, threads, into_slice, _has_onednn(), self.max_extra_bytes, len(self._forms))
        choice = self._choices.get(key)
        if choice is None:
            if len(self._choices) >= _KEPT_CHOICES:
                self._choices.clear()
            choice = self._choices[key] = self._choose_now(shape, threads, into_slice)
        return choice

    def _choose_now(self, shape: Sequence[int], threads: int, into_slice: bool) -> _Choice:
        n, _, height, width = shape
        macs = n * self._weight.numel()
        for axis, length in enumerate((height, width)):
            macs *= live_taps(
                length,
                self._weight.shape[2 + axis],
                self.stride[axis],
                self.padding[axis],
                self.dilation[axis],
            )
        macs //= self._weight.shape[2] * self._weight.shape[3]
        size = 4 * self._weight.numel()
        onednn = _has_onednn() and self._finite
        direct = _Choice(
            "onednn" if onednn else "aten",
            "direct",
            macs,
            size if onednn and self._allows("onednn", size) else 0,
            _cpu_forms.onednn_seconds(
                macs, threads, pointwise=tuple(self._weight.shape[2:]) == (1, 1)
            ),
        )
        if not self._finite or not _has_kernels():
            return direct
        if self.groups == self.in_channels == self.out_channels > 1:
            size = 4 * math.prod(self._weight.shape[2:]) * padded(self.out_channels)
            if self._allows("depthwise", size):
                seconds = _cpu_forms.depthwise_seconds(macs, threads)
                return _Choice("depthwise", "direct", macs, size, seconds)
        if self.groups != 1 or self.stride != (1, 1):
            return direct
        kernel = tuple(self._weight.shape[2:])
        if kernel == (1, 1) and self.padding == (0, 0):
            size = 4 * -(-self.out_channels // _PANEL) * _PANEL * self.in_channels
            faster = _pixels_are_faster(self.in_channels, self.out_channels)
            if (faster or into_slice or not _has_onednn()) and self._allows("pixels", size):
                return _Choice("pixels", "direct", macs, size, direct.seconds)
        if kernel == (3, 3) and self.padding == self.dilation and len(set(self.dilation)) == 1:
            forms = _cpu_forms.tile_forms(
                n,
                self.in_channels,
                self.out_channels,
                height,
                width,
                self.dilation[0],
                threads,
                self.reuse,
                self.coarse,
            )
            for form in forms:
                if form.score < direct.seconds and self._allows_tiles(form):
                    return _Choice(
                        "tiles", str(form), form.macs, form.weight_bytes, form.seconds, form
                    )
        return direct

    def _allows(self, key: Hashable, size: int) -> bool:
        if key == "onednn" and not self.reuse:
            # oneDNN reorders the weights of a call itself.
            return False
        if self.max_extra_bytes is None or key in self._forms:
            return True
        return self.extra_bytes + size <= self.max_extra_bytes

    def _allows_tiles(self, form: TileForm) -> bool:
        if self.max_extra_bytes is None:
            return True
        missing = [pair for pair in form.pairs if _tile_key(*pair) not in self._forms]
        lines = 4 * -(-self.out_channels // _PANEL) * _PANEL * self.in_channels
        size = sum(row.products * column.products * lines for row, column in missing)
        return self.extra_bytes + size <= self.max_extra_bytes

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

    def _tile_weights(self, choice: _Choice) -> list[Tensor]:
        assert choice.tiles is not None
        prepare = torch.ops.deeplab_fast._conv_prepare_tiles_cpu
        return [
            self._form(_tile_key(r, c), partial(prepare, self._weight, r.number, c.number))
            for r, c in choice.tiles.pairs
        ]

    def _pixel_weight(self) -> Tensor:
        return self._form("pixels", partial(panels, self._weight))

    def _depthwise_weight(self) -> Tensor:
        return self._form("depthwise", partial(depthwise_taps, self._weight))

    def _run_own(
        self,
        choice: _Choice,
        x: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        out: Tensor,
        channel_offset: int,
    ) -> None:
        ops = torch.ops.deeplab_fast
        target = (residual, out, channel_offset)
        if choice.kernel == "depthwise":
            weight, act = self._depthwise_weight(), self.act or "none"
            geometry = (self.stride, self.padding, self.dilation)
            ops._inverted_residual_cpu(
                x, None, None, weight, shift, None, None, *target, None, *geometry, "none", act, ""
            )
            return
        if choice.tiles is None:
            ops._conv_pixels_cpu(x, self._pixel_weight(), shift, *target, self.act or "none")
            return
        ops._conv_tiles_cpu(
            x,
            self._tile_weights(choice),
            shift,
            *target,
            self.dilation[0],
            *([a.long.number, a.short.number] for a in (choice.tiles.rows, choice.tiles.columns)),
            self.act or "none",
        )

    def _run_pytorch(
        self,
        choice: _Choice,
        x: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        overwrite: bool = False,
    ) -> Tensor:
        if choice.kernel == "aten":
            if not self._finite:
                # In channels_last PyTorch skips padding, which a nan makes nan.
                x = x.contiguous()
            y = F.conv2d(
                x, self._weight, shift, self.stride, self.padding, self.dilation, self.groups
            )
            return activate_(y if residual is None else y.add_(residual), self.act)
        mkldnn = torch.ops.mkldnn
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        weight = self._reordered(x.shape)
        if residual is not None and _in_any_format(residual):
            # PyTorch 2.11 cannot add it: "could not create a memory".
            y = mkldnn._convolution_pointwise(x, weight, shift, *geometry, "none", [], "")
            y += residual
        elif residual is None:
            # Of oneDNN's fused activations only those that multiply by the input keep nan; its
            # maxima and minima turn nan into 0. A pass over the result costs a model up to 7 %.
            fused = self.act if self.act == "hardswish" else None
            y = mkldnn._convolution_pointwise(x, weight, shift, *geometry, fused or "none", [], "")
            if fused:
                return y
        elif overwrite:
            y = mkldnn._convolution_pointwise_.binary(
                residual, x, weight, shift, *geometry, "add", 1.0, None, [], ""
            )
        else:
            y = mkldnn._convolution_pointwise.binary(
                x, residual, weight, shift, *geometry, "add", 1.0, None, [], ""
            )
        return activate_(y, self.act)

    def _reordered(self, shape: Sequence[int]) -> Tensor:
        if not self._allows("onednn", 4 * self._weight.numel()):
            return self._weight
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        return self._form("onednn", lambda: reorder(self._weight, *geometry, list(shape)))


# Kernels of our own, which write into a given map.
_OWN = ("tiles", "pixels", "depthwise")
_PANEL = 16
_KEPT_CHOICES = 64


def _in_any_format(x: Tensor) -> bool:
    """Whether x is both contiguous and channels_last: maps of one pixel or one channel are."""
    return x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _has_kernels() -> bool:
    return not limits.extension(_ext.CPU, "_inverted_residual_cpu")


def _pixels_are_faster(channels: int, outputs: int) -> bool:
    """Where the matrix product was measured to be faster than oneDNN's 1x1 convolution.

    Elsewhere it takes up to 1.1 times as long, and up to 1.4 times with few input channels.
    """
    return channels >= 128 and channels >= 2 * outputs and channels % 512 != 0


def _tile_key(row: _cpu_forms.Form, column: _cpu_forms.Form) -> tuple[str, str]:
    return row.name, column.name


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two maps may lie in the same memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def padded(channels: int) -> int:
    """Channels filled up to whole panels of prepared weights."""
    return -(-channels // _PANEL) * _PANEL


def depthwise_taps(weight: Tensor) -> Tensor:
    """[C, 1, R, S] -> [R, S, C], the channels filled up with zeros to whole panels."""
    channels = weight.shape[0]
    taps = weight.flatten(0, 1).permute(1, 2, 0)
    return F.pad(taps, (0, padded(channels) - channels)).contiguous()


def panels(weight: Tensor) -> Tensor:
    """[K, C, 1, 1] -> [K / 16, C, 16], the output channels filled up with zeros."""
    outputs, channels = weight.shape[:2]
    rows = F.pad(weight.flatten(1), (0, 0, 0, -outputs % _PANEL))
    return rows.view(-1, _PANEL, channels).transpose(1, 2).contiguous()


def empty(shape: Sequence[int]) -> Tensor:
    """A new fp32 map in channels_last."""
    return torch.empty(
        tuple(shape), dtype=torch.float32, device="cpu", memory_format=torch.channels_last
    )


def _bytes(tensor: Tensor) -> int:
    return 4 * tensor.numel()


def activate_(y: Tensor, act: str | None) -> Tensor:
    """An activation of `ACTIVATIONS`, in place."""
    if act == "relu":
        return y.relu_()
    if act == "relu6":
        return F.relu6(y, inplace=True)
    return F.hardswish(y, inplace=True) if act == "hardswish" else y


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """An option for rows and columns."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or min(both) < least:
        raise ValueError(
            f"{name} must be an int or a pair of ints of at least {least}, got {value!r}"
        )
    return both[0], both[1]


def check_fp32_cpu(who: str, name: str, tensor: Tensor) -> None:
    """A tensor in float32 on the CPU."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{who}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{who}: {name} is {dtype} on {tensor.device}; allowed is float32 on the CPU"
        )


def check_weight(who: str, weight: Tensor) -> None:
    """A weight [K, C, R, S] in float32 on the CPU."""
    check_fp32_cpu(who, "weight", weight)
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(f"{who}: weight has shape {list(weight.shape)}, expected [K, C, R, S]")


def _check_map(who: str, name: str, x: Tensor, expected: Sequence[int] | None = None) -> None:
    check_fp32_cpu(who, name, x)
    if x.dim() != 4 or (expected is not None and tuple(x.shape) != tuple(expected)):
        wanted = "[N, C, H, W]" if expected is None else list(expected)
        raise ValueError(f"{who}: {name} has shape {list(x.shape)}, expected {wanted}")


def fold(
    who: str, weight: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(weight * scale, shift), as new tensors that belong to no graph and no inference mode."""
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is None:
            continue
        if tuple(vector.shape) != (weight.shape[0],):
            raise ValueError(
                f"{who}: {name} has shape {list(vector.shape)}, expected [{weight.shape[0]}], one "
                "value for each output channel"
            )
        if vector.device.type != "cpu":
            raise ValueError(f"{who}: {name} is on {vector.device}; allowed is the CPU")
    with torch.inference_mode(False), torch.no_grad():
        folded = weight.detach().clone(memory_format=torch.contiguous_format)
        if scale is not None:
            folded *= scale.detach().to(torch.float32)[:, None, None, None]
        if shift is None:
            return folded, weight.new_zeros(weight.shape[0])
        return folded, shift.detach().to(torch.float32, copy=True).contiguous()


def _slice(who: str, out: Tensor, offset: int, shape: Sequence[int]) -> Tensor:
    n, channels, height, width = shape
    check_fp32_cpu(who, "out", out)
    fits = out.dim() == 4 and (out.shape[0], *out.shape[2:]) == (n, height, width)
    if not fits or not 0 <= offset <= out.shape[1] - channels:
        raise ValueError(
            f"{who}: out has shape {list(out.shape)}, expected [{n}, L, {height}, {width}] with "
            f"L >= channel_offset + {channels}, channel_offset={offset}"
        )
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{who}: out has strides {out.stride()}; make it with memory_format=torch.channels_last"
        )
    return out.narrow(1, offset, channels)
