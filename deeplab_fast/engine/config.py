"""What a training run is made of: every option with its default, and the published recipes."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import sys
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from deeplab_fast._documents import shown

__all__ = ["MADE_IN_PYTHON", "NO_WEIGHTS", "PRESETS", "OptionError", "TrainConfig", "train_config"]

# What may be written for no class weights in a file or a command.
NO_WEIGHTS = ("none", "null", "")


MADE_IN_PYTHON = "made_in_python"
"""Marks, in a record, an object whose arguments are not known."""


class OptionError(ValueError):
    """A value that an option does not take: its name, and the rest of the sentence about it."""

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(option, problem)
        self.option = option
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.option} {self.problem}"


T = TypeVar("T")


def _help(text: str, metavar: str | None = None) -> dict[str, Any]:
    return {"help": text, "metavar": metavar}


def _option(default: T, text: str, metavar: str | None = None) -> T:
    return field(default=default, metadata=_help(text, metavar))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options of a training run; :func:`train_config` makes one from a preset and overrides.

    Lengths are in pixels, ``batch_size`` counts images of all processes together. Each field's
    metadata holds its help text, which ``deeplab-fast train --help`` shows.

    Raises:
        OptionError: an option out of its range; the message says what is allowed.
    """

    # Data.
    data: str | None = _option(
        None,
        "training data, as in 'deeplab-fast eval': a data set's name, or a folder or .csv of your "
        "own (required)",
        "NAME|DIR|FILE",
    )
    root: str | None = _option(None, "folder of the data", "DIR")
    split: str | None = _option(
        "train",
        "to train on: a part of the data, of a folder or csv without parts all that is not for "
        "validation; all: everything in a folder or csv",
        "NAME",
    )
    val_fraction: float | None = _option(
        None,
        "part of a folder or csv without parts that is for validation, 0 to 1, chosen by name; "
        "default: 0.2, or 0 with --val-data, --val-root or --val-every 0",
        "F",
    )
    split_seed: int | None = _option(
        None, "another choice of these by another number; default: 0", "N"
    )
    group_by: str | None = _option(
        None,
        "pictures of one group are on one side: prefix (the name before its last _ - . or /), or a "
        "regular expression whose first group, or match, in the name is the group",
        "prefix|REGEX",
    )
    images: str | None = _option(
        None, "name of a folder's folder of photos; default: images, or another usual one", "NAME"
    )
    masks: str | None = _option(
        None, "name of a folder's folder of masks; default: masks, or another usual one", "NAME"
    )
    mask_suffix: str | None = _option(
        None,
        "end of a folder's masks' names behind the photos': _mask of x_mask.png; default: as found",
        "TEXT",
    )
    data_options: dict[str, Any] = field(
        default_factory=dict,
        metadata=_help(
            "further options of the data set: --data-options.sequences '[\"0016E5\"]'", "MAP"
        ),
    )
    val_data: str | None = _option(None, "data to validate on; default: --data", "NAME|DIR|FILE")
    val_root: str | None = _option(
        None, "its folder; another than --root is validated on as a whole; default: --root", "DIR"
    )
    val_split: str | None = _option("val", "its split; all: everything in a folder or csv", "NAME")
    val_options: dict[str, Any] = field(
        default_factory=dict, metadata=_help("as --data-options, for validation", "MAP")
    )
    classes: list[str] | str | None = field(
        default=None,
        metadata=_help(
            "class names of a folder or csv: a,b,c, a built-in set, a file, or a number; 1, or one "
            "name (a,): a model of one logit, masks of 0 and 1; default: those of --weights",
            "NAMES|SET|FILE|N",
        ),
    )
    label_map: str | None = _option(
        None, "values of the masks that stand for others: 255=1,7=0; others stay", "RAW=ID,..."
    )
    mask_colours: str | None = _option(
        None,
        "masks are pictures whose colours stand for classes: a file with name r g b a line, CSV, "
        "JSON or YAML, or a built-in class set; gives the classes where --classes does not",
        "FILE|SET",
    )
    unknown_colours: str | None = _option(
        None, "other colours in masks: error or ignore; default: error", "WHAT"
    )
    ignore_index: int | None = _option(None, "label that counts for nothing", "N")
    check_data: bool = _option(True, "read all photos and masks before training")
    recheck: bool = _option(False, "read them also where they are unchanged since they passed")
    allow_empty: bool = _option(False, "masks may be ignored in every pixel")
    bootstrap: list[str | int] = field(
        default_factory=list,
        metadata=_help(
            "duplicate the images with these classes (names or numbers), or [rare]", "CLASSES"
        ),
    )
    bootstrap_factor: int = _option(2, "how often such an image occurs in an epoch", "N")
    workers: int = _option(0, "processes that read, of each training process", "N")

    # Augmentation.
    transform: str = _option(
        "paper",
        "paper (scale, flip, crop), torchvision (shorter side, flip, crop), none, or the import "
        "path of any callable: module.name of an installed package or of the current folder, also "
        "torchvision v2 and albumentations",
        "NAME|PATH",
    )
    transform_options: dict[str, Any] = field(
        default_factory=dict,
        metadata=_help("arguments to call that import path with, to make the transform", "MAP"),
    )
    transform_style: str | None = _option(
        None,
        "how that callable is called: generator (image, label, generator), pair (image, label), "
        "torchvision (v2) or albumentations; default: by where it comes from and its signature",
        "STYLE",
    )
    crop: int | list[int] = field(default=513, metadata=_help("side, or [height,width]", "N|[H,W]"))
    scale: list[float] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata=_help("range of the random scale (paper)", "[LOW,HIGH]"),
    )
    scale_step: float | None = _option(None, "draw the scale in steps of this", "S")
    base_size: int = _option(520, "shorter side at scale 1 (torchvision)", "N")
    flip: float = _option(0.5, "probability of the left-right flip", "P")
    colour_jitter: float = _option(
        0.0, "brightness, contrast and saturation by 1 - J to 1 + J", "J"
    )
    hue_jitter: float = _option(0.0, "hue by -J to J of a turn, 0 to 0.5", "J")
    copy_paste: list[str | int] = field(
        default_factory=list,
        metadata=_help(
            "classes (names or numbers) whose pixels of one image are put over another", "CLASSES"
        ),
    )
    copy_paste_probability: float = _option(0.5, "how often that is done", "P")

    # Model.
    model: str | None = _option(
        None,
        "see 'deeplab-fast models'; default: the one that --weights are of, else "
        "deeplabv3_resnet50",
        "NAME",
    )
    model_options: dict[str, Any] = field(
        default_factory=dict,
        metadata=_help("options of its builder: --model-options.atrous_rates [6,12,18]", "MAP"),
    )
    weights: str | None = _option(
        None,
        "start from these weights: an embedded model (camvid), a file of this or another library, "
        "or the folder of a run; the model, its options and preprocessing, and the class names of "
        "a folder or csv are those of the weights. Another number of classes starts the last "
        "layers anew",
        "NAME|FILE|RUN",
    )
    weights_part: str | None = _option(
        None, "network of a file with several: model_ema, teacher, ...", "NAME"
    )
    reset_head: bool = _option(False, "start the last layers anew, whatever --weights has for them")
    weights_backbone: str | None = _option(
        None, "start the backbone from these weights: a file, or torchvision's name", "FILE|NAME"
    )
    output_stride: int | None = _option(None, "in training; default: the model's own", "8|16")
    eval_output_stride: int | None = _option(
        None, "in validation and of the saved model; default: as in training", "8|16"
    )
    input_size: int | None = _option(
        None,
        "shorter side of photos: in validation, for the saved model, and at scale 1 of --transform "
        "paper; 0: their own; default: as --weights has it, else their own",
        "N",
    )
    freeze_batch_norm: bool = _option(
        False, "keep statistics and parameters of all batch norms as they are (stage 2)"
    )
    freeze_backbone_statistics: bool = _option(
        False, "keep the running statistics of the backbone's batch norms, for small batches"
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata=_help(
            "parts of the model that stay as they are: [backbone.stem,backbone.block0]", "NAMES"
        ),
    )
    batch_norm_momentum: float | None = _option(
        None, "weight of a new batch in the running statistics; the paper's: 0.0003", "M"
    )
    channels_last: bool = _option(True, "memory format of images and weights")
    fused: bool = _option(True, "the fused training forms: half of the activations")
    backend: str | None = _option(None, "auto, cuda, triton, cpu or reference", "NAME")
    cuda_graph: bool = _option(
        False, "capture a step as CUDA graphs, on one GPU; they keep the memory of a step"
    )

    # Loss.
    loss: str = _option(
        "cross_entropy",
        "cross_entropy (of one class: binary), hard_pixels, focal, dice or cross_entropy+dice",
        "KIND",
    )
    loss_labels: str = _option(
        "full", "full: logits upsampled; downsampled: labels reduced, as DeepLabv2", "SIZE"
    )
    class_weights: str | list[float] | None = field(
        default=None,
        metadata=_help(
            "median_frequency, inverse_log, or a list of one weight a class", "NAME|LIST"
        ),
    )
    undo_class_weights: float = _option(
        0.0,
        "part T of the class weights w that the saved model takes back: T log w off its last bias",
        "T",
    )
    label_smoothing: float = _option(0.0, "part of a label given to all classes", "F")
    top_k: float = _option(0.25, "fraction of the pixels that count (hard_pixels)", "F")
    min_kept: int = _option(0, "least number of pixels that count (hard_pixels)", "N")
    focal_gamma: float = _option(2.0, "exponent of the focal loss (focal)", "G")
    dice_weight: float = _option(1.0, "factor of Dice in cross_entropy+dice", "F")
    aux_weight: float = _option(0.0, "factor of the auxiliary head's loss; 0: no such head", "F")

    # Optimiser and schedule.
    optimizer: str = _option("sgd", "sgd or adamw", "NAME")
    lr: float = _option(0.007, "initial learning rate", "LR")
    momentum: float = _option(0.9, "of SGD; beta 1 of AdamW", "M")
    nesterov: bool = _option(False, "Nesterov's form of the momentum (SGD)")
    weight_decay: float = _option(1e-4, "L2 (SGD) or decoupled (AdamW)", "W")
    decay_norm_and_bias: bool = _option(False, "weight decay on batch norms and biases too")
    backbone_lr_factor: float = _option(1.0, "learning rate of the backbone over --lr", "F")
    aux_lr_factor: float = _option(1.0, "learning rate of the auxiliary head over --lr", "F")
    power: float = _option(0.9, "of the schedule (1 - step / steps) ** power", "P")
    warmup_steps: int = _option(0, "steps of a linear warm-up", "N")
    warmup_epochs: float = _option(0.0, "the same in epochs", "N")
    warmup_factor: float = _option(1e-3, "first learning rate of the warm-up over --lr", "F")
    clip_norm: float | None = _option(
        None, "largest norm of the gradient; .inf: it is measured only", "N"
    )
    ema: float = _option(
        0.0, "decay of averaged weights, which are validated and saved; 0: none", "D"
    )

    # Length and batches.
    epochs: int | None = _option(None, "passes over the data", "N")
    steps: int | None = _option(None, "steps of the optimiser, instead of epochs", "N")
    batch_size: int = _option(16, "images a step, of all processes together", "N")
    accumulate: int = _option(1, "parts that a step's images are run in, one after another", "N")
    seed: int = _option(0, "of weights, order and augmentation", "N")

    # Validation.
    val_every: int = _option(1, "epochs between validations; 0: none", "N")
    early_stopping: int | None = _option(
        None,
        "end after this many validations in a row without a better mIoU (the patience)",
        "PATIENCE",
    )
    val_batch_size: int = _option(1, "images of one size that run together", "N")

    # The run.
    output: str | None = _option(None, "folder of the run (required)", "DIR")
    max_time: str | None = _option(
        None,
        "stop, saved, after this long: 90m, 1.5h, 3600s, 01:30:00 or, with days, 00:01:30:00",
        "TIME",
    )
    checkpoint_minutes: float = _option(10.0, "time between checkpoints within an epoch", "M")
    export: str = _option(
        "best",
        "weights in model.safetensors: best (by val mIoU; without one the last) or last",
        "WHICH",
    )
    log_every: int = _option(
        10,
        "steps between lines in metrics.jsonl; what is printed comes at these steps, 10 s apart or "
        "more, and after 30 s at any",
        "N",
    )
    tensorboard: bool = _option(True, "also write TensorBoard's logs")
    pictures: bool = _option(
        True, "also draw curves, IoU by class, confusion matrix, a batch and panels of photos"
    )
    trainer: dict[str, Any] = field(
        default_factory=dict,
        metadata=_help(
            "arguments of lightning.Trainer: --trainer.devices 2 --trainer.precision bf16-mixed; "
            "callbacks and loggers by class and arguments: --trainer.callbacks '[{class_path: "
            "LearningRateMonitor, init_args: {logging_interval: epoch}}]'",
            "MAP",
        ),
    )

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            plain = _without_numpy(value)
            if plain is not value:
                object.__setattr__(self, each.name, plain)
        for problem in _problems(self):
            raise problem

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name, for YAML and JSON; objects given to the trainer by their class."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in values.items()}

    @property
    def crop_size(self) -> tuple[int, int]:
        """(height, width)."""
        if isinstance(self.crop, int):
            return self.crop, self.crop
        return self.crop[0], self.crop[1]

    @property
    def max_seconds(self) -> float | None:
        """``max_time`` in seconds."""
        return None if self.max_time is None else _seconds(self.max_time)


# arXiv 1706.05587, section 4.1. It gives no weight decay; that of the official code's train.py for
# ResNet is 0.0001 (0.00004 for MobileNet and Xception), on weights of convolutions only.
_PAPER: dict[str, Any] = {
    "model": "deeplabv3_resnet101",
    "model_options": {"head": "paper", "multi_grid": [1, 2, 4]},
    "optimizer": "sgd",
    "lr": 0.007,
    "momentum": 0.9,
    "power": 0.9,
    "weight_decay": 1e-4,
    "decay_norm_and_bias": False,
    "batch_size": 16,
    "steps": 30_000,
    "transform": "paper",
    "crop": 513,
    "scale": [0.5, 2.0],
    "flip": 0.5,
    "output_stride": 16,
    "eval_output_stride": 8,
    "batch_norm_momentum": 0.0003,
    "loss": "cross_entropy",
    "loss_labels": "full",
    # As published; the best by the validation's mIoU is chosen on what it is scored on.
    "export": "last",
}
# Section 4.1: "freeze batch normalization parameters, employ output stride = 8, ... smaller base
# learning rate = 0.001".
_STAGE2: dict[str, Any] = {"freeze_batch_norm": True, "output_stride": 8, "lr": 0.001}

# torchvision's references/segmentation, the published commands: 8 processes of 4 images at 0.02.
# Its warm-up is an option of the script, off in the published commands.
_TORCHVISION: dict[str, Any] = {
    "model": "deeplabv3_resnet50",
    "optimizer": "sgd",
    "lr": 0.02,
    "momentum": 0.9,
    "power": 0.9,
    "weight_decay": 1e-4,
    "decay_norm_and_bias": True,
    "batch_size": 32,
    "epochs": 30,
    "warmup_epochs": 1.0,
    "warmup_factor": 0.01,
    "transform": "torchvision",
    "base_size": 520,
    "crop": 480,
    "flip": 0.5,
    "aux_weight": 0.5,
    "aux_lr_factor": 10.0,
    "loss": "cross_entropy",
    "export": "last",
}

# The embedded model's: small batches on a CPU, so the backbone keeps its ImageNet statistics and
# its first blocks. Weighted cross entropy estimates w_c p(c | x) up to a factor; of two drives that
# were held out one was best with all of w taken back (logit adjustment, arXiv 2007.07314), one with
# little of it. Settings were chosen on held-out drives (the model's card), so that the last run has
# no photos to validate on.
_CAMVID: dict[str, Any] = {
    "data": "camvid",
    "split": "trainval",
    "val_every": 0,
    "model": "deeplabv3_efficientnet_lite0",
    "model_options": {"head": "paper", "aspp_channels": 192, "dropout": 0.1},
    "output_stride": 16,
    "input_size": 720,
    "freeze": ["backbone.stem", *(f"backbone.block{i}" for i in range(4))],
    "freeze_backbone_statistics": True,
    "batch_norm_momentum": 0.03,
    "crop": [384, 512],
    "scale": [0.5, 2.0],
    "colour_jitter": 0.5,
    "hue_jitter": 0.06,
    "copy_paste": ["pole", "signsymbol", "fence", "car", "pedestrian", "bicyclist"],
    "optimizer": "adamw",
    "lr": 0.001,
    "backbone_lr_factor": 0.5,
    "weight_decay": 0.02,
    "class_weights": "inverse_log",
    "undo_class_weights": 0.5,
    "loss": "cross_entropy+dice",
    "ema": 0.998,
    "warmup_steps": 100,
    "batch_size": 4,
    "steps": 3000,
    "export": "last",
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "paper-stage2": {**_PAPER, **_STAGE2},
    "torchvision": _TORCHVISION,
    "camvid": _CAMVID,
}

# Section 4.3: Cityscapes with larger crops, for longer.
_CITYSCAPES = {"crop": 769, "steps": 90_000}


def train_config(preset: str | None = None, **given: Any) -> TrainConfig:
    """Options from a preset, with others put above it.

    ========== ======================================================================
    preset     what it sets
    ========== ======================================================================
    paper      arXiv 1706.05587, section 4.1: SGD, lr 0.007, 30,000 steps of 16 crops of
               513 (Cityscapes: 769, 90,000 steps), output stride 16, validation at 8
    paper-stage2 the second stage: batch norm frozen, output stride 8, lr 0.001; start it
               from the first one's weights
    torchvision references/segmentation: shorter side 260 to 1040, crops of 480, 30 epochs of
               batches of 32, lr 0.02, auxiliary loss 0.5 at ten times the lr
    camvid     the embedded model (``deeplab_fast.load("camvid")``); takes a backbone's
               weights with ``weights_backbone``
    ========== ======================================================================

    Args:
        preset: a key of ``PRESETS``, or None.
        given: fields of :class:`TrainConfig`; ``epochs`` replaces a preset's ``steps`` and the
            other way round.

    Raises:
        OptionError: an unknown preset or field, or a value out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise OptionError(
            "preset", f"is {shown(repr(preset), 200)}, expected {one_of(preset, PRESETS)}"
        )
    known = [each.name for each in dataclasses.fields(TrainConfig)]
    for name in given:
        if name not in known:
            raise OptionError(name, f"is no option of a training run{did_you_mean(name, known)}")
    values = dict(PRESETS[preset]) if preset else {}
    if preset and preset.startswith("paper") and given.get("data") == "cityscapes":
        values.update(_CITYSCAPES)
    for one, other in (("epochs", "steps"), ("steps", "epochs")):
        if given.get(one) is not None and given.get(other) is None:
            values.pop(other, None)
    if given.get("data", values.get("data")) != values.get("data"):
        # A preset's split and names of classes are those of its data.
        for name in ("split", "val_every", "copy_paste"):
            values.pop(name, None)
    if given.get("model") is None and given.get("weights") is not None:
        # The weights tell the model; a preset's is for a start without any.
        values.pop("model", None)
    if given.get("model", values.get("model")) != values.get("model") or "model" not in values:
        # A preset's builder options are those of its model.
        values.pop("model_options", None)
    return TrainConfig(**{**values, **given})


LONGEST_SIDE = 16384
"""Pixels of a side that options may name."""

_LARGEST_SCALE = 64
_LONGEST_SECONDS = 3650 * 86400
_MANY = 10**9

# Both ends are allowed.
_INTEGERS = {
    "split_seed": (-(2**63), 2**64 - 1),
    "ignore_index": (-(2**31), 2**31 - 1),
    "bootstrap_factor": (1, 1000),
    "workers": (0, 1024),
    "base_size": (1, LONGEST_SIDE),
    "input_size": (0, LONGEST_SIDE),
    "min_kept": (0, _MANY),
    "warmup_steps": (0, _MANY),
    "epochs": (1, _MANY),
    "steps": (1, _MANY),
    "batch_size": (1, 65536),
    "accumulate": (1, 65536),
    "val_batch_size": (1, 65536),
    # PyTorch's.
    "seed": (-(2**63), 2**64 - 1),
    "val_every": (0, _MANY),
    "early_stopping": (1, _MANY),
    "log_every": (1, _MANY),
}


class _Interval(NamedTuple):
    """Finite numbers from ``low`` to ``high``, with or without itself; ``endless`` adds inf."""

    low: float
    high: float = math.inf
    with_low: bool = True
    with_high: bool = True
    endless: bool = False

    def has(self, value: float) -> bool:
        if self.endless and value == math.inf:
            return True
        # An integer may be beyond every float.
        if not abs(value) <= sys.float_info.max:
            return False
        above = self.low <= value if self.with_low else self.low < value
        return above and (value <= self.high if self.with_high else value < self.high)

    def __str__(self) -> str:
        low, high = f"{self.low:g}", f"{self.high:g}"
        if self.high == math.inf:
            end = "or inf (.inf in YAML)" if self.endless else "finite"
            return f"{low} or more, {end}" if self.with_low else f"above {low}, {end}"
        if self.with_low:
            return f"{low} to {high}" if self.with_high else f"{low} or more and below {high}"
        return f"above {low} to {high}"


_NUMBERS = {
    "val_fraction": _Interval(0, 1),
    "scale_step": _Interval(1e-3, _LARGEST_SCALE),
    "flip": _Interval(0, 1),
    "colour_jitter": _Interval(0, 1),
    "hue_jitter": _Interval(0, 0.5),
    "copy_paste_probability": _Interval(0, 1),
    "batch_norm_momentum": _Interval(0, 1, with_low=False),
    "undo_class_weights": _Interval(0, 1),
    "label_smoothing": _Interval(0, 1, with_high=False),
    "top_k": _Interval(0, 1, with_low=False),
    "focal_gamma": _Interval(0),
    "dice_weight": _Interval(0),
    "aux_weight": _Interval(0),
    "lr": _Interval(0, with_low=False),
    "momentum": _Interval(0, 1, with_high=False),
    "weight_decay": _Interval(0),
    "backbone_lr_factor": _Interval(0),
    "aux_lr_factor": _Interval(0),
    "power": _Interval(0, with_low=False),
    "warmup_epochs": _Interval(0, _MANY),
    "warmup_factor": _Interval(0, 1),
    "clip_norm": _Interval(0, with_low=False, endless=True),
    "ema": _Interval(0, 1, with_high=False),
    "checkpoint_minutes": _Interval(0, _LONGEST_SECONDS / 60),
}


def _problems(config: TrainConfig) -> list[OptionError]:
    """What is wrong with an option by itself, before anything is read."""
    # Here: the options alone are shown without PyTorch.
    from deeplab_fast.data.transforms import STYLES
    from deeplab_fast.engine.losses import LabelSize, LossKind, WeightMethod

    found: list[OptionError] = []

    def wrong(name: str, allowed: str) -> None:
        value = getattr(config, name)
        value = shown(repr(value) if isinstance(value, str) else value, 200)
        found.append(OptionError(name, f"is {value}, expected {allowed}"))

    def need(good: bool, name: str, allowed: str) -> None:
        if not good:
            wrong(name, allowed)

    def choice(name: str, allowed: Collection[str]) -> None:
        value = getattr(config, name)
        if value not in allowed:
            wrong(name, one_of(value, allowed))

    hints = get_type_hints(TrainConfig)
    for name, hint in hints.items():
        value = getattr(config, name)
        # Python may also give a number of classes, a ClassSet, colours by name, seconds.
        if name not in ("classes", "mask_colours", "max_time") or isinstance(value, bool):
            need(_is_of(value, hint), name, _kind(hint))
    # Values of another kind cannot be compared with a range.
    if found:
        return found
    for name, (least, most) in _INTEGERS.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            wrong(name, f"{least} to {most}" + (", or null" if _optional(hints[name]) else ""))
    for name, interval in _NUMBERS.items():
        value = getattr(config, name)
        if value is not None and not interval.has(value):
            wrong(name, f"{interval}" + (", or null" if _optional(hints[name]) else ""))
    for name in ("output_stride", "eval_output_stride"):
        need(getattr(config, name) in (None, 8, 16), name, "8 or 16")
    if config.epochs is not None and config.steps is not None:
        found.append(
            OptionError(
                "epochs",
                f"is {config.epochs} and steps is {config.steps}; give one of them, it says how "
                "long to train",
            )
        )
    if config.unknown_colours is not None:
        choice("unknown_colours", ("error", "ignore"))
    choice("optimizer", ("sgd", "adamw"))
    choice("export", ("last", "best"))
    choice("loss", get_args(LossKind))
    choice("loss_labels", get_args(LabelSize))
    if isinstance(config.class_weights, str):
        choice("class_weights", (*get_args(WeightMethod), *NO_WEIGHTS))
    if config.transform_style is not None:
        choice("transform_style", STYLES)
    if config.transform not in ("paper", "torchvision", "none"):
        names = ("paper", "torchvision", "none")
        need(
            "." in config.transform,
            "transform",
            "paper, torchvision, none, or an import path module.name"
            + did_you_mean(config.transform, names),
        )
    elif config.transform_options or config.transform_style:
        option = "transform_options" if config.transform_options else "transform_style"
        wrong(option, f"nothing beside transform {config.transform}: it is for import paths")
    if config.early_stopping is not None and not config.val_every:
        wrong("early_stopping", "null where val_every is 0: it counts validations")
    crop = config.crop if isinstance(config.crop, (list, tuple)) else [config.crop]
    need(
        len(crop) in (1, 2) and all(1 <= side <= LONGEST_SIDE for side in crop),
        "crop",
        f"a side of 1 to {LONGEST_SIDE} pixels, or [height, width]",
    )
    need(
        len(config.scale) == 2 and 0 < config.scale[0] <= config.scale[1] <= _LARGEST_SCALE,
        "scale",
        f"[low, high] with 0 < low <= high <= {_LARGEST_SCALE}",
    )
    if not isinstance(config.class_weights, (str, type(None))):
        good = bool(config.class_weights) and all(map(_Interval(0).has, config.class_weights))
        need(good, "class_weights", "weights of 0 or more, finite, one a class")
    if not found and config.batch_size % config.accumulate:
        found.append(
            OptionError(
                "batch_size",
                f"is {config.batch_size} and accumulate {config.accumulate}; a step's images must "
                "divide into equal parts",
            )
        )
    if config.max_time is not None and not 0 < _seconds(config.max_time) <= _LONGEST_SECONDS:
        wrong(
            "max_time",
            "90m, 1.5h, 3600s, 01:30:00 (hours, minutes and seconds below 60) or 00:01:30:00 "
            "(days first), "
            f"{_LONGEST_SECONDS // 86400} days at most",
        )
    return found


def one_of(value: object, allowed: Collection[str]) -> str:
    """The values that are allowed, as text, and the one that was meant where that can be told."""
    shown = [name for name in allowed if name]
    text = f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]
    return text + did_you_mean(value, shown)


def did_you_mean(value: object, allowed: Collection[str]) -> str:
    """ "; did you mean 'focal'?" where one of the names is near, else nothing."""
    near = difflib.get_close_matches(str(value), allowed, 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _without_numpy(value: Any) -> Any:
    """The same with Python's numbers and texts for NumPy's, which YAML and JSON do not have."""
    if type(value) in (list, tuple):
        plain = [_without_numpy(each) for each in value]
        same = all(a is b for a, b in zip(plain, value, strict=True))
        return value if same else type(value)(plain)
    if type(value) is dict:
        items = {key: _without_numpy(each) for key, each in value.items()}
        return value if all(items[key] is value[key] for key in value) else items
    # Only by name: options alone are shown without NumPy.
    if type(value).__module__ != "numpy" or getattr(value, "shape", None) != ():
        return value
    found = value.item()
    # Of longdouble it is itself.
    return float(found) if type(found).__module__ == "numpy" else found


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    cls = type(value)
    # Its arguments cannot be known: a run of this record asks for them.
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", MADE_IN_PYTHON: True}


def _seconds(text: str) -> float:
    """Seconds, nan where the text is no time."""
    text = str(text).strip()
    try:
        if ":" in text:
            parts = [float(part) for part in text.split(":")]
            # Of days, hours, minutes and seconds; Lightning's hours may be more than a day too.
            factors = (86400, 3600, 60, 1)[-len(parts) :]
            below = [part < 60 for part in parts[-2:]][-(len(parts) - 1) :]
            if len(parts) > 4 or min(parts) < 0 or not all(below):
                return math.nan
            return sum(part * factor for part, factor in zip(parts, factors, strict=True))
        factor = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:].lower())
        return float(text) if factor is None else float(text[:-1]) * factor
    except ValueError:
        return math.nan


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML that every reader takes alike: of strings only plain words go without quotes."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: Dumper, value: str) -> yaml.ScalarNode:
        # YAML 1.2 readers take 0016E5 for a number, PyYAML does not.
        style = None if re.fullmatch(r"[A-Za-z/._][\w/.-]*", value) else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(
        dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None
    )


def _is_of(value: object, hint: Any) -> bool:
    """Whether a value is of an option's type; an integer is a number, true is none."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is_of(value, each) for each in inner)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_is_of(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, (str, os.PathLike)) and "\0" not in os.fspath(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _kind(hint: Any) -> str:
    """What an option takes, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_kind, inner)))
    if origin in (list, dict):
        if origin is dict:
            return "a map of names to values"
        several = [_KINDS[each].split()[1] + "s" for each in get_args(inner[0]) or inner]
        return f"a list of {' or '.join(several)}"
    return _KINDS[hint]


_KINDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)
