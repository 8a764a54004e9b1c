"""`accelerate` beside numbers: what forwards do besides, what changes later, what tools see."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import other_models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import deeplab_fast as dlf
from deeplab_fast.dispatch.errors import SAVING, norm_error, norms_error
from deeplab_fast.program import probe, structure
from deeplab_fast.program.region import Forward, forward_of
from deeplab_fast.program.trace import leaves
from deeplab_fast.testing import import_torchvision

# Of float64: 1e-16 for each operation, amplified by a few dozen layers (CONTRIBUTING.md).
EXACT = 1e-9
# Of fp32: a minimal filter in each of at most ten convolutions.
CLOSE = SAVING * 10**0.5


def conv(inputs: int, outputs: int, kernel: int = 3, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, bias=False)]
    layers += [nn.BatchNorm2d(outputs), *([nn.ReLU()] if act else [])]
    return nn.Sequential(*layers)


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """With batch norms that a mistake shows with, and new filters."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_uniform_(m.weight, generator=generator)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        if isinstance(m, nn.BatchNorm2d):
            for tensor, low, high in (
                (m.running_mean, -0.2, 0.2),
                (m.running_var, 0.5, 1.5),
                (m.weight, 0.5, 1.5),
                (m.bias, -0.2, 0.6),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def maps(*shape: int) -> Tensor:
    shape = shape or (2, 8, 17, 22)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def step(model: nn.Module, x: Any, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """All that a step of training leaves, by name."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    outputs = [y for y in leaves((call or type(model).__call__)(model, x)) if y is not None]
    weights = (torch.cos(torch.arange(y.numel(), dtype=y.dtype) * 0.7) for y in outputs)
    losses = [(y * w.view(y.shape)).sum() for y, w in zip(outputs, weights, strict=True)]
    sum(losses).backward()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)} | {"gradient x": x.grad}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[f"gradient {name}"] = p.grad.detach().clone()
    return found | {f"buffer {k}": b.clone() for k, b in model.named_buffers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Each output and buffer, and all gradients as one vector: some are 0 but for rounding."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        if not name.startswith("gradient"):
            assert norm_error(found[name].double(), value.double()) <= bound, name
    names = [name for name in expected if name.startswith("gradient")]
    assert norms_error([(found[name], expected[name]) for name in names]) <= bound


def assert_trains_alike(ours: nn.Module, own: nn.Module, x: Tensor | None = None) -> None:
    """In float64 copies, in training and in eval mode."""
    ours, own = copy.deepcopy(ours).double(), copy.deepcopy(own).double()
    x = maps().double() if x is None else x.double()
    modes = [[m.training for m in model.modules()] for model in (ours, own)]
    for training in (True, False):
        for model, flags in zip((ours, own), modes, strict=True):
            for m, mode in zip(model.modules(), flags, strict=True):
                m.training = training and mode
        torch.manual_seed(1)
        expected = step(own, x)
        torch.manual_seed(1)
        assert_same(step(ours, x), expected, EXACT)


def assert_infers_alike(ours: nn.Module, own: nn.Module, x: Tensor | None = None) -> None:
    """Results, their memory formats, and what becomes of the input."""
    x = maps() if x is None else x
    given = [x.clone(), x.clone()]
    with torch.no_grad():
        found, expected = (m(t) for m, t in zip((ours, own), given, strict=True))
    assert_same_results(found, expected, CLOSE)
    assert torch.equal(*given)


def assert_same_results(found: Any, expected: Any, bound: float) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same_results(a, b, bound)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.stride() == expected.stride()
        assert norm_error(found, expected) <= bound
    else:
        assert found == expected


def row_of(model: nn.Module, name: str = "") -> dlf.program.accelerate.AccelerateRow:
    (row,) = (row for row in dlf.accelerate_report(model).rows if row.name == name)
    return row


# What forwards do.


class Meter:
    """An object that remembers."""

    def __init__(self) -> None:
        self.count = 0

    def update(self) -> None:
        self.count += 1


class Own(nn.Module):
    """A module whose forward is a function of it and of a map."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(8, 8), conv(8, 8, act=False), conv(8, 8, 1)
        self.relu, self.changing, self.same = nn.ReLU(), nn.ReLU(inplace=True), nn.Identity()
        self.drop, self.row = nn.Dropout(0.3), nn.Sequential(nn.ReLU(inplace=True), conv(8, 8))
        self.late = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), conv(8, 8))
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 0.3))
        self.register_buffer("on", torch.tensor(False))
        self.blocks, self.log, self.meter = [self.a, self.b], {"calls": []}, Meter()
        self.generator = random.Random(0)
        self.outside = (nn.BatchNorm2d(8).double(),)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _sum_in_place(m: Own, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    y += x
    return m.changing(y)


def _kept_before_a_sum(m: Own, x: Tensor) -> Any:
    y = m.b(x)
    kept = [y]
    y = m.same(y)
    y += m.c(x)
    return [*kept, m.b(y)]


def _dropout_hands_on(m: Own, x: Tensor) -> Any:
    y = m.b(x)
    z = m.drop(y) if not m.training else m.same(y)
    z *= m.c(x)
    return [y, m.b(z)]


def _kept_before_an_activation(m: Own, x: Tensor) -> Any:
    y = m.b(x)
    kept = [y]
    return [*kept, m.a(m.changing(m.same(y)))]


def _tries(m: Own, x: Tensor) -> Tensor:
    try:
        return m.a(x) * m.gamma
    except Exception:
        return m.a(x)


def _no_grad(m: Own, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.a(x)
    return m.b(y) + x


def _autocast(m: Own, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.a(x)
    return m.b(y.to(x.dtype))


def _unregistered(m: Own, x: Tensor) -> Tensor:
    return m.b(m.outside[0](m.a(x).double()).to(x.dtype))


def _row_changes_its_input(m: Own, x: Tensor) -> Tensor:
    if x.shape[0] > 9:
        return x
    y = m.b(x)
    return m.row(y) + m.b(y)


def _row_changes_its_input_late(m: Own, x: Tensor) -> Tensor:
    y = m.b(x)
    return m.late(y) + m.b(y)


def _changes_its_own_map(m: Own, x: Tensor) -> Tensor:
    return m.changing(m.same(m.b(x)))


def _logs(m: Own, x: Tensor) -> Tensor:
    m.log["calls"].append(1)
    return m.a(x)


def _meters(m: Own, x: Tensor) -> Tensor:
    m.meter.update()
    return m.a(x)


def _marks_a_child(m: Own, x: Tensor) -> Tensor:
    m.a.calls = getattr(m.a, "calls", 0) + 1
    return m.a(x)


CALLS = 0


def _counts_globally(m: Own, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return m.a(x)


def _unpacks(m: Own, x: Tensor) -> Tensor:
    _, _, rows, columns = x.shape
    y = m.a(F.avg_pool2d(x, 2))
    y = F.interpolate(y, (rows, columns), mode="bilinear", align_corners=False)
    return y + F.interpolate(m.c(x), size=(x.size(-2), x.size(-1)))


REGION, OWN = "region", "own"
# What the forward is, and whether it can run as one.
FORWARDS: dict[str, tuple[Callable[[Own, Any], Any], str]] = {
    "a sum in place, as other libraries' blocks": (_sum_in_place, REGION),
    "a list before a sum in place, through an identity": (_kept_before_a_sum, OWN),
    "a list before a product in place, through a dropout": (_dropout_hands_on, OWN),
    "a list before an activation in place": (_kept_before_an_activation, OWN),
    "a sequence that changes its input": (_row_changes_its_input, OWN),
    "a sequence that changes its input later": (_row_changes_its_input_late, OWN),
    "an activation in place of its own map": (_changes_its_own_map, REGION),
    "the same map twice": (lambda m, x: (lambda y: [y, (y, x)])(m.a(x)), REGION),
    "its input": (lambda m, x: OrderedDict(x=x, y=m.a(x)), REGION),
    "an empty list": (lambda m, x: {"out": m.a(x), "aux": []}, OWN),
    "None": (lambda m, x: {"out": m.a(x), "aux": None}, OWN),
    "a child twice, one after another": (lambda m, x: m.a(m.a(x)), REGION),
    "a child twice, side by side": (lambda m, x: m.a(x) + m.a(x), REGION),
    "a map twice": (lambda m, x: (lambda y: y + y)(m.a(x)), REGION),
    "forward of a child": (lambda m, x: m.b.forward(m.a.forward(x)), REGION),
    "a Python list of modules": (lambda m, x: m.blocks[1](m.blocks[0](x)), REGION),
    "a generator": (lambda m, x: [f(x) for f in (g for g in (m.a, m.b))], REGION),
    "modules that are not registered": (_unregistered, OWN),
    "try and except": (_tries, OWN),
    "a buffer that decides": (lambda m, x: m.a(x) if m.on else m.b(x), OWN),
    "a buffer that is compared": (lambda m, x: m.a(x) if m.on == 0 else m.b(x), OWN),
    # In inference.
    "no_grad around a part": (_no_grad, REGION),
    "autocast around a part": (_autocast, OWN),
    "whether gradients are on": (
        lambda m, x: m.a(x) if torch.is_grad_enabled() else m.b(x),
        REGION,
    ),
    "a parameter": (lambda m, x: x + m.gamma * m.a(x), OWN),
    "functional dropout of channels": (
        lambda m, x: F.dropout2d(m.a(x), 0.3, m.training),
        REGION,
    ),
    "functional batch norm": (
        lambda m, x: F.relu(
            F.batch_norm(
                m.a[0](x), m.a[1].running_mean, m.a[1].running_var, m.a[1].weight, m.a[1].bias,
                m.training,
            )
        ),
        REGION,
    ),
    "sizes by parts": (_unpacks, REGION),
    "a gate": (lambda m, x: m.a(x) * torch.sigmoid(m.c(x.mean((2, 3), keepdim=True))), REGION),
    "nested lists": (_logs, OWN),
    "an object": (_meters, OWN),
    "attributes of a child": (_marks_a_child, OWN),
    "a global variable": (_counts_globally, OWN),
    "a generator of its own": (
        lambda m, x: m.a(x) if m.generator.random() > 2 else m.b(x),
        OWN,
    ),
    "NumPy's generator": (lambda m, x: m.a(x) if np.random.rand() > 2 else m.b(x), OWN),
}  # fmt: skip


@pytest.mark.parametrize(("function", "runs"), FORWARDS.values(), ids=FORWARDS)
def test_a_forward(function: Callable[[Own, Any], Any], runs: str) -> None:
    own = settled(Own(function))
    before = copy.deepcopy(own)
    model = dlf.accelerate(copy.deepcopy(own))
    assert model.log == before.log and vars(model.meter) == vars(before.meter)
    assert model.generator.getstate() == before.generator.getstate()
    assert row_of(model).runs == runs, row_of(model)
    assert_infers_alike(model, own)
    own.train(), model.train()
    assert_trains_alike(model, own)
    assert model.log == own.log and vars(model.meter) == vars(own.meter)
    assert getattr(model.a, "calls", None) == getattr(own.a, "calls", None)
    assert model.generator.getstate() == own.generator.getstate()


def test_a_global_counter_counts_calls() -> None:
    model = dlf.accelerate(settled(Own(_counts_globally)))
    before = CALLS
    with torch.no_grad():
        model(maps()), model(maps())
    assert CALLS == before + 2


def test_functional_dropout_is_one_region() -> None:
    """Its numbers are drawn in the order of memory, which is channels_last in our forms."""
    own = settled(Own(lambda m, x: F.dropout(m.a(x), 0.3, m.training))).double().train()
    model = dlf.accelerate(copy.deepcopy(own))
    assert row_of(model).runs == REGION
    model(maps().double())
    x = maps().double().contiguous(memory_format=torch.channels_last)
    torch.manual_seed(1)
    expected = own(x)
    torch.manual_seed(1)
    found = model(x)
    assert norm_error(found, expected) <= EXACT
    assert float((expected == 0).double().mean()) > 0.2


def test_a_forward_that_counts_its_calls_is_not_looked_at_anew(monkeypatch) -> None:
    """At every call it has other attributes."""

    def count(m: Own, x: Tensor) -> Tensor:
        m.calls = getattr(m, "calls", 0) + 1
        return m.a(x)

    model = dlf.accelerate(settled(Own(count)))
    traced: list[nn.Module] = []
    from deeplab_fast.program import region

    trace = region.trace
    monkeypatch.setattr(region, "trace", lambda m: traced.append(m) or trace(m))
    with torch.no_grad():
        for _ in range(5):
            model(maps())
    assert model.calls == 5 and traced.count(model) <= 1


# What changes later.


class Config:
    def __init__(self) -> None:
        self.skip = True
        self.inner = type("Inner", (), {})()
        self.inner.flag = True


FLAG = True
SETTINGS = {"skip": True}


def helper(x: Tensor, y: Tensor) -> Tensor:
    return x + y


class Block(nn.Module):
    """Reads whatever a forward can read."""

    skips = True

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu, self.act = conv(8, 8), conv(8, 8, act=False), nn.ReLU(), F.relu
        self.config, self.places, self.options = Config(), [0, 1], {"nested": [True]}

    def last(self, x: Tensor) -> Tensor:
        return self.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        config = self.config
        asked = (FLAG, SETTINGS["skip"], config.skip, config.inner.flag, self.skips)
        if all(asked) and self.options["nested"][0] and len(self.places) == 2:
            y = helper(y, x)
        return self.last(self.act(y))


class Getter(nn.ModuleDict):
    """Has a forward, as torchvision's IntermediateLayerGetter."""

    def __init__(self) -> None:
        super().__init__({"one": Block(), "two": Block()})
        self.returned = {"one": "low", "two": "out"}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, module in self.items():
            x = module(x)
            if name in self.returned:
                found[self.returned[name]] = x
        return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(8, 8), Getter(), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.body(self.stem(x))
        return self.head(torch.cat([found["low"], found["out"]], 1))


class Deciding(Net):
    """The model itself has no flow; what is in it has."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] > 0
        return super().forward(x)


def net(cls: type[nn.Module] = Net) -> Any:
    return settled(cls())


def pair(cls: type[nn.Module] = Net) -> tuple[Any, Any]:
    """The model, and the accelerated model."""
    own = net(cls)
    return own, dlf.accelerate(copy.deepcopy(own))


def _exchanged(m: Any) -> None:
    m.body.one.act, m.body.one.relu = F.silu, nn.SiLU()


def _returned(m: Any) -> None:
    m.body.returned.update(one="out", two="low")


def _dilated(m: Any) -> None:
    m.body.one.a[0].padding, m.body.one.a[0].dilation = (2, 2), (2, 2)


def _reflecting(m: Any) -> None:
    m.body.one.a[0].padding_mode = "reflect"
    m.body.one.a[0]._reversed_padding_repeated_twice = [1] * 4


def _untracked(m: Any) -> None:
    m.stem[1].running_mean = m.stem[1].running_var = m.stem[1].num_batches_tracked = None
    m.stem[1].track_running_stats = False


def _scaled_state(m: Any) -> dict[str, Tensor]:
    return {k: v * 1.1 if v.is_floating_point() else v for k, v in m.state_dict().items()}


def _doubles(*args: Any) -> Any:
    return args[-1] * 2


def _biased(m: Any) -> None:
    m.stem[0].bias = nn.Parameter(torch.full((8,), 0.3))


CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda m: None,
    "stride": lambda m: setattr(m.stem[0], "stride", (2, 2)),
    "a stride that is a number": lambda m: setattr(m.stem[0], "stride", 2),
    "dilation": _dilated,
    "padding mode": _reflecting,
    "momentum": lambda m: setattr(m.stem[1], "momentum", 0.3),
    "activations": _exchanged,
    "a layer in a sequence": lambda m: m.stem.__setitem__(1, nn.Identity()),
    "a flag": lambda m: setattr(m.body.one, "skips", False),
    "a list in place": lambda m: m.body.one.places.append(2),
    "a nested list in place": lambda m: m.body.one.options["nested"].__setitem__(0, False),
    "a dict of a ModuleDict": _returned,
    "a configuration": lambda m: setattr(m.body.one.config, "skip", False),
    "in a configuration": lambda m: setattr(m.body.one.config.inner, "flag", False),
    "a method on the instance": lambda m: setattr(m.body.one, "last", lambda x: x * 3),
    "a forward on the instance": lambda m: setattr(m.body.one.relu, "forward", lambda x: x * 3),
    "a parametrization": lambda m: parametrizations.weight_norm(m.body.one.a[0]),
    "pruning": torch.no_grad()(lambda m: prune.l1_unstructured(m.body.one.a[0], "weight", 0.3)),
    "another bias": _biased,
    "statistics in place": lambda m: m.stem[1].running_mean.add_(1),
    "no statistics": _untracked,
    "an assigned state dict": lambda m: m.load_state_dict(_scaled_state(m), assign=True),
    "frozen norms": lambda m: [n.eval() for n in m.modules() if isinstance(n, nn.BatchNorm2d)],
    "a frozen encoder": lambda m: m.body.requires_grad_(False),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "a hook at a leaf": lambda m: m.body.one.a[0].register_forward_hook(_doubles),
    "a hook at a sequence": lambda m: m.body.one.a.register_forward_hook(_doubles),
    "a hook at a block": lambda m: m.body.one.register_forward_hook(_doubles),
    "a hook before a block": lambda m: m.body.one.register_forward_pre_hook(
        lambda m, args: (args[0] * 2,)
    ),
    "a hook at the model": lambda m: m.register_forward_hook(_doubles),
}


@pytest.mark.parametrize("cls", [Net, Deciding])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change(change: Callable[[Any], object], cls: type[nn.Module]) -> None:
    own, model = pair(cls)
    assert_infers_alike(model, own)
    model.train(), own.train()
    step(model, maps()), step(own, maps())
    # Statistics without the rounding of float32.
    model.load_state_dict(own.state_dict())
    for m in (model, own):
        change(m)
    assert_trains_alike(model, own)
    model.eval(), own.eval()
    assert_infers_alike(model, own)
    if "on the instance" not in str(change):
        assert row_of(model, "body").runs in ("inside", REGION), row_of(model, "body")


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        pytest.param(inspect.getmodule(Block), "FLAG", False, id="a global"),
        pytest.param(inspect.getmodule(Block), "helper", lambda x, y: x - y, id="a function"),
        pytest.param(SETTINGS, "skip", False, id="in a global dict"),
        pytest.param(Block, "skips", False, id="an attribute of the class"),
        pytest.param(Block, "last", lambda self, x: x * 2, id="a method of the class"),
        pytest.param(Block, "forward", lambda self, x: self.a(x), id="the forward of the class"),
        pytest.param(F, "relu", F.silu, id="a function of PyTorch"),
    ],
)
def test_what_forwards_read_elsewhere(
    target: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, model = pair()
    assert_infers_alike(model, own)
    model.train(), own.train()
    step(model, maps()), step(own, maps())
    model.load_state_dict(own.state_dict())
    (monkeypatch.setitem if isinstance(target, dict) else monkeypatch.setattr)(target, name, value)
    assert_trains_alike(model, own)
    model.eval(), own.eval()
    assert_infers_alike(model, own)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("place", ["stem", "body.one.a", "body.one.a.0", "body.one"])
def test_hooks_come_and_go(place: str, backward: bool) -> None:
    model = dlf.accelerate(net()).train()
    step(model, maps())
    calls: list[object] = []
    module = model.get_submodule(place)
    register = module.register_full_backward_hook if backward else module.register_forward_hook
    handle = register(lambda *args: calls.append(args))
    step(model, maps())
    assert len(calls) == 1
    handle.remove()
    step(model, maps())
    assert len(calls) == 1 and not forward_of(model).why_plainly()


def test_an_activation_becomes_one_in_place() -> None:
    own, model = pair()
    with torch.no_grad():
        for m in (model, own):
            m(maps())
            # Its input is the block's, which the sum behind reads.
            m.body.one.a = nn.Sequential(nn.ReLU(), *m.body.one.a)
            m(maps())
            m.body.one.a[0].inplace = True
    assert_infers_alike(model, own)


# Comparing.


def test_the_comparison_leaves_nothing_behind() -> None:
    model = net().train()
    model.stem.eval()
    calls: list[object] = []
    model.head.weight.register_hook(lambda grad: calls.append(grad))
    model.body.one.a.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    dlf.accelerate(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not calls
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert np.array_equal(np.random.get_state()[1], generators[2])


def test_train_of_a_class_is_not_called() -> None:
    class Merging(Net):
        """As an adapter that adds itself to the weights in eval mode."""

        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError

    dlf.accelerate(settled(Net(), 1)).__class__ = Merging
    model = settled(Net(), 1)
    model.__class__ = Merging
    assert row_of(dlf.accelerate(model)).runs == REGION


def test_norms_in_training_mode_in_a_model_in_eval_mode() -> None:
    """Whose statistics adapt to the data: a call moves them once."""
    own = net()
    own.body.one.a[1].train()
    model = copy.deepcopy(own)
    dlf.accelerate(model)
    assert_infers_alike(model, own)
    assert_same_results(dict(model.named_buffers()), dict(own.named_buffers()), CLOSE)


def test_a_graph_of_an_earlier_call_stays_valid() -> None:
    """The comparison in the middle of a step writes no buffer that the graph has."""
    model = dlf.accelerate(net())
    y = model(maps())
    with torch.autocast("cpu", torch.bfloat16):
        z = model(maps())
    (y.sum() + z.float().sum()).backward()
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_first_call_of_a_kind(reentrant: bool) -> None:
    """It counts what is saved, in the comparison as well."""
    own, model = pair()
    # Of a kind that was not compared.
    own, model = own.double().train(), model.double().train()

    def call(m: nn.Module, x: Tensor) -> Tensor:
        y = checkpoint(m.body["one"], m.stem(x), use_reentrant=reentrant)
        z = checkpoint(m.body["two"], y, use_reentrant=reentrant)
        return m.head(torch.cat([y, z], 1))

    x = maps().double()
    assert_same(step(model, x, call), step(own, x, call), EXACT)
    whole = lambda m, x: checkpoint(m, x, use_reentrant=reentrant)  # noqa: E731
    assert_same(step(model, x, whole), step(own, x, whole), EXACT)


class Halves(nn.Module):
    """As a U-Net: only even sizes fit."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = conv(8, 8), conv(8, 8)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.interpolate(self.pool(self.down(x)), scale_factor=2.0)) + x


def test_sizes_that_must_be_even_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own = settled(Halves())
    model = dlf.accelerate(copy.deepcopy(own))
    with pytest.raises(RuntimeError, match="must match"):
        model(maps(1, 8, 7, 9))
    assert_infers_alike(model, own, maps(1, 8, 48, 40))
    compared: list[object] = []
    monkeypatch.setattr(probe, "differing", compared.append)
    monkeypatch.setattr("deeplab_fast.program.region.differing", compared.append)
    assert_infers_alike(model, own, maps(2, 8, 32, 34))
    assert not compared


@pytest.mark.parametrize("structured", [True, False], ids=["another structure", "another dtype"])
def test_other_results_are_refused(structured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which distances of numbers would not show."""
    compute = structure.compute

    def wrong(node: Any, inputs: Any) -> Any:
        y = compute(node, inputs)
        return y if node.kind != "cat" else (y, y) if structured else y.double()

    monkeypatch.setattr(structure, "compute", wrong)
    own = settled(Own(lambda m, x: torch.cat([m.a(x), x], 1)))
    model = dlf.accelerate(copy.deepcopy(own), inference=False)
    assert row_of(model).runs == OWN and "it returns" in row_of(model).how
    assert_trains_alike(model, own)


def test_a_wrong_gradient_is_refused_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = structure.compute
    monkeypatch.setattr(
        structure,
        "compute",
        lambda node, inputs: (
            compute(node, [inputs[0].detach(), *inputs[1:]])
            if node.kind == "cat"
            else compute(node, inputs)
        ),
    )
    own = settled(Own(lambda m, x: torch.cat([m.a(x), x], 1)))
    model = dlf.accelerate(copy.deepcopy(own), inference=False)
    assert "its gradients differ from those of its own forward by" in row_of(model).how
    own.train(), model.train()
    assert_trains_alike(model, own)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_other_dtypes(dtype: torch.dtype) -> None:
    own = net().to(dtype)
    model = dlf.accelerate(copy.deepcopy(own))
    assert "inference by its own forward (the input is" in row_of(model).how
    x = maps().to(dtype)
    with torch.no_grad():
        # The plain modules, to the bit.
        assert torch.equal(model(x), own(x))
    model.train(), own.train()
    assert norm_error(model(x).double(), own(x).double()) <= 4 * torch.finfo(dtype).eps * 8**0.5


def test_wherever_new_tensors_are_made() -> None:
    model = net()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        dlf.accelerate(model)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert row_of(model).runs == REGION
    assert any(not found.reason for found in forward_of(model).region.verdicts.values())


def test_in_inference_mode() -> None:
    own = net()
    model = copy.deepcopy(own)
    with torch.inference_mode():
        dlf.accelerate(model)
    assert row_of(model).how.startswith("inference and training")
    assert_infers_alike(model, own)
    assert_trains_alike(model, own)


def test_before_there_are_weights() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    lazy = dlf.accelerate(Lazy())
    lazy(maps())
    assert_infers_alike(lazy.eval(), dlf.restore(copy.deepcopy(lazy)))
    with torch.device("meta"):
        model = Net()
    dlf.accelerate(model).to_empty(device="cpu")
    own = net()
    model.load_state_dict(own.state_dict())
    assert_infers_alike(model.eval(), own)


# Inputs.


class Marked(Tensor):
    """As the images of other libraries."""


INPUTS: dict[str, Callable[[], Tensor]] = {
    "one image": lambda: maps()[:1],
    "channels_last": lambda: maps().contiguous(memory_format=torch.channels_last),
    "transposed": lambda: maps().transpose(2, 3),
    "strided": lambda: maps()[:, :, ::2, 1:],
    "no images": lambda: maps()[:0],
    "a class of its own": lambda: maps().as_subclass(Marked),
    "a parameter": lambda: nn.Parameter(maps()),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_an_input(make: Callable[[], Tensor]) -> None:
    own, model = pair()
    assert_infers_alike(model, own, make())
    model.train(), own.train()
    found, expected = model(make()), own(make())
    assert type(found) is type(expected) and found.stride() == expected.stride()
    if expected.numel():
        assert norm_error(found.detach(), expected.detach()) <= CLOSE


@pytest.mark.parametrize(
    "x", [maps().int(), maps(1, 8, 1, 1), maps(2, 5, 9, 9), maps()[0, 0]],
    ids=["integers", "one value a channel", "other channels", "no batch"],
)  # fmt: skip
def test_an_input_that_is_refused(x: Tensor) -> None:
    """With PyTorch's own error, which training has for the second."""
    for training in (True, False):
        errors = []
        for m in pair():
            try:
                errors.append(m.train(training)(x).shape)
            except Exception as error:
                errors.append((type(error), str(error)))
        assert errors[0] == errors[1]


def test_not_finite_values_stay_where_they_are() -> None:
    own, model = pair()
    x = maps()
    x[0, 0, 3, 3], x[1, 2, 5, 5], x[1, 1, 9, 9] = torch.nan, torch.inf, -torch.inf
    for training in (False, True):
        with torch.set_grad_enabled(training):
            found, expected = (m.train(training)(x) for m in (model, own))
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())


def test_an_inference_tensor_and_gradients_of_inputs() -> None:
    own, model = pair()
    with torch.inference_mode():
        made = maps().clone()
    with torch.no_grad():
        assert norm_error(model(made), own(made)) <= CLOSE
    for m in (own, model):
        m.requires_grad_(False)
    x = maps().requires_grad_()
    grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (model, own)]
    # Signs that change at ReLUs: the square root of the results' error.
    assert norm_error(*grads) <= CLOSE**0.5


def test_arguments_by_name() -> None:
    own, model = pair()
    with torch.no_grad():
        assert norm_error(model(x=maps()), own(maps())) <= CLOSE
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        model(y=maps())


class Many(nn.Module):
    """More arguments, of which one is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor, *args: Any, flag: bool = True, **kwargs: Any) -> Tensor:
        return self.a(x) if flag and not args and not kwargs else self.b(x)


def test_more_arguments() -> None:
    own = settled(Many())
    model = dlf.accelerate(copy.deepcopy(own))
    assert row_of(model).runs == REGION
    with torch.no_grad():
        for args, kwargs in (((), {}), ((1,), {}), ((), {"flag": False}), ((), {"other": 1})):
            assert norm_error(model(maps(), *args, **kwargs), own(maps(), *args, **kwargs)) <= CLOSE
    names = ("__name__", "__code__", "__defaults__", "__kwdefaults__", "__func__", "__self__")
    for name in names[:-1]:
        assert getattr(model.forward, name) == getattr(own.forward, name)
    assert model.forward.__self__ is model
    assert inspect.signature(model.forward) == inspect.signature(own.forward)


class Resized(nn.Module):
    """Interpolations that come last, and those that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(8, 8), conv(8, 3), conv(3, 3)
        self.up, self.identity = nn.Upsample(scale_factor=2, mode="bilinear"), nn.Identity()
        self.near = nn.UpsamplingNearest2d(size=(20, 11))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.b(F.interpolate(self.a(x), size=(9, 7), mode="bilinear"))
        full = F.interpolate(low, x.shape[-2:], mode="bilinear", align_corners=True)
        used = self.up(low)
        return {
            "full": full,
            "aux": self.identity(self.up(self.c(low))),
            "near": self.near(low),
            "low": low,
            "used": used,
            "more": self.c(used),
            "own": F.interpolate(x, scale_factor=0.5),
        }


@pytest.mark.parametrize("x_last", [False, True], ids=["x contiguous", "x channels_last"])
@pytest.mark.parametrize("last", [False, True], ids=["weights contiguous", "channels_last"])
def test_last_interpolations(last: bool, x_last: bool) -> None:
    formats = (torch.contiguous_format, torch.channels_last)
    own = settled(Resized()).to(memory_format=formats[last])
    model = dlf.accelerate(copy.deepcopy(own))
    x = maps().contiguous(memory_format=formats[x_last])
    assert row_of(model).runs == REGION
    with torch.no_grad():
        found, expected = model(x), own(x)
    assert_same_results(found, expected, CLOSE)
    for name, y in expected.items():
        assert found[name].stride() == y.stride(), name
    assert_trains_alike(model, own, x)


class Divisible(Net):
    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if h % 4 != 0 or w % 4 != 0:
            raise RuntimeError(f"sizes must be multiples of 4, got {h}x{w}")
        return super().forward(x)


def test_a_model_that_wants_multiples() -> None:
    own, model = pair(Divisible)
    assert row_of(model).runs == REGION
    for size in ((16, 20), (8, 4)):
        assert_infers_alike(model, own, maps(2, 8, *size))
        assert_trains_alike(model, own, maps(2, 8, *size))
    with pytest.raises(RuntimeError, match="multiples of 4, got 17x22"):
        model(maps())
    # As a part of something else it is asked at every call.
    outer = dlf.accelerate(nn.Sequential(copy.deepcopy(own), conv(3, 3)))
    assert row_of(outer, "0").runs == REGION
    with torch.no_grad(), pytest.raises(RuntimeError, match="multiples of 4, got 17x22"):
        outer(maps())
    assert_infers_alike(outer, dlf.restore(copy.deepcopy(outer)), maps(2, 8, 16, 20))


class OneLayer(nn.Conv2d):
    """A layer of its own, as other libraries have them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def test_one_layer_by_itself_runs_as_it_is() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = OneLayer(8, 8, 3), nn.Sequential(OneLayer(8, 8, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            assert float(x.sum()) == float(x.sum())
            return self.two(self.one(x))

    own = settled(Pair())
    model = dlf.accelerate(copy.deepcopy(own))
    assert row_of(model, "one").how == "it is one layer, which joins nothing"
    assert row_of(model, "two").runs == REGION
    assert_infers_alike(model, own)
    assert_trains_alike(model, own)


# Tools.


def test_autocast() -> None:
    own, model = pair()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            found, expected = model(maps()), own(maps())
        assert found.dtype == expected.dtype == torch.bfloat16
        eps = torch.finfo(torch.bfloat16).eps
        assert norm_error(found.double(), expected.double()) <= 2 * eps * 8**0.5
        found, expected = model.train()(maps()), own.train()(maps())
    assert found.dtype == expected.dtype
    assert norm_error(found.detach().double(), expected.detach().double()) <= 2 * eps * 8**0.5


def test_deterministic_algorithms() -> None:
    own, model = pair()
    torch.use_deterministic_algorithms(True)
    try:
        assert_infers_alike(model, own)
        assert_trains_alike(model, own)
    finally:
        torch.use_deterministic_algorithms(False)


def _saved_script(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


TOOLS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "scripting": lambda m: _saved_script(m.body.two.a),
    "tracing": lambda m: torch.jit.trace(m.body.two.a, maps()),
    "strict export": lambda m: torch.export.export(m.body.two.a, (maps(),), strict=True).module(),
    "export": lambda m: torch.export.export(m.body.two.a, (maps(),), strict=False).module(),
    "fx": lambda m: torch.fx.symbolic_trace(m.body.two.a),
    "vmap": lambda m: lambda x: torch.vmap(lambda each: m.body.two.a(each[None])[0])(x),
}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_tool_sees_the_plain_modules(tool: Callable) -> None:
    own, model = pair()
    seen = tool(model)
    with torch.no_grad():
        assert norm_error(seen(maps()), own.body.two.a(maps())) <= SAVING
    assert_infers_alike(model, own)


class Prepared(nn.Module):
    """Has itself scripted as something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(8, 8)

    def __prepare_scriptable__(self) -> nn.Module:
        return nn.Sequential(self.a, nn.Identity())

    def forward(self, x: Tensor) -> Any:
        return self.a(x).permute(*range(4))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripting_what_has_parts_changes_nothing_of_it() -> None:
    own = settled(nn.Sequential(conv(8, 8), nn.Sequential(conv(8, 8), conv(8, 8)), Prepared()))
    model = dlf.accelerate(copy.deepcopy(own))
    parts = dict(model.named_modules())
    scripted = _saved_script(model)
    with torch.no_grad():
        assert norm_error(scripted(maps()), own(maps())) <= CLOSE
    assert dict(model.named_modules()) == parts
    assert_infers_alike(model, own)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_module_inside() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scripted, self.block = torch.jit.script(settled(conv(8, 8))), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.scripted(x))

    model = settled(Wrapped())
    with torch.no_grad():
        expected = model(maps())
        dlf.accelerate(model)
        assert norm_error(model(maps()), expected) <= CLOSE
    assert row_of(model, "scripted").how == "it is scripted"
    assert row_of(model).runs == REGION
    dlf.accelerate(model, exclude="scripted")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_before_or_after(backend: str) -> None:
    torch._dynamo.reset()
    own = net()
    model = copy.deepcopy(own)
    before = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        before(maps())
        dlf.accelerate(before)
        after = torch.compile(model, backend=backend, fullgraph=True)
        for each in (before, after, model):
            assert norm_error(each(maps()), own(maps())) <= CLOSE
    own.train(), model.train()
    found = {k.replace("_orig_mod.", ""): v for k, v in step(after, maps()).items()}
    assert_same(found, step(own, maps()), CLOSE**0.5)
    own.eval(), model.eval()
    model.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        assert norm_error(model(maps()), own(maps())) <= CLOSE
    torch._dynamo.reset()


def test_a_feature_extractor_of_torchvision() -> None:
    import_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    own, model = pair()
    made = [create_feature_extractor(m, {"stem": "a", "head": "b"}) for m in (model, own)]
    with torch.no_grad():
        found, expected = (each(maps()) for each in made)
    assert all(norm_error(found[k], expected[k]) <= CLOSE for k in expected)


def test_functional_transforms() -> None:
    from torch.func import functional_call, grad

    own, model = pair()
    state = {k: v.detach() * 1.1 for k, v in own.named_parameters()}
    with torch.no_grad():
        for m in (model, own):
            m(maps())
        y, z = (functional_call(m, state, (maps(),)) for m in (model, own))
        assert norm_error(y, z) <= CLOSE
    found, expected = (
        grad(lambda s, m=m: functional_call(m, s, (maps(),)).square().sum())(state)
        for m in (model, own)
    )
    assert norms_error([(found[k], expected[k]) for k in state]) <= CLOSE**0.5
    # Its own parameters are there again.
    assert_infers_alike(model, own)


def test_shallow_copies() -> None:
    _, model = pair()
    shallow = copy.copy(model)
    assert forward_of(shallow) is None
    dlf.accelerate(shallow)
    assert forward_of(shallow).module is shallow and forward_of(model).module is model
    dlf.restore(shallow)
    assert "forward" not in vars(shallow) and "forward" in vars(model)


def test_copies_run_their_own_modules() -> None:
    _, model = pair()
    other = copy.deepcopy(model)
    for name, m in other.named_modules():
        forward = forward_of(m)
        if forward is not None:
            assert forward.module is m and forward_of(model.get_submodule(name)) is not forward


def test_restoring_what_was_wrapped_meanwhile() -> None:
    model = dlf.accelerate(net())
    wrapped = nn.Sequential(torch.optim.swa_utils.AveragedModel(model), nn.DataParallel(model))
    dlf.restore(wrapped)
    attributes = [vars(m) for m in wrapped.modules()]
    assert not any(isinstance(v, Forward) for own in attributes for v in own.values())
    assert not any("_replicate_for_data_parallel" in own for own in attributes)


def _in_two_processes(rank: int, folder: str) -> None:
    """Half of a batch in each, accelerated before or after wrapping, or not at all."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = maps(4, 8, 9, 12).double()[2 * rank :][:2]
    found = []
    for when in ("never", "before", "after"):
        model = net().double().train()
        if when == "before":
            dlf.accelerate(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        if when == "after":
            dlf.accelerate(parallel)
        for _ in range(2):
            parallel.zero_grad()
            parallel(x).square().sum().backward()
        if when != "never":
            assert row_of(model).runs == REGION
        found.append({k: p.grad for k, p in model.named_parameters()} | dict(model.named_buffers()))
    if rank == 0:
        torch.save(found, f"{folder}/end.pt")
    dist.destroy_process_group()


def test_data_parallel_in_two_processes(tmp_path: Path) -> None:
    mp.spawn(_in_two_processes, (str(tmp_path),), nprocs=2)
    expected, *found = torch.load(tmp_path / "end.pt")
    for each in found:
        assert list(each) == list(expected)
        for name, value in expected.items():
            assert norm_error(each[name].double(), value.double()) <= EXACT, name


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("before", [True, False], ids=["accelerated before", "after"])
def test_fully_sharded(before: bool, group: None) -> None:
    """Its hooks gather parameters around the forwards of blocks and of the model."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    own, model = (m.double().train() for m in pair())
    if not before:
        dlf.restore(model)
    for m in (own, model):
        for block in m.body.values():
            fsdp.fully_shard(block)
        fsdp.fully_shard(m)
    if not before:
        dlf.accelerate(model)
    for _ in range(2):
        found, expected = (
            {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in step(m, x).items()}
            for m, x in ((model, maps().double()), (own, maps().double()))
        )
        assert_same(found, expected, EXACT)
    assert row_of(model).runs == row_of(model, "body.one").runs == REGION


@pytest.mark.parametrize("before", [True, False], ids=["accelerated before", "after"])
def test_adapters(before: bool) -> None:
    """PEFT's LoRA on convolutions, switched, merged and taken out."""
    import_torchvision()
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2,
        target_modules=["stem.0", "body.one.a.0"],
        modules_to_save=["head"],
        init_lora_weights=False,
    )
    own, model = pair()
    if not before:
        dlf.restore(model)
    adapted = []
    for m in (own, model):
        torch.manual_seed(0)
        adapted.append(peft.get_peft_model(m, config).eval())
    own, model = adapted
    if not before:
        dlf.accelerate(model)

    def assert_alike() -> None:
        with torch.no_grad():
            assert norm_error(model(maps()), own(maps())) <= CLOSE

    assert_alike()
    own.train(), model.train()
    torch.manual_seed(1)
    expected = step(own.double(), maps().double())
    torch.manual_seed(1)
    assert_same(step(model.double(), maps().double()), expected, EXACT)
    own.float().eval(), model.float().eval()
    with own.disable_adapter(), model.disable_adapter():
        assert_alike()
    own.merge_adapter(), model.merge_adapter()
    assert_alike()
    own.unmerge_adapter(), model.unmerge_adapter()
    assert_alike()
    own, model = own.merge_and_unload(), model.merge_and_unload()
    assert_alike()


# Filters, reports.


def test_a_second_call_changes_nothing() -> None:
    model = dlf.accelerate(net())
    forwards = [forward_of(m) for m in model.modules()]
    verdicts = [dict(f.region.verdicts) for f in forwards if f is not None]
    flows = [f.flow() for f in forwards if f is not None]
    dlf.accelerate(model)
    assert [forward_of(m) for m in model.modules()] == forwards
    for forward, flow, known in zip(filter(None, forwards), flows, verdicts, strict=True):
        assert forward.flow() is flow
        assert known.items() <= forward.region.verdicts.items()


def test_include_and_exclude() -> None:
    own, model = pair()
    blocks = lambda name, module: isinstance(module, Block)  # noqa: E731
    dlf.accelerate(model, include=blocks, exclude="*.b")
    rows = {row.name: row for row in dlf.accelerate_report(model).rows}
    assert {name for name, row in rows.items() if row.runs == REGION} == {"body.one", "body.two"}
    for name in ("", "stem", "stem.0", "body.one.b.0", "head"):
        assert rows[name].how.startswith("it was excluded")
    assert rows["body.one.a.0"].runs == "inside"
    assert_infers_alike(model, own)
    assert_trains_alike(model, own)
    dlf.accelerate(model, include=["stem", "body.t*"])
    rows = {row.name: row.runs for row in dlf.accelerate_report(model).rows}
    assert (rows["stem"], rows["body.two"], rows["body.one"]) == (REGION, REGION, "alone")
    assert_infers_alike(model, own)
    dlf.accelerate(model)
    assert row_of(model).runs == REGION


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"include": "nothing"}, ValueError, r"include='nothing' fits no module; there are \d+"),
        ({"exclude": ["stem", "no*"]}, ValueError, r"exclude='no\*' fits no module"),
        ({"include": lambda *_: False}, ValueError, "true of none of the"),
        ({"exclude": 3}, TypeError, "exclude is 3; expected names"),
        ({"include": [3]}, TypeError, r"include is \[3\]; expected names"),
    ],
    ids=["a name", "one of names", "a function", "a number", "numbers"],
)
def test_filters_that_do_not_fit(arguments: dict, error: type[Exception], message: str) -> None:
    model = net()
    with pytest.raises(error, match=message):
        dlf.accelerate(model, **arguments)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_patch_on_an_instance_outlives_everything() -> None:
    model = net()
    patch = lambda x: x * 3  # noqa: E731
    model.body.one.relu.forward = model.body.two.forward = patch
    with torch.no_grad():
        expected = model(maps())
        dlf.accelerate(model, exclude=["body.two", "body.one.relu"])
        assert norm_error(model(maps()), expected) <= CLOSE
    dlf.restore(model)
    assert vars(model.body.two)["forward"] is vars(model.body.one.relu)["forward"] is patch


def test_strict_puts_filters_back() -> None:
    model = net()
    model.body.one.a[1] = nn.GroupNorm(2, 8)
    # What has no parameters, or was excluded, may be left alone.
    model.body.one.relu = nn.Softplus()
    dlf.accelerate(model, exclude="body.one.a.1", strict=True)
    bound = [vars(m).get("forward") for m in model.modules()]
    with pytest.raises(ValueError, match=r"strict: 1 modules .*body\.one\.a\.1: no rule knows a"):
        dlf.accelerate(model, inference=False, strict=True)
    assert [vars(m).get("forward") for m in model.modules()] == bound
    assert forward_of(model).region.settings == (True, True)


def test_a_report() -> None:
    model = net(Deciding)
    model.body.one.a[1] = nn.GroupNorm(2, 8)
    report = dlf.accelerate_report(dlf.accelerate(model))
    names = [name for name, _ in model.named_modules()]
    assert [row.name for row in report.rows] == names
    rows = {row.name: row for row in report.rows}
    assert rows[""].runs == OWN and "by the size or the values" in rows[""].how
    assert rows["body"].runs == REGION and rows["body"].how == (
        "inference and training; 2 residual blocks"
    )
    assert rows["body.one.a.1"].runs == "alone"
    leaf = [row for row in report.rows if row.is_leaf]
    assert report.total == len(leaf)
    assert report.accelerated == sum(row.runs == "inside" for row in leaf)
    assert report.left_alone == tuple(row for row in report.rows if row.runs == "alone")
    text = str(report)
    assert text.startswith(f"{report.accelerated} of {report.total} modules run in our forms")
    assert "body.one.a.1 (GroupNorm): left alone: no rule knows a GroupNorm" in text


def test_what_no_call_comes_to() -> None:
    model = dlf.accelerate(settled(Own(lambda m, x: m.a(x))))
    report = dlf.accelerate_report(model)
    assert (report.accelerated, report.total, len(report.left_alone)) == (3, 3, 0)
    assert row_of(model, "b").runs == row_of(model, "c.0").runs == "unused"


def test_nothing_to_accelerate() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.randn(2, 3, 2, 2)
    expected = model(x)
    assert torch.equal(dlf.accelerate(model)(x), expected)
    report = dlf.accelerate_report(model)
    assert report.accelerated == 0 and all(row.runs == "alone" for row in report.rows)
    with pytest.raises(ValueError, match=r"1: no rule knows a Linear"):
        dlf.accelerate(model, strict=True)
    dlf.accelerate(nn.ModuleList([nn.Conv2d(3, 3, 1)]))
    with pytest.raises(TypeError, match="restore takes an"):
        dlf.restore(None)


def test_a_model_of_this_package_inside() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = dlf.deeplabv3_resnet18(num_classes=3, aspp_channels=16)
            self.after = conv(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.net(x)["out"])

    model = dlf.accelerate(settled(Wrapped()), training=False)
    assert model.net.fast and not model.net.fused and "forward" not in vars(model.net.backbone)
    report = dlf.accelerate_report(model)
    assert report.accelerated == report.total
    assert row_of(model.net).how == "a model of this package, by itself: inference"
    own = dlf.restore(copy.deepcopy(model))
    own.net.fast = False
    # Twenty-seven convolutions.
    with torch.no_grad():
        x = maps(1, 3, 33, 41)
        assert norm_error(model(x), own(x)) <= SAVING * 27**0.5


# Other libraries' models.


@pytest.mark.parametrize(
    "name",
    [
        "torchvision deeplabv3_mobilenet_v3_large aux",
        "torchvision deeplabv3_resnet50 aux",
        "smp v3plus resnet18",
    ],
)
def test_memory_formats(name: str) -> None:
    """Of results they are the plain model's, whichever the input and the weights have."""
    case = other_models.CASES[name]
    import_torchvision()
    pytest.importorskip(case.requires)
    formats = (torch.contiguous_format, torch.channels_last)
    base = case.model()
    for weights, images in itertools.product(formats, formats):
        own = copy.deepcopy(base).to(memory_format=weights)
        model = dlf.accelerate(copy.deepcopy(own))
        x = case.map(1).contiguous(memory_format=images)
        with torch.no_grad():
            found, expected = (other_models.tensors(case.call(m, x)) for m in (model, own))
        assert [y.stride() for y in found.values()] == [y.stride() for y in expected.values()]
        bound = SAVING * sum(isinstance(m, nn.Conv2d) for m in own.modules()) ** 0.5
        for key, value in expected.items():
            assert norm_error(found[key], value) <= bound
