"""What a training step costs on the host: events of PyTorch's profiler, and times of calls.

`python tests/helpers/host_cost.py` prints both; times mean something on an idle machine only.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import deeplab_fast as dlf


def events(step: Callable[[], Any]) -> Counter[str]:
    """Events that PyTorch's profiler has of a step on the CPU, by name; the step ran before."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    return Counter(event.name for event in found.events())


def resnet50_step(fused: bool) -> Callable[[], None]:
    """A warm training step of DeepLabv3 with ResNet-50: two images of 65x65, 21 classes."""
    torch.manual_seed(0)
    model = dlf.fuse(dlf.deeplabv3_resnet50(num_classes=21), fused).train()
    x, target = torch.randn(2, 3, 65, 65), torch.randint(0, 21, (2, 65, 65))

    def step() -> None:
        F.cross_entropy(model(x)["out"], target).backward()

    step()
    return step


def microseconds(calls: dict[str, Callable[[], Any]], rounds: int = 200) -> dict[str, float]:
    """Medians of the times of calls, warm, in turns of 20 each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 10):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(20):
                call()
            if round_ >= 10:
                times[name].append((time.perf_counter() - start) / 20 * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def op_calls() -> dict[str, Callable[[], Any]]:
    """Ops on maps of 2x2, whose arithmetic takes next to no time, beside PyTorch's."""
    from deeplab_fast.dispatch.choice import Choices
    from deeplab_fast.ops import segment
    from deeplab_fast.ops.batch_norm import run_act, run_backward, run_reduce, run_stats
    from deeplab_fast.ops.conv2d import run_conv, run_conv_backward

    ops, choices = torch.ops.deeplab_fast, Choices()
    x = torch.randn(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    filters, v, batches = torch.randn(4, 4, 1, 1), torch.ones(4), torch.tensor(1)
    running = (torch.zeros(4), torch.ones(4), batches, 0.1)
    options = ([1, 1], [0, 0], [1, 1], 1)
    geometry = [1, 1, 0, 0, 1, 1, 1]
    norm = (v, v, v, v)
    head = (x, [], None, filters, geometry, True, 1e-5, *running, [v, v], None, "relu", [])
    tail = (x, x, [], None, 0, filters, geometry, x, [*norm], 4, None, "relu", [])
    needs = [True, False, False, True, True, True, False]

    def convolution_backward() -> tuple[Tensor, ...]:
        mask = [True, True, False]
        return torch.ops.aten.convolution_backward(
            x, x, filters, None, *options[:3], False, [0, 0], 1, mask
        )

    def plain() -> Tensor:
        return F.relu(F.batch_norm(F.conv2d(x, filters), *running[:2], v, v, True))

    def call(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        return lambda: function(*args)

    return {
        "F.conv2d": call(F.conv2d, x, filters),
        "aten.convolution_backward": convolution_backward,
        "F.batch_norm": call(F.batch_norm, x, v.clone(), v.clone(), v, v, True),
        "conv2d through the dispatcher": call(ops.conv2d, x, filters, *options),
        "bn_act through the dispatcher": call(ops.bn_act, x, *norm, None, "relu"),
        "conv2d": call(run_conv, choices, x, filters, *options),
        "conv2d_backward": call(run_conv_backward, choices, x, x, filters, *options, True, True),
        "batch_stats": call(run_stats, choices, x, 1e-5, *running),
        "bn_act": call(run_act, choices, x, *norm, None, "relu"),
        "bn_act_reduce": call(run_reduce, choices, x, x, *norm, None, "relu"),
        "bn_act_backward": call(run_backward, choices, x, x, *norm, None, v, v, "relu", False, 4.0),
        "F.conv2d, F.batch_norm, F.relu": plain,
        "segment of three": call(segment.run, *head),
        "segment of three through the dispatcher": call(ops.segment, *head),
        "its gradients, of four": call(segment.run_gradients, *tail, needs),
    }


def main() -> None:
    torch.set_num_threads(1)
    plain, fused = (events(resnet50_step(is_fused)).total() for is_fused in (False, True))
    print(f"events of a step: plain {plain}, fused {fused}, {fused / plain:.2f}x")
    with torch.no_grad():
        found = microseconds(op_calls())
    for name, time_ in found.items():
        print(f"{name:<42}{time_:7.1f} us {time_ / found['F.conv2d']:7.2f}x F.conv2d")


if __name__ == "__main__":
    main()
