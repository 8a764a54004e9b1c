"""Scores of a model over a data set, exact over processes, and the files that show them."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from deeplab_fast import ops
from deeplab_fast.data.classes import ClassSet, label_count, same_name
from deeplab_fast.data.datasets import LabelledData
from deeplab_fast.data.preprocess import InputSizeError, Preprocess
from deeplab_fast.data.transforms import check_labels, photo_name, to_tensors
from deeplab_fast.dispatch.files import write_atomically
from deeplab_fast.engine.adapter import as_segmenter
from deeplab_fast.engine.counting import Counting
from deeplab_fast.engine.finite import NotFiniteWarning
from deeplab_fast.engine.metrics import ImageScore, Metrics, percent, worst_and_best
from deeplab_fast.engine.pictures import (
    Panel,
    confusion_image,
    draw_panel,
    panel_name,
    png_writer,
)
from deeplab_fast.engine.runner import (
    Pixels,
    PredictOptions,
    Runner,
    at_output_stride,
    check_device,
    check_dtype,
    class_name,
    is_out_of_memory,
    preprocess_of,
)

__all__ = [
    "Evaluation",
    "ImageCounter",
    "ImageScore",
    "IndexedItem",
    "IndexedItems",
    "Panel",
    "ShardSampler",
    "confusion_image",
    "equal_sizes",
    "evaluate",
    "image_scores",
    "is_out_of_memory",
    "panels_of",
]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` gives: scores, counts [C, C] (rows: labels), scores of each image.

    Where ``metrics.not_finite`` is not 0 the scores are those of a broken run.
    """

    metrics: Metrics
    confusion: np.ndarray
    images: tuple[ImageScore, ...]
    classes: ClassSet
    settings: dict[str, Any]
    panels: tuple[Panel, ...] = ()

    @property
    def not_finite(self) -> dict[str, int]:
        """Pixels whose logits are NaN or infinite, by the names of the images that have any."""
        return not_finite_by_name(self.images)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; nan is None."""
        return {
            **self.metrics.as_dict(),
            "settings": self.settings,
            "confusion": self.confusion.tolist(),
            "images": [
                {
                    key: None if isinstance(value, float) and math.isnan(value) else value
                    for key, value in vars(score).items()
                }
                for score in self.images
            ],
            "panels": [
                {"file": f"panels/{panel_name(panel)}", "index": panel.score.index}
                for panel in self.panels
            ],
        }

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        unpainted: Sequence[int] | None = None,
        **extra: object,
    ) -> dict[str, Path]:
        """Writes ``metrics.json``, ``confusion.png`` and ``panels/*.png``; returns their paths.

        All files are complete before the first gets its name, and the JSON gets its name last.

        Args:
            folder: made if it is missing.
            unpainted: ids of classes that the panels leave as the photo is; None: a background
                (``engine.outputs.overlay``).
            extra: told in the JSON, e.g. the command's arguments; ``weights`` and ``builder`` are
                in the pictures' titles.

        Raises:
            OSError: the files cannot be written; none is left half-written.
        """
        folder = Path(folder)
        content = {**extra, **self.as_dict()}
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        parts = [extra.get("weights"), extra.get("builder") or self.settings["model"]]
        data = " ".join(
            str(self.settings[key]) for key in ("dataset", "split") if self.settings[key]
        )
        title = ", ".join([*(str(part) for part in parts if part), data])
        picture = confusion_image(self.confusion, self.classes.classes, title)
        paths = {
            **{panel_name(p): folder / "panels" / panel_name(p) for p in self.panels},
            "confusion": folder / "confusion.png",
            "metrics": folder / "metrics.json",
        }
        above = f"{title}: mIoU {percent(self.metrics.miou)} % of {len(self.images)} photos"
        pictures = [
            (paths[panel_name(p)], draw_panel(p, self.classes, above, unpainted=unpainted))
            for p in self.panels
        ]
        pictures.append((paths["confusion"], picture))
        (folder / "panels" if self.panels else folder).mkdir(parents=True, exist_ok=True)
        files = [(path, png_writer(image)) for path, image in pictures]
        files.append((paths["metrics"], lambda file: file.write(text.encode("utf-8"))))
        write_atomically(files)
        return paths


def not_finite_by_name(images: Sequence[ImageScore]) -> dict[str, int]:
    """Pixels whose logits are NaN or infinite, summed over the images of a name."""
    pixels: Counter[str] = Counter()
    for image in images:
        if image.not_finite:
            pixels[image.name] += image.not_finite
    return dict(pixels)


class ShardSampler(Sampler[int]):
    """Indices rank, rank + world, ... of n: over all ranks every index once, without padding.

    PyTorch's DistributedSampler repeats samples so that all ranks have equally many, which counts
    some of them twice. Ranks of this one may differ by one sample: no collective call may depend on
    the number of steps.
    """

    def __init__(self, length: int, rank: int | None = None, world: int | None = None) -> None:
        own_rank, own_world = _rank_and_world()
        self.length = length
        self.rank = own_rank if rank is None else rank
        self.world = own_world if world is None else world
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank is {self.rank} of {self.world} processes")

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.length, self.world))

    def __len__(self) -> int:
        return len(range(self.rank, self.length, self.world))


def evaluate(
    model: torch.nn.Module,
    dataset: LabelledData,
    *,
    output_stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    tile: tuple[int, int] | int | None = None,
    overlap: float = 0.25,
    batch_size: int = 1,
    workers: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    precision: str | None = None,
    panels: int = 0,
    progress: bool = False,
    threshold: float | None = None,
    preprocess: Preprocess | None = None,
    tell: Callable[[str], object] | None = None,
) -> Evaluation:
    """Counts, for every labelled pixel of a data set, which class the model predicts there.

    The prediction is :func:`~deeplab_fast.engine.predict.predict`'s, at the size of the labels. One
    scale without flip or windows goes from low-resolution logits straight to counts
    (``ops.upsample_confusion``): neither full-resolution logits nor label maps are made. A model of
    one class is scored on the two classes of its labels, background and the class.

    With ``torch.distributed`` initialised every process takes its share of the samples, each is
    counted once, the counts are summed and all processes return the same result (``panels`` only
    rank 0). All of them must call it. Where one fails all raise.

    Windows are cut at the model's own scale, as ``predict`` does: ``settings["preprocess_size"]``.

    Args:
        model: as for ``predict``; eval mode, training modes are restored.
        dataset: gives (photo, labels) and has ``classes`` (a ``ClassSet``), ``num_classes`` and
            ``ignore_index``, e.g. ``data.datasets.open_dataset(...)``, or one in an
            ``AugmentedDataset``. uint8 photos go through ``preprocess``.
        output_stride: run the model at this one and give it back with its own; None keeps it.
        scales, flip, tile, overlap, device, dtype, precision: as for ``predict``.
        batch_size: images of one size, or windows, that run together.
        workers: processes that read.
        panels: number of worst and of best images (by image mIoU) kept with their predictions.
        progress: a bar on stderr where that is a terminal, else a line every ten seconds.
        tell: takes these lines; None prints them to stderr.
        threshold, preprocess: as for ``predict``.

    Warns:
        NotFiniteWarning: logits that are NaN or infinite, by image; ``metrics.not_finite`` counts
            their pixels, and the table and the JSON say so.

    Raises:
        ValueError: arguments, a number of classes, or labels that do not fit (with the mask's
            path), or a file that cannot be read.
        MemoryError: not enough memory; names the images and what to lower.
    """
    options = PredictOptions.checked(scales, flip, tile, overlap, batch_size, threshold=threshold)
    model = as_segmenter(model)
    options.check_classes(model)
    wanted_dtype, wanted_device = check_dtype(dtype), check_device(device)
    if not isinstance(panels, int) or isinstance(panels, bool) or panels < 0:
        raise ValueError(f"panels is {panels!r}, expected 0 or more")
    classes = _classes_of(dataset, model)
    if len(dataset) == 0:
        raise ValueError(f"the data set {dataset!r} is empty")
    if preprocess is None:
        preprocess = getattr(model, "preprocess", None)
    else:
        preprocess = preprocess_of(model, preprocess)
    with at_output_stride(model, output_stride) as model:
        runner = Runner.prepare(
            model, None, preprocess, options, wanted_device, wanted_dtype, precision
        )
        with torch.inference_mode():
            counter = ImageCounter(runner, dataset, classes)
            confusion, images = _gathered(counter, lambda: counter.run(workers, progress, tell))
            rank, world = _rank_and_world()
            kept = panels_of(counter, images, panels) if rank == 0 else ()
        settings = {
            "dataset": getattr(dataset, "name", type(dataset).__name__),
            "split": getattr(dataset, "split", None),
            "samples": len(dataset),
            "ignore_index": dataset.ignore_index,
            "model": class_name(model),
            "output_stride": getattr(model, "output_stride", None),
            "scales": list(options.scales),
            "flip": options.flip,
            "threshold": runner.threshold if getattr(model, "num_classes", 0) == 1 else None,
            "tile": None if options.tile is None else list(options.tile),
            "overlap": options.overlap if options.tile is not None else None,
            "preprocess_size": preprocess.size if isinstance(preprocess, Preprocess) else None,
            "device": str(runner.device),
            "dtype": str(runner.autocast or runner.dtype).removeprefix("torch."),
            "precision": precision or getattr(model, "precision", None),
            "processes": world,
            "torch": torch.__version__,
        }
    metrics = Metrics.from_confusion(
        confusion, classes.classes, not_finite=sum(image.not_finite for image in images)
    )
    if metrics.not_finite:
        warnings.warn(NotFiniteWarning(not_finite_by_name(images)), stacklevel=2)
    return Evaluation(
        metrics=metrics,
        confusion=confusion.numpy(),
        images=tuple(images),
        classes=classes,
        settings=settings,
        panels=kept,
    )


@dataclass(frozen=True)
class ImageCounter:
    """Counts and labels of a data set's images; ``bias`` [C] is added to their logits."""

    runner: Runner
    dataset: LabelledData
    classes: ClassSet
    bias: Tensor | None = None

    def run(
        self, workers: int, progress: bool, tell: Callable[[str], object] | None = None
    ) -> tuple[Tensor, list[ImageScore]]:
        """Counts and image scores of this process's share."""
        count = len(self.classes)
        total = torch.zeros(count, count, dtype=torch.int64, device=self.runner.device)
        step = 1 if self.runner.options.tile is not None else self.runner.options.batch_size or 1
        sampler = ShardSampler(len(self.dataset))
        loader = DataLoader(
            IndexedItems(self.dataset),
            batch_size=step,
            sampler=sampler,
            num_workers=workers,
            collate_fn=list,
        )
        order: list[int] = []
        scores: list[Tensor] = []
        with Counting(
            len(sampler),
            "evaluating",
            tell=tell,
            shown=progress and sampler.rank == 0,
            together=step,
        ) as counting:
            runner = replace(self.runner, progress=counting.windows)
            counter = replace(self, runner=runner)
            for items in loader:
                for group in equal_sizes(items):
                    matrices, spoiled = counter.matrices(group)
                    total += matrices.sum(0)
                    order += [index for index, _ in group]
                    # Counts below 2^53 are exact in fp64.
                    parts = [image_scores(matrices), spoiled[:, None].double()]
                    scores.append(torch.cat(parts, dim=1))
                counting.add(len(items))
        # One copy from the device at the end: a copy an image would wait for each.
        values = torch.cat(scores).tolist() if scores else []
        images = [
            ImageScore(index, self.name(index), miou, accuracy, int(pixels), int(spoiled))
            for index, (miou, accuracy, pixels, spoiled) in zip(order, values, strict=True)
        ]
        return total, images

    def matrices(
        self,
        group: list[tuple[int, tuple[Tensor, Tensor]]],
        seen: Callable[[Tensor, Tensor], object] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Of images of one size: counts [n, C, C], and pixels [n] that have no finite logits.

        ``seen`` gets the logits [n, C, h, w] before ``bias``, and the labels [n, H, W], where the
        logits of one pass alone make the result.
        """
        data = torch.stack([item[0] for _, item in group])
        target = torch.stack([item[1] for _, item in group]).to(self.runner.device)
        pixels = self.pixels(data)
        ignore_index = self.dataset.ignore_index
        try:
            logits = self.runner.single_pass(pixels)
            if logits is not None and seen is not None:
                seen(logits, target)
            if logits is not None:
                logits = self.biased(logits)
            if logits is not None and logits.shape[1] > 1:
                spoiled = self.runner.spoiled(logits, pixels.size)
                parts = [
                    ops.upsample_confusion(
                        logits[i : i + 1],
                        target[i : i + 1],
                        ignore_index=ignore_index,
                        align_corners=self.runner.model.align_corners,
                    )
                    for i in range(len(group))
                ]
            else:
                result = (
                    self.runner.run(pixels)
                    if logits is None
                    else self.runner.reduced(logits, pixels.size)
                )
                labels, spoiled = result.labels, result.spoiled
                parts = [
                    _count(labels[i], target[i], len(self.classes), ignore_index)
                    for i in range(len(group))
                ]
        except InputSizeError as error:
            name = photo_name(self.dataset, group[0][0])
            raise InputSizeError(f"{name}: {error}") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            names = ", ".join(self.name(index) for index, _ in group)
            height, width = target.shape[-2:]
            raise MemoryError(
                f"not enough memory for {names} ({width}x{height} pixels); use a smaller "
                "batch_size, tile=(513, 513), fewer scales, or a larger output_stride"
            ) from error
        return torch.stack(parts), spoiled

    def predict(self, data: Tensor) -> np.ndarray:
        """Labels [H, W] of one photo."""
        pixels = self.pixels(data[None])
        if self.bias is None:
            return self.runner.run(pixels).labels[0].cpu().numpy()
        logits = self.runner.single_pass(pixels)
        if logits is None:
            raise ValueError("a bias is for one pass a photo, not for scales, flips and windows")
        return self.runner.reduced(self.biased(logits), pixels.size).labels[0].cpu().numpy()

    def biased(self, logits: Tensor) -> Tensor:
        """The logits with ``bias``."""
        return logits if self.bias is None else logits + self.bias.to(logits)[:, None, None]

    def pixels(self, data: Tensor) -> Pixels:
        if data.is_floating_point():
            return Pixels(data, None)
        return Pixels(data, preprocess_of(self.runner))

    def name(self, index: int) -> str:
        samples = getattr(self.dataset, "samples", None)
        return f"sample {index}" if samples is None else samples[index].name


IndexedItem = tuple[int, tuple[Tensor, Tensor] | Exception]
"""Index of a sample, its photo and labels, or why they cannot be had."""


class IndexedItems(Dataset[IndexedItem]):
    """(index, pair of tensors), or (index, the error): a worker would send only its text."""

    def __init__(self, dataset: LabelledData) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> IndexedItem:
        try:
            image, label = self.dataset[index]
            # On CUDA a label that is no class would silently count as ignored.
            check_labels(self.dataset, index, np.asarray(label))
            return index, to_tensors(image, label)
        except (ValueError, OSError) as error:
            return index, error


def _gathered(
    counter: ImageCounter, run: Callable[[], tuple[Tensor, list[ImageScore]]]
) -> tuple[Tensor, list[ImageScore]]:
    """The sum over processes, on the CPU, and all images in the data set's order."""
    _, world = _rank_and_world()
    if world == 1:
        total, images = run()
        return total.cpu(), sorted(images, key=lambda image: image.index)
    error: Exception | None = None
    total, images = torch.empty(0), []
    try:
        total, images = run()
    # The others would wait for this process for ever.
    except Exception as caught:
        error = caught
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, (images, None if error is None else str(error)))
    if error is not None:
        raise error
    failed = [f"process {i}: {text}" for i, (_, text) in enumerate(shares) if text is not None]
    if failed:
        raise RuntimeError(f"evaluation failed in another process: {'; '.join(failed)}")
    # NCCL sums on GPUs only, Gloo on the host.
    if dist.get_backend() == "nccl":
        total = total.cuda()
    else:
        total = total.cpu()
    dist.all_reduce(total)
    everything = [image for share, _ in shares for image in share]
    return total.cpu(), sorted(everything, key=lambda image: image.index)


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _classes_of(dataset: LabelledData, model: torch.nn.Module) -> ClassSet:
    classes = getattr(dataset, "classes", None)
    missing = [name for name in ("num_classes", "ignore_index") if not hasattr(dataset, name)]
    if not isinstance(classes, ClassSet) or missing:
        raise ValueError(
            f"the data set is a {type(dataset).__name__} without classes (a ClassSet), num_classes "
            "and ignore_index; use deeplab_fast.data.datasets, or give yours these attributes"
        )
    count = getattr(model, "num_classes", len(classes))
    if label_count(count) != len(classes):
        labels = "; its labels are background and class, ClassSet.of_labels()" if count == 1 else ""
        raise ValueError(
            f"the model has {count} classes and the data set {len(classes)} ({classes.name}); "
            f"evaluate a model on the classes it was trained on{labels}"
        )
    own = getattr(model, "classes", None) or classes.classes
    if len(own) != len(classes):
        # One class alone, or names of what the weights were before their head was replaced.
        own = (classes.classes[0], *own) if count == len(own) == 1 else classes.classes
    for index, (name, wanted) in enumerate(zip(own, classes.classes, strict=True)):
        if not same_name(name, wanted):
            warnings.warn(
                f"class {index} is {name!r} to the model and {wanted!r} to the data set; the "
                "scores are meaningless if the classes differ in more than their names",
                stacklevel=3,
            )
            break
    return classes


def equal_sizes(
    items: Sequence[IndexedItem],
) -> Iterator[list[tuple[int, tuple[Tensor, Tensor]]]]:
    """The items grouped by the size and dtypes of their pictures; raises an item's error."""
    groups: dict[object, list[tuple[int, tuple[Tensor, Tensor]]]] = {}
    for index, item in items:
        if isinstance(item, Exception):
            raise item
        image, label = item
        groups.setdefault((image.shape, image.dtype, label.dtype), []).append((index, item))
    yield from groups.values()


def _count(labels: Tensor, target: Tensor, count: int, ignore_index: int) -> Tensor:
    valid = target != ignore_index
    pairs = target[valid].to(torch.int64) * count + labels[valid].to(torch.int64)
    return torch.bincount(pairs, minlength=count * count).view(count, count)


def image_scores(matrices: Tensor) -> Tensor:
    """[n, C, C] -> [n, 3]: mean IoU, pixel accuracy, pixels; nan where there are no pixels."""
    hits = matrices.diagonal(dim1=1, dim2=2).double()
    union = matrices.sum(1) + matrices.sum(2) - hits
    pixels = matrices.sum((1, 2)).double()
    # 0 / 0 is nan, which nanmean leaves out.
    return torch.stack([(hits / union).nanmean(1), hits.sum(1) / pixels, pixels], dim=1)


def panels_of(counter: ImageCounter, images: Sequence[ImageScore], count: int) -> tuple[Panel, ...]:
    """The ``count`` worst and the ``count`` best of the images, with their predictions."""
    panels = []
    for kind, rank, score in worst_and_best(images, count):
        image, label = to_tensors(*counter.dataset[score.index])
        if image.is_floating_point():
            warnings.warn(
                "no panels: the data set gives normalised floats, not photos", stacklevel=3
            )
            return ()
        prediction = counter.predict(image)
        photo = image.permute(1, 2, 0).contiguous().numpy()
        panels.append(Panel(kind, rank, score, photo, label.numpy(), prediction))
    return tuple(panels)
