"""Runs of a model over photos or tensors: whole, in several scales, flipped, in windows."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeGuard, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast import ops, reference
from deeplab_fast._documents import shown
from deeplab_fast.data.images import ImageLike, as_rgb_array, picture_name, shown_name
from deeplab_fast.data.preprocess import (
    MOST_TILED_PIXELS,
    InputSizeError,
    Preprocess,
    allowed_pixels,
    check_input_size,
    in_millions,
)
from deeplab_fast.dispatch.precision import asked, check_precision, reason_against
from deeplab_fast.engine.eval_form import eval_logits, eval_view
from deeplab_fast.engine.finite import not_finite_pixels
from deeplab_fast.plan.bilinear import source_index

__all__ = [
    "InputPlan",
    "Pixels",
    "PredictOptions",
    "Result",
    "Runner",
    "Segmenter",
    "at_output_stride",
    "check_device",
    "check_dtype",
    "check_model",
    "check_precision_of",
    "class_name",
    "input_plan",
    "is_out_of_memory",
    "preprocess_of",
    "window_starts",
    "window_weights",
]


_MOST_SCALES = 64
_LARGEST_SCALE = 64

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _shown(value: object) -> str:
    return shown(repr(value) if isinstance(value, str) else value)


@dataclass(frozen=True)
class PredictOptions:
    """Checked arguments of :func:`predict`; made by :meth:`checked`."""

    scales: tuple[float, ...]
    flip: bool
    tile: tuple[int, int] | None
    overlap: float
    batch_size: int | None
    return_prob: bool
    threshold: float | None

    @property
    def passes(self) -> int:
        """Runs of the network over every pixel."""
        return len(self.scales) * (2 if self.flip else 1)

    @classmethod
    def checked(
        cls,
        scales: object = (1.0,),
        flip: object = False,
        tile: object = None,
        overlap: object = 0.25,
        batch_size: object = None,
        return_prob: object = False,
        threshold: object = None,
    ) -> PredictOptions:
        """The arguments of :func:`predict`, as they are kept.

        Raises:
            ValueError: one that is not allowed.
        """
        factors = (scales,) if isinstance(scales, (int, float)) else scales
        factors = tuple(factors) if isinstance(factors, Iterable) else ()
        many = not 0 < len(factors) <= _MOST_SCALES
        if many or not all(_is_number(s) and 0 < s <= _LARGEST_SCALE for s in factors):
            raise ValueError(
                f"scales is {_shown(scales)}, expected 1 to {_MOST_SCALES} factors above 0 to "
                f"{_LARGEST_SCALE}, e.g. (0.5, 1.0, 1.5)"
            )
        window = (tile, tile) if _is_int(tile) else tile
        if window is not None:
            window = tuple(window) if isinstance(window, Iterable) else ()
            if len(window) != 2 or not all(_is_int(n) and n > 0 for n in window):
                raise ValueError(
                    f"tile is {_shown(tile)}, expected (height, width) in pixels, both above 0, or "
                    "None"
                )
            window = (int(window[0]), int(window[1]))
        if not _is_number(overlap) or not 0 <= overlap < 1:
            raise ValueError(
                f"overlap is {_shown(overlap)}, expected a fraction of the tile in [0, 1), e.g. "
                "0.25"
            )
        if batch_size is not None and (not _is_int(batch_size) or batch_size < 1):
            raise ValueError(
                f"batch_size is {_shown(batch_size)}, expected an integer above 0 or None"
            )
        if threshold is not None and not (_is_number(threshold) and 0 < threshold < 1):
            raise ValueError(
                f"threshold is {_shown(threshold)}, expected a probability between 0 and 1, e.g. "
                "0.5, or None"
            )
        return cls(
            tuple(float(s) for s in factors),
            bool(flip),
            window,
            float(overlap),
            None if batch_size is None else int(batch_size),
            bool(return_prob),
            None if threshold is None else float(threshold),
        )

    def check_classes(self, model: nn.Module) -> None:
        """Raises ValueError for a threshold and a model of several classes."""
        if self.threshold is None:
            return
        count = getattr(model, "num_classes", 1)
        if count != 1:
            raise ValueError(
                f"threshold is {self.threshold} and the model has {count} classes, of which the "
                "largest is taken; a threshold is for models of one class: leave it out"
            )


class InputPlan(NamedTuple):
    """How a photo meets the network, at scale 1: sizes are (height, width) in pixels.

    Attributes:
        photo: its own size.
        size: what it is resized to as a whole.
        window: of the sliding windows in that; None where it is run whole.
        windows: how many.
    """

    photo: tuple[int, int]
    size: tuple[int, int]
    window: tuple[int, int] | None
    windows: int

    def __str__(self) -> str:
        (height, width), (own_height, own_width) = self.size, self.photo
        text = f"{width}x{height} pixels"
        if self.size != self.photo:
            text += f", {height / own_height:.3g} of {own_width}x{own_height}"
        if self.window is not None:
            text += f", {self.windows} windows of {self.window[1]}x{self.window[0]}"
        return text


def input_plan(
    photo: tuple[int, int], preprocess: Preprocess | None, options: PredictOptions
) -> InputPlan:
    """The plan for a photo of (height, width) pixels; ``preprocess`` None keeps its size.

    A photo that is run whole is resized to at most ``max(2^24, 4 H W)`` pixels at its largest
    scale, and so is a window. A photo that windows cover is resized to at most ``max(2^28, 4 H W)``
    pixels, of which a row of windows has at most ``max(2^24, 4 H W)``.

    Raises:
        InputSizeError: it would become larger; says how large, and what to do.
    """
    size = photo if preprocess is None else preprocess.target_size(*photo)
    largest = max(options.scales)
    window = size if options.tile is None else _window(options.tile, size)
    if window == size:
        cure = _SMALLER
        if options.tile is None and _tiled_fits(photo, size, _window(_USUAL_TILE, size)):
            cure = f"windows (tile=513, --tile 513 513), or {_SMALLER}"
        check_input_size(photo, _times(size, largest), cure=cure)
        return InputPlan(photo, size, None, 1)
    if not _tiled_fits(photo, size, window):
        raise InputSizeError(
            f"a picture of {photo[0]}x{photo[1]} pixels (height x width) would be resized to "
            f"{size[0]}x{size[1]}, {in_millions(size[0] * size[1])} in rows of windows of "
            f"{in_millions(window[0] * size[1])}; allowed are "
            f"{in_millions(allowed_pixels(photo, MOST_TILED_PIXELS))} (2^28) in rows of "
            f"{in_millions(allowed_pixels(photo))} (2^24), or 4 times its own where that is more: "
            f"cut it into parts, or use {_SMALLER}"
        )
    check_input_size(window, _times(window, largest), cure="smaller windows or scales")
    rows, columns = (
        len(window_starts(length, side, options.overlap))
        for length, side in zip(size, window, strict=True)
    )
    return InputPlan(photo, size, window, rows * columns)


_USUAL_TILE = (513, 513)
_SMALLER = "a smaller size (preprocess.size, --size, --input-size) or smaller scales"


def _window(tile: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    return min(tile[0], size[0]), min(tile[1], size[1])


def _times(size: tuple[int, int], scale: float) -> tuple[float, float]:
    return max(1.0, size[0] * scale), max(1.0, size[1] * scale)


def _tiled_fits(photo: tuple[int, int], size: tuple[int, int], window: tuple[int, int]) -> bool:
    """Whether windows may cover a photo that is resized to this."""
    return size[0] * size[1] <= allowed_pixels(photo, MOST_TILED_PIXELS) and (
        window[0] * size[1] <= allowed_pixels(photo)
    )


@dataclass(frozen=True)
class Pixels:
    """N pictures of one size: uint8 with the step to an input, or floats that are one already."""

    data: Tensor
    preprocess: Preprocess | None

    @property
    def size(self) -> tuple[int, int]:
        return self.data.shape[-2], self.data.shape[-1]

    def crop(self, top: int, left: int, height: int, width: int) -> Pixels:
        window = self.data[..., top : top + height, left : left + width]
        return Pixels(window, self.preprocess)

    def rows(self, size: tuple[int, int], top: int, height: int, device: torch.device) -> Pixels:
        """Rows of the pictures at another size; of floats their own."""
        if self.preprocess is None:
            return self.crop(top, 0, height, size[1])
        rows = self.preprocess.resized_rows(self.data, size, top, height, device=device)
        return Pixels(rows, self.preprocess)

    def inputs(self, size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
        if self.preprocess is not None:
            return self.preprocess.batch(self.data, size=size, device=device).to(dtype)
        x = self.data.to(device, dtype)
        if size == self.size:
            return x
        # The antialiasing filter exists for fp32 and fp64 only on a CPU.
        x = x if dtype == torch.float64 else x.float()
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        return x.to(dtype)


class Result(NamedTuple):
    """Labels [N, H, W], probabilities alike, pixels [N] whose logits are NaN or infinite."""

    labels: Tensor
    prob: Tensor | None
    spoiled: Tensor


class Segmenter(Protocol):
    """What a runner calls of a model."""

    align_corners: bool

    def forward_logits(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, C, h, w]."""


class _Strided(Protocol):
    config: object

    def set_output_stride(self, output_stride: int) -> None: ...


@dataclass(frozen=True)
class Runner:
    """A model with what was asked of it, on its device; made by :meth:`prepare`.

    ``preprocess`` turns 8-bit pictures into inputs; ``dtype`` is the parameters' own, ``autocast``
    another one to run in, ``precision`` what was asked for on the CPU. ``progress`` is called with
    the windows of a picture that are done and how many it has.
    """

    model: Segmenter
    preprocess: Preprocess | None
    options: PredictOptions
    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None
    precision: str | None = None
    progress: Callable[[int, int], object] | None = None

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        images: object,
        preprocess: Preprocess | None,
        options: PredictOptions,
        device: torch.device | None,
        dtype: torch.dtype | None,
        precision: str | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Runner:
        """A runner of a model that ``as_segmenter`` gave, moved to ``device``.

        Raises:
            ValueError: a dtype or precision that the model cannot run in.
        """
        state = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        # An optimised model has no parameters, but a dtype and a device.
        fixed = None if state else getattr(model, "dtype", None)
        own = state[0].dtype if state else fixed or torch.float32
        autocast = None
        if dtype is not None and dtype != own:
            if own != torch.float32 or dtype == torch.float32:
                raise ValueError(
                    f"dtype {_name(dtype)} was asked for and the model's parameters are "
                    f"{_name(own)}; leave dtype out, or convert with model.to({dtype}) first"
                )
            autocast = dtype
        if device is None:
            if state:
                device = state[0].device
            elif fixed is not None:
                device = cast(torch.device, model.device)
            else:
                device = images.device if isinstance(images, Tensor) else torch.device("cpu")
        elif state and not _same_device(state[0].device, device):
            model.to(device)
        check_precision_of(model, precision, dtype, device)
        if precision == "bf16" and device.type != "cpu" and own == torch.float32:
            autocast = torch.bfloat16
        return cls(
            cast(Segmenter, model),
            preprocess,
            options,
            device,
            own,
            autocast,
            precision,
            progress,
        )

    def tensor(self, images: Tensor) -> tuple[Tensor, Tensor | None, list[int]]:
        batch = images if images.ndim == 4 else images[None]
        size = (0, *batch.shape[-2:])
        if batch.shape[0] == 0:
            classes = getattr(self.model, "num_classes", 0)
            labels = torch.empty(size, dtype=_label_dtype(classes), device=self.device)
            return labels, torch.empty(size, dtype=torch.float32, device=self.device), []
        step = self.options.batch_size or batch.shape[0]
        if self.options.tile is not None:
            # There batch_size counts windows.
            step = 1
        results = [
            self.run(Pixels(batch[i : i + step], self.preprocess))
            for i in range(0, batch.shape[0], step)
        ]
        labels, prob = _joined(results)
        if images.ndim == 3:
            labels, prob = labels[0], None if prob is None else prob[0]
        return labels, prob, _counted(results)

    def images(
        self, images: Sequence[ImageLike]
    ) -> tuple[list[np.ndarray], list[np.ndarray | None], list[int]]:
        step = 1 if self.options.tile is not None else self.options.batch_size or 1
        all_labels: list[np.ndarray] = []
        all_prob: list[np.ndarray | None] = []
        spoiled: list[int] = []
        for group in self._groups(images, step):
            for result in self.together(group):
                all_labels += list(result.labels.cpu().numpy())
                prob = result.prob
                all_prob += [None] if prob is None else list(prob.cpu().numpy())
                spoiled += result.spoiled.tolist()
        return all_labels, all_prob, spoiled

    def _groups(self, images: Sequence[ImageLike], step: int) -> Iterator[list[Pixels]]:
        """Pictures that follow each other and are inputs of one size, ``step`` at most."""
        group: list[Pixels] = []
        for index, given in enumerate(images):
            image = as_rgb_array(given)
            # torch warns of memory that it may not write to.
            own = image if image.flags.writeable else image.copy()
            data = torch.from_numpy(own).permute(2, 0, 1)[None]
            pixels = Pixels(data, self.preprocess)
            try:
                self.base(pixels)
            except InputSizeError as error:
                name = shown_name(picture_name(given, index if len(images) > 1 else None))
                raise InputSizeError(f"{name}: {error}") from error
            if group and (len(group) == step or self.base(pixels) != self.base(group[0])):
                yield group
                group = []
            group.append(pixels)
        if group:
            yield group

    def together(self, group: Sequence[Pixels]) -> list[Result]:
        """The results of pictures, one each, that are inputs of one size."""
        if len(group) == 1:
            return [self.run(group[0])]
        base = self.base(group[0])
        if self.options.passes == 1:
            size = self.scaled(base, self.options.scales[0])
            x = torch.cat([pixels.inputs(size, self.device, self.dtype) for pixels in group])
            logits = self.logits(x).split(1)
            return [
                self.reduced(one, pixels.size) for one, pixels in zip(logits, group, strict=True)
            ]
        return [
            Result(*self.best(summed), _per_image(spoiled, summed))
            for summed, spoiled in self.summed_prob(group, base)
        ]

    def run(self, pixels: Pixels) -> Result:
        window = self.window(pixels)
        if window is not None:
            return self.tiled(pixels, window)
        logits = self.single_pass(pixels)
        if logits is not None:
            return self.reduced(logits, pixels.size)
        ((summed, spoiled),) = self.summed_prob([pixels], self.base(pixels))
        return Result(*self.best(summed), _per_image(spoiled, summed))

    def reduced(self, logits: Tensor, size: tuple[int, int]) -> Result:
        """Labels of :meth:`single_pass`'s logits."""
        options, align_corners = self.options, self.model.align_corners
        spoiled = self.spoiled(logits, size)
        if logits.shape[1] == 1:
            full = reference.upsample(logits, size, align_corners)[:, 0]
            labels = (full > self.cut).to(torch.uint8)
            return Result(labels, full.sigmoid() if options.return_prob else None, spoiled)
        result = ops.upsample_argmax(
            logits, size, align_corners=align_corners, return_prob=options.return_prob
        )
        labels, prob = (result, None) if isinstance(result, Tensor) else result
        return Result(labels, prob, spoiled)

    def not_finite(self, logits: Tensor, size: tuple[int, int]) -> Tensor | None:
        """As :func:`not_finite_pixels`, upsampled as the model has it."""
        return not_finite_pixels(logits, size, self.model.align_corners)

    def spoiled(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Pixels [N] that have no finite logits."""
        return _per_image(self.not_finite(logits, size), logits)

    @property
    def threshold(self) -> float:
        """The probability above which a pixel is of the one class."""
        return 0.5 if self.options.threshold is None else self.options.threshold

    @property
    def cut(self) -> float:
        """The logit of :attr:`threshold`."""
        return math.log(self.threshold / (1 - self.threshold))

    def single_pass(self, pixels: Pixels) -> Tensor | None:
        """Logits [N, C, h, w] that alone make the result; None where passes or windows are merged.

        Upsampled to the picture's size they are what :meth:`run` takes the labels from.
        """
        if self.options.passes != 1 or self.window(pixels) is not None:
            return None
        size = self.scaled(self.base(pixels), self.options.scales[0])
        return self.logits(pixels.inputs(size, self.device, self.dtype))

    def window(self, pixels: Pixels) -> tuple[int, int] | None:
        """Height and width of the sliding windows; None where the picture is run whole."""
        return input_plan(pixels.size, pixels.preprocess, self.options).window

    def base(self, pixels: Pixels) -> tuple[int, int]:
        """The size at scale 1 of the input, or of the picture that windows are cut from."""
        return input_plan(pixels.size, pixels.preprocess, self.options).size

    def tiled(self, pixels: Pixels, window: tuple[int, int]) -> Result:
        options, size = self.options, self.base(pixels)
        (height, width), (tile_h, tile_w) = size, window
        tops = window_starts(height, tile_h, options.overlap)
        lefts = window_starts(width, tile_w, options.overlap)
        row_weights = window_weights(tops, tile_h, height, self.device)
        column_weights = window_weights(lefts, tile_w, width, self.device)
        together = options.batch_size or 1
        align_corners = self.model.align_corners
        resized = None
        if size != pixels.size:
            # No more than one row of windows at a time.
            most = max(1, tile_h * width // pixels.size[1])
            resized = InterpolatedRows(size, pixels.size, align_corners, most)
        # Written into, row by row: pieces of it would lie between what is freed, and keep that.
        labels: Tensor | None = None
        best_prob: Tensor | None = None
        made = 0
        # Probabilities of the rows that later windows may still add to.
        band: Tensor | None = None
        spoiled: Tensor | None = None
        for row, top in enumerate(tops):
            strip = pixels.rows(size, top, tile_h, self.device)
            for first in range(0, len(lefts), together):
                chunk = range(first, min(first + together, len(lefts)))
                crops = [strip.crop(0, lefts[c], tile_h, tile_w).data for c in chunk]
                batch = Pixels(torch.cat(crops), pixels.preprocess)
                ((prob, bad),) = self.summed_prob([batch], window)
                if band is None:
                    band = prob.new_zeros(1, prob.shape[1], tile_h, width)
                if bad is not None and spoiled is None:
                    spoiled = bad.new_zeros(1, height, width)
                for i, column in enumerate(chunk):
                    weight = row_weights[row][:, None] * column_weights[column][None, :]
                    left = lefts[column]
                    band[..., left : left + tile_w].addcmul_(prob[i : i + 1], weight)
                    if bad is not None and spoiled is not None:
                        spoiled[0, top : top + tile_h, left : left + tile_w] |= bad[i]
                if self.progress is not None:
                    self.progress(row * len(lefts) + chunk.stop, len(tops) * len(lefts))
            assert band is not None
            done = (tops[row + 1] if row + 1 < len(tops) else height) - top
            finished = band[:, :, :done]
            for part in resized.add(finished) if resized else (finished,):
                some, some_prob = self.best(part)
                if labels is None:
                    labels = some.new_empty(1, *pixels.size)
                    best_prob = None if some_prob is None else some_prob.new_empty(1, *pixels.size)
                rows = slice(made, made + some.shape[1])
                labels[:, rows] = some
                if best_prob is not None and some_prob is not None:
                    best_prob[:, rows] = some_prob
                made = rows.stop
            kept = band[:, :, done:].clone()
            band.zero_()
            band[:, :, : kept.shape[2]] = kept
        if spoiled is not None and resized is not None:
            marks = reference.upsample(spoiled[:, None].float(), pixels.size, align_corners)
            spoiled = marks[:, 0] > 0
        assert labels is not None
        return Result(labels, best_prob, _per_image(spoiled, labels))

    def summed_prob(
        self, pictures: Sequence[Pixels], base: tuple[int, int]
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Of pictures of input size ``base``: for each the sum over scales and flips of the
        probabilities [N, C, H, W] at its size.

        Also the pixels [N, H, W] that a pass has no finite logits for, as :meth:`not_finite`.
        """
        totals: list[Tensor] = []
        spoiled: list[Tensor | None] = [None] * len(pictures)
        counts = [pixels.data.shape[0] for pixels in pictures]
        for scale in self.options.scales:
            size = self.scaled(base, scale)
            x = torch.cat([each.inputs(size, self.device, self.dtype) for each in pictures])
            for flip in (False, True) if self.options.flip else (False,):
                merged = self.logits(x.flip(-1) if flip else x)
                if not totals:
                    wide = torch.float64 if merged.dtype == torch.float64 else torch.float32
                    totals = [
                        torch.zeros((n, merged.shape[1], *p.size), dtype=wide, device=merged.device)
                        for n, p in zip(counts, pictures, strict=True)
                    ]
                for i, logits in enumerate(merged.split(counts)):
                    bad = self.not_finite(logits, pictures[i].size)
                    if bad is not None:
                        bad = bad.flip(-1) if flip else bad
                        before = spoiled[i]
                        spoiled[i] = bad if before is None else before | bad
                    totals[i] = self.added(totals[i], logits, flip)
        return list(zip(totals, spoiled, strict=True))

    def added(self, total: Tensor, logits: Tensor, flip: bool) -> Tensor:
        """``total`` with the probabilities of one pass, interpolated to its size."""
        align_corners = self.model.align_corners
        if logits.shape[1] > 1:
            return ops.upsample_softmax_add(total, logits, flip=flip, align_corners=align_corners)
        prob = reference.upsample(logits, total.shape[-2:], align_corners).sigmoid_()
        return total.add_(prob.flip(-1) if flip else prob)

    def best(self, summed: Tensor) -> tuple[Tensor, Tensor | None]:
        if summed.shape[1] == 1:
            total = summed[:, 0]
            labels = (total > self.threshold * self.options.passes).to(torch.uint8)
            return labels, total / self.options.passes if self.options.return_prob else None
        # The largest of the sums: the division by the number of passes could make two equal.
        top, labels = summed.max(dim=1)
        prob = top / self.options.passes if self.options.return_prob else None
        return labels.to(_label_dtype(summed.shape[1])), prob

    def logits(self, x: Tensor) -> Tensor:
        mixed: AbstractContextManager[object] = nullcontext()
        if self.autocast is not None:
            mixed = torch.autocast(self.device.type, dtype=self.autocast)
        elif self.precision is not None and self.device.type == "cpu":
            # What was asked for by name stands above the caller's autocast.
            mixed = torch.autocast("cpu", enabled=False)
        with asked(self.precision), mixed:
            return eval_logits(self.model, x)

    def scaled(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        # With aligned corners the distance between the corner pixels scales, not the pixel count.
        fixed = 1 if self.model.align_corners else 0
        height, width = (max(1, math.floor((n - fixed) * scale + 0.5) + fixed) for n in size)
        return height, width


def _joined(parts: Sequence[Result]) -> tuple[Tensor, Tensor | None]:
    """Labels and probabilities of the parts, one behind the other."""
    labels = torch.cat([part.labels for part in parts])
    probs = [part.prob for part in parts if part.prob is not None]
    return labels, torch.cat(probs) if probs else None


def _per_image(spoiled: Tensor | None, like: Tensor) -> Tensor:
    """Pixels [N] that are True; zeros on the device of ``like`` [N, ...] where there is no map."""
    if spoiled is None:
        return torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)
    return spoiled.sum((1, 2))


def _counted(results: Sequence[Result]) -> list[int]:
    """Pixels that are not finite of each image, on the host."""
    counts = torch.cat([result.spoiled for result in results])
    # A capture of a CUDA graph cannot wait for them.
    if counts.is_cuda and torch.cuda.is_current_stream_capturing():
        return []
    return counts.tolist()


class InterpolatedRows:
    """Bilinear interpolation of a map whose rows come in order, some rows at a time.

    Args:
        have, want: (height, width) of the map and of what it becomes.
        align_corners: as of ``torch.nn.functional.interpolate``, whose values these are.
        most: rows that are made at a time.
    """

    def __init__(
        self, have: tuple[int, int], want: tuple[int, int], align_corners: bool, most: int
    ) -> None:
        low, share = source_index(have[0], want[0], align_corners)
        self.low, self.share = low, share
        self.high = np.minimum(low + 1, have[0] - 1)
        self.width, self.align_corners, self.most = want[1], align_corners, most
        self.made = 0
        # Rows from `first` on that are still needed.
        self.first = 0
        self.kept: Tensor | None = None

    def add(self, rows: Tensor) -> Iterator[Tensor]:
        """More rows [N, C, h, w]; gives those [N, C, H, W] that need no later ones."""
        kept = rows if self.kept is None else torch.cat([self.kept, rows], dim=2)
        end = int(np.searchsorted(self.high, self.first + kept.shape[2]))
        for begin in range(self.made, end, self.most):
            part = slice(begin, min(begin + self.most, end))
            low, high = (
                torch.from_numpy(index[part] - self.first).to(kept.device, torch.int64)
                for index in (self.low, self.high)
            )
            share = torch.from_numpy(self.share[part]).to(kept.device, kept.dtype)[:, None]
            mixed = torch.lerp(kept.index_select(2, low), kept.index_select(2, high), share)
            yield F.interpolate(
                mixed,
                size=(mixed.shape[2], self.width),
                mode="bilinear",
                align_corners=self.align_corners,
            )
        self.made = end
        begin = self.first + kept.shape[2]
        # A reduction may skip rows: the next one that it needs may not have come yet.
        if end < len(self.low):
            begin = min(begin, int(self.low[end]))
        self.kept = kept[:, :, begin - self.first :].clone()
        self.first = begin


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First pixels of the fewest evenly spaced windows that overlap by at least ``overlap``."""
    stride = max(1, math.floor(window * (1 - overlap)))
    count = math.ceil((length - window) / stride) + 1
    return [(length - window) * i // max(1, count - 1) for i in range(count)]


def window_weights(
    starts: Sequence[int], window: int, length: int, device: torch.device
) -> list[Tensor]:
    """Weights along one axis, one [window] tensor a start; at every pixel they sum to 1."""
    weights = [torch.ones(window, dtype=torch.float64, device="cpu") for _ in starts]
    for i in range(1, len(starts)):
        shared = starts[i - 1] + window - starts[i]
        ramp = torch.sin(
            (torch.arange(shared, dtype=torch.float64, device="cpu") + 0.5)
            * (math.pi / 2 / max(1, shared))
        )
        weights[i][:shared] *= ramp**2
        weights[i - 1][window - shared :] *= ramp.flip(0) ** 2
    total = torch.zeros(length, dtype=torch.float64, device="cpu")
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + window] += weight
    return [
        (weight / total[start : start + window]).float().to(device)
        for start, weight in zip(starts, weights, strict=True)
    ]


M = TypeVar("M", bound=nn.Module)


@contextmanager
def at_output_stride(model: M, output_stride: int | None) -> Iterator[M]:
    """The model at another output stride, None for its own, for evaluation.

    A view, where the model has one (:func:`eval_view`); else the model itself, which gets its own
    output stride back.
    """
    before = getattr(model, "output_stride", None)
    if output_stride is None or output_stride == before:
        yield model
        return
    if before is None or not hasattr(model, "set_output_stride"):
        raise ValueError(
            f"output_stride={output_stride}: {class_name(model)} cannot change its output "
            "stride; leave it out"
        )
    view = eval_view(model, kept=False)
    if view is not None:
        cast(_Strided, view).set_output_stride(output_stride)
        yield view
        return
    strided = cast(_Strided, model)
    config = getattr(model, "config", None)
    strided.set_output_stride(output_stride)
    try:
        yield model
    finally:
        strided.set_output_stride(before)
        strided.config = config


def check_model(model: object) -> None:
    """Raises ValueError for what is no model, or lacks what a runner calls."""
    missing = [name for name in ("forward_logits", "align_corners") if not hasattr(model, name)]
    if missing or not isinstance(model, nn.Module):
        raise ValueError(
            f"the model is a {type(model).__name__} without {' and '.join(missing) or 'modules'}; "
            "expected one that deeplab_fast builds, e.g. deeplab_fast.deeplabv3_resnet50(...)"
        )


def class_name(model: nn.Module) -> str:
    """What messages call a model: its class, of one inside an adapter the inner one's."""
    return str(getattr(model, "library_class", type(model).__name__))


def check_precision_of(
    model: nn.Module, precision: str | None, dtype: object, device: torch.device
) -> None:
    """Whether a model can run in a precision that was asked for, None for its own.

    Raises:
        ValueError: it cannot, there is none of that name, or a dtype was asked for too.
    """
    if precision is None:
        return
    check_precision(precision)
    if dtype is not None:
        raise ValueError(
            f"dtype {dtype} and precision {precision} were both asked for; leave one of them out"
        )
    own = getattr(model, "precision", None)
    if device.type != "cpu":
        if precision == "int8":
            raise ValueError(f"precision int8 was asked for on {device}; there it is fp32 or bf16")
    elif own == precision:
        return
    elif own is None or not hasattr(model, "calibration"):
        has = f"computes in {own}" if own else "has no choice of precisions"
        raise ValueError(
            f"precision {precision} was asked for and the model ({class_name(model)}) {has}; "
            "leave it out, or pass a model that deeplab_fast builds"
        )
    elif reason := reason_against(precision, model.calibration):
        raise ValueError(reason)


def preprocess_of(model: object, given: Preprocess | None = None) -> Preprocess:
    """``given``, or ``model.preprocess`` where it is None; ValueError where it is none."""
    if given is not None:
        if isinstance(given, Preprocess):
            return given
        raise ValueError(
            f"preprocess is a {type(given).__name__}, expected a deeplab_fast.data.Preprocess, "
            "e.g. Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3); for other steps pass a normalised "
            "float tensor [N,3,H,W]"
        )
    preprocess = getattr(model, "preprocess", None)
    if not isinstance(preprocess, Preprocess):
        raise ValueError(
            f"model.preprocess is {preprocess!r}: images need a deeplab_fast.data.Preprocess; set "
            "one, or pass a normalised float tensor [N,3,H,W]"
        )
    return preprocess


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The torch dtype that ``dtype`` names, None for None.

    Raises:
        ValueError: it names none that :func:`predict` takes.
    """
    if dtype is None or dtype in (torch.float64, *_DTYPES.values()):
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(
        f"dtype is {dtype!r}, expected None, fp32, bf16 or fp16, or the torch dtype of that name"
    )


def check_device(device: torch.device | str | None) -> torch.device | None:
    """The device that ``device`` names, None for None.

    Raises:
        ValueError: no device is called that, or this machine has none of the kind.
    """
    if device is None:
        return None
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}, expected cpu, cuda or cuda:<index>") from error
    if checked.type == "cuda":
        count = torch.cuda.device_count()
        if (checked.index or 0) >= count:
            raise ValueError(
                f"device is {device!r} and this process sees {count} CUDA devices; use device='cpu'"
                + (f" or cuda:0..cuda:{count - 1}" if count else "")
            )
    elif checked.type != "cpu":
        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        count = torch.accelerator.device_count() if here and here.type == checked.type else 0
        if (checked.index or 0) >= count:
            raise ValueError(
                f"device is {str(device)!r} and this process sees {count} {checked.type} devices; "
                f"use device='cpu'{f', or {here.type}' if here else ''}"
            )
    return checked


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or the host."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _same_device(have: torch.device, want: torch.device) -> bool:
    return have.type == want.type and want.index in (None, have.index)


def _label_dtype(classes: int) -> torch.dtype:
    return torch.uint8 if classes <= 256 else torch.int64


def _name(dtype: torch.dtype) -> str:
    return next((name for name, value in _DTYPES.items() if value == dtype), str(dtype))


def _is_number(value: object) -> TypeGuard[float]:
    # NumPy's numbers are registered there.
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
