"""Photos and masks in folders, found by their names."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

from deeplab_fast.data.datasets.base import Sample
from deeplab_fast.data.images import IMAGE_SUFFIXES

# Formats that keep every value; .npy and .mat hold arrays.
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".npy", ".mat")


# No system opens a longer one.
_LONGEST_PATH = 4096

# Formats that change values (some have lossless forms, which the file name does not tell).
_LOSSY_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".jp2", ".avif")


def folder_with(name: str, root: Path, inside: Sequence[str], needed: Sequence[str]) -> Path:
    """The first of ``root / inside`` that holds all the folders ``needed``."""
    places = [root / place if place else root for place in inside]
    for place in places:
        if all((place / part).is_dir() for part in needed):
            return place
    raise FileNotFoundError(
        f"{name}: no data below {root}: looked for the folders {' and '.join(needed)} in "
        f"{', '.join(map(str, places))}"
    )


def lines_of(name: str, path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{name}: the list of images {path} is missing")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: {path} is no text in UTF-8; expected a list of names, one a line"
        ) from error
    return [line.strip() for line in content.splitlines() if line.strip()]


def nfc(name: str) -> str:
    """One form of a name that Unicode can write in several."""
    return unicodedata.normalize("NFC", name)


def on_disk(path: Path, listings: dict[Path, dict[str, str]]) -> Path:
    """The file of this name in whichever form of Unicode it has; the path itself without one.

    ``listings`` keeps what was read of folders.
    """
    text = os.fspath(path)
    if text.isascii() or len(text) > _LONGEST_PATH or os.path.exists(path):
        return path
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if os.path.lexists(found / part):
            found /= part
            continue
        if found not in listings:
            names = sorted(os.listdir(found)) if os.path.isdir(found) else []
            listings[found] = {nfc(name): name for name in names}
        found /= listings[found].get(nfc(part), part)
    return found


def by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """Files by stem in NFC; where suffixes clash the one that ``suffixes`` names first."""
    rank = {suffix: i for i, suffix in enumerate(suffixes)}
    found: dict[str, Path] = {}
    if folder.is_dir():
        for name in sorted(os.listdir(folder)):
            # Texts: a Path for each of 100,000 names, several times, takes ten seconds.
            stem, suffix = os.path.splitext(name)
            order = rank.get(suffix.lower())
            if order is None or name.startswith("."):
                continue
            path, have = folder / name, found.get(nfc(stem))
            if have is not None and have.stem != stem:
                raise ValueError(
                    f"{have} and {path} have the same name in two forms of Unicode; remove one"
                )
            if have is None or order < rank[have.suffix.lower()]:
                found[nfc(stem)] = path
    return found


# A missing file stays in the list, under the name it should have: reading it names it, and
# check_dataset reports all of them at once. So does one of a format that masks cannot have.
def listed_path(found: Mapping[str, Path], folder: Path, stem: str, suffix: str) -> Path:
    return found.get(nfc(stem), folder / f"{stem}{suffix}")


def masks_by_stem(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Masks by stem, and with those that cannot be any where there is no other."""
    found = by_stem(folder, MASK_SUFFIXES)
    return found, {**by_stem(folder, _LOSSY_SUFFIXES), **found}


def photos_by_stem(
    name: str, folder: Path, left_out: Container[Path] = frozenset()
) -> dict[str, Path]:
    """The photos of a folder by stem in NFC, which each must have for itself."""
    files: dict[str, Path] = {}
    for entry in sorted(os.listdir(folder)) if folder.is_dir() else []:
        stem, suffix = os.path.splitext(entry)
        if suffix.lower() not in IMAGE_SUFFIXES or entry.startswith("."):
            continue
        path, stem = folder / entry, nfc(stem)
        if path in left_out:
            continue
        if stem in files:
            raise ValueError(
                f"{name}: {files[stem]} and {path} have the same stem, so one mask would "
                "belong to both; rename one, or use a csv of pairs"
            )
        files[stem] = path
    return files


def pairs_of(
    name: str,
    photos: Path,
    masks: Path,
    *,
    suffix: str = "",
    left_out: Container[Path] = frozenset(),
) -> list[Sample]:
    """Every photo with the mask of the same stem and ``suffix``; at least one must have one.

    ``left_out`` are files that are no photos.
    """
    found, listed = masks_by_stem(masks)
    files = photos_by_stem(name, photos, left_out)
    if not {nfc(stem + suffix) for stem in files} & set(found):
        same = f"a photo NAME and a mask NAME{suffix}" if suffix else "a photo and a mask"
        raise FileNotFoundError(
            f"{name}: no pair of {same} with the same stem: {len(files)} photos in "
            f"{photos} (looked for {' '.join(sorted(IMAGE_SUFFIXES))}), {len(found)} masks in "
            f"{masks} (looked for {' '.join(MASK_SUFFIXES)})"
            + _examples(files, found)
            + _why_lossy(listed, found)
        )
    return [
        Sample(path.stem, path, listed_path(listed, masks, path.stem + suffix, ".png"))
        for _, path in sorted(files.items())
    ]


def _examples(photos: Mapping[str, Path], masks: Mapping[str, Path]) -> str:
    if not photos or not masks:
        return ""
    return f"; the first are {min(photos.values()).name} and {min(masks.values()).name}"


def _why_lossy(listed: Mapping[str, Path], found: Mapping[str, Path]) -> str:
    lossy = [listed[stem].suffix for stem in listed if stem not in found]
    if not lossy:
        return ""
    return (
        f"; {len(lossy)} files there ({' '.join(sorted(set(lossy)))}) count for nothing, as such "
        "formats change class numbers: store masks as PNG"
    )
