"""What an inference program runs: its layers with kernels, costs and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .frozen import Frozen
from .layers import CHANNELS_LAST, Layer


@dataclass(frozen=True)
class LayerReport:
    """One layer of a program, for one input shape.

    Attributes:
        name: of the module it stands for.
        kernel: what computes it; "aten" for steps without prepared weights.
        form: the algorithm, such as "direct"; empty without one.
        input_shape, output_shape: of the layer.
        macs: multiply-adds that are done.
        predicted_seconds: by the cost model; None where it has none.
        measured_seconds: median of the measured calls; None where nothing was measured.
        extra_bytes: of prepared weights beyond one copy of the weights, that the kernel needs.
    """

    name: str
    kernel: str
    form: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    predicted_seconds: float | None
    measured_seconds: float | None
    extra_bytes: int


def layer_reports(
    frozen: Frozen, shape: Sequence[int], aux: bool, measure: bool, repeats: int
) -> list[LayerReport]:
    """The layers in the order in which they run on an input [N, 3, H, W] of this shape.

    Nothing is computed unless `measure` is set; then the program runs `repeats` times, and once
    before.
    """
    called: list[tuple[Layer, tuple[Any, ...], Any]] = []

    def plan(layer: Layer, *tensors: Tensor | None) -> Any:
        shapes = tuple(None if t is None else tuple(t.shape) for t in tensors)
        output = layer.output_shape(*shapes)
        called.append((layer, shapes, output))
        if isinstance(output, dict):
            return {k: torch.empty(v, device="meta") for k, v in output.items()}
        return torch.empty(output, device="meta")

    with torch.no_grad():
        frozen.program.logits(torch.empty(tuple(shape), device="meta"), plan, aux)
    times = _measured(frozen, shape, aux, repeats) if measure else [None] * len(called)
    return [_report(frozen, *call, seconds) for call, seconds in zip(called, times, strict=True)]


def _measured(frozen: Frozen, shape: Sequence[int], aux: bool, repeats: int) -> list[float]:
    x = torch.zeros(tuple(shape), dtype=frozen.dtype, device=frozen.device)
    x = x.contiguous(memory_format=CHANNELS_LAST)
    runs: list[list[float]] = []
    run = frozen.run()
    for _ in range(repeats + 1):
        times: list[float] = []

        def timed(layer: Layer, *tensors: Tensor | None, times: list[float] = times) -> Tensor:
            start = frozen.clock()
            y = run(layer, *tensors)
            times.append(frozen.clock() - start)
            return y

        with torch.inference_mode(), torch.autocast(frozen.device.type, enabled=False):
            frozen.program.maps(x, timed, aux)
        runs.append(times)
    # The first run prepares weights that are prepared on first use.
    return [median(column) for column in zip(*runs[1:], strict=True)]


def _report(
    frozen: Frozen, layer: Layer, shapes: tuple[Any, ...], output: Any, seconds: float | None
) -> LayerReport:
    plans = frozen.plans(layer, *shapes)
    main = output["out"] if isinstance(output, dict) else output
    return LayerReport(
        name=layer.name,
        kernel="+".join(dict.fromkeys(p.kernel for p in plans)) or "aten",
        form="+".join(dict.fromkeys(p.form for p in plans)),
        input_shape=shapes[0],
        output_shape=main,
        macs=sum(p.macs for p in plans),
        predicted_seconds=_sum([p.predicted_seconds for p in plans]) if plans else None,
        measured_seconds=seconds,
        extra_bytes=sum(p.extra_bytes for p in plans),
    )


def _sum(times: Sequence[float | None]) -> float | None:
    known = [t for t in times if t is not None]
    return sum(known) if len(known) == len(times) else None


def table(reports: Sequence[LayerReport], held_bytes: int) -> str:
    """The reports as text, one row a layer and their sums."""
    head = ("layer", "input", "output", "kernel", "GMAC", "predicted ms", "measured ms", "extra MB")
    rows = [head]
    for r in reports:
        rows.append(
            (
                r.name,
                _shape(r.input_shape),
                _shape(r.output_shape),
                f"{r.kernel} {r.form}".strip(),
                f"{r.macs / 1e9:.3f}" if r.macs else "-",
                _milliseconds(r.predicted_seconds),
                _milliseconds(r.measured_seconds),
                f"{r.extra_bytes / 1e6:.1f}" if r.extra_bytes else "-",
            )
        )
    measured = [r.measured_seconds for r in reports if r.measured_seconds is not None]
    rows.append(
        (
            f"{len(reports)} layers",
            "",
            "",
            f"{held_bytes / 1e6:.1f} MB of weights held",
            f"{sum(r.macs for r in reports) / 1e9:.3f}",
            _milliseconds(sum(r.predicted_seconds or 0.0 for r in reports)),
            _milliseconds(sum(measured) if measured else None),
            f"{sum(r.extra_bytes for r in reports) / 1e6:.1f}",
        )
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"
