"""Rules that rename tensors, and what they do to the tensors of TensorFlow and mmsegmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Transform = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Rule:
    """How one group of foreign keys is renamed.

    Attributes:
        pattern: regular expression that the whole foreign key must match.
        target: the key here, with the pattern's groups as \\1, \\2, ... and `{pool}` for the index
            of the image pooling branch; None: the key is known and left out.
        transform: (tensor, index of the pooling branch) -> tensor, or None.
    """

    pattern: str
    target: str | None
    transform: Transform | None = None


def pool_to_end(weight: Tensor, pool: int) -> Tensor:
    """[K, (pooling, branch 0, ...), h, w] -> [K, (branch 0, ..., pooling), h, w]."""
    if weight.ndim != 4 or weight.shape[1] % (pool + 1):
        return weight
    width = weight.shape[1] // (pool + 1)
    return torch.cat([weight[:, width:], weight[:, :width]], dim=1)


def hwio(weight: Tensor, pool: int) -> Tensor:
    """TensorFlow's convolution weight [h, w, in, out] -> [out, in, h, w]."""
    return weight.permute(3, 2, 0, 1) if weight.ndim == 4 else weight


def hwio_pool_to_end(weight: Tensor, pool: int) -> Tensor:
    """`hwio`, then `pool_to_end`."""
    return pool_to_end(hwio(weight, pool), pool)


def hwcm(weight: Tensor, pool: int) -> Tensor:
    """TensorFlow's depthwise weight [h, w, channels, m] -> [channels * m, 1, h, w]."""
    if weight.ndim != 4:
        return weight
    return weight.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1)


_SLIM_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def slim(scope: str, conv: str, norm: str, transform: Transform = hwio) -> tuple[Rule, ...]:
    """Rules for the weights and the batch norm of the slim layers that match `scope`."""
    return (
        Rule(rf"{scope}/weights", f"{conv}.weight", transform),
        *(
            Rule(rf"{scope}/BatchNorm/{theirs}", f"{norm}.{ours}")
            for theirs, ours in _SLIM_NORM.items()
        ),
    )
