"""``deeplab-fast export``: a model as a file for ONNX Runtime, OpenVINO, torch.export, C++."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from deeplab_fast.cli.common import (
    UsageError,
    add_normalisation_arguments,
    add_own_model_arguments,
    add_weights_arguments,
    apply_preprocess,
    check_preprocess,
    need_weights,
    tell,
)
from deeplab_fast.cli.model_from import load_any_model

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HELP = "write a model as ONNX, OpenVINO IR, torch.export program or AOTInductor package"


def parser() -> ArgumentParser:
    from deeplab_fast.cli.parser import CommandParser

    parser = CommandParser(
        "export",
        description="Writes a model as a file for another runtime: .onnx, .xml (OpenVINO, with a "
        ".bin beside it), .pt2 (torch.export) or .pt2-package (AOTInductor). Then runs that file "
        "on a photo and prints how far its results are from the model's; one that computes "
        "something else is not kept. 'deeplab-fast predict --weights FILE' runs it.",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add_weights_arguments(add)
    add_own_model_arguments(add)
    add_normalisation_arguments(add)
    add("--output", type=str | None, metavar="FILE", help="file to write (required)")
    add(
        "--input-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="fixed; default: any from 33 pixels along each side on",
    )
    add(
        "--static",
        action="store_true",
        help="one image of one size: --input-size, or the model's own, or 520x520",
    )
    add(
        "--size",
        type=int | None,
        metavar="N",
        help="shorter side that photos are resized to, 0 for their own size; default: the model's",
    )
    add("--labels", action="store_true", help="labels in place of logits")
    add(
        "--preprocessing",
        action="store_true",
        help="uint8 photos [N,H,W,3] in; the graph resizes and normalises them",
    )
    add(
        "--precision",
        type=str,
        default="fp32",
        metavar="fp32|fp16|bf16|int8",
        help="of weights and maps; int8 with weights that 'deeplab-fast calibrate' wrote",
    )
    add(
        "--photo",
        type=str | None,
        metavar="FILE",
        help="what the file is tried on; default: a photo that comes with the package",
    )
    add("--no-check", action="store_true", help="do not run the file")
    return parser


def run(config: Namespace) -> int:
    from deeplab_fast.dispatch.files import is_full
    from deeplab_fast.exporting import ExportError, export, is_exported

    if not config.output:
        raise UsageError(
            "--output FILE is missing; its name says the format: .onnx, .xml, .pt2, .pt2-package"
        )
    if config.no_check and config.photo is not None:
        raise UsageError("--no-check and --photo were both given; leave one of them out")
    need_weights(config)
    if config.weights and is_exported(config.weights):
        raise UsageError(
            f"--weights {config.weights} is an exported file; expected the weights that it was "
            "made from"
        )
    check_preprocess(config)
    model, _ = load_any_model(config, "export")
    apply_preprocess(config, model)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            report = export(
                model,
                config.output,
                size=config.input_size,
                dynamic=not config.static,
                labels=config.labels,
                preprocessing=config.preprocessing,
                precision=config.precision,
                check=config.photo or not config.no_check,
            )
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    except (ExportError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and is_full(error):
            text = f"no space left for {config.output}; nothing is left of it: make room"
        tell("export", f"error: {text}")
        return 1
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            tell("export", f"warning: {warning.message}")
    print(report)
    return 0
