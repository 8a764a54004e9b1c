"""Weights of a module of any library: a file's tensors under the module's own names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ._common import CheckpointError, StateDict, listed, shorten, unwrapped
from .files import (
    FOR_RESUMING,
    check_dense,
    check_nesting,
    read_content,
    tensors_in,
    without_wrappers,
)
from .layouts import NOT_MODEL

# Prefixes behind which a module's names may stand.
_MOST_PLACES = 1_000


def load_module(model: nn.Module, path: str | os.PathLike[str], *, part: str | None = None) -> None:
    """Fill any module from a checkpoint file of its own, every tensor of it.

    The module's names decide: the state dict is taken that has them all, whatever containers it
    lies in ("model", "state_dict", "model_state", ...) and whatever stands before every name
    ("module.", "_orig_mod.", Lightning's "model."), in the file or in the module. Counters named
    num_batches_tracked may be absent. For models of this package `load_weights` knows other
    libraries' names too.

    Args:
        model: any module, also inside DistributedDataParallel or torch.compile.
        path: of a file or folder as `read_state_dict` reads it, without running code from it.
        part: which network of a file that holds several of these names: the key it is kept under
            ("model_ema"), the prefix of its tensors ("student"), both ("state_dict/student"), or
            "." for the tensors without a prefix.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, one that does not fit, with the names, or one with
            several networks that do. The module is unchanged then.
    """
    model, label = unwrapped(model), os.fspath(path)
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    names = {without_wrappers(name): name for name in own}
    content = read_content(path)
    check_nesting(content, label)
    fits = [
        fit for where, state in _states(content, ()) for fit in _fits(where, state, names, label)
    ]
    fit = _chosen(fits, label, part)
    state = {names[name]: tensor for name, tensor in fit.tensors.items()}
    check_dense(state, label)
    shapes = [
        f"{name} {list(tensor.shape)}, the module's {list(own[name].shape)}"
        for name, tensor in state.items()
        if tensor.shape != own[name].shape
    ]
    if shapes:
        wrong = listed("tensors of another shape", shapes)
        raise CheckpointError(
            f"{label} does not fit {type(model).__name__}: {wrong}. Build the module as the file's "
            "was, with its number of classes"
        )
    model.load_state_dict({**model.state_dict(), **state})


@dataclass(frozen=True)
class _Fit:
    """A state dict of a file, and the prefix behind which a module's names stand in it.

    Attributes:
        where: keys of the containers.
        prefix: "" or one that ends in a dot.
        tensors: by the module's names.
        used: the names that they have there, without those of wrappers.
        missing: names of the module that it lacks.
        unexpected: names behind the prefix that the module lacks.
        beside: names that do not have the prefix.
    """

    where: tuple[str, ...]
    prefix: str
    tensors: StateDict
    used: frozenset[str]
    missing: list[str]
    unexpected: list[str]
    beside: list[str]

    @property
    def part(self) -> str:
        """What chooses it."""
        keys = [*self.where, *([self.prefix.rstrip(".")] if self.prefix else [])]
        return "/".join(keys) or "."

    def named(self, part: str | None) -> bool:
        """Whether it is what `part` may mean."""
        if part is None:
            return True
        if part == ".":
            return not self.prefix
        whole, container = f"/{self.part}", f"/{'/'.join(self.where)}"
        return whole.endswith(f"/{part}") or container.endswith(f"/{part}")


def _states(content: object, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], StateDict]]:
    """The state dicts in a checkpoint's containers."""
    if not isinstance(content, Mapping):
        return
    tensors = tensors_in(content)
    if tensors:
        yield where, tensors
    for key, value in content.items():
        if isinstance(key, str):
            yield from _states(value, (*where, key))


def _fits(
    where: tuple[str, ...], state: StateDict, names: Mapping[str, Any], label: str
) -> Iterator[_Fit]:
    """How a module's names may stand in a state dict."""
    bare = {without_wrappers(name): tensor for name, tensor in state.items()}
    seen = set()
    # Where the module wraps what was saved, all its names have a prefix of their own.
    first = next(iter(names), "")
    for outer in _beginnings(first):
        if not all(name.startswith(outer) for name in names):
            break
        inner = {name.removeprefix(outer): name for name in names}
        prefixes = {p for theirs in bare for p in _beginnings(theirs) if theirs[len(p) :] in inner}
        if len(prefixes) > _MOST_PLACES:
            raise CheckpointError(
                f"{label} holds names of the module behind {len(prefixes)} prefixes, at most "
                f"{_MOST_PLACES} are tried; save the module's state dict alone"
            )
        for prefix in sorted({"", *prefixes}):
            fit = _fit(where, prefix, bare, {inner[name]: prefix + name for name in inner})
            if fit.used not in seen:
                seen.add(fit.used)
                yield fit


def _beginnings(name: str) -> list[str]:
    """ "", "a.", "a.b." of a.b.c."""
    parts = name.split(".")
    return ["".join(f"{part}." for part in parts[:i]) for i in range(len(parts))]


def _fit(where: tuple[str, ...], prefix: str, bare: StateDict, wanted: Mapping[str, str]) -> _Fit:
    tensors = {mine: bare[theirs] for mine, theirs in wanted.items() if theirs in bare}
    missing = [
        mine
        for mine in wanted
        if mine not in tensors and mine.rpartition(".")[2] != "num_batches_tracked"
    ]
    used = frozenset(wanted[mine] for mine in tensors)
    others = [name for name in bare if name not in used and not NOT_MODEL.fullmatch(name)]
    unexpected = [name for name in others if name.startswith(prefix)]
    beside = [name for name in others if not name.startswith(prefix)]
    return _Fit(where, prefix, tensors, used, missing, unexpected, beside)


def _chosen(fits: list[_Fit], label: str, part: str | None) -> _Fit:
    """The one that a module's names fit; CheckpointError where none or several do."""
    named = [fit for fit in fits if fit.named(part)]
    if not named:
        what = "no tensors" if part is None else f"no part {part!r}"
        raise CheckpointError(
            f"{label} holds {what}, expected a state dict, also in containers; see "
            "deeplab_fast.weights.read_state_dict for what can be read"
        )
    complete = [fit for fit in fits if fit.tensors and not fit.missing]
    whole = []
    for fit in complete:
        # A whole network beside it is no part of it.
        rivals = [f.used for f in complete if f is not fit and f.where == fit.where]
        if all(any(name in used for used in rivals) for name in fit.unexpected):
            whole.append(fit)
    whole = [fit for fit in whole if fit.named(part)]
    # What training goes on with, beside the averaged weights that were asked for.
    whole = [fit for fit in whole if FOR_RESUMING not in fit.where] or whole
    if len(whole) > 1:
        raise CheckpointError(
            f"{label} holds more than one network that fits: {shorten([f.part for f in whole])}; "
            f"choose one with part= (--weights-part), for instance {whole[0].part!r}"
        )
    if not whole:
        best = max(named, key=lambda fit: len(fit.tensors) - len(fit.unexpected))
        wrong = [
            *([listed("missing", best.missing)] if best.missing else []),
            *([listed("unexpected", best.unexpected)] if best.unexpected else []),
        ]
        raise CheckpointError(
            f"{label} does not fit the module: {'; '.join(wrong)}. Expected every tensor of it "
            "under its names; build the module as the file's was, or name another file"
        )
    fit = whole[0]
    if fit.beside and part is None:
        raise CheckpointError(
            f"{label} holds the module's tensors under {fit.prefix} beside others "
            f"({shorten(fit.beside)}); pass part={fit.part!r} (--weights-part) to load it without "
            "them"
        )
    return fit
