"""Inverted residuals with weights prepared once, for inference in fp32 on the CPU.

    y = project(scaled(depthwise(expand(x)))) + residual

expand and project are 1x1 convolutions, each convolution with its batch norm and activation;
`scaled` multiplies channels by what squeeze-excitation makes of their means, where there is one.
The expanded map is not stored: strips of rows and columns go through all convolutions while they
stay in a second-level cache (csrc/include/deeplab_fast/strips_run.h). Sources: arXiv 1801.04381,
1905.02244.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ext
from ..dispatch import limits
from ..plan.taps import live_taps, output_size
from . import _cpu_forms
from .prepared import Plan, PreparedConv, depthwise_taps, empty, padded, panels


@dataclass(frozen=True)
class Folded:
    """A convolution with its batch norm and activation: act(scale * conv(x, weight) + shift).

    Attributes:
        weight: [K, C, R, S], fp32, on the CPU.
        scale, shift: [K], or None for one and zero.
        act: "relu", "relu6", "hardswish", or None for the identity.
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    act: str | None


class PreparedInvertedResidual:
    """y = project(scaled(depthwise(expand(x)))) + residual, with prepared weights.

    Runs as three `PreparedConv`s where the extension is missing, a weight is not finite, or the
    prepared weights would exceed `max_extra_bytes`. Safe to call from several threads at a time;
    can be deep-copied and pickled.

    Args:
        expand: of weight [K, C, 1, 1], or None for none.
        depthwise: of weight [K, 1, R, S].
        project: of weight [L, K, 1, 1]; its activation follows the sum.
        stride, padding, dilation: of the depthwise convolution, (rows, columns).
        squeeze: the factors [N, K] of channels of the means [N, K] of the filtered map, or None.
        max_extra_bytes: bound on `extra_bytes`; None for no bound.

    Raises:
        ValueError: tensors or options that do not fit.
    """

    def __init__(
        self,
        expand: Folded | None,
        depthwise: Folded,
        project: Folded,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        squeeze: Callable[[Tensor], Tensor] | None = None,
        max_extra_bytes: int | None = None,
    ) -> None:
        channels = depthwise.weight.shape[0]
        pointwise = [part for part in (expand, project) if part is not None]
        if (
            any(part.weight.dim() != 4 or part.weight.shape[2:] != (1, 1) for part in pointwise)
            or depthwise.weight.dim() != 4
            or depthwise.weight.shape[1] != 1
            or project.weight.shape[1] != channels
            or (expand is not None and expand.weight.shape[0] != channels)
        ):
            shapes = [list(p.weight.shape) for p in (expand, depthwise, project) if p is not None]
            raise ValueError(
                f"PreparedInvertedResidual: weights {shapes} are no 1x1, depthwise and 1x1 "
                "convolution of the same channels"
            )
        self.in_channels = channels if expand is None else expand.weight.shape[1]
        self.channels, self.out_channels = channels, project.weight.shape[0]
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.squeeze = squeeze
        self.max_extra_bytes = max_extra_bytes
        parts = [expand, depthwise, project]
        sizes = [0 if part is None else part.weight.numel() for part in parts]

        def conv(part: Folded, size: int, **options: Any) -> PreparedConv:
            bound = None if max_extra_bytes is None else max_extra_bytes * size // sum(sizes)
            return PreparedConv(
                part.weight, part.scale, part.shift, act=part.act, max_extra_bytes=bound, **options
            )

        filtered = {"stride": stride, "dilation": dilation, "groups": channels}
        self._expand = None if expand is None else conv(expand, sizes[0])
        self._depthwise = conv(depthwise, sizes[1] // 2, padding=padding, **filtered)
        # For maps that are padded beforehand.
        self._unpadded = conv(depthwise, sizes[1] // 2, **filtered)
        self._project = conv(project, sizes[2])
        self._forms: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        out: Tensor | None = None,
        sides: Sequence[int] | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x: [N, C, H, W], fp32, any strides.
            residual: [N, L, H', W'], fp32, any strides, or None; may be x.
            out: [N, L, H', W'], fp32, contiguous in channels_last, or None for a new tensor. It may
                not lie in the memory of x or residual.
            sides: what is padded, (left, right, top, bottom), in place of `padding`.

        Returns:
            [N, L, H', W'] in channels_last.

        Raises:
            ValueError: shapes, dtypes, devices or a layout that do not fit.
        """
        shape = self.output_shape(x.shape, sides)
        if not self.writes_into(x.shape):
            y = self._separate(x, residual, sides)
            return y if out is None else out.copy_(y)
        with torch.no_grad():
            x = x.contiguous(memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
            y = empty(shape) if out is None else out
            self._run(x, residual, y, sides)
        return y

    def writes_into(self, shape: Sequence[int]) -> bool:
        """Whether a call on an input of this shape writes straight into `out`."""
        convs = self._convs
        return (
            not limits.extension(_ext.CPU, "_inverted_residual_cpu")
            and all(conv.is_finite for conv in convs)
            and (self.max_extra_bytes is None or self._size <= self.max_extra_bytes)
        )

    def output_shape(
        self, shape: Sequence[int], sides: Sequence[int] | None = None
    ) -> tuple[int, int, int, int]:
        """Of the result for an input of this shape.

        Raises:
            ValueError: the input does not fit.
        """
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise ValueError(
                f"PreparedInvertedResidual: x has shape {list(shape)}, expected "
                f"[N, {self.in_channels}, H, W]"
            )
        sizes = []
        for axis, (before, behind) in enumerate(self._sides(sides)):
            taps, dilation = self._depthwise.kernel[axis], self.dilation[axis]
            length = shape[2 + axis] + before + behind
            sizes.append(output_size(length, taps, self.stride[axis], 0, dilation))
        if min(sizes) < 1:
            raise ValueError(
                f"PreparedInvertedResidual: a map of {shape[2]}x{shape[3]} is smaller than the "
                f"dilated kernel of {self._depthwise.kernel} taps"
            )
        return (shape[0], self.out_channels, sizes[0], sizes[1])

    def plan(self, shape: Sequence[int], sides: Sequence[int] | None = None) -> tuple[Plan, ...]:
        """What a call on an input of this shape runs."""
        n, _, height, width = self.output_shape(shape, sides)
        middle = (n, self.channels, height, width)
        if not self.writes_into(shape):
            first = () if self._expand is None else (self._expand.plan(shape),)
            (top, bottom), (left, right) = self._sides(sides)
            conv, rows, columns = self._depthwise, shape[2], shape[3]
            if sides is not None:
                conv, rows, columns = self._unpadded, rows + top + bottom, columns + left + right
            filtered = conv.plan((n, self.channels, rows, columns))
            return (*first, filtered, self._project.plan(middle))
        threads = torch.get_num_threads()
        pointwise = math.prod(middle) * self.out_channels
        if self._expand is not None:
            pointwise += n * shape[2] * shape[3] * self.in_channels * self.channels
        taps = n * self.channels
        for axis, (before, _) in enumerate(self._sides(sides)):
            taps *= live_taps(
                shape[2 + axis],
                self._depthwise.kernel[axis],
                self.stride[axis],
                before,
                self.dilation[axis],
            )
        moved = math.prod(shape) + n * self.out_channels * height * width
        kernel = "x".join(map(str, self._depthwise.kernel))
        return (
            Plan(
                "strips",
                f"{'' if self._expand is None else '1x1, '}{kernel}, 1x1",
                (n, self.in_channels, shape[2], shape[3]),
                threads,
                pointwise + taps,
                4 * moved + self._size,
                _cpu_forms.strips_seconds(pointwise, taps, threads),
                self._size,
            ),
        )

    def prepare(self, shape: Sequence[int]) -> None:
        """Prepare the weights that a call on an input of this shape needs."""
        if self.writes_into(shape):
            self._weights()

    @property
    def extra_bytes(self) -> int:
        """Bytes of prepared weights now held beyond the original ones."""
        held = sum(conv.extra_bytes for conv in self._convs)
        return held + sum(form.nbytes for form in list(self._forms.values()))

    def __getstate__(self) -> dict[str, Any]:
        # Prepared weights come back on demand.
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_forms")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forms = {}
        self._lock = threading.Lock()

    @property
    def parts(self) -> tuple[PreparedConv | None, PreparedConv, PreparedConv]:
        """(expand, depthwise, project)."""
        return self._expand, self._depthwise, self._project

    @property
    def _convs(self) -> tuple[PreparedConv, ...]:
        first = () if self._expand is None else (self._expand,)
        return (*first, self._depthwise, self._unpadded, self._project)

    @property
    def _size(self) -> int:
        """Bytes of the prepared weights."""
        taps = math.prod(self._depthwise.kernel) * padded(self.channels)
        wide = 0 if self._expand is None else (self.in_channels + 1) * padded(self.channels)
        return 4 * (taps + wide + self.channels * padded(self.out_channels))

    def _sides(self, sides: Sequence[int] | None) -> tuple[tuple[int, int], tuple[int, int]]:
        """What is padded (above, below), (left, right)."""
        if sides is None:
            rows, columns = self.padding
            return (rows, rows), (columns, columns)
        left, right, top, bottom = sides
        return (top, bottom), (left, right)

    def _weights(self) -> dict[str, Tensor]:
        """The prepared weights, made by the first thread that needs them."""
        if not self._forms:
            with self._lock:
                if not self._forms:
                    with torch.inference_mode(False), torch.no_grad():
                        forms = {
                            "depthwise": depthwise_taps(self._depthwise.weight),
                            "project": panels(self._project.weight),
                        }
                        if self._expand is not None:
                            forms["expand"] = panels(self._expand.weight)
                            missing = padded(self.channels) - self.channels
                            forms["expand_shift"] = F.pad(self._expand.shift, (0, missing))
                        self._forms = forms
        return self._forms

    def _run(
        self, x: Tensor, residual: Tensor | None, out: Tensor, sides: Sequence[int] | None
    ) -> None:
        ops = torch.ops.deeplab_fast
        forms = self._weights()
        acts = [
            "none" if conv is None else conv.act or "none"
            for conv in (self._expand, self._depthwise, self._project)
        ]
        (top, _), (left, _) = self._sides(sides)
        geometry = (self.stride, (top, left), self.dilation)
        first = (x, forms.get("expand"), forms.get("expand_shift"))
        filtered = (forms["depthwise"], self._depthwise.shift)
        project = (forms["project"], self._project.shift)
        if self.squeeze is None:
            ops._inverted_residual_cpu(
                *first, *filtered, *project, residual, out, 0, None, *geometry, *acts
            )
            return
        n, _, height, width = out.shape
        middle = empty((n, self.channels, height, width))
        sums = x.new_empty((n, height, self.channels))
        ops._inverted_residual_cpu(
            *first, *filtered, None, None, None, middle, 0, sums, *geometry, *acts
        )
        factors = self.squeeze(sums.sum(1) / (height * width)).contiguous()
        ops._scaled_pixels_cpu(middle, project[0], factors, project[1], residual, out, acts[2])

    def _separate(self, x: Tensor, residual: Tensor | None, sides: Sequence[int] | None) -> Tensor:
        y = x if self._expand is None else self._expand(x)
        y = self._depthwise(y) if sides is None else self._unpadded(F.pad(y, list(sides)))
        if self.squeeze is not None:
            y = y * self.squeeze(y.mean((2, 3)))[:, :, None, None]
        return self._project(y, residual)
