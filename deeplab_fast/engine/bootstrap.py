"""Bootstrapping: images with hard classes are seen more often."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence

__all__ = ["bootstrap_indices", "class_ids"]


def bootstrap_indices(
    images_of_class: Mapping[int, Sequence[int]] | Sequence[Sequence[int]],
    length: int,
    *,
    classes: Sequence[int | str] | None = None,
    factor: int = 2,
    rarest: int = 5,
    names: Sequence[str] | None = None,
) -> list[int]:
    """Indices of a data set in which images that contain a hard class are repeated.

        [0, ..., length - 1] + (factor - 1) times the indices of the images with a hard class

    An image is repeated as often however many hard classes it contains. The result is for
    torch.utils.data.Subset, shuffled by the sampler as always.

    Args:
        images_of_class: indices of the images that contain each class, by class id:
            `DataReport.images_of` of `deeplab_fast.data.check`, or a mapping.
        length: number of images in the data set.
        classes: hard classes, ids (also as text: "3") or names. None takes the `rarest` classes
            that occur in the fewest images, the lower id first where two occur in as many; classes
            in no image and classes in every image are passed over.
        factor: how often such an image occurs in the result, 1 or more.
        rarest: how many classes are taken for classes=None. The paper named five of VOC's.
        names: class names by id, for classes given by name.

    Returns:
        At least `length` indices.

    Raises:
        ValueError: an unknown class (with the known ones), an empty `classes`, a number out of
            range, or an index outside [0, length).

    Source: arXiv 1706.05587, section 4.3 ("an effective bootstrapping method": images with
    bicycle, chair, diningtable, pottedplant or sofa are duplicated).
    """
    if factor < 1 or rarest < 1 or length < 0:
        raise ValueError(
            f"factor and rarest must be 1 or more and length 0 or more, got factor={factor}, "
            f"rarest={rarest}, length={length}"
        )
    images = _images(images_of_class, length)
    if classes is None:
        some = [(len(found), c) for c, found in images.items() if 0 < len(found) < length]
        hard = [c for _, c in sorted(some)[:rarest]]
    else:
        hard = class_ids(classes, images, names)
    repeated = sorted(set().union(*(images[c] for c in hard)))
    return [*range(length), *repeated * (factor - 1)]


def _images(
    images_of_class: Mapping[int, Sequence[int]] | Sequence[Sequence[int]], length: int
) -> dict[int, set[int]]:
    items = (
        images_of_class.items()
        if isinstance(images_of_class, Mapping)
        else enumerate(images_of_class)
    )
    images = {operator.index(c): set(map(operator.index, found)) for c, found in items}
    for c, found in images.items():
        outside = sorted(i for i in found if not 0 <= i < length)
        if outside:
            raise ValueError(
                f"class {c} names image {outside[0]}, outside the data set's 0..{length - 1}; "
                "images_of_class and length must be of the same data set"
            )
    return images


def class_ids(
    classes: Sequence[int | str], known_ids: Collection[int], names: Sequence[str] | None
) -> list[int]:
    """Ids of classes that are given by id (also as text: "3") or name.

    Raises:
        ValueError: an unknown class (with the known ones), or an empty `classes`.
    """
    if isinstance(classes, str) or not classes:
        raise ValueError(
            f"classes must be a list of one or more ids or names, got {classes!r}; None takes the "
            "rarest"
        )
    by_name = {name: c for c, name in enumerate(names or ())}
    ids = [_class_id(c, by_name) for c in classes]
    unknown = [c for c, i in zip(classes, ids, strict=True) if i not in known_ids]
    if unknown:
        known = ", ".join(
            f"{c} ({names[c]})" if names is not None and c < len(names) else str(c)
            for c in sorted(known_ids)
        )
        hint = "" if names is not None else "; names need names=..., the class names by id"
        raise ValueError(f"unknown classes {unknown}; known: {known}{hint}")
    return [i for i in ids if i is not None]


def _class_id(given: int | str, by_name: Mapping[str, int]) -> int | None:
    if not isinstance(given, str):
        return operator.index(given)
    return by_name.get(given, int(given) if given.isdecimal() else None)
