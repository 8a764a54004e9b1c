"""What reading, inspecting and loading checkpoints share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._documents import printable

StateDict = dict[str, Tensor]
Source = str | os.PathLike[str] | Mapping[str, Any]

# Key of the package's own facts in a .safetensors header or beside "model" in a .pth container.
METADATA_KEY = "deeplab_fast"
# Key of the checksum of the tensors, in a .safetensors header or an entry of torch.save's archive.
CHECKSUM_KEY = "deeplab_fast.checksum"
# The folder in an archive that torch.save writes into an open file.
ARCHIVE_NAME = "archive"
# How many keys of each kind an error message spells out.
SHOWN = 10
# Characters of one text of a file in a message, and of a message.
_LONGEST, _LONGEST_MESSAGE = 200, 3900


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the model; the message says why.

    Control characters of names in a file are written as escapes, as a terminal obeys them.
    """

    def __init__(self, message: str) -> None:
        shown = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."
        super().__init__(printable(shown, "\n"))


def one_line(value: object) -> str:
    """A text of a file as a message has it: short, and without line breaks and control characters.

    >>> one_line("a\\nb")
    'a\\\\nb'
    """
    text = str(value)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return printable(text)


def shorten(items: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    shown = ", ".join(map(one_line, items[:SHOWN]))
    more = len(items) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def listed(what: str, items: Sequence[str]) -> str:
    """A count, what is counted, and the first names."""
    return f"{len(items)} {what}: {shorten(items)}"


def call(name: str, options: Mapping[str, Any]) -> str:
    """The builder's call as a user writes it."""
    return f"deeplab_fast.{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        wrapped = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        inner = model.module if isinstance(model, wrapped) else getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def tuples(value: object) -> Any:
    """JSON's lists as tuples."""
    return tuple(tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
