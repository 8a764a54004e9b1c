"""`python -m bench.exports --out bench/data/exports`: exported files beside their models.

Each model goes through `deeplab_fast.export` in every format, with sizes that may change, with one
size, and with labels for logits. A row has the file's size, how far its results on a photo are from
the model's (what `export` itself compares), and times at one image of 520x520: of the file, of the
model's own call, by turns in one process. `--table FILE` writes the rows of bench/data/exports
between the markers of that file; `--check` only compares.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

import deeplab_fast
from deeplab_fast.engine.predict import predict
from deeplab_fast.exporting import FORMATS

from .files import ROOT, replacing, write_text
from .report import ReportError, between_markers
from .rows import environment

DATA = ROOT / "bench" / "data" / "exports"
BEGIN, END = "<!-- exports:begin -->", "<!-- exports:end -->"
# Of the side of a square input.
SIDE = 520
_ROUNDS, _WARM = 5, 1
# Seconds before a timed call. ONNX Runtime's threads spin after theirs: without a pause a call of
# ours behind one took 1.4 times as long.
_PAUSE = 0.2
VARIANTS = ("dynamic", "static", "labels")


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
        model, suffix, variant: what was exported, in which format, as which of `VARIANTS`.
        runtime: what ran it, with its version.
        megabytes: of the file, its weights included.
        export_seconds: of writing and checking it.
        error: of its logits, relative (2-norm); empty of labels.
        same: part of the labels that are the model's.
        ms, own_ms: medians of its call and of the model's own: logits of full size, or labels.
        ratio: median over rounds of own_ms / ms.
        device, threads, python, torch, commit, dirty, date: as of the other suites' rows.
    """

    model: str
    suffix: str
    variant: str
    runtime: str
    megabytes: str
    export_seconds: str
    error: str
    same: str
    ms: str
    own_ms: str
    ratio: str
    device: str
    threads: str
    python: str
    torch: str
    commit: str
    dirty: str
    date: str


def models() -> dict[str, Callable[[], nn.Module]]:
    """What is exported: the usual two, the embedded one, another library's DeepLabv3+."""

    def other() -> nn.Module:
        from deeplab_fast.testing import import_torchvision

        import_torchvision()
        import segmentation_models_pytorch as smp

        return smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, classes=21)

    return {
        "ResNet-50": lambda: deeplab_fast.deeplabv3_resnet50(num_classes=21),
        "MobileNetV3": lambda: deeplab_fast.deeplabv3_mobilenet_v3_large(num_classes=21),
        "camvid": lambda: deeplab_fast.models.load("camvid"),
        "smp V3+ MobileNetV2": other,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or write the table; 0, 1 where --check finds a difference, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench.exports", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for cpu.csv")
    parser.add_argument("--models", nargs="+", choices=list(models()), default=list(models()))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--table", type=Path, metavar="FILE", help="file with the markers")
    parser.add_argument("--check", action="store_true", help="compare the table only")
    options = parser.parse_args(argv)
    if options.out is None and options.table is None:
        parser.error("name --out DIR to measure, or --table FILE to write the table")
    if options.out is not None:
        path = options.out / "cpu.csv"
        for name in options.models:
            for row in measured(name, options.formats, options.variants):
                write(path, row)
                print(" ".join(f"{k}={v}" for k, v in list(asdict(row).items())[:11]), flush=True)
    if options.table is None:
        return 0
    try:
        text = options.table.read_text("utf-8")
        new = between_markers(text, table(read(DATA / "cpu.csv")), BEGIN, END)
    except (OSError, ReportError) as error:
        print(f"bench.exports: error: {error}", file=sys.stderr)
        return 2
    if new == text:
        return 0
    if options.check:
        print(f"{options.table.name} differs from the rows; run make bench-report", file=sys.stderr)
        return 1
    write_text(options.table, new)
    return 0


def measured(name: str, suffixes: Sequence[str], variants: Sequence[str]) -> Iterator[Row]:
    """The rows of one model."""
    torch.manual_seed(0)
    model = models()[name]().eval()
    own = deeplab_fast.accelerate(model, training=False) if name.startswith("smp") else model
    side = SIDE - SIDE % 16 if name.startswith("smp") else SIDE
    x = torch.rand(1, 3, side, side) - 0.5
    known = asdict(environment("cpu", 0))
    facts = {k: str(known[k]) for k in Row.__dataclass_fields__ if k in known}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Other libraries' models do not tell how photos are normalised.
        warnings.simplefilter("ignore", UserWarning)
        for suffix in suffixes:
            for variant in variants:
                path = Path(folder) / f"m{suffix}"
                start = time.perf_counter()
                report = deeplab_fast.export(
                    model,
                    path,
                    labels=variant == "labels",
                    size=(side, side) if variant == "static" else None,
                    dynamic=variant != "static",
                )
                seconds = time.perf_counter() - start
                check = report.check
                assert check is not None
                loaded = deeplab_fast.load_exported(path)

                def plain(labels: bool = variant == "labels") -> object:
                    if labels:
                        return predict(own, x)
                    with torch.inference_mode():
                        return own(x)

                ms, own_ms, ratio = _timed(lambda run=loaded: run(x), plain)
                yield Row(
                    name,
                    suffix,
                    variant,
                    check.runtime,
                    f"{report.bytes / 1e6:.1f}",
                    f"{seconds:.0f}",
                    "" if check.error is None else f"{check.error:.1e}",
                    f"{check.same:.5f}",
                    f"{ms:.4g}",
                    f"{own_ms:.4g}",
                    f"{ratio:.3g}",
                    **facts,
                )


def _timed(file: Callable[[], Tensor], own: Callable[[], object]) -> tuple[float, float, float]:
    """Median milliseconds of both, by turns, and the median of their ratio."""
    calls = (file, own)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_WARM):
        for call in calls:
            call()
    for _ in range(_ROUNDS):
        for call, found in zip(calls, times, strict=True):
            time.sleep(_PAUSE)
            start = time.perf_counter()
            call()
            found.append((time.perf_counter() - start) * 1e3)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios)


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**line) for line in csv.DictReader(file)]


def write(path: Path, row: Row) -> None:
    """Put a row in place of the one of the same file."""

    def key(some: Row) -> tuple[str, ...]:
        return (some.model, some.suffix, some.variant, some.device)

    kept = [each for each in read(path) if key(each) != key(row)] + [row]
    order = list(models()), list(FORMATS), VARIANTS
    kept.sort(
        key=lambda r: tuple(
            each.index(name)
            for each, name in zip(order, (r.model, r.suffix, r.variant), strict=True)
        )
    )
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(each) for each in kept)


def table(found: Sequence[Row]) -> str:
    """The rows as Markdown, with where and when they were measured."""
    if not found:
        return "\nNothing is measured yet.\n\n"
    lines = [
        "",
        "| model | file | runs in | MB | error | labels equal | ms | deeplab_fast, ms | ratio |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        lines.append(
            f"| {row.model} | {row.suffix} {row.variant} | {row.runtime} | {row.megabytes} "
            f"| {row.error} | {float(row.same):.3%} | {row.ms} | {row.own_ms} | {row.ratio}x |"
        )

    def distinct(name: str) -> str:
        return ", ".join(dict.fromkeys(getattr(row, name) for row in found))

    dates = sorted({row.date[:10] for row in found})
    lines += [
        "",
        f"{distinct('device')}, {distinct('threads')} threads, PyTorch {distinct('torch')}, Python "
        f"{distinct('python')}, commit {distinct('commit')}, {', '.join(dates)}; `python -m "
        "bench.exports`. Dynamic and static files give logits of full size, beside `model(x)`; "
        f"those with labels stand beside `model.predict(x)`. Times are medians of one image of "
        f"{SIDE}x{SIDE} (smp's of {SIDE - SIDE % 16}), by turns in one process, each after a "
        "pause; the ratio is the median of the model's time over the file's, above 1 where "
        "the file is faster. Errors are those that `export` found on its photo, relative "
        "(2-norm). smp's model is accelerated.",
        "",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
