"""Data of one's own: folders of pairs, tables of pairs."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from deeplab_fast.data.datasets.base import Sample, SegmentationDataset
from deeplab_fast.data.datasets.files import (
    MASK_SUFFIXES,
    masks_by_stem,
    nfc,
    on_disk,
    pairs_of,
    photos_by_stem,
)
from deeplab_fast.data.datasets.layout import Layout, Spec
from deeplab_fast.data.datasets.splits import PARTS, Split
from deeplab_fast.data.images import IMAGE_SUFFIXES

__all__ = ["CSV", "FOLDER", "IMAGE_FOLDERS", "MASK_FOLDERS"]

IMAGE_FOLDERS = ("images", "imgs", "img", "image", "photos", "JPEGImages")
"""Names of folders of photos, the first before the others."""

MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "SegmentationClass", "gt")
"""Names of folders of masks, the first before the others."""

# Names of a part's folder.
_PART_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}

# What is usual at the end of a mask's name, behind its photo's.
_MASK_WORDS = frozenset(
    {
        *("mask", "masks", "label", "labels", "labelid", "labelids", "l", "seg", "segmentation"),
        *("gt", "groundtruth", "ground_truth", "annotation", "annotations", "anno", "annot"),
        *("annots",),
    }
)


@dataclass(frozen=True)
class _Place:
    """A folder of photos and one of masks, which may be the same."""

    photos: Path
    masks: Path


def _folder_of_pairs(root: Path, split: str | None, spec: Spec) -> SegmentationDataset:
    how = Split.of(spec)
    split = "val" if split is None and how.asked else split
    names = spec.pop("images", None), spec.pop("masks", None)
    suffix = spec.pop("mask_suffix", None)
    place = _place(root, *names)
    parts = _parts(root, place, names)
    # Photos that lie in the folder itself go before its parts; scenes are no parts.
    own = place is not None and (not parts.keys() & _PART_NAMES.keys() or _pictures(place.photos))
    direct = place if own else None
    if place is None and not parts:
        raise _nothing(root)
    if how.asked and direct is None and (split not in PARTS or set(PARTS) <= set(parts)):
        raise ValueError(
            f"folder: {root} has the parts {', '.join(parts)}; --val-fraction is "
            "for pairs without parts: leave it out"
        )
    if split is None and direct is None:
        if "val" not in parts:
            raise ValueError(
                f"folder: {root} has the parts {', '.join(parts)} and no val; name one with "
                "--split, or all"
            )
        split = "val"
    notes: list[str] = []
    split_here = False
    part = None if split is None else _part_name(split, parts)
    if split in (None, "all"):
        split = None
        if direct is not None:
            samples = _pairs(direct, suffix, notes)
            if parts and _pictures(direct.photos):
                notes.append(_parts_left_out(direct, parts))
        else:
            samples = [
                replace(sample, name=f"{part}/{sample.name}")
                for part, inside in parts.items()
                for sample in _pairs(inside, suffix, notes)
            ]
    elif part is not None and not (part == "train" and how.asked):
        samples = _pairs(parts[part], suffix, notes)
        if direct is not None and (beside := len(_pictures(direct.photos))):
            notes.append(
                f"{beside} pictures in {direct.photos} itself are not taken, as there are the "
                f"parts {', '.join(parts)}; --split all takes them instead of the parts"
            )
    else:
        # Of "train" alone a part may be taken away.
        inside = direct or (parts.get("train") if how.asked else None)
        if inside is None or split not in PARTS:
            raise _no_part(root, split, parts)
        assert split is not None
        samples, told = how.part(_pairs(inside, suffix, notes), split, str(root))
        notes += [told] if told else []
        if direct is not None and parts and _pictures(direct.photos):
            notes.append(_parts_left_out(direct, parts))
        split_here = True
    dataset = SegmentationDataset(samples, name=root.resolve().name, split=split, **spec)
    dataset.notes, dataset.split_here = tuple(notes), split_here
    return dataset


def _parts_left_out(direct: _Place, parts: dict[str, _Place]) -> str:
    return f"the pairs in {', '.join(parts)} of {direct.photos} are not taken"


def _place(root: Path, images: str | None, masks: str | None) -> _Place | None:
    """The folders of photos and masks, None where neither is there."""
    photos = _named(root, images, IMAGE_FOLDERS, "photos", "images")
    labels = _named(root, masks, MASK_FOLDERS, "masks", "masks")
    if photos is not None and labels is not None:
        return _Place(photos, labels)
    if photos is not None:
        return _Place(photos, photos)
    if _pictures(root):
        return _Place(root, labels or root)
    return None


def _named(
    root: Path, given: str | None, allowed: Sequence[str], what: str, option: str
) -> Path | None:
    inside = {name: root / name for name in _folders(root)}
    if given is not None:
        path = on_disk(root / given, {})
        if not path.is_dir():
            raise FileNotFoundError(
                f"folder: no folder {given} of {what} in {root} (--{option}); there are: "
                f"{', '.join(inside) or 'none'}"
            )
        return path
    if allowed[0] in inside:
        return inside[allowed[0]]
    wanted = [name.casefold() for name in allowed]
    found = [name for name in inside if nfc(name).casefold() in wanted]
    if len(found) > 1:
        raise ValueError(
            f"folder: {root} has several folders that may hold the {what}: {', '.join(found)}; "
            f"name one with --{option}"
        )
    return inside[found[0]] if found else None


def _parts(
    root: Path, place: _Place | None, names: tuple[str | None, str | None]
) -> dict[str, _Place]:
    """Parts by name: folders within those of photos and masks, or such that hold both."""
    inside = {} if place is None or place.photos == place.masks == root else _inside(place)
    found = {_common(name): each for name, each in inside.items()}
    if found:
        return found
    folders = _folders(root)
    for part, aliases in _PART_NAMES.items():
        for alias in aliases:
            if alias not in folders or part in found:
                continue
            # train_labels, trainannot: beside the part's photos.
            labels = [name for name in folders if name.startswith(alias) and name != alias]
            labels = [name for name in labels if _is_mask_word(name[len(alias) :])]
            if len(labels) == 1 and names == (None, None):
                found[part] = _Place(root / alias, root / labels[0])
            elif (within := _place(root / alias, *names)) is not None:
                found[part] = within
    return found


def _inside(place: _Place) -> dict[str, _Place]:
    """The folders that those of photos and of masks both have, by name."""
    labels = {nfc(name): name for name in _folders(place.masks)}
    return {
        nfc(name): _Place(place.photos / name, place.masks / labels[nfc(name)])
        for name in _folders(place.photos)
        if nfc(name) in labels
    }


def _common(name: str) -> str:
    """The usual name of a part: "val" of "validation"."""
    for part, aliases in _PART_NAMES.items():
        if name.casefold() in aliases:
            return part
    return name


def _part_name(split: str, parts: dict[str, _Place]) -> str | None:
    for name in (nfc(split), _common(nfc(split))):
        if name in parts:
            return name
    return None


def _pairs(place: _Place, suffix: str | None, notes: list[str]) -> list[Sample]:
    """The pairs of two folders; without any photo in them those of the folders in both."""
    if not _pictures(place.photos) and place.photos != place.masks:
        found = [
            replace(sample, name=f"{name}/{sample.name}")
            for name, inside in _inside(place).items()
            for sample in _pairs(inside, suffix, notes)
        ]
        if found:
            return found
    if place.photos == place.masks:
        return _pairs_in_one(place.photos, suffix, notes)
    masks, _ = masks_by_stem(place.masks)
    if suffix is None:
        photos = photos_by_stem("folder", place.photos)
        suffix = _mask_suffix(photos, masks, place.masks)
        _tell_names(place, suffix, notes)
    return pairs_of("folder", place.photos, place.masks, suffix=_stem(suffix))


def _tell_names(place: _Place, suffix: str, notes: list[str]) -> None:
    if suffix:
        text = f"the mask of NAME in {place.photos} is NAME{suffix} in {place.masks}"
        notes += [text] if text not in notes else []


def _stem(suffix: str) -> str:
    """A suffix without a file's."""
    for end in MASK_SUFFIXES:
        if suffix.lower().endswith(end):
            return suffix[: -len(end)]
    return suffix


def _mask_suffix(photos: Iterable[str], masks: Iterable[str], folder: Path) -> str:
    """What the masks' names have behind the photos', "" for nothing."""
    known = set(photos)
    counts = _suffixes(known, masks)
    likely = {
        end: count
        for end, count in counts.items()
        if not end or _is_mask_word(end) or 2 * count >= len(known)
    }
    return _only(likely, folder)


def _suffixes(photos: set[str], masks: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for mask in masks:
        for end in range(len(mask), 0, -1):
            if mask[:end] in photos:
                counts[mask[end:]] += 1
                break
    return counts


def _is_mask_word(end: str) -> bool:
    return end.casefold().lstrip("-_. ") in _MASK_WORDS


def _only(counts: dict[str, int], folder: Path) -> str:
    if len(counts) > 1:
        shown = ", ".join(
            f"{'NAME' + end} ({count})" for end, count in sorted(counts.items(), key=lambda e: e[0])
        )
        raise ValueError(
            f"folder: several masks of a photo NAME in {folder}: {shown}; choose with "
            f"--mask-suffix={max(counts, key=lambda end: (len(end), end))}"
        )
    return next(iter(counts), "")


def _pairs_in_one(folder: Path, suffix: str | None, notes: list[str]) -> list[Sample]:
    """Photos and masks beside each other: NAME.jpg with NAME_mask.png, or with NAME.png."""
    files = _pictures(folder, arrays=True)
    stems = {nfc(path.stem) for path in files}
    if suffix is None:
        found = Counter(
            {end: count for end, count in _suffixes_in_one(stems).items() if _is_mask_word(end)}
        )
        suffix = _only(found, folder)
    suffix = _stem(suffix)
    if suffix:
        is_mask = {path for path in files if _ends(path, suffix)}
    else:
        # Of one stem the file that keeps numbers is the mask of the one that does not.
        by_stem = Counter(nfc(path.stem) for path in files)
        is_mask = {
            path
            for path in files
            if path.suffix.lower() in MASK_SUFFIXES and by_stem[nfc(path.stem)] == 2
        }
        others = {nfc(path.stem) for path in set(files) - is_mask}
        if not is_mask or not {nfc(path.stem) for path in is_mask} <= others:
            raise FileNotFoundError(
                f"folder: {folder} has {len(files)} pictures and no folder of masks beside it, and "
                "their names do not tell photos from masks: looked for NAME_mask, NAME_label, "
                "NAME_gt and the like, and for NAME.png beside NAME.jpg; tell it with "
                "--mask-suffix, name the folders with --images and --masks, or list "
                "the pairs in a .csv"
            )
    text = f"photos and masks are in one folder, {folder}: the mask of NAME is NAME{suffix}"
    text += "" if suffix else " in a format that keeps numbers"
    notes += [text] if text not in notes else []
    if not suffix:
        masks = {nfc(path.stem): path for path in is_mask}
        photos = photos_by_stem("folder", folder, is_mask)
        return [
            Sample(path.stem, path, masks.get(stem, folder / f"{path.stem}.png"))
            for stem, path in sorted(photos.items())
        ]
    return pairs_of("folder", folder, folder, suffix=suffix, left_out=is_mask)


def _suffixes_in_one(stems: set[str]) -> Counter[str]:
    """As :func:`_suffixes` where the masks are among the photos."""
    counts: Counter[str] = Counter()
    for stem in stems:
        for end in range(len(stem) - 1, 0, -1):
            if stem[:end] in stems:
                counts[stem[end:]] += 1
                break
    return counts


def _ends(path: Path, suffix: str) -> bool:
    stem = nfc(path.stem)
    return stem.endswith(nfc(suffix)) and path.suffix.lower() in MASK_SUFFIXES


def _pictures(folder: Path, *, arrays: bool = False) -> list[Path]:
    suffixes = IMAGE_SUFFIXES | (set(MASK_SUFFIXES) if arrays else set())
    return [
        Path(entry.path)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
        if not entry.name.startswith(".")
        and os.path.splitext(entry.name)[1].lower() in suffixes
        and _is(entry.is_file)
    ]


def _folders(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if not entry.name.startswith(".") and _is(entry.is_dir)
    )


def _is(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind, which a link that leads to itself is not."""
    try:
        return kind()
    except OSError:
        return False


def _nothing(root: Path) -> FileNotFoundError:
    folders = ", ".join(_folders(root)) or "(none)"
    return FileNotFoundError(
        f"folder: no pairs in {root}: looked for a folder of photos ({', '.join(IMAGE_FOLDERS)}) "
        f"and one of masks ({', '.join(MASK_FOLDERS)}), for such in train and val, and for "
        f"photos and masks beside each other; there are the folders {folders} and "
        f"{len(_pictures(root))} pictures; name the folders with --images and --masks, or list the "
        "pairs in a .csv"
    )


def _no_part(root: Path, split: str, parts: dict[str, _Place]) -> FileNotFoundError:
    if not parts:
        return FileNotFoundError(
            f"folder: no folder of photos and of masks in {root} for the split {split!r}, and no "
            "other parts; without a split all is taken, and train and val are made by "
            "--val-fraction"
        )
    more = ""
    if split == "val" and "train" in parts:
        more = (
            "; --val-fraction 0.2 keeps a fifth of train for validation, --val-data FOLDER names "
            "other data, --val-every 0 does without"
        )
    return FileNotFoundError(
        f"folder: no folder of photos and of masks in {root} for the split {split!r}; there are: "
        f"{', '.join(parts)}{more}"
    )


def _csv(root: Path | None, split: str | None, spec: Spec) -> SegmentationDataset:
    how = Split.of(spec)
    split = "val" if split is None and how.asked else split
    file = spec.pop("file", None)
    if file is None:
        raise ValueError("csv: file is missing: which table lists the pairs?")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"csv: {path}: no such file")
    base = path.parent if root is None else root
    wanted = None if split == "all" else split
    with open(path, newline="", encoding="utf-8-sig") as opened:
        table = _Table(opened, path)
        columns = table.columns
        made_here = "split" not in columns and wanted in PARTS
        needed = ["image", "mask", *([] if wanted is None or made_here else ["split"])]
        missing = [column for column in needed if column not in columns]
        if missing:
            raise ValueError(
                f"{path}: the column {' and '.join(missing)} is missing; the first line must name "
                f"image,mask[,split], it reads {','.join(columns)!r:.100}"
            )
        twice = [column for column in needed if columns.count(column) > 1]
        if twice:
            raise ValueError(
                f"{path}: the column {' and '.join(twice)} is there twice; the first line must "
                "name image,mask[,split] once each"
            )
        if "split" in columns and how.asked:
            raise ValueError(
                f"{path} has a column split; --val-fraction is for tables without: leave it out"
            )
        samples, splits = [], set()
        listings: dict[Path, dict[str, str]] = {}
        for row in table:
            values = {key: row.get(key, "") for key in (*needed, "split")}
            if odd := next((v for v in values.values() if _NO_NAME.search(v)), None):
                raise table.error(
                    f"{odd!r:.100} is no name: it has a line break or NUL; expected a path a "
                    "field, so close the quotes that are open"
                )
            if not values["image"] or not values["mask"]:
                raise table.error("image and mask must both be given")
            splits.add(values["split"])
            if wanted is None or made_here or values["split"] == wanted:
                image, mask = (on_disk(base / values[name], listings) for name in ("image", "mask"))
                samples.append(Sample(values["image"], image, mask))
    if not samples:
        there = ", ".join(sorted(splits)[:_MOST_NAMED]) + (
            ", ..." if len(splits) > _MOST_NAMED else ""
        )
        which = f" of the split {wanted!r} (there are: {there:.500})"
        raise ValueError(f"{path}: no pair{which if wanted else ''}")
    told = ""
    if made_here:
        assert wanted is not None
        samples, told = how.part(samples, wanted, str(path))
    dataset = SegmentationDataset(samples, name=path.stem, split=wanted, **spec)
    dataset.notes, dataset.split_here = ((told,) if told else ()), made_here
    return dataset


# Splits that a message lists.
_MOST_NAMED = 10

_NO_NAME = re.compile(r"[\0\r\n]")

# Characters of a line: two paths are shorter.
_LONGEST_LINE = 1 << 16


class _Table:
    """The rows of a table with a first line of names; errors name the line."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path = file, path
        self.line = 0
        self.rows = csv.reader(self.lines(), skipinitialspace=True)
        # As empty ones between the rows.
        first = next((row for row in self.checked() if row), [])
        self.columns = [column.strip() for column in first]

    def __iter__(self) -> Iterator[dict[str, str]]:
        for row in self.checked():
            if row:
                values = (value.strip() for value in row)
                yield dict(zip(self.columns, values, strict=False))

    def checked(self) -> Iterator[list[str]]:
        while True:
            try:
                row = next(self.rows, None)
            except csv.Error as error:
                raise self.error(
                    f"{error}; expected fields apart by commas, quotes in pairs"
                ) from error
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path} is no text in UTF-8 (byte {error.object[error.start]:#04x}); "
                    "store it as CSV in UTF-8"
                ) from error
            if row is None:
                return
            yield row

    def lines(self) -> Iterator[str]:
        while line := self.file.readline(_LONGEST_LINE + 1):
            self.line += 1
            if len(line) > _LONGEST_LINE:
                raise self.error(
                    f"more than {_LONGEST_LINE} characters; expected a line for each pair"
                )
            yield line

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path}, line {self.line}: {what}")


_OF_BOTH = ("mask_colours", "unknown_colours", *Split.OPTIONS)


FOLDER = Layout(
    _folder_of_pairs,
    (),
    "a folder of images and a folder of masks",
    options=("images", "masks", "mask_suffix", *_OF_BOTH),
)


CSV = Layout(_csv, (), "the files that the table lists", options=("file", *_OF_BOTH))
