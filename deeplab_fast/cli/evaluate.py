"""``deeplab-fast eval``: scores of a model on a labelled data set."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deeplab_fast.cli.common import (
    UsageError,
    add_data_arguments,
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
    open_data,
    tell,
    unpainted_ids,
)
from deeplab_fast.cli.exported import add_runtime_argument, exported_model
from deeplab_fast.cli.model_from import load_any_model

if TYPE_CHECKING:
    import torch
    from jsonargparse import ArgumentParser, Namespace

    from deeplab_fast.cli.common import Model
    from deeplab_fast.engine.predict import PredictOptions

HELP = "score a model on a labelled data set: mIoU and more"


def parser() -> ArgumentParser:
    from deeplab_fast.cli.parser import CommandParser

    parser = CommandParser(
        "eval",
        description="Scores a model on a labelled data set: mean IoU (classes that occur neither in"
        " labels nor predictions left out), IoU and accuracy by class, pixel accuracy, mean"
        " accuracy, frequency-weighted IoU. Prints a table; with --output writes metrics.json,"
        " confusion.png and panels. Under torchrun the processes share the images. The exit status"
        " is 1 where logits were NaN or infinite: the scores are marked.",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add_data_arguments(add)
    add_model_arguments(add)
    add_runtime_argument(add)
    add_pass_arguments(add)
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
    add_unpainted_argument(add)
    return parser


def _model(
    config: Namespace, device: torch.device | None, options: PredictOptions
) -> tuple[Any, str, torch.device | None]:
    """What is scored, its name, and where it runs."""
    from deeplab_fast.engine.predict import check_device

    exported = exported_model(config)
    if exported is None:
        model, name = load_any_model(config, "eval")
        check_classes(options, model)
        check_precision(config, model, device)
        return model, name, device
    check_classes(options, cast("Model", exported))
    if exported.description.labels:
        raise UsageError(
            f"--weights {config.weights} gives labels and no logits; expected an exported file of "
            "logits: export again without --labels"
        )
    try:
        exported.check_options(
            scales=config.scales, tile=config.tile, precision=config.precision, dtype=config.dtype
        )
    except ValueError as error:
        raise UsageError(in_options(error, config)) from error
    return exported, exported.description.model, check_device("cpu")


def _names_of_weights(config: Namespace) -> list[str] | None:
    """The class names that ``--weights`` tell, for data that have none of their own."""
    from deeplab_fast.data.datasets import is_own_data
    from deeplab_fast.engine.start import class_names
    from deeplab_fast.weights import find_weights, inspect_weights

    if not is_own_data(config.data) or config.classes or config.mask_colours or config.model_from:
        return None
    try:
        return class_names(inspect_weights(find_weights(config.weights), part=config.weights_part))
    # Files that cannot be read are told of where they are loaded; others may be exported ones.
    except (ValueError, OSError, RuntimeError, KeyError):
        return None


# What the masks of one's own data mean.
_OF_MASKS = ("label_map", "mask_colours", "unknown_colours", "ignore_index", "mask_suffix")


def _read_as_in_training(config: Namespace, first: bool) -> None:
    """The options of masks that the run had whose weights are scored, where none are given."""
    from deeplab_fast.data.datasets import is_own_data
    from deeplab_fast.engine.run_folder import config_beside

    if config.model_from or not is_own_data(config.data):
        return
    trained = config_beside(config.weights)
    if trained is None or not is_own_data(trained.data):
        return
    taken = []
    for name in _OF_MASKS:
        value = getattr(trained, name)
        # A file of colours may be gone.
        gone = name == "mask_colours" and value and os.sep in value and not os.path.exists(value)
        if value is not None and config[name] is None and not gone:
            config[name] = value
            taken.append(f"--{name.replace('_', '-')} {value}")
    if taken and first:
        tell("eval", f"as in the training of {config.weights}: {', '.join(taken)}")


def run(config: Namespace) -> int:
    from deeplab_fast import use_backend
    from deeplab_fast.backends import BackendUnavailable
    from deeplab_fast.data.classes import label_count
    from deeplab_fast.engine.counting import pace
    from deeplab_fast.engine.evaluate import evaluate
    from deeplab_fast.engine.predict import PredictOptions, check_device, check_dtype
    from deeplab_fast.engine.sources import trained_on

    need_weights(config)
    check_preprocess(config)
    with _processes(config) as (rank, device_given):
        try:
            device = check_device(device_given)
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
            raise UsageError(in_options(error, config)) from error
        _read_as_in_training(config, rank == 0)
        dataset = open_data(config, "eval", classes=_names_of_weights(config))
        if rank == 0 and config.weights:
            seen, table = trained_on(config.weights, dataset)
            if seen:
                tell(
                    "eval",
                    f"warning: these weights were trained on {seen} of the {len(dataset)} images; "
                    f"those kept for validation are scored with --data {table} --split val",
                )
        unpainted = unpainted_ids(config, dataset.classes)
        model, name, device = _model(config, device, options)
        if label_count(model.num_classes) != dataset.num_classes:
            raise UsageError(
                f"the weights have {model.num_classes} classes and the data set {config.data} "
                f"{dataset.num_classes}; evaluate them on the classes they were trained on"
            )
        apply_preprocess(config, model)
        try:
            with (
                use_backend(config.backend) if config.backend else nullcontext(),
                warnings.catch_warnings(record=True) as caught,
            ):
                warnings.simplefilter("always")
                began = time.monotonic()
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
                    precision=config.precision,
                    panels=config.panels,
                    progress=True,
                    tell=lambda line: tell("eval", line),
                    threshold=config.threshold,
                )
        except BackendUnavailable as error:
            raise UsageError(str(error)) from error
        except (ValueError, MemoryError) as error:
            tell("eval", str(error))
            return 1
        status = 1 if result.metrics.not_finite else 0
        if rank > 0:
            return status
        for warning in caught:
            tell("eval", f"warning: {warning.message}")
        print(result.metrics.table())
        labelled = [
            name
            for name, pixels in zip(
                result.metrics.classes, result.metrics.target_pixels, strict=True
            )
            if pixels
        ]
        if len(labelled) == 1 and dataset.num_classes > 1:
            tell(
                "eval",
                f"warning: every pixel that counts is of {labelled[0]!r}; 'deeplab-fast "
                "check-data' says whether --label-map or --mask-colours is missing",
            )
        seconds = time.monotonic() - began
        where = ""
        if config.output:
            try:
                paths = result.save(
                    config.output,
                    unpainted=unpainted,
                    builder=name,
                    weights=config.weights or None,
                )
            except OSError as error:
                tell("eval", f"cannot write: {error}")
                return 1
            where = f", results in {paths['metrics'].parent}"
        count = len(dataset)
        print(f"{count} images scored in {seconds:.1f} s, {pace(seconds / count)}{where}")
    return status


@contextmanager
def _processes(config: Namespace) -> Iterator[tuple[int, str]]:
    """Rank and device name; under torchrun the processes are joined for the duration."""
    import torch
    import torch.distributed as dist

    device = device_name(config.device)
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
