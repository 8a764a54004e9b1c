"""Rows of measurements: one for each case, provider, mode and metric, as CSV."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from .files import ROOT, replacing

# Metrics and their units.
TIME = "time"
DEVICE_TIME = "device_time"
RATIO = "ratio"
DEVICE_RATIO = "device_ratio"
# Over the fastest baseline of the same precision.
PRECISION_RATIO = "precision_ratio"
EQUAL = "equal_labels"
PEAK = "peak_memory"
HELD = "held_memory"
# That run in our forms, of a library's model.
MODULES = "modules"
DENSE = "dense_equivalent"
LIVE = "live_taps"
BANDWIDTH = "bandwidth"
ROOFLINE = "roofline"
STATUS = "status"
UNITS = {
    TIME: "ms",
    DEVICE_TIME: "ms",
    RATIO: "x",
    DEVICE_RATIO: "x",
    PRECISION_RATIO: "x",
    EQUAL: "1",
    PEAK: "MiB",
    HELD: "MiB",
    MODULES: "1",
    DENSE: "TFLOP/s",
    LIVE: "TFLOP/s",
    BANDWIDTH: "GB/s",
    ROOFLINE: "1",
    STATUS: "",
}
# op of the rows about the machine itself.
MACHINE = "machine"


@dataclass(frozen=True)
class Environment:
    """Where, with what and when a run measured.

    Attributes:
        device: name of the processor and its number of cores, or of the GPU.
        threads: of PyTorch on the CPU.
        python, torch, triton, cuda: versions; empty where there is none.
        commit: short hash, "unknown" outside a git checkout.
        dirty: "yes" where files of the checkout differ from the commit.
        date: start of the run, UTC.
        seed: of weights and inputs.
    """

    device: str
    threads: int
    python: str
    torch: str
    triton: str
    cuda: str
    commit: str
    dirty: str
    date: str
    seed: int


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        suite: of the run.
        op, case: names; op is "machine" for ceilings.
        dtype: of the case.
        mode, provider: what was timed, and how.
        baseline: "yes" for what a user has without this package.
        chosen: "yes" for what a user of this package gets without choosing.
        metric: a key of `UNITS`, or error_KIND.
        value: the figure; of times the median. Empty for the metric "status".
        p20, p80: percentiles of times and ratios.
        unit: of the value.
        agrees: "yes", "no", or empty where nothing ran.
        note: why something is missing, failed or disagrees.
    """

    suite: str
    op: str
    case: str
    dtype: str
    mode: str
    provider: str
    baseline: str
    chosen: str
    metric: str
    value: str
    p20: str
    p80: str
    unit: str
    agrees: str
    note: str
    device: str
    threads: int
    python: str
    torch: str
    triton: str
    cuda: str
    commit: str
    dirty: str
    date: str
    seed: int

    @property
    def group(self) -> tuple[str, ...]:
        """What is measured together and replaced together."""
        return (self.suite, self.op, self.case, self.dtype, self.mode, self.device)

    @property
    def number(self) -> float:
        """The value."""
        return float(self.value)


COLUMNS = tuple(f.name for f in fields(Row))


def environment(device: str, seed: int) -> Environment:
    """The facts of this machine and checkout.

    Args:
        device: "cpu" or "cuda".
        seed: of the run.
    """
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    commit, dirty = checkout()
    now = datetime.datetime.now(datetime.UTC)
    return Environment(
        device=torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton,
        cuda=torch.version.cuda or "",
        commit=commit,
        dirty=dirty,
        date=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        seed=seed,
    )


def _cpu_name() -> str:
    name = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {os.cpu_count()} cores, {capability}"


def checkout() -> tuple[str, str]:
    """(commit, dirty); DEEPLAB_FAST_BENCH_COMMIT names it where the tree came without git."""
    named = os.environ.get("DEEPLAB_FAST_BENCH_COMMIT")
    if named:
        return named, ""
    commit = _git("rev-parse", "--short=10", "HEAD")
    if commit is None:
        return "unknown", ""
    # What a run itself writes does not make the code another.
    changed = _git("status", "--porcelain", "--", ".", ":!bench/data", ":!README.md")
    return commit, "yes" if changed else "no"


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def row(
    env: Environment,
    suite: str,
    op: str,
    case: str,
    dtype: str,
    mode: str,
    provider: str,
    metric: str,
    value: float | None,
    *,
    p20: float | None = None,
    p80: float | None = None,
    unit: str = "",
    baseline: bool = False,
    chosen: bool = False,
    agrees: str = "",
    note: str = "",
) -> Row:
    """A row with numbers to six significant digits."""

    def text(number: float | None) -> str:
        return "" if number is None else f"{number:.6g}"

    return Row(
        suite=suite,
        op=op,
        case=case,
        dtype=dtype,
        mode=mode,
        provider=provider,
        baseline="yes" if baseline else "",
        chosen="yes" if chosen else "",
        metric=metric,
        value=text(value),
        p20=text(p20),
        p80=text(p80),
        unit=unit or UNITS.get(metric, ""),
        agrees=agrees,
        note=note,
        **asdict(env),
    )


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ValueError: it is no file of rows, or one of another version of the columns.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path.name} has the columns {reader.fieldnames}, expected {list(COLUMNS)}; "
                "measure again with python -m bench.run"
            )
        found = []
        for record in reader:
            numbers = {name: int(record[name]) for name in ("threads", "seed")}
            found.append(Row(**{**record, **numbers}))
    return found


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of rows under a temporary name, then rename it."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for r in rows:
            writer.writerow(asdict(r))


class RowFile:
    """The rows of a run, on disk after every case.

    Rows of the same case, mode and device that were there before are replaced, others stay, so that
    parts of a suite can be measured anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read(path) if path.is_file() else []

    def replace(self, rows: Sequence[Row]) -> None:
        """Put rows in the place of their groups'."""
        groups = {r.group for r in rows}
        self.rows = [r for r in self.rows if r.group not in groups] + list(rows)
        write(self.path, self.rows)

    def keep_only(self, date: str) -> None:
        """Leave out all rows but those of one run."""
        self.rows = [r for r in self.rows if r.date == date]
        write(self.path, self.rows)
