"""``deeplab-fast predict``: label maps, overlays and class areas of photos."""

from __future__ import annotations

import os
import sys
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeplab_fast.cli.common import (
    PROGRAM,
    UsageError,
    add_model_arguments,
    add_pass_arguments,
    apply_preprocess,
    check_classes,
    check_precision,
    check_preprocess,
    device_name,
    need_weights,
    tell,
)
from deeplab_fast.cli.exported import add_runtime_argument, exported_model
from deeplab_fast.cli.model_from import load_any_model

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from deeplab_fast.cli.common import Model
    from deeplab_fast.data.classes import ClassSet
    from deeplab_fast.exporting import ExportedModel

HELP = "segment photos: label maps, overlays, class areas"


# A model of this many classes is named after this set where neither it nor the user says.
_USUAL_CLASS_SETS = {21: "voc", 19: "cityscapes", 150: "ade20k", 11: "camvid"}


_OUT_OF_MEMORY = "not enough memory; use --tile H W, e.g. --tile 513 513, or --size"


def parser() -> ArgumentParser:
    from deeplab_fast.cli.parser import CommandParser

    parser = CommandParser(
        "predict",
        description="Segments photos. For each, writes STEM_labels.png (class ids under a palette),"
        " STEM_overlay.png and STEM.json (class areas) into the output folder. An image that"
        " cannot be read is reported, the others are done, and the exit status is 1, as it is where"
        " logits were NaN or infinite.",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add("paths", nargs="+", type=str, metavar="PATH", help="files, folders or glob patterns")
    add("--output", type=str | None, metavar="DIR", help="folder for the results (required)")
    add_model_arguments(add)
    add(
        "--classes",
        type=str | None,
        metavar="NAME|FILE",
        help="voc, coco-voc, cityscapes, ade20k, camvid, or a file with a name a line, JSON, YAML",
    )
    add_runtime_argument(add)
    add_pass_arguments(add)
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
    model: Model | ExportedModel
    model_name: str
    classes: ClassSet
    arguments: dict[str, Any]
    backend: str | None


def _prepare(config: Namespace) -> _Job:
    """Everything that can fail for want of good arguments, before anything is written."""
    from deeplab_fast.data.images import list_images
    from deeplab_fast.engine.predict import PredictOptions, check_device, check_dtype

    model: Any
    if not config.paths:
        raise UsageError("no images given: name files, folders or glob patterns")
    if not config.output:
        raise UsageError("--output DIR is missing: where shall the results go?")
    need_weights(config)
    output = Path(config.output)
    try:
        options = PredictOptions.checked(
            scales=config.scales,
            flip=config.flip,
            tile=config.tile,
            overlap=config.overlap,
            threshold=config.threshold,
        )
        device = check_device(device_name(config.device))
        check_dtype(config.dtype)
        paths = _inputs(list_images(config.paths), config.paths, output)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
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
        "threshold": options.threshold,
        "dtype": config.dtype,
        "precision": config.precision,
    }
    if exported is not None:
        try:
            exported.check_options(**arguments)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return _Job(
        paths=tuple(paths),
        stems=tuple(unique_stems(paths)),
        output=output,
        model=model,
        model_name=name,
        classes=classes,
        arguments=arguments,
        backend=config.backend,
    )


def _inputs(found: Sequence[Path], given: Sequence[str], output: Path) -> list[Path]:
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
    from deeplab_fast.engine.outputs import output_paths

    written = {
        os.path.realpath(path)
        for stem in unique_stems(found)
        for path in output_paths(output, stem).values()
    }
    for path in found:
        if os.path.realpath(path) in written:
            raise ValueError(
                f"the results would overwrite the image {path}; name another --output folder"
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
    from deeplab_fast.data.classes import ClassSet, class_set, generic_classes, label_count

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
            if palette is None:
                return generic_classes(len(own), own, name).of_labels()
            return ClassSet(name, tuple(own), tuple(palette)).of_labels()
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


def _run(job: _Job) -> int:
    from tqdm import tqdm

    from deeplab_fast import use_backend
    from deeplab_fast.backends import BackendUnavailable
    from deeplab_fast.data.images import ImageReadError
    from deeplab_fast.engine.finite import NotFiniteWarning
    from deeplab_fast.engine.runner import is_out_of_memory
    from deeplab_fast.exporting import InputSizeError

    failed = spoiled = 0
    bar = tqdm(
        zip(job.paths, job.stems, strict=True),
        total=len(job.paths),
        unit="image",
        # None: only where stderr is a terminal.
        disable=True if len(job.paths) == 1 else None,
    )
    with use_backend(job.backend) if job.backend else nullcontext(), bar:
        for path, stem in bar:
            try:
                line, caught = _segment(job, path, stem)
                bar.write(line, file=sys.stdout)
                for warning in caught:
                    spoiled += isinstance(warning, NotFiniteWarning)
                    bar.write(f"{PROGRAM} predict: warning: {warning}", file=sys.stderr)
            except InputSizeError as error:
                failed += 1
                bar.write(f"{PROGRAM} predict: {path}: {error}", file=sys.stderr)
            except ImageReadError as error:
                failed += 1
                bar.write(f"{PROGRAM} predict: {error}", file=sys.stderr)
            except BackendUnavailable as error:
                raise UsageError(str(error)) from error
            except OSError as error:
                # The next image would fail alike: a full disk, a folder that cannot be written.
                print(f"{PROGRAM} predict: cannot write: {error}", file=sys.stderr)
                return 1
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failed += 1
                bar.write(f"{PROGRAM} predict: {path}: {_OUT_OF_MEMORY}", file=sys.stderr)
    done = len(job.paths) - failed
    problems = f", {failed} failed" if failed else ""
    problems += f", {spoiled} with logits that are NaN or infinite" if spoiled else ""
    print(f"{done} of {len(job.paths)} images segmented into {job.output}{problems}")
    return 1 if failed or spoiled else 0


def _segment(job: _Job, path: Path, stem: str) -> tuple[str, list[Warning]]:
    """One image's results written, its line of text, and what was warned of."""
    from deeplab_fast.data.images import read_image
    from deeplab_fast.engine.finite import NotFiniteWarning
    from deeplab_fast.engine.outputs import class_areas, write_outputs
    from deeplab_fast.engine.predict import predict
    from deeplab_fast.exporting import ExportedModel

    image = read_image(path)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always", NotFiniteWarning)
        if isinstance(job.model, ExportedModel):
            labels = job.model.predict(image, **job.arguments)
        else:
            labels = predict(job.model, image, **job.arguments)
    caught: list[Warning] = []
    not_finite = 0
    for each in recorded:
        warning = each.message
        if isinstance(warning, NotFiniteWarning):
            # predict was given an array, which has no name.
            not_finite = sum(warning.pixels.values())
            warning = NotFiniteWarning({str(path): not_finite})
        caught.append(warning if isinstance(warning, Warning) else UserWarning(warning))
    write_outputs(
        job.output,
        stem,
        image,
        labels,
        job.classes,
        source=path,
        model=job.model_name,
        backend=_backend_used(job, image.shape[:2]),
        not_finite=not_finite,
    )
    areas = class_areas(labels, job.classes)
    shown = ", ".join(f"{area['name']} {area['fraction']:.1%}" for area in areas[:5])
    more = f", {len(areas) - 5} more" if len(areas) > 5 else ""
    return f"{path}: {shown}{more}", caught


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
