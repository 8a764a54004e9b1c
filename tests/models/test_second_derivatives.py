"""Second derivatives of models in training, which PyHessian, MAML and gradient penalties take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hvp, jacobian, jvp
from torch.func import functional_call

import deeplab_fast as dlf
from deeplab_fast.engine.batch_norm import freeze_batch_norm
from deeplab_fast.models import DeepLabV3
from deeplab_fast.models.backbone import IntermediateLayerGetter
from deeplab_fast.models.mobilenetv2 import InvertedResidual
from deeplab_fast.models.resnet import BasicBlock, Bottleneck
from deeplab_fast.nn import DeepLabHead, FCNHead, MMSegHead
from deeplab_fast.program import training as fused

# float64 leaves about 1e-16 for each operation, and a hundred layers that amplify it.
EXACT = 1e-9


class Small(nn.Module):
    """Every kind of segment, with few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        shortcut = nn.Sequential(nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.bottlenecks = nn.Sequential(Bottleneck(4, 4, 1, shortcut), Bottleneck(16, 4, 1, None))
        self.basic = BasicBlock(16, 16, 1, None)
        self.relu6 = InvertedResidual(16, 2, 16, 1)
        self.others = nn.Sequential(
            nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8, affine=False), nn.ReLU6(),
        )  # fmt: skip


def pair(batch_norm: str = "batch", head: str = "torchvision") -> tuple[DeepLabV3, DeepLabV3]:
    """A model by the training forms and by the plain modules, in float64 without dropout."""
    torch.manual_seed(0)
    backbone = IntermediateLayerGetter(Small(), {"basic": "aux", "others": "out"})
    head_of = {"torchvision": DeepLabHead, "mmseg": MMSegHead}[head]
    classifier = head_of(8, 3, (1, 2), aspp_channels=4)
    model = DeepLabV3(backbone, classifier, FCNHead(16, 3)).double().train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            # Statistics of data: those of a new model hide errors and leave activations dead.
            module.momentum = None
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    with torch.no_grad():
        model(torch.randn(2, 3, 17, 17, dtype=torch.float64))
    if batch_norm == "eval":
        model.eval()
    elif batch_norm == "frozen":
        freeze_batch_norm(model)
    return model, dlf.fuse(copy.deepcopy(model), False)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return sum(y.square().mean() + y.sin().mean() for y in model(x).values())


def segments(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Plans of the segments that run from now on."""
    ran: list[Any] = []
    apply = fused._Segment.apply
    monkeypatch.setattr(
        fused._Segment, "apply", lambda plan, *args: ran.append(plan) or apply(plan, *args)
    )
    return ran


@pytest.mark.parametrize(
    ("batch_norm", "head"),
    [("batch", "torchvision"), ("eval", "torchvision"), ("frozen", "torchvision"),
     ("batch", "mmseg")],
)  # fmt: skip
def test_hessian_vector_product(batch_norm: str, head: str, monkeypatch) -> None:
    """As PyHessian takes it: the gradients, times a vector, differentiated again."""
    model, plain = pair(batch_norm, head)
    x = torch.randn(2, 3, 17, 17, dtype=torch.float64)
    ran = segments(monkeypatch)

    def product(model: nn.Module) -> list[Tensor]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(
            loss_of(model, x), parameters, create_graph=True, allow_unused=True
        )
        torch.manual_seed(2)
        vectors = [torch.randn_like(p) for p in parameters]
        used = [(g, v) for g, v in zip(grads, vectors, strict=True) if g is not None]
        return torch.autograd.grad(
            [g for g, _ in used], parameters, [v for _, v in used], allow_unused=True
        )

    found = product(model)
    assert ran
    count = len(ran)
    expected = product(plain)
    assert len(ran) == count
    largest = max(e.abs().max() for e in expected if e is not None)
    assert largest > 0
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if e is not None:
            assert (f - e).abs().max() < EXACT * largest


@pytest.mark.parametrize("product", [hvp, jvp])
def test_products_of_autograd_functional(product: Callable[..., Any]) -> None:
    """With respect to the input, by the trick of two backward passes."""
    model, plain = pair()
    x = torch.randn(2, 3, 17, 17, dtype=torch.float64)
    v = torch.randn_like(x)
    found = product(lambda x: loss_of(model, x), x, v)[1]
    expected = product(lambda x: loss_of(plain, x), x, v)[1]
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() < EXACT * expected.abs().max()


def test_a_step_within_a_step() -> None:
    """MAML: the loss after a step, differentiated by the weights before it."""
    model, plain = pair("eval")
    x = torch.randn(2, 3, 17, 17, dtype=torch.float64)

    def outer(model: nn.Module) -> list[Tensor]:
        weights = dict(model.named_parameters())
        inner = torch.autograd.grad(loss_of(model, x), list(weights.values()), create_graph=True)
        stepped = {k: w - 0.1 * g for (k, w), g in zip(weights.items(), inner, strict=True)}
        after = functional_call(model, stepped, (x.flip(0),))
        loss = sum(y.square().mean() for y in after.values())
        return list(torch.autograd.grad(loss, list(weights.values())))

    found, expected = outer(model), outer(plain)
    largest = max(e.abs().max() for e in expected)
    for f, e in zip(found, expected, strict=True):
        assert (f - e).abs().max() < EXACT * largest


def test_gradient_penalty_is_trained() -> None:
    """First and second derivatives in one backward pass, into every parameter's grad."""
    model, plain = pair()
    x = torch.randn(2, 3, 17, 17, dtype=torch.float64, requires_grad=True)
    for m in (model, plain):
        loss = loss_of(m, x)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + grad.square().sum()).backward()
    scale = max(p.grad.abs().max() for p in plain.parameters())
    for f, e in zip(model.parameters(), plain.parameters(), strict=True):
        assert (f.grad - e.grad).abs().max() < EXACT * scale


@pytest.mark.parametrize("batch_norm", ["batch", "frozen"])
def test_many_gradients_at_once(batch_norm: str, monkeypatch) -> None:
    """As `jacobian(vectorize=True)` takes them: a kernel takes one at a time."""
    model, plain = pair(batch_norm)
    x = torch.randn(2, 3, 17, 17, dtype=torch.float64, requires_grad=True)
    ran = segments(monkeypatch)
    found = jacobian(lambda x: model(x)["out"].mean((2, 3)), x, vectorize=True)
    assert ran
    expected = jacobian(lambda x: plain(x)["out"].mean((2, 3)), x)
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() < EXACT * expected.abs().max()


def test_many_gradients_of_a_loss() -> None:
    """The same of `upsample_cross_entropy`, whose backward is one kernel too."""
    logits = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 17, 17))
    loss = dlf.ops.upsample_cross_entropy(logits, target, reduction="none")
    plain = nn.functional.cross_entropy(
        nn.functional.interpolate(logits, (17, 17), mode="bilinear"), target, reduction="none"
    )
    many = torch.randn(4, *loss.shape, dtype=torch.float64)
    (found,) = torch.autograd.grad(loss, logits, many, is_grads_batched=True)
    (expected,) = torch.autograd.grad(plain, logits, many, is_grads_batched=True)
    assert (found - expected).abs().max() < EXACT * expected.abs().max()
