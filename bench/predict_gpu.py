"""`python -m bench.predict_gpu`: what inference costs an H100 at least, worked out without a GPU.

    --write    put the table into bench/GPU.md

The programs that models run on a GPU, in bf16 and by PyTorch's kernels, as without a record, are
walked through on the meta device. A convolution has the multiply-adds and bytes of its plan, and as
many launches as its form; everything else is counted as PyTorch dispatches it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab_fast import get_model
from deeplab_fast.dispatch import records
from deeplab_fast.ops.folded_conv import Call, Filters, FoldedConv, Settings
from deeplab_fast.plan.device import H100, least_seconds
from deeplab_fast.program import inference
from deeplab_fast.program.fast_path import upsampled
from deeplab_fast.program.formats import in_plain_format
from deeplab_fast.program.gpu_layers import Folded, GpuForms, execute

from .files import ROOT, write_text
from .gpu_cases import CASES, GpuCase
from .launch_stub import GPUS
from .model_cases import BUILDERS
from .report import between_markers

PAGE = ROOT / "bench" / "GPU.md"
BEGIN = "<!-- predicted:begin -->"
END = "<!-- predicted:end -->"
DTYPE = torch.bfloat16
# Assumed, not measured: what PyTorch takes on the host for a small operator and its launch.
HOST_SECONDS = 6e-6
_CLASSES = 21
_META = torch.device("meta")


@dataclass
class Work:
    """What runs on the device.

    Attributes:
        macs: multiply-adds.
        bytes: read and written.
        seconds: the least that they take, launch by launch.
        launches: of kernels.
    """

    macs: int = 0
    bytes: int = 0
    seconds: float = 0.0
    launches: int = 0

    def add(self, macs: int, moved: int, launches: int = 1) -> None:
        """A kernel, or several that move so much together."""
        self.macs += macs
        self.bytes += moved
        self.launches += launches
        least = least_seconds(H100, DTYPE, macs, moved, tf32=False)
        assert least is not None
        self.seconds += least


class Counted(TorchDispatchMode):
    """Adds what PyTorch runs to a work, but for products: views and allocations are no launches."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if launches(func):
            # What is written in place is read and written, `out` written alone.
            moved = pytree.tree_leaves((args, result))
            self.work.add(0, sum(_bytes(t) for t in moved if isinstance(t, Tensor)))
        return result


def launches(func: Any) -> bool:
    """Whether an operator of PyTorch runs a kernel; this package's are counted where they stand."""
    name = func.name()
    returns = func._schema.returns
    is_view = bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )
    return name.startswith("aten::") and not is_view and "empty" not in name and name not in _FREE


_FREE = ("aten::_unsafe_view", "aten::_reshape_alias")


def _bytes(x: Tensor) -> int:
    # What is expanded is read once.
    sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    elements = 1 if x.numel() else 0
    for n in sizes:
        elements *= n
    return elements * x.element_size()


@dataclass
class Prediction:
    """One call of a model.

    Attributes:
        case: the model and its images.
        network: from images in the model's dtype to full-resolution logits.
        fold: of the batch norms into the filters, from weights in fp32.
    """

    case: GpuCase
    network: Work
    fold: Work


def predict(case: GpuCase) -> Prediction:
    """Walk through the program of a model."""
    made = model(case.backbone, case.output_stride)
    with _described_as_on_gpu() as device, torch.no_grad():
        return Prediction(case, network(made, case, device), fold(made))


@cache
def model(backbone: str, output_stride: int) -> Any:
    """A model without memory for its weights."""
    with torch.device(_META):
        return get_model(
            f"deeplabv3_{BUILDERS[backbone]}",
            num_classes=_CLASSES,
            output_stride=output_stride,
            aux_loss=False,
        ).eval()


def network(model: Any, case: GpuCase, device: torch.device) -> Work:
    """The program of a model with given filters, and the upsampling of its logits.

    Args:
        model: on the meta device.
        case: its images.
        device: that convolutions are planned for.
    """
    work = Work()
    forms = GpuForms(_META, torch.float32, frozen=DTYPE)
    program, reason = inference.fold(model, forms, aux=False, frozen=True)
    assert program is not None, reason
    filters = [
        Filters(*(t.to(dtype) for t, dtype in zip(each, _DTYPES, strict=True)))
        for each in forms.sources.shapes(DTYPE)
    ]
    folded = Folded(filters, DTYPE, Settings.now(), None, _META, False)
    x = torch.empty(case.batch, 3, case.height, case.width, dtype=DTYPE, device=_META)
    x = x.contiguous(memory_format=torch.channels_last)

    def planned(
        self: FoldedConv,
        x: Tensor,
        given: Filters,
        settings: Settings,
        residual: Tensor | None = None,
    ) -> Tensor:
        call = self.call(x.shape, given.weight.shape, residual is not None, x.dtype, device)
        plan = self.plan(call, settings)
        count = launches_of(plan.kernel, call)
        y = torch.empty(call.output, dtype=x.dtype, device=_META, memory_format=torch.channels_last)
        # Every pass behind the first kernel reads the result and writes it again.
        work.add(plan.macs, plan.bytes + 2 * (count - 1) * y.nbytes, count)
        return y

    with patch.object(FoldedConv, "__call__", planned), Counted(work):
        maps = program.maps(x, partial(execute, folded), aux=False)
        logits = in_plain_format(maps, x, program.channels_last)
        upsampled(logits, x.shape[-2:], model.align_corners)
    return work


# Of `Filters`: weight, shift, bias, one, zero.
_DTYPES = (DTYPE, torch.float32, DTYPE, torch.float32, torch.float32)


def launches_of(form: str, call: Call) -> int:
    """Kernels of a convolution by a form of `ops.folded_conv`.

    Raises:
        KeyError: an unknown form.
    """
    act = call.act is not None
    return {
        "cuBLASLt": 1 + (act and call.act != "relu"),
        "cuDNN fused": 1,
        "cuDNN": 2 + call.residual + act,
    }[form]


@cache
def fold(model: Any) -> Work:
    """The folding of every call, by PyTorch layer by layer; the model is on the meta device."""
    work = Work()
    forms = GpuForms(_META, torch.float32)
    _, reason = inference.fold(model, forms, aux=False)
    assert not reason, reason
    forms.sources.prepare()
    with Counted(work):
        forms.sources.fold(DTYPE, Settings.now())
    return work


@contextmanager
def _described_as_on_gpu() -> Iterator[torch.device]:
    """Calls can be described for a device that is not there, for which no record counts."""
    gpu = GPUS["H100"]
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {records.ENVIRONMENT_VARIABLE: "0"}))
        described: Callable[..., Any] = lambda device: gpu.properties  # noqa: E731
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", described))
        yield torch.device("cuda", gpu.index)


def table(cases: Sequence[GpuCase] = CASES) -> str:
    """The predictions as Markdown."""
    lines = [
        "| model | image | batch | GMAC | MB | least ms | launches | host ms "
        "| fold: MB | least ms | launches | host ms |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in cases:
        found = predict(case)
        run, folding = found.network, found.fold
        cells = (
            f"{case.backbone}, output stride {case.output_stride}",
            case.image,
            case.batch,
            f"{run.macs / 1e9:.1f}",
            *_cells(run),
            *_cells(folding),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(["", *lines, "", ""])


def _cells(work: Work) -> tuple[str, ...]:
    return (
        f"{work.bytes / 1e6:.0f}",
        f"{work.seconds * 1e3:.3f}",
        str(work.launches),
        f"{work.launches * HOST_SECONDS * 1e3:.2f}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it; 0, or 2 where the page has no place for it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.predict_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(argv)
    text = table()
    if not options.write:
        print(text.strip())
        return 0
    try:
        write_text(PAGE, between_markers(PAGE.read_text("utf-8"), text, BEGIN, END))
    except (ValueError, OSError) as error:
        print(f"bench.predict_gpu: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
