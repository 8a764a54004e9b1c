"""Class names and colours of the common data sets, and of the user's own."""

from __future__ import annotations

import functools
import itertools
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deeplab_fast._documents import DocumentError, read_document, read_text, shown

__all__ = [
    "CLASS_SETS",
    "MOST_CLASSES",
    "ClassSet",
    "built_in_name",
    "class_set",
    "distinct_colours",
    "generic_classes",
    "label_count",
    "pascal_colour_map",
    "same_name",
]

Colour = tuple[int, int, int]

MOST_CLASSES = 65535
"""Classes of a set and of a model: ids and the ignored label fit 16 bits, as masks do."""

_LINEAR_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_LMS_TO_OKLAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)

_BACKGROUND_NAMES = ("background", "unlabelled", "unlabeled", "void")


@dataclass(frozen=True)
class ClassSet:
    """Names and colours of the class ids 0..C-1; of one class see :meth:`of_labels`.

    Args:
        name: what the set is called.
        classes: C names, in the order of the ids.
        palette: C colours (R, G, B), each 0..255.
        ignore_index: the label of pixels that count for nothing in training and evaluation, or
            None.

    Raises:
        ValueError: no class, names that are no text, or a palette of another length or range.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    ignore_index: int | None = 255

    def __post_init__(self) -> None:
        classes = tuple(self.classes)
        if not classes or not all(isinstance(name, str) and name for name in classes):
            raise ValueError(
                f"class set {self.name}: expected one or more names, got {shown(classes)}"
            )
        if len(classes) > MOST_CLASSES:
            raise ValueError(
                f"class set {self.name}: {len(classes)} names, expected {MOST_CLASSES} at most"
            )
        palette = tuple(_colour(colour, self.name) for colour in self.palette)
        if len(palette) != len(classes):
            raise ValueError(
                f"class set {self.name}: {len(classes)} names and {len(palette)} colours; "
                "give one colour a class, or none at all"
            )
        if self.ignore_index is not None and not isinstance(self.ignore_index, int):
            raise ValueError(
                f"class set {self.name}: ignore_index is "
                f"{shown(repr(self.ignore_index))}, expected an integer or None"
            )
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "palette", palette)

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def num_classes(self) -> int:
        """C, the number of classes; the ignored label is none of them."""
        return len(self.classes)

    def of_labels(self) -> ClassSet:
        """Names and colours of the label ids: of one class, 0 is background and 1 the class.

        Raises:
            ValueError: the one class is named background.
        """
        if len(self) != 1:
            return self
        if self.background is not None:
            raise ValueError(
                f"class set {self.name}: its only class is {self.classes[0]!r}; name the class "
                "that is to be told from the background"
            )
        names, palette = ("background", *self.classes), ((0, 0, 0), *self.palette)
        return ClassSet(self.name, names, palette, self.ignore_index)

    def ids_of(self, classes: str) -> tuple[int, ...]:
        """The ids of classes that are given as "name,name" or "0,2"; "none": no class.

        Raises:
            ValueError: neither a name of this set nor an id.
        """
        if classes.strip().lower() == "none" and "none" not in self.classes:
            return ()
        found = []
        for part in classes.split(","):
            text = part.strip()
            ids = [i for i, name in enumerate(self.classes) if name == text]
            if not ids and text.isdecimal() and int(text) < len(self):
                ids = [int(text)]
            if not ids:
                raise ValueError(
                    f"{text!r} is no class of {self.name}; there are {', '.join(self.classes)}, or "
                    f"their ids 0..{len(self) - 1}, or none"
                )
            found += ids
        return tuple(found)

    @property
    def background(self) -> int | None:
        """The id of the class that pictures leave unpainted, None without one.

        It is the first one named background, unlabelled, unlabeled or void, whatever the case and
        outer underscores (``__background__``).
        """
        for index, name in enumerate(self.classes):
            if _is_background(name):
                return index
        return None


def label_count(num_classes: int) -> int:
    """The number of labels that a model of so many classes tells apart: 2 of one, else the same."""
    return 2 if num_classes == 1 else num_classes


def same_name(one: str, other: str) -> bool:
    """Whether two class names are one but for case, outer underscores and form of Unicode."""
    first, second = (
        unicodedata.normalize("NFC", name).strip("_").casefold() for name in (one, other)
    )
    return first == second


def built_in_name(names: Sequence[str]) -> str | None:
    """What the built-in set of these classes is called; None where they are none's."""
    alike = [
        built_in
        for built_in in CLASS_SETS.values()
        if len(names) == len(built_in) and all(map(same_name, names, built_in.classes))
    ]
    # Two differ in the underscores of a name only.
    alike.sort(key=lambda built_in: built_in.classes != tuple(names))
    return alike[0].name if alike else None


def _is_background(name: str) -> bool:
    return any(same_name(name, each) for each in _BACKGROUND_NAMES)


@functools.lru_cache(maxsize=8)
def distinct_colours(count: int) -> tuple[Colour, ...]:
    """``count`` colours that differ from each other, from greys, and from dark and white pixels.

    Each next one is that of a grid of RGB values which is furthest in OKLab from the nearest of
    those before, of lightness 0.6 to 0.92 and chroma 0.08 or more, so that the first of any count
    are the same. Beyond the grid's 2000 follow others of the PASCAL map.

    Source: https://bottosson.github.io/posts/oklab/ (OKLab).
    """
    import numpy as np

    levels = np.arange(0, 256, 17)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    parts = rgb / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(linear @ np.array(_LINEAR_TO_LMS).T) @ np.array(_LMS_TO_OKLAB).T
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    kept = (lightness >= 0.6) & (lightness <= 0.92) & (chroma >= 0.08)
    rgb, lab = rgb[kept], lab[kept]
    # Hue tells classes apart better than lightness does on photos.
    lab[:, 0] *= 0.6
    found: list[Colour] = []
    distance = np.full(len(rgb), np.inf)
    # A red.
    index = int(np.abs(rgb - np.array((255, 68, 51))).sum(1).argmin())
    for _ in range(min(count, len(rgb))):
        red, green, blue = rgb[index].tolist()
        found.append((red, green, blue))
        distance = np.minimum(distance, ((lab - lab[index]) ** 2).sum(1))
        index = int(distance.argmax())
    taken = set(found)
    more = (colour for colour in pascal_colour_map(2 * count + 1)[1:] if colour not in taken)
    return (*found, *itertools.islice(more, count - len(found)))


def pascal_colour_map(count: int) -> tuple[Colour, ...]:
    """The colour map of the PASCAL VOC devkit for the ids 0..count-1.

    Bits 3i, 3i+1 and 3i+2 of the id become bit 7-i of red, green and blue, which gives 2^24 ids
    different colours.

    Raises:
        ValueError: a count below 0 or above 2^24.
    """
    if not 0 <= count <= 1 << 24:
        raise ValueError(f"count is {count}, expected 0..{1 << 24}")
    return tuple(
        (
            sum((label >> 3 * i & 1) << 7 - i for i in range(8)),
            sum((label >> 3 * i + 1 & 1) << 7 - i for i in range(8)),
            sum((label >> 3 * i + 2 & 1) << 7 - i for i in range(8)),
        )
        for label in range(count)
    )


def generic_classes(
    count: int, classes: Iterable[str] | None = None, name: str = "generic"
) -> ClassSet:
    """A class set without known colours: :func:`distinct_colours`, and black for a background.

    Args:
        count: number of classes.
        classes: their names; "class 0", "class 1", ... without, of one "foreground".
        name: what the set is called.

    Raises:
        ValueError: a count below 1, or another number of names than ``count``.
    """
    if not 1 <= count <= MOST_CLASSES:
        raise ValueError(f"{name}: {shown(count)} classes, expected 1 to {MOST_CLASSES}")
    unnamed = ("foreground",) if count == 1 else tuple(f"class {i}" for i in range(count))
    names = unnamed if classes is None else tuple(classes)
    if len(names) != count:
        raise ValueError(f"{name}: {len(names)} class names for {count} classes")
    background = next((i for i, each in enumerate(names) if _is_background(each)), count)
    colours = distinct_colours(count)
    palette = (*colours[:background], (0, 0, 0), *colours[background:])[:count]
    return ClassSet(name, names, palette)


def class_set(source: str | os.PathLike[str] | ClassSet | Iterable[str]) -> ClassSet:
    """A built-in class set by name, one read from a file, or one made of names.

    Names are a list, or text with commas: "road,car,tree" (of one name "road,"). A number as text,
    "4", is :func:`generic_classes`' so many.

    Built in: ``voc`` (21), ``coco-voc`` (the same 21 as torchvision's weights name them),
    ``cityscapes`` (19 train ids), ``ade20k`` (150), ``camvid`` (11, ignored label 11).

    Files: ``.txt`` with a name a line (empty lines and lines that start with # are skipped);
    ``.json``, ``.yaml`` or ``.yml`` with a list of names, a mapping of id to name, or a mapping
    with the keys ``classes`` (either of the two) and, optional, ``palette`` (a list of [r, g, b]),
    ``name`` and ``ignore_index`` (default 255). Without a palette the colours are
    :func:`generic_classes`'.

    Raises:
        ValueError: an unknown name, or a file whose content is none of these; says which.
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(source, ClassSet):
        return source
    if not isinstance(source, (str, os.PathLike)):
        names = tuple(source)
        return generic_classes(len(names), names, "custom")
    text = os.fspath(source)
    if text in CLASS_SETS:
        return CLASS_SETS[text]
    if text.isdecimal():
        # Of thousands of digits Python makes no number.
        return generic_classes(int(text) if len(text) < 20 else MOST_CLASSES + 1)
    path = Path(text)
    if not path.is_file() and "," in text:
        names = tuple(name.strip() for name in text.split(","))
        names = names[:-1] if not names[-1] else names
        if not all(names) or len(set(names)) < len(names):
            raise ValueError(f"--classes is {text!r}, expected names that differ: road,car,tree")
        return generic_classes(len(names), names, "custom")
    if not path.is_file():
        known = ", ".join(CLASS_SETS)
        if path.suffix or len(path.parts) > 1:
            raise FileNotFoundError(
                f"class list {text}: no such file (built in are: {known}; "
                "a file holds a name a line, or is JSON or YAML)"
            )
        raise ValueError(
            f"no class set is named {text!r}; built in are: {known}; "
            "or pass names with commas (of one class "
            f"{text + ','!r}), a number, or a file with a name a line, JSON or YAML"
        )
    return _from_file(path)


def _from_file(path: Path) -> ClassSet:
    suffix = path.suffix.lower()
    try:
        if suffix in (".json", ".yaml", ".yml"):
            content = read_document(path)
        else:
            lines = (line.strip() for line in read_text(path).splitlines())
            content = [line for line in lines if line and not line.startswith("#")]
    except DocumentError as error:
        raise ValueError(f"class list {error}") from error
    except OSError as error:
        raise ValueError(f"class list {path}: {shown(error, 400)}") from error
    extra: Mapping[str, Any] = {}
    if isinstance(content, Mapping) and "classes" in content:
        extra = content
        unknown = sorted(map(str, set(content) - {"classes", "palette", "name", "ignore_index"}))
        if unknown:
            raise ValueError(
                f"class list {path}: unknown keys {shown(', '.join(unknown), 300)}; allowed "
                "are classes, palette, name, ignore_index"
            )
        content = content["classes"]
    names = _names(content, path)
    name = str(extra.get("name", path.stem))
    base = generic_classes(len(names), names, name)
    palette = extra.get("palette")
    if palette is not None and not isinstance(palette, list):
        raise ValueError(
            f"class list {path}: palette is {shown(repr(palette))}, expected a list of [r, g, b]"
        )
    try:
        return ClassSet(
            name,
            names,
            base.palette if palette is None else tuple(palette),
            extra.get("ignore_index", 255),
        )
    except ValueError as error:
        raise ValueError(f"class list {path}: {error}") from error


def _names(content: object, path: Path) -> tuple[str, ...]:
    if isinstance(content, Mapping):
        try:
            by_id = {int(key): value for key, value in content.items()}
        except (TypeError, ValueError):
            by_id = {}
        if sorted(by_id) != list(range(len(content))):
            raise ValueError(
                f"class list {path}: a mapping must name the ids 0..{len(content) - 1}, "
                f"got the keys {shown(', '.join(map(repr, content)).replace(chr(39), ''), 300)}"
            )
        content = [by_id[index] for index in range(len(by_id))]
    if not isinstance(content, list) or not content:
        raise ValueError(
            f"class list {path}: expected names, got {shown(content)}; give a name a line, or "
            "a JSON or YAML list"
        )
    wrong = [item for item in content if not isinstance(item, str) or not item.strip()]
    if wrong:
        # YAML reads a bare no, off or 3 as something else than text.
        raise ValueError(
            f"class list {path}: {shown(repr(wrong[0]))} is not a name; put it in quotes"
        )
    return tuple(item.strip() for item in content)


def _colour(colour: Iterable[int], name: str) -> Colour:
    try:
        parts = tuple(colour)
    except TypeError:
        parts = ()
    if len(parts) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in parts):
        raise ValueError(
            f"class set {name}: {shown(repr(colour))} is not a colour (R, G, B) of 0..255"
        )
    return parts


def _split(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(","))


def _hex(text: str) -> tuple[Colour, ...]:
    return tuple(
        (int(word[0:2], 16), int(word[2:4], 16), int(word[4:6], 16)) for word in text.split()
    )


_VOC = _split(
    """
background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog,
horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor
"""
)

_CITYSCAPES = _split(
    """
road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky,
person, rider, car, truck, bus, train, motorcycle, bicycle
"""
)

# labels.py of the Cityscapes scripts, by train id.
_CITYSCAPES_COLOURS = """
804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e
000046 003c64 005064 0000e6 770b20
"""

_CAMVID = _split(
    """
sky, building, pole, road, pavement, tree, signsymbol, fence, car, pedestrian, bicyclist
"""
)

# Colours of the SegNet tutorial.
_CAMVID_COLOURS = """
808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0
"""

# objectInfo150.txt of the MIT scene parsing benchmark: the first of each line's names.
_ADE20K = _split(
    """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade
machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
television, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle,
buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming
pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step,
tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture,
hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin
board, shower, radiator, glass, clock, flag
"""
)

# color150 of the same benchmark.
_ADE20K_COLOURS = """
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846
08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc
ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14
ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff
ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00
008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014
ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900
00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff
ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff
4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""

CLASS_SETS: dict[str, ClassSet] = {
    "voc": ClassSet("voc", _VOC, pascal_colour_map(21)),
    "coco-voc": ClassSet("coco-voc", ("__background__", *_VOC[1:]), pascal_colour_map(21)),
    "cityscapes": ClassSet("cityscapes", _CITYSCAPES, _hex(_CITYSCAPES_COLOURS)),
    "ade20k": ClassSet("ade20k", _ADE20K, _hex(_ADE20K_COLOURS)),
    "camvid": ClassSet("camvid", _CAMVID, _hex(_CAMVID_COLOURS), ignore_index=11),
}
"""Built-in class sets by name."""
