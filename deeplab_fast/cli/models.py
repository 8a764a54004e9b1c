"""``deeplab-fast models``: the names that ``--model`` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HELP = "names that --model takes"


def parser() -> ArgumentParser:
    from deeplab_fast.cli.parser import CommandParser

    return CommandParser("models", description=HELP.capitalize() + ".")


def run(config: Namespace) -> int:
    from deeplab_fast.models import list_models

    print("\n".join(list_models()))
    return 0
