"""Data checks that are remembered: files that passed are not read again before they change.

A file of JSON for each data set and set of options, in $XDG_CACHE_HOME/deeplab_fast/checked
(~/.cache by default), has what each sample holds that nothing was wrong with. A sample counts as
unchanged where the files of photo and mask are those of its check, by path, inode, size, and the
times when content and inode changed: copying with times kept leaves the first as it was. A memory
that cannot be read or written is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deeplab_fast._documents import read_document
from deeplab_fast.data.check import DataReport, Finding, findings, report_of
from deeplab_fast.data.datasets import Sample, SegmentationDataset
from deeplab_fast.dispatch.files import cache_folder, write_json

__all__ = ["check_remembered", "checks_folder"]

# To be raised where a check finds what it did not before, or counts otherwise.
_VERSION = 2

# A file may change again within the clock tick of its last change: 2 s on FAT.
_SETTLED_NS = 2_000_000_000

# Bytes of one: some 300 a sample.
_LONGEST = 1 << 30

# Memories that were not used for so long are removed.
_KEPT_SECONDS = 180 * 86400


def checks_folder() -> Path:
    """Where the memories stand."""
    return cache_folder() / "checked"


def check_remembered(
    dataset: SegmentationDataset,
    *,
    workers: int = 0,
    progress: bool = False,
    recheck: bool = False,
    tell: Callable[[str], None] | None = None,
) -> DataReport:
    """The report on a data set; reads only what changed since it passed a check.

    Problems are never remembered, so that their files are read again. Nothing is remembered of data
    sets whose class is not this package's, as what they read is not known.

    Args:
        dataset, workers, progress: as ``data.check.check_dataset`` takes them.
        recheck: read all, and remember that.
        tell: takes a line on what is read and what is not.
    """
    memory = None
    # Opening them may need more than there is here: no home, no rights, ...
    with suppress(OSError, RuntimeError, ValueError):
        memory = _Memory(dataset) if _is_ours(dataset) else None
    known: dict[int, Finding] = {}
    if memory is not None and not recheck:
        known = memory.findings()
    rest = [index for index in range(len(dataset)) if index not in known]
    if tell is not None:
        tell(_plan(dataset, len(known)))
    found = dict(known)
    if rest:
        read = findings(dataset, rest, workers=workers, progress=progress)
        found.update(zip(rest, read, strict=True))
        if memory is not None:
            with suppress(OSError):
                memory.add({index: found[index] for index in rest})
    return report_of(dataset, (found[index] for index in range(len(dataset))))


def _plan(dataset: SegmentationDataset, known: int) -> str:
    count = len(dataset)
    if not known:
        return f"checking {dataset}"
    if known == count:
        return (
            f"{dataset}: unchanged since the check that it passed, not read again (--recheck reads "
            "it)"
        )
    return (
        f"checking {dataset}: {known} samples are unchanged since they passed, the other "
        f"{count - known} are read"
    )


def _is_ours(dataset: SegmentationDataset) -> bool:
    package = __name__.partition(".")[0]
    return type(dataset).__module__.partition(".")[0] == package


class _Memory:
    """The file of a data set's memory, and what its samples' files are now."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.samples = dataset.samples
        self.classes = dataset.num_classes
        self.path = checks_folder() / f"{_key(dataset)}.json"
        self.started = time.time_ns()
        # Before they are read: a file that changes meanwhile is another the next time.
        self.states = [_state(sample) for sample in dataset.samples]
        self.entries = _entries(self.path)

    def findings(self) -> dict[int, Finding]:
        """What is known of samples that have not changed, by index."""
        found = {}
        for index, (sample, state) in enumerate(zip(self.samples, self.states, strict=True)):
            entry = self.entries.get(_name(sample))
            if state is None or not isinstance(entry, Mapping) or entry.get("files") != state:
                continue
            finding = _finding(entry, self.classes)
            if finding is not None:
                found[index] = finding
        return found

    def add(self, read: Mapping[int, Finding]) -> None:
        """Remembers what nothing is wrong with, and forgets the others of these.

        Raises:
            OSError: it cannot be written.
        """
        before = dict(self.entries)
        own = {_name(sample) for sample in self.samples}
        for name in [name for name in self.entries if name not in own]:
            if not all(map(os.path.exists, name.split("\n"))):
                del self.entries[name]
        for index, finding in read.items():
            name, state = _name(self.samples[index]), self.states[index]
            self.entries.pop(name, None)
            if finding.problems or finding.pixels is None or state is None:
                continue
            if max(each[1] for each in state) <= self.started - _SETTLED_NS:
                self.entries[name] = {
                    "files": state,
                    "pixels": {str(label): n for label, n in finding.pixels.items()},
                    "ignored": {str(value): n for value, n in finding.ignored.items()},
                    "tags": finding.tags,
                }
        if self.entries == before:
            return
        write_json(self.path, {"version": _VERSION, "samples": self.entries})
        _remove_old(self.path.parent)


def _key(dataset: SegmentationDataset) -> str:
    """Of all that a finding depends on beside the files: of the data's place, their options."""
    import PIL

    folders = {os.path.abspath(sample.image.parent) for sample in dataset.samples}
    place = os.path.commonpath(folders) if folders else ""
    values = {
        "version": _VERSION,
        "pillow": PIL.__version__,
        "class": f"{type(dataset).__module__}.{type(dataset).__qualname__}",
        "place": place,
        "classes": dataset.num_classes,
        "ignore_index": dataset.ignore_index,
        "label_map": _plain(dataset.label_map),
        "unmapped": dataset.unmapped,
        "colours": _plain(dataset.colours),
        "unknown_colours": dataset.unknown_colours,
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _plain(values: Mapping[Any, int] | None) -> list[list[Any]] | None:
    return None if values is None else sorted([key, value] for key, value in values.items())


def _name(sample: Sample) -> str:
    return f"{os.path.abspath(sample.image)}\n{os.path.abspath(sample.mask)}"


def _state(sample: Sample) -> list[list[int]] | None:
    """Size, times of change and inode of photo and mask, None where one is missing."""
    try:
        files = [os.stat(path) for path in (sample.image, sample.mask)]
    except OSError:
        return None
    return [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in files]


def _entries(path: Path) -> dict[str, Any]:
    try:
        content = read_document(path, limit=_LONGEST)
        if content["version"] != _VERSION:
            return {}
        # Kept as one that is in use.
        with suppress(OSError):
            os.utime(path)
        return dict(content["samples"])
    # One that is broken is made anew.
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _finding(entry: Mapping[str, Any], classes: int) -> Finding | None:
    """What an entry says, None where it is not of this form."""
    try:
        pixels = {int(label): int(n) for label, n in entry["pixels"].items()}
        ignored = {int(value): int(n) for value, n in entry["ignored"].items()}
        finding = Finding((), pixels, ignored, str(entry["tags"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return finding if all(0 <= label < classes for label in pixels) else None


def _remove_old(folder: Path) -> None:
    for path in _files(folder):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - _KEPT_SECONDS:
                path.unlink()


def _files(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from folder.glob("*.json")
