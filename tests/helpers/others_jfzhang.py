"""The structure of jfzhang95/pytorch-deeplab-xception, written anew: classes, names, calls.

`factor` divides all channels but those of the image, of the low-level features (48) and of the
classes.
"""

from __future__ import annotations

import queue

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncMaster:
    """Gathers the sums of all copies of a module; here of one."""

    def __init__(self, master_callback) -> None:
        self._master_callback = master_callback
        self._queue = queue.Queue()
        self._registry = {}
        self._activated = False

    def __getstate__(self):
        return {"master_callback": self._master_callback}

    def __setstate__(self, state) -> None:
        self.__init__(state["master_callback"])

    def run_master(self, master_msg):
        self._activated = True
        results = self._master_callback([(0, master_msg)])
        return results[0][1]


class _SynchronizedBatchNorm(_BatchNorm):
    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        self._sync_master = SyncMaster(self._data_parallel_master)
        self._is_parallel = False
        self._parallel_id = None
        self._slave_pipe = None

    def forward(self, input: Tensor) -> Tensor:
        # num_batches_tracked stands still.
        if not (self._is_parallel and self.training):
            return F.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum,
                self.eps,
            )
        flat = input.view(input.size(0), self.num_features, -1)
        sums = flat.sum(dim=(0, 2)), (flat**2).sum(dim=(0, 2))
        mean, inv_std = self._sync_master.run_master((*sums, flat.size(0) * flat.size(2)))
        scale = inv_std * self.weight if self.affine else inv_std
        output = (flat - mean[:, None]) * scale[:, None]
        if self.affine:
            output = output + self.bias[:, None]
        return output.view(input.size())

    def _data_parallel_master(self, intermediates):
        ((copy, (sum_, ssum, size)),) = intermediates
        mean = sum_ / size
        sumvar = ssum - sum_ * mean
        keep = 1 - self.momentum
        self.running_mean = keep * self.running_mean + self.momentum * mean.data
        self.running_var = keep * self.running_var + self.momentum * sumvar.data / (size - 1)
        return [(copy, (mean, (sumvar / size).clamp(self.eps) ** -0.5))]


class SynchronizedBatchNorm2d(_SynchronizedBatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self, inplanes, planes, stride=1, dilation=1, downsample=None, BatchNorm=None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.bn1 = BatchNorm(planes)
        self.conv2 = nn.Conv2d(
            planes, planes, 3, stride=stride, dilation=dilation, padding=dilation, bias=False
        )
        self.bn2 = BatchNorm(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, kernel_size=1, bias=False)
        self.bn3 = BatchNorm(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        out = self.relu(out)
        return out


class ResNet(nn.Module):
    def __init__(self, layers, output_stride, BatchNorm, factor=1) -> None:
        super().__init__()
        self.inplanes = 64 // factor
        strides = [1, 2, 2, 1] if output_stride == 16 else [1, 2, 1, 1]
        dilations = [1, 1, 1, 2] if output_stride == 16 else [1, 1, 2, 4]
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        for i, (blocks, planes) in enumerate(zip(layers, (64, 128, 256), strict=True)):
            rates = [dilations[i]] * blocks
            layer = self._make_layer(planes // factor, rates, strides[i], BatchNorm)
            self.add_module(f"layer{i + 1}", layer)
        multi_grid = [rate * dilations[3] for rate in (1, 2, 4)]
        self.layer4 = self._make_layer(512 // factor, multi_grid, strides[3], BatchNorm)

    def _make_layer(self, planes, dilations, stride, BatchNorm) -> nn.Sequential:
        downsample = None
        out = planes * Bottleneck.expansion
        if stride != 1 or self.inplanes != out:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, out, kernel_size=1, stride=stride, bias=False),
                BatchNorm(out),
            )
        layers = [Bottleneck(self.inplanes, planes, stride, dilations[0], downsample, BatchNorm)]
        self.inplanes = out
        layers += [
            Bottleneck(out, planes, dilation=rate, BatchNorm=BatchNorm) for rate in dilations[1:]
        ]
        return nn.Sequential(*layers)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv1(input)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        low_level_feat = x
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return x, low_level_feat


def fixed_padding(inputs: Tensor, kernel_size: int, dilation: int) -> Tensor:
    kernel_size_effective = kernel_size + (kernel_size - 1) * (dilation - 1)
    pad_total = kernel_size_effective - 1
    pad_beg = pad_total // 2
    pad_end = pad_total - pad_beg
    return F.pad(inputs, (pad_beg, pad_end, pad_beg, pad_end))


class SeparableConv2d(nn.Module):
    def __init__(
        self, inplanes, planes, kernel_size=3, stride=1, dilation=1, bias=False, BatchNorm=None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            inplanes, inplanes, kernel_size, stride, 0, dilation, groups=inplanes, bias=bias
        )
        self.bn = BatchNorm(inplanes)
        self.pointwise = nn.Conv2d(inplanes, planes, 1, 1, 0, 1, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = fixed_padding(x, self.conv1.kernel_size[0], dilation=self.conv1.dilation[0])
        x = self.conv1(x)
        x = self.bn(x)
        x = self.pointwise(x)
        return x


class Block(nn.Module):
    """One ReLU module for all its places, in place also where it is the first: the skip then sees
    the map after it."""

    def __init__(
        self,
        inplanes,
        planes,
        reps,
        stride=1,
        dilation=1,
        BatchNorm=None,
        start_with_relu=True,
        grow_first=True,
        is_last=False,
    ) -> None:
        super().__init__()
        if planes != inplanes or stride != 1:
            self.skip = nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False)
            self.skipbn = BatchNorm(planes)
        else:
            self.skip = None
        self.relu = nn.ReLU(inplace=True)
        rep: list[nn.Module] = []

        def add(in_channels: int, out_channels: int, *args: int) -> None:
            conv = SeparableConv2d(in_channels, out_channels, 3, *args, BatchNorm=BatchNorm)
            rep.extend([self.relu, conv, BatchNorm(out_channels)])

        filters = inplanes
        if grow_first:
            add(inplanes, planes, 1, dilation)
            filters = planes
        for _ in range(reps - 1):
            add(filters, filters, 1, dilation)
        if not grow_first:
            add(inplanes, planes, 1, dilation)
        if stride != 1:
            add(planes, planes, 2)
        if stride == 1 and is_last:
            add(planes, planes, 1)
        if not start_with_relu:
            rep = rep[1:]
        self.rep = nn.Sequential(*rep)

    def forward(self, inp: Tensor) -> Tensor:
        x = self.rep(inp)
        if self.skip is not None:
            skip = self.skip(inp)
            skip = self.skipbn(skip)
        else:
            skip = inp
        x = x + skip
        return x


class AlignedXception(nn.Module):
    def __init__(self, output_stride, BatchNorm, factor=1, middle=16) -> None:
        super().__init__()
        stride, rate, exit_rates = (2, 1, (1, 2)) if output_stride == 16 else (1, 2, (2, 4))
        c = [width // factor for width in (32, 64, 128, 256, 728, 1024, 1536, 2048)]
        self.conv1 = nn.Conv2d(3, c[0], 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNorm(c[0])
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c[0], c[1], 3, stride=1, padding=1, bias=False)
        self.bn2 = BatchNorm(c[1])
        norm = {"BatchNorm": BatchNorm}
        self.block1 = Block(c[1], c[2], reps=2, stride=2, start_with_relu=False, **norm)
        self.block2 = Block(c[2], c[3], reps=2, stride=2, start_with_relu=False, **norm)
        self.block3 = Block(c[3], c[4], reps=2, stride=stride, is_last=True, **norm)
        self._middle = [f"block{4 + i}" for i in range(middle)]
        for name in self._middle:
            self.add_module(name, Block(c[4], c[4], reps=3, dilation=rate, **norm))
        self.block20 = Block(
            c[4], c[5], reps=2, dilation=exit_rates[0], grow_first=False, is_last=True, **norm
        )
        self.conv3 = SeparableConv2d(c[5], c[6], 3, dilation=exit_rates[1], **norm)
        self.bn3 = BatchNorm(c[6])
        self.conv4 = SeparableConv2d(c[6], c[6], 3, dilation=exit_rates[1], **norm)
        self.bn4 = BatchNorm(c[6])
        self.conv5 = SeparableConv2d(c[6], c[7], 3, dilation=exit_rates[1], **norm)
        self.bn5 = BatchNorm(c[7])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.conv2(x)
        x = self.bn2(x)
        x = self.relu(x)
        x = self.block1(x)
        x = self.relu(x)
        # block2 begins without a ReLU, and its last sum makes a new map.
        low_level_feat = x
        x = self.block2(x)
        x = self.block3(x)
        for name in self._middle:
            x = getattr(self, name)(x)
        x = self.block20(x)
        x = self.relu(x)
        x = self.conv3(x)
        x = self.bn3(x)
        x = self.relu(x)
        x = self.conv4(x)
        x = self.bn4(x)
        x = self.relu(x)
        x = self.conv5(x)
        x = self.bn5(x)
        x = self.relu(x)
        return x, low_level_feat


class InvertedResidual(nn.Module):
    def __init__(self, inp, oup, stride, dilation, expand_ratio, BatchNorm) -> None:
        super().__init__()
        self.stride = stride
        hidden = round(inp * expand_ratio)
        self.use_res_connect = self.stride == 1 and inp == oup
        self.kernel_size = 3
        self.dilation = dilation
        expand = [
            nn.Conv2d(inp, hidden, 1, 1, 0, 1, bias=False),
            BatchNorm(hidden),
            nn.ReLU6(inplace=True),
        ]
        self.conv = nn.Sequential(
            *(expand if expand_ratio != 1 else []),
            nn.Conv2d(hidden, hidden, 3, stride, 0, dilation, groups=hidden, bias=False),
            BatchNorm(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, oup, 1, 1, 0, 1, bias=False),
            BatchNorm(oup),
        )

    def forward(self, x: Tensor) -> Tensor:
        x_pad = fixed_padding(x, self.kernel_size, dilation=self.dilation)
        if self.use_res_connect:
            x = x + self.conv(x_pad)
        else:
            x = self.conv(x_pad)
        return x


class MobileNetV2(nn.Module):
    SETTING = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    )  # fmt: skip

    def __init__(self, output_stride, BatchNorm, width_mult=1.0) -> None:
        super().__init__()
        channels = int(32 * width_mult)
        features: list[nn.Module] = [
            nn.Sequential(
                nn.Conv2d(3, channels, 3, 2, 1, bias=False),
                BatchNorm(channels),
                nn.ReLU6(inplace=True),
            )
        ]
        current_stride, rate = 2, 1
        for t, c, n, s in self.SETTING:
            if current_stride == output_stride:
                stride, dilation = 1, rate
                rate *= s
            else:
                stride, dilation = s, 1
                current_stride *= s
            for i in range(n):
                out = int(c * width_mult)
                step = stride if i == 0 else 1
                features.append(InvertedResidual(channels, out, step, dilation, t, BatchNorm))
                channels = out
        self.features = nn.Sequential(*features)
        # The same modules a second time: every key of them stands twice in the state.
        self.low_level_features = self.features[0:4]
        self.high_level_features = self.features[4:]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low_level_feat = self.low_level_features(x)
        x = self.high_level_features(low_level_feat)
        return x, low_level_feat


class _ASPPModule(nn.Module):
    def __init__(self, inplanes, planes, kernel_size, padding, dilation, BatchNorm) -> None:
        super().__init__()
        self.atrous_conv = nn.Conv2d(
            inplanes, planes, kernel_size, 1, padding=padding, dilation=dilation, bias=False
        )
        self.bn = BatchNorm(planes)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.atrous_conv(x)
        x = self.bn(x)
        return self.relu(x)


class ASPP(nn.Module):
    def __init__(self, inplanes, output_stride, BatchNorm, factor=1) -> None:
        super().__init__()
        c = 256 // factor
        rates = [1, 6, 12, 18] if output_stride == 16 else [1, 12, 24, 36]
        self.aspp1 = _ASPPModule(inplanes, c, 1, 0, rates[0], BatchNorm)
        self.aspp2 = _ASPPModule(inplanes, c, 3, rates[1], rates[1], BatchNorm)
        self.aspp3 = _ASPPModule(inplanes, c, 3, rates[2], rates[2], BatchNorm)
        self.aspp4 = _ASPPModule(inplanes, c, 3, rates[3], rates[3], BatchNorm)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Conv2d(inplanes, c, 1, stride=1, bias=False),
            BatchNorm(c),
            nn.ReLU(),
        )
        self.conv1 = nn.Conv2d(5 * c, c, 1, bias=False)
        self.bn1 = BatchNorm(c)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.aspp1(x)
        x2 = self.aspp2(x)
        x3 = self.aspp3(x)
        x4 = self.aspp4(x)
        x5 = self.global_avg_pool(x)
        x5 = F.interpolate(x5, size=x4.size()[2:], mode="bilinear", align_corners=True)
        x = torch.cat((x1, x2, x3, x4, x5), dim=1)
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        return self.dropout(x)


class Decoder(nn.Module):
    def __init__(self, num_classes, low_level_inplanes, BatchNorm, factor=1) -> None:
        super().__init__()
        c = 256 // factor
        self.conv1 = nn.Conv2d(low_level_inplanes, 48, 1, bias=False)
        self.bn1 = BatchNorm(48)
        self.relu = nn.ReLU()
        self.last_conv = nn.Sequential(
            nn.Conv2d(48 + c, c, kernel_size=3, stride=1, padding=1, bias=False),
            BatchNorm(c),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(c, c, kernel_size=3, stride=1, padding=1, bias=False),
            BatchNorm(c),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(c, num_classes, kernel_size=1, stride=1),
        )

    def forward(self, x: Tensor, low_level_feat: Tensor) -> Tensor:
        low_level_feat = self.conv1(low_level_feat)
        low_level_feat = self.bn1(low_level_feat)
        low_level_feat = self.relu(low_level_feat)
        x = F.interpolate(x, size=low_level_feat.size()[2:], mode="bilinear", align_corners=True)
        x = torch.cat((x, low_level_feat), dim=1)
        x = self.last_conv(x)
        return x


class DeepLab(nn.Module):
    def __init__(
        self,
        backbone="resnet",
        output_stride=16,
        num_classes=21,
        sync_bn=True,
        freeze_bn=False,
        factor=1,
        layers=(3, 4, 23),
        middle=16,
    ) -> None:
        super().__init__()
        BatchNorm = SynchronizedBatchNorm2d if sync_bn else nn.BatchNorm2d
        if backbone == "resnet":
            self.backbone = ResNet(layers, output_stride, BatchNorm, factor)
            channels, low = 2048 // factor, 256 // factor
        elif backbone == "xception":
            self.backbone = AlignedXception(output_stride, BatchNorm, factor, middle)
            channels, low = 2048 // factor, 128 // factor
        else:
            self.backbone = MobileNetV2(output_stride, BatchNorm, 1 / factor)
            channels, low = int(320 / factor), int(24 / factor)
        self.aspp = ASPP(channels, output_stride, BatchNorm, factor)
        self.decoder = Decoder(num_classes, low, BatchNorm, factor)
        # Stands before the method of that name.
        self.freeze_bn = freeze_bn

    def forward(self, input: Tensor) -> Tensor:
        x, low_level_feat = self.backbone(input)
        x = self.aspp(x)
        x = self.decoder(x, low_level_feat)
        x = F.interpolate(x, size=input.size()[2:], mode="bilinear", align_corners=True)
        return x

    def freeze_bn(self) -> None:
        for m in self.modules():
            if isinstance(m, (SynchronizedBatchNorm2d, nn.BatchNorm2d)):
                m.eval()
