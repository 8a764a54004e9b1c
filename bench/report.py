"""`python -m bench.report [ROWS.csv ...]`: tables and plots from rows, and the README's table.

    --out DIR        write report.md and three plots for each suite: bars of the ratio to the best
                     baseline, roofline, memory
    --readme FILE    rewrite what stands between the two markers in FILE
    --check          write nothing; exit 1 if FILE differs from what the rows give
    --against FILE   print how far the ratios of another run are from these, and the median of that

Rows whose results do not agree are left out of every table and plot, and named below them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import rows
from .everything import registry
from .files import replacing, write_text
from .rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"
DATA = Path(__file__).resolve().parent / "data"


class ReportError(ValueError):
    """The rows or the README do not allow a report; the message says why."""


@dataclass
class Group:
    """The rows of one case and mode on one device.

    Attributes:
        key: suite, op, case, dtype, mode, device.
        providers: provider -> metric -> row, of those that agree.
        refused: provider -> note, of those that do not.
        missing: provider -> note, of those that did not run.
        order: providers as they were measured.
        baselines: those that are baselines.
        chosen: what a user of deeplab_fast gets; empty where nothing is.
    """

    key: tuple[str, ...]
    providers: dict[str, dict[str, Row]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    baselines: set[str] = field(default_factory=set)
    chosen: str = ""

    @property
    def name(self) -> str:
        """Op, case and mode; forward goes without saying."""
        _, op, case, _, mode, _ = self.key
        return f"{op} {case}" + ("" if mode == registry.FORWARD else f" {mode}")

    def value(self, provider: str, metric: str) -> float | None:
        """A figure of a provider that agrees."""
        found = self.providers.get(provider, {}).get(metric)
        return None if found is None else found.number

    @property
    def best(self) -> str:
        """The fastest baseline that agrees; empty where there is none."""
        return self.fastest(self.baselines)

    def fastest(self, names: Iterable[str]) -> str:
        """The fastest of some providers that agrees; empty where there is none."""
        times = {p: self.value(p, rows.TIME) for p in names}
        known = {p: t for p, t in times.items() if t is not None}
        return min(known, key=lambda p: (known[p], p), default="")

    def of_precision(self, precision: str) -> list[str]:
        """The providers whose operands have a precision."""
        _, op, case, dtype, mode, _ = self.key
        found = registry.case(f"{op}/{case}")
        given = found, mode, "cpu", getattr(torch, dtype)
        return [p for p in self.order if registry.provider(p).precision(*given) == precision]


def groups(found: Iterable[Row]) -> list[Group]:
    """Rows put together by what was measured side by side, in order."""
    made: dict[tuple[str, ...], Group] = {}
    for r in found:
        if r.op == rows.MACHINE:
            continue
        group = made.setdefault(r.group, Group(r.group))
        if r.provider not in group.order:
            group.order.append(r.provider)
        if r.baseline:
            group.baselines.add(r.provider)
        if r.chosen:
            group.chosen = r.provider
        if r.agrees == "no":
            if r.metric == rows.STATUS:
                group.refused[r.provider] = r.note
            group.refused.setdefault(r.provider, "")
        elif r.agrees == "yes":
            group.providers.setdefault(r.provider, {})[r.metric] = r
        else:
            group.missing[r.provider] = r.note
    return list(made.values())


def readme_table(found: Sequence[Row]) -> str:
    """What stands between the markers: a table for each suite and device, and its conditions."""
    parts = []
    suites = _by_suite(found)
    told = {g.key[1:] for (s, _), some in suites.items() if _by_precision(s) for g in groups(some)}
    # What is compared by precision comes first, and is not told twice.
    for (suite, device), some in sorted(suites.items(), key=lambda s: not _by_precision(s[0][0])):
        every = groups(some)
        if _by_precision(suite):
            parts += ["", f"**{device}.** {_conditions(some)}", "", *_strongest(every), ""]
            continue
        if any(g.value(p, rows.MODULES) is not None for g in every for p in g.order):
            parts += ["", f"**{device}.** {_conditions(some)}", "", *_accelerated(every), ""]
            continue
        shown = [g for g in every if _is_headline(g) and g.key[1:] not in told] or every
        shown.sort(key=lambda g: not g.key[1].startswith("model"))
        parts += ["", f"**{device}.** {_conditions(some)}", "", *_summary(shown), ""]
        if len(shown) < len(every):
            parts[-1:] = [
                "",
                f"{len(shown)} of {len(every)} cases, chosen by what people run; all figures of "
                "all cases: `python -m bench.report`.",
                "",
            ]
    if not parts:
        raise ReportError("there are no rows to make a table of")
    return "\n".join(parts) + "\n"


def _case(group: Group) -> registry.Case | None:
    try:
        return registry.case(f"{group.key[1]}/{group.key[2]}")
    except ValueError:
        return None


def _is_headline(group: Group) -> bool:
    case = _case(group)
    return case is not None and case.headline


def _by_precision(suite: str) -> bool:
    return suite in registry.SUITES and registry.SUITES[suite].by_precision


def _by_suite(found: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    made: dict[tuple[str, str], list[Row]] = {}
    for r in found:
        made.setdefault((r.suite, r.device), []).append(r)
    return made


def _conditions(some: Sequence[Row]) -> str:
    def distinct(get: Callable[[Row], str]) -> str:
        return ", ".join(dict.fromkeys(get(r) for r in some if get(r)))

    commits = distinct(lambda r: r.commit + (" with changes" if r.dirty == "yes" else ""))
    facts = [
        f"suite {some[0].suite}",
        f"{distinct(lambda r: str(r.threads))} threads",
        f"Python {distinct(lambda r: r.python)}",
        f"PyTorch {distinct(lambda r: r.torch)}",
    ]
    if triton := distinct(lambda r: r.triton):
        facts.append(f"Triton {triton}")
    if cuda := distinct(lambda r: r.cuda):
        facts.append(f"CUDA {cuda}")
    facts += [f"dtype {distinct(lambda r: r.dtype)}", f"commit {commits}"]
    facts.append(distinct(lambda r: r.date[:10]))
    ceilings = [f"{r.case} {r.number:.3g} {r.unit}" for r in some if r.op == rows.MACHINE]
    machine = f" The machine itself reaches: {', '.join(ceilings)}." if ceilings else ""
    return f"Measured with {', '.join(facts)}.{machine}"


def _summary(found: Sequence[Group]) -> Iterator[str]:
    """One line for each case and mode: the baselines' times, ours, the speed-up, the memory."""
    shown = [
        p.name
        for p in registry.providers()
        if p.baseline and any(g.value(p.name, rows.TIME) is not None for g in found)
    ]
    head = ["case", *(f"{name}, ms" for name in shown), "deeplab_fast, ms", "speed-up", "MiB"]
    yield "| " + " | ".join(head) + " |"
    yield "|---" + "|---:" * (len(head) - 1) + "|"
    for g in found:
        times = [_bold(_number(g.value(p, rows.TIME)), p == g.best) for p in shown]
        yield "| " + " | ".join([g.name, *times, *_ours(g)]) + " |"
    yield ""
    descriptions = [f"{n}: {registry.provider(n).description}" for n in shown]
    yield (
        "Times are medians in milliseconds. The speed-up is the median, over rounds in which all "
        "ran side by side, of the time of the fastest baseline (bold) over that of deeplab_fast, "
        "with what runs in it without choosing in parentheses. MiB is the peak memory of a call, "
        "of that baseline and of deeplab_fast. Baselines: " + "; ".join(descriptions) + "."
    )
    yield from _left_out(found)


_BUILT = "ours-built"


def _accelerated(found: Sequence[Group]) -> Iterator[str]:
    """One line for each model of another library: its modules, and both kinds of call."""
    yield (
        "| model | modules | call | as it is, ms | accelerated, ms | speed-up | error | MiB "
        "| our builder, ms |"
    )
    yield "|---" * 3 + "|---:" * 6 + "|"
    for g in found:
        ours = g.providers.get(g.chosen, {})
        modules = ours.get(rows.MODULES)
        error = max((r.number for m, r in ours.items() if m.startswith("error_")), default=None)
        call = "training step" if g.key[4] == registry.STEP else "labels"
        cells = [
            f"{g.key[2]}",
            "" if modules is None else f"{modules.number:.0f} {modules.note}",
            call,
            f"{_number(g.value(g.best, rows.TIME))} ({g.best})" if g.best else "",
            *_ours(g),
        ]
        time, speed_up, memory = cells.pop(4), cells.pop(4), cells.pop(4)
        cells += [
            time.partition(" (ours")[0],
            speed_up,
            "" if error is None else f"{error:.1e}",
            memory,
            _number(g.value(_BUILT, rows.TIME)),
        ]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    yield (
        "Other libraries' models before and after `deeplab_fast.accelerate`. As it is: the faster "
        "of eager and channels_last; for labels accelerated models have channels_last weights. The "
        "speed-up is the median over rounds in which all ran side by side; the error is the "
        "distance from the model's own results, in units of their 2-norm, of a training step that "
        "of its gradients; MiB is the peak memory of a call. Our builder's model has the same "
        "weights. Dropout and dropping of paths are off, so that gradients can be compared."
    )
    yield from _left_out(found)


_PRECISIONS = ("fp32", "bf16", "int8")


def _strongest(found: Sequence[Group]) -> Iterator[str]:
    """One line for each case and precision: the fastest baseline, ours, the labels of both."""
    yield (
        "| case | precision | baseline | ms | labels | deeplab_fast, ms | labels | speed-up | MiB |"
    )
    yield "|---|---|---" + "|---:" * 6 + "|"
    told: dict[str, None] = {}
    judged: dict[str, None] = {}
    for g in found:
        for precision in _PRECISIONS:
            names = g.of_precision(precision)
            best = g.fastest(p for p in names if p in g.baselines)
            ours = next((p for p in names if p not in g.baselines), "")
            if not best and ours not in g.providers:
                continue
            if best:
                told.setdefault(f"{best}: {_description(g, best)}")
            for p in (best, ours):
                if _equal(g, p) is not None:
                    judged.setdefault(g.providers[p][rows.EQUAL].note.partition(",")[0])
            yield f"| {g.name} | {precision} | " + " | ".join(_beside(g, best, ours)) + " |"
    yield ""
    yield (
        "Times are medians in milliseconds, for each precision of the fastest baseline and of "
        "deeplab_fast; the speed-up is the median of their ratio over rounds in which all ran side "
        "by side. Labels are the share that equals those of the plain model in fp32, on "
        + (", ".join(judged) or "photos")
        + "; with random weights that would say nothing. MiB is what the baseline and deeplab_fast "
        "hold, weights included, and take at most in a call. Baselines: " + "; ".join(told) + "."
    )
    ours_missing = {
        f"{p}: {note.removeprefix('missing: ')}": None
        for g in found
        for p, note in g.missing.items()
        if p not in g.baselines
    }
    if ours_missing:
        yield ""
        yield "Missing of deeplab_fast: " + "; ".join(ours_missing) + "."
    yield from _left_out(found)


def _memory(g: Group, provider: str) -> float | None:
    """What a provider holds and takes in a call: some runtimes keep all memory between calls."""
    peak, held = g.value(provider, rows.PEAK), g.value(provider, rows.HELD)
    return None if peak is None or held is None else peak + held


def _description(g: Group, provider: str) -> str:
    """What a baseline is, with the versions that its time was noted with."""
    note = g.providers[provider][rows.TIME].note
    return registry.provider(provider).description + (f" ({note})" if note else "")


def _equal(g: Group, provider: str) -> float | None:
    """The share of a provider's labels that are the exact ones, of a trained model."""
    case = _case(g)
    return g.value(provider, rows.EQUAL) if case is not None and case.trained else None


def _beside(g: Group, best: str, ours: str) -> list[str]:
    """The cells of a baseline and of ours."""

    def labels(provider: str) -> str:
        equal = _equal(g, provider)
        return "" if equal is None else f"{equal:.2%}"

    time = _number(g.value(ours, rows.TIME)) or ("disagrees" if ours in g.refused else "")
    ratio = g.value(ours, rows.PRECISION_RATIO)
    before, after = (_memory(g, p) for p in (best, ours))
    return [
        best,
        _number(g.value(best, rows.TIME)),
        labels(best),
        time,
        labels(ours),
        "" if ratio is None else f"{ratio:.2f}x",
        "" if before is None or after is None else f"{before:.1f} → {after:.1f}",
    ]


def _ours(g: Group) -> list[str]:
    if g.chosen in g.refused:
        return [f"disagrees ({g.chosen})", "", ""]
    time = g.value(g.chosen, rows.TIME)
    if time is None:
        return ["", "", ""]
    ratio = g.value(g.chosen, rows.RATIO)
    before, after = (g.value(p, rows.PEAK) for p in (g.best, g.chosen))
    memory = "" if before is None or after is None else f"{before:.1f} → {after:.1f}"
    speed_up = "" if ratio is None else f"{ratio:.2f}x"
    return [f"{_number(time)} ({g.chosen})", speed_up, memory]


def _left_out(found: Sequence[Group]) -> Iterator[str]:
    refused = [f"{p} at {g.name} ({note})" for g in found for p, note in g.refused.items()]
    if refused:
        yield ""
        yield "Not shown, because the results do not agree: " + "; ".join(refused) + "."
    missing: dict[str, list[str]] = {}
    for g in found:
        for p, note in g.missing.items():
            if p in g.baselines:
                missing.setdefault(f"{p}: {note.removeprefix('missing: ')}", []).append(g.name)
    if missing:
        yield ""
        yield (
            "Missing baselines: "
            + "; ".join(
                reason
                + ("" if len(names) == len(found) else f" ({len(names)} of {len(found)} cases)")
                for reason, names in missing.items()
            )
            + "."
        )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold and text else text


def full_report(found: Sequence[Row]) -> str:
    """Every figure of every provider, as Markdown."""
    lines = ["# Benchmark rows"]
    for (suite, device), some in _by_suite(found).items():
        lines += ["", f"## {suite}: {device}", "", _conditions(some)]
        for g in groups(some):
            lines += ["", f"### {g.name}", "", *_details(g)]
    return "\n".join(lines) + "\n"


_COLUMNS = (
    (rows.TIME, "ms", "{:.4g}"),
    (rows.DEVICE_TIME, "device ms", "{:.4g}"),
    (rows.RATIO, "ratio", "{:.2f}"),
    (rows.DEVICE_RATIO, "device ratio", "{:.2f}"),
    (rows.PRECISION_RATIO, "ratio in its precision", "{:.2f}"),
    (rows.EQUAL, "equal labels", "{:.3%}"),
    (rows.LIVE, "TFLOP/s live", "{:.3g}"),
    (rows.DENSE, "dense", "{:.3g}"),
    (rows.BANDWIDTH, "GB/s", "{:.3g}"),
    (rows.ROOFLINE, "roofline", "{:.1%}"),
    (rows.PEAK, "peak MiB", "{:.1f}"),
    (rows.HELD, "held MiB", "{:.1f}"),
)


def _details(g: Group) -> Iterator[str]:
    used = [c for c in _COLUMNS if any(c[0] in metrics for metrics in g.providers.values())]
    yield "| provider | " + " | ".join(title for _, title, _ in used) + " | p20..p80 ms |"
    yield "|---" + "|---:" * (len(used) + 1) + "|"
    for p in g.order:
        name = p + (" (chosen)" if p == g.chosen else "")
        if p not in g.providers:
            note = g.refused.get(p) if p in g.refused else g.missing.get(p)
            yield f"| {name} | {note} |" + " |" * len(used)
            continue
        values = [(form, g.value(p, metric)) for metric, _, form in used]
        cells = ["" if v is None else form.format(v) for form, v in values]
        time = g.providers[p].get(rows.TIME)
        spread = "" if time is None else f"{float(time.p20):.4g}..{float(time.p80):.4g}"
        yield f"| {name} | " + " | ".join([*cells, spread]) + " |"


def spread(found: Sequence[Row], others: Sequence[Row]) -> Iterator[str]:
    """How far ratios of two runs are apart: a line for each in both, and the median of all.

    Baselines count too, but for the fastest, whose ratio is 1.
    """

    def ratios(some: Sequence[Row]) -> dict[tuple[str, str], float]:
        return {
            (g.name, p): value
            for g in groups(some)
            for p in g.order
            if p != g.best and (value := g.value(p, rows.RATIO)) is not None
        }

    first, second = ratios(found), ratios(others)
    apart = {}
    for key in first:
        if key in second:
            a, b = first[key], second[key]
            apart[key] = max(a, b) / min(a, b) - 1
            yield f"{key[0]:<60}{key[1]:<14}{a:>8.3f}{b:>8.3f}{apart[key]:>8.1%}"
    if not apart:
        raise ReportError("the two files have no ratios of the same case and provider")
    yield f"median of {len(apart)}: {statistics.median(apart.values()):.1%} apart"


def between_markers(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """A text with what stands between its markers replaced.

    Args:
        text: has one line of each marker.
        table: what comes between them.
        begin, end: the markers.

    Raises:
        ReportError: not exactly one of each marker, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReportError(
            f"the file needs one line {begin} and after it one line {end}; between them goes the "
            "table"
        )
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table}{end}{rest.partition(end)[2]}"


def plots(found: Sequence[Row], folder: Path) -> list[Path]:
    """Write three plots for each suite and device as SVG; returns their paths.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    # The same rows give the same files.
    matplotlib.rcParams["svg.hashsalt"] = "deeplab_fast"
    written = []
    suites = _by_suite(found)
    for number, ((suite, _), some) in enumerate(suites.items()):
        stem = suite if len({s for s, _ in suites}) == len(suites) else f"{suite}-{number}"
        for name, draw in (
            ("ratio", _plot_ratio),
            ("roofline", _plot_roofline),
            ("memory", _plot_memory),
        ):
            path = folder / f"{stem}-{name}.svg"
            figure = draw(some)
            if figure is not None:
                _save(figure, path)
                written.append(path)
    return written


def _save(figure: Figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None}, bbox_inches="tight")
    finally:
        plt.close(figure)


def _colours() -> dict[str, Any]:
    import matplotlib

    names = [p.name for p in registry.providers()]
    table = matplotlib.colormaps["tab20"]
    return {name: table(i % table.N) for i, name in enumerate(names)}


def _bars(some: Sequence[Row], metric: str, title: str, log: bool) -> Figure | None:
    """Horizontal bars, a cluster for each case and mode."""
    import matplotlib.pyplot as plt

    found = [g for g in groups(some) if any(g.value(p, metric) is not None for p in g.order)]
    if not found:
        return None
    colours = _colours()
    total = sum(len(g.providers) + 1 for g in found)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.16 * total))
    y, ticks, seen = 0.0, [], set()
    for g in found:
        shown = [p for p in g.order if g.value(p, metric) is not None]
        ticks.append((y + (len(shown) - 1) / 2, g.name))
        for p in shown:
            label = None if p in seen else p
            seen.add(p)
            edge = "black" if p == g.chosen else "none"
            axes.barh(y, g.value(p, metric), color=colours[p], label=label, edgecolor=edge)
            y += 1
        y += 1
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(f"{title} (black edge: what deeplab_fast chooses)")
    axes.set_title(f"{some[0].device}, suite {some[0].suite}, commit {some[0].commit}", fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _plot_ratio(some: Sequence[Row]) -> Figure | None:
    figure = _bars(some, rows.RATIO, "times as fast as the best baseline", log=False)
    if figure is not None:
        figure.axes[0].axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    return figure


def _plot_memory(some: Sequence[Row]) -> Figure | None:
    return _bars(some, rows.PEAK, "peak memory of a call, MiB", log=True)


def _plot_roofline(some: Sequence[Row]) -> Figure | None:
    import matplotlib.pyplot as plt
    import numpy as np

    machine = {r.case: r.number for r in some if r.op == rows.MACHINE}
    dtype = next((r.dtype for r in some if r.dtype), "")
    peak = next((v for n, v in machine.items() if n.startswith(f"matmul-{dtype}")), None)
    bandwidth = next((v for n, v in machine.items() if n.startswith("copy")), None)
    points = []
    for g in groups(some):
        for p in g.order:
            rate, moved = g.value(p, rows.LIVE), g.value(p, rows.BANDWIDTH)
            if rate and moved:
                points.append((rate * 1e3 / moved, rate, p))
    if peak is None or bandwidth is None or not points:
        return None
    colours = _colours()
    figure, axes = plt.subplots(figsize=(7, 5))
    x = np.logspace(np.log10(min(p[0] for p in points) / 2), np.log10(2e3), 200)
    axes.plot(x, np.minimum(peak, x * bandwidth / 1e3), color="black", linewidth=1)
    for name in dict.fromkeys(p for _, _, p in points):
        mine = [(i, rate) for i, rate, p in points if p == name]
        axes.scatter(*zip(*mine, strict=True), s=14, color=colours[name], label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("live floating-point operations for each byte that must move")
    axes.set_ylabel("TFLOP/s, live taps")
    axes.set_title(
        f"{some[0].device}: {peak:.3g} TFLOP/s {dtype} product, {bandwidth:.4g} GB/s copy",
        fontsize=9,
    )
    axes.legend(fontsize=7)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Write reports; 0, 1 where --check finds a difference, 2 where the input does not allow it."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("rows", nargs="*", type=Path, help="files of rows (default: bench/data)")
    parser.add_argument("--out", type=Path, help="folder for report.md and plots")
    parser.add_argument("--readme", type=Path, help="file with the markers")
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--against", type=Path, metavar="FILE", help="rows of another run")
    options = parser.parse_args(argv)
    files = options.rows or sorted(DATA.glob("*.csv"))
    try:
        if not files:
            raise ReportError(
                "no rows: name files, or measure with python -m bench.run --suite cpu "
                "--out bench/data"
            )
        found = [r for file in files for r in rows.read(file)]
        if options.check and options.readme is None:
            raise ReportError("--check needs --readme FILE")
        if options.readme is not None:
            text = options.readme.read_text("utf-8")
            new = between_markers(text, readme_table(found))
            if options.check:
                if new != text:
                    print(
                        f"{options.readme.name} differs from the rows; run python -m bench.report "
                        f"--readme {options.readme.name}",
                        file=sys.stderr,
                    )
                    return 1
            elif new != text:
                write_text(options.readme, new)
        if options.out is not None and not options.check:
            write_text(options.out / "report.md", full_report(found))
            plots(found, options.out)
        if options.against is not None:
            print("\n".join(spread(found, rows.read(options.against))))
        elif options.out is None and options.readme is None:
            print(full_report(found), end="")
    except (ValueError, OSError) as error:
        print(f"bench.report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
