"""The structure of mmsegmentation's DeepLabs, written anew: mmcv's and mmseg's classes, names and
order of calls, without registries, initialisers and preprocessing.

A configuration is keyword arguments instead of a dict with a type; `norm` names the class of all
batch norms: "BN", "SyncBN", or "reverted", what mmengine makes of SyncBN for a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _BatchNormXd(_BatchNorm):
    """A batch norm that takes maps of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        return


NORMS = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "reverted": _BatchNormXd}


def build_norm_layer(norm: str, channels: int, postfix: object = "") -> tuple[str, nn.Module]:
    return f"bn{postfix}", NORMS[norm](channels, eps=1e-5)


class BaseModule(nn.Module):
    def __init__(self, init_cfg=None) -> None:
        super().__init__()
        self._is_init = False
        self.init_cfg = init_cfg


def resize(input, size=None, scale_factor=None, mode="nearest", align_corners=None) -> Tensor:
    return F.interpolate(input, size, scale_factor, mode, align_corners)


class ConvModule(nn.Module):
    """Convolution, norm and activation in any order, each of which a call can leave out."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        norm="BN",
        act: type[nn.Module] | None = nn.ReLU,
        order=("conv", "norm", "act"),
    ) -> None:
        super().__init__()
        self.order = order
        self.with_explicit_padding = False
        self.with_norm = norm is not None
        self.with_activation = act is not None
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=not self.with_norm,
        )
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
            setattr(self, name, getattr(self.conv, name))
        self.padding = padding
        if self.with_norm:
            channels = in_channels if order.index("norm") < order.index("conv") else out_channels
            self.norm_name, layer = build_norm_layer(norm, channels)
            self.add_module(self.norm_name, layer)
        else:
            self.norm_name = None
        self.efficient_conv_bn_eval_forward = None
        if act is not None:
            self.activate = act(inplace=True)

    @property
    def norm(self):
        if self.norm_name:
            return getattr(self, self.norm_name)
        return None

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        layer_index = 0
        while layer_index < len(self.order):
            layer = self.order[layer_index]
            if layer == "conv":
                if self.with_explicit_padding:
                    x = self.padding_layer(x)
                if (
                    layer_index + 1 < len(self.order)
                    and self.order[layer_index + 1] == "norm"
                    and norm
                    and self.with_norm
                    and not self.norm.training
                    and self.efficient_conv_bn_eval_forward is not None
                ):
                    x = self.efficient_conv_bn_eval_forward(self.norm, self.conv, x)
                    layer_index += 1
                else:
                    x = self.conv(x)
            elif layer == "norm" and norm and self.with_norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
            layer_index += 1
        return x


class DepthwiseSeparableConvModule(nn.Module):
    """Norm and activation also between depthwise and pointwise."""

    def __init__(self, in_channels, out_channels, kernel_size, padding=0, dilation=1, norm="BN"):
        super().__init__()
        self.depthwise_conv = ConvModule(
            in_channels,
            in_channels,
            kernel_size,
            padding=padding,
            dilation=dilation,
            groups=in_channels,
            norm=norm,
        )
        self.pointwise_conv = ConvModule(in_channels, out_channels, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise_conv(x)
        x = self.pointwise_conv(x)
        return x


class BasicBlock(BaseModule):
    expansion = 1

    def __init__(
        self,
        inplanes,
        planes,
        stride=1,
        dilation=1,
        downsample=None,
        style="pytorch",
        with_cp=False,
        norm="BN",
    ) -> None:
        super().__init__()
        self.norm1_name, norm1 = build_norm_layer(norm, planes, postfix=1)
        self.norm2_name, norm2 = build_norm_layer(norm, planes, postfix=2)
        self.conv1 = nn.Conv2d(
            inplanes, planes, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )
        self.add_module(self.norm1_name, norm1)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.add_module(self.norm2_name, norm2)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.dilation = dilation
        self.with_cp = with_cp

    @property
    def norm1(self):
        return getattr(self, self.norm1_name)

    @property
    def norm2(self):
        return getattr(self, self.norm2_name)

    def forward(self, x: Tensor) -> Tensor:
        def _inner_forward(x: Tensor) -> Tensor:
            identity = x
            out = self.conv1(x)
            out = self.norm1(out)
            out = self.relu(out)
            out = self.conv2(out)
            out = self.norm2(out)
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        if self.with_cp and x.requires_grad:
            out = cp.checkpoint(_inner_forward, x, use_reentrant=True)
        else:
            out = _inner_forward(x)
        out = self.relu(out)
        return out


class Bottleneck(BaseModule):
    expansion = 4

    def __init__(
        self,
        inplanes,
        planes,
        stride=1,
        dilation=1,
        downsample=None,
        style="pytorch",
        with_cp=False,
        norm="BN",
    ) -> None:
        super().__init__()
        self.stride = stride
        self.dilation = dilation
        self.style = style
        self.with_cp = with_cp
        self.with_plugins = False
        strides = (1, stride) if style == "pytorch" else (stride, 1)
        self.conv1_stride, self.conv2_stride = strides
        self.norm1_name, norm1 = build_norm_layer(norm, planes, postfix=1)
        self.norm2_name, norm2 = build_norm_layer(norm, planes, postfix=2)
        self.norm3_name, norm3 = build_norm_layer(norm, planes * self.expansion, postfix=3)
        self.conv1 = nn.Conv2d(inplanes, planes, 1, stride=strides[0], bias=False)
        self.add_module(self.norm1_name, norm1)
        self.conv2 = nn.Conv2d(
            planes, planes, 3, stride=strides[1], padding=dilation, dilation=dilation, bias=False
        )
        self.add_module(self.norm2_name, norm2)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.add_module(self.norm3_name, norm3)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    @property
    def norm1(self):
        return getattr(self, self.norm1_name)

    @property
    def norm2(self):
        return getattr(self, self.norm2_name)

    @property
    def norm3(self):
        return getattr(self, self.norm3_name)

    def forward(self, x: Tensor) -> Tensor:
        def _inner_forward(x: Tensor) -> Tensor:
            identity = x
            out = self.conv1(x)
            out = self.norm1(out)
            out = self.relu(out)
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv1_plugin_names)
            out = self.conv2(out)
            out = self.norm2(out)
            out = self.relu(out)
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv2_plugin_names)
            out = self.conv3(out)
            out = self.norm3(out)
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv3_plugin_names)
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        if self.with_cp and x.requires_grad:
            out = cp.checkpoint(_inner_forward, x, use_reentrant=True)
        else:
            out = _inner_forward(x)
        out = self.relu(out)
        return out


class ResLayer(nn.Sequential):
    def __init__(
        self,
        block,
        inplanes,
        planes,
        num_blocks,
        stride=1,
        dilation=1,
        avg_down=False,
        multi_grid=None,
        contract_dilation=False,
        norm="BN",
        **options,
    ) -> None:
        out = planes * block.expansion
        downsample = None
        if stride != 1 or inplanes != out:
            layers: list[nn.Module] = []
            if avg_down:
                layers.append(nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False))
            conv_stride = 1 if avg_down else stride
            layers.append(nn.Conv2d(inplanes, out, 1, stride=conv_stride, bias=False))
            layers.append(build_norm_layer(norm, out)[1])
            downsample = nn.Sequential(*layers)
        if multi_grid is not None:
            rates = list(multi_grid)
        else:
            contracted = dilation > 1 and contract_dilation
            rates = [dilation // 2 if contracted else dilation] + [dilation] * (num_blocks - 1)
        options["norm"] = norm
        blocks = [block(inplanes, planes, stride, rates[0], downsample, **options)]
        blocks += [block(out, planes, 1, rate, **options) for rate in rates[1:num_blocks]]
        super().__init__(*blocks)
        self.block = block


class _Frozen(BaseModule):
    """A backbone that stays frozen through train()."""

    frozen_stages: int
    norm_eval: bool

    def _stem(self) -> list[nn.Module]:
        raise NotImplementedError

    def _freeze_stages(self) -> None:
        frozen = self._stem() if self.frozen_stages >= 0 else []
        frozen += [getattr(self, f"layer{i}") for i in range(1, self.frozen_stages + 1)]
        for m in frozen:
            m.eval()
            for p in m.parameters():
                p.requires_grad = False

    def train(self, mode: bool = True):
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for m in self.modules():
                if isinstance(m, _BatchNorm):
                    m.eval()
        return self


class ResNet(_Frozen):
    arch_settings = {  # noqa: RUF012
        18: (BasicBlock, (2, 2, 2, 2)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
    }

    def __init__(
        self,
        depth,
        base_channels=64,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        out_indices=(0, 1, 2, 3),
        style="pytorch",
        deep_stem=False,
        avg_down=False,
        frozen_stages=-1,
        norm_eval=False,
        multi_grid=None,
        contract_dilation=True,
        with_cp=False,
        norm="BN",
        stage_blocks=None,
    ) -> None:
        super().__init__()
        self.block, blocks = self.arch_settings[depth]
        self.deep_stem = deep_stem
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.inplanes = base_channels
        self._make_stem_layer(base_channels, norm)
        self.res_layers = []
        for i, number in enumerate(stage_blocks or blocks):
            layer = ResLayer(
                self.block,
                self.inplanes,
                base_channels * 2**i,
                number,
                stride=strides[i],
                dilation=dilations[i],
                avg_down=avg_down,
                multi_grid=multi_grid if i == 3 else None,
                contract_dilation=contract_dilation,
                norm=norm,
                style=style,
                with_cp=with_cp,
            )
            self.inplanes = base_channels * 2**i * self.block.expansion
            self.add_module(f"layer{i + 1}", layer)
            self.res_layers.append(f"layer{i + 1}")
        self._freeze_stages()

    def _make_stem_layer(self, channels: int, norm: str) -> None:
        if self.deep_stem:
            half = channels // 2
            layers: list[nn.Module] = []
            for inp, out, stride in ((3, half, 2), (half, half, 1), (half, channels, 1)):
                layers.append(nn.Conv2d(inp, out, 3, stride=stride, padding=1, bias=False))
                layers += [build_norm_layer(norm, out)[1], nn.ReLU(inplace=True)]
            self.stem = nn.Sequential(*layers)
        else:
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
            self.norm1_name, norm1 = build_norm_layer(norm, channels, postfix=1)
            self.add_module(self.norm1_name, norm1)
            self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    @property
    def norm1(self):
        return getattr(self, self.norm1_name)

    def _stem(self) -> list[nn.Module]:
        return [self.stem] if self.deep_stem else [self.conv1, self.norm1]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.deep_stem:
            x = self.stem(x)
        else:
            x = self.conv1(x)
            x = self.norm1(x)
            x = self.relu(x)
        x = self.maxpool(x)
        outs = []
        for i, layer_name in enumerate(self.res_layers):
            res_layer = getattr(self, layer_name)
            x = res_layer(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


class ResNetV1c(ResNet):
    def __init__(self, **options) -> None:
        super().__init__(deep_stem=True, avg_down=False, **options)


class ResNetV1d(ResNet):
    def __init__(self, **options) -> None:
        super().__init__(deep_stem=True, avg_down=True, **options)


class InvertedResidual(nn.Module):
    def __init__(
        self, in_channels, out_channels, stride, expand_ratio, dilation=1, norm="BN", with_cp=False
    ) -> None:
        super().__init__()
        self.stride = stride
        self.with_cp = with_cp
        self.use_res_connect = self.stride == 1 and in_channels == out_channels
        hidden = round(in_channels * expand_ratio)
        options: dict[str, Any] = {"norm": norm, "act": nn.ReLU6}
        layers = []
        if expand_ratio != 1:
            layers.append(ConvModule(in_channels, hidden, 1, **options))
        layers.append(
            ConvModule(
                hidden,
                hidden,
                3,
                stride=stride,
                padding=dilation,
                dilation=dilation,
                groups=hidden,
                **options,
            )
        )
        layers.append(ConvModule(hidden, out_channels, 1, norm=norm, act=None))
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        def _inner_forward(x: Tensor) -> Tensor:
            if self.use_res_connect:
                return x + self.conv(x)
            return self.conv(x)

        if self.with_cp and x.requires_grad:
            return cp.checkpoint(_inner_forward, x, use_reentrant=True)
        return _inner_forward(x)


def make_divisible(value: float, divisor: int = 8) -> int:
    new_value = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return new_value + divisor if new_value < 0.9 * value else new_value


class MobileNetV2(_Frozen):
    arch_settings = (
        (1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1),
    )  # fmt: skip

    def __init__(
        self,
        widen_factor=1.0,
        strides=(1, 2, 2, 1, 1, 1, 1),
        dilations=(1, 1, 1, 2, 2, 4, 4),
        out_indices=(1, 2, 4, 6),
        frozen_stages=-1,
        norm_eval=False,
        norm="BN",
        with_cp=False,
    ) -> None:
        super().__init__()
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        channels = make_divisible(32 * widen_factor)
        self.conv1 = ConvModule(3, channels, 3, stride=2, padding=1, norm=norm, act=nn.ReLU6)
        self.layers = []
        for i, (ratio, c, number) in enumerate(self.arch_settings):
            out = make_divisible(c * widen_factor)
            blocks = []
            for j in range(number):
                # The rate of a stage is only its first block's.
                stride, rate = (strides[i], dilations[i]) if j == 0 else (1, 1)
                blocks.append(InvertedResidual(channels, out, stride, ratio, rate, norm, with_cp))
                channels = out
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            self.layers.append(f"layer{i + 1}")

    def _stem(self) -> list[nn.Module]:
        return [self.conv1]

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        x = self.conv1(x)
        outs = []
        for i, layer_name in enumerate(self.layers):
            layer = getattr(self, layer_name)
            x = layer(x)
            if i in self.out_indices:
                outs.append(x)
        if len(outs) == 1:
            return outs[0]
        return tuple(outs)


class CrossEntropyLoss(nn.Module):
    def __init__(self, loss_weight=1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, cls_score: Tensor, label: Tensor, ignore_index: int = 255) -> Tensor:
        loss = F.cross_entropy(cls_score, label, reduction="none", ignore_index=ignore_index)
        return self.loss_weight * loss.mean()


class BaseDecodeHead(BaseModule):
    def __init__(
        self,
        in_channels,
        channels,
        *,
        num_classes,
        out_channels=None,
        threshold=None,
        dropout_ratio=0.1,
        norm="BN",
        in_index=-1,
        align_corners=False,
        loss_weight=1.0,
    ) -> None:
        super().__init__()
        self.input_transform = None
        self.in_channels = in_channels
        self.in_index = in_index
        self.channels = channels
        self.dropout_ratio = dropout_ratio
        self.norm_cfg = norm
        self.ignore_index = 255
        self.align_corners = align_corners
        self.num_classes = num_classes
        self.out_channels = num_classes if out_channels is None else out_channels
        self.threshold = 0.3 if out_channels == 1 and threshold is None else threshold
        self.loss_decode = CrossEntropyLoss(loss_weight)
        self.sampler = None
        self.conv_seg = nn.Conv2d(channels, self.out_channels, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout_ratio) if dropout_ratio > 0 else None

    def extra_repr(self) -> str:
        return f"input_transform={self.input_transform}, align_corners={self.align_corners}"

    def _transform_inputs(self, inputs: Sequence[Tensor]) -> Tensor:
        return inputs[self.in_index]

    def cls_seg(self, feat: Tensor) -> Tensor:
        if self.dropout is not None:
            feat = self.dropout(feat)
        output = self.conv_seg(feat)
        return output

    def loss(self, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        seg_logits = self.forward(inputs)
        seg_logits = resize(
            input=seg_logits,
            size=labels.shape[1:],
            mode="bilinear",
            align_corners=self.align_corners,
        )
        return self.loss_decode(seg_logits, labels, ignore_index=self.ignore_index)

    def predict(self, inputs: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        seg_logits = self.forward(inputs)
        return resize(
            input=seg_logits, size=size, mode="bilinear", align_corners=self.align_corners
        )


class FCNHead(BaseDecodeHead):
    def __init__(self, num_convs=2, kernel_size=3, concat_input=True, dilation=1, **options):
        super().__init__(**options)
        self.num_convs = num_convs
        self.concat_input = concat_input
        padding = (kernel_size // 2) * dilation
        convs = [
            ConvModule(
                self.channels if i else self.in_channels,
                self.channels,
                kernel_size=kernel_size,
                padding=padding,
                dilation=dilation,
                norm=self.norm_cfg,
            )
            for i in range(num_convs)
        ]
        self.convs = nn.Sequential(*convs) if convs else nn.Identity()
        if self.concat_input:
            self.conv_cat = ConvModule(
                self.in_channels + self.channels,
                self.channels,
                kernel_size=kernel_size,
                padding=kernel_size // 2,
                norm=self.norm_cfg,
            )

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        x = self._transform_inputs(inputs)
        feats = self.convs(x)
        if self.concat_input:
            feats = self.conv_cat(torch.cat([x, feats], dim=1))
        return feats

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        output = self._forward_feature(inputs)
        output = self.cls_seg(output)
        return output


class ASPPModule(nn.ModuleList):
    """Gives a list, which the head concatenates."""

    def __init__(self, dilations, in_channels, channels, norm) -> None:
        super().__init__()
        self.dilations = dilations
        self.in_channels = in_channels
        self.channels = channels
        self.norm_cfg = norm
        for dilation in dilations:
            self.append(
                ConvModule(
                    in_channels,
                    channels,
                    1 if dilation == 1 else 3,
                    dilation=dilation,
                    padding=0 if dilation == 1 else dilation,
                    norm=norm,
                )
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        aspp_outs = []
        for aspp_module in self:
            aspp_outs.append(aspp_module(x))
        return aspp_outs


class DepthwiseSeparableASPPModule(ASPPModule):
    def __init__(self, dilations, in_channels, channels, norm) -> None:
        super().__init__(dilations, in_channels, channels, norm)
        for i, dilation in enumerate(dilations):
            if dilation > 1:
                self[i] = DepthwiseSeparableConvModule(
                    in_channels, channels, 3, dilation=dilation, padding=dilation, norm=norm
                )


class ASPPHead(BaseDecodeHead):
    def __init__(self, dilations=(1, 6, 12, 18), **options) -> None:
        super().__init__(**options)
        self.dilations = dilations
        norm = self.norm_cfg
        self.image_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), ConvModule(self.in_channels, self.channels, 1, norm=norm)
        )
        self.aspp_modules = ASPPModule(dilations, self.in_channels, self.channels, norm)
        self.bottleneck = ConvModule(
            (len(dilations) + 1) * self.channels, self.channels, 3, padding=1, norm=norm
        )

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        x = self._transform_inputs(inputs)
        aspp_outs = [
            resize(
                self.image_pool(x),
                size=x.size()[2:],
                mode="bilinear",
                align_corners=self.align_corners,
            )
        ]
        aspp_outs.extend(self.aspp_modules(x))
        aspp_outs = torch.cat(aspp_outs, dim=1)
        feats = self.bottleneck(aspp_outs)
        return feats

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        output = self._forward_feature(inputs)
        output = self.cls_seg(output)
        return output


class DepthwiseSeparableASPPHead(ASPPHead):
    def __init__(self, c1_in_channels, c1_channels, **options) -> None:
        super().__init__(**options)
        norm = self.norm_cfg
        self.aspp_modules = DepthwiseSeparableASPPModule(
            self.dilations, self.in_channels, self.channels, norm
        )
        if c1_in_channels > 0:
            self.c1_bottleneck = ConvModule(c1_in_channels, c1_channels, 1, norm=norm)
        else:
            self.c1_bottleneck = None
        self.sep_bottleneck = nn.Sequential(
            DepthwiseSeparableConvModule(
                self.channels + c1_channels, self.channels, 3, padding=1, norm=norm
            ),
            DepthwiseSeparableConvModule(self.channels, self.channels, 3, padding=1, norm=norm),
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        x = self._transform_inputs(inputs)
        aspp_outs = [
            resize(
                self.image_pool(x),
                size=x.size()[2:],
                mode="bilinear",
                align_corners=self.align_corners,
            )
        ]
        aspp_outs.extend(self.aspp_modules(x))
        aspp_outs = torch.cat(aspp_outs, dim=1)
        output = self.bottleneck(aspp_outs)
        if self.c1_bottleneck is not None:
            c1_output = self.c1_bottleneck(inputs[0])
            output = resize(
                input=output,
                size=c1_output.shape[2:],
                mode="bilinear",
                align_corners=self.align_corners,
            )
            output = torch.cat([output, c1_output], dim=1)
        output = self.sep_bottleneck(output)
        output = self.cls_seg(output)
        return output


class SegDataPreProcessor(nn.Module):
    """A child that no forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 120.0), False)
        self.register_buffer("std", torch.full((3, 1, 1), 58.0), False)


class EncoderDecoder(BaseModule):
    """Calls `forward` of its heads, not the heads: their hooks do not run."""

    def __init__(self, backbone, decode_head, auxiliary_head=None) -> None:
        super().__init__()
        self.data_preprocessor = SegDataPreProcessor()
        self.backbone = backbone
        self.decode_head = decode_head
        self.align_corners = decode_head.align_corners
        self.num_classes = decode_head.num_classes
        self.out_channels = decode_head.out_channels
        if auxiliary_head is not None:
            self.auxiliary_head = auxiliary_head
        self.test_cfg = {"mode": "whole"}

    @property
    def with_neck(self) -> bool:
        return hasattr(self, "neck") and self.neck is not None

    @property
    def with_auxiliary_head(self) -> bool:
        return hasattr(self, "auxiliary_head") and self.auxiliary_head is not None

    def extract_feat(self, inputs: Tensor) -> Sequence[Tensor]:
        x = self.backbone(inputs)
        if self.with_neck:
            x = self.neck(x)
        return x

    def encode_decode(self, inputs: Tensor) -> Tensor:
        x = self.extract_feat(inputs)
        return self.decode_head.predict(x, inputs.shape[2:])

    def loss(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.extract_feat(inputs)
        losses = {"decode.loss_ce": self.decode_head.loss(x, labels)}
        if self.with_auxiliary_head:
            losses["aux.loss_ce"] = self.auxiliary_head.loss(x, labels)
        return losses

    def predict(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """The logits at the size of the images; mmseg puts them into data samples."""
        return self.encode_decode(inputs)

    def _forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.extract_feat(inputs)
        return self.decode_head.forward(x)

    def forward(self, inputs: Tensor, data_samples: Tensor | None = None, mode: str = "tensor"):
        if mode == "loss":
            return self.loss(inputs, data_samples)
        if mode == "predict":
            return self.predict(inputs, data_samples)
        if mode == "tensor":
            return self._forward(inputs, data_samples)
        raise RuntimeError(f"Invalid mode {mode!r}. Only supports loss, predict and tensor mode")


def deeplab(
    plus: bool,
    backbone: nn.Module,
    num_classes: int = 19,
    channels: int = 512,
    dilations: tuple[int, ...] = (1, 12, 24, 36),
    norm: str = "BN",
    align_corners: bool = False,
    c1: bool = True,
    aux: bool = True,
    **head: Any,
) -> EncoderDecoder:
    """configs/_base_/models/deeplabv3_r50-d8.py, or deeplabv3plus_r50-d8.py.

    Args:
        plus: DeepLabv3+.
        backbone: gives a list of four maps.
        channels: of the decode head; the auxiliary head has half of them.
        c1: whether DeepLabv3+ reads the first map.
        head: further options of the decode head.
    """
    widths = _widths(backbone)
    options: dict[str, Any] = {
        "num_classes": num_classes, "norm": norm, "align_corners": align_corners,
    }  # fmt: skip
    head |= {"in_channels": widths[-1], "channels": channels, "dilations": dilations, **options}
    if plus:
        decode_head: ASPPHead = DepthwiseSeparableASPPHead(
            widths[0] if c1 else 0, 48 if c1 else 0, in_index=3, **head
        )
    else:
        decode_head = ASPPHead(**head)
    auxiliary_head = None
    if aux:
        auxiliary_head = FCNHead(
            in_channels=widths[2],
            channels=channels // 2,
            in_index=2,
            num_convs=1,
            concat_input=False,
            loss_weight=0.4,
            **options,
        )
    return EncoderDecoder(backbone, decode_head, auxiliary_head)


def _widths(backbone: nn.Module) -> list[int]:
    """The channels of the maps that a backbone gives."""
    names = getattr(backbone, "res_layers", None) or backbone.layers
    layers = [getattr(backbone, names[i]) for i in backbone.out_indices]
    return [
        [m for m in layer[-1].modules() if isinstance(m, nn.Conv2d)][-1].out_channels
        for layer in layers
    ]
