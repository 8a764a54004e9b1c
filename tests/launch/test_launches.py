"""Every Triton kernel is launched by every launcher, for what the launchers tell apart.

Dtypes, modes and layouts for compute capability 9.0, at shapes of the models; one call of each
kernel for the other capabilities. Modes are combined at one size, layouts are taken one by one.
fp16 and TF32, whose code differs from that of bf16 and fp32 in types alone, take fewer modes and
layouts, and the first and the last size of a family. Each call is made twice, the second time among
other neighbours. `bench.launch_stub` says what a launch passes through here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.launch_stub import GPUS, pretend
from deeplab_fast import backends, get_model, kernels, ops
from deeplab_fast.dispatch.declare import find, gpu_ops, steps
from deeplab_fast.dispatch.examples import Size
from deeplab_fast.dispatch.limits import allow_tf32
from deeplab_fast.testing import tf32
from deeplab_fast.tuning import api, configurations, tune, workloads

pytestmark = pytest.mark.launch

OPS = torch.ops.deeplab_fast
LABELS = (torch.uint8, torch.int32, torch.int64)


def channels_last(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """A map whose memory nobody touches before it is written."""
    return torch.zeros(n, h, w, c, dtype=dtype).permute(0, 3, 1, 2)


def layouts(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """One map in the layouts that launchers tell apart."""
    found = {
        "channels_last": channels_last(n, c, h, w, dtype),
        "nchw": torch.zeros(n, c, h, w, dtype=dtype),
        # Neighbouring channels, pixels further apart than that: a branch in the ASPP's buffer.
        "slice of channels": channels_last(n, 2 * c, h, w, dtype)[:, c:],
        "rows apart": channels_last(n, c, h, 2 * w, dtype)[..., :w],
        "every other channel": channels_last(n, 2 * c, h, w, dtype)[:, ::2],
        "4 bytes off": _off(n, c, h, w, dtype),
    }
    few = ("channels_last", "nchw", "4 bytes off")
    return {name: found[name] for name in few} if is_like_another(dtype) else found


def _off(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """A map that does not start at a multiple of 16 bytes."""
    elements = 4 // dtype.itemsize
    flat = torch.zeros(n * h * w * c + elements, dtype=dtype)[elements:]
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def is_like_another(dtype: torch.dtype) -> bool:
    return dtype == torch.float16 or (dtype == torch.float32 and allow_tf32())


def sizes(table: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Any, bool]]:
    """(name, size, whether it is the one for all modes and layouts) of the sizes for a dtype."""
    names = list(table)
    if is_like_another(dtype):
        names = [names[0], names[-1]]
    for name in names:
        yield name, table[name], name == names[0]


# Upsampling: N, C, h, w, H, W, align_corners. In each table the first size is that for all modes,
# the last one has numbers that nothing divides.
UPSAMPLED = {
    "os8-513": (2, 21, 65, 65, 513, 513, False),
    "os8-520-align-corners": (1, 21, 65, 65, 520, 520, True),
    "os16-512-150-classes": (1, 150, 32, 32, 512, 512, False),
    "cityscapes": (1, 19, 128, 256, 1024, 2048, False),
    "down": (1, 21, 129, 100, 65, 33, False),
    "300-classes-odd": (1, 300, 17, 19, 129, 150, False),
}


def label_maps(n: int, h: int, w: int) -> Iterator[tuple[torch.dtype, tuple[str, Tensor]]]:
    """Labels of every dtype in the layouts that specialise a kernel."""
    for dtype in LABELS:
        yield dtype, ("dense", torch.zeros(n, h, w, dtype=dtype))
        yield dtype, ("cropped", torch.zeros(n, h, w + 7, dtype=dtype)[..., :w])
        yield dtype, ("transposed", torch.zeros(n, w, h, dtype=dtype).transpose(1, 2))


class Call(NamedTuple):
    """A call that launches kernels, by what is special about it."""

    name: str
    run: Callable[[], Any]


def upsample_calls(dtype: torch.dtype) -> Iterator[Call]:
    """All modes and layouts at one size, then the plain call at every size."""
    for size, (n, c, h, w, *out, corners), first in sizes(UPSAMPLED, dtype):
        totals = layouts(n, c, *out, torch.float32)
        for (layout, x), prob in product(layouts(n, c, h, w, dtype).items(), (False, True)):
            if prob and not first:
                continue
            yield Call(
                f"argmax {size} {layout} prob={prob}",
                partial(ops.upsample_argmax, x, out, align_corners=corners, return_prob=prob),
            )
        x = channels_last(n, c, h, w, dtype)
        for labels, (layout, target) in label_maps(n, *out):
            if first or (labels, layout) == (torch.int64, "dense"):
                yield Call(
                    f"confusion {size} {labels} {layout}",
                    partial(ops.upsample_confusion, x, target, align_corners=corners),
                )
        for (layout, total), flip in product(totals.items(), (False, True)):
            if layout == "nchw" or (first and not flip):
                yield Call(
                    f"softmax_add {size} {layout} flip={flip}",
                    partial(ops.upsample_softmax_add, total, x, flip=flip, align_corners=corners),
                )


def loss_calls(dtype: torch.dtype) -> Iterator[Call]:
    """The loss: all its modes at one size, then one mode at all sizes and layouts."""
    for size, (n, c, h, w, *out, corners), first in sizes(UPSAMPLED, dtype):
        x = channels_last(n, c, h, w, dtype)
        for labels, (kind, target) in label_maps(n, *out):
            whole = labels == torch.int64
            if first and kind == "dense" and (whole or not is_like_another(dtype)):
                yield from loss_modes(x, target, corners)
            if whole and (first or kind == "dense"):
                yield training_call(f"{size} channels_last {kind}", x, target, corners)
        if first:
            for layout, x in layouts(n, c, h, w, dtype).items():
                if layout != "channels_last":
                    target = torch.zeros(n, *out, dtype=torch.int64)
                    yield training_call(f"{size} {layout} dense", x, target, corners)


def loss_modes(x: Tensor, target: Tensor, align_corners: bool) -> Iterator[Call]:
    """What takes a loss, or its gradient, of these labels; everything for those of 64 bits."""
    whole = target.dtype == torch.int64
    weights = (None, torch.ones(x.shape[1])) if whole else (None,)
    for weight, smoothing in product(weights, (0.0, 0.1)):
        name = f"{target.dtype} weighted={weight is not None} smoothing={smoothing}"
        args = (x, target, weight, 255, smoothing)
        for reduction in ("mean", "sum"):
            options = (*args, reduction, align_corners)
            one = torch.ones(())
            yield Call(f"loss {reduction} {name}", partial(OPS.upsample_cross_entropy, *options))
            yield Call(
                f"loss with gradient {reduction} {name}",
                partial(OPS.upsample_cross_entropy_with_grad, *options),
            )
            yield Call(
                f"gradient {reduction} {name}",
                partial(OPS.upsample_cross_entropy_backward, one, *options),
            )
        if not whole:
            continue
        options = (*args, "none", align_corners)
        yield Call(f"loss map {name}", partial(OPS.upsample_cross_entropy, *options))
        # The gradient of a weighted sum, and of a sum.
        for kind, grad in (("dense", torch.ones(target.shape)), ("expanded", torch.ones(()))):
            if kind == "dense" or (weight is None and not smoothing):
                yield Call(
                    f"gradient of the loss map, {kind}, {name}",
                    partial(OPS.upsample_cross_entropy_backward, grad.expand(target.shape),
                            *options),
                )  # fmt: skip


def training_call(name: str, logits: Tensor, target: Tensor, align_corners: bool) -> Call:
    leaf = logits.detach().requires_grad_()

    def run() -> None:
        ops.upsample_cross_entropy(leaf, target, align_corners=align_corners).backward()

    return Call(f"training {name}", run)


# Batch norm: maps of ResNet-50 and MobileNetV3 at 513x513, and channels that no vector divides.
NORMED = {
    "r50-layer4": (2, 2048, 33, 33),
    "stem": (2, 64, 257, 257),
    "mbv3-16": (2, 16, 257, 257),
    "pooled": (4, 256, 1, 1),
    "odd": (2, 21, 33, 33),
}


def norm_calls(dtype: torch.dtype) -> Iterator[Call]:
    """All modes and layouts at one size, then the modes of ResNet at every size."""
    acts = ("relu", "relu6", "hardswish", None)
    for size, shape, first in sizes(NORMED, dtype):
        for layout, x in layouts(*shape, dtype).items():
            whole = first and layout == "channels_last"
            if not first and layout != "channels_last":
                continue
            name = f"{size} {layout}"
            vectors = [torch.ones(shape[1]) for _ in range(4)]
            yield Call(f"batch_stats {name}", partial(ops.batch_stats, x))
            kept, batches = torch.ones(2, shape[1]), torch.tensor(3)
            for momentum, tracked in ((0.1, batches), (None, batches), (0.1, None)):
                if whole or (momentum and tracked is not None):
                    yield Call(
                        f"batch_stats {name} momentum={momentum} tracked={tracked is not None}",
                        partial(OPS.batch_stats, x, 1e-5, kept[0], kept[1], tracked, momentum),
                    )
            all_acts = whole and not is_like_another(dtype)
            for act, other in product(acts if all_acts else ("relu",), (None, x)):
                if act == "hardswish" and other is not None:
                    continue
                mode = f"{name} act={act} other={other is not None}"
                yield Call(
                    f"bn_act {mode}", partial(ops.bn_act, x, *vectors, residual=other, act=act)
                )
                yield Call(
                    f"bn_act_reduce {mode}",
                    partial(ops.bn_act_reduce, x, x, *vectors, out=other, act=act),
                )
                for means, to_residual in product(((), vectors[:2]), (False, True)):
                    usual = means and to_residual == (other is not None)
                    if not (usual or (whole and (means or act == "relu"))):
                        continue
                    yield Call(
                        f"bn_act_backward {mode} means={bool(means)} to_residual={to_residual}",
                        partial(ops.bn_act_backward, x, x, *vectors, *means, out=other, act=act,
                                to_residual=to_residual),
                    )  # fmt: skip


# 1x1 convolutions: input, filters, stride.
POINTWISE = {
    "r50-layer4": ((2, 512, 65, 65), 2048, 1),
    "r50-layer2-down": ((2, 256, 129, 129), 512, 2),
    "mbv3-head": ((2, 960, 33, 33), 256, 1),
    "few-filters": ((2, 64, 65, 65), 21, 1),
    "odd-channels": ((2, 21, 33, 33), 30, 1),
}


def pointwise_calls(dtype: torch.dtype) -> Iterator[Call]:
    """All layouts of x and of the residual at one size, then both modes at every size."""
    for size, ((n, c, h, w), k, stride), first in sizes(POINTWISE, dtype):
        weight, vector = torch.zeros(k, c, 1, 1, dtype=dtype), torch.ones(k)
        xs = layouts(n, c, h, w, dtype)
        residuals = layouts(n, k, -(-h // stride), -(-w // stride), dtype)
        modes = [("channels_last", None, "relu"), ("channels_last", "channels_last", "relu")]
        if first:
            modes += [(layout, None, "relu") for layout in xs if layout != "channels_last"]
            modes += [("channels_last", layout, None) for layout in residuals]
            modes.append(("channels_last", None, None))
        for layout, residual, act in modes:
            yield Call(
                f"conv_bn_act {size} {layout} residual={residual} act={act}",
                partial(ops.conv_bn_act, xs[layout], weight, vector, vector, stride=stride,
                        residual=residual and residuals[residual], act=act),
            )  # fmt: skip


# The ASPP: N, C, h, w, rates, filters of a branch.
ASPP = {
    "os8-b1": (1, 2048, 65, 65, (12, 24, 36), 256),
    "os16-b16": (16, 2048, 33, 33, (6, 12, 18), 256),
    "os8-b8": (8, 2048, 65, 65, (12, 24, 36), 256),
    "mbv3": (1, 960, 33, 33, (12, 24, 36), 256),
    "embedded": (1, 320, 23, 30, (6, 12, 18), 128),
    "odd": (1, 327, 33, 33, (6, 12, 18), 21),
}


def aspp_filters(size: str, dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
    _, c, _, _, rates, k = ASPP[size]
    return [torch.zeros(k, c, s, s, dtype=dtype) for s in (1, *[3] * len(rates))], [1, *rates]


def aspp_calls(dtype: torch.dtype) -> Iterator[Call]:
    for size, (n, c, h, w, _, k), first in sizes(ASPP, dtype):
        filters, dilations = aspp_filters(size, dtype)
        vectors = [torch.ones(k) for _ in filters]
        for layout, x in layouts(n, c, h, w, dtype).items():
            if not first and layout != "channels_last":
                continue
            yield Call(
                f"branches {size} {layout}",
                partial(ops.aspp_branches, x, filters, vectors, vectors, dilations),
            )
        channels = k * len(filters)
        weight = torch.zeros(k, channels + k, 1, 1, dtype=dtype)
        pooled, vector = torch.zeros(n, k, dtype=dtype), torch.ones(k)
        for classes in (None, 21, 150):
            classifier = None
            if classes is not None:
                classifier = torch.zeros(classes, k, dtype=dtype), torch.ones(classes)
            yield Call(
                f"project {size} classes={classes}",
                partial(ops.aspp_project, channels_last(n, channels, h, w, dtype), pooled, weight,
                        vector, vector, classifier=classifier),
            )  # fmt: skip


def aspp_training_calls(dtype: torch.dtype) -> Iterator[Call]:
    for size, (n, c, h, w, _, k), first in sizes(ASPP, dtype):
        filters, dilations = aspp_filters(size, dtype)
        grad = channels_last(n, k * len(filters), h, w, dtype)
        for layout, x in layouts(n, c, h, w, dtype).items():
            if not first and layout != "channels_last":
                continue
            for stats in (True, False)[: 1 + (first and layout == "channels_last")]:
                yield Call(
                    f"convs {size} {layout} stats={stats}",
                    partial(ops.aspp_convs, x, filters, dilations, stats=stats),
                )
            backward = partial(OPS.aspp_convs_backward, grad, x, filters, dilations)
            yield Call(f"dgrad {size} {layout}", partial(backward, True, False))
            yield Call(f"wgrad {size} {layout}", partial(backward, False, True))


@cache
def filters_of(model: str) -> tuple[tuple[int, int, int, int], ...]:
    """Shapes of all filters of a model with a batch norm behind them."""
    with torch.device("meta"):
        made = get_model(model)
    works = workloads.of_model(made, (129, 129), (1,))
    return next(work.size.layers for work in works if work.op == "fold_filters")


def fold_calls(dtype: torch.dtype) -> Iterator[Call]:
    """All filters of models, into every dtype."""
    for model in ("deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large"):
        shapes = filters_of(model)
        scale = torch.ones(sum(shape[0] for shape in shapes))
        given = {
            "contiguous": [torch.zeros(shape, dtype=dtype) for shape in shapes],
            "channels_last": [channels_last(*shape, dtype) for shape in shapes],
            "4 bytes off": [_off(*shape, dtype) for shape in shapes],
        }
        for (layout, weights), to in product(given.items(), DTYPES):
            fold = partial(ops.fold_filters, weights, scale, DTYPES[to])
            yield Call(f"fold {model} {layout} to {to}", fold)


# For each family its calls and the kernels that they launch.
FAMILIES: dict[str, tuple[Callable[[torch.dtype], Iterator[Call]], set[str]]] = {
    "upsampling": (
        upsample_calls,
        {"upsample_argmax_kernel", "upsample_confusion_kernel", "upsample_softmax_add_kernel"},
    ),
    "loss": (
        loss_calls,
        {"upsample_cross_entropy_kernel", "cross_entropy_finish_kernel", "gradient_gather_kernel"},
    ),
    "batch norm": (
        norm_calls,
        {
            "batch_stats_kernel", "stats_combine_kernel", "bn_act_kernel", "bn_act_reduce_kernel",
            "sums_combine_kernel", "bn_act_backward_kernel",
        },
    ),
    "1x1": (pointwise_calls, {"pointwise_kernel"}),
    "fold": (fold_calls, {"fold_filters_kernel"}),
    "aspp": (
        aspp_calls,
        {"aspp_branches_kernel", "aspp_sum_kernel", "image_shift_kernel", "pointwise_kernel"},
    ),
    "aspp in training": (
        aspp_training_calls,
        {
            "aspp_convs_kernel", "aspp_convs_sum_kernel", "aspp_stats_kernel", "aspp_dgrad_kernel",
            "aspp_dgrad_sum_kernel", "aspp_wgrad_kernel", "aspp_wgrad_sum_kernel",
        },
    ),
}  # fmt: skip
# Whose products of fp32 PyTorch may round to TF32.
PRODUCTS = ("1x1", "aspp", "aspp in training")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = [
    pytest.param(family, dtype, id=f"{family}-{dtype}")
    for family, dtype in product(FAMILIES, (*DTYPES, "tf32"))
    if dtype != "tf32" or family in PRODUCTS
]
OTHER_GPUS = ("A100", "RTX 3090", "RTX 4090", "B200", "RTX 5090")
# Calls that together with the ops' examples launch every kernel, whatever the GPU: which tiles are
# cut depends on the number of multiprocessors.
CUT = {
    "aspp": (
        "branches os8-b1 channels_last",
        "branches mbv3 channels_last",
        "project os8-b1 classes=21",
    ),
    "aspp in training": (
        "convs mbv3 channels_last stats=True",
        "dgrad mbv3 channels_last",
        "dgrad os16-b16 channels_last",
        "wgrad os8-b8 channels_last",
        "wgrad odd channels_last",
    ),
}


def examples(dtype: torch.dtype) -> list[Call]:
    """The first example of each op, and calls whose tiles are cut."""
    found = []
    for op in gpu_ops():
        step = steps(op.name, op.examples.forms[0], op.examples.sizes[0], dtype, "meta")[0]
        run = backends.implementations(op.name)["triton"].run
        found.append(Call(f"{op.name} {step.size}", partial(step.launch, run)))
    for family, names in CUT.items():
        found += [call for call in FAMILIES[family][0](dtype) if call.name in names]
    assert len(found) == len(gpu_ops()) + sum(map(len, CUT.values()))
    return found


@pytest.mark.parametrize(("family", "dtype"), MODES)
def test_every_mode_twice(family: str, dtype: str, launches) -> None:
    """Every call, then every call again among other neighbours, which compiles nothing new."""
    make, names = FAMILIES[family]
    with tf32(dtype == "tf32"):
        calls = list(make(DTYPES.get(dtype, torch.float32)))
        first = {call.name: launches.of(*call) for call in calls}
        assert len(first) == len(calls), "two calls have one name"
        assert all(first.values()), "a call launches nothing"
        assert {kernel for made in first.values() for kernel, _ in made} == names
        for call in [*calls[1::2][::-1], *calls[::2]]:
            assert launches.of(*call) == first[call.name], call.name


@pytest.mark.parametrize("gpu", OTHER_GPUS, indirect=True)
def test_every_kernel_on_another_gpu(launches) -> None:
    made = [launch for call in examples(torch.bfloat16) for launch in launches.of(*call)]
    assert {kernel for kernel, _ in made} == every_kernel()


def test_one_after_any_other(launches) -> None:
    """Kernels share globals, caches and tables: none must change what another finds."""
    calls = examples(torch.bfloat16)
    first = {call.name: launches.of(*call) for call in calls}
    assert {kernel for made in first.values() for kernel, _ in made} == every_kernel()
    for one, other in permutations(calls, 2):
        for call in (one, other):
            assert launches.of(*call) == first[call.name], f"{other.name} after {one.name}"


def every_kernel() -> set[str]:
    """Names of the package's kernels, from the modules that define them."""
    folder = Path(kernels.__file__).parent
    modules = (import_module(f"{kernels.__name__}.{p.stem}") for p in folder.glob("*_kernels.py"))
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("loss", "training os8-513 channels_last dense"),
        ("upsampling", "argmax os8-513 channels_last prob=True"),
    ],
)
def test_second_launch_finds_the_globals_of_the_first(family: str, name: str, launches) -> None:
    """A launch compares a kernel's globals with those it was compiled with, and NaN is not NaN.

    With a global NaN each call but the first of a program raised (Triton 3.6 and 3.7).
    """
    (call,) = (call for call in FAMILIES[family][0](torch.float32) if call.name == name)
    assert launches.of(*call) == launches.of(*call)


def test_pretending_ends_with_the_block() -> None:
    def patched() -> list[Any]:
        from deeplab_fast.kernels import launch
        from triton.runtime import driver

        return [vars(backends.OpDesc)["on"], launch.device_of, driver._active]

    before = patched()
    with pretend(GPUS["H100"]) as launches:
        launches.of("argmax", partial(ops.upsample_argmax, torch.zeros(1, 21, 9, 9), (65, 65)))
        assert all(now is not then for now, then in zip(patched(), before, strict=True))
    assert all(now is then for now, then in zip(patched(), before, strict=True))
    assert [kernel for kernel, _ in launches.made] == ["upsample_argmax_kernel"]


def test_what_tune_runs_is_launched(launches) -> None:
    """Calls of its checks and times, of which no GPU has seen one."""
    plan = api.make_plan(
        "fregu856_resnet18", (129, 193), batches=(2,), dtypes=("bfloat16",), ops=None,
        backends=("triton",), quick=True, budget=None, configurations=False,
    )  # fmt: skip
    names = []
    for name, run in tune.launches(plan):
        assert launches.of(name, run), name
        names.append(name.split()[0])
    assert set(names) == set(workloads.OPS)


@pytest.mark.parametrize(
    "tuned", configurations.TUNED, ids=lambda tuned: f"{tuned.op} {tuned.method}"
)
def test_configurations_are_launched(tuned, launches, monkeypatch) -> None:
    """One is asked for, each that is measured is launched, and there are no more than is said."""
    size = Size(1, 64, 33, 33, 65, 65, filters=64, pooled=64, classes=21)
    if tuned.op == "aspp_branches":
        size = replace(size, rates=(6, 12, 18))
    work = workloads.Work(tuned.op, find(tuned.op).examples.forms[0], size)
    run = backends.implementations(tuned.op)["triton"].run
    given = (tuned, work, "bfloat16", "cpu", run)
    _, _, found = configurations.candidates(*given)
    assert 1 <= len(found) <= tuned.most
    assert not configurations.compiled(*given, range(2))
    monkeypatch.setattr(configurations, "_check_near", lambda *results: None)
    monkeypatch.setattr(configurations, "_ROUNDS", (1, 1))
    if len(found) <= 2:
        _, ms = configurations.fastest(*given, seconds=0.0)
        assert list(ms) == [configurations.RULE, *map(str, found)]


def test_where_the_first_filters_lie_compiles_nothing_new(launches) -> None:
    """The kernel takes their type from them, and their address from its table."""
    scale = torch.ones(8)
    made = [
        launches.of(name, partial(ops.fold_filters, [weight], scale, torch.float32))
        for name, weight in layouts(8, 4, 3, 3, torch.float32).items()
    ]
    assert len(made) > 2 and all(launch == made[0] for launch in made)
