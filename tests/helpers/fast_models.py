"""Models of every family, small ones, and ways of changing them, for tests of programs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import deeplab_fast as dlf
from deeplab_fast.dispatch.errors import SAVING
from deeplab_fast.engine.batch_norm import freeze_batch_norm
from deeplab_fast.models.mobilenetv2 import SamePadConv2d


def trained(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and affine values that a mistake in folding would show."""
    generator = torch.Generator().manual_seed(5)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor, low, high in (
                (m.running_mean, -0.2, 0.2),
                (m.running_var, 0.5, 2.0),
                (m.weight, 0.5, 1.5),
                (m.bias, -0.2, 0.2),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def plain(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with dlf.use_backend("reference"), torch.no_grad():
        return model(x)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def assert_close(y: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(y) == list(expected)
    for key, value in expected.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            same = y[key].is_contiguous(memory_format=layout)
            assert same == value.is_contiguous(memory_format=layout)
        assert error(y[key], value) <= SAVING, key


FAMILIES = {
    "resnet18": lambda: dlf.deeplabv3_resnet18(num_classes=5, aux_loss=True),
    "multi-grid-deep-stem": lambda: dlf.deeplabv3_resnet18(
        num_classes=5, multi_grid=(1, 2), stem="deep", output_stride=16
    ),
    "cascaded": lambda: dlf.deeplabv3_cascaded_resnet50(num_classes=5),
    "mobilenetv3": lambda: dlf.deeplabv3_mobilenet_v3_large(num_classes=5, aux_loss=True),
    "mobilenetv3-os8": lambda: dlf.deeplabv3_mobilenet_v3_large(num_classes=5, output_stride=8),
    "mobilenetv2": lambda: dlf.deeplabv3_mobilenet_v2_tf(num_classes=5),
    "mobilenetv2-os8": lambda: dlf.deeplabv3_mobilenet_v2_tf(
        num_classes=5, output_stride=8, atrous_rates=(3, 6), width=0.5
    ),
    "mobilenetv2-folded": lambda: dlf.deeplabv3_mobilenet_v2_tf(
        num_classes=5, norm="folded", width=0.5
    ),
    "efficientnet-lite": lambda: dlf.deeplabv3_efficientnet_lite0(num_classes=5),
    "fregu856": lambda: dlf.fregu856_resnet18(num_classes=5),
    "paper": lambda: dlf.deeplabv3_resnet18(num_classes=5, head="paper", atrous_rates=()),
    # 3x3 projection: the pooled vector differs at the border.
    "mmseg": lambda: dlf.deeplabv3_resnet18(num_classes=5, head="mmseg", aspp_channels=64),
    "deeplabv2": lambda: dlf.deeplabv3_resnet18(num_classes=5, head="deeplabv2"),
    "running-norm": lambda: dlf.deeplabv3_resnet18(num_classes=5, image_pooling_norm="running"),
}


def quick(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with random weights drawn once; a builder draws them two or three times."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_uniform_(m.weight)
            if m.bias is not None:
                nn.init.uniform_(m.bias, -0.1, 0.1)
    return trained(model)


def narrow(build: Callable[[], nn.Module], factor: int = 8) -> nn.Module:
    """As `quick`, with one of `factor` channels everywhere but at input and output."""
    with torch.device("meta"):
        model = build()
    heads = [model.classifier, *([model.aux_classifier] if model.aux_classifier else [])]
    last = {[m for m in head.modules() if isinstance(m, nn.Conv2d)][-1] for head in heads}
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.__init__(m.num_features // factor, m.eps, device="meta")
        elif isinstance(m, nn.Conv2d):
            m.in_channels = m.in_channels if m.in_channels == 3 else m.in_channels // factor
            m.out_channels = m.out_channels if m in last else m.out_channels // factor
            m.groups = m.in_channels if m.groups > 1 else 1
            shape = (m.out_channels, m.in_channels // m.groups, *m.kernel_size)
            m.weight = nn.Parameter(torch.empty(shape, device="meta"))
            if m.bias is not None:
                m.bias = nn.Parameter(torch.empty(m.out_channels, device="meta"))
    return quick(lambda: model)


def small() -> nn.Module:
    """A model of one's own; drawing random weights is most of the cost of a builder."""
    return copy.deepcopy(_small())


@functools.cache
def _small() -> nn.Module:
    """A quick model with batch norm, ReLU6, residuals, SAME padding, an atrous branch, pooling."""
    torch.manual_seed(1)
    model = trained(
        dlf.deeplabv3_mobilenet_v2_tf(
            num_classes=4, width=0.25, atrous_rates=(2,), aspp_channels=24, output_stride=16
        )
    )
    # Statistics of its own data, with which every layer passes something on.
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 96, 96))
    for norm in norms:
        norm.momentum = 0.0003
        # No channel is scaled up by much more than the others, and rounding with it.
        norm.running_var.clamp_(min=0.5 * float(norm.running_var.mean()))
    return model.eval()


def small_resnet() -> nn.Module:
    return copy.deepcopy(_small_resnet())


@functools.cache
def _small_resnet() -> nn.Module:
    torch.manual_seed(2)
    return trained(dlf.deeplabv3_resnet18(num_classes=4, aspp_channels=16, aux_loss=True))


X = torch.randn(1, 3, 48, 33, generator=torch.Generator().manual_seed(7))


def conv_of(model: nn.Module) -> nn.Conv2d:
    return model.classifier[0].project[0]


def block_of(model: nn.Module) -> nn.Module:
    return model.backbone.expanded_conv_2


def replaced(model: nn.Module) -> None:
    old = model.classifier[1]
    model.classifier[1] = nn.Conv2d(old.in_channels, old.out_channels, 1)


def trained_for_a_step(model: nn.Module, optimizer: Callable = torch.optim.SGD) -> None:
    model.train()
    steps = optimizer(model.parameters(), lr=0.05)
    with torch.enable_grad():
        model(torch.randn(2, 3, 33, 33))["out"].square().mean().backward()
    steps.step()
    model.eval()


def statistics_only(model: nn.Module) -> None:
    model.train()
    with torch.no_grad():
        model(torch.randn(2, 3, 33, 33))
    model.eval()


def in_place(write: Callable[[Tensor], object]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            write(conv_of(model).weight)

    return change


def exchanged_with_average(model: nn.Module) -> None:
    """Weights and their moving average change places, as EMA does for validation."""
    average = copy.deepcopy(model)
    with torch.no_grad():
        for p in average.parameters():
            p.mul_(1.1)
    for p, q in zip(model.parameters(), average.parameters(), strict=True):
        p.data, q.data = q.data, p.data


def through_numpy(model: nn.Module) -> None:
    conv_of(model).weight.detach().numpy()[1, 2] = 0.5


def one_bit(model: nn.Module) -> None:
    # The highest of the exponent's bits that is not set makes a large number of a small one.
    bits = model.classifier[1].weight.data.view(torch.int32)
    bits[0, 3, 0, 0] ^= 1 << 26


def shared_storage(model: nn.Module) -> None:
    weight = conv_of(model).weight
    alias = torch.empty(0).set_(weight.untyped_storage(), 0, (weight.numel(),))
    alias[5:9] = 1.0


def loaded_state(model: nn.Module, assign: bool = False) -> None:
    state = {
        k: v * 1.2 if "classifier" in k and v.is_floating_point() else v.clone()
        for k, v in model.state_dict().items()
    }
    model.load_state_dict(state, assign=assign)


def parametrized(model: nn.Module) -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    parametrize.register_parametrization(conv_of(model), "weight", Twice())


def parametrized_and_back(model: nn.Module) -> None:
    parametrized(model)
    model.forward_logits(X)
    parametrize.remove_parametrizations(conv_of(model), "weight")


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        conv_of(model).weight = nn.Parameter(conv_of(model).weight * 2, requires_grad=False)
        model.forward_logits(X)
        # Has no version counter.
        conv_of(model).weight.mul_(2)


def dilated(model: nn.Module) -> None:
    conv = model.classifier[0].convs[1][0]
    conv.dilation = conv.padding = (3, 3)


def other_conv_forward(model: nn.Module) -> None:
    """As seamless tiling does."""
    conv = conv_of(model)

    def tiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x.roll(1, 3), weight, bias)

    conv._conv_forward = tiled


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), bias)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    # Version counters.
    "add_": in_place(lambda w: w.add_(0.1)),
    "foreach": in_place(lambda w: torch._foreach_mul_([w], 1.5)),
    "detach": in_place(lambda w: w.detach().mul_(1.5)),
    "slice": in_place(lambda w: w[0].fill_(0.3)),
    "init": lambda m: nn.init.normal_(conv_of(m).weight),
    "sgd": trained_for_a_step,
    "adam-foreach": lambda m: trained_for_a_step(
        m, lambda p, lr: torch.optim.Adam(p, lr=lr, foreach=True)
    ),
    "adam-fused": lambda m: trained_for_a_step(
        m, lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True)
    ),
    "load_state_dict": loaded_state,
    "statistics": statistics_only,
    "running_var": lambda m: block_of(m).depthwise.bn.running_var.mul_(3),
    # Past the version counters.
    "data-add_": lambda m: conv_of(m).weight.data.add_(0.1),
    "data-copy_": lambda m: conv_of(m).weight.data.copy_(torch.randn(24, 72, 1, 1)),
    "data-neg_": lambda m: conv_of(m).weight.data.neg_(),
    "data-flip": lambda m: conv_of(m).weight.data.copy_(conv_of(m).weight.data.flip(1)),
    "data-two-filters": lambda m: conv_of(m).weight.data.copy_(
        conv_of(m).weight.data[[2, 1, 0, *range(3, 24)]]
    ),
    "data-one-element": lambda m: conv_of(m).weight.data[3, 1, 0, 0].fill_(2.0),
    "data-one-bit": one_bit,
    "data-bias": lambda m: m.classifier[1].bias.data.add_(1),
    "data-batch-norm": lambda m: block_of(m).project.bn.weight.data.mul_(0.5),
    "data-running-mean": lambda m: block_of(m).project.bn.running_mean.data.add_(0.5),
    "numpy": through_numpy,
    "storage": shared_storage,
    "inference-tensor": in_inference_mode,
    # Other storage.
    "data-assigned": lambda m: setattr(conv_of(m).weight, "data", conv_of(m).weight.data * 2),
    "set_": in_place(lambda w: w.set_(torch.randn(24, 72, 1, 1))),
    "ema": exchanged_with_average,
    "swap_tensors": lambda m: torch.utils.swap_tensors(
        conv_of(m).weight, nn.Parameter(torch.randn(24, 72, 1, 1))
    ),
    "half-and-back": lambda m: m.half().float(),
    "shared-memory": lambda m: conv_of(m.share_memory()).weight.data.mul_(2),
    # Other objects.
    "parameter": lambda m: setattr(conv_of(m), "weight", nn.Parameter(torch.randn(24, 72, 1, 1))),
    "buffer": lambda m: setattr(
        block_of(m).project.bn, "running_mean", torch.full_like(block_of(m).project.bn.bias, 0.5)
    ),
    "load-assign": lambda m: loaded_state(m, assign=True),
    "no-bias": lambda m: setattr(m.classifier[1], "bias", None),
    "new-bias": lambda m: setattr(conv_of(m), "bias", nn.Parameter(torch.ones(24))),
    "parametrization": parametrized,
    "parametrization-removed": parametrized_and_back,
    "weight_norm": lambda m: (
        in_place(lambda w: w.mul_(2))(m) or parametrizations.weight_norm(conv_of(m))
    ),
    "pruning": lambda m: prune.l1_unstructured(conv_of(m), "weight", 0.5),
    # Modules.
    "module": replaced,
    "convolution": lambda m: setattr(block_of(m).project, "conv", nn.Conv2d(36, 6, 1)),
    "activation": lambda m: setattr(block_of(m).depthwise, "act", nn.Sigmoid()),
    "unknown-activation": lambda m: setattr(block_of(m).depthwise, "act", nn.Softplus()),
    "norm": lambda m: setattr(block_of(m).project, "bn", nn.GroupNorm(2, 6)),
    "no-norm": lambda m: setattr(block_of(m).project, "bn", nn.Identity()),
    "backbone": lambda m: setattr(m, "backbone", copy.deepcopy(small_other().backbone)),
    "classifier": lambda m: setattr(m, "classifier", nn.Conv2d(80, 4, 1)),
    "removed-step": lambda m: m.classifier[0].project.__delitem__(2),
    "forward": lambda m: setattr(
        conv_of(m), "forward", lambda x: F.conv2d(x, 2 * conv_of(m).weight)
    ),
    "conv-forward": other_conv_forward,
    "call-impl": lambda m: setattr(
        conv_of(m), "_call_impl", lambda x: F.conv2d(x, -conv_of(m).weight)
    ),
    "class": lambda m: setattr(conv_of(m), "__class__", Standardised),
    "activation-forward": lambda m: setattr(block_of(m).expand.act, "forward", torch.sigmoid),
    "compiled-submodule": lambda m: block_of(m).expand.act.compile(backend="eager"),
    # Settings.
    "output-stride": lambda m: m.set_output_stride(8),
    "dilation": dilated,
    "stride": lambda m: (
        setattr(block_of(m).depthwise.conv, "stride", (2, 2))
        or setattr(block_of(m), "use_res_connect", False)
    ),
    "eps": lambda m: setattr(block_of(m).depthwise.bn, "eps", 0.5),
    "residual": lambda m: setattr(block_of(m), "use_res_connect", False),
    "dropout": lambda m: m.classifier[0].project[3].__setattr__("p", 0.3),
    "hook": lambda m: conv_of(m).register_forward_hook(lambda module, args, y: 2 * y),
    "pre-hook": lambda m: block_of(m).register_forward_pre_hook(
        lambda module, args: (2 * args[0],)
    ),
    "hook-deep-inside": lambda m: block_of(m).expand.act.register_forward_hook(
        lambda module, args, y: y + 1
    ),
}
# These keep the numbers, or nearly so; the others must change them.
SAME_NUMBERS = {"dropout", "half-and-back", "compiled-submodule"}


def small_other() -> nn.Module:
    torch.manual_seed(11)
    return trained(dlf.deeplabv3_mobilenet_v2_tf(num_classes=4, width=0.25))


class Attention(nn.Module):
    """Looks at the memory format, as `view` does, and keeps a state that changes in every call."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, channels, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        n, c = x.shape[:2]
        flat = x.view(n, c, -1)
        return x + self.project((flat.softmax(-1) * flat).sum(-1).view(n, c, 1, 1))


class OwnBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=8, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": torch.tanh(self.conv(x))}


@functools.cache
def _resnet50() -> nn.Module:
    return quick(lambda: dlf.deeplabv3_resnet50(num_classes=4, aspp_channels=16))


def _bottleneck_with(**modules: nn.Module) -> nn.Module:
    model = copy.deepcopy(_resnet50())
    for name, module in modules.items():
        setattr(model.backbone.layer2[1], name, module)
    return model.eval()


OWN = {
    "attention": lambda: _with_attention(small_resnet()),
    "backbone": lambda: dlf.DeepLabV3(
        OwnBackbone(), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1))
    ),
    "group-norm": lambda: _bottleneck_with(bn3=nn.GroupNorm(4, 512)),
    "inner-group-norm": lambda: _bottleneck_with(bn1=nn.GroupNorm(4, 128)),
    "leaky-relu": lambda: _bottleneck_with(relu=nn.LeakyReLU(0.1)),
    "activated-shortcut": lambda: _bottleneck_with(downsample=nn.Sequential(nn.Tanh())),
    "reflect": lambda: _bottleneck_with(
        conv2=nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect", bias=False)
    ),
    "same": lambda: _bottleneck_with(conv2=nn.Conv2d(128, 128, 3, padding="same", bias=False)),
    "no-statistics": lambda: _bottleneck_with(bn2=nn.BatchNorm2d(128, track_running_stats=False)),
    "not-affine": lambda: _bottleneck_with(bn2=nn.BatchNorm2d(128, affine=False)),
    "extra-convolution": lambda: _bottleneck_with(
        conv3=nn.Sequential(nn.Conv2d(128, 64, 1), nn.ReLU6(), nn.Conv2d(64, 512, 1))
    ),
    # TensorFlow's padding of kernels that are even or not square, with stride and dilation.
    "same-even": lambda: _same_padded((4, 3), stride=2),
    "same-dilated": lambda: _same_padded((5, 2), dilation=(1, 3)),
    "instance": lambda: _bottleneck_with(bn2=nn.InstanceNorm2d(128)),
    "frozen": lambda: _frozen(small_resnet()),
    "average-head": lambda: _with_head(nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(512, 4, 1))),
    "pairs-head": lambda: _with_head(
        nn.Sequential(nn.Dropout(), nn.Identity(), nn.Conv2d(512, 4, 1))
    ),
}


def _same_padded(kernel: tuple[int, int], **options: object) -> nn.Module:
    conv = SamePadConv2d(512, 8, kernel, **options)
    return _with_head(conv, nn.ReLU6(), nn.Conv2d(8, 4, 1))


def _with_attention(model: nn.Module) -> nn.Module:
    model.backbone.layer3[1] = Attention(256)
    model.classifier[0].convs[1].add_module("attention", Attention(16))
    return model.eval()


def _frozen(model: nn.Module) -> nn.Module:
    freeze_batch_norm(model)
    return model


def _with_head(*modules: nn.Module) -> nn.Module:
    model = small_resnet()
    model.classifier = nn.Sequential(*modules)
    return model.eval()
