"""What several commands share: arguments, the model and data they name, messages."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Protocol, cast, get_type_hints

if TYPE_CHECKING:
    import torch
    from jsonargparse import ArgumentParser, Namespace

    from deeplab_fast import DeepLabV3
    from deeplab_fast.data.classes import ClassSet
    from deeplab_fast.data.datasets import SegmentationDataset
    from deeplab_fast.engine.adapter import AdaptedModel
    from deeplab_fast.engine.predict import PredictOptions

    Model = DeepLabV3 | AdaptedModel
    """What a command runs: a model of this package, or one that the user's code builds."""


PROGRAM = "deeplab-fast"


class Command(Protocol):
    """What a command's module has."""

    HELP: str

    def parser(self) -> ArgumentParser:
        """Its arguments."""

    def run(self, config: Namespace) -> int:
        """Carries it out and gives the exit status."""


class UsageError(Exception):
    """Arguments that cannot be carried out; the message says why."""


def in_options(error: Exception, config: Namespace) -> str:
    """What an error says of an argument, with the option that gave it: tile is, --tile is."""
    text = str(error)
    name = text.partition(" ")[0]
    return f"--{name.replace('_', '-')}{text.removeprefix(name)}" if name in config else text


def tell(command: str, message: str) -> None:
    print(f"{PROGRAM} {command}: {message}", file=sys.stderr)


_DATA_FIELDS = (
    *("mask_colours", "unknown_colours", "images", "masks", "mask_suffix"),
    *("val_fraction", "split_seed", "group_by"),
)


def add_data_arguments(add: Callable[..., object]) -> None:
    from deeplab_fast.engine.config import TrainConfig

    add(
        "--data",
        type=str | None,
        metavar="NAME|DIR|FILE",
        help=f"{_data_names()}; or your own: a folder of photos and masks, a .csv of pairs, or a "
        "YAML file with name, root, classes, label_map (required)",
    )
    add("--root", type=str | None, metavar="DIR", help="folder of the data")
    add(
        "--split",
        type=str | None,
        metavar="NAME",
        help="default: val; all of a folder or csv without parts, of which train and val are "
        "made by --val-fraction; all: everything in a folder or csv",
    )
    add(
        "--classes",
        type=str | None,
        metavar="NAMES|SET|FILE|N",
        help="class names for a folder or csv: a,b,c, a built-in set, a file, or a number; 1, or "
        "one name (a,), is a class beside the background: masks of 0 and 1",
    )
    add(
        "--label-map",
        type=str | None,
        metavar="RAW=ID,...",
        help="values of the masks that stand for others, e.g. 255=1; others stay as they are",
    )
    add("--ignore-index", type=int | None, metavar="N", help="label that is not counted")
    # As 'deeplab-fast train' has them, so that both find and split data alike.
    for field in fields(TrainConfig):
        if field.name in _DATA_FIELDS:
            add(
                "--" + field.name.replace("_", "-"),
                type=get_type_hints(TrainConfig)[field.name],
                metavar=field.metadata["metavar"],
                help=field.metadata["help"],
            )
    add("--workers", type=int, default=0, metavar="N", help="processes that read")


def _data_names() -> str:
    from deeplab_fast.data.datasets import DATASETS

    return ", ".join(name for name in DATASETS if name != "csv")


def add_model_arguments(add: Callable[..., object]) -> None:
    add_weights_arguments(add)
    add_own_model_arguments(add)
    add(
        "--no-accelerate",
        action="store_true",
        help="run the model of --model-from as it is, without deeplab_fast.accelerate",
    )
    add_normalisation_arguments(add)
    add("--device", type=str, default="auto", metavar="cpu|cuda|auto")
    add(
        "--dtype",
        type=str | None,
        metavar="fp32|bf16|fp16",
        help="default: as the weights are; bf16 and fp16 run under autocast",
    )
    add(
        "--precision",
        type=str | None,
        metavar="fp32|bf16|int8",
        help="what is computed in on a CPU; default: fp32. bf16 where the CPU has instructions for "
        "it, int8 with weights that 'deeplab-fast calibrate' wrote",
    )
    add(
        "--backend",
        type=str | None,
        metavar="NAME",
        help="auto, cuda, triton, cpu or reference; default: auto, or DEEPLAB_FAST_BACKEND",
    )


def add_own_model_arguments(add: Callable[..., object]) -> None:
    add(
        "--model-from",
        type=str | None,
        metavar="MODULE:FUNCTION",
        help="a model of any library that your own code builds: a function without arguments that "
        "returns a torch.nn.Module, in a module or FILE.py; --weights, if given, are its own",
    )
    add_imports_argument(add)


def add_imports_argument(add: Callable[..., object]) -> None:
    add(
        "--allow-imports",
        action="store_true",
        help="also import code that a file names, --config or the config.yaml of a run: for files "
        "that you trust",
    )


def add_normalisation_arguments(add: Callable[..., object]) -> None:
    add(
        "--mean",
        type=float,
        nargs=3,
        metavar=("R", "G", "B"),
        help="what is subtracted from the 0..1 image; default: the model's, or ImageNet's",
    )
    add(
        "--std",
        type=float,
        nargs=3,
        metavar=("R", "G", "B"),
        help="what it is divided by then; default: the model's, or ImageNet's",
    )


def add_weights_arguments(add: Callable[..., object]) -> None:
    add(
        "--weights",
        type=str | None,
        metavar="NAME|FILE|RUN",
        help="trained weights: camvid, the embedded model for road scenes, a file, or the folder "
        "of a training run (required without --model-from)",
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
    add(
        "--output-stride",
        type=int | None,
        metavar="8|16",
        help="run at this one, the atrous rates scaled with it; default: as the weights have",
    )


def check_precision(config: Namespace, model: Model, device: torch.device | None) -> None:
    """Raises UsageError for a --precision that the model cannot run in."""
    import torch

    from deeplab_fast.engine.runner import check_precision_of

    try:
        check_precision_of(model, config.precision, config.dtype, device or torch.device("cpu"))
    except ValueError as error:
        raise UsageError(f"--precision: {error}") from error


def add_unpainted_argument(add: Callable[..., object]) -> None:
    add(
        "--unpainted",
        type=str | None,
        metavar="CLASSES",
        help="names or ids of classes, with commas, whose pixels the pictures leave as in the "
        "photo, or none; default: the class named background, unlabelled or void",
    )


def unpainted_ids(config: Namespace, classes: ClassSet) -> tuple[int, ...] | None:
    """What --unpainted names, None where it is not given."""
    if config.unpainted is None:
        return None
    try:
        return classes.ids_of(config.unpainted)
    except ValueError as error:
        raise UsageError(f"--unpainted: {error}") from error


def add_pass_arguments(add: Callable[..., object]) -> None:
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
        help="sliding windows of this many pixels of the network's input, cut from the photo at "
        "the model's scale (--size), for images too large to run whole",
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


def check_classes(options: PredictOptions, model: Model) -> None:
    try:
        options.check_classes(model)
    except ValueError as error:
        # It says what the threshold is.
        raise UsageError(f"--{error}") from error


def need_weights(config: Namespace) -> None:
    from deeplab_fast.weights import list_embedded

    if not config.weights and not config.get("model_from"):
        raise UsageError(
            "--weights is missing, and untrained weights give meaningless labels. Pass the name of "
            f"an embedded model ({', '.join(list_embedded())}), the folder of a training run, or a "
            ".pth or .safetensors file of a trained DeepLabv3 (deeplab_fast, torchvision, "
            "segmentation-models-pytorch, mmsegmentation, VainF, jfzhang95, fregu856, TensorFlow "
            "Lite MobileNetV2), or a model of your own with --model-from MODULE:FUNCTION"
        )


def check_preprocess(config: Namespace) -> None:
    from deeplab_fast.data.preprocess import Preprocess

    if config.size is not None and config.size < 0:
        raise UsageError(f"--size is {config.size}, expected pixels above 0, or 0 for no resizing")
    for name in ("mean", "std"):
        if config.get(name) is not None:
            try:
                Preprocess(**{name: config[name]})
            except ValueError as error:
                raise UsageError(f"--{name}: {error}") from error


def apply_preprocess(config: Namespace, model: Model) -> None:
    """``--size``, ``--mean`` and ``--std`` in place of the model's own."""
    from deeplab_fast.data.preprocess import Preprocess
    from deeplab_fast.engine.adapter import AssumedPreprocess

    given = {name: tuple(config[name]) for name in ("mean", "std") if config.get(name) is not None}
    preprocess = model.preprocess
    # Where both are told nothing is assumed.
    if isinstance(preprocess, AssumedPreprocess) and len(given) == 2:
        preprocess = Preprocess(size=preprocess.size)
    size = preprocess.size if config.size is None else config.size or None
    model.preprocess = replace(preprocess, size=size, **given)


def check_backend(config: Namespace) -> None:
    from deeplab_fast import backends

    backend = config.get("backend")
    if backend is not None and backend not in ("auto", *backends.BACKENDS):
        raise UsageError(
            f"no backend is named {backend!r}; allowed: auto, {', '.join(backends.BACKENDS)}"
        )


def device_name(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def load_model(config: Namespace, command: str) -> tuple[DeepLabV3, str]:
    """The model that ``--weights`` is for, at ``--output-stride``, and its name."""
    from deeplab_fast.models import list_models
    from deeplab_fast.weights import find_weights, from_checkpoint, inspect_weights

    check_backend(config)
    if config.output_stride not in (None, 8, 16):
        raise UsageError(f"--output-stride is {config.output_stride}, expected 8 or 16")
    if config.num_classes is not None and config.num_classes < 1:
        raise UsageError(f"--num-classes is {config.num_classes}, expected 1 or more")
    if config.model is not None and config.model not in list_models():
        raise UsageError(
            f"no model is named {config.model!r}; there are: {', '.join(list_models())}"
        )
    reset_head = bool(config.get("reset_head"))
    try:
        weights = find_weights(config.weights)
        found = inspect_weights(weights, part=config.weights_part)
        name = config.model or found.model
        if name is None:
            raise UsageError(
                f"--weights {config.weights} (layout {found.layout}) does not tell which model it "
                f"is for; name it with --model: {', '.join(list_models())}"
            )
        classes = config.num_classes or found.num_classes
        options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            built = from_checkpoint(
                weights,
                model=name,
                part=config.weights_part,
                reset_head=reset_head,
                given=() if config.output_stride is None else ("output_stride",),
                **options,
            )
        model = cast("DeepLabV3", built)
        # After loading: atrous rates that the file tells belong to the stride it was trained at.
        if config.output_stride is not None:
            model.set_output_stride(config.output_stride)
    except FileNotFoundError as error:
        raise UsageError(f"--weights: {error}") from error
    # A file that is no checkpoint, or one that does not fit, or an option the model lacks.
    except (ValueError, OSError, RuntimeError, TypeError, KeyError) as error:
        raise UsageError(str(error)) from error
    for warning in caught:
        tell(command, f"warning: {warning.message}")
    if reset_head:
        tell(
            command,
            "warning: --reset-head: the last layer has random weights; labels mean nothing before "
            "it is trained",
        )
    if found.notes and not found.untold:
        tell(command, f"note on the weights: {found.notes}")
    return model, name


def open_data(
    config: Namespace,
    command: str,
    *,
    default_split: str | None = None,
    classes: Sequence[str] | None = None,
) -> SegmentationDataset:
    """The data that a command's options name.

    ``default_split`` and ``classes``, where the options give none, are of folders and tables.
    """
    from deeplab_fast.data.datasets import is_own_data, open_dataset, options_of

    if not config.data:
        raise UsageError(
            f"--data is missing: {_data_names()}, or your own: a folder of photos and masks, a "
            ".csv of pairs or a YAML file"
        )
    if config.workers < 0:
        raise UsageError(f"--workers is {config.workers}, expected 0 or more")
    split = config.split
    try:
        options = options_of(config.as_dict())
        if is_own_data(config.data):
            split = default_split if split is None else split
            if classes is not None and not {"classes", "mask_colours"} & options.keys():
                options["classes"] = classes
        dataset = open_dataset(config.data, config.root, split, **options)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error
    # Of several processes one says it.
    for note in dataset.notes if os.environ.get("RANK", "0") == "0" else ():
        tell(command, note)
    return dataset
