"""The fused steps of DeepLabv3. Each op's schema, fake, dispatch, autograd and public function lie
in the file of its name; `deeplab_fast.backends` says which implementation of it runs.
"""

from collections.abc import Callable
from typing import Any

from .. import backends as _backends
from .aspp_branches import aspp_branches
from .aspp_branches import describe as _aspp_branches
from .aspp_convs import aspp_convs
from .aspp_convs import describe as _aspp_convs
from .aspp_project import aspp_project
from .aspp_project import describe as _aspp_project
from .batch_norm import (
    batch_stats,
    bn_act,
    bn_act_backward,
    bn_act_reduce,
)
from .batch_norm import describe_backward as _bn_act_backward
from .batch_norm import describe_bn_act as _bn_act
from .batch_norm import describe_reduce as _bn_act_reduce
from .batch_norm import describe_stats as _batch_stats
from .conv2d import conv2d
from .conv2d import describe as _conv2d
from .conv_bn_act import conv_bn_act
from .conv_bn_act import describe as _conv_bn_act
from .upsample_argmax import describe as _upsample_argmax
from .upsample_argmax import upsample_argmax
from .upsample_confusion import describe as _upsample_confusion
from .upsample_confusion import upsample_confusion
from .upsample_cross_entropy import describe as _upsample_cross_entropy
from .upsample_cross_entropy import upsample_cross_entropy
from .upsample_softmax_add import describe as _upsample_softmax_add
from .upsample_softmax_add import upsample_softmax_add

__all__ = [
    "aspp_branches",
    "aspp_convs",
    "aspp_project",
    "batch_stats",
    "bn_act",
    "bn_act_backward",
    "bn_act_reduce",
    "conv2d",
    "conv_bn_act",
    "describe",
    "upsample_argmax",
    "upsample_confusion",
    "upsample_cross_entropy",
    "upsample_softmax_add",
]

_DESCRIBE: dict[str, Callable[..., _backends.OpDesc]] = {
    "aspp_branches": _aspp_branches,
    "aspp_convs": _aspp_convs,
    "aspp_project": _aspp_project,
    "batch_stats": _batch_stats,
    "bn_act": _bn_act,
    "bn_act_backward": _bn_act_backward,
    "bn_act_reduce": _bn_act_reduce,
    "conv2d": _conv2d,
    "conv_bn_act": _conv_bn_act,
    "upsample_argmax": _upsample_argmax,
    "upsample_confusion": _upsample_confusion,
    "upsample_cross_entropy": _upsample_cross_entropy,
    "upsample_softmax_add": _upsample_softmax_add,
}


def describe(op: str, *args: Any, **kwargs: Any) -> _backends.OpDesc:
    """The facts of the call `ops.<op>(*args, **kwargs)` that a choice of backend rests on."""
    return _DESCRIBE[op](*args, **kwargs)
