"""Small models of other libraries with random weights that look trained, one for each structure.

`CASES[name].model()` is a new model in eval mode, always with the same values; `inputs` gives maps
for it, `call` runs it, and `tensors` lists what a result has in it. Libraries are imported when a
model is built; what has no library on PyPI that imports here was written anew (`others_*`).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import others_jfzhang as jfzhang
import others_mmseg as mmseg
import others_vainf as vainf
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from deeplab_fast import testing

CLASSES = 5

# Odd maps at every stride, and even ones; what smp takes is divisible by the stride.
ANY = ((65, 97), (48, 64))
BY_16 = ((64, 96), (48, 80))


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        library: whose it is.
        requires: the module that must import, or "".
        build: makes the model, in any mode, with any weights.
        covers: what no other case has.
        sizes: heights and widths of maps that it takes.
        call: runs it on a map.
        trains: whether a step of training on a CPU is possible.
        share: of its layers, at least so many run in our forms.
    """

    library: str
    requires: str
    build: Callable[[], nn.Module]
    covers: str
    sizes: tuple[tuple[int, int], ...] = ANY
    call: Callable[[nn.Module, Tensor], Any] = lambda model, x: model(x)
    trains: bool = True
    share: float = 1.0

    def model(self) -> nn.Module:
        """A new one in eval mode."""
        testing.import_torchvision()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
            settle(model, lambda x: self.call(model, x), self.map(4))
        return model.eval()

    def map(self, batch: int, size: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images [batch, 3, *sizes[size]]."""
        generator = torch.Generator().manual_seed(7 + size)
        shape = (batch, 3, *self.sizes[size])
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def tensors(result: Any) -> dict[str, Tensor]:
    """The tensors of a result, by name: of a dict, a tuple, an output class of transformers."""
    if isinstance(result, Tensor):
        return {"out": result}
    if isinstance(result, Mapping):
        return dict(result)
    assert isinstance(result, (tuple, list)), type(result)
    return {str(i): each for i, each in enumerate(result)}


def logits(result: Any) -> Tensor:
    """The first of them, which are the logits."""
    return next(iter(tensors(result).values()))


def without_randomness(model: nn.Module) -> nn.Module:
    """No dropout, no dropped path."""
    for m in model.modules():
        if isinstance(m, _DropoutNd):
            m.p = 0.0
        for name in ("drop_prob", "_drop_connect_rate"):
            if hasattr(m, name):
                setattr(m, name, 0.0)
    return model


def settle(model: nn.Module, call: Callable[[Tensor], object], x: Tensor) -> None:
    """Give all norms and biases values that a mistake shows with, and statistics of x, nearly.

    With statistics of the data every layer passes something on, and no channel is scaled up by much
    more than the others, and rounding with it. Most of a map is positive: where a ReLU cuts off
    half of it, as with a bias around 0, a ResNet-50 multiplies an error of its input by 100, here
    by 2.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            nn.init.uniform_(m.weight, 0.4, 0.9)
            m.weight.data[::7] *= -1
            nn.init.uniform_(m.bias, -0.2, 0.8)
        elif isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None:
            nn.init.uniform_(m.bias, -0.1, 0.1)
    if any(isinstance(m, nn.SyncBatchNorm) for m in norms):
        # Computes none without a process group.
        for m in norms:
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
        return
    kept = [(m, m.p) for m in model.modules() if isinstance(m, _DropoutNd)]
    momenta = [m.momentum for m in norms]
    model.eval()
    for m, _ in kept:
        m.p = 0.0
    for m in norms:
        m.momentum = 1.0
        m.train()
    with torch.no_grad():
        call(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
        m.running_var.clamp_(min=0.3 * float(m.running_var.mean()))
        m.running_mean.add_(0.1 * m.running_var.sqrt() * torch.randn_like(m.running_mean))
        m.running_var.mul_(torch.empty_like(m.running_var).uniform_(0.8, 1.25))
        # A frozen encoder stays as it is when the model changes its mode.
        m.eval()
    for m, p in kept:
        m.p = p


def _narrow(build: Callable[[], nn.Module], factor: int = 4) -> Callable[[], nn.Module]:
    """One of `factor` channels wherever they can be divided: not those of images and classes."""

    def divided(channels: int) -> int:
        return channels if channels % factor else channels // factor

    def narrow() -> nn.Module:
        with torch.device("meta"):
            model = build()
            for m in model.modules():
                if isinstance(m, nn.Conv2d):
                    m.groups = m.groups if m.groups == 1 else divided(m.groups)
                    m.in_channels, m.out_channels = divided(m.in_channels), divided(m.out_channels)
                    shape = (m.out_channels, m.in_channels // m.groups, *m.kernel_size)
                    m.weight = nn.Parameter(torch.empty(shape))
                    if m.bias is not None:
                        m.bias = nn.Parameter(torch.empty(m.out_channels))
                elif isinstance(m, nn.BatchNorm2d):
                    m.__init__(divided(m.num_features), m.eps, m.momentum)
                elif isinstance(m, nn.Linear):
                    m.__init__(divided(m.in_features), m.out_features)
        model.to_empty(device="cpu")
        for m in model.modules():
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
        return model

    return narrow


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        segmentation = testing.import_torchvision().models.segmentation
        return getattr(segmentation, name)(weights_backbone=None, num_classes=CLASSES, **options)

    return build


def _smp(name: str, encoder: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        arguments = {"classes": CLASSES, "decoder_channels": 24} | options
        return getattr(smp, name)(encoder, encoder_weights=None, **arguments)

    return build


def _mobilenet_v2(**config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import MobileNetV2Config, MobileNetV2ForSemanticSegmentation

        options = {"num_labels": CLASSES, "depth_multiplier": 0.35, "output_stride": 8} | config
        return MobileNetV2ForSemanticSegmentation(MobileNetV2Config(**options))

    return build


def _mobilevit(**config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import MobileViTConfig, MobileViTForSemanticSegmentation

        narrow = {
            "num_labels": CLASSES,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
            "num_attention_heads": 2,
            "expand_ratio": 2.0,
            "aspp_out_channels": 24,
        }
        return MobileViTForSemanticSegmentation(MobileViTConfig(**narrow | config))

    return build


def _frozen(model: nn.Module) -> nn.Module:
    model.freeze_encoder()
    return model


def _lora() -> nn.Module:
    import peft

    model = _smp("DeepLabV3Plus", "resnet18")()
    config = peft.LoraConfig(
        r=2,
        target_modules=["decoder.block1.0", "encoder.layer1.0.conv1"],
        init_lora_weights=False,
        modules_to_save=["segmentation_head"],
    )
    return peft.get_peft_model(model, config)


def _separable(plus: bool) -> nn.Module:
    model = vainf.mobilenet(plus, CLASSES, 16, 0.25, 24)
    vainf.convert_to_separable_conv(model.classifier)
    return model


def _narrow_resnet(cls: type = mmseg.ResNetV1c, depth: int = 50, **options: Any) -> nn.Module:
    blocks = (1, 2, 2, 3) if depth == 50 else (2, 2, 2, 2)
    return cls(depth=depth, base_channels=16, stage_blocks=blocks, **options)


def _mmseg(plus: bool, backbone: Callable[[], nn.Module], **options: Any) -> Callable:
    return lambda: mmseg.deeplab(plus, backbone(), CLASSES, **{"channels": 24} | options)


def labels_for(x: Tensor) -> Tensor:
    """Labels [N, H, W] for images, some of them ignored."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES + 1, (len(x), *x.shape[2:]), generator=generator)
    return labels.masked_fill(labels == CLASSES, 255)


def _predict(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, mode="predict")


def _losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return model(x, labels_for(x), mode="loss")


def _vainf_resnet(plus: bool, output_stride: int) -> Callable[[], nn.Module]:
    return lambda: vainf.resnet(plus, CLASSES, output_stride, (1, 2, 2, 2), 16, 24)


def _vainf_mobilenet(plus: bool, output_stride: int) -> Callable[[], nn.Module]:
    return lambda: vainf.mobilenet(plus, CLASSES, output_stride, 0.25, 24)


def _jfzhang(backbone: str, **options: Any) -> Callable[[], nn.Module]:
    narrow = {"num_classes": CLASSES, "factor": 4, "layers": (1, 2, 2), "middle": 2} | options
    return lambda: jfzhang.DeepLab(backbone, **narrow)


def _cases(library: str, requires: str, rows: dict[str, tuple]) -> dict[str, Case]:
    cases = {}
    for name, (build, covers, *options) in rows.items():
        rest = dict(ChainMap(*options))
        cases[f"{library} {name}"] = Case(library, requires, build, covers, **rest)
    return cases


def _least(share: float) -> dict[str, float]:
    return {"share": share}


_BY_16 = {"sizes": BY_16}
_AUX = {"aux_loss": True}
_PARAMS = {"classes": 3, "dropout": 0.2, "activation": "sigmoid"}

CASES: dict[str, Case] = {
    **_cases("torchvision", "torchvision", {
        "deeplabv3_resnet50": (_narrow(_torchvision("deeplabv3_resnet50")), "no auxiliary head"),
        "deeplabv3_resnet50 aux": (
            _narrow(_torchvision("deeplabv3_resnet50", **_AUX)), "an auxiliary head: two maps"),
        "deeplabv3_resnet101": (
            _narrow(_torchvision("deeplabv3_resnet101")), "its depth",
            {"sizes": ((33, 49), (48, 64))}),
        "deeplabv3_mobilenet_v3_large aux": (
            _torchvision("deeplabv3_mobilenet_v3_large", **_AUX),
            "h-swish, squeeze-excitation, eps and momentum of its own"),
        "fcn_resnet50 aux": (_narrow(_torchvision("fcn_resnet50", **_AUX)), "no ASPP"),
        "lraspp_mobilenet_v3_large": (
            _torchvision("lraspp_mobilenet_v3_large"), "a product with a gate over the mean"),
    }),
    **_cases("smp", "segmentation_models_pytorch", {
        "v3 resnet18": (
            _smp("DeepLabV3", "resnet18", decoder_atrous_rates=(1, 2, 4)),
            "BasicBlocks with dilated shortcuts, rates inside of the map", _BY_16),
        "v3 resnet50 os16": (
            _narrow(_smp("DeepLabV3", "resnet50", encoder_output_stride=16)),
            "stride 16, up by 16", _BY_16),
        "v3 separable": (
            _smp("DeepLabV3", "resnet18", decoder_aspp_separable=True, upsampling=4),
            "separable ASPP, logits of another size", _BY_16),
        "v3 mobilenet_v2 sigmoid": (
            _smp("DeepLabV3", "mobilenet_v2", classes=1, activation="sigmoid"),
            "one class, probabilities", _BY_16),
        "v3plus resnet18": (
            _smp("DeepLabV3Plus", "resnet18", upsampling=8), "up by 8, twice the size", _BY_16),
        "v3plus resnet50 os8 aux": (
            _narrow(_smp("DeepLabV3Plus", "resnet50", encoder_output_stride=8, aux_params=_PARAMS)),
            "(mask, label), up by 2", _BY_16, _least(0.98)),
        "v3plus resnet18 depth 3": (
            _smp("DeepLabV3Plus", "resnet18", encoder_depth=3, decoder_aspp_separable=False),
            "depth 3: the map in front of the last is the skip", _BY_16),
        "v3plus mobilenet_v2": (
            _smp("DeepLabV3Plus", "mobilenet_v2", activation="softmax2d"), "softmax",
            _BY_16, _least(0.99)),
        "v3plus efficientnet-b0": (
            _smp("DeepLabV3Plus", "efficientnet-b0"),
            "convolutions with their own padding, swish, a second argument of blocks", _BY_16),
        "v3plus tu-resnet18": (
            _smp("DeepLabV3Plus", "tu-resnet18"), "timm's FeatureListNet of a ResNet", _BY_16),
        "v3plus tu-skresnet18": (
            _smp("DeepLabV3Plus", "tu-skresnet18"), "selective kernels: softmax of paths",
            _BY_16, _least(0.8)),
        "v3plus tu-regnety_002": (
            _smp("DeepLabV3Plus", "tu-regnety_002"), "BatchNormAct2d, groups, gates",
            _BY_16),
        "v3 tu-mobilenetv3_small_050": (
            _smp("DeepLabV3", "tu-mobilenetv3_small_050", encoder_output_stride=16),
            "BatchNormAct2d in inverted residuals", _BY_16),
        "v3plus tu-efficientnet_lite0": (
            _smp("DeepLabV3Plus", "tu-efficientnet_lite0"), "ReLU6 in BatchNormAct2d", _BY_16),
        "v3plus tu-convnext_atto": (
            _smp("DeepLabV3Plus", "tu-convnext_atto"),
            "no batch norm, a skip of no channels", _BY_16, _least(0.65)),
        "v3plus frozen encoder": (
            lambda: _frozen(_smp("DeepLabV3Plus", "resnet18")()),
            "norms in eval through train(), parameters without gradients", _BY_16),
    }),
    **_cases("peft", "peft", {
        "LoRA on smp": (
            _lora, "convolutions that are wrapped, a wrapped model", _BY_16, _least(0.85)),
    }),
    **_cases("transformers", "transformers", {
        "mobilenet_v2": (_mobilenet_v2(), "SAME padding, pooling first, align_corners"),
        "mobilenet_v2 os16 expanded": (
            _mobilenet_v2(output_stride=16, first_layer_is_expansion=False),
            "a stem with an expansion"),
        "mobilenet_v2 torch padding": (
            _mobilenet_v2(tf_padding=False, hidden_act="silu"), "symmetric padding, swish"),
        "mobilevit os8": (
            _mobilevit(output_stride=8), "transformer blocks, odd maps resized", _least(0.6)),
        "mobilevit os16": (
            _mobilevit(output_stride=16, hidden_act="relu"), "ReLU instead", _least(0.6)),
    }),
    **_cases("mmseg", "", {
        "v3 r50-d8": (_mmseg(False, _narrow_resnet), "heads by their forward, 3x3 bottleneck"),
        "v3 r50-d8 predict": (
            _mmseg(False, _narrow_resnet, align_corners=True, dropout_ratio=0),
            "mode='predict', align_corners, no dropout", {"call": _predict}),
        "v3 r50-d8 losses": (
            _mmseg(False, _narrow_resnet, dilations=(1, 2, 4)),
            "mode='loss': labels, two heads; three branches", {"call": _losses}),
        "v3 r18 mg": (
            _mmseg(False, lambda: _narrow_resnet(mmseg.ResNet, 18, multi_grid=(2, 4))),
            "BasicBlocks, a multi-grid, a 7x7 stem"),
        "v3 v1d mg checkpointed": (
            _mmseg(False, lambda: _narrow_resnet(
                mmseg.ResNetV1d, multi_grid=(1, 2, 4), with_cp=True)),
            "average pools in shortcuts, recomputation", _least(0.45)),
        "v3 caffe frozen": (
            _mmseg(False, lambda: _narrow_resnet(
                mmseg.ResNet, style="caffe", frozen_stages=1, norm_eval=True), norm="reverted"),
            "strides in 1x1, frozen stages and norms, _BatchNormXd"),
        "v3 SyncBN": (
            _mmseg(False, lambda: _narrow_resnet(norm="SyncBN"), norm="SyncBN"),
            "SyncBatchNorm in eval mode", {"trains": False}),
        "v3 binary": (
            _mmseg(False, _narrow_resnet, out_channels=1, dilations=(1, 1, 6), aux=False),
            "one channel, two 1x1 branches"),
        "v3plus r50-d8": (
            _mmseg(True, _narrow_resnet, dilations=(1, 2, 6, 12)), "separable with norms between",
            {"call": _predict}),
        "v3plus no c1": (
            _mmseg(True, _narrow_resnet, c1=False, align_corners=True), "no low-level map"),
        "v3plus m-v2-d8": (
            _mmseg(True, lambda: mmseg.MobileNetV2(0.25)), "inverted residuals of ConvModules",
            {"call": _losses}),
    }),
    **_cases("vainf", "", {
        "v3 resnet50 os8": (_vainf_resnet(False, 8), "a head that takes a dict"),
        "v3plus resnet50 os16": (_vainf_resnet(True, 16), "low-level first"),
        "v3 mobilenet os16": (_vainf_mobilenet(False, 16), "padding in front of the expansion"),
        "v3plus mobilenet os8": (_vainf_mobilenet(True, 8), "its dilated blocks"),
        "v3 mobilenet separable": (
            lambda: _separable(False), "AtrousSeparableConvolution in ASPP"),
        "v3plus mobilenet separable": (lambda: _separable(True), "and behind a concatenation"),
    }),
    **_cases("jfzhang", "", {
        "resnet os16": (
            _jfzhang("resnet"), "multi-grid, norms with a forward of their own"),
        "resnet os8 plain norms": (
            _jfzhang("resnet", output_stride=8, sync_bn=False), "BatchNorm2d"),
        "xception os16": (
            _jfzhang("xception"), "a ReLU in place on what the skip reads, one for all",
            _least(0.85)),
        "xception os8 plain norms": (
            _jfzhang("xception", output_stride=8, sync_bn=False), "other strides", _least(0.85)),
        "mobilenet os8 plain norms": (
            _jfzhang("mobilenet", output_stride=8, sync_bn=False), "modules under two names"),
        "mobilenet os16": (_jfzhang("mobilenet"), "both"),
    }),
}  # fmt: skip
