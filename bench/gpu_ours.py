"""Whole models of this package on a GPU, beside torchvision's: units of `bench.gpu`.

What runs in them is what users get: the kernels that records allow. `DEEPLAB_FAST_RECORDS` of the
unit is the file with what was found so far.
"""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from deeplab_fast import backends, get_model, optimize
from deeplab_fast.dispatch import records, trust
from deeplab_fast.dispatch.errors import Wrong, norm_error, one_line
from deeplab_fast.engine.captured import WARM_UP, CapturedStep
from deeplab_fast.ops.folded_conv import Call, Filters, FoldedConv, Settings, forms_of
from deeplab_fast.ops.prepared import Plan
from deeplab_fast.program.optimize import OptimizedDeepLabV3
from deeplab_fast.tuning.machine import Machine

from .everything import registry
from .gpu_cases import GpuCase
from .gpu_checks import as_on_gpu
from .gpu_measure import (
    Row,
    graphed,
    kernels,
    rows_of,
    synchronize,
    times,
    tiny,
    wall_ms,
)
from .gpu_pytorch import DTYPE, model_sizes, prepared, step, step_case, step_row
from .model_cases import BUILDERS, FullLogits, ModelLabels, ModelLogits, Predict
from .providers import NHWC, Step
from .registry import FORWARD, Arguments, Case

# Of two bf16 networks with random weights: logits near each other are drawn the other way, and
# each network is off from the exact one by some of these percents.
_APART = {"labels": 0.05, "logits": 0.1}
# Beyond so many, labels alone: each call takes a tenth of a second.
_MANY_PIXELS = 2**24
OURS = "deeplab_fast"
_PLAIN = "PyTorch channels_last bf16"
_AUTOCAST = "PyTorch channels_last autocast bf16"
_GRAPH = "PyTorch channels_last bf16, CUDA graph"
_PROFILED = (_PLAIN, f"{OURS}, no graphs", f"{OURS}, graphs", f"{OURS} optimize, no graphs")
# Of all forms of a class of convolutions together.
_FORM_SECONDS = 0.05


def _with_records(path: Path | None) -> None:
    """Choose by the records in a file from here on."""
    if path is not None:
        os.environ[records.ENVIRONMENT_VARIABLE] = str(path)
    trust.forget()


def model(machine: Machine, recorded: Path | None, case: GpuCase) -> dict[str, Any]:
    """Full-size logits and labels of a batch in bf16: torchvision's model beside ours.

    PyTorch's has cuDNN search for algorithms; ours runs as it does by itself, without, and once
    with the search, which times the forms of its layers too.

    Args:
        machine: the GPU.
        recorded: file of records.
        case: the model and its images.

    Raises:
        Wrong: logits or labels are others.
    """
    _with_records(recorded)
    prepared(machine)
    given = model_sizes(machine, case)
    labels = ModelLabels(op="model_labels", suites=(), **given)
    logits = ModelLogits(op="model_logits", suites=(), **given)
    args = labels.setup(machine.device, DTYPE)
    of_logits = replace(args, module=FullLogits(args.module.model))
    kinds = {"labels": (labels, args, Predict), "logits": (logits, of_logits, FullLogits)}
    if tiny(machine) or case.batch * case.height * case.width > _MANY_PIXELS:
        del kinds["logits"]
    rows: list[Row] = []
    wrong: list[str] = []
    with as_on_gpu(machine):
        models = _models(labels.own_model(args).eval())
        for kind, (own_case, own_args, output) in kinds.items():
            calls = _pytorch(machine.device, own_case, own_args)
            plain = calls[_PLAIN]()
            for name, (made, dtype, searched) in models.items():
                (images,) = own_args.converted(dtype, NHWC)[0]
                calls[name] = _calling(output(made), images, searched)
            found, problems = _side_by_side(machine, kind, calls, plain)
            wrong += problems
            for name, (made, *_) in models.items():
                found[name]["held_mb"] = _held_bytes(made) / 2**20
            rows += rows_of(f"{kind} {case}", found)
    result = {"rows": rows, "chosen": chosen_ops(machine)}
    if wrong:
        raise Wrong("; ".join(wrong)[:300], **result)
    return result


def _models(masters: Any) -> dict[str, tuple[Any, torch.dtype, bool]]:
    """By name: a model of ours, the dtype of its images, whether cuDNN searches for it."""
    own = copy.deepcopy(masters).to(DTYPE).to(memory_format=NHWC)

    def built(cuda_graphs: bool | None) -> Any:
        made: Any = copy.deepcopy(own)
        made.cuda_graphs = cuda_graphs
        return made

    def frozen(cuda_graphs: bool) -> OptimizedDeepLabV3:
        made = optimize(masters, dtype=DTYPE)
        made.cuda_graphs = cuda_graphs
        return made

    masters.cuda_graphs = False
    return {
        OURS: (built(None), DTYPE, False),
        f"{OURS}, no graphs": (built(False), DTYPE, False),
        f"{OURS}, graphs": (built(True), DTYPE, False),
        f"{OURS}, fp32 weights, autocast": (masters, torch.float32, False),
        f"{OURS} optimize, no graphs": (frozen(False), DTYPE, False),
        f"{OURS} optimize, graphs": (frozen(True), DTYPE, False),
        f"{OURS} optimize, graphs, searched": (frozen(True), DTYPE, True),
    }


def _pytorch(device: str, case: Case, args: Arguments) -> dict[str, Callable[[], Any]]:
    """Calls of PyTorch's ways by name."""
    runs = {
        name: registry.provider(provider).build(case, FORWARD, device, DTYPE, args)
        for name, provider in ((_PLAIN, "channels_last"), (_AUTOCAST, "autocast"))
    }
    return {name: partial(run, 0) for name, run in runs.items()}


def _calling(module: nn.Module, images: Tensor, searched: bool) -> Callable[[], Tensor]:
    """A call of a module; under autocast where its images are of another dtype."""
    low = images.dtype != DTYPE

    def run() -> Tensor:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = searched
        try:
            with torch.inference_mode(), torch.autocast(images.device.type, DTYPE, low):
                return module(images)
        finally:
            torch.backends.cudnn.benchmark = before

    return run


def _side_by_side(
    machine: Machine, kind: str, calls: dict[str, Callable[[], Any]], plain: Tensor
) -> tuple[dict[str, Row], list[str]]:
    """Rows by name of calls whose results are like `plain`, and what is said of those that are not.

    PyTorch's own graph is added: last, as 2.11 goes on as if it captured where one has failed.
    """
    device = machine.device
    facts: dict[str, Row] = {}
    wrong = []
    for name, call in calls.items():
        try:
            # The third is a graph's, where there is one.
            apart = _apart(kind, [call() for _ in range(3)][-1], plain)
        except Exception as error:
            facts[name] = {"problem": one_line(error)}
            continue
        facts[name] = {"apart": apart}
        if not apart <= _APART[kind]:
            wrong.append(f"{kind} of {name} are {apart:.1%} from PyTorch's")
    running = {name: call for name, call in calls.items() if "problem" not in facts[name]}
    synchronize(device)
    try:
        running[_GRAPH] = graphed(calls[_PLAIN], device)
    except RuntimeError as error:
        facts[_GRAPH] = {"problem": one_line(error)}
    timed = times(running, device)
    found = {name: facts.get(name, {}) | timed.get(name, {}) for name in (*calls, _GRAPH)}
    for name in _PROFILED[: 1 if tiny(machine) else None]:
        if kind == "labels" and "ms" in found[name]:
            found[name]["wall_ms"] = wall_ms(calls[name], device, 1 if tiny(machine) else 10)
            found[name] |= kernels(calls[name], device)
    return found, wrong


def _held_bytes(model: Any) -> int:
    """Of weights and graphs, beside those of a model that is not frozen."""
    return model.held_bytes if isinstance(model, OptimizedDeepLabV3) else model.prepared_bytes


def _apart(kind: str, ours: Tensor, plain: Tensor) -> float:
    """The part of the labels that differ, or the distance of logits relative to their size."""
    if kind == "labels":
        return float((ours != plain).float().mean())
    return norm_error(ours, plain)


def forms(machine: Machine, case: GpuCase, own: bool) -> dict[str, Any]:
    """Every form of every class of convolutions of a model in bf16, whichever the rule takes.

    Args:
        machine: the GPU.
        case: the model and its images.
        own: the package's 1x1 convolutions and passes too, whatever records say.
    """
    prepared(machine)
    device = torch.device(machine.device)
    given = model_sizes(machine, case)
    labels = ModelLabels(op="model_labels", suites=(), **given)
    with torch.device(device), as_on_gpu(machine):
        model = get_model(f"deeplabv3_{BUILDERS[given['backbone']]}", aux_loss=False).eval()
        frozen = optimize(model, dtype=DTYPE)
        found = _classes(frozen, (labels.n, 3, labels.height, labels.width))
    rows: list[Row] = []
    for call, count in found.items():
        x = torch.randn(call.shape, device=device, dtype=DTYPE).contiguous(memory_format=NHWC)
        weight = torch.randn(call.filters, device=device) * math.prod(call.filters[1:]) ** -0.5
        weight = weight.to(DTYPE).contiguous(memory_format=NHWC)
        zero, one = (make(call.filters[0], device=device) for make in (torch.zeros, torch.ones))
        filters = Filters(weight, zero, zero.to(DTYPE), one, zero)
        residual = None
        if call.residual:
            residual = torch.randn(call.output, device=device, dtype=DTYPE)
            residual = residual.contiguous(memory_format=NHWC)
        ways = forms_of(call, Settings.now())
        first = next(iter(ways))
        if own and not tiny(machine):
            with backends.use_backend("triton"):
                ways = forms_of(call, Settings.now()) | ways
        calls = {name: partial(run, x, filters, residual) for name, run in ways.items()}
        timed = times(calls, machine.device, seconds=_FORM_SECONDS)
        group = f"form {case} {_class_name(call)}"
        rows += rows_of(group, timed, count=count, rule=first)
    return {"rows": rows}


def _classes(frozen: OptimizedDeepLabV3, shape: tuple[int, ...]) -> dict[Call, int]:
    """The different calls of convolutions in a forward pass, and how often each comes."""
    counted: Counter[Call] = Counter()
    plan = FoldedConv.plan

    def counting(self: FoldedConv, call: Call, settings: Settings) -> Plan:
        counted[call] += 1
        return plan(self, call, settings)

    with patch.object(FoldedConv, "plan", counting):
        frozen.layers(shape)
    return dict(counted)


def _class_name(call: Call) -> str:
    size = "x".join(map(str, call.shape))
    kernel = "x".join(map(str, call.filters[2:]))
    more = f" stride {call.stride[0]}" * (call.stride[0] > 1)
    more += f" rate {call.dilation[0]}" * (call.dilation[0] > 1)
    more += f" groups {call.groups}" * (call.groups > 1)
    more += f" {call.act}" * (call.act is not None) + " residual" * call.residual
    return f"{size} to {call.filters[0]} {kernel}{more}"


def training(machine: Machine, recorded: Path | None, given: GpuCase) -> dict[str, Any]:
    """A training step of this package's model: fused forms and loss, with every kernel of ours left
    out, and both as captured; arguments as for `model`."""
    _with_records(recorded)
    prepared(machine)
    group = f"training step {given}"
    case = step_case(machine, given)
    args = case.setup(machine.device, torch.float32)
    own, plain = case.own(args), case.own(args)
    plain.model.fused = False
    runs = {
        "deeplab_fast": step(case, machine, args, own),
        "deeplab_fast, plain modules": step(case, machine, args, plain),
    }
    found = {name: step_row(run, machine) for name, run in runs.items()}
    # Last: PyTorch 2.11 goes on as if it captured where one has failed.
    for name, run in runs.items():
        try:
            found[f"{name}, CUDA graph"] = _captured_row(run, machine)
        except (ValueError, RuntimeError) as error:
            found[f"{name}, CUDA graph"] = {"problem": one_line(error)}
    for row in found.values():
        if row.get("device_ms"):
            # At 1 the device is never idle.
            row["wall_over_device"] = row["ms"] / row["device_ms"]
    return {"rows": rows_of(group, found), "chosen": chosen_ops(machine)}


def _captured_row(run: Step, machine: Machine) -> Row:
    """`step_row` of a step as a training with ``cuda_graph`` runs it; its memory with that which
    the graphs keep."""

    def losses(x: Tensor, target: Tensor) -> dict[str, Tensor]:
        with run.context():
            return {"loss": run.module(x, target)}

    captured = CapturedStep(run.module.model, losses, torch.device(machine.device))

    def once(i: int) -> Tensor:
        run.optimizer.zero_grad(set_to_none=True)
        loss = captured.losses(*run.set(i))["loss"]
        captured.backward(loss)
        run.optimizer.step()
        return loss.detach()

    for _ in range(WARM_UP + 1):
        once(0)
    row = step_row(once, machine)
    if "peak_mb" in row:
        row["peak_mb"] += captured.held_bytes / 2**20
    return row


def chosen_ops(machine: Machine) -> dict[str, list[str]]:
    """The kernels that records allow, by op: "triton bfloat16 relu"."""
    found: dict[str, list[str]] = {}
    for record in records.all_records():
        if record.verdict == records.PASSED and any(t.gain >= 1 for t in record.times):
            if record.capability == machine.capability and record.op in backends.registered_ops():
                name = f"{record.backend} {record.dtype} {record.form}"
                found.setdefault(record.op, []).append(name)
    return found
