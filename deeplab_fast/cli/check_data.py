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
        " that differ, labels that are no class and empty masks, all at once: a line for those that"
        " are alike, and what may be meant. Pairs that passed and have not changed since are not"
        " read again. The exit status is 1 where there are any problems.",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add_data_arguments(add)
    add("--allow-empty", action="store_true", help="masks may be ignored in every pixel")
    add("--verbose", action="store_true", help="a line for every problem of every file")
    add("--recheck", action="store_true", help="read also what has not changed since it passed")
    return parser


def run(config: Namespace) -> int:
    from deeplab_fast.data.check import grouped
    from deeplab_fast.engine.checked import check_remembered

    dataset = open_data(config, "check-data", default_split="all")
    report = check_remembered(
        dataset,
        workers=config.workers,
        progress=True,
        recheck=config.recheck,
        tell=lambda text: tell("check-data", text),
    )
    print(report.table())
    for note in report.notes:
        tell("check-data", f"warning: {note}")
    bad = report.bad(allow_empty=config.allow_empty)
    lines = [problem.message for problem in bad] if config.verbose else grouped(bad)
    for line in lines:
        tell("check-data", line)
    for hint in report.hints if bad else ():
        tell("check-data", f"hint: {hint}")
    if len(lines) < len(bad):
        tell("check-data", "--verbose names every file")
    odd = f", {len(report.notes)} warnings" if report.notes else ""
    print(f"{dataset}: {report.count(bad)}{odd}")
    return 1 if bad else 0
