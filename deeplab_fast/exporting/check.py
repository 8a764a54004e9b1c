"""An exported file held against the model that it was made from, on a photo."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deeplab_fast.data.images import as_rgb_array
from deeplab_fast.exporting.description import Description
from deeplab_fast.exporting.graph import ExportError, ExportGraph
from deeplab_fast.exporting.load import ExportedModel

# CONTRIBUTING.md, "How far a result may be off": of a form that saves multiplications, for each
# convolution; a single value may be off by twelve times what the norm allows on average.
_ERROR, _SINGLE = 1e-5, 12
# Sides of what dynamic files are tried with: the second is no multiple of a stride.
_SIDES = ((1, 258, 388), (2, 193, 321))
# Where PyTorch emulates a dtype, convolutions take a hundred times as long.
_FEW_SIDES = ((1, 97, 131),)
_ENOUGH = 0.99
# Labels do not show what became of the logits.
_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Levels of resized photos this close to a half may be rounded either way: positions up to 1024 are
# known to 2^-14 of a pixel in float32, over which a photo changes by 255 levels at most.
_HALF = 255 * 2**-14


@dataclass(frozen=True)
class Check:
    """A file's results beside its model's, over all inputs that were tried.

    Attributes:
        runtime: what ran it, with its version.
        inputs: shapes of the inputs.
        error: distance of the logits, relative (2-norm); None of a file of labels.
        largest: the largest difference of a logit; None of a file of labels.
        same: part of the pixels whose label is the model's.
    """

    runtime: str
    inputs: tuple[tuple[int, ...], ...]
    error: float | None
    largest: float | None
    same: float

    def __str__(self) -> str:
        shapes = " and ".join("x".join(map(str, shape)) for shape in self.inputs)
        logits = ""
        if self.error is not None:
            logits = f"logits off by {self.error:.1e} (relative), {self.largest:.1e} at most, "
        return f"{self.runtime} on {shapes}: {logits}{self.same:.3%} of the labels equal"


def check(
    loaded: ExportedModel, graph: ExportGraph, photo: np.ndarray | None, bound: float
) -> Check:
    """Runs a file and its graph on a photo, of two sizes and batches where the file takes them.

    Args:
        loaded: the file.
        graph: what it was made from, in fp32.
        photo: uint8 [H, W, 3], None for the one that comes with the package.
        bound: on the logits' relative distance; infinite for precisions below fp32.

    Raises:
        ExportError: results that are further off, or not finite where the model's are.
    """
    own = loaded.description
    logits = graph.with_logits()
    difference = norm = largest = allowed = 0.0
    same = pixels = 0
    shapes = []
    for images in _inputs(own, photo):
        shapes.append(tuple(images.shape))
        with torch.no_grad():
            wanted = logits(images)
            room = bound * float(wanted.double().norm())
            if own.photos and own.resize is not None and math.isfinite(bound):
                room += _of_halves(logits, images)
        found = loaded(images)
        if not bool(wanted.isfinite().all()):
            raise ExportError(
                f"{own.model} gives logits that are NaN or infinite on the photo; nothing was "
                "written. Expected finite ones: mend its weights, or pass check=False"
            )
        if own.labels and own.precision in _HALVES:
            half = graph.converted(_HALVES[own.precision]).with_logits()
            with torch.no_grad():
                found_is_finite = bool(half(images).isfinite().all())
        else:
            found_is_finite = own.labels or bool(found.isfinite().all())
        if not found_is_finite:
            raise ExportError(
                f"{own.model} in {own.precision} gives logits that are NaN or infinite where it "
                "has finite ones; nothing was written. Expected values that the precision holds: "
                "export in fp32"
            )
        labels = _labels(wanted)
        if own.labels:
            equal = found.to(labels.dtype) == labels
            # Logits that are nearer than their own error may change places.
            single = _SINGLE * room / math.sqrt(wanted.numel())
            if math.isfinite(bound) and bool((~equal & (_margin(wanted) > 2 * single)).any()):
                raise _off(own, f"{float((~equal).float().mean()):.2%} of the labels are others")
        else:
            equal = _labels(found) == labels
            difference += float((found - wanted).double().square().sum())
            norm += float(wanted.double().square().sum())
            allowed += room**2
            largest = max(largest, float((found - wanted).abs().amax()))
        same, pixels = same + int(equal.sum()), pixels + equal.numel()
    error = None if own.labels else math.sqrt(difference / norm) if norm else difference
    bound = math.sqrt(allowed / norm) if norm else bound
    if error is not None and not error <= bound:
        raise _off(own, f"its logits are off by {error:.1e} (relative), {bound:.1e} is allowed")
    return Check(
        loaded.runtime,
        tuple(shapes),
        error,
        None if own.labels else largest,
        same / max(1, pixels),
    )


def allowed_error(model: nn.Module, precision: str) -> float:
    """What the logits of a file may be off by, relative; infinite below fp32."""
    if precision != "fp32":
        return math.inf
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    # An optimised model has no modules; a ResNet-101 has 110 convolutions.
    return _ERROR * math.sqrt(convs or 110)


def is_close(result: Check) -> bool:
    """Whether so many labels are equal that nothing needs to be said."""
    return result.same >= _ENOUGH


def _of_halves(logits: ExportGraph, photos: Tensor) -> float:
    """How far logits are apart (2-norm) where levels that are close to a half are all rounded down
    and all rounded up: a runtime rounds some of them another way than PyTorch."""
    levels = logits.levels(photos)
    half = (levels - levels.floor() - 0.5).abs() < _HALF
    down, up = (
        logits.of_levels(torch.where(half, ends, levels.round()), *photos.shape[1:3])
        for ends in (levels.floor(), levels.ceil())
    )
    return float((up - down).double().norm())


def _off(own: Description, what: str) -> ExportError:
    return ExportError(
        f"the file does not compute what {own.model} does: {what}; nothing was written. Expected "
        "only roundings between them: report this, or export in another format"
    )


def _labels(logits: Tensor) -> Tensor:
    return (logits[:, 0] > 0).to(torch.int64) if logits.shape[1] == 1 else logits.argmax(1)


def _margin(logits: Tensor) -> Tensor:
    """How far the best logit of each pixel is above the next."""
    if logits.shape[1] == 1:
        return logits[:, 0].abs()
    best = logits.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def _inputs(own: Description, photo: np.ndarray | None) -> Iterator[Tensor]:
    """Inputs of the file, made of a photo."""
    from PIL import Image

    picture = as_rgb_array(Path(__file__).with_name("photo.jpg")) if photo is None else photo
    sides = _FEW_SIDES if own.precision in ("bf16", "fp16") else _SIDES
    sides = sides if own.batch is None else sides[:1]
    for images, height, width in sides:
        if own.batch is not None:
            images = own.batch
        if own.size is not None:
            height, width = own.size
        height, width = (-(-side // own.multiple) * own.multiple for side in (height, width))
        small = np.array(Image.fromarray(picture).resize((width, height)))
        # Those of a batch differ.
        batch = np.stack([small if i % 2 == 0 else small[:, ::-1] for i in range(images)])
        pixels = torch.from_numpy(batch)
        if own.photos:
            yield pixels
            continue
        yield own.preprocess.batch(pixels.permute(0, 3, 1, 2), size=(height, width)).contiguous()
