"""What PyTorch alone reaches on a GPU: units of `bench.gpu` that every kernel of ours must beat.

Times are medians in milliseconds on random data; convolutions are cuDNN's, whose algorithms are
searched for. On a CPU sizes are tiny, so that the code is tried where there is no GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast.dispatch.errors import one_line
from deeplab_fast.tuning.machine import Machine

from .everything import registry
from .gpu_cases import GpuCase
from .gpu_measure import (
    Row,
    graphed,
    kernels,
    peak_mb,
    rows_of,
    synchronize,
    times,
    tiny,
    wall_ms,
)
from .model_cases import ModelLabels, ModelTrain
from .op_cases import OS8_RATES, OS16_RATES, AsppHead
from .providers import NHWC, Context, Step, runnable
from .registry import FORWARD, STEP, Arguments, Case

DTYPE = torch.bfloat16
Result = dict[str, Any]
# Of models in a rehearsal.
_TINY_MODEL = GpuCase("mbv3", 16, 2, 17, 17)
_IGNORED = 255


def rates_of(output_stride: int) -> tuple[int, ...]:
    """Dilations of the head at an output stride."""
    return OS8_RATES if output_stride == 8 else OS16_RATES


def prepared(machine: Machine) -> None:
    """Set PyTorch as all units measure: searched algorithms, TF32 for fp32."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    if tiny(machine):
        torch.set_num_threads(1)


def _map(machine: Machine, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=machine.device, dtype=dtype).contiguous(memory_format=NHWC)


def ceilings(machine: Machine) -> Result:
    """A matrix product and a copy: the rates that the machine itself reaches."""
    prepared(machine)
    n, size = (64, 2**16) if tiny(machine) else (8192, 2**31)
    a, b = (torch.randn(n, n, device=machine.device, dtype=DTYPE) for _ in range(2))
    x, y = (torch.zeros(size, device=machine.device, dtype=torch.uint8) for _ in range(2))
    found = times({"matmul bf16": lambda: a @ b, "copy": lambda: y.copy_(x)}, machine.device)
    found["matmul bf16"]["tflops"] = 2 * n**3 / found["matmul bf16"]["ms"] / 1e9
    found["copy"]["gb_per_s"] = 2 * size / found["copy"]["ms"] / 1e6
    return {"rows": rows_of("ceiling", found)}


def convolutions(machine: Machine, batch: int, side: int, rates: tuple[int, ...]) -> Result:
    """cuDNN's convolutions of the ASPP: forward and both gradients, at each rate and 1x1."""
    prepared(machine)
    channels, filters = (16, 8) if tiny(machine) else (2048, 256)
    group = f"convolution b{batch} {side}x{side}"
    if tiny(machine):
        batch, side = 1, 9
    found: list[Row] = []
    x, grad = _map(machine, batch, channels, side, side), _map(machine, batch, filters, side, side)
    bias = torch.zeros(filters, device=machine.device, dtype=DTYPE)
    for rate in (0, *rates):
        size, d = (3, rate) if rate else (1, 1)
        weight = _map(machine, filters, channels, size, size) * 0.02
        flops = 2 * batch * side * side * channels * filters * size**2
        geometry = ([1, 1], [rate, rate], [d, d])

        def backward(
            which: int,
            weight: Tensor = weight,
            geometry: tuple[list[int], list[int], list[int]] = geometry,
        ) -> Callable[[], object]:
            mask = [which == 0, which == 1, False]
            return lambda: torch.ops.aten.convolution_backward(
                grad, x, weight, None, *geometry, False, [0, 0], 1, mask
            )

        calls: dict[str, Callable[[], object]] = {
            "forward": lambda w=weight, r=rate, d=d: F.conv2d(x, w, None, 1, r, d),
            "dgrad": backward(0),
            "wgrad": backward(1),
            "forward + bias + relu, fused": lambda w=weight, g=geometry: (
                torch.ops.aten.cudnn_convolution_relu(x, w, bias, *g, 1)
            ),
        }
        timed = times(calls, machine.device)
        # As a user has it who does not ask for the search.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
            timed |= times({"forward, not searched": calls["forward"]}, machine.device, seconds=0.1)
        for row in timed.values():
            if "ms" in row:
                row["tflops"] = flops / row["ms"] / 1e9
        found += rows_of(f"{group} {f'rate {rate}' if rate else '1x1'}", timed, rate=rate)
    return {"rows": found}


def head(machine: Machine, batch: int, side: int, output_stride: int) -> Result:
    """torchvision's head."""
    prepared(machine)
    found = _inference(machine, _head(machine, batch, side, output_stride))
    return {"rows": rows_of(f"head b{batch} {side}x{side}", found)}


def _head(machine: Machine, batch: int, side: int, output_stride: int) -> AsppHead:
    rates, channels = rates_of(output_stride), 2048
    if tiny(machine):
        batch, channels, side = 1, 32, 5
    return AsppHead(
        op="aspp_head", shape="", suites=(), n=batch, h=side, w=side, rates=rates, channels=channels
    )


def model_sizes(machine: Machine, case: GpuCase) -> dict[str, Any]:
    """What a case of a model is made of, small in a rehearsal."""
    if tiny(machine):
        case = _TINY_MODEL
    return {
        "shape": f"{case.backbone}-os{case.output_stride}-{case.image}-b{case.batch}",
        "backbone": case.backbone,
        "output_stride": case.output_stride,
        "n": case.batch,
        "height": case.height,
        "width": case.width,
    }


def _inference(machine: Machine, case: Case) -> dict[str, Row]:
    """PyTorch's ways to run a case: as it is shipped, and what those do who want speed."""
    device = machine.device
    args = case.setup(device, DTYPE)

    def built(name: str) -> Callable[[], object]:
        run = registry.provider(name).build(case, FORWARD, device, DTYPE, args)
        return partial(run, 0)

    shipped, last = built("eager"), built("channels_last")

    def plain() -> None:
        # Nobody is told to search.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
            shipped()

    calls: dict[str, Callable[[], object]] = {
        "channels_last bf16": last,
        "autocast bf16 channels_last": built("autocast"),
        "eager NCHW fp32 (tf32)": plain,
    }
    last()
    synchronize(device)
    graph, problems = "channels_last bf16, CUDA graph", {}
    try:
        calls[graph] = graphed(last, device)
    except RuntimeError as error:
        problems[graph] = {"problem": one_line(error)}
    return times(calls, device) | problems


def step_case(machine: Machine, given: GpuCase) -> ModelTrain:
    """A training step, small in a rehearsal."""
    sizes = model_sizes(machine, given)
    return ModelTrain(op="model_train", suites=(), modes=(STEP,), **sizes)


def step(case: ModelTrain, machine: Machine, args: Arguments, module: nn.Module) -> Step:
    """A step of a module: fp32 weights in channels_last, autocast, SGD."""

    context: Context = nullcontext
    if not tiny(machine):
        context = partial(torch.autocast, machine.device, DTYPE)
    found = runnable(case, STEP, args, module, torch.float32, NHWC, context)
    assert isinstance(found, Step)
    return found


def step_row(run: Callable[[int], object], machine: Machine) -> Row:
    """Time of a step by the host's clock and of its kernels, and its memory."""
    once = partial(run, 0)
    row: Row = {}
    for _ in range(1 if tiny(machine) else 3):
        once()
    if machine.device == "cuda":
        row["peak_mb"] = peak_mb(once)
    row["ms"] = wall_ms(once, machine.device, 1 if tiny(machine) else 8)
    return row | kernels(once, machine.device)


def training(machine: Machine, given: GpuCase) -> Result:
    """torchvision's model in a training step: eager, channels_last, autocast."""
    prepared(machine)
    case = step_case(machine, given)
    args = case.setup(machine.device, torch.float32)
    row = step_row(step(case, machine, args, args.module), machine)
    return {"rows": rows_of(f"training step {given}", {"eager channels_last autocast": row})}


def upsampling(machine: Machine, batch: int, classes: int, small: int, large: int) -> Result:
    """Compositions of interpolation with argmax and with the loss, forward and backward."""
    prepared(machine)
    group = f"upsampling b{batch} {classes} classes {small} to {large}"
    if tiny(machine):
        batch, classes, small, large = 1, 5, 5, 33
    size = (large, large)
    logits = _map(machine, batch, classes, small, small)
    target = torch.randint(0, classes, (batch, *size), device=machine.device)
    leaf = logits.float().requires_grad_()

    def labels() -> Tensor:
        return F.interpolate(logits, size, mode="bilinear").argmax(1)

    def loss() -> None:
        leaf.grad = None
        full = F.interpolate(leaf, size, mode="bilinear")
        F.cross_entropy(full, target, ignore_index=_IGNORED).backward()

    calls = {"interpolate, argmax": labels, "interpolate, cross_entropy, backward": loss}
    return {"rows": rows_of(group, times(calls, machine.device))}


def batch_norm(machine: Machine, n: int, c: int, h: int, w: int) -> Result:
    """Batch norm in training, addition and ReLU: forward, and forward with backward."""
    prepared(machine)
    group = f"batch norm {n}x{c}x{h}x{w}"
    if tiny(machine):
        n, c, h, w = 1, 8, 9, 9
    x, residual, grad = (_map(machine, n, c, h, w) for _ in range(3))
    x.requires_grad_()
    norm = nn.BatchNorm2d(c).to(machine.device)

    def forward() -> Tensor:
        return F.relu(norm(x).add_(residual), inplace=True)

    def both() -> None:
        x.grad = None
        forward().backward(grad)

    found = times({"forward": forward, "forward, backward": both}, machine.device)
    for row in found.values():
        row["map_mb"] = x.numel() * x.element_size() / 2**20
    return {"rows": rows_of(group, found)}


def autotuned_head(
    machine: Machine, batch: int, side: int, output_stride: int, warm: bool
) -> Result:
    """The head by torch.compile with max-autotune and frozen weights.

    Args:
        machine, batch, side, output_stride: which.
        warm: only make what it compiles, and keep nothing that it measures meanwhile: other units
            run beside it.
    """
    prepared(machine)
    args = _head(machine, batch, side, output_stride).setup(machine.device, DTYPE)
    return _autotuned(machine, f"head b{batch} {side}x{side}", args, warm)


def autotuned_model(machine: Machine, given: GpuCase) -> Result:
    """Labels of a model by torch.compile with max-autotune and frozen weights."""
    prepared(machine)
    case = ModelLabels(op="model_labels", suites=(), **model_sizes(machine, given))
    return _autotuned(machine, f"labels {given}", case.setup(machine.device, DTYPE), warm=False)


def _autotuned(machine: Machine, group: str, args: Arguments, warm: bool) -> Result:
    import torch._inductor.config as inductor

    module = args.module.to(DTYPE).to(memory_format=NHWC)
    (x,) = args.converted(DTYPE, NHWC)[0]
    mode = "default" if tiny(machine) else "max-autotune"
    kept: dict[str, Any] = {"freezing": True}
    if warm:
        cores = max(1, (os.cpu_count() or 1) // 2)
        kept |= {"fx_graph_cache": False, "autotune_local_cache": False, "compile_threads": cores}
    start = time.monotonic()
    with inductor.patch(kept), torch.no_grad():
        compiled = torch.compile(module, mode=mode)
        for _ in range(3):
            compiled(x)
        synchronize(machine.device)
        seconds = time.monotonic() - start
        if warm:
            return {"compile_seconds": seconds}

        def run() -> None:
            with torch.no_grad():
                compiled(x)

        found = times({"torch.compile max-autotune": run}, machine.device)
    return {"rows": rows_of(group, found, compile_seconds=round(seconds, 1))}
