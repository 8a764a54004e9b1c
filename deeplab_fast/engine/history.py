"""What a training run's metrics.jsonl tells: its steps, its validations, a table of them."""

from __future__ import annotations

import csv
import io
import math
import os
from pathlib import Path
from typing import Any

from deeplab_fast._documents import DocumentError, parse_json

__all__ = ["IOU_PREFIX", "History", "row_of"]

IOU_PREFIX = "val/iou/"
_SHARES = ("val/miou", "val/pixel_accuracy", "val/mean_accuracy", "val/frequency_weighted_iou")


def row_of(line: str) -> dict[str, float] | None:
    """The numbers of a line, with null as nan; None of one that was cut off or is damaged."""
    try:
        found = parse_json(line)
    except DocumentError:
        return None
    if not isinstance(found, dict) or not {"step", "epoch"} <= found.keys():
        return None
    row = {name: math.nan if value is None else value for name, value in found.items()}
    numbers = all(type(value) in (int, float) for value in row.values())
    return row if numbers and math.isfinite(row["step"]) and math.isfinite(row["epoch"]) else None


class History:
    """The lines of ``metrics.jsonl``, of steps and of validations, as :class:`MetricsFile` writes.

    Args:
        path: of the file; it need not exist yet.

    Attributes:
        steps, validations: the lines, with null as nan.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.steps: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self._read = 0

    def update(self) -> None:
        """Reads the lines that were added since the last time."""
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            lines = file.readlines()
        for line in lines:
            self._read += len(line)
            row = row_of(line.decode("utf-8", "replace"))
            if row is None:
                continue
            (self.validations if "val/miou" in row else self.steps).append(row)

    @property
    def classes(self) -> list[str]:
        """Names of the classes that have an IoU in the last validation's line, nan or not."""
        last = self.validations[-1] if self.validations else {}
        return [name.removeprefix(IOU_PREFIX) for name in last if name.startswith(IOU_PREFIX)]

    def column(self, name: str, *, percent: bool = False) -> list[float]:
        """A value of each validation, nan where it has none."""
        factor = 100.0 if percent else 1.0
        return [factor * row.get(name, math.nan) for row in self.validations]

    def best(self) -> int | None:
        """Which validation has the best mIoU, the first of equal ones; None where none has any."""
        miou = self.column("val/miou")
        known = [index for index, value in enumerate(miou) if math.isfinite(value)]
        return max(known, key=lambda index: miou[index]) if known else None

    def table(self) -> list[dict[str, Any]]:
        """A row a validation, for a spreadsheet.

        ``epoch`` (from 1), ``step`` (steps of the optimizer that are done), ``train/loss`` (mean of
        the steps since the validation before), ``val/loss``, ``lr`` (of the last logged step), the
        scores and ``val/iou_percent/NAME`` in percent, ``val/not_finite_pixels``. What
        does not exist is None.
        """
        rows, last = [], 0
        for row in self.validations:
            step = row["step"]
            while last < len(self.steps) and self.steps[last]["step"] <= step:
                last += 1
            values: dict[str, Any] = {
                "epoch": int(row["epoch"]) + 1,
                "step": int(step),
                "train/loss": row.get("train/mean_loss"),
                "val/loss": row.get("val/loss"),
                "lr": self.steps[last - 1].get("lr") if last else None,
            }
            for name in _SHARES:
                values[f"{name}_percent"] = 100 * row.get(name, math.nan)
            for name in row:
                if name.startswith(IOU_PREFIX):
                    title = f"val/iou_percent/{name.removeprefix(IOU_PREFIX)}"
                    values[title] = 100 * row[name]
            values["val/not_finite_pixels"] = row.get("val/not_finite_pixels")
            rows.append({k: None if v != v else v for k, v in values.items()})
        return rows

    def csv(self) -> str:
        """:meth:`table` as text: comma-separated, a head line, four digits of percents."""
        rows = self.table()
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, list(rows[-1]), extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(
                {k: round(v, 4) if "percent" in k and v is not None else v for k, v in row.items()}
                for row in rows
            )
        return text.getvalue()
