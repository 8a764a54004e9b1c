"""A backbone's frozen first modules, which run in training as they do in inference."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast.dispatch.errors import norm_error
from deeplab_fast.engine.batch_norm import freeze_batch_norm
from deeplab_fast.engine.eval_form import eval_view
from deeplab_fast.models import DeepLabV3
from deeplab_fast.program.leading import is_frozen

FROZEN = ("stem", "block0", "block1", "block2")


def frozen_model(names: tuple[str, ...] = FROZEN) -> DeepLabV3:
    torch.manual_seed(0)
    model = dlf.deeplabv3_efficientnet_lite0(num_classes=3, aspp_channels=16, dropout=0.0)
    for name in names:
        part = model.backbone.get_submodule(name)
        part.requires_grad_(False)
        freeze_batch_norm(part)
    return model.train()


def photos(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def gradients(model: DeepLabV3, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    y = model.forward_logits(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": y.detach(), **found}


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((2, 3, 65, 97), id="odd sides: SAME padding is larger at one side"),
        pytest.param((1, 3, 33, 33), id="one image"),
    ],
)
def test_values_are_those_of_plain_modules(size: tuple[int, int, int, int]) -> None:
    model = frozen_model()
    if size[0] == 1:
        # The pooled vector of one image has no statistics.
        freeze_batch_norm(model.classifier)
    plain = copy.deepcopy(model)
    plain.fused = False
    found, expected = gradients(model, photos(*size)), gradients(plain, photos(*size))
    assert model.prepared_bytes > 0
    assert plain.prepared_bytes == 0
    assert found.keys() == expected.keys()
    # Of one convolution 1e-5 at most; gradients behind ReLUs by the root of that.
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    bound = 1e-5 * math.sqrt(convs)
    assert norm_error(found["logits"], expected["logits"]) < bound
    # All in one: those of a bias in front of a batch norm are 0 in exact arithmetic.
    assert norm_error(*map(_joined, (found, expected))) < math.sqrt(bound)


def _joined(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([found[name].flatten() for name in sorted(found) if name != "logits"])


def test_running_statistics_of_frozen_modules_stay() -> None:
    model = frozen_model()
    before = copy.deepcopy(model.backbone.get_submodule("block1").state_dict())
    gradients(model, photos(2, 3, 65, 65))
    after = model.backbone.get_submodule("block1").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _trainable(model: DeepLabV3) -> None:
    model.backbone.stem.conv.weight.requires_grad_()  # type: ignore[union-attr]


def _statistics(model: DeepLabV3) -> None:
    model.backbone.stem.bn.__class__ = nn.BatchNorm2d  # type: ignore[assignment,union-attr]
    model.backbone.stem.bn.training = True  # type: ignore[union-attr]


def _hook(model: DeepLabV3) -> None:
    model.backbone.stem.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_trainable, id="a weight learns"),
        pytest.param(_statistics, id="a batch norm takes statistics of the batch"),
        pytest.param(_hook, id="a hook wants to see its calls"),
    ],
)
def test_what_is_not_frozen_runs_in_the_training_forms(
    change: Callable[[DeepLabV3], None],
) -> None:
    model = frozen_model()
    change(model)
    gradients(model, photos(2, 3, 65, 65))
    assert model.prepared_bytes == 0


def test_a_dropout_is_not_frozen() -> None:
    assert is_frozen(nn.Sequential(nn.ReLU(), nn.Dropout(0.5)).eval())
    assert not is_frozen(nn.Sequential(nn.ReLU(), nn.Dropout(0.5)).train())


def test_gradients_to_the_photo_go_through_them() -> None:
    x = photos(2, 3, 65, 65).requires_grad_()
    model = frozen_model()
    model.forward_logits(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    assert model.prepared_bytes == 0


def test_under_autocast_they_are_the_training_forms() -> None:
    model = frozen_model()
    with torch.autocast("cpu", torch.bfloat16):
        model.forward_logits(photos(2, 3, 65, 65))
    assert model.prepared_bytes == 0


def test_new_weights_are_noticed() -> None:
    model = frozen_model()
    x = photos(2, 3, 65, 65)
    before = gradients(model, x)["logits"]
    model.backbone.stem.conv.weight.data.mul_(1.5)  # type: ignore[union-attr,operator]
    found = gradients(model, x)["logits"]
    plain = copy.deepcopy(model)
    plain.fused = False
    expected = gradients(plain, x)["logits"]
    assert norm_error(found, expected) < 1e-4 < norm_error(before, expected)


def test_thawing_moves_the_border() -> None:
    model = frozen_model()
    x = photos(2, 3, 65, 65)
    gradients(model, x)
    held = model.prepared_bytes
    model.backbone.block2.requires_grad_()  # type: ignore[union-attr]
    found = gradients(model, x)
    assert "backbone.block2.expand.conv.weight" in found
    assert 0 < model.prepared_bytes < held


def test_without_the_fast_path_they_are_the_training_forms() -> None:
    model = frozen_model()
    model.fast = False
    gradients(model, photos(2, 3, 65, 65))
    assert model.prepared_bytes == 0


def test_a_tensor_that_learns_in_a_plain_module_gets_its_gradient() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.ones(1).requires_grad_()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    model = frozen_model()
    scaled = Scaled()
    model.backbone.get_submodule("stem").append(scaled)  # type: ignore[operator]
    gradients(model, photos(2, 3, 65, 65))
    assert scaled.factor.grad is not None and bool(scaled.factor.grad.any())


def test_a_view_of_a_model_that_was_trained_a_step() -> None:
    model = frozen_model()
    gradients(model, photos(2, 3, 65, 65))
    view = eval_view(model)
    assert view is not None and not view.training and model.training
    assert view.prepared_bytes == 0 < model.prepared_bytes


def test_memory_is_counted_and_given_back_in_eval_mode() -> None:
    model = frozen_model()
    gradients(model, photos(2, 3, 65, 65))
    assert model.activation_bytes > 0
    model.eval()
    assert model.activation_bytes == model.prepared_bytes == 0


def test_copies_hold_nothing_and_training_frees() -> None:
    model = frozen_model()
    gradients(model, photos(2, 3, 65, 65))
    assert copy.deepcopy(model).prepared_bytes == 0
    assert pickle.loads(pickle.dumps(model)).prepared_bytes == 0
    assert model.prepared_bytes > 0
    model.train()
    assert model.prepared_bytes == 0
