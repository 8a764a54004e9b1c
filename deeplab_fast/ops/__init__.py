"""The fused steps of DeepLabv3. Each op's schema, fake, dispatch, autograd and public function lie
in the file of its name, which declares it (`deeplab_fast.dispatch.declare`);
`deeplab_fast.backends` says which implementation of it runs.
"""

from ..dispatch.declare import describe
from .aspp_branches import aspp_branches
from .aspp_convs import aspp_convs
from .aspp_project import aspp_project
from .batch_norm import (
    batch_stats,
    bn_act,
    bn_act_backward,
    bn_act_reduce,
)
from .conv2d import conv2d
from .conv_bn_act import conv_bn_act
from .fold_filters import fold_filters
from .upsample_argmax import upsample_argmax
from .upsample_confusion import upsample_confusion
from .upsample_cross_entropy import upsample_cross_entropy
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
    "fold_filters",
    "upsample_argmax",
    "upsample_confusion",
    "upsample_cross_entropy",
    "upsample_softmax_add",
]
