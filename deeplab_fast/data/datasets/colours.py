"""Colours that stand for classes in masks."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deeplab_fast._documents import DocumentError, read_document, read_text, shown
from deeplab_fast.data.classes import CLASS_SETS, ClassSet, Colour, class_set, same_name

__all__ = [
    "VOID_NAMES",
    "MaskColours",
    "classes_of_colours",
    "colour_file",
    "colour_ids",
    "read_colours",
]

MaskColours = Mapping[Any, Any]
"""Class (name or id) -> its colour (R, G, B), or several of them."""

VOID_NAMES = frozenset({"void", "ignore", "ignored", "unlabelled", "unlabeled", "unknown"})
"""Names that stand for the ignored label, where no class is named so."""

# What the published masks paint the pixels that do not count with.
_VOID_OF_SET: dict[str, Colour] = {
    "voc": (224, 224, 192),
    "coco-voc": (224, 224, 192),
    "cityscapes": (0, 0, 0),
    "ade20k": (0, 0, 0),
    "camvid": (0, 0, 0),
}

_FORMS = (
    "a line a class, 'name r g b', 'name,r,g,b' or 'r g b name' with 0..255, or a JSON or YAML "
    "mapping of name to [r, g, b]"
)


def read_colours(
    source: str | os.PathLike[str] | ClassSet | MaskColours,
) -> dict[Any, list[Colour]]:
    """The colours of classes by name, in the order of the source.

    Args:
        source: the name of a built-in class set, with the colour that its published masks have
            where nothing counts; a ``ClassSet``; a mapping of class name (or id) to (R, G, B) or a
            list of such; or a file. ``.json``, ``.yaml`` and ``.yml`` hold such a mapping, a list
            of mappings with ``name`` and ``color`` (or ``colour``), or ``classes`` and ``palette``
            as ``class_set`` reads them. Any other file has a line a class: name and three numbers
            of 0..255 in either order, apart by commas, semicolons, tabs or spaces (names may have
            spaces), or name and ``#rrggbb``, or as CVAT writes it, ``name:r,g,b:...``; a first line
            without numbers, empty ones and, but for such colours, those that start with # are
            skipped.

    Raises:
        ValueError: a name that is no set, or content of none of these forms; says which.
        FileNotFoundError: no such file.
    """
    if isinstance(source, Mapping):
        return _of_mapping(source, "mask_colours")
    if isinstance(source, ClassSet):
        return _of_pairs(zip(source.classes, source.palette, strict=True), source.name)
    text = os.fspath(source)
    if text in CLASS_SETS:
        found = read_colours(CLASS_SETS[text])
        return {**found, "void": [_VOID_OF_SET[text]]}
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(
            f"--mask-colours is {text!r}: no such file, and no class set of that "
            f"name ({', '.join(CLASS_SETS)}); a file has {_FORMS}"
        )
    suffix = path.suffix.lower()
    try:
        if suffix in (".json", ".yaml", ".yml"):
            return _of_content(read_document(path), text)
        written = read_text(path)
    except DocumentError as error:
        raise ValueError(f"mask colours {error}") from error
    except OSError as error:
        raise ValueError(f"mask colours {text}: {shown(error, 400)}") from error
    return _of_pairs(_lines(written, text), text)


def colour_file(masks: Path) -> Path | None:
    """A file that may name the colours of these masks, beside their folder or one above."""
    for folder in (masks, *masks.parents[:2]):
        for name in _USUAL_FILES:
            if (folder / name).is_file():
                return folder / name
    return None


_USUAL_FILES = (
    *("class_dict.csv", "label_colors.txt", "labelmap.txt", "_classes.csv", "classes.csv"),
    *("class_dict_seg.csv", "colors.csv", "colors.txt", "colours.csv", "colours.txt"),
)


def classes_of_colours(colours: Mapping[Any, Sequence[Colour]], name: str) -> ClassSet:
    """The classes that colours are of, in their order; names of the ignored label are none.

    Raises:
        ValueError: colours by class id, which name no class.
    """
    names = [each for each in colours if str(each).casefold() not in VOID_NAMES]
    if not names or not all(isinstance(each, str) for each in names):
        raise ValueError(f"{name}: the colours name no classes; give their names with --classes")
    return ClassSet(name, tuple(names), tuple(colours[each][0] for each in names))


def colour_ids(
    colours: Mapping[Any, Sequence[Colour]], classes: ClassSet, ignore_index: int
) -> dict[Colour, int]:
    """Class ids (or ``ignore_index``) by colour.

    Raises:
        ValueError: a name that is no class, or a colour of two classes.
    """
    found: dict[Colour, int] = {}
    unknown = []
    for name, of_class in colours.items():
        label = _label(name, classes, ignore_index)
        if label is None:
            unknown.append(str(name))
            continue
        for colour in of_class:
            if found.setdefault(colour, label) != label:
                raise ValueError(
                    f"--mask-colours gives {colour} to two classes, "
                    f"{_name(found[colour], classes)} and {name}; each colour stands for one"
                )
    if unknown:
        raise ValueError(
            f"--mask-colours names {', '.join(unknown)}, which "
            f"{'is no class' if len(unknown) == 1 else 'are no classes'}; there are: "
            f"{', '.join(classes.classes)}, and void for what counts for nothing"
        )
    return found


def _label(name: Any, classes: ClassSet, ignore_index: int) -> int | None:
    for label, known in enumerate(classes.classes):
        if isinstance(name, str) and same_name(name, known):
            return label
    text = str(name)
    if text.casefold() in VOID_NAMES:
        return ignore_index
    label = int(text) if re.fullmatch(r"-?\d+", text) else -1
    return label if 0 <= label < len(classes) or text == str(ignore_index) else None


def _name(label: int, classes: ClassSet) -> str:
    return classes.classes[label] if 0 <= label < len(classes) else "void"


def _of_content(content: object, source: str) -> dict[Any, list[Colour]]:
    if isinstance(content, Mapping) and {"classes", "palette"} <= content.keys():
        return read_colours(class_set(source))
    if isinstance(content, Mapping):
        return _of_mapping(content, source)
    if isinstance(content, list) and all(isinstance(each, Mapping) for each in content):
        return _of_pairs(
            ((each.get("name"), each.get("color", each.get("colour"))) for each in content), source
        )
    raise ValueError(f"mask colours {source}: {content!r:.60}; expected {_FORMS}")


def _of_mapping(content: MaskColours, source: str) -> dict[Any, list[Colour]]:
    pairs = []
    for name, value in content.items():
        many = isinstance(value, (list, tuple)) and value and not isinstance(value[0], int)
        pairs += [(name, each) for each in (value if many else [value])]
    return _of_pairs(pairs, source)


def _of_pairs(pairs: Iterable[tuple[Any, Any]], source: str) -> dict[Any, list[Colour]]:
    found: dict[Any, list[Colour]] = {}
    for name, value in pairs:
        colour = _colour(value)
        if colour is None or name is None or (isinstance(name, str) and not name.strip()):
            raise ValueError(
                f"mask colours {source}: {shown(repr(name))} has the colour {shown(repr(value))}; "
                f"expected {_FORMS}"
            )
        found.setdefault(name.strip() if isinstance(name, str) else name, []).append(colour)
    if not found:
        raise ValueError(f"mask colours {source}: no colour; expected {_FORMS}")
    return found


def _colour(value: object) -> Colour | None:
    if isinstance(value, str):
        match = re.fullmatch(r"#([0-9a-fA-F]{6})", value.strip())
        if match is None:
            return None
        value = tuple(bytes.fromhex(match[1]))
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return None
    good = all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 255 for v in value)
    return (value[0], value[1], value[2]) if good else None


def _lines(content: str, source: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for number, line in enumerate(content.splitlines(), 1):
        parts = _fields(line)
        pair = _pair(parts, apart=any(separator in line for separator in _SEPARATORS))
        if pair is not None:
            found.append(pair)
        # The first line may name the columns.
        elif (
            parts
            and not line.lstrip().startswith("#")
            and (found or any(part.isdecimal() for part in parts))
        ):
            raise ValueError(
                f"mask colours {source}, line {number}: {shown(repr(line.strip()))}; expected "
                f"{_FORMS}"
            )
    return found


_SEPARATORS = (",", ";", "\t")


def _fields(line: str) -> list[str]:
    # CVAT's labelmap.txt.
    if match := re.fullmatch(r"([^:#]+):(\d+),(\d+),(\d+)(?::[^:]*)*", line.strip()):
        return list(match.groups())
    for separator in _SEPARATORS:
        if separator in line:
            row = next(csv.reader(io.StringIO(line), delimiter=separator, skipinitialspace=True))
            fields = [field.strip() for field in row if field.strip()]
            # "64 128 64<tab>Animal" is apart in two ways.
            return [
                word
                for field in fields
                for word in (field.split() if re.fullmatch(r"[\d\s]+", field) else [field])
            ]
    return line.split()


def _pair(parts: Sequence[str], *, apart: bool) -> tuple[str, Any] | None:
    """Name and colour of a line's fields; of one whose fields are ``apart`` the name is one."""
    for colour, name in (
        (parts[-1:], parts[:-1]),
        (parts[:1], parts[1:]),
        (parts[-3:], parts[:-3]),
        (parts[:3], parts[3:]),
    ):
        if not name or (apart and len(name) > 1):
            continue
        if len(colour) == 1 and _colour(colour[0]) is not None:
            return " ".join(name), colour[0]
        if len(colour) == 3 and all(part.isdecimal() for part in colour):
            return " ".join(name), [int(part) for part in colour]
    return None
