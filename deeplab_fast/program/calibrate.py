"""Measures the ranges of a model's maps on images, and how good int8 with them is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.images import ImageLike
from ..dispatch import limits
from ..engine.eval_form import eval_form
from ..engine.predict import check_tensor, checked_images, name_of
from ..engine.runner import PredictOptions, Runner, check_model, preprocess_of
from . import inference
from .calibration import Calibration, CalibrationError, Range, fingerprint
from .cpu_layers import CpuForms
from .gpu_layers import outside_autocast
from .int8_layers import Int8Forms
from .layers import InvertedResidualSpec, Layer, MapLayer, Program
from .network import Network

METHODS = ("minmax", "percentile", "entropy")
# Below it a warning is due: published models keep more than 99 % of their labels in int8.
WANTED_AGREEMENT = 0.99

# With few bins for each of 256 levels, small ranges would seem to lose nothing.
_BINS = 4096
# Of a map of an image, those that a histogram counts: 10 ns each.
_SAMPLES = 1 << 18
# Of the values of a map, in percent, that "percentile" keeps inside the range.
_PERCENTILES = (99.99, 99.999)
# Candidates of "entropy": ranges from a fifth of the whole one upward.
_CUTS = 41


class CalibrationWarning(UserWarning):
    """int8 gives other labels than fp32 at more pixels than it should."""


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` found.

    Attributes:
        calibration: what the model has now.
        candidates: label agreement with fp32 on the images, by method.
        worst: of the chosen method, the least of one image.
        worst_image: which one.
    """

    calibration: Calibration
    candidates: dict[str, float]
    worst: float
    worst_image: str

    @property
    def agreement(self) -> float:
        """Part of all pixels whose labels in int8 are those of fp32."""
        return self.calibration.agreement

    def __str__(self) -> str:
        found = self.calibration
        others = ", ".join(
            f"{name} {value:.2%}" for name, value in self.candidates.items() if name != found.method
        )
        return (
            f"{len(found.ranges)} ranges by {found.method} on {found.images} images: "
            f"{self.agreement:.2%} of the labels are those of fp32, {self.worst:.2%} of the worst "
            f"image ({self.worst_image})" + (f"; {others}" if others else "")
        )


def calibrate(
    model: Network,
    images: Tensor | ImageLike | Sequence[ImageLike],
    *,
    method: str | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
) -> CalibrationReport:
    """Measure the ranges of a model's maps, for int8, and set `model.calibration`.

    The model runs in fp32 over the images twice, for the least and largest values of every layer's
    result and for histograms between them, then once in int8 for each method that is compared:

        minmax       the whole range
        percentile   without the outermost values, 0.01 % or 0.001 % of a map, whichever is better
        entropy      the part of the range whose 8-bit distribution is nearest to that of the values
                     (least Kullback-Leibler divergence; values beyond it count at its ends)

    The same images give the same ranges. A few dozen images of the kind that the model will see are
    enough; labels are not needed.

    Args:
        model: a DeepLabV3 with its weights in fp32 on the CPU. `model.precision` stays as it is.
        images: as for `predict`: a float tensor [N, 3, H, W] or [3, H, W], normalised; a uint8 one;
            a path, PIL image or array; or a list of these.
        method: one of `METHODS`; None takes the one whose labels agree best with fp32.
        batch_size: images of equal size that run together; None for one by one.
        limit: use the first so many images.

    Returns:
        CalibrationReport.

    Raises:
        ValueError: an argument or image of the wrong kind, or no images.
        CalibrationError: the model, or this processor, cannot run in int8; a ValueError too.
        ImageReadError: a path that cannot be read (a ValueError too).

    Warns:
        CalibrationWarning: less than 99 % of the labels are those of fp32.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}, or None")
    check_model(model)
    data = _images(images, limit)
    options = PredictOptions.checked(batch_size=1 if batch_size is None else batch_size)
    if reason := limits.cpu_int8():
        raise CalibrationError(f"this model cannot be calibrated for int8: {reason}")
    ready = isinstance(data, Tensor) and data.is_floating_point()
    preprocess = None if ready else preprocess_of(model)
    cpu = torch.device("cpu")

    def labels(program: Program, observe: Callable[[str, Tensor], None] | None) -> list[Any]:
        runs = _Runs(model, program, observe)
        runner = Runner(runs, preprocess, options, cpu, torch.float32, None)
        if isinstance(data, Tensor):
            return list(runner.tensor(data)[0].numpy())
        return list(runner.images(data)[0])

    with eval_form(model) as form, torch.inference_mode(), outside_autocast(cpu):
        program, reason = inference.fold(form, _EachLayer())
        if program is None:
            raise CalibrationError(f"this model cannot be calibrated for int8: {reason}")
        maps = _Maps()
        wanted = labels(program, maps.extend)
        if method != "minmax":
            labels(program, maps.count)
        mark = fingerprint(model)
        found: dict[str, tuple[Calibration, list[float]]] = {}
        for name, choose in _choices(method).items():
            ranges = {layer: choose(each) for layer, each in maps.found.items()}
            trial = Calibration(ranges, name, len(wanted), mark, 0.0)
            int8, _ = inference.fold(form, Int8Forms(trial))
            assert int8 is not None
            got = labels(int8, None)
            same = [float(np.mean(a == b)) for a, b in zip(wanted, got, strict=True)]
            pixels = [a.size for a in wanted]
            agreement = float(np.average(same, weights=pixels))
            found[name] = Calibration(ranges, name, len(wanted), mark, agreement), same
    best, same = max(found.values(), key=lambda each: each[0].agreement)
    model.calibration = best
    worst = int(np.argmin(same))
    report = CalibrationReport(
        best,
        {name: each.agreement for name, (each, _) in found.items()},
        same[worst],
        name_of(images, worst),
    )
    if best.agreement < WANTED_AGREEMENT:
        warnings.warn(
            f"int8 gives {best.agreement:.2%} of the labels of fp32, less than "
            f"{WANTED_AGREEMENT:.0%}; more images, or ones that are more like those to come, may "
            "help, else stay in fp32",
            CalibrationWarning,
            stacklevel=3,
        )
    return report


def _images(images: Any, limit: int | None) -> Tensor | list[ImageLike]:
    """Checked, and no more than asked for."""
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit is {limit!r}, expected an integer above 0 or None")
    if isinstance(images, Tensor):
        check_tensor(images)
        batch = images if images.ndim == 4 else images[None]
        if len(batch) == 0:
            raise ValueError("the image tensor has no images; calibrate on a few dozen")
        return batch[:limit]
    entries = checked_images(images)
    if not entries:
        raise ValueError("the list of images is empty; calibrate on a few dozen")
    return entries[:limit]


class _EachLayer(CpuForms):
    """Layers whose results int8 has too: no block of convolutions in one."""

    def inverted_residual(
        self, spec: InvertedResidualSpec, max_extra_bytes: int | None
    ) -> MapLayer | None:
        return None


class _Runs:
    """A program as a model, whose layers' results are looked at."""

    def __init__(
        self, model: Network, program: Program, observe: Callable[[str, Tensor], None] | None
    ) -> None:
        self.align_corners = model.align_corners
        self._program, self._observe = program, observe

    def forward_logits(self, x: Tensor) -> Tensor:
        return self._program.logits(x, self._run, aux=False)["out"]

    def _run(self, layer: Layer, *tensors: Tensor | None) -> Tensor:
        y = layer(*tensors)
        if self._observe is not None and isinstance(y, Tensor) and y.dtype == torch.float32:
            self._observe(layer.name, y)
        return y


@dataclass
class _Values:
    """What is known of a layer's results: the range, and how many lie in each part of it."""

    low: float
    high: float
    counts: np.ndarray[Any, np.dtype[np.float64]]


class _Maps:
    """The values of the results of all layers, by name."""

    def __init__(self) -> None:
        self.found: dict[str, _Values] = {}

    def extend(self, name: str, y: Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(_flat(y)))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(
                f"the result of {name} is not finite on an image; calibrate on images that give "
                "finite logits"
            )
        each = self.found.setdefault(name, _Values(low, high, np.zeros(_BINS)))
        each.low, each.high = min(each.low, low), max(each.high, high)

    def count(self, name: str, y: Tensor) -> None:
        each = self.found[name]
        if each.high > each.low:
            step = -(-y.numel() // _SAMPLES)
            # All channels have their turn.
            while math.gcd(step, y.shape[1]) > 1:
                step += 1
            each.counts += torch.histc(_flat(y)[::step], _BINS, each.low, each.high).numpy()


def _flat(y: Tensor) -> Tensor:
    """The values in the order of the memory of channels_last, in which they are read fastest."""
    return y.movedim(1, -1).reshape(-1)


def _choices(method: str | None) -> dict[str, Callable[[_Values], Range]]:
    """Ways from values to a range, by name."""
    found: dict[str, Callable[[_Values], Range]] = {}
    if method in (None, "minmax"):
        found["minmax"] = lambda values: (values.low, values.high)
    if method in (None, "percentile"):
        for percent in _PERCENTILES:
            found[f"percentile {percent}"] = partial(_percentile, percent=percent)
    if method in (None, "entropy"):
        found["entropy"] = _entropy
    return found


def _percentile(values: _Values, percent: float) -> Range:
    """What holds so many of the values, as many of the others on either side."""
    if values.high == values.low:
        return values.low, values.high
    total = np.cumsum(values.counts)
    outside = (100 - percent) / 100 * total[-1]
    first = int(np.searchsorted(total, outside, side="right"))
    last = int(np.searchsorted(total, total[-1] - outside, side="left"))
    step = (values.high - values.low) / _BINS
    return values.low + first * step, values.low + (last + 1) * step


def _entropy(values: _Values) -> Range:
    """The part of the range, from zero both ways, with the least divergence of its 8-bit form."""
    whole = min(values.low, 0.0), max(values.high, 0.0)
    if values.high == values.low:
        return whole
    step = (values.high - values.low) / _BINS
    centres = values.low + (np.arange(_BINS) + 0.5) * step
    counts = values.counts.copy()
    # The zeros of a ReLU are held exactly, and would outweigh all else.
    zero = int(np.argmin(np.abs(centres)))
    counts[zero] = min(counts[zero], np.median(counts[max(0, zero - 8) : zero + 9]))
    best, least = 1.0, np.inf
    for cut in np.linspace(0.2, 1.0, _CUTS):
        low, high = whole[0] * cut, whole[1] * cut
        found = _divergence(counts, centres, low, high)
        # Of equals the larger range.
        if found <= least:
            best, least = float(cut), found
    return whole[0] * best, whole[1] * best


def _divergence(counts: Any, centres: Any, low: float, high: float) -> float:
    """KL(P || Q) for the values' distribution P, those beyond at the ends, and its 8-bit form Q."""
    inside = (centres >= low) & (centres <= high)
    if not inside.any():
        return np.inf
    reference = counts[inside].copy()
    reference[0] += counts[centres < low].sum()
    reference[-1] += counts[centres > high].sum()
    level = np.rint((centres[inside] - low) / (high - low) * 255).astype(np.int64)
    kept = counts[inside]
    filled = kept > 0
    sums = np.bincount(level, kept, 256)
    places = np.bincount(level, filled.astype(np.float64), 256)
    # A level's values spread evenly over those of its bins that have any.
    quantised = np.where(filled, sums[level] / np.maximum(places[level], 1.0), 0.0)
    p, q = reference / reference.sum(), quantised / max(quantised.sum(), 1.0)
    some = p > 0
    # A distribution that lacks what is there is as far off as one of a single value in a million.
    return float(np.sum(p[some] * np.log(p[some] / np.maximum(q[some], 1e-6 * p[some].max()))))
