"""A model in eval mode takes the fast path by itself: same numbers, and never stale."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import deeplab_fast as dlf
from deeplab_fast.dispatch.errors import SAVING
from deeplab_fast.engine.batch_norm import freeze_batch_norm
from deeplab_fast.models.mobilenetv2 import SamePadConv2d
from deeplab_fast.program import fast_path, inference, layers
from deeplab_fast.testing import deterministic


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


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[layers.Program]:
    """The program of every call that took the fast path."""
    ran: list[layers.Program] = []
    original = layers.Program.logits

    def logits(self: layers.Program, *args: object, **options: object) -> dict[str, Tensor]:
        ran.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(layers.Program, "logits", logits)
    return ran


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The model of every preparation."""
    made: list[nn.Module] = []
    original = inference.fold

    def counted(model: nn.Module, **options: object) -> object:
        made.append(model)
        return original(model, **options)

    monkeypatch.setattr(inference, "fold", counted)
    return made


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


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_every_family(family: str, programs: list) -> None:
    model = quick(FAMILIES[family])
    # Even and odd, two images: both sides of TensorFlow's padding, a batch; then maps of 1 and 2
    # rows, with dilations far beyond them. The largest model takes the second only.
    for n, h, w in ((2, 50, 65), (1, 9, 17))[family == "cascaded" :]:
        x = torch.randn(n, 3, h, w)
        expected = plain(model, x)
        assert not programs
        with torch.inference_mode():
            y, low = model(x), model.forward_logits(x)
        assert len(programs) == 2
        programs.clear()
        assert_close(y, expected)
        with dlf.use_backend("reference"), torch.no_grad():
            expected_low = model.forward_logits(x)
        assert low.is_contiguous() == expected_low.is_contiguous()
        assert error(low, expected_low) <= SAVING
        same = (y["out"].argmax(1) == expected["out"].argmax(1)).float().mean()
        # Rounding decides ties only: one pixel in a thousand is generous for random weights.
        assert same >= 0.999
    # No module was run as it is.
    assert not [p for p in model._fast_path._state.program.layers if isinstance(p, PLAIN)]


PLAIN = layers.PlainLayer


@pytest.mark.parametrize("family", ["resnet18", "mobilenetv3", "mobilenetv2"])
def test_error_against_float64(family: str) -> None:
    model = quick(FAMILIES[family])
    x = torch.randn(1, 3, 65, 65)
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        assert model.fast_reasons(x) == []
        y, expected = model(x), exact(x.double())
    for key, value in expected.items():
        assert error(y[key], value) <= SAVING


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


def test_prepared_once_for_all_shapes_and_methods(programs: list, folds: list) -> None:
    model = small()
    with torch.inference_mode():
        for n, h, w in ((1, 33, 33), (2, 64, 17), (1, 1, 1), (1, 33, 33)):
            model(torch.randn(n, 3, h, w))
            model.forward_logits(torch.randn(n, 3, h, w))
    labels = model.predict(X)
    assert labels.dtype == torch.uint8
    assert len(programs) == 9 and len(folds) == 1


def test_predict_on_a_training_model_puts_its_mode_back(programs: list, folds: list) -> None:
    model = small().train()
    for _ in range(2):
        model.predict(X)
        assert model.training and model.backbone.Conv.bn.training
    assert len(programs) == 2 and len(folds) == 1


# --- Never stale ------------------------------------------------------------------------------


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


def other_forward(model: nn.Module) -> None:
    conv = conv_of(model)
    conv.forward = lambda x: F.conv2d(x, 2 * conv.weight)


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


@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(change: str) -> None:
    model = small()
    with torch.no_grad():
        before = model(X)["out"].clone()
        assert model.fast_reasons(X) == []
        CHANGES[change](model)
        y = model(X)["out"]
        again = model(X)["out"]
    expected = plain(model, X)["out"]
    # Far below any change, and above the rounding of a model that is trained at random.
    assert error(y, expected) <= 1e-4
    assert torch.equal(y, again)
    moved = error(before, expected)
    assert moved > 1e-3 or change in SAME_NUMBERS, moved


def test_modes_of_inner_modules() -> None:
    """A batch norm in training mode within a model in eval mode, and Monte Carlo dropout."""
    model = small()
    norm, dropout = block_of(model).depthwise.bn, model.classifier[0].project[3]
    dropout.p = 0.5
    with torch.no_grad():
        first = model(X)["out"]
        norm.train()
        statistics = norm.running_mean.clone()
        norm.momentum = 0.5
        learning = model(X)["out"]
        assert not torch.equal(norm.running_mean, statistics)
        assert error(learning, first) > 1e-4
        norm.eval()
        expected = plain(model, X)["out"]
        assert error(model(X)["out"], expected) <= SAVING
        dropout.train()
        assert not torch.equal(model(X)["out"], model(X)["out"])
        model.eval()
        assert error(model(X)["out"], expected) <= SAVING


def test_hooks_run_and_leave(programs: list) -> None:
    model = small()
    seen = []
    handle = model.backbone.register_forward_hook(lambda m, args, y: seen.append(y["out"].shape))
    with torch.no_grad():
        model(X)
        assert len(seen) == 1 and not programs
        assert model.fast_reasons(X) == ["backbone has forward hooks"]
        handle.remove()
        model(X)
    assert len(seen) == 1 and len(programs) == 1
    # Hooks of the model itself run outside of what is prepared.
    model.register_forward_hook(lambda m, args, y: seen.append(y["out"].shape))
    with torch.no_grad():
        model(X)
    assert len(seen) == 2 and len(programs) == 2


def test_functional_call_has_the_weights_it_is_given() -> None:
    model = small()
    doubled = {
        name: (2 if name.startswith("classifier.0.project") else 1) * p.detach()
        for name, p in model.named_parameters()
    }
    with torch.no_grad():
        own = model(X)["out"]
        y = torch.func.functional_call(model, doubled, (X,))["out"]
        with dlf.use_backend("reference"):
            expected = torch.func.functional_call(model, doubled, (X,))["out"]
        assert error(y, expected) <= SAVING < error(own, expected)
        assert torch.equal(model(X)["out"], own)


def test_nothing_changed_prepares_nothing(folds: list) -> None:
    model = small()
    with torch.no_grad():
        y = model(X)["out"]
        # Same values in the same places.
        conv_of(model).weight.requires_grad_(False)
        model.eval()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        assert torch.equal(model(X)["out"], y)
    assert len(folds) == 1


def test_two_models_of_shared_weights() -> None:
    model = small()
    twin = small()
    twin.load_state_dict(model.state_dict())
    twin.classifier[1].weight = model.classifier[1].weight
    with torch.no_grad():
        before = model(X)["out"], twin(X)["out"]
        model.classifier[1].weight.data.mul_(3)
        for m, old in zip((model, twin), before, strict=True):
            y = m(X)["out"]
            assert error(y, plain(m, X)["out"]) <= SAVING and error(y, old) > 0.1


# --- Where the plain modules must run ------------------------------------------------------------


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        yield


CONTEXTS = {
    "reference": lambda: dlf.use_backend("reference"),
    "environment": lambda: _environment("DEEPLAB_FAST_BACKEND", "reference"),
    "gradients": lambda: torch.enable_grad(),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "onednn-off": lambda: torch.backends.mkldnn.flags(enabled=False),
    "flop-counter": lambda: FlopCounterMode(display=False),
    "forward-mode": lambda: torch.autograd.forward_ad.dual_level(),
    "global-hook": lambda: _handle(
        nn.modules.module.register_module_forward_hook(lambda m, args, y: None)
    ),
}


@contextmanager
def _handle(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(handle.remove)
        yield


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_of_the_plain_modules(context: str, programs: list) -> None:
    model = small()
    with torch.no_grad(), CONTEXTS[context]():
        assert model.fast_reasons(X)
        y = model(X)["out"]
        assert not programs
    with torch.no_grad():
        assert model.fast_reasons(X) == []
        assert error(model(X)["out"], y) <= (0.1 if context == "autocast" else SAVING)
        assert len(programs) == 1


def test_contexts_of_the_fast_path(programs: list) -> None:
    model = small()
    for context in (torch.no_grad(), torch.inference_mode(), torch.device("cpu")):
        with torch.no_grad(), context:
            model(X)
    model.requires_grad_(False)
    model(X)
    with dlf.use_backend("cpu"), torch.no_grad():
        model(X)
    assert len(programs) == 5
    # A result of no_grad is an ordinary tensor.
    with torch.no_grad():
        y = model(X)["out"]
    y.add_(1)
    (y * torch.ones(1, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (X.clone().requires_grad_(), "gradients may be needed"),
        (X.double(), "the input is float64"),
        (X[:0], "shape [0, 3, 48, 33]"),
        (X.to("meta"), "on meta"),
    ],
    ids=["grad", "double", "empty", "meta"],
)
def test_inputs_of_the_plain_modules(x: Tensor, reason: str, programs: list) -> None:
    model = small().requires_grad_(False)
    assert reason in model.fast_reasons(x)[0]
    if x.is_meta:
        model = model.to("meta")
    if x.dtype == torch.float64:
        model = model.double()
    assert model(x)["out"].shape == (x.shape[0], 4, 48, 33)
    assert not programs


def test_training_and_switched_off(programs: list) -> None:
    model = small()
    with torch.no_grad():
        model.fast = False
        assert model.fast_reasons(X) == ["model.fast is False"]
        off = model(X)["out"]
        assert torch.equal(off, plain(model, X)["out"]) and not programs
        model.fast = True
        model.train()
        assert "training mode" in model.fast_reasons(X)[0]
        model(torch.randn(2, 3, 33, 33))
    assert not programs


def test_wrong_channels_get_the_plain_error() -> None:
    model = small()
    x = torch.randn(1, 4, 33, 33)
    with torch.no_grad():
        assert "4 channels, the model wants 3" in model.fast_reasons(x)[0]
        with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels"):
            model(x)


def test_transformations_see_the_plain_modules(programs: list) -> None:
    model = small_resnet()
    x = torch.randn(1, 3, 33, 41)
    expected = plain(model, x)

    def check(y: dict[str, Tensor]) -> None:
        # The plain modules' operations in the same order.
        for key, value in expected.items():
            assert error(y[key], value) <= 1e-6
        assert not programs

    with torch.no_grad():
        check(torch.jit.script(model)(x))
        check(torch.jit.trace(model, x, strict=False, check_trace=False)(x))
        check(torch.fx.symbolic_trace(model)(x))
        state = {k: v[None] for k, v in {**dict(model.named_parameters())}.items()}

        def one(weights: dict[str, Tensor]) -> dict[str, Tensor]:
            return dict(torch.func.functional_call(model, weights, (x,)))

        check({k: v[0] for k, v in torch.func.vmap(one)(state).items()})
        batched = torch.func.vmap(lambda one: dict(model(one[None])))(x)
        check({k: v[0] for k, v in batched.items()})
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert model(torch.empty(1, 3, 33, 41))["out"].shape == (1, 4, 33, 41)
    assert not programs
    gradient = torch.func.grad(lambda x: model(x)["out"].sum())(x)
    assert gradient.isfinite().all() and not programs


def test_export_and_compilation_see_the_plain_modules(programs: list) -> None:
    model = OWN["backbone"]().eval()
    expected = plain(model, X)["out"]
    torch.compiler.reset()
    with torch.no_grad():
        assert model.fast_reasons(X) == []
        exported = torch.export.export(model, (X,)).module()(X)["out"]
        compiled = torch.compile(model, fullgraph=True, backend="eager")(X)["out"]
    assert error(exported, expected) <= 1e-6 and error(compiled, expected) <= 1e-6
    assert not programs


def test_inner_module_that_is_compiled(programs: list) -> None:
    torch.compiler.reset()
    model = small()
    expected = plain(model, X)["out"]
    with torch.no_grad():
        model(X)
        model.classifier.compile(backend="eager")
        assert error(model(X)["out"], expected) <= SAVING
    assert [type(p).__name__ for p in programs[-1].layers][-1] == "PlainLayer"


# --- Modules of the user's own -------------------------------------------------------------------


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


@pytest.mark.parametrize("own", OWN)
def test_modules_of_the_users_own(own: str, programs: list, folds: list) -> None:
    model = OWN[own]().eval()
    x = torch.randn(2, 3, 41, 57)
    expected = plain(model, x)
    with torch.inference_mode():
        for _ in range(2):
            assert_close(model(x), expected)
    assert len(programs) == 2 and len(folds) == 1
    if own == "frozen":
        assert not [p for p in programs[0].layers if isinstance(p, layers.PlainLayer)]


# --- Copies, memory, threads ---------------------------------------------------------------------


def test_a_model_that_an_earlier_version_pickled_loads() -> None:
    model = dlf.deeplabv3_resnet18(num_classes=3).eval()
    data = pickle.dumps(model, protocol=2)
    before = data.replace(
        b"deeplab_fast.program.fast_path\n", b"deeplab_fast.inference.fast_path\n"
    )
    assert before != data
    x = torch.randn(1, 3, 65, 65)
    with torch.inference_mode():
        assert torch.equal(pickle.loads(before)(x)["out"], model(x)["out"])


def test_copies_and_pickles_carry_no_prepared_weights(folds: list) -> None:
    model = small()
    fresh = len(pickle.dumps(model))
    keys = list(model.state_dict())
    with torch.no_grad():
        y = model(X)["out"]
        assert model.prepared_bytes > 0
        data = pickle.dumps(model)
        assert len(data) == fresh
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (
            copy.deepcopy(model),
            copy.copy(model),
            pickle.loads(data),
            torch.load(buffer, weights_only=False),
        ):
            # A shallow copy has the same modules, and may have what is prepared from them.
            assert twin.prepared_bytes == 0 or twin._fast_path is model._fast_path
            assert torch.equal(twin(X)["out"], y)
    assert list(model.state_dict()) == keys
    assert len(folds) == 4


def test_a_copy_changes_alone() -> None:
    model = small()
    with torch.no_grad():
        y = model(X)["out"]
        twin = copy.deepcopy(model)
        conv_of(twin).weight.data.neg_()
        assert error(twin(X)["out"], plain(twin, X)["out"]) <= SAVING
        assert torch.equal(model(X)["out"], y)


def test_memory_is_known_bounded_and_freed(folds: list) -> None:
    model = small_resnet()
    weights = sum(p.numel() * 4 for p in model.parameters())
    with torch.no_grad():
        assert model.prepared_bytes == 0
        y = model(X)["out"]
        free = model.prepared_bytes
        assert free > 0.9 * weights
        for bound in (weights // 4, 0):
            model.max_extra_bytes = bound
            assert error(model(X)["out"], y) <= SAVING
            program = model._fast_path._state.program
            assert program.extra_bytes <= bound
        assert len(folds) == 3
        assert model.prepared_bytes < free
        model.train()
        assert model.prepared_bytes == 0
        model.eval()(X)
        model.double()
        assert model.prepared_bytes == 0


def test_threads_share_one_preparation(programs: list, folds: list) -> None:
    model = small()
    inputs = [torch.randn(1, 3, 33 + i, 40) for i in range(4)]
    expected = [plain(model, x)["out"] for x in inputs]
    results: dict[int, list[Tensor]] = {}
    start = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        start.wait()
        with torch.no_grad():
            results[i] = [model(inputs[i])["out"] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, value in enumerate(expected):
        for y in results[i]:
            assert error(y, value) <= SAVING
    assert len(folds) == 1 and len(programs) == 12


@pytest.mark.parametrize("weights", ["contiguous", "channels_last"])
@pytest.mark.parametrize("given", ["contiguous", "channels_last", "strided"])
def test_memory_format_is_that_of_the_plain_modules(weights: str, given: str) -> None:
    model = small()
    if weights == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    x = {
        "contiguous": X,
        "channels_last": X.to(memory_format=torch.channels_last),
        "strided": torch.randn(1, 6, 48, 66)[:, ::2, :, ::2],
    }[given]
    expected = plain(model, x)
    with torch.no_grad():
        assert model.fast_reasons(x) == []
        assert_close(model(x), expected)


def test_predict_with_tiles_scales_and_flips(programs: list) -> None:
    model = small()
    x = torch.randn(1, 3, 70, 60)
    for options in ({"scales": (0.5, 1.0), "flip": True}, {"tile": 40}, {}):
        with dlf.use_backend("reference"):
            expected, prob = model.predict(x, return_prob=True, **options)
        programs.clear()
        labels, fast_prob = model.predict(x, return_prob=True, **options)
        assert programs
        assert (labels == expected).float().mean() >= 0.999
        torch.testing.assert_close(fast_prob, prob, rtol=1e-4, atol=1e-5)


def test_photo_of_any_kind(programs: list) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert small().predict(photo).shape == (40, 50)
    assert programs


def test_backends_of_the_reasons_are_those_that_exist() -> None:
    model = small()
    with torch.no_grad(), nullcontext():
        for backend in ("triton", "cuda"):
            with dlf.use_backend(backend):
                assert model.fast_reasons(X) == [f"backend '{backend}' is asked for"]
    assert isinstance(model._fast_path, fast_path.FastPath)
