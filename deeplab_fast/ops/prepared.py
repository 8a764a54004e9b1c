"""Convolutions with weights prepared once, for inference in fp32 on the CPU.

    conv = PreparedConv(weight, scale, shift, padding=2, dilation=2)
    y = conv(x)                   # relu(scale * conv2d(x, weight) + shift)
    print(conv.plan(x.shape))     # what runs for this shape, and its cost

The objects take a snapshot of their weights: they do not follow later changes of the tensors that
they were made from. Where PyTorch's modules give nan or infinity, the result is not finite either:
a nan in the input, the weight, scale, shift or residual stays nan through every activation. An
infinite or nan input spreads to all outputs of its tile where tiles are used. What runs is chosen
for each shape by the cost model of `_cpu_forms`:

    tiles      3x3 convolutions with stride 1 and padding = dilation by few multiplications
    pixels     1x1 convolutions as one matrix product
    patches    any other convolution of one group as one, over its taps at every output pixel, which
               are gathered block by block
    depthwise  those of each channel by a filter of its own
    onednn     everything else, and those where it is predicted to be faster
    aten       where PyTorch has no oneDNN, and where a weight is not finite: what such a weight
               makes of padding depends on the algorithm, and here it is PyTorch's choice
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
from ..reference import convolution, is_safe
from . import _cpu_forms
from ._cpu_forms import TileForm
from .common import LARGEST, is_option

ACTIVATIONS = ("relu", "relu6", "hardswish", None)


@dataclass(frozen=True)
class Plan:
    """What one call runs.

    Attributes:
        kernel: what computes it: "tiles", "pixels", "patches", "depthwise", "strips" (of
            `prepared_inverted_residual`), "onednn" or "aten"; on a GPU one of `folded_conv`.
        form: the algorithm: "direct", or the forms along rows x columns, phases of the larger
            number of samples / the others.
        shape: of the input, [N, C, H, W].
        threads: that the prediction is for.
        macs: multiply-adds that are done; taps outside the map are by "patches" alone.
        bytes: of input, output and weights.
        predicted_seconds: by the cost model; on a GPU the least that operations and bytes take,
            None where its rates are not known.
        extra_bytes: of the prepared weights that the call needs beyond the original ones, whose
            place those of "pixels" and "patches" take.
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
        folded, self.shift = fold("PreparedConv", weight, scale, shift)
        # None where panels, which are a permutation of it, have taken its place.
        self._folded: Tensor | None = folded
        self._shape = tuple(folded.shape)
        # No sum of what is not finite is finite. One of huge weights may overflow, which costs them
        # a slower algorithm and nothing else.
        self._finite = math.isfinite(folded.sum().item())
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
            choice = self._choose(x.shape, torch.get_num_threads())
            x = self._in_format(x, choice)
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
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
        return self._choose(shape, torch.get_num_threads()).kernel in _OWN

    def shifted(self, x: Tensor, shifts: Tensor, out: Tensor | None = None) -> Tensor:
        """As a call on x, with shifts [N, K] of the images in place of the own shift; `out` as for
        a call, of the result's shape."""
        shape = self.check_input(x)
        with torch.no_grad():
            choice = self._choose(x.shape, torch.get_num_threads())
            x = self._in_format(x, choice)
            y = empty(shape) if out is None else _slice("PreparedConv", out, 0, shape)
            if choice.kernel in ("pixels", "patches"):
                self._run_own(choice, x, shifts, None, y, 0)
                return y
            for image in range(shape[0]):
                one = slice(image, image + 1)
                y[one] = self._run_pytorch(choice, x[one], shifts[image], None)
            return y

    def plan(self, shape: Sequence[int], threads: int | None = None) -> Plan:
        """What a call on an input of this shape runs.

        Args:
            shape: of the input, [N, C, H, W].
            threads: None for the number that PyTorch uses now.
        """
        n, _, height, width = shape
        out_height, out_width = self._output_size(height, width)
        threads = threads or torch.get_num_threads()
        choice = self._choose(shape, threads)
        moved = n * self.in_channels * height * width
        moved += n * self.out_channels * out_height * out_width
        return Plan(
            choice.kernel,
            choice.form,
            (n, self.in_channels, height, width),
            threads,
            choice.macs,
            4 * moved + (choice.weight_bytes or self._folded_bytes),
            choice.seconds,
            choice.weight_bytes - (self._folded_bytes if choice.kernel in _PANELS else 0),
        )

    @property
    def weight(self) -> Tensor:
        """scale * weight, made anew where it is not held."""
        weight = self._folded
        if weight is not None:
            return weight
        return _unpanelled(self._forms["panels"], self._shape, self._is_planar)

    def folded(self) -> tuple[Tensor, Tensor]:
        """(scale * weight [K, C / groups, R, S], shift [K]), in a layout of the caller's own."""
        return self.weight.contiguous(), self.shift

    @property
    def kernel(self) -> tuple[int, int]:
        """Taps along rows and columns."""
        return self._shape[2], self._shape[3]

    @property
    def is_finite(self) -> bool:
        """Whether the weight is finite; else PyTorch's convolution runs."""
        return self._finite

    @property
    def takes_any_format(self) -> bool:
        """Whether an input of another memory format than channels_last costs no copy, as a rule."""
        return self.groups == 1 and self._is_planar

    def prepare(self, shape: Sequence[int]) -> None:
        """Prepare the weights that a call on an input of this shape needs."""
        choice = self._choose(shape, torch.get_num_threads())
        if choice.kernel == "tiles":
            self._tile_weights(choice)
        elif choice.kernel in _PANELS:
            self._panels()
        elif choice.kernel == "depthwise":
            self._depthwise_weight()
        elif choice.kernel == "onednn":
            self._reordered(shape)

    @property
    def extra_bytes(self) -> int:
        """Bytes of prepared weights now held beyond the original ones."""
        held = sum(_bytes(t) for t in list(self._forms.values()))
        return held - (self._folded_bytes if self._folded is None else 0)

    @property
    def _folded_bytes(self) -> int:
        return 4 * math.prod(self._shape)

    def __getstate__(self) -> dict[str, Any]:
        # Prepared weights come back on demand; those in oneDNN's layout cannot be copied.
        own = ("_lock", "_forms", "_choices")
        state = {k: v for k, v in self.__dict__.items() if k not in own}
        return state | {"_folded": self.weight}

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
                self.kernel,
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        )
        if min(h, w) < 1:
            raise ValueError(
                f"PreparedConv: a map of {height}x{width} is smaller than the dilated kernel of "
                f"weight {list(self._shape)} with dilation={self.dilation}, "
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

    def _choose(self, shape: Sequence[int], threads: int) -> _Choice:
        # All that a choice depends on and that can change.
        key = (*shape, threads, _has_onednn(), self.max_extra_bytes, len(self._forms))
        choice = self._choices.get(key)
        if choice is None:
            if len(self._choices) >= _KEPT_CHOICES:
                self._choices.clear()
            choice = self._choices[key] = self._choose_now(shape, threads)
        return choice

    def _choose_now(self, shape: Sequence[int], threads: int) -> _Choice:
        n, _, height, width = shape
        kernel = self.kernel
        macs = n * math.prod(self._shape[:2])
        for axis, length in enumerate((height, width)):
            macs *= live_taps(
                length, kernel[axis], self.stride[axis], self.padding[axis], self.dilation[axis]
            )
        size = self._folded_bytes
        options = (self.stride, self.padding, self.dilation)
        onednn = _has_onednn() and self._finite and is_safe(shape, self._shape, *options)
        pointwise = kernel == (1, 1)
        direct = _Choice(
            "onednn" if onednn else "aten",
            "direct",
            macs,
            size if onednn and self._allows("onednn", size) else 0,
            _cpu_forms.onednn_seconds(macs, threads, pointwise=pointwise),
        )
        if not self._finite or not _has_kernels():
            return direct
        if self.groups == self.in_channels == self.out_channels > 1:
            size = 4 * math.prod(kernel) * padded(self.out_channels)
            if self._allows("depthwise", size):
                seconds = _cpu_forms.depthwise_seconds(macs, threads)
                return _Choice("depthwise", "direct", macs, size, seconds)
        if self.groups != 1:
            return direct
        out_height, out_width = self._output_size(height, width)
        outputs = n * self.out_channels * out_height * out_width
        size = 4 * padded(self.out_channels) * math.prod(self._shape[1:])
        if self._allows_panels(size):
            # What oneDNN cannot do in its own pass: the activation, and writing into a given map.
            beside = _cpu_forms.new_map_seconds(outputs, threads)
            if self.act in ("relu", "relu6"):
                beside += _cpu_forms.pass_seconds(outputs, threads)
            done = outputs * math.prod(self._shape[1:])
            name, gathered, runs = "pixels", 0, 0
            if (self.stride, self.padding, pointwise) != ((1, 1), (0, 0), True):
                name, gathered = "patches", done // self.out_channels
                runs = n * out_height * out_width * self._runs_of_a_patch
            seconds = _cpu_forms.pixels_seconds(done, threads, gathered=gathered, runs=runs)
            if seconds <= direct.seconds + beside or not onednn:
                direct = _Choice(name, "direct", done, size, seconds)
        same = self.padding == self.dilation and len(set(self.dilation)) == 1
        if kernel == (3, 3) and self.stride == (1, 1) and same:
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

    def _allows_panels(self, size: int) -> bool:
        if self.max_extra_bytes is None or "panels" in self._forms:
            return True
        return self.extra_bytes + size - self._folded_bytes <= self.max_extra_bytes

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

        def make(rows: int, columns: int) -> Tensor:
            made: Tensor = prepare(self.weight, rows, columns)
            return made

        return [
            self._form(_tile_key(r, c), partial(make, r.number, c.number))
            for r, c in choice.tiles.pairs
        ]

    @property
    def _is_planar(self) -> bool:
        """Whether patches have channels before taps: of few channels lines of a photo's planes are
        longer than pixels. Sums are added up in the same order in any memory format."""
        return self.in_channels <= _FEW_CHANNELS

    @property
    def _runs_of_a_patch(self) -> int:
        """Parts of a patch that lie one behind another in a map."""
        if self._is_planar:
            return self.kernel[0] * self.in_channels
        return self.kernel[0] * (1 if self.dilation[1] == 1 else self.kernel[1])

    def _panels(self) -> Tensor:
        form = self._form("panels", lambda: panels(self.weight, self._is_planar))
        self._folded = None
        return form

    def _depthwise_weight(self) -> Tensor:
        return self._form("depthwise", lambda: depthwise_taps(self.weight))

    def _in_format(self, x: Tensor, choice: _Choice) -> Tensor:
        """x as the kernel takes it: channels_last, a dense slice of channels, or few planes."""
        if choice.kernel in _PANELS and (self._is_planar or x.stride(1) == 1):
            return x
        return x.contiguous(memory_format=torch.channels_last)

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
            patch = (self.kernel, self.stride, self.padding, self.dilation, self._is_planar)
            ops._conv_pixels_cpu(x, self._panels(), shift, *target, self.act or "none", *patch)
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
            y = convolution(
                x, self.weight, shift, self.stride, self.padding, self.dilation, self.groups
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
        if not self._allows("onednn", self._folded_bytes):
            return self.weight
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        return self._form("onednn", lambda: reorder(self.weight, *geometry, list(shape)))


# Kernels of our own, which write into a given map.
_OWN = ("tiles", "pixels", "patches", "depthwise")
# Those whose weights are panels.
_PANELS = ("pixels", "patches")
_PANEL = 16
_KEPT_CHOICES = 64
# Channels up to which patches are planar; of more, a copy in channels_last is faster than planes.
_FEW_CHANNELS = 4


def _in_any_format(x: Tensor) -> bool:
    """Whether x is both contiguous and channels_last: maps of one pixel or one channel are."""
    return x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _has_kernels() -> bool:
    return not limits.extension(_ext.CPU, "_inverted_residual_cpu")


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


def panels(weight: Tensor, planar: bool = False) -> Tensor:
    """[K, C, R, S] -> [K / 16, R * S * C, 16], the output channels filled up with zeros; planar:
    [K / 16, C * R * S, 16]."""
    rows = (weight if planar else weight.permute(0, 2, 3, 1)).flatten(1)
    whole = F.pad(rows, (0, 0, 0, padded(rows.shape[0]) - rows.shape[0]))
    return whole.unflatten(0, (-1, _PANEL)).mT.contiguous()


def _unpanelled(form: Tensor, shape: Sequence[int], planar: bool) -> Tensor:
    """The weight of this shape that `panels` gave `form` for."""
    k, c, r, s = shape
    rows = form.mT.flatten(0, 1)[:k]
    if planar:
        return rows.view(k, c, r, s).contiguous()
    return rows.view(k, r, s, c).permute(0, 3, 1, 2).contiguous()


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
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or not all(is_option(each, least) for each in both):
        raise ValueError(
            f"{name} must be an int or a pair of ints from {least} to {LARGEST}, got {value!r}"
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
