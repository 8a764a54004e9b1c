"""The poly schedule by hand and against PyTorch's schedulers; parameter groups of a model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, PolynomialLR, SequentialLR

import deeplab_fast as dlf
from deeplab_fast.engine.schedule import parameter_groups, poly_factor, poly_lr
from deeplab_fast.models.deeplabv3 import DeepLabV3


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        pytest.param((0, 100), 1.0, id="start"),
        pytest.param((50, 100), 0.5**0.9, id="middle"),
        pytest.param((99, 100), 0.01**0.9, id="last step"),
        pytest.param((100, 100), 0.0, id="end"),
        pytest.param((250, 100), 0.0, id="behind the end"),
        pytest.param((3, 4, 2.0), 0.0625, id="power"),
        pytest.param((0, 100, 0.9, 10, 0.1), 0.1, id="warm-up starts at its factor"),
        pytest.param((5, 100, 0.9, 10, 0.1), 0.55, id="warm-up is linear"),
        pytest.param((10, 100, 0.9, 10, 0.1), 1.0, id="warm-up ends at 1"),
        pytest.param((55, 100, 0.9, 10, 0.1), 0.5**0.9, id="poly over the steps that are left"),
        pytest.param((0, 1), 1.0, id="one step"),
        pytest.param((2, 4, 1.0, 0, 0.1, 0.2), 0.6, id="end factor: 0.2 + 0.8 / 2"),
        pytest.param((9, 4, 1.0, 0, 0.1, 0.2), 0.2, id="end factor behind the end"),
    ],
)
def test_poly_factor_by_hand(args, expected):
    # A handful of fp64 operations.
    assert poly_factor(*args) == pytest.approx(expected, rel=1e-14, abs=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -1),
        ("total_steps", 0),
        ("power", 0.0),
        ("warmup_steps", -1),
        ("warmup_steps", 10),
        ("warmup_factor", 1.5),
        ("end_factor", -0.1),
    ],
)
def test_poly_factor_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        poly_factor(**{"step": 0, "total_steps": 10, name: value})


def test_poly_lr_refuses_before_it_changes_the_optimizer():
    optimizer = sgd()
    with pytest.raises(ValueError, match="power"):
        poly_lr(optimizer, 10, power=-1.0)
    assert "initial_lr" not in optimizer.param_groups[0]


def sgd() -> torch.optim.SGD:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [a], "lr": 0.007}, {"params": [b], "lr": 0.07}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def rates(optimizer: torch.optim.Optimizer, scheduler, steps: int) -> list[list[float]]:
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


def test_poly_lr_as_torchvisions_schedulers():
    ours, theirs = sgd(), sgd()
    # torchvision's references/segmentation/train.py.
    expected = SequentialLR(
        theirs,
        [LinearLR(theirs, 0.01, total_iters=4), PolynomialLR(theirs, 16, power=0.9)],
        milestones=[4],
    )
    got = rates(ours, poly_lr(ours, 20, warmup_steps=4, warmup_factor=0.01), 22)
    # PyTorch multiplies the rate of the step before: an error for each of 22 steps.
    assert torch.allclose(
        torch.tensor(got, dtype=torch.float64),
        torch.tensor(rates(theirs, expected, 22), dtype=torch.float64),
        rtol=1e-13,
        atol=0,
    )


@pytest.mark.parametrize("saved", ["state_dict", "pickle"])
def test_poly_lr_resumes(saved):
    whole = sgd()
    expected = rates(whole, poly_lr(whole, 10, warmup_steps=2), 10)
    first = sgd()
    scheduler = poly_lr(first, 10, warmup_steps=2)
    assert rates(first, scheduler, 4) == expected[:4]
    if saved == "pickle":
        scheduler = pickle.loads(pickle.dumps(scheduler))
        second = scheduler.optimizer
    else:
        second = sgd()
        state = pickle.loads(pickle.dumps((first.state_dict(), scheduler.state_dict())))
        scheduler = poly_lr(second, 10, warmup_steps=2)
        second.load_state_dict(state[0])
        scheduler.load_state_dict(state[1])
    assert rates(second, scheduler, 6) == expected[4:]


def test_poly_lr_resumed_for_longer_follows_the_new_curve():
    short = sgd()
    scheduler = poly_lr(short, 4)
    rates(short, scheduler, 4)
    longer = sgd()
    resumed = poly_lr(longer, 8)
    longer.load_state_dict(copy.deepcopy(short.state_dict()))
    resumed.load_state_dict(scheduler.state_dict())
    longer.step()
    resumed.step()
    assert resumed.get_last_lr() == pytest.approx([0.007 * (3 / 8) ** 0.9, 0.07 * (3 / 8) ** 0.9])


def conv_bn(channels: int, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 1, bias=bias), nn.BatchNorm2d(channels))


def small_model(aux: bool = True) -> DeepLabV3:
    head = nn.Sequential(conv_bn(3), nn.Conv2d(3, 2, 1))
    return DeepLabV3(conv_bn(3), head, conv_bn(2, bias=True) if aux else None)


def names_of(model: nn.Module, groups: list[dict]) -> dict[str, list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}


def test_groups_of_the_parts():
    model = small_model()
    groups = parameter_groups(
        model, 0.02, weight_decay=1e-4, backbone_lr_factor=0.5, aux_lr_factor=10.0
    )
    assert names_of(model, groups) == {
        "backbone": ["backbone.0.weight", "backbone.1.weight", "backbone.1.bias"],
        "classifier": [
            "classifier.0.0.weight",
            "classifier.0.1.weight",
            "classifier.0.1.bias",
            "classifier.1.weight",
            "classifier.1.bias",
        ],
        "aux_classifier": [
            "aux_classifier.0.weight",
            "aux_classifier.0.bias",
            "aux_classifier.1.weight",
            "aux_classifier.1.bias",
        ],
    }
    assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.02, 0.2])
    assert [group["weight_decay"] for group in groups] == [1e-4] * 3
    torch.optim.SGD(groups, lr=0.1).step()


def test_groups_without_decay_of_norms_and_biases():
    model = small_model()
    groups = parameter_groups(
        model, 0.02, weight_decay=1e-4, aux_lr_factor=10.0, decay_norm_and_bias=False
    )
    assert names_of(model, groups) == {
        "backbone": ["backbone.0.weight"],
        "backbone/no_decay": ["backbone.1.weight", "backbone.1.bias"],
        "classifier": ["classifier.0.0.weight", "classifier.1.weight"],
        "classifier/no_decay": [
            "classifier.0.1.weight",
            "classifier.0.1.bias",
            "classifier.1.bias",
        ],
        "aux_classifier": ["aux_classifier.0.weight"],
        "aux_classifier/no_decay": [
            "aux_classifier.0.bias",
            "aux_classifier.1.weight",
            "aux_classifier.1.bias",
        ],
    }
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0] * 3
    assert [group["lr"] for group in groups] == pytest.approx([0.02, 0.02, 0.02, 0.02, 0.2, 0.2])


def test_patterns_without_decay():
    model = small_model(aux=False)
    groups = parameter_groups(model, 0.1, weight_decay=0.5, no_decay=["backbone.0.*", "*.1.bias"])
    assert names_of(model, groups) == {
        "backbone": ["backbone.1.weight"],
        "backbone/no_decay": ["backbone.0.weight", "backbone.1.bias"],
        "classifier": ["classifier.0.0.weight", "classifier.0.1.weight", "classifier.1.weight"],
        "classifier/no_decay": ["classifier.0.1.bias", "classifier.1.bias"],
    }


def test_model_without_auxiliary_head():
    model = small_model(aux=False)
    groups = parameter_groups(model, 0.1, weight_decay=0.0, aux_lr_factor=10.0)
    assert [group["name"] for group in groups] == ["backbone", "classifier"]


def test_frozen_parameters_are_left_out():
    model = small_model()
    model.backbone.requires_grad_(False)
    model.classifier[1].bias.requires_grad_(False)
    names = names_of(model, parameter_groups(model, 0.1, weight_decay=0.0))
    assert list(names) == ["classifier", "aux_classifier"]
    assert "classifier.1.bias" not in names["classifier"] and len(names["classifier"]) == 4


def test_shared_and_further_parameters_occur_once():
    model = small_model(aux=False)
    model.classifier[0][0].weight = model.backbone[0].weight
    model.temperature = nn.Parameter(torch.ones(1))
    names = names_of(model, parameter_groups(model, 0.1, weight_decay=0.0))
    assert names["backbone"][0] == "backbone.0.weight"
    assert names["other"] == ["temperature"]
    assert len([n for group in names.values() for n in group]) == len(list(model.parameters()))


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
def test_every_parameter_of_a_real_model_once(decay_norm_and_bias):
    model = dlf.deeplabv3_mobilenet_v3_large(num_classes=3, aux_loss=True)
    groups = parameter_groups(model, 0.1, weight_decay=0.1, decay_norm_and_bias=decay_norm_and_bias)
    assert len(groups) == (3 if decay_norm_and_bias else 6)
    given = [id(p) for group in groups for p in group["params"]]
    assert len(given) == len(set(given)) and set(given) == {id(p) for p in model.parameters()}
    if not decay_norm_and_bias:
        decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
        # Here what is left are the convolutions' weights.
        assert all(p.dim() == 4 for p in decayed)
        assert len(decayed) == sum(p.dim() == 4 for p in model.parameters())


def test_what_parameter_groups_refuses():
    model = small_model()
    with pytest.raises(TypeError, match="DataParallel without backbone and classifier"):
        parameter_groups(nn.DataParallel(model), 0.1, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"\['head\.\*'\] fit no parameter"):
        parameter_groups(model, 0.1, weight_decay=0.0, no_decay=["head.*", "*.bias"])
    with pytest.raises(ValueError, match="aux_lr_factor"):
        parameter_groups(model, 0.1, weight_decay=0.0, aux_lr_factor=-1.0)
    with pytest.raises(ValueError, match="weight_decay"):
        parameter_groups(model, 0.1, weight_decay=float("nan"))
    with pytest.raises(ValueError, match="requires_grad"):
        parameter_groups(model.requires_grad_(False), 0.1, weight_decay=0.0)
