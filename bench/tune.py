"""`python -m bench.tune [-k PATTERN]`: the fastest launch configurations of this GPU.

Every candidate of a kernel's configuration is held against the exact result and timed beside the
others, replayed from CUDA graphs. Where one beats the analytic choice by more than the noise, it is
written to kernels/configs/GPU/KERNEL.json with the versions it was measured with.

Without a GPU there is nothing to tune: a configuration is measured, never guessed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import gate, measure, registry, rows
from .op_cases import _UpsampleCase
from .providers import expected
from .registry import FORWARD, FORWARD_BACKWARD, Suite

CONFIGS = Path(__file__).resolve().parent.parent / "kernels" / "configs"
# A candidate must be this much faster than the analytic choice to be written.
LEAST_GAIN = 1.03


@dataclass(frozen=True)
class Tunable:
    """A choice that a kernel's launcher asks `deeplab_fast.kernels.configs` for.

    Attributes:
        kernel: name of the file that is written.
        function: name of the choice in that module.
        op, mode: cases that depend on it.
        candidates: () -> configurations, legal for every case.
    """

    kernel: str
    function: str
    op: str
    mode: str
    candidates: Callable[[], list[Any]]


def _powers(first: int, last: int) -> list[int]:
    return [1 << k for k in range(first.bit_length() - 1, last.bit_length())]


def forward_candidates() -> list[Any]:
    """Rows of a program and warps, for kernels without partial gradients."""
    from deeplab_fast.kernels.configs import WARP, UpsampleConfig

    return [
        UpsampleConfig(rows, warps * WARP, 0, warps)
        for rows in _powers(1, 16)
        for warps in _powers(1, 8)
    ]


def gradient_candidates() -> list[Any]:
    """Rows, columns of a block and warps; a block lies within a warp."""
    from deeplab_fast.kernels.configs import WARP, UpsampleConfig

    return [
        UpsampleConfig(rows, warps * WARP, block, warps)
        for rows in _powers(2, 8)
        for block in _powers(2, 16)
        for warps in _powers(1, 4)
    ]


TUNABLES = (
    Tunable("upsample_argmax", "forward_config", "upsample_argmax", FORWARD, forward_candidates),
    Tunable(
        "upsample_cross_entropy",
        "gradient_config",
        "upsample_cross_entropy",
        FORWARD_BACKWARD,
        gradient_candidates,
    ),
)


@contextlib.contextmanager
def configured(function: str, config: Any) -> Iterator[None]:
    """Make the launchers take a configuration, whatever the call."""
    from deeplab_fast.kernels import configs

    before = getattr(configs, function)
    setattr(configs, function, lambda *args, **kwargs: config)
    try:
        yield
    finally:
        setattr(configs, function, before)


def tune(tunable: Tunable, case: _UpsampleCase, suite: Suite) -> dict[str, Any] | None:
    """The entry of a case's sizes; None where the analytic choice is as good.

    Raises:
        RuntimeError: the analytic choice does not run, or its result is wrong.
    """
    args = case.setup(suite.device, suite.dtype, 0, measure.copies_for(case, suite))
    exact = expected(case, tunable.mode, args)
    triton = registry.provider("triton")
    precision = triton.precision(case, tunable.mode, suite.device, suite.dtype)

    def build(config: Any, anchors: dict[str, float]) -> tuple[Any, dict[str, float]]:
        with contextlib.ExitStack() as stack:
            if config is not None:
                stack.enter_context(configured(tunable.function, config))
            run = triton.build(case, tunable.mode, suite.device, suite.dtype, args)
            found = gate.errors(case, tunable.mode, gate.outputs(run.probe()), exact)
            for kind, error in found.items():
                bound = gate.limit(case, tunable.mode, kind, precision, 1, anchors.get(kind))
                if not error <= bound:
                    raise RuntimeError(f"{kind}: error {error:.2e} above {bound:.2e}")
            return measure.capture(run), found

    choices: dict[str, Any] = {"analytic": None}
    graph, anchors = build(None, {})
    graphs = {"analytic": graph}
    for config in tunable.candidates():
        name = _label(config)
        choices[name] = config
        try:
            graphs[name], _ = build(config, anchors)
        except Exception as error:
            print(f"  {name}: {measure.one_line(error)}", flush=True)
    replays = {name: (lambda i, graph=graph: graph.replay()) for name, graph in graphs.items()}
    samples = measure.interleaved(
        replays,
        measure.cuda_clock,
        suite.seconds * len(replays) / 4,
        suite.rounds,
        measure.SAMPLE_SECONDS["cuda"],
    )
    best = min(samples, key=lambda name: statistics.median(samples[name]))
    gain = measure.ratio(samples["analytic"], samples[best])
    copies = len(args.inputs)
    ms = {name: statistics.median(samples[name]) * 1e3 / copies for name in ("analytic", best)}
    print(
        f"{case.id} {tunable.mode}: analytic {ms['analytic']:.4g} ms, {best} {ms[best]:.4g} ms, "
        f"{gain:.3f}x of {len(samples)} that ran",
        flush=True,
    )
    if best == "analytic" or gain < LEAST_GAIN:
        return None
    s = case.sizes
    return {
        "key": {
            "in_size": [s.h, s.w],
            "out_size": [s.height, s.width],
            "align_corners": False,
            "classes": s.classes,
            "n": s.n,
            "dtype": str(suite.dtype).removeprefix("torch."),
        },
        "config": dataclasses.asdict(choices[best]),
        "ms": round(ms[best], 6),
        "analytic_ms": round(ms["analytic"], 6),
    }


def _label(config: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items())


def write(folder: Path, kernel: str, gpu: str, entries: list[dict[str, Any]]) -> Path:
    """Write a kernel's tuned configurations; returns the path."""
    env = rows.environment("cuda" if torch.cuda.is_available() else "cpu", 0)
    path = folder / re.sub(r"[^A-Za-z0-9._-]+", "_", gpu) / f"{kernel}.json"
    content = {
        "kernel": kernel,
        "gpu": gpu,
        "triton": env.triton,
        "torch": env.torch,
        "commit": env.commit,
        "date": env.date,
        "entries": entries,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Tune; 0, or 2 where there is no GPU or no such case."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("-k", metavar="PATTERN", help="regular expression on 'op/shape mode'")
    parser.add_argument("--out", type=Path, default=CONFIGS, help="default: kernels/configs")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "bench.tune: there is nothing to tune without a CUDA device: configurations are "
            "measured, and the analytic choice of kernels/configs.py stays",
            file=sys.stderr,
        )
        return 2
    suite = registry.SUITES["gpu"]
    try:
        work = registry.select("gpu", options.k)
    except ValueError as error:
        print(f"bench.tune: error: {error}", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name()
    for tunable in TUNABLES:
        entries = []
        for case, mode in work:
            if (case.op, mode) != (tunable.op, tunable.mode):
                continue
            assert isinstance(case, _UpsampleCase)
            reason = registry.missing_reason(registry.provider("triton"), case, mode, suite)
            if reason:
                print(f"{case.id} {mode}: {reason}")
                continue
            try:
                entry = tune(tunable, case, suite)
            except Exception as error:
                print(f"{case.id} {mode}: {measure.one_line(error)}", file=sys.stderr)
                continue
            if entry is not None:
                entries.append(entry)
        if entries:
            print(f"wrote {write(options.out, tunable.kernel, gpu, entries)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
