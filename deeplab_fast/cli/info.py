"""``deeplab-fast info``: versions, devices, and which implementations run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HELP = "versions, devices, and which implementations run"


def parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    return ArgumentParser()


def run(config: Namespace) -> int:
    from deeplab_fast import info

    return info.main()
