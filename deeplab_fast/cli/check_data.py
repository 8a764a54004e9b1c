"""``deeplab-fast check-data``: unreadable photos and wrong labels of a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deeplab_fast.cli.common import add_data_arguments, open_data, tell

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HELP = "find unreadable photos and wrong labels"


def parser() -> ArgumentParser:
    from deeplab_fast.cli.parser import CommandParser

    parser = CommandParser(
        "check-data",
        description="Reads every photo and mask of a data set and reports unreadable files, sizes"
        " that differ, labels that are no class and empty masks, all at once. The exit status is 1"
        " where there are any.",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add_data_arguments(add)
    add("--allow-empty", action="store_true", help="masks may be ignored in every pixel")
    return parser


def run(config: Namespace) -> int:
    from deeplab_fast.data.check import check_dataset

    dataset = open_data(config)
    report = check_dataset(dataset, workers=config.workers, progress=True)
    print(report.table())
    for note in report.notes:
        tell("check-data", f"warning: {note}")
    bad = report.bad(allow_empty=config.allow_empty)
    for problem in bad:
        tell("check-data", problem.message)
    odd = f", {len(report.notes)} warnings" if report.notes else ""
    print(f"{dataset}: {len(bad)} problems{odd}")
    return 1 if bad else 0
