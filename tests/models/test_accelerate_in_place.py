"""`accelerate` in place: the same object before and after whatever people do with a model."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast.dispatch.errors import norm_error
from deeplab_fast.program import structure
from deeplab_fast.program.region import forward_of

# Of a dozen convolutions in fp32 whose forms save multiplications (CONTRIBUTING.md).
BOUND = 1e-5 * 12**0.5


def conv(inputs: int, outputs: int, kernel: int = 1, rate: int = 1, act: bool = True) -> nn.Module:
    padding = rate * (kernel // 2)
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=rate, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (
            conv(channels, channels, 3),
            conv(channels, channels, 1, act=False),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        y += x
        return self.relu(y)


class Pyramid(nn.Module):
    """Atrous branches around the pooled map."""

    def __init__(self, inputs: int, width: int, place: int) -> None:
        super().__init__()
        self.place = place
        self.branches = nn.ModuleList([conv(inputs, width), conv(inputs, width, 3, 2)])
        self.pooled = conv(inputs, width)
        self.project = conv(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, x.shape[2], x.shape[3])
        maps = [branch(x) for branch in self.branches]
        maps.insert(self.place, pooled)
        return self.project(torch.cat(maps, dim=1))


class Net(nn.Module):
    """Of no library: a dict of maps from a backbone, a head that takes it."""

    def __init__(self, place: int = 1) -> None:
        super().__init__()
        self.stem, self.block = conv(3, 16, 3), Residual(16)
        self.head, self.classify = Pyramid(16, 8, place), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.stem(x)
        high = self.head(self.block(low))
        y = self.classify(torch.cat([low, high], dim=1))
        return {"out": F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)}


def net(place: int = 1) -> Net:
    torch.manual_seed(0)
    model = Net(place)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.0)
            nn.init.uniform_(m.bias, -0.2, 0.8)
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model.eval()


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 17, 23, generator=torch.Generator().manual_seed(1))


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """What the model gives that was never accelerated."""
    with torch.inference_mode():
        return dlf.restore(copy.deepcopy(model))(x)["out"]


def assert_plain(model: nn.Module, x: Tensor | None = None) -> None:
    x = image() if x is None else x
    with torch.inference_mode():
        found = model(x)["out"]
    expected = plain(model, x)
    assert norm_error(found, expected) <= BOUND
    assert found.stride() == expected.stride()


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The programs that ran."""
    from deeplab_fast.program import layers

    ran: list[object] = []
    maps = layers.Program.maps
    monkeypatch.setattr(layers.Program, "maps", lambda *args: ran.append(args[0]) or maps(*args))
    return ran


@pytest.mark.parametrize("place", [0, 1, 2], ids=["pooled first", "amid", "last"])
def test_a_model_of_no_library_is_one_region(place: int, programs: list[object]) -> None:
    model = dlf.accelerate(net(place))
    report = dlf.accelerate_report(model)
    assert [row.name for row in report.rows if row.runs == "region"] == [""]
    assert report.accelerated == report.total and "1 residual block, 1 ASPP" in str(report)
    programs.clear()
    assert_plain(model)
    assert programs


def test_the_model_stays_what_it_is() -> None:
    model = net()
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    keys, parameters = list(model.state_dict()), list(model.parameters())
    classes = [type(m) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    assert dlf.accelerate(model) is model
    forwards = [forward_of(m) for m in model.modules()]
    assert dlf.accelerate(model) is model
    assert [forward_of(m) for m in model.modules()] == forwards
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    # The comparison put everything back.
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None and p.requires_grad for p in parameters)
    assert not any(m.training for m in model.modules())
    assert dlf.restore(model) is model
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before


def _half(model: nn.Module) -> None:
    model.block.first[0].weight.data.mul_(0.5)


def _numpy(model: nn.Module) -> None:
    model.block.first[0].weight.detach().numpy()[:] *= 0.5


def _hook(model: nn.Module) -> None:
    model.block.second.register_forward_hook(lambda module, args, out: out * 2)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "through .data": _half,
    "through NumPy": _numpy,
    "a state dict": lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}),
    "eps": lambda m: setattr(m.stem[1], "eps", 0.1),
    "dilation": lambda m: (
        setattr(m.head.branches[1][0], "dilation", (1, 1)),
        setattr(m.head.branches[1][0], "padding", (1, 1)),
    ),
    "an activation exchanged": lambda m: setattr(m.block, "relu", nn.SiLU()),
    "a block exchanged": lambda m: setattr(m, "block", nn.Identity()),
    "an attribute that a forward reads": lambda m: setattr(m.head, "place", 2),
    "a hook on a block in the middle": _hook,
    "a forward on an instance": lambda m: setattr(m.block, "forward", lambda x: x * 2),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "float64": lambda m: m.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change: Callable[[nn.Module], object]) -> None:
    model = dlf.accelerate(net())
    assert_plain(model)
    before = plain(model, image())
    change(model)
    x = image().to(next(model.parameters()).dtype)
    assert_plain(model, x)
    is_format = change is CHANGES["channels_last"]
    assert (norm_error(plain(model, x), before) > 1e-6) is not (
        is_format or change is CHANGES["float64"]
    )


def test_a_patched_class_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dlf.accelerate(net())
    assert_plain(model)
    monkeypatch.setattr(Residual, "forward", lambda self, x: self.relu(self.first(x)) - x)
    assert_plain(model)


def test_gradients_and_statistics_are_those_of_the_plain_model() -> None:
    model = net().double().train()
    own = copy.deepcopy(model)
    dlf.accelerate(model)
    x = image().double()
    for m in (model, own):
        m(x)["out"].square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), own.parameters(), strict=True):
        assert norm_error(p.grad, q.grad) <= 1e-9, name
    for (name, b), c in zip(model.named_buffers(), own.buffers(), strict=True):
        assert norm_error(b.double(), c.double()) <= 1e-9, name


def test_training_keeps_less() -> None:
    def kept(model: nn.Module) -> int:
        storages: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(image(4))["out"].sum()
        return sum(storages.values())

    model = net().train()
    before = kept(model)
    assert kept(dlf.accelerate(model)) < 0.75 * before


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "averaged": lambda m: torch.optim.swa_utils.AveragedModel(m).module,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_runs_its_own_weights(make: Callable[[nn.Module], nn.Module]) -> None:
    model = dlf.accelerate(net(), training=False)
    other = make(model)
    region = forward_of(other).region
    assert region.module is other and region.settings == (True, False)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    assert_plain(other)
    assert_plain(model)


def test_a_saved_model_loads() -> None:
    file = io.BytesIO()
    torch.save(dlf.accelerate(net()), file)
    file.seek(0)
    assert_plain(torch.load(file, weights_only=False))


def test_a_replica_of_data_parallel_runs_by_its_own_parameters() -> None:
    replica = dlf.accelerate(net())._replicate_for_data_parallel()
    assert "forward" not in vars(replica)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_one_graph(backend: str) -> None:
    model = dlf.accelerate(net())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert norm_error(compiled(image())["out"], plain(model, image())) <= BOUND


EXPORTS: dict[str, Callable[[nn.Module, Tensor], Callable[..., dict[str, Tensor]]]] = {
    "torch.export": lambda m, x: torch.export.export(m, (x,)).module(),
    "torch.jit.trace": lambda m, x: torch.jit.trace(m, x, strict=False),
    "torch.fx": lambda m, x: torch.fx.symbolic_trace(m),
    "functional_call": lambda m, x: (
        lambda x: torch.func.functional_call(m, dict(m.named_parameters()), x)
    ),
}


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_exporters_see_the_plain_model(export: Callable) -> None:
    model = dlf.accelerate(net())
    with torch.no_grad():
        assert norm_error(export(model, image())(image())["out"], plain(model, image())) <= BOUND


@pytest.fixture
def group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("before", [True, False], ids=["accelerated before", "after"])
def test_ddp(before: bool, group: None) -> None:
    model, own = net().train(), net().train()
    wrapped = nn.parallel.DistributedDataParallel(dlf.accelerate(model) if before else model)
    if not before:
        dlf.accelerate(wrapped)
    for m in (wrapped, own):
        m(image())["out"].square().sum().backward()
    pairs = zip(model.parameters(), own.parameters(), strict=True)
    # Signs that change at ReLUs: the square root of the results' error (CONTRIBUTING.md).
    assert all(norm_error(p.grad, q.grad) <= BOUND**0.5 for p, q in pairs)


@pytest.mark.parametrize("before", [True, False], ids=["accelerated before", "after"])
def test_fsdp2(before: bool, group: None) -> None:
    """One block sharded by itself, the rest with the model: its class, hooks and tensors change."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, own = net(), net()
    if before:
        dlf.accelerate(model)
    for part in (model.block, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    if not before:
        dlf.accelerate(model)
    for training in (False, True):
        for m in (model.train(training), own.train(training)):
            with torch.set_grad_enabled(training):
                y = m(image())["out"]
            if training:
                y.square().sum().backward()
            else:
                assert norm_error(y, plain(own, image())) <= BOUND
    for p, q in zip(model.parameters(), own.parameters(), strict=True):
        assert norm_error(p.grad.full_tensor(), q.grad) <= BOUND**0.5
    ran = {row.name for row in dlf.accelerate_report(model).rows if row.runs == "region"}
    assert ran == {"", "block"}


@pytest.mark.parametrize("before", [True, False], ids=["accelerated before", "after"])
def test_peft(before: bool) -> None:
    from deeplab_fast import testing

    testing.import_torchvision()
    peft = pytest.importorskip("peft")
    model = net()
    config = peft.LoraConfig(target_modules=["first.0"], init_lora_weights=False)
    if before:
        dlf.accelerate(model)
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, config)
    if not before:
        dlf.accelerate(wrapped)
    wrapped.eval()
    own = dlf.restore(copy.deepcopy(wrapped))
    with torch.inference_mode():
        assert norm_error(wrapped(image())["out"], own(image())["out"]) <= BOUND
        assert norm_error(own(image())["out"], net()(image())["out"]) > 1e-3


class Shared(nn.Module):
    """An activation in place on a map that is used elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8, act=False), conv(8, 8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.first(x)
        maps = [y]
        z = self.second(self.relu(y))
        return {"out": maps[0] + z}


class StartsInPlace(Shared):
    """A sequence that changes what it is called with, which is used behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = nn.Sequential(nn.ReLU(inplace=True), conv(8, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.first(x)
        z = self.rest(y)
        return {"out": y + z}


class Counts(Shared):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls = getattr(self, "calls", 0) + 1
        return {"out": self.first(x) * self.calls}


class Draws(Shared):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.first(x) + torch.rand(())}


class Decides(Shared):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.first(x)
        return {"out": y if y.shape[2] > 10 else self.second(y)}


class Remembers(Shared):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.first(x)
        self.seen.append(y)
        return {"out": self.second(y)}


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Shared, "uses elsewhere"),
        (StartsInPlace, "uses elsewhere"),
        (Counts, "sets attributes"),
        (Draws, "draws random numbers"),
        (Decides, "by the size or the values"),
        (Remembers, "changes a list or dict"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_followed_runs_as_it_is(cls: type[nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    model = cls().eval()
    own = copy.deepcopy(model)
    state = torch.get_rng_state()
    dlf.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    (row,) = (row for row in dlf.accelerate_report(model).rows if row.name == "")
    assert row.runs == "own" and reason in row.how
    with torch.inference_mode():
        torch.manual_seed(3)
        found = model(image())["out"]
        torch.manual_seed(3)
        assert norm_error(found, own(image())["out"]) <= BOUND
    if cls is Counts:
        assert model.calls == 1
    if cls is Remembers:
        assert len(model.seen) == 1 and isinstance(model.seen[0], Tensor)


def test_a_form_that_differs_is_refused_with_the_number(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compute = structure.compute

    def wrong(node: object, inputs: object) -> Tensor:
        y = compute(node, inputs)
        return y * 1.01 if node.kind == "cat" else y

    monkeypatch.setattr("deeplab_fast.program.layers.compute", wrong)
    model = dlf.accelerate(net())
    (row,) = (row for row in dlf.accelerate_report(model).rows if row.name == "")
    assert row.runs == "own" and "differ from those of its own forward by" in row.how
    assert "differ from those of its own forward by" in caplog.text
    assert_plain(model)


def test_filters() -> None:
    model = dlf.accelerate(net(), exclude="head.*", include=lambda name, module: name != "stem")
    rows = {row.name: row for row in dlf.accelerate_report(model).rows}
    assert rows["head.project"].how == "it was excluded, or not included"
    assert rows["block.first.0"].runs == "inside"
    assert_plain(model)
    with pytest.raises(ValueError, match=r"exclude='nothing' fits no module"):
        dlf.accelerate(net(), exclude="nothing")
    with pytest.raises(TypeError, match="names of modules with wildcards"):
        dlf.accelerate(net(), include=[3])


def test_strict() -> None:
    assert dlf.accelerate(net(), strict=True)
    model = net()
    model.block.first[1] = nn.GroupNorm(4, 16)
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=r"block\.first\.1: no rule knows a GroupNorm"):
        dlf.accelerate(model, strict=True)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before


@pytest.mark.parametrize(
    "what", [3, torch.jit.trace(nn.ReLU(), torch.zeros(1))], ids=["int", "scripted"]
)
def test_what_is_refused(what: object) -> None:
    with pytest.raises(TypeError, match=r"an nn\.Module that is not scripted"):
        dlf.accelerate(what)


def test_kinds_of_calls(programs: list[object]) -> None:
    model = dlf.accelerate(net(), inference=False)
    programs.clear()
    assert_plain(model)
    assert not programs
    dlf.accelerate(model, training=False)
    assert_plain(model)
    assert programs
    assert forward_of(model).region.settings == (True, False)


def test_threads() -> None:
    model = dlf.accelerate(net())
    x = [image(n) for n in (1, 2, 3, 4)]
    expected = [plain(model, each) for each in x]
    errors: list[float] = []

    def call(i: int) -> None:
        with torch.inference_mode():
            errors.append(norm_error(model(x[i])["out"], expected[i]))

    threads = [threading.Thread(target=call, args=(i % 4,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 16 and max(errors) <= BOUND


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(image(1), id="batch of one"),
        pytest.param(image().transpose(2, 3), id="not contiguous"),
        pytest.param(image()[:0], id="no images"),
        pytest.param(image().masked_fill(image() > 2.0, float("nan")), id="NaN"),
    ],
)
def test_inputs(x: Tensor) -> None:
    model = dlf.accelerate(net())
    with torch.inference_mode():
        found, own = model(x)["out"], dlf.restore(copy.deepcopy(model))(x)["out"]
    assert found.shape == own.shape and found.stride() == own.stride()
    # What NaN reaches is NaN in both; tiles of a 3x3 convolution may spread it.
    assert bool((found.isnan() | ~own.isnan()).all())
    both = ~found.isnan()
    if both.any():
        assert norm_error(found[both], own[both]) <= BOUND


def test_our_own_model_runs_so_by_itself() -> None:
    model = dlf.deeplabv3_mobilenet_v3_large(weights_backbone=None)
    assert dlf.accelerate(model, inference=False) is model
    assert not model.fast and model.fused and "forward" not in vars(model)
