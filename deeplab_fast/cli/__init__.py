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

import argparse
import sys
from collections.abc import Sequence

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

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, Command] = {
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
"""The modules of the commands, by name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (``sys.argv[1:]`` without) and returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    try:
        if name not in COMMANDS:
            return _without_command(name)
        config = COMMANDS[name].parser().parse_args(arguments[1:])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    try:
        # Else the process is somebody's who calls this function.
        if argv is None and name == "train":
            train.own_process()
        return COMMANDS[name].run(config)
    except UsageError as error:
        print(f"{PROGRAM} {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM} {name}: interrupted", file=sys.stderr)
        return 130


def _without_command(argument: str) -> int:
    """``--help``, ``--version``, or what is wrong with a first argument that is no command."""
    if argument in ("-h", "--help", "--version"):
        from deeplab_fast import __version__

        parser = argparse.ArgumentParser(
            prog=PROGRAM,
            description="DeepLabv3: semantic segmentation of photos.",
            epilog=f"'{PROGRAM} COMMAND --help' has the options of a command.",
        )
        parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
        commands = parser.add_subparsers(metavar="COMMAND")
        for name, command in COMMANDS.items():
            commands.add_parser(name, help=command.HELP)
        parser.parse_args([argument])
    if argument:
        from deeplab_fast.cli.parser import did_you_mean

        means = did_you_mean(argument, [*COMMANDS, "--help", "--version"])
        problem = f"there is no command {argument}" + (f"; did you mean {means}?" if means else "")
    else:
        problem = "a command is missing"
    print(f"{PROGRAM}: error: {problem}", file=sys.stderr)
    print(f"Commands: {', '.join(COMMANDS)}; {PROGRAM} --help", file=sys.stderr)
    return 2
