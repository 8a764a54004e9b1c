"""From backbone features to low-resolution logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..program import match
from .aspp import ASPP


class DeepLabHead(nn.Sequential):
    """torchvision's head: ASPP, 3x3 convolution + BN + ReLU, 1x1 classifier."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        atrous_rates: Sequence[int] = (12, 24, 36),
        aspp_channels: int = 256,
        dropout: float = 0.5,
        image_pooling_norm: str = "batch",
    ) -> None:
        super().__init__(
            ASPP(
                in_channels,
                atrous_rates,
                aspp_channels,
                dropout=dropout,
                image_pooling_norm=image_pooling_norm,
            ),
            nn.Conv2d(aspp_channels, aspp_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(aspp_channels),
            nn.ReLU(),
            nn.Conv2d(aspp_channels, num_classes, 1),
        )


class PaperHead(nn.Sequential):
    """The paper's head: ASPP and a 1x1 classifier (arXiv 1706.05587, section 3.3)."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        atrous_rates: Sequence[int] = (6, 12, 18),
        aspp_channels: int = 256,
        dropout: float = 0.5,
        image_pooling_norm: str = "batch",
    ) -> None:
        super().__init__(
            ASPP(
                in_channels,
                atrous_rates,
                aspp_channels,
                dropout=dropout,
                image_pooling_norm=image_pooling_norm,
            ),
            nn.Conv2d(aspp_channels, num_classes, 1),
        )


class MMSegHead(nn.Sequential):
    """mmsegmentation's head: ASPP with a 3x3 projection, channel dropout, 1x1 classifier."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        atrous_rates: Sequence[int] = (12, 24, 36),
        aspp_channels: int = 512,
        dropout: float = 0.1,
        image_pooling_norm: str = "batch",
    ) -> None:
        super().__init__(
            ASPP(
                in_channels,
                atrous_rates,
                aspp_channels,
                dropout=0.0,
                project_kernel_size=3,
                image_pooling_norm=image_pooling_norm,
            ),
            nn.Dropout2d(dropout),
            nn.Conv2d(aspp_channels, num_classes, 1),
        )


class DeepLabV2Head(nn.Module):
    """DeepLabv2's ASPP: biased atrous 3x3 classifiers side by side, summed, for comparison.

    Source: arXiv 1606.00915, section 3.3 (ASPP-L).
    State: convs.{i}.{weight, bias}.
    """

    def __init__(
        self, in_channels: int, num_classes: int, atrous_rates: Sequence[int] = (6, 12, 18, 24)
    ) -> None:
        super().__init__()
        if not atrous_rates:
            raise ValueError("DeepLabV2Head needs at least one atrous rate, got none")
        convs = [
            nn.Conv2d(in_channels, num_classes, 3, padding=rate, dilation=rate)
            for rate in atrous_rates
        ]
        self.convs = nn.ModuleList(convs)
        for conv in convs:
            nn.init.normal_(conv.weight, std=0.01)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        for conv in self.convs:
            branches.append(conv(x))
        return torch.stack(branches).sum(0)


@match.rule(DeepLabV2Head)
def _deeplabv2(head: DeepLabV2Head) -> match.Sum:
    return match.Sum(head, list(head.convs))


class CascadedHead(nn.Sequential):
    """The cascaded model's classifier: one 1x1 convolution (arXiv 1706.05587, section 3.2)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(nn.Conv2d(in_channels, num_classes, 1))


class FCNHead(nn.Sequential):
    """torchvision's auxiliary head: 3x3 convolution to a quarter, BN, ReLU, dropout, classifier."""

    def __init__(self, in_channels: int, channels: int) -> None:
        inter_channels = in_channels // 4
        super().__init__(
            nn.Conv2d(in_channels, inter_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(inter_channels),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(inter_channels, channels, 1),
        )


HEADS = {
    "torchvision": DeepLabHead,
    "paper": PaperHead,
    "mmseg": MMSegHead,
    "deeplabv2": DeepLabV2Head,
}
