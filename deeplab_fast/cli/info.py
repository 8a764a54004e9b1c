"""``deeplab-fast info``: versions, devices, and which implementations run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HELP = "versions, devices, and which implementations run"


def parser() -> ArgumentParser:
    from deeplab_fast.cli.parser import CommandParser

    return CommandParser("info", description=HELP.capitalize() + ".")


def run(config: Namespace) -> int:
    from deeplab_fast import info

    return info.main()
