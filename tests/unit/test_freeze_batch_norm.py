"""Frozen batch norms: what stays, what survives, and the way back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast.engine.batch_norm import (
    convert_sync_batch_norm,
    freeze_batch_norm,
    frozen_batch_norms,
    unfreeze_batch_norm,
)
from deeplab_fast.nn import SingleValueBatchNorm2d


class OwnBatchNorm(nn.BatchNorm2d):
    """A user's subclass with state of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gain = 2.0

    def forward(self, input: Tensor) -> Tensor:
        return self.gain * super().forward(input)


NORMS = [
    pytest.param(lambda: nn.BatchNorm2d(4), id="BatchNorm2d"),
    pytest.param(lambda: nn.BatchNorm2d(4, momentum=None), id="cumulative average"),
    pytest.param(lambda: nn.BatchNorm2d(4, affine=False), id="no parameters"),
    pytest.param(lambda: nn.SyncBatchNorm(4), id="SyncBatchNorm"),
    pytest.param(lambda: SingleValueBatchNorm2d(4), id="SingleValueBatchNorm2d"),
    pytest.param(
        lambda: SingleValueBatchNorm2d(4, momentum=None), id="SingleValue, cumulative average"
    ),
    pytest.param(lambda: OwnBatchNorm(4), id="user's subclass"),
]
every_norm = pytest.mark.parametrize("make", NORMS)


def a_net(norm: nn.Module) -> nn.Sequential:
    """A norm with statistics that are not its first ones, in training mode."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU()).train()
    for _ in range(2):
        net(images())
    for p in norm.parameters():
        nn.init.uniform_(p)
    return net


def images() -> Tensor:
    return torch.randn(2, 3, 5, 4) * 3 + 1


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in net.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name, t in a.items():
        assert torch.equal(t, b[name]), name


def assert_frozen(net: nn.Module) -> None:
    """In training mode the norm gives what it gives in evaluation mode and learns nothing."""
    x = images()
    before = state(net)
    net.train()
    assert net[0].training and not net[1].training
    y = net(x)
    y.sum().backward()
    assert torch.equal(y, net.eval()(x))
    assert_same(before, state(net))
    assert all(not p.requires_grad and p.grad is None for p in net[1].parameters())
    assert frozen_batch_norms(net) == ["1"]
    net.train()


def copied(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net)


def pickled(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def pickled_before(net: nn.Module) -> nn.Module:
    """As an earlier version pickled it, when the layers were in another module."""
    data = pickle.dumps(net, protocol=2)
    before = data.replace(
        b"cdeeplab_fast.nn.batch_norm\nremake\n", b"cdeeplab_fast.engine.batch_norm\n_remake\n"
    )
    assert before != data
    return pickle.loads(before)


def saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_norm
def test_frozen_in_training_mode(make):
    net = a_net(make())
    before = state(net)
    expected = copy.deepcopy(net).eval()(x := images())
    assert freeze_batch_norm(net) == 1
    assert torch.equal(net(x), expected)
    assert_frozen(net)
    assert_same(before, state(net))
    # A checkpoint of either fits the other.
    a_net(make()).load_state_dict(net.state_dict(), strict=True)
    net.load_state_dict(before, strict=True)


@every_norm
@pytest.mark.parametrize("way", [copied, pickled, pickled_before, saved])
def test_freezing_survives(make, way):
    net = a_net(make())
    kind = type(net[1])
    freeze_batch_norm(net)
    other = way(net)
    assert_same(state(net), state(other))
    assert isinstance(other[1], kind)
    assert_frozen(other)
    # The copy can be thawed, and the original does not notice.
    assert unfreeze_batch_norm(other) == 1
    assert type(other[1]) is kind and frozen_batch_norms(net) == ["1"]
    assert_learns(other)


def assert_learns(net: nn.Module) -> None:
    net.train()
    assert net[1].training
    before = state(net)
    net(images()).sum().backward()
    assert not torch.equal(before["1.running_mean"], net[1].running_mean)
    assert net[1].num_batches_tracked == before["1.num_batches_tracked"] + 1
    assert all(p.grad is not None for p in net[1].parameters())


@every_norm
def test_unfreezing_gives_back_the_layer(make):
    net = a_net(make())
    untouched = copy.deepcopy(net)
    freeze_batch_norm(net)
    assert unfreeze_batch_norm(net) == 1
    assert type(net[1]) is type(untouched[1])
    # Nothing of the freezing is left behind.
    assert net[1].__dict__.keys() == untouched[1].__dict__.keys()
    x = images()
    assert torch.equal(net(x), untouched(x))
    assert_same(state(net), state(untouched))
    assert_learns(net)
    assert frozen_batch_norms(net) == [] and unfreeze_batch_norm(net) == 0


def test_statistics_alone_leave_parameters_trainable():
    net = a_net(nn.BatchNorm2d(4))
    freeze_batch_norm(net, parameters=False)
    before = state(net)
    net.train()
    net(images()).sum().backward()
    assert not net[1].training
    assert net[1].weight.grad is not None and net[1].bias.grad is not None
    assert_same(before, state(net))


def test_parameters_alone_leave_statistics_learning():
    net = a_net(nn.BatchNorm2d(4))
    freeze_batch_norm(net, statistics=False)
    before = state(net)
    net.train()
    net(images()).sum().backward()
    assert net[1].training and frozen_batch_norms(net) == ["1"]
    assert net[1].weight.grad is None and net[1].bias.grad is None
    assert not torch.equal(before["1.running_var"], net[1].running_var)
    # Asked for again with the statistics, both are frozen.
    freeze_batch_norm(net, parameters=False)
    assert_frozen(net)


def test_freezing_twice_is_freezing_once():
    net = a_net(nn.BatchNorm2d(4))
    assert freeze_batch_norm(net) == freeze_batch_norm(net) == 1
    assert_frozen(net)
    unfreeze_batch_norm(net)
    assert type(net[1]) is nn.BatchNorm2d
    assert_learns(net)


def test_parameter_that_was_fixed_before_stays_fixed():
    net = a_net(nn.BatchNorm2d(4))
    net[1].bias.requires_grad_(False)
    freeze_batch_norm(net)
    unfreeze_batch_norm(net)
    assert net[1].weight.requires_grad and not net[1].bias.requires_grad


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_unfreezing_brings_back_the_mode_last_asked_for(mode):
    net = a_net(nn.BatchNorm2d(4))
    freeze_batch_norm(net)
    net.train(mode)
    unfreeze_batch_norm(net)
    assert net[1].training is mode


def test_assigning_the_mode_does_not_thaw():
    net = a_net(nn.BatchNorm2d(4))
    modes = {name: module.training for name, module in net.named_modules()}
    freeze_batch_norm(net)
    net.eval()
    # What a trainer does that noted the modes before validation.
    for name, module in net.named_modules():
        module.training = modes[name]
    assert_frozen(net)


def test_optimizer_passes_over_frozen_parameters():
    net = a_net(nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    net(images()).sum().backward()
    optimizer.step()
    # Gradients and momentum of the step before are still there.
    freeze_batch_norm(net)
    before = state(net)
    net(images()).sum().backward()
    optimizer.step()
    assert_same(
        {k: t for k, t in before.items() if k.startswith("1.")},
        {k: t for k, t in state(net).items() if k.startswith("1.")},
    )
    assert not torch.equal(before["0.weight"], net[0].weight)


def test_hooks_and_a_norm_by_itself():
    norm = nn.BatchNorm2d(4)
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    assert freeze_batch_norm(norm) == 1 and frozen_batch_norms(norm) == [""]
    norm.train()(torch.randn(2, 4, 3, 3))
    assert calls == [1] and not norm.training
    unfreeze_batch_norm(norm)
    assert norm.training


def test_sync_batch_norm_made_before_freezing():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(a_net(nn.BatchNorm2d(4)))
    freeze_batch_norm(net)
    assert isinstance(net[1], nn.SyncBatchNorm)
    assert_frozen(net)


def test_sync_batch_norm_made_of_frozen_layers():
    net = nn.Sequential(*a_net(nn.BatchNorm2d(4)), nn.BatchNorm2d(4))
    freeze_batch_norm(net[1])
    before = state(net)
    assert convert_sync_batch_norm(net) is net
    assert isinstance(net[1], nn.SyncBatchNorm) and type(net[3]) is nn.SyncBatchNorm
    assert_same(before, state(net))
    assert frozen_batch_norms(net) == ["1"]
    assert_frozen(net[:3])
    assert net.train()[3].training and net[3].weight.requires_grad
    unfreeze_batch_norm(net)
    assert type(net[1]) is nn.SyncBatchNorm and net[1].weight.requires_grad
    assert_learns(net)


def test_sync_batch_norm_of_a_frozen_norm_by_itself():
    norm = nn.BatchNorm2d(4)
    freeze_batch_norm(norm, parameters=False)
    made = convert_sync_batch_norm(norm)
    assert isinstance(made, nn.SyncBatchNorm) and frozen_batch_norms(made) == [""]
    assert not made.train().training and made.weight.requires_grad


def test_real_model():
    model = dlf.deeplabv3_mobilenet_v3_large(num_classes=3).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    keys = list(model.state_dict())
    assert freeze_batch_norm(model) == len(norms) == len(frozen_batch_norms(model))
    model.train()
    assert not any(m.training for m in norms)
    # One image: in training mode the image pooling's norm would refuse its 1x1 map.
    model(torch.randn(1, 3, 33, 33))["out"].sum().backward()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    of_norms = {id(p) for m in norms for p in m.parameters()}
    assert trainable == {n for n, p in model.named_parameters() if id(p) not in of_norms}
    assert keys == list(model.state_dict())
    assert unfreeze_batch_norm(model) == len(norms)
    assert all(m.training for m in norms)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, SingleValueBatchNorm2d], ids=lambda norm: norm.__name__
)
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(torch.jit.script, id="script"),
        pytest.param(lambda net: torch.compile(net, backend="eager", fullgraph=True), id="compile"),
        pytest.param(
            lambda net: torch.export.export(net, (torch.ones(2, 3, 5, 4),)).module(), id="export"
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compilers_take_frozen_layers(norm, build):
    net = a_net(norm(4))
    freeze_batch_norm(net)
    x = images()
    before = state(net)
    # One convolution and a scale: the compilers run the same kernels.
    torch.testing.assert_close(build(net.train())(x), net(x), rtol=1e-6, atol=1e-6)
    assert_same(before, state(net))


def test_module_without_batch_norm():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    assert freeze_batch_norm(net) == 0
    assert frozen_batch_norms(net) == []


@pytest.mark.parametrize(
    ("norm", "text"),
    [
        pytest.param(
            lambda: nn.BatchNorm2d(4, track_running_stats=False),
            r"1 \(BatchNorm2d\) has no running statistics",
            id="no statistics",
        ),
        pytest.param(
            lambda: nn.LazyBatchNorm2d(), r"1 \(LazyBatchNorm2d\).*run the model", id="lazy"
        ),
    ],
)
def test_layers_that_cannot_be_frozen(norm, text):
    net = nn.Sequential(nn.BatchNorm2d(3), norm())
    with pytest.raises(ValueError, match=text):
        freeze_batch_norm(net)
    assert frozen_batch_norms(net) == [] and type(net[0]) is nn.BatchNorm2d


def test_parameters_of_a_norm_without_statistics():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    assert freeze_batch_norm(net, statistics=False) == 1
    assert not net[1].weight.requires_grad


def test_nothing_to_freeze():
    with pytest.raises(ValueError, match="statistics and parameters"):
        freeze_batch_norm(nn.BatchNorm2d(4), statistics=False, parameters=False)
