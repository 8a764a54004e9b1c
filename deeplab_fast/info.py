"""`python -m deeplab_fast.info`: what is installed, what is built, and what runs for what."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import _ext, backends
from ._version import __version__
from .dispatch import limits, records
from .dispatch.declare import declared_ops, steps
from .dispatch.examples import Shapes, Size
from .ops import cpu_rates
from .ops.cpu_processors import DTYPES, Cpu


@dataclass(frozen=True)
class StandardShape:
    """A shape that people use: the model's feature map and its logits.

    Attributes:
        name: backbone, output stride, input size, batch.
        image: (H, W) of the input.
        map: (h, w) of the feature map and the logits.
        rates: atrous rates of the head.
        channels: of the backbone's features.
        classes: of the logits.
    """

    name: str
    batch: int
    image: tuple[int, int]
    map: tuple[int, int]
    rates: tuple[int, ...] = (12, 24, 36)
    channels: int = 2048
    classes: int = 21


STANDARD_SHAPES = (
    StandardShape("r50-os8-520-b1", 1, (520, 520), (65, 65)),
    StandardShape("r101-os16-513-b16", 16, (513, 513), (33, 33), (6, 12, 18)),
    StandardShape("cityscapes-1024x2048", 1, (1024, 2048), (128, 256), classes=19),
)

_PACKAGES = ("torch", "triton", "numpy", "torchvision", "lightning", "pillow", "safetensors")
_ENVIRONMENT = (
    (backends.ENVIRONMENT_VARIABLE, "backend of every op: auto, cuda, triton, cpu, reference"),
    ("DEEPLAB_FAST_DISABLE_EXT", "1: do not load the compiled extension"),
    ("DEEPLAB_FAST_CPU_SET", "instruction set of the C++ code: baseline, avx2 or avx512"),
    (cpu_rates.ENVIRONMENT_VARIABLE, "file of the CPU's measured rates; 0: neither read nor probe"),
    ("DEEPLAB_FAST_STRICT_LABELS", "1: a label outside the classes is an error on a GPU too"),
    (records.ENVIRONMENT_VARIABLE, "file of your records of GPU kernels; 0: read none"),
    ("TRITON_INTERPRET", "1: Triton kernels run in its interpreter, on a CPU"),
)


def calls(shape: StandardShape, dtype: torch.dtype) -> Iterator[backends.OpDesc]:
    """The commonest call of each op at a standard shape, described on the meta device: nothing is
    computed."""
    n, (h, w), c = shape.batch, shape.map, shape.channels
    shapes = Shapes(
        logits=Size(n, shape.classes, h, w, *shape.image),
        norms=(Size(n, c, h, w),),
        pointwise=(Size(n, 512, h, w, filters=c),),
        aspp=Size(n, c, h, w, filters=256, rates=shape.rates),
        filters=((256, c, 1, 1), *((256, c, 3, 3) for _ in shape.rates)),
    )
    for op in declared_ops():
        _, size = op.examples.works(shapes)[0]
        yield steps(op.name, op.examples.forms[0], size, dtype, "meta")[0].desc


def what_runs(shape: StandardShape, dtype: torch.dtype, device: str) -> list[backends.Why]:
    """For each op, the backend that would run a standard shape on a device type."""
    capability, gpu = None, ""
    if device == "cuda":
        capability, gpu = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    return [
        backends.explain(dataclasses.replace(desc, device=device, capability=capability, gpu=gpu))
        for desc in calls(shape, dtype)
    ]


def report() -> str:
    """The whole report as text."""
    return "\n".join(
        [
            *_versions(),
            "",
            *_devices(),
            "",
            *_built(),
            "",
            *_rates(),
            "",
            *_records(),
            "",
            *_choices(),
            "",
            *_environment(),
        ]
    )


def _versions() -> Iterator[str]:
    yield f"deeplab_fast {__version__}"
    yield f"  {'python':<14}{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in _PACKAGES:
        if package == "torch":
            # The version string of the module names the build (+cpu, +cu130).
            version = str(torch.__version__)
        else:
            try:
                version = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                version = "not installed"
        yield f"  {package:<14}{version}"


def _devices() -> Iterator[str]:
    yield "Devices"
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"  {'cpu':<14}{torch.get_num_threads()} threads, {capability}"
    if not torch.cuda.is_available():
        why = "PyTorch is built without CUDA" if torch.version.cuda is None else "no GPU is visible"
        yield f"  {'cuda':<14}none: {why}"
        return
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield (
            f"  {f'cuda:{i}':<14}{p.name}, sm_{p.major}{p.minor}, "
            f"{p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.0f} GiB"
        )


def _built() -> Iterator[str]:
    yield "Implementations"
    yield f"  {'reference':<14}yes: plain PyTorch"
    extensions = (("cpu", _ext.CPU), ("cuda", _ext.CUDA), ("cuda sm_90a", _ext.SM90))
    for name, extension in extensions:
        if extension.loaded:
            facts = ", ".join(f"{k} {v}" for k, v in extension.build.items() if isinstance(v, str))
            yield f"  {name:<14}yes: {facts}"
        else:
            yield f"  {name:<14}no: {extension.reason}"
    if importlib.util.find_spec("triton") is None:
        yield f"  {'triton':<14}no: triton is not installed"
    else:
        version = importlib.metadata.version("triton")
        has_compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        lacking = "" if has_compiler else "; needs a C compiler, which is missing"
        yield f"  {'triton':<14}yes: triton {version}, compiles at first use on a GPU{lacking}"


def _rates() -> Iterator[str]:
    yield "Rates of one thread of the CPU, by which convolutions are chosen"
    known = cpu_rates.choose_sets()
    yield f"  {Cpu.here().name}: {known.origin}"
    if not limits.extension(_ext.CPU, "_cpu_suggest_set"):
        families = (
            f"{family} {torch.ops.deeplab_fast._cpu_suggest_set(family, '')}"
            for family in cpu_rates.FAMILIES
        )
        yield f"  instruction sets: {', '.join(families)}"
    yield f"  {'GMAC/s':<14}{'tiles':>8}{'1x1':>8}{'oneDNN 1x1':>13}{'3x3':>8}{'ns a line':>12}"
    for dtype in DTYPES:
        row = cpu_rates.rates(dtype)
        own = f"{row.multiply / 1e9:>8.1f}{row.pixels / 1e9:>8.1f}"
        onednn = f"{row.onednn_1x1 / 1e9:>13.1f}{row.onednn_3x3 / 1e9:>8.1f}"
        yield f"  {dtype:<14}{own}{onednn}{row.line_seconds * 1e9:>12.1f}"


def _records() -> Iterator[str]:
    yield "Records of GPU kernels, by which they are chosen"
    own = records.own_path()
    if own is None:
        yield f"  left unread by {records.ENVIRONMENT_VARIABLE}=0: no kernel of ours runs by itself"
        return
    found = records.all_records()
    for origin, path in ((records.SHIPPED_ORIGIN, records.SHIPPED), (records.OWN_ORIGIN, own)):
        mine = [r for r in found if r.origin == origin]
        if not mine:
            text = "none; `deeplab-fast tune` makes them" if origin == records.OWN_ORIGIN else ""
            yield f"  {origin:<14}{text or records.note(path)}"
        for gpu in sorted({(r.gpu, r.capability) for r in mine}):
            of_gpu = [r for r in mine if (r.gpu, r.capability) == gpu]
            passed = [r for r in of_gpu if r.verdict == records.PASSED]
            faster = [r for r in passed if any(t.gain >= 1 for t in r.times)]
            yield (
                f"  {origin:<14}{gpu[0]} ({'.'.join(map(str, gpu[1]))}): {len(of_gpu)} kernels, "
                f"{len(passed)} passed, {len(faster)} faster than PyTorch at some size, "
                f"{max(r.date for r in of_gpu)}"
            )
            for r in of_gpu:
                if r.verdict == records.FAILED:
                    yield f"  {'':<14}failed: {r.op} {r.backend} {r.dtype} {r.form}: {r.reason}"
        if mine and origin == records.OWN_ORIGIN:
            yield f"  {'':<14}{path}"


def _choices() -> Iterator[str]:
    devices = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        devices.append(("cuda", torch.bfloat16))
    for device, dtype in devices:
        name = str(dtype).removeprefix("torch.")
        yield f"What runs on {device} in {name} (choice: {backends.current_backend()})"
        columns = [what_runs(shape, dtype, device) for shape in STANDARD_SHAPES]
        yield f"  {'':<26}" + "".join(f"{shape.name:<22}" for shape in STANDARD_SHAPES)
        for row in zip(*columns, strict=True):
            chosen = "".join(f"{why.chosen or 'nothing':<22}" for why in row)
            yield f"  {row[0].desc.op:<26}{chosen}"
        if any(why.chosen in why.records for why in columns[0]):
            yield f"  By records, for {STANDARD_SHAPES[0].name}:"
        for why in columns[0]:
            if why.chosen in why.records:
                yield f"    {why.desc.op:<24}{why.chosen:<10}{why.records[why.chosen]}"
        yield "  Why not another:"
        against: dict[tuple[str, str], list[str]] = {}
        for why in columns[0]:
            for backend, reasons in why.rows:
                if backend != why.chosen and reasons:
                    reason = "; ".join(reasons).removeprefix(f"{why.desc.op} ")
                    against.setdefault((backend, reason), []).append(why.desc.op)
        for (backend, reason), names in against.items():
            listed = "every op" if len(names) == len(columns[0]) else ", ".join(names)
            yield f"    {backend:<12}{reason} ({listed})"


def _environment() -> Iterator[str]:
    yield "Environment variables"
    for name, meaning in _ENVIRONMENT:
        yield f"  {name}={os.environ.get(name, '')}  ({meaning})"


def main() -> int:
    """Print the report."""
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
