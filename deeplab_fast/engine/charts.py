"""Charts of a training run, by matplotlib: losses, mIoU and learning rate; IoU by class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from deeplab_fast.engine.history import IOU_PREFIX, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["class_chart", "curves_chart", "figure_writer"]

_TRAIN, _VAL, _RATE = "#4477aa", "#cc6677", "#117733"
# More classes are rows of a heat map.
_LINES = 12


def curves_chart(history: History, title: str = "") -> Figure:
    """Losses of training and validation, mIoU and pixel accuracy in percent, and learning rate.

    All are over the steps of the optimizer. The losses of single steps are pale, with their running
    mean where there are 40 or more, else with the means between validations; the best mIoU is
    marked.

    Raises:
        ModuleNotFoundError: no matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), dpi=110, layout="constrained")
    losses, scores, rates = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": (3, 3, 1.4)}
    )
    figure.suptitle(_plain(title), fontsize=11)
    _losses(losses, history)
    _scores(scores, history)
    told = [(row["step"], row["lr"]) for row in history.steps if "lr" in row]
    # A short run has one line: a point, which without a mark is nothing.
    mark = "." if len(told) < 40 else ""
    rates.plot(*zip(*told, strict=True), color=_RATE, lw=1.5, marker=mark)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.grid(alpha=0.3)
    rates.spines[["top", "right"]].set_visible(False)
    rates.set_xlabel("step")
    return figure


def _losses(axes: Axes, history: History) -> None:
    steps = np.array([row["step"] for row in history.steps])
    # The validation's loss is that of the classifier alone.
    name = "train/main" if any("train/main" in row for row in history.steps) else "train/loss"
    values = np.array([row.get(name, math.nan) for row in history.steps], dtype=float)
    what = "training, classifier" if name == "train/main" else "training"
    axes.plot(
        steps, values, color=_TRAIN, alpha=0.3, lw=0.8, marker="." if len(values) < 40 else ""
    )
    if len(values) >= 40:
        half = max(2, len(values) // 50)
        smooth = _running_mean(values, half)
        label = f"{what} (mean of {2 * half + 1} logged steps)"
        axes.plot(steps, smooth, color=_TRAIN, lw=1.8, label=label)
    elif history.validations:
        means = history.column("train/mean_loss")
        label = "training (mean since the validation before)"
        axes.plot(_validated(history), means, color=_TRAIN, lw=1.5, marker="o", ms=4, label=label)
    checked = history.column("val/loss")
    if checked:
        steps_of = _validated(history)
        axes.plot(steps_of, checked, color=_VAL, lw=1.5, marker="o", ms=4, label="validation")
    axes.set_ylabel("loss")
    known = values[np.isfinite(values)]
    if len(known) >= 40:
        # Single steps far above all others would flatten the rest.
        tops = [np.percentile(known, 99), *(v for v in checked if math.isfinite(v))]
        axes.set_ylim(0, 1.1 * max(tops))
    else:
        axes.set_ylim(bottom=0)
    _finished(axes)


def _scores(axes: Axes, history: History) -> None:
    steps = _validated(history)
    axes.set_ylabel("validation, %")
    if not steps:
        axes.text(0.5, 0.5, "no validation yet", ha="center", transform=axes.transAxes)
        return
    miou = history.column("val/miou", percent=True)
    accuracy = history.column("val/pixel_accuracy", percent=True)
    axes.plot(steps, accuracy, color="#999999", lw=1.2, marker=".", label="pixel accuracy")
    axes.plot(steps, miou, color=_VAL, lw=1.8, marker="o", ms=4, label="mIoU")
    best = history.best()
    if best is not None:
        axes.plot(
            steps[best],
            miou[best],
            color=_VAL,
            marker="*",
            ms=14,
            ls="none",
            label=f"best mIoU: {miou[best]:.2f} % at step {steps[best]:.0f}",
        )
    _finished(axes)


def class_chart(history: History, title: str = "") -> Figure:
    """IoU of every class in percent at each validation, the last validation's best first.

    Lines up to 12 classes, a heat map of more. Classes without any IoU are named below.

    Raises:
        ModuleNotFoundError: no matplotlib.
    """
    from matplotlib.figure import Figure

    names = history.classes
    values = {name: history.column(IOU_PREFIX + name, percent=True) for name in names}
    shown = [name for name in names if np.isfinite(values[name]).any()]
    shown.sort(key=lambda name: -_last(values[name]))
    absent = [name for name in names if name not in shown]
    many = len(shown) > _LINES
    height = 1.6 + 0.2 * len(shown) if many else 6
    figure = Figure(figsize=(9, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    figure.suptitle(_plain(title), fontsize=11)
    if many:
        _heat_map(figure, axes, history, {name: values[name] for name in shown})
    else:
        _class_lines(axes, history, {name: values[name] for name in shown})
    if absent:
        listed = ", ".join(map(_plain, absent[:12])) + (
            f" and {len(absent) - 12} more" if absent[12:] else ""
        )
        axes.set_xlabel(f"step\nin neither labels nor predictions: {listed}", wrap=True)
    else:
        axes.set_xlabel("step")
    return figure


def _class_lines(axes: Axes, history: History, values: dict[str, list[float]]) -> None:
    from matplotlib import colormaps

    # Ten strong colours, then the same ones light.
    twenty = colormaps["tab20"].colors  # type: ignore[attr-defined]
    colours = [*twenty[::2], *twenty[1::2]]
    best = history.best()
    for (name, row), colour in zip(values.items(), colours, strict=False):
        axes.plot(
            _validated(history),
            row,
            color=colour,
            lw=1.6,
            marker="o",
            ms=3.5,
            label=f"{_plain(name)}  {_last(row):.1f}" + _at(row, best),
        )
    title = "last IoU, %"
    if best is not None:
        axes.axvline(_validated(history)[best], color="#888888", lw=1, ls="--")
        title += ", and at\nthe best mIoU (dashed)"
    axes.set_ylabel("IoU, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if values:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title=title)


def _heat_map(figure: Figure, axes: Axes, history: History, values: dict[str, list[float]]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps = _validated(history)
    image = axes.imshow(
        np.ma.masked_invalid(list(values.values())),
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=100,
        cmap="viridis",
    )
    axes.set_yticks(
        range(len(values)), [f"{_plain(name)}  {_last(row):.1f}" for name, row in values.items()]
    )
    axes.tick_params(axis="y", labelsize=8)

    def step_at(place: float, position: int | None) -> str:
        index = round(place)
        return f"{steps[index]:.0f}" if 0 <= index < len(steps) else ""

    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(step_at))
    figure.colorbar(image, ax=axes, label="IoU, %", shrink=min(1.0, 20 / len(values)))


def _finished(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _plain(text: str) -> str:
    """As matplotlib shows it as it is: no formula, and not left out of a legend."""
    return (text.strip("_") or text).replace("$", r"\$")


def _validated(history: History) -> list[float]:
    return [row["step"] for row in history.validations]


def _at(values: list[float], best: int | None) -> str:
    """The value of the best validation, for behind the last one."""
    if best is None:
        return ""
    return f"  ({values[best]:.1f})" if math.isfinite(values[best]) else "  (-)"


def _last(values: list[float]) -> float:
    """The last that there is."""
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Of 2 half + 1 values, of fewer at the ends; nan counts for nothing."""
    known = np.isfinite(values)
    window = np.ones(2 * half + 1)
    sums = np.convolve(np.where(known, values, 0.0), window, mode="full")[half:-half]
    counts = np.convolve(known, window, mode="full")[half:-half]
    return np.divide(sums, counts, out=np.full(len(values), math.nan), where=counts > 0)


def figure_writer(figure: Figure) -> Callable[[BinaryIO], Any]:
    """Writes the chart as PNG into an open file."""

    def write(file: BinaryIO) -> None:
        with warnings.catch_warnings():
            # Of scripts that matplotlib's font does not have.
            warnings.filterwarnings("ignore", r".*Glyph .* missing from")
            figure.savefig(file, format="png")

    return write
