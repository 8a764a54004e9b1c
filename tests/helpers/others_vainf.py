"""The structure of VainF/DeepLabV3Plus-Pytorch, written anew: classes, names, calls.

Beside its arguments the builders take widths: `width` channels in the first stage of a ResNet
(64), `channels` of the head (256).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv_bn_relu(in_channels: int, out_channels: int, kernel: int = 1, **options) -> list:
    conv = nn.Conv2d(in_channels, out_channels, kernel, bias=False, **options)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None, dilation=1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(
            planes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class ResNet(nn.Module):
    def __init__(self, layers, replace_stride_with_dilation, width=64) -> None:
        super().__init__()
        self.inplanes = width
        self.dilation = 1
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = self._make_layer(width, layers[0])
        dilate = replace_stride_with_dilation
        self.layer2 = self._make_layer(2 * width, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(4 * width, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(8 * width, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width * Bottleneck.expansion, 10)

    def _make_layer(self, planes, blocks, stride=1, dilate=False) -> nn.Sequential:
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        out = planes * Bottleneck.expansion
        downsample = None
        if stride != 1 or self.inplanes != out:
            conv = nn.Conv2d(self.inplanes, out, 1, stride, bias=False)
            downsample = nn.Sequential(conv, nn.BatchNorm2d(out))
        first = Bottleneck(self.inplanes, planes, stride, downsample, previous_dilation)
        self.inplanes = out
        rest = [Bottleneck(out, planes, dilation=self.dilation) for _ in range(1, blocks)]
        return nn.Sequential(first, *rest)


class ConvBNReLU(nn.Sequential):
    def __init__(self, in_planes, out_planes, kernel_size=3, stride=1, dilation=1, groups=1):
        # The map is padded by the block.
        super().__init__(
            nn.Conv2d(
                in_planes, out_planes, kernel_size, stride, 0, dilation, groups=groups, bias=False
            ),
            nn.BatchNorm2d(out_planes),
            nn.ReLU6(inplace=True),
        )


def fixed_padding(kernel_size: int, dilation: int) -> tuple[int, int, int, int]:
    total = (kernel_size - 1) * dilation
    return (total // 2, total - total // 2, total // 2, total - total // 2)


class InvertedResidual(nn.Module):
    def __init__(self, inp, oup, stride, dilation, expand_ratio) -> None:
        super().__init__()
        self.stride = stride
        hidden = round(inp * expand_ratio)
        self.use_res_connect = self.stride == 1 and inp == oup
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(ConvBNReLU(inp, hidden, kernel_size=1))
        layers.append(ConvBNReLU(hidden, hidden, 3, stride, dilation, groups=hidden))
        layers += [nn.Conv2d(hidden, oup, 1, 1, 0, bias=False), nn.BatchNorm2d(oup)]
        self.conv = nn.Sequential(*layers)
        self.input_padding = fixed_padding(3, dilation)

    def forward(self, x: Tensor) -> Tensor:
        # Zeros in front of the 1x1 expansion, which its bias and norm make something else of.
        x_pad = F.pad(x, self.input_padding)
        if self.use_res_connect:
            return x + self.conv(x_pad)
        return self.conv(x_pad)


class MobileNetV2(nn.Module):
    SETTING = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    )  # fmt: skip

    def __init__(self, output_stride=8, width_mult=1.0) -> None:
        super().__init__()
        channels = max(8, int(32 * width_mult + 4) // 8 * 8)
        features: list[nn.Module] = [ConvBNReLU(3, channels, stride=2)]
        current_stride, dilation = 2, 1
        for t, c, n, s in self.SETTING:
            previous_dilation = dilation
            if current_stride == output_stride:
                stride = 1
                dilation *= s
            else:
                stride = s
                current_stride *= s
            for i in range(n):
                rate = previous_dilation if i == 0 else dilation
                out = int(c * width_mult)
                features.append(InvertedResidual(channels, out, stride if i == 0 else 1, rate, t))
                channels = out
        features.append(ConvBNReLU(channels, 4 * channels, kernel_size=1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(4 * channels, 10))


class IntermediateLayerGetter(nn.ModuleDict):
    def __init__(self, model, return_layers, hrnet_flag=False) -> None:
        self.hrnet_flag = hrnet_flag
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        left = dict(return_layers)
        for name, module in model.named_children():
            layers[name] = module
            left.pop(name, None)
            if not left:
                break
        super().__init__(layers)
        self.return_layers = return_layers

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        out = OrderedDict()
        for name, module in self.named_children():
            if self.hrnet_flag and name.startswith("transition"):
                if name == "transition1":
                    x = [trans(x) for trans in module]
                else:
                    x.append(module(x[-1]))
            else:
                x = module(x)
            if name in self.return_layers:
                out[self.return_layers[name]] = x
        return out


class ASPPConv(nn.Sequential):
    def __init__(self, in_channels, out_channels, dilation) -> None:
        super().__init__(
            *_conv_bn_relu(in_channels, out_channels, 3, padding=dilation, dilation=dilation)
        )


class ASPPPooling(nn.Sequential):
    def __init__(self, in_channels, out_channels) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *_conv_bn_relu(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = super().forward(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ASPP(nn.Module):
    def __init__(self, in_channels, atrous_rates, out_channels=256) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Sequential(*_conv_bn_relu(in_channels, out_channels))]
        modules += [ASPPConv(in_channels, out_channels, rate) for rate in atrous_rates]
        modules.append(ASPPPooling(in_channels, out_channels))
        self.convs = nn.ModuleList(modules)
        self.project = nn.Sequential(
            *_conv_bn_relu(5 * out_channels, out_channels), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        res = []
        for conv in self.convs:
            res.append(conv(x))
        res = torch.cat(res, dim=1)
        return self.project(res)


class DeepLabHead(nn.Module):
    def __init__(self, in_channels, num_classes, aspp_dilate, channels=256) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            ASPP(in_channels, aspp_dilate, channels),
            *_conv_bn_relu(channels, channels, 3, padding=1),
            nn.Conv2d(channels, num_classes, 1),
        )

    def forward(self, feature: dict[str, Tensor]) -> Tensor:
        return self.classifier(feature["out"])


class DeepLabHeadV3Plus(nn.Module):
    def __init__(
        self, in_channels, low_level_channels, num_classes, aspp_dilate, channels=256
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(*_conv_bn_relu(low_level_channels, 48))
        self.aspp = ASPP(in_channels, aspp_dilate, channels)
        self.classifier = nn.Sequential(
            *_conv_bn_relu(48 + channels, channels, 3, padding=1),
            nn.Conv2d(channels, num_classes, 1),
        )

    def forward(self, feature: dict[str, Tensor]) -> Tensor:
        low_level_feature = self.project(feature["low_level"])
        output_feature = self.aspp(feature["out"])
        output_feature = F.interpolate(
            output_feature, size=low_level_feature.shape[2:], mode="bilinear", align_corners=False
        )
        return self.classifier(torch.cat([low_level_feature, output_feature], dim=1))


class AtrousSeparableConvolution(nn.Module):
    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, bias=True
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(
                in_channels,
                in_channels,
                kernel_size=kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                bias=bias,
                groups=in_channels,
            ),
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=1, padding=0, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def convert_to_separable_conv(module: nn.Module) -> nn.Module:
    new_module = module
    if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
        new_module = AtrousSeparableConvolution(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.bias is not None,
        )
    for name, child in module.named_children():
        new_module.add_module(name, convert_to_separable_conv(child))
    return new_module


class _SimpleSegmentationModel(nn.Module):
    def __init__(self, backbone, classifier) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        input_shape = x.shape[-2:]
        features = self.backbone(x)
        x = self.classifier(features)
        x = F.interpolate(x, size=input_shape, mode="bilinear", align_corners=False)
        return x


class DeepLabV3(_SimpleSegmentationModel):
    pass


def _model(
    plus: bool, net: nn.Module, layers: Iterable[str], channels: Iterable[int], *head: object
) -> DeepLabV3:
    """Of the layers (out, low-level) of a network and their channels."""
    (out, low), (out_channels, low_channels) = layers, channels
    if plus:
        getter = IntermediateLayerGetter(net, {out: "out", low: "low_level"})
        return DeepLabV3(getter, DeepLabHeadV3Plus(out_channels, low_channels, *head))
    return DeepLabV3(IntermediateLayerGetter(net, {out: "out"}), DeepLabHead(out_channels, *head))


def _rates(output_stride: int) -> tuple[int, int, int]:
    return (12, 24, 36) if output_stride == 8 else (6, 12, 18)


def resnet(
    plus: bool,
    num_classes: int = 21,
    output_stride: int = 8,
    layers: tuple[int, ...] = (3, 4, 6, 3),
    width: int = 64,
    channels: int = 256,
) -> DeepLabV3:
    """`network.deeplabv3_resnet50`, or `deeplabv3plus_resnet50`."""
    net = ResNet(layers, (False, output_stride == 8, True), width)
    rates = _rates(output_stride)
    return _model(
        plus, net, ("layer4", "layer1"), (32 * width, 4 * width), num_classes, rates, channels
    )


def mobilenet(
    plus: bool,
    num_classes: int = 21,
    output_stride: int = 8,
    width_mult: float = 1.0,
    channels: int = 256,
) -> DeepLabV3:
    """`network.deeplabv3_mobilenet`, or `deeplabv3plus_mobilenet`."""
    net = MobileNetV2(output_stride, width_mult)
    net.low_level_features = net.features[0:4]
    net.high_level_features = net.features[4:-1]
    net.features = None
    net.classifier = None
    names = ("high_level_features", "low_level_features")
    widths = (int(320 * width_mult), int(24 * width_mult))
    return _model(plus, net, names, widths, num_classes, _rates(output_stride), channels)
