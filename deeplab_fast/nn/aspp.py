"""Atrous spatial pyramid pooling (arXiv 1706.05587, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..program import match

IMAGE_POOLING_NORMS = ("batch", "running")


class SingleValueBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that can train on one value for each channel.

    The variance of one value is zero, so nn.BatchNorm2d refuses a batch of one 1x1 map in training
    mode. This norm then normalises by its running statistics, as in evaluation, and leaves them
    alone; every other input is treated as by nn.BatchNorm2d. Same parameters, same keys.
    """

    def forward(self, x: Tensor) -> Tensor:
        has_running = self.running_mean is not None
        single = has_running and x.size(0) * x.size(2) * x.size(3) == 1
        learns = self.training and not single
        # momentum None asks for a cumulative average (nn.BatchNorm2d).
        momentum = 0.0
        if self.momentum is not None:
            momentum = self.momentum
        if learns and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            learns or not has_running,
            momentum,
            self.eps,
        )


match.rule(SingleValueBatchNorm2d)(match.Norm)


class ASPPConv(nn.Sequential):
    """relu(bn(conv3x3(x, dilation))): [N, in, H, W] -> [N, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False
            ),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class ASPPPooling(nn.Sequential):
    """Image-level features: global mean, 1x1 convolution, BN, ReLU, spread over the map.

    Args:
        norm: "batch" raises, as torchvision does, on a batch of one image in training mode;
            "running" normalises such a batch by the running statistics (`SingleValueBatchNorm2d`).
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str = "batch") -> None:
        if norm not in IMAGE_POOLING_NORMS:
            raise ValueError(
                f"image_pooling_norm must be one of {IMAGE_POOLING_NORMS}, got {norm!r}"
            )
        norm_layer = nn.BatchNorm2d if norm == "batch" else SingleValueBatchNorm2d
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            norm_layer(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for module in self:
            x = module(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@match.rule(ASPPPooling)
def _pooling(module: ASPPPooling) -> match.Segment:
    members = list(module)
    return match.Pooling(module, members[0], members[1:]) if members else match.Plain(module)


class ASPP(nn.Module):
    """A 1x1 branch, an atrous 3x3 branch for each rate and image pooling, concatenated, projected.

    Args:
        in_channels: channels of the feature map.
        atrous_rates: dilation of each 3x3 branch, also none.
        out_channels: channels of each branch and of the result.
        dropout: probability of the dropout behind the projection.
        project_kernel_size: 1 (the paper, torchvision) or 3 (mmsegmentation's bottleneck).
        image_pooling_norm: see `ASPPPooling`.

    Shapes: [N, in_channels, H, W] -> [N, out_channels, H, W]; float, any layout.
    State: convs.{0: 1x1, 1..: rates, last: pooling}, project, as torchvision's.
    """

    def __init__(
        self,
        in_channels: int,
        atrous_rates: Sequence[int],
        out_channels: int = 256,
        *,
        dropout: float = 0.5,
        project_kernel_size: int = 1,
        image_pooling_norm: str = "batch",
    ) -> None:
        super().__init__()
        modules: list[nn.Module] = [
            nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            )
        ]
        modules += [ASPPConv(in_channels, out_channels, rate) for rate in atrous_rates]
        modules.append(ASPPPooling(in_channels, out_channels, image_pooling_norm))
        self.convs = nn.ModuleList(modules)
        self.project = nn.Sequential(
            nn.Conv2d(
                len(self.convs) * out_channels,
                out_channels,
                project_kernel_size,
                padding=project_kernel_size // 2,
                bias=False,
            ),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        for conv in self.convs:
            branches.append(conv(x))
        return self.project(torch.cat(branches, dim=1))


@match.rule(ASPP)
def _aspp(module: ASPP) -> match.Aspp:
    return match.Aspp(module, list(module.convs), module.project)
