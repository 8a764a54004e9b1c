"""Code in pages of the documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    section: str
    language: str
    text: str

    @property
    def file(self) -> str:
        """The name that the first line of a file gives it."""
        match = re.match(r"(?://|#) ([\w.]+)", self.text)
        assert match, f"a block of {self.section} does not begin with the name of its file"
        return match[1]


def blocks_of(page: str) -> list[Block]:
    """The blocks of code between three backticks, with the heading above them."""
    found, section, opened = [], "", None
    for line in page.splitlines():
        if line.startswith("```"):
            if opened is None:
                opened = (line[3:], [])
            else:
                assert line == "```"
                found.append(Block(section, opened[0], "\n".join(opened[1]) + "\n"))
                opened = None
        elif opened is not None:
            opened[1].append(line)
        elif line.startswith("## "):
            section = line[3:]
    assert opened is None, "a block has no end"
    return found
