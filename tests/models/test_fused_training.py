"""Training forms against the plain modules: values, gradients, running statistics, memory."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import deeplab_fast as dlf
from deeplab_fast.dispatch.errors import SAVING
from deeplab_fast.engine.batch_norm import freeze_batch_norm
from deeplab_fast.models import DeepLabV3
from deeplab_fast.models.backbone import IntermediateLayerGetter
from deeplab_fast.models.resnet import BasicBlock, Bottleneck
from deeplab_fast.nn import ASPPPooling, DeepLabHead, FCNHead
from deeplab_fast.program import training as fused

SIZE = 33
# float64 leaves about 1e-16 for each operation, and a hundred layers that amplify it.
EXACT = 1e-9


def plain_and_fused(model: DeepLabV3) -> tuple[DeepLabV3, DeepLabV3]:
    """The same model twice, without randomness."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    torch.manual_seed(1)
    for module in model.modules():
        # Gamma and beta of a new model are 1 and 0, which would hide an exchange.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    plain = copy.deepcopy(model)
    return dlf.fuse(plain, False), dlf.fuse(model)


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    """Every pixel and class with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for y in outputs.values():
        total = total + (y.double() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    return total


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """All that one step of training produces, by name."""
    x = x.detach().clone().requires_grad_()
    outputs = model(x)
    loss_of(outputs).backward()
    results = {f"output {k}": v.detach() for k, v in outputs.items()}
    assert x.grad is not None
    results["grad x"] = x.grad
    results |= {f"grad {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    results |= {f"buffer {k}": b.double() for k, b in model.named_buffers()}
    return results


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to the largest of all gradients, outputs and buffers each.

    Some gradients are 0 in exact arithmetic, such as that of a bias in front of a batch norm.
    """
    assert found.keys() == expected.keys()
    worst = 0.0
    for kind in ("output", "grad", "buffer"):
        names = [k for k in expected if k.startswith(kind)]
        scale = max((expected[k].double().abs().max().item() for k in names), default=1.0)
        for k in names:
            error = (found[k].double() - expected[k].double()).abs().max().item()
            worst = max(worst, error / scale)
    return worst


def tiny() -> DeepLabV3:
    """Every kind of block that a ResNet model has, with few channels."""
    net = nn.Module()
    net.conv1 = nn.Conv2d(3, 8, 7, 2, padding=3, bias=False)
    net.bn1 = nn.BatchNorm2d(8)
    net.relu = nn.ReLU(inplace=True)
    net.maxpool = nn.MaxPool2d(3, 2, padding=1)
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
    net.layer1 = nn.Sequential(Bottleneck(8, 4, 1, shortcut), Bottleneck(16, 4, 1, None))
    net.layer2 = nn.Sequential(BasicBlock(16, 16, 1, None), BasicBlock(16, 16, 1, None))
    net.layer2[1].set_atrous(1, (2, 2))
    backbone = IntermediateLayerGetter(net, {"layer2": "out", "layer1": "aux"})
    head = DeepLabHead(16, 3, (1, 2, 6), aspp_channels=8)
    return DeepLabV3(backbone, head, FCNHead(16, 3))


BUILDERS: dict[str, Callable[[], Any]] = {
    "resnet18": lambda: dlf.deeplabv3_resnet18(num_classes=3),
    "resnet50, aux": lambda: dlf.deeplabv3_resnet50(num_classes=3, aux_loss=True),
    "deep stem, multi-grid, paper head": lambda: dlf.deeplabv3_resnet50(
        num_classes=3, stem="deep", multi_grid=(1, 2, 4), head="paper", output_stride=16
    ),
    "mmseg head: 3x3 projection": lambda: dlf.deeplabv3_resnet18(num_classes=3, head="mmseg"),
    "deeplabv2 head": lambda: dlf.deeplabv3_resnet18(num_classes=3, head="deeplabv2"),
    "cascaded": lambda: dlf.deeplabv3_cascaded_resnet50(num_classes=3),
    "mobilenetv3, aux: h-swish, squeeze-excitation": lambda: dlf.deeplabv3_mobilenet_v3_large(
        num_classes=3, aux_loss=True
    ),
    "mobilenetv2: SAME padding": lambda: dlf.deeplabv3_mobilenet_v2_tf(
        num_classes=3, atrous_rates=(6,)
    ),
    "efficientnet-lite": lambda: dlf.deeplabv3_efficientnet_lite0(num_classes=3),
    "fregu856: biased convolutions before batch norm": lambda: dlf.fregu856_resnet18(num_classes=3),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_is_the_plain_model(build) -> None:
    torch.manual_seed(0)
    plain, model = plain_and_fused(build().double().train())
    x = torch.randn(2, 3, SIZE, SIZE + 8, dtype=torch.float64)
    assert largest_difference(step(model, x), step(plain, x)) < EXACT
    assert list(model.state_dict()) == list(plain.state_dict())


def cumulative(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None


def untracked(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats = False
            m.running_mean = m.running_var = m.num_batches_tracked = None


def without_affine(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight = m.bias = None
            m.affine = False


def frozen_statistics(model: nn.Module) -> None:
    freeze_batch_norm(model, parameters=False)


def frozen_norms(model: nn.Module) -> None:
    freeze_batch_norm(model)


def frozen_backbone(model: Any) -> None:
    model.backbone.requires_grad_(False)


def frozen_filters(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.requires_grad_(False)


def half_of_the_branches_in_eval(model: Any) -> None:
    for branch in model.classifier[0].convs[:2]:
        branch[1].eval()


def single_values(model: Any) -> None:
    torch.manual_seed(1)
    model.classifier[0].convs[-1] = ASPPPooling(16, 8, "running").to(torch.float64)


def evaluation(model: nn.Module) -> None:
    model.eval()


def nothing(model: nn.Module) -> None:
    pass


SETTINGS = (
    nothing, cumulative, untracked, without_affine, frozen_statistics, frozen_norms,
    frozen_backbone, frozen_filters, half_of_the_branches_in_eval, single_values, evaluation,
)  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda f: f.__name__)
def test_settings_of_batch_norm(setting, backend) -> None:
    torch.manual_seed(0)
    plain, model = plain_and_fused(tiny().double().train())
    for m in (plain, model):
        setting(m)
    batch = 1 if setting is single_values else 2
    xs = torch.randn(2, batch, 3, SIZE, SIZE, dtype=torch.float64)
    with dlf.use_backend("auto" if backend == "cpu" else backend):
        for x in xs:
            for m in (plain, model):
                m.zero_grad()
            # The second step has other running statistics to start from.
            assert largest_difference(step(model, x), step(plain, x)) < EXACT


def test_rounding_is_that_of_the_plain_model() -> None:
    """At most twice the error of PyTorch's own path against float64, plus what forms that save
    multiplications may be off by."""
    torch.manual_seed(0)
    plain, model = plain_and_fused(tiny().train())
    x = torch.randn(2, 3, 65, 65)
    exact = step(copy.deepcopy(plain).double(), x.double())
    error = largest_difference(step(model, x), exact)
    assert error <= 2 * largest_difference(step(plain, x), exact) + SAVING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype) -> None:
    torch.manual_seed(0)
    plain, model = plain_and_fused(tiny().train())
    x = torch.randn(2, 3, SIZE, SIZE)
    exact = step(copy.deepcopy(plain).double(), x.double())

    def autocast_step(m: nn.Module) -> dict[str, Tensor]:
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            outputs = m(inputs)
        loss_of(outputs).backward()
        assert outputs["out"].dtype == dtype
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in m.parameters())
        assert inputs.grad is not None
        results = {f"output {k}": v.detach() for k, v in outputs.items()}
        results["grad x"] = inputs.grad
        results |= {f"grad {k}": p.grad for k, p in m.named_parameters() if p.grad is not None}
        results |= {f"buffer {k}": b.double() for k, b in m.named_buffers()}
        return results

    error = largest_difference(autocast_step(model), exact)
    assert error <= 2 * largest_difference(autocast_step(plain), exact) + torch.finfo(dtype).eps


def test_grad_scaler_steps() -> None:
    torch.manual_seed(0)
    model = tiny().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    before = model.backbone["conv1"].weight.detach().clone()
    with torch.autocast("cpu", torch.float16):
        y = model(torch.randn(2, 3, SIZE, SIZE))["out"]
    scaler.scale(y.float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0
    assert not torch.equal(before, model.backbone["conv1"].weight)


# Under which the plain modules keep two copies of every layer.
@pytest.mark.parametrize(("build", "bound"), [
    pytest.param(lambda: dlf.deeplabv3_resnet50(output_stride=16), 0.6, id="resnet50"),
    pytest.param(lambda: dlf.deeplabv3_resnet101(output_stride=16), 0.6, id="resnet101"),
    # Two kept maps of three instead of four in each block: nothing is computed twice at 3x3.
    pytest.param(lambda: dlf.deeplabv3_resnet18(output_stride=16), 0.75, id="resnet18"),
])  # fmt: skip
def test_saved_bytes(build, bound) -> None:
    def saved(model: nn.Module, x: Tensor) -> int:
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        sizes: dict[int, int] = {}
        kept: list[Tensor] = []

        def pack(t: Tensor) -> Tensor:
            kept.append(t)
            storage = t.untyped_storage()
            if storage._cdata not in weights:
                sizes[storage._cdata] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)["out"]
        assert y.shape == (16, 21, 513, 513)
        return sum(sizes.values())

    # Shapes only: nothing is computed.
    with FakeTensorMode():
        model, x = build().train(), torch.randn(16, 3, 513, 513)
    bytes_fused = saved(dlf.fuse(model), x)
    bytes_plain = saved(dlf.fuse(model, False), x)
    assert bytes_fused <= bound * bytes_plain


def test_frozen_parts_keep_nothing() -> None:
    model = tiny().train()
    model.backbone.requires_grad_(False)
    shapes = []

    def pack(t: Tensor) -> Tensor:
        shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(2, 3, 65, 65))
    # The backbone's maps are 33x33 behind the stem and 17x17 behind its pooling, as the heads' are.
    assert not [s for s in shapes if s[2:] == (33, 33)]
    heads = 1 + 1 + 3 + 1 + 1
    assert len([s for s in shapes if s[2:] == (17, 17)]) <= 4 * heads


@pytest.mark.parametrize("part", ["bn", "conv", "block", "relu", "pooling"])
def test_hooks_on_inner_modules_run(part) -> None:
    torch.manual_seed(0)
    plain, model = plain_and_fused(tiny().double().train())
    seen = []
    for m in (plain, model):
        block: Any = m.backbone["layer2"][1]
        modules = {
            "bn": block.bn1,
            "conv": block.conv2,
            "block": block,
            "relu": m.backbone["relu"],
            "pooling": m.classifier[0].convs[-1],  # type: ignore[index]
        }
        # A hook that changes the result must count too.
        modules[part].register_forward_hook(lambda *a: seen.append(1) or a[2] * 1.5)
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    difference = largest_difference(step(model, x), step(plain, x))
    assert len(seen) == 2
    assert difference < EXACT


def test_a_module_with_its_own_forward_runs_as_it_is() -> None:
    class Shifted(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    torch.manual_seed(0)
    built = tiny().double().train()
    built.backbone["layer1"][0].bn1 = Shifted(4).double()  # type: ignore[index]
    plain, model = plain_and_fused(built)
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    assert largest_difference(step(model, x), step(plain, x)) < EXACT


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant) -> None:
    torch.manual_seed(0)
    plain, model = plain_and_fused(tiny().double().train())
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return {"out": checkpoint(lambda t: self.inner(t)["out"], x, use_reentrant=reentrant)}

    found, expected = (step(Checkpointed(m), x) for m in (model, plain))
    assert largest_difference(found, expected) < EXACT


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_around_the_model(backend) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    plain, model = plain_and_fused(tiny().double().train())
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    compiled = torch.compile(model, backend=backend)
    found = {k.replace("_orig_mod.", ""): v for k, v in step(compiled, x).items()}
    assert largest_difference(found, step(plain, x)) < EXACT


def test_copies_and_pickles_train_alike() -> None:
    torch.manual_seed(0)
    _, model = plain_and_fused(tiny().double().train())
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = step(model, x)
    for other in others:
        assert other.fused
        assert largest_difference(step(other, x), expected) == 0.0


def test_one_value_a_channel_is_torchs_error() -> None:
    model = tiny().train()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(torch.randn(1, 3, SIZE, SIZE))


def test_switching_off_and_on() -> None:
    model = dlf.deeplabv3_resnet18(num_classes=3, fused=False)
    assert not model.fused
    assert dlf.fuse(model) is model
    assert model.fused
    with pytest.raises(TypeError, match="from_checkpoint"):
        dlf.fuse(nn.Conv2d(1, 1, 1))
    assert "fused" not in model.config[1]


class TestSegments:
    """Gradients of the smallest sequences by finite differences."""

    @pytest.mark.parametrize("backend", ["reference", "auto"])
    @pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
    @pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
    def test_gradcheck(self, backend, training, residual) -> None:
        torch.manual_seed(0)
        modules = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=2, dilation=2, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU6(),
            nn.Conv2d(4, 5, 1, bias=False),
            nn.BatchNorm2d(5, momentum=0.0),
            *([] if residual else [nn.Hardswish()]),
        )
        modules.double().train(training)
        modules[1].momentum = 0.0
        added = torch.randn(2, 5, 5, 4, dtype=torch.float64, requires_grad=True)
        x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)

        def call(x: Tensor, added: Tensor, *unused: Tensor) -> Tensor:
            if not residual:
                return fused.sequence([modules], x)
            return fused.sequence([modules], x, added, "relu")

        with dlf.use_backend(backend):
            assert torch.autograd.gradcheck(
                call, (x, added, *modules.parameters()), check_undefined_grad=False
            )

    def test_pooling(self) -> None:
        torch.manual_seed(0)
        modules = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        ).double()
        x = torch.randn(2, 3, 15, 12, dtype=torch.float64)
        results = []
        for function in (lambda t: fused.sequence([modules], t), copy.deepcopy(modules)):
            inputs = x.clone().requires_grad_()
            y = function(inputs)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            results.append((y, inputs.grad))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _parallel(rank: int, folder: str) -> None:
    """Half of a batch in each of two processes, batch norms frozen."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, x = torch.load(f"{folder}/start.pt", weights_only=False)
    parallel = nn.parallel.DistributedDataParallel(model)
    y = parallel(x[2 * rank : 2 * rank + 2])["out"]
    # DDP averages over the processes.
    (2 * (y * torch.linspace(-1, 1, y[0].numel()).view_as(y[0])).sum()).backward()
    if rank == 0:
        torch.save({k: p.grad for k, p in model.named_parameters()}, f"{folder}/end.pt")
    dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    model, _ = plain_and_fused(tiny().double())
    model.aux_classifier = None
    freeze_batch_norm(dlf.fuse(model).train(), parameters=False)
    x = torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64)
    torch.save((model, x), tmp_path / "start.pt")
    mp.spawn(_parallel, (str(tmp_path),), nprocs=2)
    grads = torch.load(tmp_path / "end.pt")
    dlf.fuse(model, False)
    y = model(x)["out"]
    (y * torch.linspace(-1, 1, y[0].numel()).view_as(y[0])).sum().backward()
    expected = {f"grad {k}": p.grad for k, p in model.named_parameters()}
    found = {f"grad {k}": g for k, g in grads.items()}
    assert largest_difference(found, expected) < EXACT


def _joint_batch(rank: int, folder: str) -> None:
    """Half of a batch in each of two processes, batch norms synchronised."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, x = torch.load(f"{folder}/start.pt", weights_only=False)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Parts of unlike size: 3 images and 1.
    part = x[:3] if rank == 0 else x[3:]
    y = model(part)["out"]
    (y * torch.linspace(-1, 1, y[0].numel()).view_as(y[0])).sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    # What DistributedDataParallel does; it refuses SyncBatchNorm on a CPU.
    for grad in grads.values():
        dist.all_reduce(grad)
    if rank == 0:
        torch.save((grads, dict(model.named_buffers())), f"{folder}/end.pt")
    dist.destroy_process_group()


def test_synchronised_batch_norm_is_that_of_the_joint_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = plain_and_fused(tiny().double())
    dlf.fuse(model).train()
    x = torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64)
    torch.save((model, x), tmp_path / "start.pt")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(_joint_batch, (str(tmp_path),), nprocs=2)
    grads, buffers = torch.load(tmp_path / "end.pt")
    dlf.fuse(model, False)
    y = model(x)["out"]
    (y * torch.linspace(-1, 1, y[0].numel()).view_as(y[0])).sum().backward()
    expected = {f"grad {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    expected |= {f"buffer {k}": b for k, b in model.named_buffers()}
    found = {f"grad {k}": g for k, g in grads.items()}
    found |= {f"buffer {k}": b for k, b in buffers.items()}
    assert largest_difference(found, expected) < EXACT


def test_fifty_steps_stay_within_the_noise_of_fp32(shared_data: Path) -> None:
    """Losses on crops of photos; the noise is that of PyTorch with another number of threads and in
    another layout."""
    from deeplab_fast.data.images import read_image
    from deeplab_fast.testing import threads

    folder = shared_data / "camvid"
    photos = sorted((folder / "train").glob("*.webp"))[:4]
    if not photos:
        pytest.skip(f"no photos in {folder}")
    pixels = torch.stack([torch.from_numpy(read_image(p)[:64, :64].copy()) for p in photos])
    x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    target = pixels.long().sum(3) * 3 // 766

    def losses(
        plain: bool, count: int, layout: torch.memory_format = torch.channels_last
    ) -> Tensor:
        torch.manual_seed(0)
        # Without dropout: PyTorch draws a mask in the order of memory, which the layouts differ in.
        model = plain_and_fused(tiny().train())[not plain]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        values = []
        with threads(count):
            for _ in range(50):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x.contiguous(memory_format=layout))["out"], target)
                loss.backward()
                optimizer.step()
                values.append(loss.detach())
        return torch.stack(values)

    expected, found = losses(True, 2), losses(False, 2)
    assert expected[-1] < 0.7 * expected[0]
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=0)
    # How fast noise grows is a matter of luck: the largest of each curve are compared, times 4.
    noise = torch.stack([losses(True, 1), losses(True, 2, torch.contiguous_format)]) - expected
    assert (found - expected).abs().max() <= 4 * noise.abs().max()
