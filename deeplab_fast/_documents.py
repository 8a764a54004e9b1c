"""YAML and JSON from files that anybody may have written: plain values, within bounds.

What a reader gives holds texts, numbers, booleans, None, lists and mappings only, is no deeper than
`DEEPEST`, and has no more values than the file has room for: aliases of YAML, which may multiply a
few lines to terabytes, are counted before anything is made of them.
"""

from __future__ import annotations

import json
import os
import re
import stat
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "DEEPEST",
    "LONGEST",
    "DocumentError",
    "parse_json",
    "parse_yaml",
    "printable",
    "read_document",
    "read_text",
    "shown",
]

LONGEST = 4 << 20
"""Bytes of a file that is read where a reader is not told another limit."""

DEEPEST = 64
"""Levels of lists and mappings within one another."""

# Values of a YAML file, those of aliases counted at each use.
_MOST_VALUES = 200_000
# Digits of a number: beyond every option, far below Python's own limit of 4300, which is a
# ValueError where a number is shown.
_MOST_DIGITS = 1000


class DocumentError(ValueError):
    """A file, or a text, that is not what it should be; says what came, what is allowed, what to
    do."""


def read_document(
    path: str | os.PathLike[str], *, limit: int = LONGEST, deepest: int = DEEPEST
) -> Any:
    """What a file holds: JSON by its suffix, else YAML.

    Args:
        path: of a regular file.
        limit: bytes that it may have.
        deepest: levels within one another.

    Raises:
        DocumentError: it is something else, or beyond a bound.
        OSError: it cannot be read.
    """
    text = read_text(path, limit=limit)
    if Path(path).suffix.lower() == ".json":
        return parse_json(text, str(path), deepest=deepest)
    return parse_yaml(text, str(path), deepest=deepest)


def read_text(path: str | os.PathLike[str], *, limit: int = LONGEST) -> str:
    """The text of a regular file in UTF-8, with or without its mark.

    Raises:
        DocumentError: it is no regular file, is longer, is not UTF-8, or has NUL in it.
        OSError: it cannot be read.
    """
    name = os.fspath(path)
    if "\0" in name:
        raise _wrong(name, "is no name of a file: it has a zero byte; name a file")
    # A pipe without a writer would be waited for.
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise _wrong(name, "is no file, expected one; name a file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise _wrong(
            name,
            f"has {max(state.st_size, len(data))} bytes, expected {limit} at most; is it the file "
            "that was meant?",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _wrong(
            name,
            f"is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; save it as UTF-8",
        ) from error
    if "\0" in text:
        raise _wrong(
            name,
            f"has a zero byte at {text.index(chr(0))}, expected text; it is damaged, or "
            "another kind of file",
        )
    return text


def parse_json(text: str, name: str = "the text", *, deepest: int = DEEPEST) -> Any:
    """JSON as Python has it.

    Args:
        text: of JSON.
        name: of the file, for messages.
        deepest: levels within one another.

    Raises:
        DocumentError: it is no JSON, names a key twice, or is beyond a bound.
    """

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            places = {key: place for place, (key, _) in enumerate(pairs)}
            twice = next(key for place, (key, _) in enumerate(pairs) if places[key] != place)
            raise _wrong(name, f"has the key {twice!r:.80} twice; leave one of them out")
        return found

    def integer(digits: str) -> int:
        if len(digits) > _MOST_DIGITS:
            raise _too_many_digits(name, digits)
        return int(digits)

    def number(digits: str) -> float:
        if len(digits) > _MOST_DIGITS:
            raise _too_many_digits(name, digits)
        return float(digits)

    try:
        value = json.loads(text, object_pairs_hook=mapping, parse_int=integer, parse_float=number)
    except RecursionError as error:
        raise _too_deep(name, deepest) from error
    except json.JSONDecodeError as error:
        raise _wrong(
            name,
            f"is no JSON: {error.msg} in line {error.lineno}, column {error.colno}; it is "
            "cut off, or another kind of file",
        ) from error
    _check_depth(value, name, deepest)
    return value


def parse_yaml(
    text: str, name: str = "the text", *, deepest: int = DEEPEST, exponents: bool = False
) -> Any:
    """YAML as Python has it; dates stay texts, JSON is YAML too.

    Args:
        text: of YAML.
        name: of the file, for messages.
        deepest: levels within one another.
        exponents: 1e-3 is a number, as in YAML 1.2, and not a text.

    Raises:
        DocumentError: it is no YAML, has tags, names a key twice, or is beyond a bound.
    """
    import yaml

    try:
        _check_events(text, name, deepest)
        return yaml.load(text, _loader(exponents))
    except yaml.YAMLError as error:
        raise _wrong(name, f"is no YAML of plain values: {_told(error)}") from error
    except _Digits as error:
        raise _too_many_digits(name, error.args[0]) from error
    # A date that there is not, a number of no digits: 0x, 0b_.
    except ValueError as error:
        if isinstance(error, DocumentError):
            raise
        raise _wrong(
            name, f"has a value that YAML cannot make: {shown(error)}; write it in quotes"
        ) from error
    except RecursionError as error:
        raise _too_deep(name, deepest) from error


class _Digits(ValueError):
    """A number of too many digits."""


def _check_events(text: str, name: str, deepest: int) -> None:
    """Depth, tags, and how many values there are with every alias in full.

    Goes over the parser's events, which are made one after another without recursion.
    """
    import yaml

    sizes: dict[str, int] = {}
    # Of each list or mapping that is open: its anchor, and the values in it so far.
    open_ones: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, _event_loader()):
        if isinstance(event, yaml.events.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_ones):
                raise _wrong(name, f"has {shown('*' + event.anchor)} within itself; write it out")
            # One that there is not is the composer's to tell.
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.events.CollectionStartEvent):
            _check_tag(event, name)
            open_ones.append((event.anchor, total))
            total += 1
            if len(open_ones) > deepest:
                raise _too_deep(name, deepest)
        elif isinstance(event, yaml.events.CollectionEndEvent):
            anchor, before = open_ones.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.events.ScalarEvent):
            _check_tag(event, name)
            if event.anchor is not None:
                sizes[event.anchor] = 1
            total += 1
        if total > _MOST_VALUES:
            raise _wrong(
                name,
                f"has more than {_MOST_VALUES:,} values, aliases (*name) written out, "
                "expected fewer; it is no file of options or names",
            )


_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")
)


def _check_tag(event: Any, name: str) -> None:
    if event.tag not in (None, "!") and event.tag not in _TAGS:
        line = event.start_mark.line + 1
        raise _wrong(
            name,
            f"has the tag {shown(event.tag)} in line {line}, expected plain values; leave "
            "the tag out",
        )


@cache
def _event_loader() -> Any:
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


_FLOAT = r"""
    ^(?: [-+]?[0-9][0-9_]* \. [0-9_]* (?:[eE][-+]?[0-9]+)?
      |  [-+]?[0-9][0-9_]* [eE][-+]?[0-9]+
      |  [-+]?\. [0-9][0-9_]* (?:[eE][-+]?[0-9]+)?
      |  [-+]?\. (?:inf|Inf|INF)
      |  \. (?:nan|NaN|NAN) )$"""


@cache
def _loader(exponents: bool) -> Any:
    """A loader of plain values that refuses keys that are there twice."""
    from yaml.constructor import ConstructorError

    class Loader(_event_loader()):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            # Before keys of << are put in, which those of the mapping itself replace.
            own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            self.flatten_mapping(node)
            found = super().construct_mapping(node, deep=deep)
            seen = set()
            for key in own:
                value = self.construct_object(key, deep=True)
                if value in seen:
                    raise ConstructorError(
                        None, None, f"the key {value!r:.80} is there twice", key.start_mark
                    )
                seen.add(value)
            return found

        def construct_yaml_int(self, node: Any) -> int:
            return int(self._digits(super().construct_yaml_int, node))

        def construct_yaml_float(self, node: Any) -> float:
            return float(self._digits(super().construct_yaml_float, node))

        def _digits(self, construct: Any, node: Any) -> Any:
            if len(node.value) > _MOST_DIGITS:
                raise _Digits(node.value)
            return construct(node)

    for kind in ("int", "float"):
        Loader.add_constructor(
            f"tag:yaml.org,2002:{kind}", getattr(Loader, f"construct_yaml_{kind}")
        )
    # Dates are texts, as in JSON.
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
        for first, pairs in Loader.yaml_implicit_resolvers.items()
    }
    if exponents:
        for pairs in Loader.yaml_implicit_resolvers.values():
            pairs[:] = [pair for pair in pairs if not pair[0].endswith(":float")]
        pattern = re.compile(_FLOAT, re.VERBOSE)
        Loader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789."))
    return Loader


def _told(error: Any) -> str:
    """What PyYAML says, in one line."""
    mark = getattr(error, "problem_mark", None)
    text = shown(getattr(error, "problem", None) or error, 200)
    return text if mark is None else f"{text} in line {mark.line + 1}, column {mark.column + 1}"


def _check_depth(value: Any, name: str, deepest: int) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(deepest):
        level = [
            each
            for one in level
            for each in (one.values() if isinstance(one, dict) else one)
            if isinstance(each, (dict, list))
        ]
        if not level:
            return
    raise _too_deep(name, deepest)


def _wrong(name: str, problem: str) -> DocumentError:
    return DocumentError(f"{shown(name, 300)} {problem}")


def _too_deep(name: str, deepest: int) -> DocumentError:
    return _wrong(
        name,
        f"has more than {deepest} lists and mappings within one another, expected fewer; "
        "it is no file of options or names",
    )


def _too_many_digits(name: str, digits: str) -> DocumentError:
    return _wrong(
        name,
        f"has a number of {len(digits)} digits ({shown(digits, 12)}), expected "
        f"{_MOST_DIGITS} at most; write it in quotes if it is a name",
    )


def shown(value: object, most: int = 80) -> str:
    """A value as a message shows it: one line of printable characters, shortened."""
    text = " ".join((value if isinstance(value, str) else _represented(value)).split())
    text = text if len(text) <= most else f"{text[:most]}..."
    return printable(text)


def printable(text: str, also: str = "") -> str:
    """A text without what a terminal obeys: other characters are written as escapes, but `also`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in also else ascii(c)[1:-1] for c in text)


def _represented(value: object) -> str:
    try:
        return str(value) if isinstance(value, Exception) else repr(value)
    # An integer of more digits than Python shows.
    except ValueError:
        return f"a {type(value).__name__} too long to show"
