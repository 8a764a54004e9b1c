"""The parser of a command: options by their whole names, errors in one line of the CLI's words."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader
from jsonargparse.typing import register_type

from deeplab_fast._documents import DocumentError, parse_yaml, read_text, shown
from deeplab_fast.cli.common import PROGRAM

__all__ = ["CommandParser", "Plain", "did_you_mean"]

# What other libraries' commands call an option -> names that stand for it here, if a command has
# them.
_ELSEWHERE = {
    "--amp": ("--trainer.precision", "--dtype"),
    "--batch": ("--batch-size",),
    "--checkpoint": ("--weights", "--resume"),
    "--ckpt": ("--weights", "--resume"),
    "--cfg": ("--config",),
    "--conf": ("--threshold",),
    "--eval-only": ("--validate-only",),
    "--gpus": ("--trainer.devices", "--device"),
    "--image-size": ("--size", "--crop"),
    "--imgsz": ("--size", "--crop"),
    "--input": ("PATH", "--data"),
    "--learning-rate": ("--lr",),
    "--max-epochs": ("--epochs",),
    "--max-steps": ("--steps",),
    "--nc": ("--num-classes",),
    "--num-workers": ("--workers",),
    "--out-dir": ("--output",),
    "--project": ("--output",),
    "--save-dir": ("--output",),
    "--source": ("PATH", "--data"),
    "--test-only": ("--validate-only",),
    "--tta": ("--flip", "--scales"),
    "--wd": ("--weight-decay",),
    "--work-dir": ("--output",),
}

_KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "a map, e.g. {name: value}",
    "list": "a list, e.g. [1,2]",
    "tuple": "a list, e.g. [1,2]",
}


def _load(text: str) -> Any:
    """A value that was typed, or the text of a configuration."""
    value = parse_yaml(text, exponents=True)
    if isinstance(value, dict) and value and all(each is None for each in value.values()):
        # A text with a colon at its end, or in braces, and no mapping.
        plain = text.strip(" {}").replace(" ", "")
        if text.strip() == f"{next(iter(value))}:" or set(plain.split(",")) == set(value):
            return text
    return value


# Characters of a message: a value may be of any length.
_LONGEST_MESSAGE = 1500
_LONGEST_COMMAND = 500

_MODE = "deeplab_fast"
set_loader(_MODE, _load, (DocumentError,))


class Plain:
    """The type of a value that stays as it was written, whatever it is.

    Of ``Any`` jsonargparse imports what a ``class_path`` in it names, while it parses.
    """

    # jsonargparse looks for a shorter path of a class in its package, which imports all of that.
    __module__ = "builtins"


def _load_plain(value: str) -> Any:
    try:
        return _load(value)
    except DocumentError:
        return value


register_type(
    Plain,
    serializer=lambda value: value,
    deserializer=_load_plain,
    type_check=lambda value, kind: not isinstance(value, str),
)


class CommandParser(ArgumentParser):
    """``jsonargparse``'s parser as every command has it.

    Options are known by their whole names only. An error is one line and where help stands, on
    stderr, with exit status 2.

    Args:
        command: what follows the program's name.
        options: of ``jsonargparse.ArgumentParser``.
    """

    def __init__(self, command: str = "", **options: Any) -> None:
        options.setdefault("prog", f"{PROGRAM} {command}".rstrip())
        options.setdefault("allow_abbrev", False)
        options.setdefault("print_config", "--print-config")
        options.setdefault("parser_mode", _MODE)
        super().__init__(**options)
        # Files that a call read.
        self._configurations: list[str] = []

    # jsonargparse gives argparse's overloads one signature too.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *more: Any, **options: Any
    ) -> Any:
        given = [each for each in (sys.argv[1:] if args is None else args) if isinstance(each, str)]
        for each in given:
            # jsonargparse takes it for the option itself, with its value.
            if self._dotted(each.split("=")[0]):
                self.error(f"unrecognized arguments: {each}")
        self._configurations = []
        config = super().parse_args(args, *more, **options)
        if self._configurations and "allow_imports" in config and not config.allow_imports:
            self._check_imports(config, given)
        return config

    def _check_imports(self, config: Namespace, given: list[str]) -> None:
        """An error where a configuration, and not what was typed, names code to import."""
        from deeplab_fast.engine.imports import check_imports, imports_of

        values = config.as_dict()
        if imports_of(values):
            again = f"{self.prog} {shlex.join(given)} --allow-imports"
            # One that is cut off could not be typed.
            advice = f"type: {again}" if len(again) <= _LONGEST_COMMAND else "add --allow-imports"
            try:
                check_imports(values, ", ".join(self._configurations), self._typed(given), advice)
            except ValueError as error:
                self.error(str(error))

    def _typed(self, given: list[str]) -> dict[str, Any]:
        """What a call has without its configurations; nothing where it is none without them."""
        alone, skip = [], False
        for each in given:
            if not skip and not each.startswith("--config="):
                skip = each == "--config"
                if not skip:
                    alone.append(each)
            else:
                skip = False
        exits, self.exit_on_error = self.exit_on_error, False
        try:
            found = super().parse_args(alone, defaults=False)
        except ArgumentError:
            return {}
        finally:
            self.exit_on_error = exits
        return dict(found.as_dict())

    def parse_path(self, path: Any, *more: Any, **options: Any) -> Namespace:
        """A configuration: a regular file of YAML or JSON within the bounds of any document."""
        try:
            values = parse_yaml(read_text(path), str(path), exponents=True)
        except (DocumentError, OSError) as error:
            self.error(f"--config: {error}")
        if not isinstance(values, dict):
            kind = "nothing" if values is None else shown(values)
            self.error(f"--config: {path} has {kind}, expected lines of option: value")
        for key in ("config", "allow_imports"):
            if key in values:
                self.error(
                    f"--config: {path} has {key}, which is for the command line alone; leave it out"
                )
        for key in values:
            if not isinstance(key, str):
                self.error(f"--config: {path} has the key {shown(key)}, expected names of options")
        self._check_lists(values)
        self._configurations.append(str(path))
        return super().parse_path(path, *more, **options)

    def _check_lists(self, found: dict[str, Any]) -> None:
        """An error where a configuration has something else for an option of several values."""
        several = {a.dest for a in self._actions if a.nargs not in (None, 0, "?")}
        for key, value in found.items():
            if key in several and value is not None and not isinstance(value, list):
                told = f"; write {key}: [{value}]" if not isinstance(value, dict) else ""
                self.error(
                    f"the configuration has {key}: {shown(value)}, expected a list{shown(told)}"
                )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        print(
            f"{self.prog}: error: {shown(self._told(message), _LONGEST_MESSAGE)}", file=sys.stderr
        )
        print(f"All options: {self.prog} --help", file=sys.stderr)
        self.exit(2)

    def _told(self, message: str) -> str:
        """What jsonargparse or argparse says, in the words of the command line."""
        for pattern, tell in (
            (r"unrecognized arguments: (.*)", self._unknown),
            (r"Option '(.*?)' is not accepted", self._unknown_key),
            (r'Parser key "(.*?)"(?: element (\d+))?:\s*(.*)', self._bad_value),
            (r"argument (--?\S+?)(?:/\S+)?: (.*)", self._bad_use),
            (r"the following arguments are required: (.*)", self._missing),
        ):
            found = re.fullmatch(pattern, message, re.DOTALL)
            if found:
                return tell(*found.groups())
        return " ".join(message.split())

    def _options(self) -> list[str]:
        return [
            name
            for action in self._actions
            for name in action.option_strings
            # Beside that of a list, one that appends to it.
            if not name.endswith("+")
        ]

    def _positional(self) -> str:
        """What the arguments without a name are called; "" where there are none."""
        return next((str(a.metavar or a.dest) for a in self._actions if not a.option_strings), "")

    def _unknown(self, text: str) -> str:
        arguments = text.split()
        names = [each.split("=")[0] for each in arguments if re.match(r"--?[A-Za-z]", each)]
        positional = self._positional()
        if not names:
            what = f"{' '.join(arguments)}: no option stands before it"
            if positional:
                return f"{what}; name every {positional} in one place"
            return f"{what}, and the command takes options only; leave it out"
        return "; ".join(self._unknown_option(name, positional) for name in names)

    def _unknown_option(self, name: str, positional: str) -> str:
        options = self._options()
        known = [*options, positional] if positional else options
        alike = difflib.get_close_matches(name.replace("_", "-"), _ELSEWHERE, n=1, cutoff=0.85)
        other = [each for elsewhere in alike for each in _ELSEWHERE[elsewhere] if each in known]
        means = self._dotted(name) or ", ".join(other) or did_you_mean(name, options)
        return f"there is no option {name}" + (f"; did you mean {means}?" if means else "")

    def _dotted(self, name: str) -> str:
        """The right form of an option's part whose option is written with underscores, or ""."""
        option, dot, part = name.partition(".")
        right = option.replace("_", "-")
        options = self._options()
        return f"{right}.{part}" if dot and option not in options and right in options else ""

    def _unknown_key(self, key: str) -> str:
        name = "--" + key.replace("_", "-")
        return f"the configuration has {key}; {self._unknown_option(name, '')}"

    def _bad_value(self, key: str, element: str | None, problem: str) -> str:
        action = next((a for a in self._actions if a.dest == key), None)
        name = self._called(action) if action else "--" + key.replace("_", "-")
        digits = re.search(r"value has (\d+) digits", problem)
        if digits:
            return f"{name}: a number of {digits[1]} digits was given, expected fewer"
        subtypes = "".join(re.findall(r"Subtypes: (.*)", problem))
        # Of a list, the element that is wrong; its line ends before what else was tried.
        inner = re.search(r"Expected an? <class '\w+'>\. Got value: ([^\n]*)", problem)
        given = inner or re.search(r"(?:Got value|Given value): (.*)", problem, re.DOTALL)
        if inner:
            problem = inner[0]
        kinds = re.findall(r"Expected an? <class '(\w+)'>|Expected <class '(\w+)'>", problem)
        words = [_KINDS[kind] for pair in kinds for kind in pair if kind in _KINDS]
        if not given or not words:
            return f"{name}: {' '.join(problem.split())}"
        value = " ".join(given[1].split())
        if "list[str]" in subtypes and words == [_KINDS["list"]]:
            words = [f"a list: [{value}]"]
        elif inner and "list[str]" in subtypes:
            words = [f'a text, as in ["{value}"]']
        nested = re.fullmatch(r"NestedArg\(key='(.*)', val='(.*)'\)", value)
        if nested:
            return f"there is no option {name}.{nested[1]}; {name} takes {' or '.join(words)}"
        which = f"value {element} is {value}" if element else f"{value} was given"
        text = f"{name}: {which}, expected {' or '.join(words)}"
        positional = self._positional()
        if action is not None and action.nargs == "+" and action.option_strings and positional:
            text += f"; {positional} stands before {name}, or another option in between"
        return text

    def _bad_use(self, name: str, problem: str) -> str:
        action = next((a for a in self._actions if name in a.option_strings), None)
        if "expected" in problem and action is not None:
            shown = action.metavar or action.dest.upper()
            shown = " ".join(shown) if isinstance(shown, tuple) else shown
            return f"{name}: {problem}: {name} {shown}"
        if "ignored explicit argument" in problem:
            return f"{name} takes no value; leave it out"
        return f"{name}: {' '.join(problem.split())}"

    def _missing(self, names: str) -> str:
        actions = {a.dest: self._called(a) for a in self._actions}
        shown = [actions.get(name, name) for name in names.split(", ")]
        return f"{', '.join(shown)} is missing"

    def _called(self, action: argparse.Action) -> str:
        return action.option_strings[0] if action.option_strings else self._positional()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Those of the known names that are like a given one, the likest first; "" where none is."""
    names = list(dict.fromkeys(known))
    plain = name.replace("_", "-").lower()
    if plain in names:
        return plain
    likeness = {each: difflib.SequenceMatcher(None, plain, each).ratio() for each in names}
    best = max(likeness.values(), default=0.0)
    near = [each for each in names if likeness[each] >= max(0.7, best - 0.05)]
    near.sort(key=likeness.__getitem__, reverse=True)
    # A name's beginning, or an end of it: --out, --rate.
    word = plain.lstrip("-")
    if len(word) > 2:
        whole = [n for n in names if n.startswith(plain) or n.endswith(f"-{word}")]
        near = whole or near
    return ", ".join(near[:3])
