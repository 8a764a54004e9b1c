"""`python -m bench.tune [-k PATTERN]`: the fastest launch configurations of this GPU.

Every candidate of a kernel's configuration is held against the exact result and timed beside the
others, replayed from CUDA graphs. Where one beats the analytic choice by more than the noise, it is
written to kernels/configs/GPU/KERNEL.json with the versions it was measured with; launchers read it
from there (kernels/tuned.py). What a file says of other calls stays, as long as it is of the same
version and the same Triton.

Without a GPU there is nothing to tune: a configuration is measured, never guessed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deeplab_fast import backends

from . import gate, measure, registry, rows
from .providers import expected
from .registry import FORWARD, FORWARD_BACKWARD, Case, Suite

# A candidate must be this much faster than the analytic choice to be written.
LEAST_GAIN = 1.03


@dataclass(frozen=True)
class Tunable:
    """A kernel whose configuration cases depend on.

    Attributes:
        kernel: name in `deeplab_fast.kernels.configs.TUNABLE`, and of the file that is written.
        op, mode: cases in which exactly one of its configurations is chosen.
    """

    kernel: str
    op: str
    mode: str = FORWARD


TUNABLES = (
    Tunable("upsample_argmax", "upsample_argmax"),
    Tunable("upsample_confusion", "upsample_confusion"),
    Tunable("upsample_softmax_add", "upsample_softmax_add"),
    Tunable("upsample_cross_entropy", "upsample_cross_entropy", FORWARD_BACKWARD),
    Tunable("upsample_cross_entropy_forward", "upsample_cross_entropy"),
    Tunable("aspp_branches", "aspp_branches"),
    Tunable("pointwise", "aspp_project"),
    Tunable("pointwise", "conv_bn_act"),
)


@dataclass(frozen=True)
class Outcome:
    """What was found for a case.

    Attributes:
        key: the call, as its launcher looks it up.
        entry: the entry of the file; None where the analytic choice is as good.
    """

    key: dict[str, Any]
    entry: dict[str, Any] | None


@contextlib.contextmanager
def configured(kernel: str, config: Any | None) -> Iterator[list[tuple[Any, Any]]]:
    """Make the launcher of a kernel take a configuration, whatever the call and the files.

    Args:
        kernel: name in `configs.TUNABLE`.
        config: None for the analytic choice.

    Yields:
        The (key, device) that launchers ask for, each once.
    """
    from deeplab_fast.kernels import configs

    before = configs.tuned_config
    asked: list[tuple[Any, Any]] = []

    def choose(name: str, key: Any, device: Any) -> Any | None:
        if name != kernel:
            return before(name, key, device)
        if (key, device) not in asked:
            asked.append((key, device))
        return config

    configs.tuned_config = choose
    try:
        yield asked
    finally:
        configs.tuned_config = before


def tune(tunable: Tunable, case: Case, suite: Suite) -> Outcome:
    """The fastest configuration for a case.

    Raises:
        RuntimeError: the analytic choice does not run, its result is wrong, or the case does not
            choose one configuration of the kernel.
    """
    from deeplab_fast.kernels import configs

    args = case.setup(suite.device, suite.dtype, 0, measure.copies_for(case, suite))
    exact = expected(case, tunable.mode, args)
    triton = registry.provider("triton")
    precision = triton.precision(case, tunable.mode, suite.device, suite.dtype)

    def build(config: Any, anchors: dict[str, float]) -> tuple[Any, dict[str, float]]:
        run = triton.build(case, tunable.mode, suite.device, suite.dtype, args)
        found = gate.errors(case, tunable.mode, gate.outputs(run.probe()), exact)
        for kind, error in found.items():
            bound = gate.limit(case, tunable.mode, kind, precision, 1, anchors.get(kind))
            if not error <= bound:
                raise RuntimeError(f"{kind}: error {error:.2e} above {bound:.2e}")
        return measure.capture(run), found

    with configured(tunable.kernel, None) as asked:
        graph, anchors = build(None, {})
    if len(asked) != 1:
        raise RuntimeError(
            f"{case.id} {tunable.mode} chooses {len(asked)} configurations of {tunable.kernel}"
        )
    ((key, device),) = asked
    choices: dict[str, Any] = {"analytic": None}
    graphs = {"analytic": graph}
    for config in configs.TUNABLE[tunable.kernel].candidates(key, device):
        name = _label(config)
        choices[name] = config
        try:
            with configured(tunable.kernel, config):
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
    fields = dataclasses.asdict(key)
    if best == "analytic" or gain < LEAST_GAIN:
        return Outcome(fields, None)
    entry = {
        "key": fields,
        "config": dataclasses.asdict(choices[best]),
        "case": case.id,
        "ms": round(ms[best], 6),
        "analytic_ms": round(ms["analytic"], 6),
    }
    return Outcome(fields, entry)


def _label(config: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items())


def write(folder: Path, kernel: str, gpu: str, outcomes: Sequence[Outcome]) -> Path | None:
    """Bring a kernel's file up to date; returns its path, None where nothing is left to say.

    Args:
        folder: of all files.
        kernel: name in `configs.TUNABLE`.
        gpu: the device's name.
        outcomes: of the calls that were measured; they replace what the file says of these.
    """
    from deeplab_fast.kernels import tuned

    env = rows.environment("cuda" if torch.cuda.is_available() else "cpu", 0)
    path = tuned.path_of(folder, gpu, kernel)
    head = {"version": tuned.VERSION, "kernel": kernel, "gpu": gpu, "triton": env.triton}
    # As JSON has them: tuples are lists there.
    measured = json.loads(json.dumps([outcome.key for outcome in outcomes]))
    entries = [entry for entry in _kept(path, head) if entry.get("key") not in measured]
    facts = {"torch": env.torch, "commit": env.commit, "date": env.date}
    entries += [outcome.entry | facts for outcome in outcomes if outcome.entry is not None]
    if not entries:
        path.unlink(missing_ok=True)
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(head | {"entries": entries}, indent=1) + "\n", "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _kept(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of an earlier file; none where launchers would not read them beside new ones."""
    from deeplab_fast.kernels import tuned

    def facts(content: dict[str, Any]) -> dict[str, Any]:
        triton = tuned.minor(content.get("triton"))
        return {name: content.get(name) for name in head} | {"triton": triton}

    try:
        content = json.loads(path.read_text("utf-8"))
        found = facts(content)
        entries = [entry for entry in content["entries"] if isinstance(entry, dict)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        print(f"{path} is replaced: {measure.one_line(error)}", file=sys.stderr)
        return []
    if found != facts(head):
        print(f"{path} is replaced: it is of {found}, now {facts(head)}", file=sys.stderr)
        return []
    return entries


def main(argv: Sequence[str] | None = None) -> int:
    """Tune; 0, or 2 where there is no GPU or no such case."""
    from deeplab_fast.kernels import tuned

    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("-k", metavar="PATTERN", help="regular expression on 'op/shape mode'")
    parser.add_argument("--out", type=Path, default=tuned.FOLDER, help="default: kernels/configs")
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
    tune_all(work, suite, torch.cuda.get_device_name(), options.out)
    return 0


def tune_all(
    work: Sequence[tuple[Case, str]],
    suite: Suite,
    gpu: str,
    folder: Path,
    tune_one: Callable[[Tunable, Case, Suite], Outcome] = tune,
) -> None:
    """Tune all kernels that cases depend on, and write their files.

    Args:
        work: (case, mode).
        suite: how long, and on what.
        gpu: the device's name.
        folder: of the files.
        tune_one: tunes a case.
    """
    triton = registry.provider("triton")
    for tunable in TUNABLES:
        outcomes = []
        for case, mode in work:
            if (case.op, mode) != (tunable.op, tunable.mode):
                continue
            # Asked for by name, so that what is not chosen by itself is tuned too.
            with backends.use_backend("triton"):
                reason = registry.missing_reason(triton, case, mode, suite)
            if reason:
                print(f"{case.id} {mode}: {reason}")
                continue
            try:
                outcomes.append(tune_one(tunable, case, suite))
            except Exception as error:
                print(f"{case.id} {mode}: {measure.one_line(error)}", file=sys.stderr)
        if outcomes:
            path = write(folder, tunable.kernel, gpu, outcomes)
            print(
                f"{tunable.kernel}: " + (f"wrote {path}" if path else "the analytic choice stays")
            )


if __name__ == "__main__":
    sys.exit(main())
