"""The command line: ``deeplab-fast`` predict, eval, train, check-data, tune, info, models.

Exit status: 0 done; 1 some images failed (predict: the others are done; eval: nothing is written),
logits were NaN or infinite (predict, eval and train: what was written says so), the data are bad
(check-data), training ended early (nan, memory, disk; the checkpoint is whole), or a kernel failed
its check (tune); 2 bad arguments or no GPU (tune), nothing written; 130 and 143 stopped by Ctrl+C
and SIGTERM.
"""

from __future__ import annotations

import errno
import os
import sys
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["main"]

_PROGRAM = "deeplab-fast"

# A model of this many classes is named after this set where neither it nor the user says.
_USUAL_CLASS_SETS = {21: "voc", 19: "cityscapes", 150: "ade20k", 11: "camvid"}


class _UsageError(Exception):
    """Arguments that cannot be carried out; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (``sys.argv[1:]`` without) and returns the exit status."""
    parser = _parser()
    try:
        config = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    name = config.subcommand
    try:
        return _COMMANDS[name](config[name])
    except _UsageError as error:
        print(f"{_PROGRAM} {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{_PROGRAM} {name}: interrupted", file=sys.stderr)
        return 130


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    from deeplab_fast import __version__

    parser = ArgumentParser(
        prog=_PROGRAM,
        description="DeepLabv3: semantic segmentation of photos.",
        version=f"{_PROGRAM} {__version__}",
    )
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand(
        "predict", _predict_parser(), help="segment photos: label maps, overlays, class areas"
    )
    commands.add_subcommand(
        "eval", _eval_parser(), help="score a model on a labelled data set: mIoU and more"
    )
    commands.add_subcommand(
        "train", _train_parser(), help="train a model: the paper's protocol, or your own"
    )
    commands.add_subcommand(
        "check-data", _check_data_parser(), help="find unreadable photos and wrong labels"
    )
    commands.add_subcommand(
        "tune", _tune_parser(), help="check and measure the GPU kernels on the GPU at hand"
    )
    commands.add_subcommand(
        "info", ArgumentParser(), help="versions, devices, and which implementations run"
    )
    commands.add_subcommand("models", ArgumentParser(), help="names that --model takes")
    return parser


def _predict_parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        description="Segments photos. For each, writes STEM_labels.png (class ids under a palette),"
        " STEM_overlay.png and STEM.json (class areas) into the output folder. An image that"
        " cannot be read is reported, the others are done, and the exit status is 1, as it is where"
        " logits were NaN or infinite."
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add("paths", nargs="+", type=str, metavar="PATH", help="files, folders or glob patterns")
    add("--output", type=str | None, metavar="DIR", help="folder for the results (required)")
    _add_model_arguments(add)
    add(
        "--classes",
        type=str | None,
        metavar="NAME|FILE",
        help="voc, coco-voc, cityscapes, ade20k, camvid, or a file with a name a line, JSON, YAML",
    )
    _add_pass_arguments(add)
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
        help="start the last layers anew where the number of classes differs (needs training "
        "before results mean anything)",
    )
    return parser


def _eval_parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        description="Scores a model on a labelled data set: mean IoU (classes that occur neither in"
        " labels nor predictions left out), IoU and accuracy by class, pixel accuracy, mean"
        " accuracy, frequency-weighted IoU. Prints a table; with --output writes metrics.json,"
        " confusion.png and panels. Under torchrun the processes share the images. The exit status"
        " is 1 where logits were NaN or infinite: the scores are marked."
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    _add_data_arguments(add)
    _add_model_arguments(add)
    _add_pass_arguments(add)
    add("--batch-size", type=int, default=1, metavar="N", help="images of one size, or windows")
    add(
        "--size",
        type=int | None,
        metavar="N",
        help="shorter side of the network's input, 0 for the photo's own size; default: the "
        "model's; labels always have their own size",
    )
    add("--output", type=str | None, metavar="DIR", help="folder for the results")
    add(
        "--panels",
        type=int,
        default=0,
        metavar="N",
        help="pictures photo | labels | prediction of the N worst and the N best images",
    )
    return parser


def _train_parser() -> Any:
    import dataclasses
    from typing import get_type_hints

    from jsonargparse import ArgumentParser

    from deeplab_fast.engine.config import PRESETS, TrainConfig

    parser = ArgumentParser(
        description="Trains a model into the folder --output: config.yaml (runs again with"
        " --config), versions.json, metrics.jsonl, tensorboard/, checkpoints/last.ckpt and"
        " best.ckpt, and at the end model.safetensors (for predict and eval) and result.json."
        " SIGTERM and Ctrl+C save and stop; --resume goes on with the same result. Under torchrun"
        " or SLURM the processes share each batch. Needs pip install deeplab_fast[train]."
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add(
        "--preset",
        type=str | None,
        metavar="NAME",
        help=f"{', '.join(PRESETS)}: values that the options below go before",
    )
    add(
        "--stages",
        type=int,
        default=1,
        metavar="1|2",
        help="2 adds the paper's second stage in OUTPUT/stage2, after OUTPUT/stage1: batch norm "
        "frozen, output stride 8, a tenth of the learning rate",
    )
    add(
        "--stage2",
        type=dict[str, Any],
        default={},
        metavar="MAP",
        help="options of the second stage: --stage2.steps 10000",
    )
    add("--resume", action="store_true", help="go on from checkpoints/last.ckpt, if there is one")
    add(
        "--validate-only",
        action="store_true",
        help="score --weights (or the untrained model) on the validation data, train nothing",
    )
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory() if callable(field.default_factory) else None
        note = "" if default in (None, {}, []) else f" (default: {_shown(default)})"
        metavar = field.metadata["metavar"]
        add(
            "--" + field.name.replace("_", "-"),
            # Not given is told from given: a preset's value goes between.
            type=hints[field.name] | None,
            default=None,
            help=field.metadata["help"] + note,
            **({"metavar": metavar} if metavar else {}),
        )
    return parser


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _check_data_parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        description="Reads every photo and mask of a data set and reports unreadable files, sizes"
        " that differ, labels that are no class and empty masks, all at once. The exit status is 1"
        " where there are any."
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    _add_data_arguments(add)
    add("--allow-empty", action="store_true", help="masks may be ignored in every pixel")
    return parser


def _tune_parser() -> Any:
    from jsonargparse import ArgumentParser

    from deeplab_fast.tuning import api

    parser = ArgumentParser(
        description="Checks every GPU kernel of the package on the GPU at hand and measures it"
        " beside PyTorch's, each in a process of its own, and keeps the verdicts: from then on"
        " those that are right and faster run by themselves. Prints a table. The exit status is 1"
        " where a kernel failed, 2 where there is no GPU."
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add("--model", type=str | None, metavar="NAME", help="take the sizes of this model; default: "
        + ", ".join(name for name, _ in api.USUAL_MODELS))  # fmt: skip
    add("--size", type=list[int] | None, metavar="[H,W]", help="size of its images; default: "
        "520x520")  # fmt: skip
    add("--batches", type=list[int], default=list(api.BATCHES), metavar="[N,...]",
        help="images of a call")  # fmt: skip
    add("--dtypes", type=list[str], default=["bfloat16"], metavar="[NAME,...]",
        help=", ".join(api.DTYPES))  # fmt: skip
    add("--ops", type=list[str] | None, metavar="[NAME,...]", help="these ops alone")
    add("--backends", type=list[str], default=list(api.BACKENDS), metavar="[NAME,...]",
        help=", ".join(api.BACKENDS))  # fmt: skip
    add("--quick", action="store_true", help="one form and size of each op")
    add("--budget", type=float | None, metavar="SECONDS", help="of everything; default: "
        f"{api.SECONDS:.0f} for a model, {api.QUICK_SECONDS:.0f} with --quick, "
        f"{api.ALL_SECONDS:.0f} for the usual models")  # fmt: skip
    add("--configurations", action="store_true", help="measure launch configurations as well")
    return parser


def _add_data_arguments(add: Any) -> None:
    add(
        "--data",
        type=str | None,
        metavar="NAME|FILE",
        help="voc, cityscapes, ade20k, camvid, coco-voc, folder (images/ and masks/), a .csv of "
        "pairs, or a YAML file with name, root, classes, label_map (required)",
    )
    add("--root", type=str | None, metavar="DIR", help="folder of the data")
    add(
        "--split",
        type=str | None,
        metavar="NAME",
        help="default: val; all of a folder or csv",
    )
    add(
        "--classes",
        type=str | None,
        metavar="NAME|FILE|N",
        help="class names for a folder or csv: a built-in set, a file, or a number; 1, or one "
        "name, is a class beside the background: masks of 0 and 1",
    )
    add(
        "--label-map",
        type=str | None,
        metavar="RAW=ID,...",
        help="values of the masks that stand for others, e.g. 255=1; others stay as they are",
    )
    add("--ignore-index", type=int | None, metavar="N", help="label that is not counted")
    add("--workers", type=int, default=0, metavar="N", help="processes that read")


def _add_model_arguments(add: Any) -> None:
    add(
        "--weights",
        type=str | None,
        metavar="NAME|FILE",
        help="trained weights (required): camvid, the embedded model for road scenes, or a file",
    )
    add(
        "--weights-part",
        type=str | None,
        metavar="NAME",
        help="network of a file with several: model_ema, teacher, ...",
    )
    add(
        "--model",
        type=str | None,
        metavar="NAME",
        help="see 'deeplab-fast models'; default: what the weights file is for",
    )
    add("--num-classes", type=int | None, metavar="N", help="default: as the weights have")
    add("--device", type=str, default="auto", metavar="cpu|cuda|auto")
    add(
        "--dtype",
        type=str | None,
        metavar="fp32|bf16|fp16",
        help="default: as the weights are; bf16 and fp16 run under autocast",
    )
    add(
        "--output-stride",
        type=int | None,
        metavar="8|16",
        help="run at this one, the atrous rates scaled with it; default: as the weights have",
    )
    add(
        "--backend",
        type=str | None,
        metavar="NAME",
        help="auto, cuda, triton, cpu or reference; default: auto, or DEEPLAB_FAST_BACKEND",
    )


def _add_pass_arguments(add: Any) -> None:
    add(
        "--scales",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="S",
        help="mean of the probabilities over these input scales; the paper's: "
        "0.5 0.75 1 1.25 1.5 1.75",
    )
    add("--flip", action="store_true", help="also run the left-right flipped image")
    add(
        "--tile",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="sliding windows of this many pixels, for images too large to run whole",
    )
    add(
        "--overlap",
        type=float,
        default=0.25,
        metavar="F",
        help="part of a window that the next one covers again, 0 to 1",
    )
    add(
        "--threshold",
        type=float | None,
        metavar="P",
        help="of models of one class: the probability above which a pixel is of it; default: 0.5",
    )


def _info(config: Any) -> int:
    from deeplab_fast import info

    return info.main()


def _tune(config: Any) -> int:
    from deeplab_fast.tuning import api

    if config.size is not None and len(config.size) != 2:
        raise _UsageError(f"--size is {config.size}; expected [height,width]")
    options = {
        name: config[name]
        for name in (
            "batches", "dtypes", "ops", "backends", "quick", "budget", "configurations",
        )
    }  # fmt: skip
    try:
        tuning = api.tune(
            config.model,
            config.size and tuple(config.size),
            progress=sys.stderr.isatty(),
            **options,
        )
    except (ValueError, api.NoDevice) as error:
        raise _UsageError(str(error)) from error
    print(tuning)
    return 1 if any(record.verdict == "failed" for record in tuning.records) else 0


def _models(config: Any) -> int:
    from deeplab_fast.models import list_models

    print("\n".join(list_models()))
    return 0


def _predict(config: Any) -> int:
    job = _prepare(config)
    return _run(job)


@dataclass(frozen=True)
class _Job:
    paths: tuple[Path, ...]
    stems: tuple[str, ...]
    output: Path
    model: Any
    model_name: str
    classes: Any
    arguments: dict[str, Any]
    backend: str | None


def _prepare(config: Any) -> _Job:
    """Everything that can fail for want of good arguments, before anything is written."""
    from deeplab_fast.data.images import list_images
    from deeplab_fast.engine.predict import PredictOptions, check_device, check_dtype

    if not config.paths:
        raise _UsageError("no images given: name files, folders or glob patterns")
    if not config.output:
        raise _UsageError("--output DIR is missing: where shall the results go?")
    _need_weights(config)
    output = Path(config.output)
    try:
        options = PredictOptions.checked(
            scales=config.scales,
            flip=config.flip,
            tile=config.tile,
            overlap=config.overlap,
            threshold=config.threshold,
        )
        device = check_device(_device_name(config.device))
        check_dtype(config.dtype)
        paths = _inputs(list_images(config.paths), config.paths, output)
    except (ValueError, OSError) as error:
        raise _UsageError(str(error)) from error
    _check_size(config)
    model, name = _load_model(config, "predict")
    _check_classes(options, model)
    classes = _classes(config, model, name)
    _apply_size(config, model)
    model.to(device).eval()
    return _Job(
        paths=tuple(paths),
        stems=tuple(_unique_stems(paths)),
        output=output,
        model=model,
        model_name=name,
        classes=classes,
        arguments={
            "scales": options.scales,
            "flip": options.flip,
            "tile": options.tile,
            "overlap": options.overlap,
            "threshold": options.threshold,
            "dtype": config.dtype,
        },
        backend=config.backend,
    )


def _check_classes(options: Any, model: Any) -> None:
    try:
        options.check_classes(model)
    except ValueError as error:
        raise _UsageError(str(error)) from error


def _need_weights(config: Any) -> None:
    from deeplab_fast.weights import list_embedded

    if not config.weights:
        raise _UsageError(
            "--weights is missing, and untrained weights give meaningless labels. Pass the name of "
            f"an embedded model ({', '.join(list_embedded())}) or a .pth or .safetensors file of a "
            "trained DeepLabv3 (deeplab_fast, torchvision, segmentation-models-pytorch, "
            "mmsegmentation, VainF, jfzhang95, fregu856, TensorFlow Lite MobileNetV2)"
        )


def _check_size(config: Any) -> None:
    if config.size is not None and config.size < 0:
        raise _UsageError(f"--size is {config.size}, expected pixels above 0, or 0 for no resizing")


def _apply_size(config: Any, model: Any) -> None:
    if config.size is not None:
        model.preprocess = replace(model.preprocess, size=config.size or None)


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
        for stem in _unique_stems(found)
        for path in output_paths(output, stem).values()
    }
    for path in found:
        if os.path.realpath(path) in written:
            raise ValueError(
                f"the results would overwrite the image {path}; name another --output folder"
            )
    return list(found)


def _unique_stems(paths: Sequence[Path]) -> list[str]:
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


def _device_name(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _load_model(config: Any, command: str) -> tuple[Any, str]:
    """The model that ``--weights`` is for, at ``--output-stride``, and its name."""
    from deeplab_fast import backends
    from deeplab_fast.models import get_model, list_models
    from deeplab_fast.weights import (
        embedded_path,
        inspect_weights,
        list_embedded,
        load_weights,
        restore_settings,
        warn_of_assumptions,
    )

    if config.backend is not None and config.backend not in ("auto", *backends.BACKENDS):
        raise _UsageError(
            f"no backend is named {config.backend!r}; allowed: auto, {', '.join(backends.BACKENDS)}"
        )
    if config.output_stride not in (None, 8, 16):
        raise _UsageError(f"--output-stride is {config.output_stride}, expected 8 or 16")
    if config.num_classes is not None and config.num_classes < 1:
        raise _UsageError(f"--num-classes is {config.num_classes}, expected 1 or more")
    if config.model is not None and config.model not in list_models():
        raise _UsageError(
            f"no model is named {config.model!r}; there are: {', '.join(list_models())}"
        )
    reset_head = bool(config.get("reset_head"))
    weights = config.weights
    if weights in list_embedded():
        weights = embedded_path(weights)
    elif not Path(weights).exists():
        raise _UsageError(
            f"--weights {weights}: no such file, and no embedded model of that name; there are: "
            f"{', '.join(list_embedded())}"
        )
    try:
        found = inspect_weights(weights, part=config.weights_part)
        name = config.model or found.model
        if name is None:
            raise _UsageError(
                f"--weights {config.weights} (layout {found.layout}) does not tell which model it "
                f"is for; name it with --model: {', '.join(list_models())}"
            )
        # Options found for one model say nothing about another.
        options = dict(found.options) if name == found.model else {}
        classes = config.num_classes or found.num_classes
        if classes is not None:
            options["num_classes"] = classes
        model: Any = get_model(name, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if name == found.model:
                restore_settings(model, found)
            load_weights(model, weights, part=config.weights_part, reset_head=reset_head)
            given = () if config.output_stride is None else ("output_stride",)
            if name == found.model:
                warn_of_assumptions(model, found, given, str(weights), 1)
        # After loading: atrous rates that the file tells belong to the stride it was trained at.
        if config.output_stride is not None:
            model.set_output_stride(config.output_stride)
    # A file that is no checkpoint, or one that does not fit, or an option the model lacks.
    except (ValueError, OSError, RuntimeError, TypeError, KeyError) as error:
        raise _UsageError(str(error)) from error
    for warning in caught:
        _tell(command, f"warning: {warning.message}")
    if reset_head:
        _tell(
            command,
            "warning: --reset-head: the last layer has random weights; labels mean nothing before "
            "it is trained",
        )
    if found.notes and not found.untold:
        _tell(command, f"note on the weights: {found.notes}")
    return model, name


def _classes(config: Any, model: Any, name: str) -> Any:
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
        raise _UsageError(str(error)) from error
    usual = _USUAL_CLASS_SETS.get(model.num_classes)
    if usual is None:
        return generic_classes(model.num_classes).of_labels()
    _tell(
        "predict",
        f"the weights name no classes; {model.num_classes} classes are taken to be {usual} "
        "(--classes names others)",
    )
    return class_set(usual)


def _tell(command: str, message: str) -> None:
    print(f"{_PROGRAM} {command}: {message}", file=sys.stderr)


def _open_data(config: Any) -> Any:
    from deeplab_fast.data.datasets import open_dataset, parse_label_map

    if not config.data:
        raise _UsageError(
            "--data NAME is missing: voc, cityscapes, ade20k, camvid, coco-voc, folder, a .csv of "
            "pairs or a YAML file"
        )
    if config.workers < 0:
        raise _UsageError(f"--workers is {config.workers}, expected 0 or more")
    try:
        given: dict[str, Any] = {}
        if config.label_map is not None:
            given = {"label_map": parse_label_map(config.label_map), "unmapped": "keep"}
        return open_dataset(
            config.data,
            config.root,
            config.split,
            classes=config.classes,
            ignore_index=config.ignore_index,
            **given,
        )
    except (ValueError, OSError, ImportError) as error:
        raise _UsageError(str(error)) from error


def _check_data(config: Any) -> int:
    from deeplab_fast.data.check import check_dataset

    dataset = _open_data(config)
    report = check_dataset(dataset, workers=config.workers, progress=True)
    print(report.table())
    for note in report.notes:
        _tell("check-data", f"warning: {note}")
    bad = report.bad(allow_empty=config.allow_empty)
    for problem in bad:
        _tell("check-data", problem.message)
    odd = f", {len(report.notes)} warnings" if report.notes else ""
    print(f"{dataset}: {len(bad)} problems{odd}")
    return 1 if bad else 0


def _eval(config: Any) -> int:
    from deeplab_fast import use_backend
    from deeplab_fast.backends import BackendUnavailable
    from deeplab_fast.data.classes import label_count
    from deeplab_fast.engine.evaluate import evaluate
    from deeplab_fast.engine.predict import PredictOptions, check_device, check_dtype

    _need_weights(config)
    _check_size(config)
    with _processes(config) as (rank, device_name):
        try:
            device = check_device(device_name)
            check_dtype(config.dtype)
            options = PredictOptions.checked(
                config.scales,
                config.flip,
                config.tile,
                config.overlap,
                config.batch_size,
                threshold=config.threshold,
            )
            if config.panels < 0:
                raise ValueError(f"--panels is {config.panels}, expected 0 or more")
            if config.panels and not config.output:
                raise ValueError("--panels needs --output DIR: where shall the pictures go?")
            if config.output and Path(config.output).exists() and not Path(config.output).is_dir():
                raise ValueError(f"--output {config.output} is a file; name a folder")
        except ValueError as error:
            raise _UsageError(str(error)) from error
        dataset = _open_data(config)
        model, name = _load_model(config, "eval")
        _check_classes(options, model)
        if label_count(model.num_classes) != dataset.num_classes:
            raise _UsageError(
                f"the weights have {model.num_classes} classes and the data set {config.data} "
                f"{dataset.num_classes}; evaluate them on the classes they were trained on"
            )
        _apply_size(config, model)
        try:
            with (
                use_backend(config.backend) if config.backend else nullcontext(),
                warnings.catch_warnings(record=True) as caught,
            ):
                warnings.simplefilter("always")
                result = evaluate(
                    model,
                    dataset,
                    scales=config.scales,
                    flip=config.flip,
                    tile=config.tile,
                    overlap=config.overlap,
                    batch_size=config.batch_size,
                    workers=config.workers,
                    device=device,
                    dtype=config.dtype,
                    panels=config.panels,
                    progress=sys.stderr.isatty(),
                    threshold=config.threshold,
                )
        except BackendUnavailable as error:
            raise _UsageError(str(error)) from error
        except (ValueError, MemoryError) as error:
            _tell("eval", str(error))
            return 1
        status = 1 if result.metrics.not_finite else 0
        if rank > 0:
            return status
        for warning in caught:
            _tell("eval", f"warning: {warning.message}")
        print(result.metrics.table())
        if config.output:
            try:
                paths = result.save(config.output, builder=name, weights=str(config.weights))
            except OSError as error:
                _tell("eval", f"cannot write: {error}")
                return 1
            print(f"{len(dataset)} images scored, results in {paths['metrics'].parent}")
    return status


def _train(config: Any) -> int:
    from tqdm import tqdm

    from deeplab_fast.backends import BackendUnavailable
    from deeplab_fast.engine.config import train_config
    from deeplab_fast.engine.train import TrainingUnavailable, fit_stages, validate

    given = config.as_dict() if hasattr(config, "as_dict") else dict(config)
    own = ("config", "preset", "stages", "stage2", "resume", "validate_only")
    options = {k: v for k, v in given.items() if k not in own and v is not None}
    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        plan = train_config(config.preset, **options)
        if config.validate_only:
            metrics = validate(plan, progress=sys.stderr.isatty())
            print(metrics.table())
            return 1 if metrics.not_finite else 0
        results = fit_stages(
            plan,
            stages=config.stages,
            stage2=dict(config.stage2 or {}),
            resume=config.resume,
            # Above a bar, where there is one.
            tell=(lambda text: tqdm.write(text, file=sys.stdout)) if first else None,
            progress=first and sys.stderr.isatty(),
        )
    except (TrainingUnavailable, BackendUnavailable) as error:
        raise _UsageError(str(error)) from error
    except (ValueError, FileNotFoundError) as error:
        raise _UsageError(str(error)) from error
    except (MemoryError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and text.startswith("[Errno") and error.errno == errno.ENOSPC:
            text = (
                f"{text}: {config.output}; its checkpoints are whole: make room, then go on with "
                "--resume"
            )
        _tell("train", text)
        return 1
    except RuntimeError as error:
        from deeplab_fast.engine.module import NonFiniteLoss

        if not isinstance(error, NonFiniteLoss):
            raise
        _tell("train", str(error))
        return 1
    result = results[-1]
    if first and result.metrics is not None:
        print(result.metrics.table())
    if result.finished:
        if first:
            print(f"{result.steps} steps done, the model is {result.weights}")
        return 1 if result.metrics is not None and result.metrics.not_finite else 0
    if first:
        print(f"{result.stopped}, {result.steps} steps done; --resume goes on in {result.folder}")
    return {"SIGINT": 130, "SIGTERM": 143}.get((result.stopped or "").rsplit(" ", 1)[-1], 0)


@contextmanager
def _processes(config: Any) -> Iterator[tuple[int, str]]:
    """Rank and device name; under torchrun the processes are joined for the duration."""
    import torch
    import torch.distributed as dist

    device = _device_name(config.device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ or dist.is_initialized():
        yield dist.get_rank() if dist.is_available() and dist.is_initialized() else 0, device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield dist.get_rank(), device
    finally:
        dist.destroy_process_group()


def _run(job: _Job) -> int:
    from tqdm import tqdm

    from deeplab_fast import use_backend
    from deeplab_fast.backends import BackendUnavailable
    from deeplab_fast.data.images import ImageReadError
    from deeplab_fast.engine.finite import NotFiniteWarning

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
                    bar.write(f"{_PROGRAM} predict: warning: {warning}", file=sys.stderr)
            except ImageReadError as error:
                failed += 1
                bar.write(f"{_PROGRAM} predict: {error}", file=sys.stderr)
            except BackendUnavailable as error:
                raise _UsageError(str(error)) from error
            except MemoryError:
                failed += 1
                bar.write(f"{_PROGRAM} predict: {path}: {_OUT_OF_MEMORY}", file=sys.stderr)
            except OSError as error:
                # The next image would fail alike: a full disk, a folder that cannot be written.
                print(f"{_PROGRAM} predict: cannot write: {error}", file=sys.stderr)
                return 1
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                failed += 1
                bar.write(f"{_PROGRAM} predict: {path}: {_OUT_OF_MEMORY}", file=sys.stderr)
    done = len(job.paths) - failed
    problems = f", {failed} failed" if failed else ""
    problems += f", {spoiled} with logits that are NaN or infinite" if spoiled else ""
    print(f"{done} of {len(job.paths)} images segmented into {job.output}{problems}")
    return 1 if failed or spoiled else 0


_OUT_OF_MEMORY = "not enough memory; use --tile H W, e.g. --tile 513 513, or --size"


def _segment(job: _Job, path: Path, stem: str) -> tuple[str, list[Warning]]:
    """One image's results written, its line of text, and what was warned of."""
    from deeplab_fast.data.images import read_image
    from deeplab_fast.engine.finite import NotFiniteWarning
    from deeplab_fast.engine.outputs import class_areas, write_outputs
    from deeplab_fast.engine.predict import predict

    image = read_image(path)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always", NotFiniteWarning)
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
    """The backend of the op that makes the labels, for logits of this photo's kind."""
    import torch

    from deeplab_fast import why

    model = job.model
    if model.num_classes == 1:
        # A sigmoid has no op of its own.
        return "reference"
    parameter = next(model.parameters())
    height, width = (max(1, n // model.output_stride) for n in size)
    logits = torch.empty(
        1, model.num_classes, height, width, device=parameter.device, dtype=parameter.dtype
    )
    return why("upsample_argmax", logits, size, align_corners=model.align_corners).chosen


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


_COMMANDS = {
    "predict": _predict,
    "eval": _eval,
    "train": _train,
    "check-data": _check_data,
    "tune": _tune,
    "info": _info,
    "models": _models,
}


if __name__ == "__main__":
    sys.exit(main())
