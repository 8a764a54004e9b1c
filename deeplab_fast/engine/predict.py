"""Photos or tensors in, label maps out: whole images, several scales, flips, sliding windows."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch

from deeplab_fast.data.images import OUT_OF_MEMORY, ImageLike, one_line, picture_name
from deeplab_fast.data.preprocess import Preprocess
from deeplab_fast.engine.adapter import as_segmenter
from deeplab_fast.engine.finite import NotFiniteWarning
from deeplab_fast.engine.runner import (
    InputPlan,
    PredictOptions,
    Runner,
    check_device,
    check_dtype,
    input_plan,
    is_out_of_memory,
    preprocess_of,
)

__all__ = [
    "InputPlan",
    "PredictOptions",
    "check_device",
    "check_dtype",
    "check_tensor",
    "checked_images",
    "input_plan",
    "name_of",
    "predict",
]


def predict(
    model: torch.nn.Module,
    images: torch.Tensor | ImageLike | Sequence[ImageLike],
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    tile: tuple[int, int] | int | None = None,
    overlap: float = 0.25,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    precision: str | None = None,
    return_prob: bool = False,
    threshold: float | None = None,
    preprocess: Preprocess | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Any:
    """Labels of images: the class with the largest logit, or mean probability, at every pixel.

    A model of one class has one logit z: its probability is sigmoid(z), label 1 where that exceeds
    ``threshold``, else 0 (background). Everything below holds with sigmoid in softmax's place.

    One scale without flip or tile: the logits [N, C, h, w] are interpolated straight to the
    photo's own size and reduced to labels; logits of full size are never made. With several scales
    or ``flip`` the softmax probabilities of all passes are averaged at full size (arXiv 1706.05587
    section 4.1: scales 0.5, 0.75, ..., 1.75 and left-right flipped images), which holds
    ``4 * C * H * W`` bytes an image.

    ``tile`` runs windows of (h, w) pixels of the network's input: the photo is resized by
    ``preprocess.size`` as without windows, a row of windows at a time, and windows that overlap by
    at least ``overlap`` are cut from that and cover it. Their probabilities are blended with a
    weight that falls along sin^2 over an overlap and is 1 at the image's border, and interpolated
    to the photo's size. Scales and flips are run inside each window. An image that fits into one
    window is run whole, with the result that it has without ``tile``. Beside the photo and the
    labels this holds ``4 * C * h * w`` bytes (one row of windows over the width w of the resized
    photo), at most four times, and what the model takes for ``batch_size`` windows at the largest
    scale, whatever the image's height. A photo is run at its own size by ``preprocess=
    dataclasses.replace(model.preprocess, size=None)``. ``input_plan`` says what is run, and how
    large a photo may become: whole at most 2^24 pixels, or 4 times its own where that is more.

    Memory on the host, beside what the model takes for its input: reading a file 24 bytes a pixel
    of the photo at most, of which its array keeps 3; resizing it 15 more (a float copy), in windows
    less; labels 1 byte a pixel, 8 while passes are merged, probabilities 4; with several passes
    ``4 * C`` bytes a pixel of every photo that runs together (84 of 21 classes, 600 of 150), which
    windows hold for their row alone.

    Args:
        model: of this package, or any other that maps images to logits: torchvision, smp,
            mmsegmentation, transformers, your own; ``engine.adapter.as_segmenter`` says how such a
            model is run, and takes what it cannot see. It runs as in eval mode and no mode is
            changed, so that other threads may train it meanwhile (``engine.eval_form.eval_view``
            says which models are switched instead, for the time of a call; what a forward sets on
            a model in training mode is set on what stands for it). One with
            ``forward_logits(x) -> [N, C, h, w]``, ``align_corners`` and, for anything but a float
            tensor, ``preprocess`` is run by these.
        images: a float tensor [N, 3, H, W] or [3, H, W], already normalised; a uint8 tensor of the
            same shapes (RGB, ``preprocess`` is applied); a path, PIL image or array (see
            ``data.as_rgb_array``); or a list of these, of any sizes, read as they are needed.
        scales: factors on the network's input size.
        flip: adds the left-right flipped image at every scale.
        tile: window size (height, width) in pixels of the network's input, an int for a square;
            None runs whole images.
        overlap: fraction of a window shared with the next, in [0, 1).
        batch_size: images that follow each other and are inputs of equal size, or windows, that
            run together. Without it a tensor runs as it is, images of a list and windows one by
            one.
        device: None is the model's own. Another one moves the model there, to stay.
        dtype: None or the parameters' own dtype runs as the model is; torch.bfloat16 or
            torch.float16 on fp32 parameters runs under autocast. Also "fp32", "bf16", "fp16".
        precision: on the CPU "fp32", "bf16" or "int8" for this call, None for the model's own; see
            ``DeepLabV3.precision``. On a GPU "bf16" is autocast. Not together with ``dtype``. Of
            another library's model None or "fp32": it runs as it is.
        return_prob: also gives the chosen class's probability; of one class its sigmoid, at every
            pixel.
        threshold: of one class only, between 0 and 1; None is 0.5.
        preprocess: in place of ``model.preprocess``; a float tensor needs none.
        progress: called with the windows of an image that are done and how many it has.

    Returns:
        For a tensor: labels [N, H, W] or [H, W] on the model's device, uint8, int64 above 256
        classes. For one image: an array [H, W] of the same dtypes at the image's size; for a list:
        a list of these. With ``return_prob`` a pair (labels, probabilities), the latter alike in
        fp32 (fp64 of a double model).

    Raises:
        ValueError: an argument or image of the wrong kind, or a model that returns no
            logits; says what came and what is allowed.
        ImageReadError: a path that cannot be read (a ValueError too).
        InputSizeError: a photo that would be resized to more than it may (a ValueError too): one
            pixel by thousands, a scale of 64.
        MemoryError: the host has not enough for a photo; says what takes less.

    Warns:
        NotFiniteWarning: logits that are NaN or infinite, by image with the number of pixels.
        UserWarning: nothing tells how pictures for another library's model are normalised.
    """
    options = PredictOptions.checked(
        scales, flip, tile, overlap, batch_size, return_prob, threshold
    )
    model = as_segmenter(model)
    options.check_classes(model)
    wanted_dtype = check_dtype(dtype)
    wanted_device = check_device(device)
    entries: list[ImageLike] = []
    if isinstance(images, torch.Tensor):
        check_tensor(images)
    else:
        entries = checked_images(images)
    ready = isinstance(images, torch.Tensor) and images.is_floating_point()
    preprocess = None if ready else preprocess_of(model, preprocess)
    runner = Runner.prepare(
        model, images, preprocess, options, wanted_device, wanted_dtype, precision, progress
    )
    labels: object
    prob: object
    try:
        with torch.inference_mode():
            if isinstance(images, torch.Tensor):
                labels, prob, spoiled = runner.tensor(images)
            elif isinstance(images, (list, tuple)):
                labels, prob, spoiled = runner.images(entries)
            else:
                (labels,), (prob,), spoiled = runner.images(entries)
    except (MemoryError, RuntimeError) as error:
        # A GPU's has its own type, and says more.
        if not is_out_of_memory(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise MemoryError(f"{OUT_OF_MEMORY} ({one_line(error)})") from error
    _warn_of_not_finite(images, spoiled)
    if isinstance(labels, torch.Tensor):
        # Inference tensors refuse in-place changes later; results are ordinary ones.
        labels, prob = labels.clone(), prob.clone() if isinstance(prob, torch.Tensor) else None
    return (labels, prob) if return_prob else labels


def _warn_of_not_finite(images: object, spoiled: Sequence[int]) -> None:
    if not any(spoiled):
        return
    pixels: Counter[str] = Counter()
    for index, count in enumerate(spoiled):
        if count:
            pixels[name_of(images, index)] += count
    warnings.warn(NotFiniteWarning(pixels), stacklevel=3)


def name_of(images: object, index: int) -> str:
    """What messages call an image."""
    if isinstance(images, torch.Tensor):
        return f"image {index} of the tensor"
    if isinstance(images, (list, tuple)):
        return picture_name(images[index], index)
    return picture_name(images, None)


def check_tensor(images: torch.Tensor) -> None:
    """Raises ValueError for a tensor that holds no images."""
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(
            f"image tensor has dtype {images.dtype}, expected a float dtype (normalised) or "
            "torch.uint8 (0..255)"
        )
    if images.layout != torch.strided or images.is_nested or images.device.type == "meta":
        kind = "nested" if images.is_nested else str(images.layout).removeprefix("torch.")
        raise ValueError(
            f"image tensor is {kind} on {images.device}, expected a strided one that holds its "
            "values; use to_dense(), or make it on another device"
        )
    if images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ValueError(
            f"image tensor has shape {list(images.shape)}, expected [N,3,H,W] or [3,H,W]"
        )
    if 0 in images.shape[-2:]:
        raise ValueError(f"image tensor has shape {list(images.shape)}: it has no pixels")


def checked_images(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """One image or several as a list; raises ValueError for something else."""
    entries = list(images) if isinstance(images, (list, tuple)) else [cast(ImageLike, images)]
    for i, entry in enumerate(entries):
        is_image = isinstance(entry, (str, os.PathLike, np.ndarray)) or hasattr(entry, "getbands")
        if not is_image:
            where = f"images[{i}]" if isinstance(images, (list, tuple)) else "images"
            hint = "; stack tensors of one size" if isinstance(entry, torch.Tensor) else ""
            raise ValueError(
                f"{where} is a {type(entry).__name__}; expected a tensor [N,3,H,W], a path, a PIL "
                f"image, an array, or a list of the last three{hint}"
            )
    return entries
