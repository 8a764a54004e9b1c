"""``deeplab-fast tune``: the GPU kernels checked and measured on the GPU at hand."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from deeplab_fast.cli.common import UsageError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HELP = "check and measure the GPU kernels on the GPU at hand"


def parser() -> ArgumentParser:
    from deeplab_fast.cli.parser import CommandParser
    from deeplab_fast.tuning import defaults

    parser = CommandParser(
        "tune",
        description="Checks every GPU kernel of the package on the GPU at hand and measures it"
        " beside PyTorch's, each in a process of its own, and keeps the verdicts: from then on"
        " those that are right and faster run by themselves. Prints a table. The exit status is 1"
        " where a kernel failed, 2 where there is no GPU.",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add("--model", type=str | None, metavar="NAME", help="take the sizes of this model; default: "
        + ", ".join(name for name, _ in defaults.USUAL_MODELS))  # fmt: skip
    add("--size", type=list[int] | None, metavar="[H,W]", help="size of its images; default: "
        "520x520")  # fmt: skip
    add("--batches", type=list[int], default=list(defaults.BATCHES), metavar="[N,...]",
        help="images of a call")  # fmt: skip
    add("--dtypes", type=list[str], default=["bfloat16"], metavar="[NAME,...]",
        help="bfloat16, float16, float32, tf32")  # fmt: skip
    add("--ops", type=list[str] | None, metavar="[NAME,...]", help="these ops alone")
    add("--backends", type=list[str], default=list(defaults.BACKENDS), metavar="[NAME,...]",
        help=", ".join(defaults.BACKENDS))  # fmt: skip
    add("--quick", action="store_true", help="one form and size of each op")
    add("--budget", type=float | None, metavar="SECONDS", help="of everything; default: "
        f"{defaults.SECONDS:.0f} for a model, {defaults.QUICK_SECONDS:.0f} with --quick, "
        f"{defaults.ALL_SECONDS:.0f} for the usual models")  # fmt: skip
    add("--configurations", action="store_true", help="measure launch configurations as well")
    return parser


def run(config: Namespace) -> int:
    from deeplab_fast.tuning import api

    if config.size is not None and len(config.size) != 2:
        raise UsageError(f"--size is {config.size}; expected [height,width]")
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
        raise UsageError(str(error)) from error
    print(tuning)
    return 1 if any(record.verdict == "failed" for record in tuning.records) else 0
