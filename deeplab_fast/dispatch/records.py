"""Records of what GPU kernels were shown to do: the file format, and its one reader and writer.

    {"version": 1, "note": TEXT, "records": [RECORD, ...]}

A record says of one kernel (op, backend, fingerprint of its sources), in one dtype and form, on one
compute capability: whether its results were right, how long it takes beside PyTorch's best form of
the same step at some sizes, and which launch configurations were measured as the fastest.

    shipped.json                                in the package: measured by its developers
    $XDG_CACHE_HOME/deeplab_fast/records.json   yours, by `deeplab-fast tune`; ~/.cache by default

Of yours a record counts while driver, PyTorch and Triton are those that it was made with. A shipped
one of a Triton kernel counts for its minor version of Triton; of another one or on another compute
capability it is a reason to check the kernel at first use (`trust`).

`DEEPLAB_FAST_RECORDS` names another file for yours; 0 leaves all records unread. The files are read
once in a process. A record that does not fit is left out, with one line in the log that says why.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import logging
import os
import re
import types
import typing
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from .._documents import parse_json, read_text, shown
from .files import cache_folder, write_json

logger = logging.getLogger("deeplab_fast")

ENVIRONMENT_VARIABLE = "DEEPLAB_FAST_RECORDS"
SHIPPED = Path(__file__).with_name("shipped.json")
# Raised when the fields of a record change their meaning.
VERSION = 1
# No size, time or number of anything is as large.
_MOST = 2**63

# Sources and versions of one kernel on one GPU whose records a file keeps.
_KEPT = 8
PASSED = "passed"
FAILED = "failed"
SHIPPED_ORIGIN = "shipped"
OWN_ORIGIN = "yours"


@dataclass(frozen=True)
class Time:
    """How long one call takes, beside PyTorch.

    Attributes:
        sizes: of the call, as `trust.sizes` has them.
        ms: of the kernel, a median.
        pytorch_ms: of the fastest of PyTorch's own forms, a median.
        pytorch: which form that was.
        gain: median over rounds of the ratio of both.
        peak_mb, pytorch_peak_mb: most memory beyond what was there before, MiB; -1 where not
            measured.
    """

    sizes: tuple[int, ...]
    ms: float
    pytorch_ms: float
    pytorch: str
    gain: float
    peak_mb: float = -1.0
    pytorch_peak_mb: float = -1.0


@dataclass(frozen=True)
class Config:
    """A launch configuration that was measured to be faster than the rule's choice.

    Attributes:
        kernel: name in `deeplab_fast.kernels.tuned.TUNABLE`.
        key: fields of that entry's key: the call.
        config: fields of its configuration.
        gain: median over rounds of the time by rule over the time with it.
    """

    kernel: str
    key: dict[str, Any]
    config: dict[str, Any]
    gain: float


@dataclass(frozen=True)
class Record:
    """What was found of a kernel on a GPU.

    Attributes:
        op: name in `deeplab_fast.ops`.
        backend: "triton" or "cuda".
        dtype: "bfloat16", "float16", "float32", or "tf32" for products of rounded fp32 operands.
        form: `trust.form` of the calls.
        capability: compute capability.
        source: fingerprint of the sources (`sources`).
        verdict: PASSED or FAILED.
        reason: the check that failed; "" where none did.
        gpu: name of the device.
        driver, torch, triton: versions.
        date: YYYY-MM-DD.
        commit: of the checkout, or "".
        error, bound: largest relative error that was found, and the one allowed there.
        times: by size.
        configs: launch configurations.
        origin: SHIPPED_ORIGIN or OWN_ORIGIN; not in the file.
    """

    op: str
    backend: str
    dtype: str
    form: str
    capability: tuple[int, int]
    source: str
    verdict: str
    reason: str
    gpu: str
    driver: str
    torch: str
    triton: str
    date: str
    commit: str = ""
    error: float = 0.0
    bound: float = 0.0
    times: tuple[Time, ...] = ()
    configs: tuple[Config, ...] = ()
    origin: str = dataclasses.field(default=OWN_ORIGIN, compare=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """What two records of the same thing have in common: the later one replaces the other."""
        kernel = (self.op, self.backend, self.dtype, self.form)
        versions = (self.driver, self.torch, self.triton)
        return *kernel, self.capability, self.gpu, *versions, self.source

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON has it."""
        fields = dataclasses.asdict(self)
        del fields["origin"]
        return fields


@dataclass(frozen=True)
class Versions:
    """What a record of one's own depends on beside the GPU."""

    driver: str
    torch: str
    triton: str

    @classmethod
    @cache
    def here(cls) -> Versions:
        """Those of this process, without making a CUDA context."""
        import torch

        return cls(_driver(), str(torch.__version__), installed_triton())


def own_path() -> Path | None:
    """The file of one's own records; None where records are switched off."""
    named = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if named == "0":
        return None
    if named:
        return Path(named).expanduser()
    return cache_folder() / "records.json"


def all_records() -> tuple[Record, ...]:
    """The records that may count here, one's own first."""
    path = own_path()
    return () if path is None else _loaded(path, SHIPPED)


def forget() -> None:
    """Read the files anew at the next question: they were changed."""
    _loaded.cache_clear()


def read(path: Path, origin: str = OWN_ORIGIN) -> list[Record]:
    """The records of a file; those that do not fit are left out, with a line in the log.

    Raises:
        ValueError: the file cannot be read, or is of another version.
    """
    try:
        content = parse_json(read_text(path, limit=_LONGEST), str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise ValueError(f'{path} is no object with a list of "records"')
    if content.get("version") != VERSION:
        raise ValueError(f"{path} is of version {content.get('version')!r}, here it is {VERSION}")
    found = []
    for number, given in enumerate(content["records"]):
        try:
            record = made(Record, given, optional=True)
            if record.verdict not in (PASSED, FAILED):
                raise ValueError(f"verdict is {record.verdict!r}, expected {PASSED} or {FAILED}")
        except ValueError as error:
            logger.warning("%s: record %d is left out: %s", path, number, error)
            continue
        found.append(dataclasses.replace(record, origin=origin))
    return found


def note(path: Path) -> str:
    """What a file says of itself, "" where it says nothing."""
    with suppress(OSError, ValueError, AttributeError):
        return str(parse_json(read_text(path, limit=_LONGEST)).get("note", ""))
    return ""


def write(path: Path, records: Iterable[Record], note: str = "") -> None:
    """Put records in place of a file, under a temporary name first."""
    ordered = sorted(records, key=lambda record: record.key)
    content = {"version": VERSION, "note": note, "records": [r.as_dict() for r in ordered]}
    write_json(path, content)


def update(path: Path, new: Iterable[Record]) -> None:
    """Merge records into a file, which other processes may do at the same time.

    A file that cannot be read is moved aside, as NAME.unread.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old: list[Record] = []
        if path.is_file():
            try:
                old = read(path)
            except ValueError:
                # Of a newer version of the package, perhaps.
                os.replace(path, path.with_name(f"{path.name}.unread"))
        write(path, merged(old, new))


def merged(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """Records with those of the same key replaced.

    A new record keeps what it did not measure anew: times at other sizes, and configurations for
    other calls. Of one kernel on one GPU the latest `_KEPT` are kept: other checkouts and
    environments have theirs.
    """
    found = {record.key: record for record in old}
    for record in new:
        before = found.pop(record.key, None)
        found[record.key] = record if before is None else _joined(before, record)
    of_kernel: dict[tuple[Any, ...], list[Record]] = {}
    for record in found.values():
        kernel = (record.op, record.backend, record.dtype, record.form)
        of_kernel.setdefault((*kernel, record.capability, record.gpu), []).append(record)
    return [record for some in of_kernel.values() for record in some[-_KEPT:]]


def _joined(before: Record, record: Record) -> Record:
    if record.verdict != PASSED:
        return record
    sizes = {time.sizes for time in record.times}
    calls = [(config.kernel, config.key) for config in record.configs]
    return dataclasses.replace(
        record,
        times=(*record.times, *(t for t in before.times if t.sizes not in sizes)),
        configs=(
            *record.configs,
            *(c for c in before.configs if (c.kernel, c.key) not in calls),
        ),
    )


def installed_triton() -> str:
    """Version of Triton, without importing it; "" where it has none to show."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def minor(version: str) -> str:
    """Major and minor number of a version: what a compiler's results depend on."""
    return ".".join(version.split(".")[:2])


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


# Bytes of a file of records: some hundred bytes each, some hundred of them.
_LONGEST = 64 << 20

_D = TypeVar("_D", bound=_Dataclass)


def made(kind: type[_D], given: object, optional: bool = False) -> _D:
    """An instance of a dataclass from what JSON made of another.

    Args:
        kind: the dataclass.
        given: an object of JSON.
        optional: fields with a default may be missing.

    Raises:
        ValueError: fields are unknown, missing or of another type.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(given, dict):
        raise ValueError(f"{kind.__name__} is {shown(given)}, expected an object")
    required = {
        name for name, f in fields.items() if not optional or (f.default is dataclasses.MISSING)
    }
    for names, what in ((given.keys() - fields, "unknown"), (required - given.keys(), "missing")):
        if names:
            raise ValueError(
                f"{kind.__name__}: {what} field {shown(', '.join(sorted(map(str, names))), 200)}"
            )
    return kind(**{name: _value(name, hints[name], v, optional) for name, v in given.items()})


def _value(name: str, hint: object, given: object, optional: bool) -> object:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return made(hint, given, optional)
    if typing.get_origin(hint) is tuple:
        parts: tuple[Any, ...] = typing.get_args(hint)
        if not isinstance(given, list):
            raise ValueError(f"{name} is {shown(given)}, expected a list")
        if parts[-1] is Ellipsis:
            parts = parts[:1] * len(given)
        if len(parts) != len(given):
            raise ValueError(f"{name} is {shown(given)}, expected {len(parts)} values")
        return tuple(_value(name, p, each, optional) for p, each in zip(parts, given, strict=True))
    if typing.get_origin(hint) is dict:
        if not isinstance(given, dict):
            raise ValueError(f"{name} is {shown(given)}, expected an object")
        return given
    assert isinstance(hint, type) and not isinstance(hint, types.UnionType)
    # A float may be written without a point. Not isinstance: true and false are integers too.
    if hint is float and isinstance(given, int) and not isinstance(given, bool):
        given = float(given) if abs(given) < _MOST else given
    if type(given) is not hint:
        raise ValueError(f"{name} is {shown(given, 60)}, expected {hint.__name__}")
    if isinstance(given, (int, float)) and not -1 <= given < _MOST:
        # A comparison with NaN is false.
        raise ValueError(f"{name} is {shown(given, 60)}, expected a number of at least -1")
    return given


@cache
def _loaded(own: Path, shipped: Path) -> tuple[Record, ...]:
    found: list[Record] = []
    for path, origin in ((own, OWN_ORIGIN), (shipped, SHIPPED_ORIGIN)):
        if not path.is_file():
            continue
        try:
            found += read(path, origin)
        except ValueError as error:
            logger.warning(
                "%s; its records do not count (deeplab-fast tune writes yours anew, %s=0 leaves "
                "all unread)",
                error,
                ENVIRONMENT_VARIABLE,
            )
    return tuple(found)


def _driver() -> str:
    """Version of NVIDIA's driver, or of the CUDA that it offers; "" without one."""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text("utf-8", "replace")
        if match := re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text):
            return match[1]
    import torch

    get = getattr(torch._C, "_cuda_getDriverVersion", None)
    with suppress(Exception):
        if get is not None and (number := get()):
            return f"CUDA {number // 1000}.{number % 1000 // 10}"
    return ""
