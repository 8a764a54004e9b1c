"""Modules that compute something else than their class was shipped to compute run as they are."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import symbolic_trace

import deeplab_fast as dlf
from deeplab_fast.engine.batch_norm import freeze_batch_norm
from deeplab_fast.models import DeepLabV3
from deeplab_fast.program import training as fused
from deeplab_fast.program.intact import CALLED, functional_is_intact, is_intact, is_intact_class
from deeplab_fast.testing import import_torchvision

# Of float64: 1e-16 for each operation, amplified by a few dozen layers.
EXACT = 1e-9
# Of fp32 likewise: 6e-8 for each.
CLOSE = 1e-4


def narrow(module: nn.Module) -> None:
    """A quarter of all channels but the image's and the classes'."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            options = {k: getattr(child, k) for k in ("stride", "padding", "dilation")}
            channels = [c if c % 4 else c // 4 for c in (child.in_channels, child.out_channels)]
            bias = child.bias is not None
            setattr(module, name, nn.Conv2d(*channels, child.kernel_size, **options, bias=bias))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.BatchNorm2d(child.num_features // 4))
        else:
            narrow(child)


def trained() -> DeepLabV3:
    """A small model whose batch norms have statistics of data: random ones hide errors."""
    torch.manual_seed(0)
    model = dlf.deeplabv3_resnet18(num_classes=3, aux_loss=True).train()
    narrow(model)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            module.momentum = None
    with torch.no_grad():
        model(torch.randn(4, 3, 33, 33))
    return model


def plain_of(model: DeepLabV3) -> DeepLabV3:
    """The same modules, without any fast form."""
    plain = copy.copy(model)
    plain.fast = plain.fused = False
    return plain


def seamless(model: DeepLabV3) -> None:
    for conv in (model.backbone.layer2[0].conv1, model.backbone.layer3[1].conv2):

        def circular(x: Tensor, weight: Tensor, bias: Any, conv: nn.Conv2d = conv) -> Tensor:
            rows, columns = conv.padding
            x = F.pad(x, (columns, columns, rows, rows), mode="circular")
            return F.conv2d(x, weight, bias, conv.stride, 0, conv.dilation)

        conv._conv_forward = circular


class Centred(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # As weight standardisation does, which would divide by the deviation too.
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Clipped(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(max=0.5))


class Reversed(nn.Sequential):
    """Another order than its members'."""

    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(self._modules.values()))


class TwoFold(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def centred(model: DeepLabV3) -> None:
    for module in model.backbone.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Centred


def twice_the_same(model: DeepLabV3) -> None:
    """One module at two places of a sequence, which children() lists once."""
    relu, conv = nn.ReLU(), nn.Conv2d(64, 64, 1)
    model.classifier = nn.Sequential(
        model.classifier[0], conv, relu, conv, relu, model.classifier[4]
    )


CHANGES: dict[str, Callable[[DeepLabV3], object]] = {
    "_conv_forward of an instance": seamless,
    "_conv_forward of a subclass": centred,
    "forward of a batch norm's subclass": lambda m: setattr(
        m.backbone.layer1[0].bn1, "__class__", Clipped
    ),
    "forward of a sequence's subclass": lambda m: setattr(
        m.classifier[0].convs[1], "__class__", TwoFold
    ),
    "order of a sequence's subclass": lambda m: setattr(
        m.backbone.layer1, "__class__", Reversed
    ),
    "forward of an instance": lambda m: setattr(
        m.backbone.layer3[0].relu, "forward", torch.sigmoid
    ),
    "_call_impl of an instance": lambda m: setattr(
        m.backbone.layer3[0].relu, "_call_impl", torch.sigmoid
    ),
    "forward of the pooled branch": lambda m: setattr(
        m.classifier[0].convs[-1], "forward", lambda x: x[:, :64].relu()
    ),
    "pooling to more than one value": lambda m: setattr(
        m.classifier[0].convs[-1][0], "output_size", (2, 2)
    ),
    "forward of a block": lambda m: setattr(m.backbone.layer1[1], "forward", lambda x: x.relu()),
    "one module twice": twice_the_same,
    "padding_mode": lambda m: [
        setattr(conv, "padding_mode", "circular")
        for conv in m.backbone.modules()
        if type(conv) is nn.Conv2d
    ],
    "dilation and stride as an int": lambda m: [
        (setattr(m.classifier[0].convs[1][0], "dilation", 2),
         setattr(m.classifier[0].convs[1][0], "padding", 2),
         setattr(m.backbone.layer1[0].conv1, "stride", 1),
         setattr(m.backbone.layer1[0].conv1, "padding", 1))
    ],
}  # fmt: skip


@contextmanager
def exchanged(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def leaky(self: nn.ReLU, x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def twice_conv(x: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
    return torch.conv2d(x, 2 * weight, *args, **options)


CLASSES: dict[str, tuple[Any, str, Any]] = {
    "ReLU.forward": (nn.ReLU, "forward", leaky),
    "Conv2d._conv_forward": (
        nn.Conv2d,
        "_conv_forward",
        lambda self, x, w, b: F.conv2d(x, 1.2 * w, b, self.stride, self.padding, self.dilation),
    ),
    "Sequential.forward": (
        nn.Sequential,
        "forward",
        lambda self, x: 1.1 * _ran(list(self._modules.values()), x),
    ),
    "BatchNorm2d.forward, inherited": (
        nn.modules.batchnorm._BatchNorm,
        "forward",
        lambda self, x: x * self.weight[:, None, None],
    ),
    "our own ASPP.forward": (
        dlf.nn.ASPP,
        "forward",
        lambda self, x: self.project(torch.cat([c(x) for c in self.convs], 1)) + 1,
    ),
    "Module.__call__": (
        nn.Module,
        "__call__",
        lambda self, *args: _scaled(self, self.forward(*args)),
    ),
    "torch.nn.functional.conv2d": (F, "conv2d", twice_conv),
    "torch.nn.functional.relu": (F, "relu", lambda x, inplace=False: x.clamp(min=-0.1)),
}


def _ran(modules: list[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _scaled(module: nn.Module, y: Any) -> Any:
    return 1.1 * y if isinstance(module, nn.BatchNorm2d) else y


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def check_eval(model: DeepLabV3, x: Tensor) -> Tensor:
    with torch.no_grad():
        expected = plain_of(model)(x)
        for name, y in model(x).items():
            assert difference(y, expected[name]) < CLOSE
    return expected["out"]


def check_training(model: DeepLabV3, x: Tensor) -> Tensor:
    """Outputs, gradients and running statistics."""
    results = []
    for used in (copy.deepcopy(model).double(), plain_of(copy.deepcopy(model).double())):
        outputs = used(x.double())
        sum(y.sin().mean() for y in outputs.values()).backward()
        grads = {k: p.grad for k, p in used.named_parameters() if p.grad is not None}
        results.append((outputs, grads, dict(used.named_buffers())))
    for found, expected in zip(*results, strict=True):
        assert found.keys() == expected.keys()
        scale = max(e.detach().abs().max() for e in expected.values())
        for key, value in expected.items():
            assert (found[key] - value).abs().max() < EXACT * scale, key
    return results[1][0]["out"].detach()


@pytest.mark.parametrize("change", CHANGES)
def test_of_a_module(change: str) -> None:
    model = trained()
    x = torch.randn(2, 3, 33, 33)
    model.eval()
    before = check_eval(model, x)
    CHANGES[change](model)
    after = check_eval(model, x)
    assert difference(after, before) > 1e-3
    with torch.no_grad():
        assert difference(dlf.optimize(model)(x)["out"], after) < CLOSE
    check_training(model.train(), x)


@pytest.mark.parametrize("change", CLASSES)
def test_of_a_class(change: str, monkeypatch) -> None:
    """Exchanged for every module, after the model was prepared; and back again."""
    model = trained().eval()
    x = torch.randn(2, 3, 33, 33)
    before = check_eval(model, x)
    with exchanged(*CLASSES[change]):
        after = check_eval(model, x)
        assert difference(after, before) > 1e-3
        check_training(copy.deepcopy(model).train(), x)
    assert difference(check_eval(model, x), before) == 0
    with torch.no_grad():
        assert model.fast_reasons(x) == []
    monkeypatch.setattr(fused, "sequence", None)
    with pytest.raises(TypeError):
        model.train()(x)


def test_a_compiled_submodule_is_run(monkeypatch) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = trained()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # A cumulative average is not compiled.
            module.momentum = 0.1
    # Of a class of this package: PyTorch leaves modules of its own uncompiled here.
    model.classifier[0].compile(backend=backend)
    x = torch.randn(2, 3, 33, 33)
    model(x)["out"].sum().backward()
    assert compiled
    compiled.clear()
    torch.compiler.reset()
    with torch.no_grad():
        model.eval()(x)
    assert compiled


@pytest.mark.parametrize(
    "override", [seamless, lambda m: setattr(m.classifier[3], "forward", torch.neg)]
)
def test_a_compiled_model_is_compiled_anew(override: Callable[[DeepLabV3], None]) -> None:
    """For an override made after its first call, as PyTorch's plain modules are."""
    model = trained().eval()
    x = torch.randn(2, 3, 33, 33)
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)["out"]
    override(model)
    expected = plain_of(model)(x)["out"]
    assert not torch.allclose(before, expected, rtol=0, atol=CLOSE)
    assert (compiled(x)["out"] - expected).abs().max() < CLOSE * expected.abs().max()


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ],
)
def test_global_hooks_see_every_call(register: Callable[..., Any]) -> None:
    model = trained()
    x = torch.randn(2, 3, 33, 33)
    counts = []
    for used in (model, plain_of(model)):
        seen: list[nn.Module] = []
        handle = register(lambda module, *args, seen=seen: seen.append(module))
        try:
            used(x)["out"].sum().backward()
        finally:
            handle.remove()
        counts.append(len(seen))
    # The auxiliary head has no gradient here.
    assert counts[0] == counts[1] > 60


def test_global_backward_hooks_reach_the_plain_modules() -> None:
    """Where PyTorch refuses them because of an activation in place."""
    model = trained()
    handle = nn.modules.module.register_module_full_backward_hook(lambda *args: None)
    try:
        for used in (model, plain_of(model)):
            with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
                used(torch.randn(2, 3, 33, 33))
    finally:
        handle.remove()


def test_classes_are_as_shipped_here() -> None:
    """Else nothing would run by the fast forms, and no other test would notice."""
    assert functional_is_intact()
    for build in (dlf.deeplabv3_resnet50, dlf.deeplabv3_mobilenet_v3_large):
        model = build(num_classes=3, aux_loss=True)
        freeze_batch_norm(model)
        assert {type(m) for m in model.modules() if not is_intact(m)} <= {nn.ModuleList}


def test_subclasses_that_add_are_intact() -> None:
    class Named(nn.Conv2d):
        """Adds and initialises."""

        def __init__(self, name: str) -> None:
            super().__init__(3, 3, 1)
            self.name = name

        def extra_repr(self) -> str:
            return self.name

        def norm(self) -> Tensor:
            return self.weight.norm()

    assert is_intact(Named("a"))
    assert not is_intact_class(Centred) and not is_intact_class(Reversed)
    assert "_conv_forward" in CALLED


def test_a_subclass_that_adds_nothing_is_folded_and_watched() -> None:
    class Own(nn.Conv2d):
        pass

    model = trained().eval()
    conv = model.backbone.layer1[0].conv1
    conv.__class__ = Own
    x = torch.randn(2, 3, 33, 33)
    before = check_eval(model, x)
    (row,) = [
        r for r in dlf.optimize(model).layers((33, 33)) if r.name == "backbone.layer1.0.conv1"
    ]
    assert row.kernel != "aten"
    conv.dilation = conv.padding = (2, 2)
    assert difference(check_eval(model, x), before) > 1e-3
    check_training(model.train(), x)


def test_a_wrapper_that_copies_names_is_noticed() -> None:
    from functools import wraps

    @wraps(nn.ReLU.forward)
    def wrapper(self: nn.ReLU, x: Tensor) -> Tensor:
        return -x

    with exchanged(nn.ReLU, "forward", wrapper):
        assert not is_intact(nn.ReLU())
    assert is_intact(nn.ReLU())


# What works with torchvision's models.


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_symbolic_trace(mode: str) -> None:
    model = trained()
    model.train(mode == "train")
    x = torch.randn(2, 3, 33, 33)
    with torch.set_grad_enabled(mode != "no_grad"):
        traced = symbolic_trace(model)
        expected = plain_of(copy.deepcopy(model))(x)
        for name, y in traced(x).items():
            assert difference(y, expected[name]) < CLOSE


def test_feature_extractor() -> None:
    import_torchvision()
    create = importlib.import_module(
        "torchvision.models.feature_extraction"
    ).create_feature_extractor
    model = trained()
    extractor = create(model, {"backbone.layer3": "three", "classifier.0": "aspp"})
    features = extractor(torch.randn(2, 3, 33, 33))
    assert features["three"].shape[1] == 64 and features["aspp"].requires_grad


@pytest.mark.parametrize("mode", ["train", "eval", "eval with gradients"])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_torchvisions(given: Any, weights: Any, mode: str) -> None:
    """out.view(-1) works where it works there."""
    build = import_torchvision().models.segmentation.deeplabv3_mobilenet_v3_large
    theirs = build(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    ours = dlf.deeplabv3_mobilenet_v3_large(num_classes=3, aux_loss=True)
    x = torch.randn(2, 3, 33, 33).contiguous(memory_format=given)
    strides = []
    for model in (ours, theirs):
        model.to(memory_format=weights).train(mode == "train")
        with torch.set_grad_enabled(mode != "eval"):
            strides.append({k: y.stride() for k, y in model(x).items()})
    assert strides[0] == strides[1]


@pytest.mark.parametrize("shape", [(3, 33, 33), (1, 3, 1, 33, 33), (2, 4, 33, 33), (3,)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_other_inputs_have_pytorchs_message(shape: tuple[int, ...], mode: str) -> None:
    model = trained()
    model.train(mode == "train")
    messages = []
    for used in (model, plain_of(model)):
        with torch.set_grad_enabled(mode == "train"), pytest.raises(Exception) as error:
            used(torch.randn(shape))
        messages.append((type(error.value), str(error.value)))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("convert", ["script", "trace"])
def test_a_converted_classifier(convert: str) -> None:
    model = trained().eval()
    x = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        expected = model(x)["out"]
        low = model.backbone(x)["out"]
        model.classifier = (
            torch.jit.script(model.classifier)
            if convert == "script"
            else torch.jit.trace(model.classifier, low)
        )
        assert difference(model(x)["out"], expected) < CLOSE
        assert model.num_classes == 3 and model.atrous_rates == ()
        assert model.predict(x).shape == (2, 33, 33)
    model(x)["out"].sum().backward()
    assert model.backbone.conv1.weight.grad is not None


@pytest.mark.parametrize("mode", ["eval", "optimize", "train"])
@pytest.mark.parametrize("build", [dlf.deeplabv3_resnet18, dlf.deeplabv3_mobilenet_v3_large])
def test_defaults_of_dtype_and_device(build: Any, mode: str) -> None:
    """Neither the default dtype nor the default device is the model's."""
    torch.manual_seed(0)
    model: Any = build(num_classes=3).train()
    x = torch.randn(2, 3, 33, 33)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        model(x)

    def call() -> Tensor:
        used = copy.deepcopy(model)
        if mode == "train":
            y = used(x)["out"]
            y.square().mean().backward()
            return y.detach()
        used.eval()
        with torch.no_grad():
            return (dlf.optimize(used) if mode == "optimize" else used)(x)["out"]

    expected = call()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(call(), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    try:
        assert torch.equal(call(), expected)
    finally:
        torch.set_default_device(None)
    with torch.device("meta"):
        assert torch.equal(call(), expected)


@pytest.mark.parametrize(
    "options", [{}, {"tile": 24}, {"scales": (0.5, 1.0), "flip": True}], ids=str
)
def test_predict_beside_other_defaults(options: dict[str, Any]) -> None:
    model = trained().eval()
    photo = np.random.default_rng(0).integers(0, 256, (33, 40, 3), dtype=np.uint8)
    expected, prob = model.predict(photo, return_prob=True, **options)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            labels, again = model.predict(photo, return_prob=True, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.dtype == prob.dtype
    assert np.array_equal(labels, expected) and np.array_equal(again, prob)


def test_circular_padding_after_another_output_stride() -> None:
    """What a convolution pads by follows its dilation."""
    circular = dlf.deeplabv3_resnet18(num_classes=3, atrous_rates=(4, 8, 12)).eval()
    for conv in circular.modules():
        if isinstance(conv, nn.Conv2d):
            conv.padding_mode = "circular"
    circular.set_output_stride(16)
    built = dlf.deeplabv3_resnet18(num_classes=3, output_stride=16, atrous_rates=(2, 4, 6)).eval()
    built.load_state_dict(circular.state_dict())
    built.set_output_stride(8).set_output_stride(16)
    for conv in built.modules():
        if isinstance(conv, nn.Conv2d):
            conv.padding_mode = "circular"
            rows, columns = conv.padding
            conv._reversed_padding_repeated_twice = [columns, columns, rows, rows]
    x = torch.randn(1, 3, 97, 97)
    with torch.no_grad():
        y = circular(x)["out"]
        assert y.shape[-2:] == (97, 97)
        assert difference(y, built(x)["out"]) < CLOSE


# What a tester found.


def test_a_shallow_copy_answers_for_itself() -> None:
    """As data parallelism makes them: with parts of its own and the same state beside."""
    model = trained().eval()
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        model(x)
        other = copy.copy(model)
        other._modules = model._modules.copy()
        other.classifier = copy.deepcopy(model.classifier)
        other.classifier[4].weight.mul_(2)
        assert difference(other(x)["out"], plain_of(other)(x)["out"]) < CLOSE
        assert difference(model(x)["out"], plain_of(model)(x)["out"]) < CLOSE


def test_gradients_through_what_is_no_parameter() -> None:
    """Of adapters: every parameter is frozen, a tensor beside them is not."""
    model = trained().eval().requires_grad_(False)
    scale = torch.ones((), requires_grad=True)
    conv = model.backbone.layer2[0].conv1
    conv.forward = lambda x: F.conv2d(x, conv.weight * scale, None, conv.stride, conv.padding)
    x = torch.randn(1, 3, 33, 33)
    found, expected = (
        torch.autograd.grad(m(x)["out"].square().sum(), scale)[0] for m in (model, plain_of(model))
    )
    assert difference(found, expected) < CLOSE
    with torch.no_grad():
        assert model.fast_reasons(x) == []


@pytest.mark.parametrize("bounds", [(0, 2), (-1, 6)])
def test_bounds_of_relu6(bounds: tuple[int, int]) -> None:
    model = trained()
    act = nn.ReLU6()
    act.min_val, act.max_val = bounds
    model.classifier[3] = act
    x = torch.randn(2, 3, 33, 33)
    check_training(model, x)
    check_eval(model.eval(), x)


def test_a_parametrization_runs_as_often_as_by_the_plain_modules() -> None:
    """Spectral norm iterates at every reading of the weight."""
    model = trained()
    for conv in (model.backbone.layer1[0].conv1, model.classifier[0].convs[1][0]):
        nn.utils.parametrizations.spectral_norm(conv)
    check_training(model, torch.randn(2, 3, 33, 33))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_meets_padding_alone_shows(value: float) -> None:
    """The corner tap of a rate beyond the map: 0 times it is nan."""
    model = dlf.deeplabv3_mobilenet_v3_large(num_classes=3).eval()
    x = torch.randn(1, 3, 129, 129)
    with torch.no_grad():
        model.classifier[0].convs[1][0].weight[5, 7, 0, 0] = value
        broken = ~plain_of(model)(x)["out"].isfinite()
        assert broken.any()
        for used in (model, dlf.optimize(model)):
            assert not (used(x)["out"].isfinite() & broken).any()
