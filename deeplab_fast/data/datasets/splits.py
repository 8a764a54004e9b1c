"""Training and validation parts of pairs that have none: by file name, seeded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from deeplab_fast.data.datasets.base import Sample
from deeplab_fast.data.datasets.files import nfc
from deeplab_fast.data.datasets.layout import Spec

__all__ = ["PARTS", "VAL_FRACTION", "Split", "group_of"]

VAL_FRACTION = 0.2
"""Part of the pairs that is for validation where no fraction is given."""

PARTS = ("train", "val")
"""The two parts that pairs are split into."""


@dataclass(frozen=True)
class Split:
    """How pairs are split.

    Groups of pairs (each pair for itself without ``group_by``) are ordered by
    SHA-256(seed, name of the group); from the first on a group is for validation where that brings
    the number of pairs nearer to ``fraction`` of all. So the parts follow from names and seed,
    whatever the order of the files and the place of the folder, and one more pair moves few others.

    Args:
        fraction: of the pairs, 0 to 1; None is ``VAL_FRACTION``. 0 trains on all, 1 validates on
            all.
        seed: any integer.
        group_by: None; "prefix" (see :func:`group_of`); or a regular expression.
        whole: both parts are all pairs.

    Raises:
        ValueError: a fraction outside 0..1, or a pattern that is none.
    """

    fraction: float | None = None
    seed: int = 0
    group_by: str | None = None
    whole: bool = False

    OPTIONS = ("val_fraction", "split_seed", "group_by")

    def __post_init__(self) -> None:
        number = isinstance(self.fraction, (int, float)) and not isinstance(self.fraction, bool)
        if self.fraction is not None and not (number and 0 <= self.fraction <= 1):
            raise ValueError(
                f"--val-fraction is {self.fraction!r}, expected a part of the pairs, 0 to 1: 0.2"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"--split-seed is {self.seed!r}, expected an integer, such as 0")
        if self.group_by is not None and self.group_by != "prefix":
            try:
                re.compile(self.group_by)
            except re.error as error:
                raise ValueError(
                    f"--group-by is {self.group_by!r}, expected prefix or a regular "
                    f"expression ({error})"
                ) from error

    @classmethod
    def of(cls, spec: Spec) -> Split:
        """Takes its options out of those of a data set."""
        fraction, seed, group_by = (spec.pop(name, None) for name in cls.OPTIONS)
        whole = bool(spec.pop("whole", False))
        return cls(fraction, 0 if seed is None else seed, group_by, whole)

    @property
    def asked(self) -> bool:
        """Whether both parts were asked for by a fraction."""
        return self.fraction is not None and 0 < self.fraction < 1

    def part(self, samples: Sequence[Sample], split: str, what: str) -> tuple[list[Sample], str]:
        """The pairs of "train" or "val", in their order, and a line that says how many they are.

        Args:
            what: the data, for messages.

        Raises:
            ValueError: a part would be empty; or a name that the pattern does not match.
        """
        if self.whole:
            return list(samples), ""
        fraction = VAL_FRACTION if self.fraction is None else self.fraction
        if fraction in (0, 1):
            if split != PARTS[int(fraction)]:
                raise ValueError(
                    f"{what}: --val-fraction {fraction:g} leaves nothing for the split {split!r}; "
                    "give a fraction between 0 and 1"
                )
            return list(samples), ""
        chosen = self._for_validation(samples, fraction, what)
        part = [sample for i, sample in enumerate(samples) if (i in chosen) is (split == "val")]
        grouped = f", --group-by {self.group_by}" if self.group_by else ""
        told = (
            f"{what} has no parts train and val: {len(chosen)} of {len(samples)} pairs are for "
            f"validation, chosen by name (--val-fraction {fraction:g}, --split-seed {self.seed}"
            f"{grouped})"
        )
        if self.group_by is None:
            told += _possible_groups(samples)
        return part, told

    def _for_validation(self, samples: Sequence[Sample], fraction: float, what: str) -> set[int]:
        groups: dict[str, list[int]] = {}
        for index, group in enumerate(_groups(samples, self.group_by)):
            groups.setdefault(group, []).append(index)
        if len(groups) < 2:
            (name,) = groups
            why = f", the group {name!r} of --group-by {self.group_by}" if self.group_by else ""
            raise ValueError(
                f"{what}: {len(samples)} pairs{why}, cannot be split into training and validation; "
                "give more pairs" + (", another --group-by" if self.group_by else "") + ", or "
                "--val-fraction 0 and data to validate on by --val-data"
            )
        order = sorted(
            groups, key=lambda name: hashlib.sha256(f"{self.seed}\0{name}".encode()).digest()
        )
        wanted = fraction * len(samples)
        chosen: list[str] = []
        count = 0
        for name in order[:-1]:
            more = count + len(groups[name])
            if abs(more - wanted) < abs(count - wanted):
                chosen, count = [*chosen, name], more
        if not chosen:
            chosen = [min(order, key=lambda name: len(groups[name]))]
        return {index for name in chosen for index in groups[name]}


def _groups(samples: Sequence[Sample], group_by: str | None) -> list[str]:
    """The group of each pair; for "prefix" without the folders that all names begin with."""
    names = [sample.name for sample in samples]
    if group_by == "prefix":
        folders = [name.split("/")[:-1] for name in names]
        first, last = min(folders), max(folders)
        pairs = enumerate(zip(first, last, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))
        names = ["/".join(name.split("/")[shared:]) for name in names]
    return [group_of(name, group_by) for name in names]


def _possible_groups(samples: Sequence[Sample]) -> str:
    """What to say where names look like those of sequences: frames of one are nearly alike."""
    groups = list(dict.fromkeys(_groups(samples, "prefix")))
    if not 2 <= len(groups) <= len(samples) / 4:
        return ""
    shown = ", ".join(groups[:3]) + (", ..." if len(groups) > 3 else "")
    return (
        f"; if the {len(groups)} beginnings of the names ({shown}) are sequences or scenes, "
        "--group-by prefix keeps each on one side"
    )


def group_of(name: str, group_by: str | None) -> str:
    """The group of a pair by its name: the photo's stem, of a table the path as it stands there.

    Args:
        group_by: None is the name itself. "prefix" is what stands before the last of ``_ - . /``
            and space, without a file's suffix: ``0016E5_07959`` is of ``0016E5``, ``clip1/12.jpg``
            of ``clip1`` (a table's names are taken below the folder that they share, as a folder's
            are); of a name without any of them what its last digits follow: ``left012`` is
            of ``left``. Otherwise a regular expression that is searched in the name: its first
            group, or all that it matches.

    Raises:
        ValueError: a pattern that does not match.
    """
    name = nfc(name)
    if group_by is None:
        return name
    if group_by == "prefix":
        stem = re.sub(r"\.[A-Za-z]\w{1,4}$", "", name)
        found = re.match(r"(.*)[-_./ ]", stem, re.DOTALL)
        return found[1] if found else stem.rstrip("0123456789")
    match = re.search(group_by, name)
    if match is None:
        raise ValueError(
            f"--group-by is {group_by!r}, which the name {name!r} does not match; give "
            "a regular expression that is in every name, or prefix"
        )
    return (match[1] or "") if match.re.groups else match[0]
