"""``deeplab-fast calibrate``: the ranges that int8 needs, from photos, into a file of weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from deeplab_fast.cli.common import (
    UsageError,
    add_weights_arguments,
    apply_preprocess,
    check_preprocess,
    load_model,
    need_weights,
    tell,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HELP = "measure on photos what int8 needs, into a file of weights"


def parser() -> ArgumentParser:
    from deeplab_fast.cli.parser import CommandParser

    parser = CommandParser(
        "calibrate",
        description="Runs a model over photos of the kind that it will see, on the CPU, chooses the"
        " ranges of its maps for 8 bits, and writes them with the weights into a file for"
        " --precision int8. A few dozen photos are enough; labels are not needed. Prints how many"
        " labels are those of fp32.",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add("paths", nargs="+", type=str, metavar="PATH", help="files, folders or glob patterns")
    add_weights_arguments(add)
    add("--output", type=str | None, metavar="FILE", help=".safetensors to write (required)")
    add(
        "--method",
        type=str | None,
        metavar="NAME",
        help="minmax, percentile or entropy; default: the one with the most labels of fp32",
    )
    add("--limit", type=int | None, metavar="N", help="use the first N photos")
    add(
        "--size",
        type=int | None,
        metavar="N",
        help="shorter side of the network's input, 0 for the photo's own size; default: the "
        "model's",
    )
    return parser


def run(config: Namespace) -> int:
    from deeplab_fast.data.images import list_images
    from deeplab_fast.weights import save_weights

    if not config.output:
        raise UsageError("--output FILE.safetensors is missing: where shall the weights go?")
    output = Path(config.output)
    if output.suffix != ".safetensors" or not output.parent.is_dir():
        raise UsageError(f"--output is {output}, expected a .safetensors file in a folder there is")
    need_weights(config)
    check_preprocess(config)
    try:
        paths = list_images(config.paths)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    model, _ = load_model(config, "calibrate")
    preprocess = model.preprocess
    apply_preprocess(config, model)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = model.calibrate(paths, method=config.method, limit=config.limit)
    except ValueError as error:
        raise UsageError(str(error)) from error
    for warning in caught:
        tell("calibrate", f"warning: {warning.message}")
    print(report)
    # The size is that of this run.
    model.preprocess = preprocess
    try:
        save_weights(model, output)
    except (ValueError, OSError) as error:
        tell("calibrate", f"cannot write: {error}")
        return 1
    print(f"weights and ranges in {output}; use them with --weights {output} --precision int8")
    return 0
