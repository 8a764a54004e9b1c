"""Helpers for tests, benchmarks and the demo; nothing here is needed to run a model."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import _ext

# Kept alive: a Library unregisters its ops when it is collected.
_libraries: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, also beside a PyTorch that its binary was not built for.

    Beside a CPU-only PyTorch torchvision's extension does not load, and its import fails on two ops
    whose schemas are missing. They are defined here first; no model of torchvision calls them.

    Raises:
        ImportError: torchvision is not installed, or does not import for another reason.
    """
    try:
        import torchvision
    except RuntimeError:
        if not _libraries:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)
        import torchvision
    return torchvision


_PUBLISHED = ("resnet50", "resnet101", "mobilenet_v3_large")


def torchvision_deeplabv3(
    backbone: str, num_classes: int = 21, aux_loss: bool | None = None
) -> nn.Module:
    """torchvision's DeepLabv3 with random weights, the peer to compare with.

    For ResNet-18, 34 and 152, for which torchvision has no builder, its parts are put together as
    its builders do.
    """
    models = import_torchvision().models
    if backbone in _PUBLISHED:
        builder = getattr(models.segmentation, f"deeplabv3_{backbone}")
        return builder(weights_backbone=None, num_classes=num_classes, aux_loss=aux_loss)
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
    from torchvision.models.segmentation.fcn import FCNHead

    make = getattr(models, backbone)
    if backbone == "resnet152":
        net = make(weights=None, replace_stride_with_dilation=[False, True, True])
    else:
        net = make(weights=None)
        _dilate_basic_blocks(net.layer3, first=1, others=2)
        _dilate_basic_blocks(net.layer4, first=2, others=4)
    channels = net.fc.in_features
    layers = {"layer4": "out", "layer3": "aux"} if aux_loss else {"layer4": "out"}
    body = IntermediateLayerGetter(net, return_layers=layers)
    aux_head = FCNHead(channels // 2, num_classes) if aux_loss else None
    return DeepLabV3(body, DeepLabHead(channels, num_classes), aux_head)


def _dilate_basic_blocks(stage: Any, first: int, others: int) -> None:
    """torchvision's rule for bottlenecks, written out for basic blocks."""
    stage[0].conv1.stride = (1, 1)
    stage[0].downsample[0].stride = (1, 1)
    for block in stage:
        for conv in (block.conv1, block.conv2):
            rate = first if conv is stage[0].conv1 else others
            conv.dilation = conv.padding = (rate, rate)


def cpu_instruction_sets() -> list[str]:
    """The instruction sets that the C++ code is compiled for and this processor has."""
    if not _ext.CPU.loaded:
        return []
    found = []
    for name in ("baseline", "avx2", "avx512"):
        try:
            found.append(torch.ops.deeplab_fast._cpu_instruction_set(name))
        except ValueError:
            continue
    torch.ops.deeplab_fast._cpu_instruction_set("auto")
    return found


def nvidia_tool(name: str, *args: str) -> str:
    """What a program of the CUDA tools that Triton brings prints: cuobjdump, nvdisasm, ptxas."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


def cubin_resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the one kernel in a cubin: registers and bytes of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = nvidia_tool("cuobjdump", "--dump-resource-usage", file.name)
    found = {name: re.search(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL")}
    return {name: int(match[1]) for name, match in found.items() if match}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Matrix products and convolutions of fp32 operands with or without rounding these to TF32.

    pytest's monkeypatch cannot: the setting is no attribute, and undoing would delete it.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic mode, in which PyTorch also fills every new tensor of C++ with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
