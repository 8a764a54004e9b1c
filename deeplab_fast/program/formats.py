"""Memory formats of logits: those that torchvision's modules leave, and people rely on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Dense in channels_last and not in the default memory format too."""
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def in_plain_format(
    logits: Mapping[Any, Tensor], x: Tensor, weights_channels_last: bool, copy: bool = False
) -> dict[Any, Tensor]:
    """Logits of the input x in the memory format that plain modules give them on a CPU.

    The ASPP's concat with the pooled map, which is contiguous, makes "out" follow the weights;
    "aux" is a chain of convolutions, which are channels_last where their input or weight is.
    `out.view(-1)` of contiguous models rests on it.

    Args:
        logits: by name.
        x: the model's input.
        weights_channels_last: whether the model's weights are.
        copy: give new tensors, also of logits that have the format.
    """
    results = OrderedDict()
    for name, y in logits.items():
        last = weights_channels_last or (name != "out" and is_channels_last(x))
        memory_format = torch.channels_last if last else torch.contiguous_format
        results[name] = (y.clone if copy else y.contiguous)(memory_format=memory_format)
    return results
