"""Augmentation of pairs of photo and labels, the same for every number of workers.

A transform here is a callable ``(image, label, generator) -> (image, label)`` on a uint8 array
[H, W, 3] and an integer array [H, W]; all of its chance comes from the ``torch.Generator``.
:class:`AugmentedDataset` seeds one by (seed, epoch, index), so that a sample is the same whichever
worker makes it, and turns the result into tensors. It takes transforms of other libraries too
(:func:`adapt`).
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from deeplab_fast.data.datasets import LabelError, LabelledData, bad_labels
from deeplab_fast.data.images import shown_name
from deeplab_fast.data.preprocess import (
    IMAGENET_MEAN,
    InputSizeError,
    Preprocess,
    check_input_size,
)

__all__ = [
    "AugmentedDataset",
    "Compose",
    "CopyPaste",
    "Crop",
    "RandomFlip",
    "RandomScale",
    "RandomShortSide",
    "Transform",
    "adapt",
    "paper_evaluation",
    "paper_training",
    "resize_pair",
    "torchvision_evaluation",
    "torchvision_training",
]

Pair = tuple[np.ndarray, np.ndarray]
Transform = Callable[[np.ndarray, np.ndarray, torch.Generator], Pair]

STYLES = ("generator", "pair", "torchvision", "albumentations")


class _Viewing:
    """A transform whose result may be a view, which is copied once, behind the last of several."""

    def view(self, image: np.ndarray, label: np.ndarray, generator: torch.Generator) -> Pair:
        raise NotImplementedError

    def __call__(self, image: np.ndarray, label: np.ndarray, generator: torch.Generator) -> Pair:
        return _contiguous(*self.view(image, label, generator))


def _gives_views(transform: object) -> TypeGuard[_Viewing]:
    """Not where a subclass has a call of its own."""
    return isinstance(transform, _Viewing) and type(transform).__call__ is _Viewing.__call__


class Compose:
    """Runs transforms one after the other."""

    def __init__(self, *transforms: Transform) -> None:
        self.transforms = transforms

    def __call__(self, image: np.ndarray, label: np.ndarray, generator: torch.Generator) -> Pair:
        following = (*self.transforms[1:], None)
        for transform, then in zip(self.transforms, following, strict=False):
            if _gives_views(transform) and isinstance(then, _Viewing):
                image, label = transform.view(image, label, generator)
            else:
                image, label = transform(image, label, generator)
        return image, label

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.transforms))})"


class RandomScale(_Viewing):
    """Resizes by a factor drawn evenly from [low, high], or from low, low + step, ..., high.

    Args:
        low, high, step: of the factor.
        base: the size at factor 1: None is the picture's own, a number its shorter side, (height,
            width) both.

    Raises:
        ValueError: factors that are not 0 < low <= high, a step that is not above 0.
    """

    def __init__(
        self,
        low: float = 0.5,
        high: float = 2.0,
        step: float | None = None,
        base: int | tuple[int, int] | None = None,
    ) -> None:
        if not 0 < low <= high:
            raise ValueError(f"scale is {low} to {high}, expected 0 < low <= high")
        if step is not None and not step > 0:
            raise ValueError(f"step is {step}, expected None or a number above 0")
        self.low, self.high, self.step = low, high, step
        self.base = Preprocess(size=base)

    def view(self, image: np.ndarray, label: np.ndarray, generator: torch.Generator) -> Pair:
        if self.step is None:
            factor = self.low + (self.high - self.low) * _uniform(generator)
        else:
            # 1e-6: (high - low) / step of 0.1 steps falls just short of an integer.
            count = int((self.high - self.low) / self.step + 1e-6) + 1
            factor = self.low + self.step * _integer(generator, 0, count - 1)
        height, width = label.shape
        sides = self.base.target_size(height, width)
        size = [max(1, int(side * factor + 0.5)) for side in sides]
        return _resized(image, label, (size[0], size[1]))

    def __repr__(self) -> str:
        return f"RandomScale({self.low}, {self.high}, step={self.step}, base={self.base.size})"


class RandomShortSide:
    """Resizes so that the shorter side has a whole number of pixels drawn from [low, high].

    The longer side is ``int(size * longer / shorter)``, as torchvision has it.
    """

    def __init__(self, low: int, high: int | None = None) -> None:
        high = low if high is None else high
        if not 0 < low <= high:
            raise ValueError(f"the shorter side is {low} to {high}, expected 0 < low <= high")
        self.low, self.high = low, high

    def __call__(self, image: np.ndarray, label: np.ndarray, generator: torch.Generator) -> Pair:
        side = _integer(generator, self.low, self.high)
        height, width = label.shape
        size = (
            (side, int(side * width / height))
            if height <= width
            else (
                int(side * height / width),
                side,
            )
        )
        return resize_pair(image, label, size)

    def __repr__(self) -> str:
        return f"RandomShortSide({self.low}, {self.high})"


class RandomFlip(_Viewing):
    """Mirrors left and right with this probability."""

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"probability is {probability}, expected 0..1")
        self.probability = probability

    def view(self, image: np.ndarray, label: np.ndarray, generator: torch.Generator) -> Pair:
        if _uniform(generator) < self.probability:
            return image[:, ::-1], label[:, ::-1]
        return image, label

    def __repr__(self) -> str:
        return f"RandomFlip({self.probability})"


class Crop(_Viewing):
    """Cuts out a window at a random place; what is too small is padded right and below first.

    Args:
        size: (height, width), or one number for both, in pixels.
        fill: colour of the padding, (R, G, B) 0..255.
        ignore_index: label of the padding.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        fill: Sequence[int] = (0, 0, 0),
        ignore_index: int = 255,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        if height < 1 or width < 1:
            raise ValueError(f"crop is {size!r}, expected pixels above 0")
        self.size = (height, width)
        self.fill = np.array(fill, dtype=np.uint8)
        self.ignore_index = ignore_index

    def view(self, image: np.ndarray, label: np.ndarray, generator: torch.Generator) -> Pair:
        height, width = self.size
        top = _integer(generator, 0, max(0, label.shape[0] - height))
        left = _integer(generator, 0, max(0, label.shape[1] - width))
        window = (slice(top, top + height), slice(left, left + width))
        image, label = image[window], label[window]
        if label.shape == self.size:
            return image, label
        padded = np.empty((height, width, 3), dtype=np.uint8)
        padded[:] = self.fill
        padded[: image.shape[0], : image.shape[1]] = image
        # A label that the mask's own type cannot hold needs a wider one.
        wide = np.result_type(label.dtype, np.min_scalar_type(self.ignore_index))
        wide = wide if wide in (np.uint8, np.int32, np.int64) else np.dtype(np.int32)
        labels = np.full(self.size, self.ignore_index, dtype=wide)
        labels[: label.shape[0], : label.shape[1]] = label
        return padded, labels

    def __repr__(self) -> str:
        return f"Crop({self.size}, fill={self.fill.tolist()}, ignore_index={self.ignore_index})"


class CopyPaste:
    """Puts things of another sample over a sample's own, both after a transform.

        (image, label)(i) = (image, label)_other(i) where label_other(i) is one of the classes

    The other sample is drawn evenly from the data set, and has a scale, a crop and colours of its
    own. What is pasted stays where it is in its crop: in photos of one kind things of a class are
    at about the same places.

    Args:
        transform: gives both the same size, so it ends with a crop; arrays or tensors.
        dataset: to draw from.
        classes: ids of the classes that are pasted.
        probability: of pasting.

    Calls give what the transform gives, or tensors [3, h, w] and [h, w] where another sample was
    drawn.

    Raises:
        ValueError: a probability out of range; samples that come out in different sizes; another
            sample that the transform cannot take, by its name.
        LabelError: another sample has a label that is no class.

    Source: arXiv 2012.07177, for classes in place of instances.
    """

    def __init__(
        self,
        transform: Transform,
        dataset: LabelledData,
        classes: Sequence[int],
        probability: float = 0.5,
    ) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"probability is {probability}, expected 0..1")
        self.transform, self.dataset = transform, dataset
        self.classes, self.probability = tuple(classes), probability

    def __call__(self, image: np.ndarray, label: np.ndarray, generator: torch.Generator) -> Any:
        image, label = self.transform(image, label, generator)
        if _uniform(generator) >= self.probability:
            return image, label
        index = _integer(generator, 0, len(self.dataset) - 1)
        other, things = self.dataset[index]
        if hasattr(self.dataset, "ignore_index"):
            check_labels(self.dataset, index, things)
        try:
            other, things = self.transform(other, things, generator)
        except InputSizeError as error:
            raise ValueError(f"{photo_name(self.dataset, index)}: {error}") from error
        own, labels = to_tensors(image, label)
        source, found = to_tensors(other, things)
        if found.shape != labels.shape:
            (height, width), (own_height, own_width) = found.shape, labels.shape
            raise ValueError(
                f"copy-paste: one sample is {own_width}x{own_height} after its transform and "
                f"another {width}x{height}; let the transform end with a crop"
            )
        over = torch.isin(found, torch.tensor(self.classes))
        return torch.where(over, source, own), torch.where(over, found, labels)

    def __repr__(self) -> str:
        return f"CopyPaste({self.transform!r}, classes={self.classes}, p={self.probability})"


def paper_training(
    crop: int | tuple[int, int] = 513,
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    scale_step: float | None = None,
    flip: float = 0.5,
    mean: Sequence[float] = IMAGENET_MEAN,
    ignore_index: int = 255,
    input_size: int | tuple[int, int] | None = None,
) -> Compose:
    """Scale 0.5 to 2, left-right flip, crop padded with the mean colour and ``ignore_index``.

    Args:
        crop: 513 for PASCAL VOC, 769 for Cityscapes; below and right of a smaller picture padding.
        scale: the range of the factor; ``scale_step`` 0.25 draws steps, as TensorFlow DeepLab does.
        flip: its probability.
        mean: the model's ``preprocess.mean``, R, G, B in 0..1.
        ignore_index: the data set's.
        input_size: the size at scale 1, the model's ``preprocess.size``; None is the picture's own.

    Source: arXiv 1706.05587, section 4.1.
    """
    fill = [round(255 * value) for value in mean]
    return Compose(
        RandomScale(*scale, step=scale_step, base=input_size),
        RandomFlip(flip),
        Crop(crop, fill, ignore_index),
    )


def paper_evaluation() -> Compose:
    """Photo and labels at their own size: the paper's evaluation, on whole images."""
    return Compose()


def torchvision_training(
    base_size: int = 520,
    crop: int | tuple[int, int] = 480,
    *,
    flip: float = 0.5,
    ignore_index: int = 255,
) -> Compose:
    """torchvision's recipe: shorter side 0.5 to 2 times ``base_size``, flip, crop padded black."""
    return Compose(
        RandomShortSide(int(0.5 * base_size), int(2.0 * base_size)),
        RandomFlip(flip),
        Crop(crop, (0, 0, 0), ignore_index),
    )


def torchvision_evaluation(base_size: int = 520) -> Compose:
    """torchvision's evaluation: photo *and labels* with a shorter side of ``base_size`` pixels.

    Its published figures count these resized labels; ``evaluate`` without a transform counts every
    pixel of the original ones.
    """
    return Compose(RandomShortSide(base_size))


def resize_pair(image: np.ndarray, label: np.ndarray, size: tuple[int, int]) -> Pair:
    """Both at (height, width): the photo bilinear with antialiasing, the labels nearest.

    Half-pixel centres for both, so that they stay aligned.

    Raises:
        InputSizeError: more than ``max(2^24, 4 H W)`` pixels (a ValueError too).
    """
    return _contiguous(*_resized(image, label, size))


def _resized(image: np.ndarray, label: np.ndarray, size: tuple[int, int]) -> Pair:
    """`resize_pair`; the photo may be a view."""
    height, width = size
    if label.shape == (height, width):
        return image, label
    check_input_size((label.shape[0], label.shape[1]), size)
    pixels = torch.from_numpy(_plain(image)).permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
    rows = _nearest(label.shape[0], height)
    columns = _nearest(label.shape[1], width)
    return resized[0].permute(1, 2, 0).numpy(), label[rows].take(columns, axis=1)


def _contiguous(image: np.ndarray, label: np.ndarray) -> Pair:
    return np.ascontiguousarray(image), np.ascontiguousarray(label)


_SHARED = ("classes", "num_classes", "outputs", "ignore_index", "name", "split", "samples")


class AugmentedDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A data set under a transform, as tensors: (uint8 or float [3, h, w], labels [h, w]).

    Sample ``i`` of an epoch depends on (seed, epoch, i) only: not on the number of workers or
    processes, nor on the order. Photos stay uint8, which ``Preprocess.batch`` normalises on the
    device; floats from a transform of the user's are taken as normalised.

    Args:
        dataset: gives (uint8 [H, W, 3], labels [H, W]), e.g. a ``SegmentationDataset``.
        transform: see :func:`adapt`; None changes nothing.
        seed: any integer.
        style: see :func:`adapt`.
        check_labels: raise ``LabelError`` with the mask's path for a label that is no class, here
            on the host: on CUDA it would be ignored, or stop the process.

    Raises:
        TypeError, ValueError: as :func:`adapt`.
    """

    def __init__(
        self,
        dataset: LabelledData,
        transform: object = None,
        *,
        seed: int = 0,
        style: str | None = None,
        check_labels: bool = True,
    ) -> None:
        self.dataset = dataset
        self.transform = None if transform is None else adapt(transform, style=style)
        self.seed = int(seed)
        self.check_labels = check_labels
        # Shared memory: workers that outlive an epoch see the new one.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The current epoch; :meth:`set_epoch` changes it."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch, also to running workers; call it before iterating."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Classes, ignore_index and the like of the data set inside.
        if name in _SHARED:
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = range(len(self))[index]
        image, label = self.dataset[index]
        if self.check_labels and hasattr(self.dataset, "ignore_index"):
            check_labels(self.dataset, index, label)
        if self.transform is not None:
            generator = torch.Generator()
            generator.manual_seed(sample_seed(self.seed, self.epoch, index))
            try:
                image, label = self.transform(image, label, generator)
            except InputSizeError as error:
                raise InputSizeError(f"{photo_name(self.dataset, index)}: {error}") from error
        return to_tensors(image, label)


def check_labels(dataset: LabelledData, index: int, label: np.ndarray) -> None:
    """Raises LabelError, with the mask's path, where ``label`` has values that are no class."""
    found = bad_labels(label, dataset.num_classes, dataset.ignore_index)
    if found:
        samples = getattr(dataset, "samples", None)
        path = f"sample {index}" if samples is None else str(samples[index].mask)
        raise LabelError(
            path,
            found,
            f"outside the classes 0..{dataset.num_classes - 1} and not "
            f"ignore_index={dataset.ignore_index}; map them with --label-map (label_map), "
            "ignore one with --ignore-index (ignore_index), or see what check-data reports",
        )


def photo_name(dataset: LabelledData, index: int) -> str:
    """What messages call the photo of a sample: its path, where the data set has one."""
    samples = getattr(dataset, "samples", None)
    return f"sample {index}" if samples is None else shown_name(samples[index].image)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """64 bits that differ for different (seed, epoch, index)."""
    # SeedSequence takes no negative numbers.
    words = [seed & 0xFFFFFFFFFFFFFFFF, epoch & 0xFFFFFFFFFFFFFFFF, index]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def adapt(transform: object, *, style: str | None = None) -> Transform:
    """Any library's transform as ``(image, label, generator) -> (image, label)``.

    ============== ========================================================================
    style          how it is called
    ============== ========================================================================
    generator      ``transform(image, label, generator)``
    pair           ``transform(image, label)`` with arrays
    torchvision    ``transform(tv_tensors.Image, tv_tensors.Mask)``, torchvision's v2
    albumentations ``transform(image=image, mask=label)["image"]`` and ``["mask"]``
    ============== ========================================================================

    Without ``style`` it follows from where the transform is defined and, for the rest, from its
    signature: the keywords image and mask, else the number of arguments (3 or 2). In all but the
    first style the global generators of torch, NumPy and ``random`` (and albumentations' own) are
    seeded for the call from ``generator``, and the global ones restored after it.

    Raises:
        TypeError: no callable, or one whose style cannot be told.
        ValueError: an unknown style.
    """
    if style is not None and style not in STYLES:
        raise ValueError(f"style is {style!r}, expected None or one of {', '.join(STYLES)}")
    if not callable(transform):
        raise TypeError(
            f"the transform is a {type(transform).__name__}, expected a callable on a photo and "
            "its labels"
        )
    style = style or _style_of(transform)
    return transform if style == "generator" else _Adapted(transform, style)


class _Adapted:
    def __init__(self, transform: Callable[..., Any], style: str) -> None:
        self.transform, self.style = transform, style

    def __call__(self, image: np.ndarray, label: np.ndarray, generator: torch.Generator) -> Pair:
        seed = _integer(generator, 0, 2**31 - 1)
        with _seeded(seed):
            if self.style == "albumentations":
                if hasattr(self.transform, "set_random_seed"):
                    self.transform.set_random_seed(seed)
                result = self.transform(image=image, mask=label)
                return result["image"], result["mask"]
            if self.style == "torchvision":
                from torchvision import tv_tensors

                chw = torch.from_numpy(_plain(image)).permute(2, 0, 1)
                mask = torch.from_numpy(_plain(label))
                pair = self.transform(tv_tensors.Image(chw), tv_tensors.Mask(mask))
                return tuple(tensor.as_subclass(torch.Tensor) for tensor in pair)
            return self.transform(image, label)

    def __repr__(self) -> str:
        return f"{self.transform!r} ({self.style})"


def _style_of(transform: Callable[..., Any]) -> str:
    module = type(transform).__module__ or ""
    if module.startswith(("torchvision.transforms.v2", "torchvision.prototype")):
        return "torchvision"
    if module.startswith("albumentations"):
        return "albumentations"
    if module.startswith("torchvision.transforms"):
        raise TypeError(
            f"{type(transform).__name__} is of torchvision.transforms, which changes photos "
            "without their labels; use the one of torchvision.transforms.v2"
        )
    try:
        parameters = list(inspect.signature(transform).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = {p.name for p in parameters}
    keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if {"image", "mask"} <= {p.name for p in keyword_only}:
        return "albumentations"
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if len(required) == 3 or (len(positional) >= 3 and "generator" in names):
        return "generator"
    if len(required) == 2 or len(positional) == 2:
        return "pair"
    raise TypeError(
        f"cannot tell how {transform!r} is called; pass style= one of {', '.join(STYLES)}"
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def to_tensors(
    image: np.ndarray | torch.Tensor, label: np.ndarray | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair as tensors: [3, h, w] uint8 or float, and [h, w] uint8, int32 or int64.

    Args:
        image: array [h, w, 3] or tensor [3, h, w].
        label: array or tensor [h, w] or [1, h, w] of integers.

    Raises:
        ValueError: other shapes or dtypes, or sizes that differ.
    """
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(_plain(image))
        image = image.permute(2, 0, 1) if image.ndim == 3 else image
    if isinstance(label, np.ndarray):
        label = torch.from_numpy(_plain(label))
    image, label = torch.as_tensor(image), torch.as_tensor(label)
    if label.ndim == 3 and label.shape[0] == 1:
        label = label[0]
    is_image = image.ndim == 3 and image.shape[0] == 3
    if not is_image or label.ndim != 2 or image.shape[1:] != label.shape:
        raise ValueError(
            f"the transform gave an image {list(image.shape)} and labels {list(label.shape)}, "
            "expected [3, h, w] (arrays: [h, w, 3]) and [h, w]"
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"the transform gave an image of {image.dtype}, expected uint8 or float")
    if label.dtype not in (torch.uint8, torch.int32, torch.int64):
        if label.is_floating_point() or label.dtype == torch.bool:
            raise ValueError(f"the transform gave labels of {label.dtype}, expected integers")
        label = label.to(torch.int32)
    return image.contiguous(), label.contiguous()


def _plain(array: np.ndarray) -> np.ndarray:
    # torch cannot share memory with read-only or negatively strided arrays.
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        return array.copy()
    return array


def _nearest(length: int, new: int) -> np.ndarray:
    # Integers: (i + 0.5) * length / new in floats may fall below a boundary that it lies on.
    return (2 * np.arange(new) + 1) * length // (2 * new)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))
