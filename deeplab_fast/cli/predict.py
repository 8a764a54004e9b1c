"""``deeplab-fast predict``: label maps, overlays and class areas of photos."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deeplab_fast.cli.common import (
    PROGRAM,
    UsageError,
    add_model_arguments,
    add_pass_arguments,
    add_unpainted_argument,
    apply_preprocess,
    check_classes,
    check_precision,
    check_preprocess,
    device_name,
    in_options,
    need_weights,
    tell,
    unpainted_ids,
)
from deeplab_fast.cli.exported import add_runtime_argument, exported_model
from deeplab_fast.cli.model_from import load_any_model

if TYPE_CHECKING:
    import numpy as np
    from jsonargparse import ArgumentParser, Namespace

    from deeplab_fast.cli.common import Model
    from deeplab_fast.data.classes import ClassSet
    from deeplab_fast.engine.counting import Counting
    from deeplab_fast.engine.predict import InputPlan, PredictOptions
    from deeplab_fast.exporting import ExportedModel

_T = TypeVar("_T")

HELP = "segment photos: label maps, overlays, class areas"


# A model of this many classes is named after this set where neither it nor the user says.
_USUAL_CLASS_SETS = {21: "voc", 19: "cityscapes", 150: "ade20k", 11: "camvid"}


def parser() -> ArgumentParser:
    from deeplab_fast.cli.parser import CommandParser

    parser = CommandParser(
        "predict",
        description="Segments photos. For each, writes STEM_labels.png (class ids under a palette),"
        " STEM_overlay.png and STEM.json (class areas) into the output folder, and tells at what"
        " size the network saw it. An image that cannot be read is reported, the others are done,"
        " and the exit status is 1, as it is where logits were NaN or infinite.",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add("paths", nargs="+", type=str, metavar="PATH", help="files, folders or glob patterns")
    add("--output", type=str | None, metavar="DIR", help="folder for the results (required)")
    add(
        "--outputs",
        type=str,
        default="labels,overlay,json",
        metavar="KIND,...",
        help="files for each photo: labels, overlay, json, probabilities (STEM_probabilities.png, "
        "16-bit grey: the chosen class's probability times 65535)",
    )
    add(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="threads that read photos and write results beside the network; 0: none",
    )
    add(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="photos in a row that are inputs of one size, or windows, that run together",
    )
    add(
        "--depth",
        type=int | None,
        metavar="BITS",
        help="bits that the samples of 16-bit photos use, 8 to 16; default: 16, and photos that "
        "use 14 or less are refused",
    )
    add_model_arguments(add)
    add(
        "--classes",
        type=str | None,
        metavar="NAMES|SET|FILE|N",
        help="a,b,c; voc, coco-voc, cityscapes, ade20k, camvid; a file with a name a line, JSON or "
        "YAML; or a number",
    )
    add_runtime_argument(add)
    add_pass_arguments(add)
    add_unpainted_argument(add)
    add("--no-legend", action="store_true", help="leave the class names out of the overlays")
    add(
        "--size",
        type=int | None,
        metavar="N",
        help="shorter side of the network's input, 0 for the photo's own size; default: the "
        "model's; results always have the photo's size",
    )
    add(
        "--reset-head",
        action="store_true",
        help="start the last layers anew, whatever --weights has for them (they need training "
        "before results mean anything)",
    )
    return parser


def run(config: Namespace) -> int:
    return _run(_prepare(config))


@dataclass(frozen=True)
class _Job:
    paths: tuple[Path, ...]
    stems: tuple[str, ...]
    output: Path
    outputs: tuple[str, ...]
    model: Model | ExportedModel
    model_name: str
    classes: ClassSet
    options: PredictOptions
    arguments: dict[str, Any]
    backend: str | None
    workers: int
    depth: int | None
    unpainted: tuple[int, ...] | None
    legend: bool


def _prepare(config: Namespace) -> _Job:
    """Everything that can fail for want of good arguments, before anything is written."""
    from deeplab_fast.data.images import check_bits, list_images
    from deeplab_fast.engine.outputs import check_outputs
    from deeplab_fast.engine.predict import PredictOptions, check_device, check_dtype

    model: Any
    if not config.paths:
        raise UsageError("no images given: name files, folders or glob patterns")
    if not config.output:
        raise UsageError("--output DIR is missing: where shall the results go?")
    need_weights(config)
    output = Path(config.output)
    outputs = tuple(kind.strip() for kind in config.outputs.split(",") if kind.strip())
    if config.workers < 0:
        raise UsageError(f"--workers is {config.workers}, expected 0 or more")
    try:
        check_outputs(outputs)
    except ValueError as error:
        raise UsageError(in_options(error, config)) from error
    try:
        check_bits(config.depth)
    except ValueError as error:
        raise UsageError(f"--depth: {error}") from error
    try:
        options = PredictOptions.checked(
            scales=config.scales,
            flip=config.flip,
            tile=config.tile,
            overlap=config.overlap,
            batch_size=config.batch_size,
            return_prob="probabilities" in outputs,
            threshold=config.threshold,
        )
        device = check_device(device_name(config.device))
        check_dtype(config.dtype)
        paths = _inputs(list_images(config.paths), config.paths, output, outputs)
    except (ValueError, OSError) as error:
        raise UsageError(in_options(error, config)) from error
    check_preprocess(config)
    exported = exported_model(config)
    if exported is not None:
        model, name = exported, exported.description.model
        device = check_device("cpu")
    else:
        model, name = load_any_model(config, "predict")
        check_precision(config, model, device)
    check_classes(options, model)
    classes = _classes(config, model, name)
    apply_preprocess(config, model)
    model.to(device).eval()
    arguments = {
        "scales": options.scales,
        "flip": options.flip,
        "tile": options.tile,
        "overlap": options.overlap,
        "batch_size": options.batch_size,
        "return_prob": options.return_prob,
        "threshold": options.threshold,
        "dtype": config.dtype,
        "precision": config.precision,
    }
    if exported is not None:
        try:
            exported.check_options(**arguments)
        except ValueError as error:
            raise UsageError(in_options(error, config)) from error
    return _Job(
        paths=tuple(paths),
        stems=tuple(unique_stems(paths)),
        output=output,
        outputs=outputs,
        model=model,
        model_name=name,
        classes=classes,
        options=options,
        arguments=arguments,
        backend=config.backend,
        workers=config.workers,
        depth=config.depth,
        unpainted=unpainted_ids(config, classes),
        legend=not config.no_legend,
    )


def _inputs(
    found: Sequence[Path], given: Sequence[str], output: Path, outputs: Sequence[str]
) -> list[Path]:
    """The images to run: none that an earlier run wrote, none that this run would overwrite."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    folder = Path(os.path.realpath(output))
    inputs = [Path(os.path.realpath(path)) for path in given if Path(path).is_dir()]
    if folder in inputs:
        raise ValueError(
            f"--output {output} is also a folder of images: the results would be taken as images "
            "at the next run; name another folder, one inside it will do"
        )
    if any(folder.is_relative_to(path) for path in inputs):
        named = {os.path.realpath(path) for path in given}
        found = [
            path
            for path in found
            if os.path.realpath(path) in named
            or not Path(os.path.realpath(path)).is_relative_to(folder)
        ]
        if not found:
            raise ValueError(f"every image found is a result in --output {output}")
    from deeplab_fast.data.images import shown_name
    from deeplab_fast.engine.outputs import output_paths

    written = {
        os.path.realpath(path)
        for stem in unique_stems(found)
        for kind, path in output_paths(output, stem).items()
        if kind in outputs
    }
    for path in found:
        if os.path.realpath(path) in written:
            raise ValueError(
                f"the results would overwrite the image {shown_name(path)}; name another --output "
                "folder"
            )
    return list(found)


def unique_stems(paths: Sequence[Path]) -> list[str]:
    """A name for each path's results: its stem, and where stems clash its folders and suffix.

    Names that differ only in case or in their form of Unicode count as equal: some file systems do
    not tell them apart.
    """
    by_stem: dict[str, list[int]] = defaultdict(list)
    for index, path in enumerate(paths):
        by_stem[_folded(path.stem)].append(index)
    names = [path.stem for path in paths]
    taken = {stem for stem, indices in by_stem.items() if len(indices) == 1}
    for indices in by_stem.values():
        if len(indices) == 1:
            continue
        full = [Path(os.path.abspath(paths[i])) for i in indices]
        root = os.path.commonpath([path.parent for path in full])
        plain = ["_".join((*path.parent.relative_to(root).parts, path.stem)) for path in full]
        folded = [_folded(name) for name in plain]
        for i, path, name in zip(indices, full, plain, strict=True):
            if folded.count(_folded(name)) > 1:
                name += path.suffix.replace(".", "_")
            candidate, number = name, 1
            while _folded(candidate) in taken:
                number += 1
                candidate = f"{name}-{number}"
            taken.add(_folded(candidate))
            names[i] = candidate
    return names


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _classes(config: Namespace, model: Model | ExportedModel, name: str) -> ClassSet:
    from deeplab_fast.data.classes import (
        ClassSet,
        built_in_name,
        class_set,
        generic_classes,
        label_count,
    )

    labels = label_count(model.num_classes)
    try:
        if config.classes is not None:
            classes = class_set(config.classes).of_labels()
            if len(classes) != labels:
                raise ValueError(
                    f"--classes {config.classes} has {len(classes)} classes and the model "
                    f"{model.num_classes}"
                )
            return classes
        own = getattr(model, "classes", None)
        if own is not None and len(own) in (labels, model.num_classes):
            palette = getattr(model, "palette", None)
            called = built_in_name(own) or (Path(config.weights).stem if config.weights else name)
            if palette is None:
                return generic_classes(len(own), own, called).of_labels()
            return ClassSet(called, tuple(own), tuple(palette)).of_labels()
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    usual = _USUAL_CLASS_SETS.get(model.num_classes)
    if usual is None:
        return generic_classes(model.num_classes).of_labels()
    tell(
        "predict",
        f"the weights name no classes; {model.num_classes} classes are taken to be {usual} "
        "(--classes names others)",
    )
    return class_set(usual)


@dataclass(frozen=True)
class _Photo:
    """One image: where it lies, what its results are called, and its pixels as they are read."""

    number: int
    path: Path
    stem: str
    pixels: Future[np.ndarray]


@dataclass
class _Tally:
    failed: int = 0
    spoiled: int = 0


def _run(job: _Job) -> int:
    from deeplab_fast import use_backend
    from deeplab_fast.backends import BackendUnavailable
    from deeplab_fast.data.images import OUT_OF_MEMORY, shown_name
    from deeplab_fast.engine.counting import Counting, pace

    tally = _Tally()
    total = len(job.paths)
    counting = Counting(
        total,
        tell=lambda line: tell("predict", line),
        shown=total > 1 or bool(job.options.tile),
        together=_together(job),
    )
    began = time.monotonic()
    written: deque[tuple[Path, Future[str]]] = deque()
    with ExitStack() as stack:
        stack.enter_context(use_backend(job.backend) if job.backend else nullcontext())
        stack.enter_context(counting)
        pool = ThreadPoolExecutor(job.workers, "photos") if job.workers else None
        if pool is not None:
            stack.callback(pool.shutdown, cancel_futures=True)

        def done(future: Future[str]) -> None:
            if not future.cancelled():
                counting.add()

        def finish(left: int) -> None:
            while len(written) > left:
                path, future = written.popleft()
                try:
                    line = future.result()
                except MemoryError:
                    _told_failure(tally, counting, f"{shown_name(path)}: {OUT_OF_MEMORY}")
                    continue
                counting.write(line, sys.stdout)

        try:
            for group in _groups(job, pool, tally, counting):
                for path, write in _segmented(job, group, tally, counting):
                    future = _started(pool, write)
                    # When it is done, not when it is asked for below: that may be all at the end.
                    future.add_done_callback(done)
                    written.append((path, future))
                    # Each holds a photo and its labels.
                    finish(job.workers)
            finish(0)
        except BackendUnavailable as error:
            raise UsageError(str(error)) from error
        except OSError as error:
            # The next image would fail alike: a full disk, a folder that cannot be written.
            tell("predict", f"cannot write: {error}")
            return 1
    seconds = time.monotonic() - began
    segmented = total - tally.failed
    told = f" in {seconds:.1f} s, {pace(counting.seconds)}" if segmented else ""
    problems = f", {tally.failed} failed" if tally.failed else ""
    problems += f", {tally.spoiled} with logits that are NaN or infinite" if tally.spoiled else ""
    print(f"{segmented} of {total} images segmented into {job.output}{told}{problems}")
    return 1 if tally.failed or tally.spoiled else 0


def _started(pool: Executor | None, call: Callable[..., _T], *arguments: object) -> Future[_T]:
    """The call in the pool, or done at once where there is none."""
    if pool is not None:
        return pool.submit(call, *arguments)
    future: Future[_T] = Future()
    try:
        future.set_result(call(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


def _groups(
    job: _Job, pool: Executor | None, tally: _Tally, counting: Counting
) -> Iterator[list[_Photo]]:
    """Photos that follow each other and are inputs of one size, read ahead of the network."""
    from deeplab_fast.data.images import OUT_OF_MEMORY, ImageReadError, read_image, shown_name
    from deeplab_fast.data.preprocess import InputSizeError

    most = _together(job)
    ahead: deque[_Photo] = deque()
    waiting = enumerate(zip(job.paths, job.stems, strict=True), start=1)
    group: list[_Photo] = []
    while True:
        for number, (path, stem) in islice(waiting, max(1, job.workers) - len(ahead)):
            ahead.append(
                _Photo(number, path, stem, _started(pool, _read, read_image, path, job.depth))
            )
        if not ahead:
            break
        photo = ahead.popleft()
        try:
            size = _plan(job, photo.pixels.result().shape[:2]).size
        except ImageReadError as error:
            _failed(tally, counting, str(error))
            continue
        except InputSizeError as error:
            _failed(tally, counting, f"{shown_name(photo.path)}: {error}")
            continue
        except MemoryError:
            _failed(tally, counting, f"{shown_name(photo.path)}: {OUT_OF_MEMORY}")
            continue
        if group and (
            len(group) == most or size != _plan(job, group[0].pixels.result().shape[:2]).size
        ):
            yield group
            group = []
        group.append(photo)
    if group:
        yield group


def _together(job: _Job) -> int:
    """The most photos that run together."""
    return 1 if job.options.tile is not None else job.options.batch_size or 1


def _read(read: Callable[..., np.ndarray], path: Path, depth: int | None) -> np.ndarray:
    return read(path, bits=depth)


def _failed(tally: _Tally, counting: Counting, message: str) -> None:
    _told_failure(tally, counting, message)
    counting.add()


def _told_failure(tally: _Tally, counting: Counting, message: str) -> None:
    tally.failed += 1
    counting.write(f"{PROGRAM} predict: {message}", sys.stderr)


def _segmented(
    job: _Job, group: list[_Photo], tally: _Tally, counting: Counting
) -> list[tuple[Path, Callable[[], str]]]:
    """Of each photo what writes its results and gives its line of text."""
    from deeplab_fast.data.images import OUT_OF_MEMORY, shown_name
    from deeplab_fast.data.preprocess import InputSizeError
    from deeplab_fast.engine.finite import NotFiniteWarning
    from deeplab_fast.engine.runner import is_out_of_memory

    images = [photo.pixels.result() for photo in group]
    began = time.monotonic()
    try:
        labels, probabilities, caught = _labels(job, images, counting)
    except InputSizeError as error:
        if len(group) > 1:
            return _one_by_one(job, group, tally, counting)
        _failed(tally, counting, f"{shown_name(group[0].path)}: {error}")
        return []
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(group) > 1:
            return _one_by_one(job, group, tally, counting)
        _failed(tally, counting, f"{shown_name(group[0].path)}: {OUT_OF_MEMORY}")
        return []
    milliseconds = 1e3 * (time.monotonic() - began) / len(group)
    not_finite = dict.fromkeys(range(len(group)), 0)
    for warning in caught:
        if isinstance(warning, NotFiniteWarning):
            # predict was given arrays, which have no names.
            for index in not_finite:
                not_finite[index] += warning.pixels.get(f"images[{index}]", 0)
        else:
            counting.write(f"{PROGRAM} predict: warning: {warning}", sys.stderr)
    writers: list[tuple[Path, Callable[[], str]]] = []
    for index, photo in enumerate(group):
        if not_finite[index]:
            tally.spoiled += 1
            told = NotFiniteWarning({str(photo.path): not_finite[index]})
            counting.write(f"{PROGRAM} predict: warning: {told}", sys.stderr)
        write = partial(
            _written,
            job,
            photo,
            images[index],
            labels[index],
            probabilities[index],
            not_finite[index],
            _backend_used(job, images[index].shape[:2]),
            milliseconds,
        )
        writers.append((photo.path, write))
    return writers


def _one_by_one(
    job: _Job, group: list[_Photo], tally: _Tally, counting: Counting
) -> list[tuple[Path, Callable[[], str]]]:
    return [write for photo in group for write in _segmented(job, [photo], tally, counting)]


def _labels(
    job: _Job, images: list[Any], counting: Counting
) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray | None], list[Warning]]:
    """Labels and probabilities of images, and what was warned of."""
    from deeplab_fast.engine.finite import NotFiniteWarning
    from deeplab_fast.engine.predict import predict
    from deeplab_fast.exporting import ExportedModel

    arguments = {**job.arguments, "progress": counting.windows}
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always", NotFiniteWarning)
        run = job.model.predict if isinstance(job.model, ExportedModel) else None
        found = run(images, **arguments) if run else predict(job.model, images, **arguments)
    labels, probabilities = found if job.options.return_prob else (found, [None] * len(images))
    caught = [
        each.message if isinstance(each.message, Warning) else UserWarning(each.message)
        for each in recorded
    ]
    return labels, probabilities, caught


def _plan(job: _Job, size: tuple[int, int]) -> InputPlan:
    """What the network gets of a photo of this size."""
    from deeplab_fast.engine.predict import input_plan
    from deeplab_fast.exporting import ExportedModel

    # An exported file of photos resizes by itself.
    described = job.model.description if isinstance(job.model, ExportedModel) else None
    if described is not None and described.photos:
        return input_plan(size, described.preprocess, job.options)
    return input_plan(size, job.model.preprocess, job.options)


def _written(
    job: _Job,
    photo: _Photo,
    image: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray | None,
    not_finite: int,
    backend: str | None,
    milliseconds: float,
) -> str:
    """One image's results written, and its line of text."""
    from deeplab_fast.data.images import shown_name
    from deeplab_fast.engine.outputs import class_areas, write_outputs

    plan = _plan(job, image.shape[:2])
    write_outputs(
        job.output,
        photo.stem,
        image,
        labels,
        job.classes,
        source=photo.path,
        model=job.model_name,
        backend=backend,
        not_finite=not_finite,
        unpainted=job.unpainted,
        legend=job.legend,
        outputs=job.outputs,
        probabilities=probabilities,
        facts={
            "input": {
                "height": plan.size[0],
                "width": plan.size[1],
                "scales": list(job.options.scales),
                "flip": job.options.flip,
                "window": None if plan.window is None else list(plan.window),
                "windows": plan.windows,
            }
        },
    )
    areas = class_areas(labels, job.classes)
    shown = ", ".join(f"{area['name']} {area['fraction']:.1%}" for area in areas[:5])
    more = f", {len(areas) - 5} more" if len(areas) > 5 else ""
    number = f"{photo.number}/{len(job.paths)} " if len(job.paths) > 1 else ""
    scales = "".join(f" x{scale:g}" for scale in job.options.scales if job.options.scales != (1.0,))
    name = shown_name(photo.path)
    return f"{number}{name}: {shown}{more} (at {plan}{scales}; {milliseconds:.0f} ms)"


def _backend_used(job: _Job, size: tuple[int, int]) -> str | None:
    """The backend of the op that makes the labels, for logits of this photo's kind; of an exported
    file its runtime."""
    import torch

    from deeplab_fast import why
    from deeplab_fast.exporting import ExportedModel

    model = job.model
    if isinstance(model, ExportedModel):
        return model.runtime
    if model.num_classes == 1:
        # A sigmoid has no op of its own.
        return "reference"
    # The place of a model without tensors is the default's.
    like = next(model.parameters(), torch.empty(0))
    stride: int = getattr(model, "output_stride", 0) or getattr(model, "logits_stride", 1)
    height, width = (max(1, n // stride) for n in size)
    logits = torch.empty(1, model.num_classes, height, width, device=like.device, dtype=like.dtype)
    return why("upsample_argmax", logits, size, align_corners=model.align_corners).chosen
