"""The command line: ``deeplab-fast`` predict, eval, train, check-data, calibrate, export,
tune, info, models.

Exit status: 0 done; 1 some images failed (predict: the others are done; eval: nothing is written),
logits were NaN or infinite (predict, eval and train: what was written says so), the data are bad
(check-data), training ended early (nan, memory, disk; the checkpoint is whole), a kernel failed its
check (tune), or the model does not become a file that computes the same (export: nothing is
written); 2 bad arguments or no GPU (tune), nothing written; 130 and 143 stopped by Ctrl+C and
SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deeplab_fast.cli import (
    calibrate,
    check_data,
    evaluate,
    export,
    info,
    models,
    predict,
    train,
    tune,
)
from deeplab_fast.cli.common import PROGRAM, Command, UsageError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]

_COMMANDS: dict[str, Command] = {
    "predict": predict,
    "eval": evaluate,
    "train": train,
    "check-data": check_data,
    "calibrate": calibrate,
    "export": export,
    "tune": tune,
    "info": info,
    "models": models,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (``sys.argv[1:]`` without) and returns the exit status."""
    parser = _parser()
    try:
        config = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    name = config.subcommand
    try:
        return _COMMANDS[name].run(config[name])
    except UsageError as error:
        print(f"{PROGRAM} {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM} {name}: interrupted", file=sys.stderr)
        return 130


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from deeplab_fast import __version__

    parser = ArgumentParser(
        prog=PROGRAM,
        description="DeepLabv3: semantic segmentation of photos.",
        version=f"{PROGRAM} {__version__}",
    )
    commands = parser.add_subcommands(required=True)
    for name, command in _COMMANDS.items():
        commands.add_subcommand(name, command.parser(), help=command.HELP)
    return parser
