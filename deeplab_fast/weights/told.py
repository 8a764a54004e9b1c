"""What a file says of its model beside the tensors, held against what it may say.

A builder gets nothing from a file but options of this list, of their types and ranges: no path, no
address and no name of published weights is among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from . import registry
from ._common import CheckpointError, one_line, tuples

# What a text of JSON may hold: containers in one another, and values in all.
_DEEPEST, _MOST_VALUES = 50, 2_000_000
# Larger numbers are no size of anything that a model has.
LARGEST = 1 << 20
_LONGEST_LIST, _LONGEST_TEXT = 64, 1_000
_MOST_CLASSES = 100_000
_MOST_DILATED = (1 << 31) - 1
# As of an exported file's description.
_LARGEST_SIDE = 65_536

# A value as Python has it -> whether it is allowed; and what is, as text.
_Rule = tuple[Callable[[Any], bool], str]


def check_plain(value: object, deepest: int = _DEEPEST, most: int = _MOST_VALUES) -> None:
    """Raises ValueError for containers that hold themselves, lie too deep, or hold too much."""
    level, count = [value], 0
    for _ in range(deepest):
        inner: list[object] = []
        for each in level:
            if not isinstance(each, (Mapping, list, tuple)):
                continue
            count += len(each)
            if count > most:
                raise ValueError(f"it holds more than {most} values")
            inner += each.values() if isinstance(each, Mapping) else each
        if not inner:
            return
        level = inner
    raise ValueError(f"its containers lie more than {deepest} deep in one another")


def _whole(least: int, most: int) -> _Rule:
    return lambda v: type(v) is int and least <= v <= most, f"a whole number from {least} to {most}"


def _one_of(*values: object) -> _Rule:
    kinds = {*map(type, values)}
    return lambda v: type(v) in kinds and v in values, f"one of {values}"


def _list_of(rule: _Rule, least: int = 0, most: int = _LONGEST_LIST) -> _Rule:
    allowed, what = rule

    def fits(value: Any) -> bool:
        return (
            isinstance(value, (list, tuple))
            and least <= len(value) <= most
            and all(map(allowed, value))
        )

    number = str(least) if least == most else f"{least} to {most}"
    return fits, f"a list of {number}, each {what}"


def _or_none(rule: _Rule) -> _Rule:
    return lambda v: v is None or rule[0](v), f"null or {rule[1]}"


_FLAG: _Rule = (lambda v: isinstance(v, bool), "true or false")
_TEXT: _Rule = (
    lambda v: isinstance(v, str) and len(v) <= _LONGEST_TEXT,
    f"a text of at most {_LONGEST_TEXT} characters",
)
_NAME: _Rule = (
    lambda v: _TEXT[0](v) or type(v) in (int, float),
    f"{_TEXT[1]}, or a number",
)
_SHARE: _Rule = (
    lambda v: type(v) in (int, float) and 0 <= v < 1,
    "a number of at least 0 and below 1",
)

# Options of builders that a file may give.
OPTIONS: Mapping[str, _Rule] = {
    "output_stride": _one_of(8, 16),
    "multi_grid": _or_none(_list_of(_whole(1, _MOST_DILATED))),
    "contract_dilation": _FLAG,
    "atrous_rates": _list_of(_whole(1, _MOST_DILATED)),
    "head": _TEXT,
    "aspp_channels": _whole(1, 65_536),
    "dropout": _SHARE,
    "align_corners": _FLAG,
    "stem": _TEXT,
    "image_pooling_norm": _TEXT,
    "width": (
        lambda v: type(v) in (int, float) and 0 < v <= 16,
        "a number above 0 and at most 16",
    ),
    "norm": _TEXT,
    "replace_stride_with_dilation": _or_none(_list_of(_one_of(False, True, 0, 1), 3, 3)),
}

_NUMBER: _Rule = (
    lambda v: type(v) in (int, float) and abs(v) <= LARGEST and math.isfinite(v),
    f"a number of at most {LARGEST}",
)
_SIDE = _whole(1, _LARGEST_SIDE)
_PREPROCESS: Mapping[str, _Rule] = {
    "mean": _list_of(_NUMBER, 3, 3),
    "std": _list_of(_NUMBER, 3, 3),
    "size": (
        lambda v: v is None or _SIDE[0](v) or _list_of(_SIDE, 2, 2)[0](v),
        f"null, {_SIDE[1]}, or two of them",
    ),
}
# The other facts, but for options, settings and the calibration.
_FACTS: Mapping[str, _Rule] = {
    "model": _TEXT,
    "num_classes": _whole(1, _MOST_CLASSES),
    "classes": _list_of(_NAME, most=_MOST_CLASSES),
    "palette": _list_of(_list_of(_whole(0, 255), 3, 3), most=_MOST_CLASSES),
    "preprocess_kind": _TEXT,
    "lost": _list_of((lambda v: isinstance(v, str), "a text"), most=_MOST_CLASSES),
}


def what_no_file_gives(facts: dict[str, Any]) -> list[str]:
    """Takes out of what is to be written what `checked_facts` refuses, and names it as text."""
    lost = []
    for name in list(facts):
        try:
            if name == "options":
                checked_options(facts[name], name)
            elif name == "preprocess":
                _checked_preprocess(facts, name)
            elif name in _FACTS:
                _check(name, name, facts[name], _FACTS[name])
        except CheckpointError:
            value = facts.pop(name) if name != "options" else facts[name]
            lost.append(f"{name}: {_shown(value)}, which no file may give")
    return lost


def checked_options(options: Mapping[Any, Any], label: str) -> dict[str, Any]:
    """Options of a builder that a file gives, JSON's lists as tuples.

    Raises:
        CheckpointError: one that no file gives, or another value.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            _refuse(label, f"the option {_shown(name)}", ", ".join(OPTIONS))
        _check(label, f"the option {name}", value, OPTIONS[name])
    return {name: tuples(value) for name, value in options.items()}


def checked_facts(facts: Mapping[str, Any], label: str) -> dict[str, Any]:
    """What `model_metadata` wrote, each fact of its type; others are left out.

    Settings and the calibration are for those who read them.

    Raises:
        CheckpointError: a value that it does not write.
    """
    try:
        check_plain(facts)
    except ValueError as error:
        raise CheckpointError(f"{label}: of its metadata {error}; {_ADVICE}") from error
    found: dict[str, Any] = {k: v for k, v in facts.items() if v is not None}
    for name, rule in _FACTS.items():
        if name in found:
            _check(label, name, found[name], rule)
    options = found.get("options", {})
    if not isinstance(options, Mapping):
        _refuse(label, f"options={_shown(options)}", "a mapping of names")
    if "model" in found:
        found["options"] = checked_options(options, label)
    if not isinstance(found.get("settings", {}), Mapping):
        _refuse(label, f"settings={_shown(found['settings'])}", "a mapping of modules")
    if "preprocess" in found:
        found["preprocess"] = _checked_preprocess(found, label)
    return found


def _checked_preprocess(found: Mapping[str, Any], label: str) -> dict[str, Any]:
    given = found["preprocess"]
    kinds = registry.preprocess_kinds()
    kind = kinds.get(found.get("preprocess_kind", "Preprocess"), kinds["Preprocess"])
    names = [f.name for f in fields(kind)]
    if not isinstance(given, Mapping) or not all(name in names for name in given):
        _refuse(label, f"preprocess={_shown(given)}", f"a mapping of {', '.join(names)}")
    for name, value in given.items():
        if name in _PREPROCESS:
            _check(label, f"preprocess.{name}", value, _PREPROCESS[name])
    plain = {name: tuples(value) for name, value in given.items()}
    try:
        kind(**plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{label}: its preprocess cannot be had: {one_line(error)}; {_ADVICE}"
        ) from error
    return plain


_ADVICE = (
    "save the model again, or load its tensors without what stands beside them: "
    "deeplab_fast.weights.read_state_dict(path) gives what load_weights takes"
)


def _check(label: str, name: str, value: object, rule: _Rule) -> None:
    if not rule[0](value):
        _refuse(label, f"{name}={_shown(value)}", rule[1])


def _refuse(label: str, got: str, allowed: str) -> None:
    raise CheckpointError(f"{label} says {got}; allowed is {allowed}. If you trust it, {_ADVICE}")


def _shown(value: object) -> str:
    """A value of a file in a message; containers by their kind, which may be long."""
    if isinstance(value, (Mapping, list, tuple)) and len(value) > _LONGEST_LIST:
        return f"a {type(value).__name__} of {len(value)}"
    return one_line(repr(value))
