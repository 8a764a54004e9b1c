"""Whole models of this package on a GPU, beside torchvision's: units of `bench.gpu`.

What runs in them is what users get: the kernels that records allow. `DEEPLAB_FAST_RECORDS` of the
unit is the file with what was found so far.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deeplab_fast import backends, optimize
from deeplab_fast.dispatch import records, trust
from deeplab_fast.dispatch.errors import Wrong, one_line
from deeplab_fast.engine.captured import WARM_UP, CapturedStep
from deeplab_fast.tuning.machine import Machine

from .everything import registry
from .gpu_measure import Row, graphed, kernels, rows_of, times, tiny, wall_ms
from .gpu_pytorch import DTYPE, model_sizes, prepared, step, step_case, step_row
from .model_cases import ModelLabels, Predict
from .providers import NHWC, Step
from .registry import FORWARD

# Of two bf16 networks with random weights; logits near each other are drawn the other way.
_LABELS_APART = 0.05


def _with_records(path: Path | None) -> None:
    """Choose by the records in a file from here on."""
    if path is not None:
        os.environ[records.ENVIRONMENT_VARIABLE] = str(path)
    trust.forget()


def model(
    machine: Machine,
    recorded: Path | None,
    backbone: str,
    output_stride: int,
    batch: int,
    side: int,
) -> dict[str, Any]:
    """Labels of a batch in bf16: torchvision's model and argmax beside `predict`.

    Args:
        machine: the GPU.
        recorded: file of records.
        backbone, output_stride, batch, side: the model and its images.

    Raises:
        Wrong: the labels are others.
    """
    _with_records(recorded)
    prepared(machine)
    group = f"labels {backbone} os{output_stride} b{batch} {side}"
    given = model_sizes(machine, backbone, output_stride, batch, side)
    case = ModelLabels(op="model_labels", suites=(), **given)
    device = machine.device
    args = case.setup(device, DTYPE)
    (images,) = args.converted(DTYPE, NHWC)[0]
    own = case.own_model(args).to(DTYPE).to(memory_format=NHWC).eval()
    plain = registry.provider("channels_last").build(case, FORWARD, device, DTYPE, args)
    theirs, ours = partial(plain, 0), _predicting(own, images)
    calls: dict[str, Callable[[], object]] = {
        "PyTorch channels_last bf16": theirs,
        "deeplab_fast predict": ours,
    }
    problems: dict[str, Row] = {}
    more: dict[str, Callable[[], Callable[[], object]]] = {
        "PyTorch channels_last bf16, CUDA graph": lambda: graphed(theirs, device),
        "deeplab_fast optimize, predict": lambda: _predicting(optimize(own), images),
    }
    for name, make in more.items():
        try:
            calls[name] = make()
        except Exception as error:
            problems[name] = {"problem": one_line(error)}
    apart = float((theirs() != ours()).float().mean())
    found = times(calls, device) | problems
    for name in ("deeplab_fast predict", "PyTorch channels_last bf16"):
        if "ms" in found[name]:
            found[name]["wall_ms"] = wall_ms(calls[name], device, 1 if tiny(machine) else 10)
            found[name] |= kernels(calls[name], device)
    result = {"rows": rows_of(group, found, labels_apart=apart), "chosen": chosen_ops(machine)}
    if apart > _LABELS_APART:
        raise Wrong(f"{group}: {apart:.1%} of the labels are not PyTorch's", **result)
    return result


def _predicting(own: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    module = Predict(own)

    def run() -> Tensor:
        with torch.inference_mode():
            return module(images)

    return run


def training(
    machine: Machine,
    recorded: Path | None,
    backbone: str,
    output_stride: int,
    batch: int,
    side: int,
) -> dict[str, Any]:
    """A training step of this package's model: fused forms and loss, with every kernel of ours left
    out, and both as captured; arguments as for `model`."""
    _with_records(recorded)
    prepared(machine)
    group = f"training step {backbone} os{output_stride} b{batch} {side}"
    case = step_case(machine, backbone, output_stride, batch, side)
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
