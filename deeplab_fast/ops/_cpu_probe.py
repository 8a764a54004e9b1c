"""Measures the rates of this processor by the kernels themselves, once, and keeps them in a file.

    {"version": 1, "processors": {KEY: PROCESSOR, ...}}

A key names the processor, its instruction sets, the built extension and PyTorch's version. A file
that is broken or foreign is written anew, one that cannot be written is done without.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .. import _ext
from .._documents import parse_json, read_text
from ..dispatch import records
from ..dispatch.files import write_json
from .cpu_processors import DTYPES, SETS, Cpu, Processor, Rates

logger = logging.getLogger("deeplab_fast")

# Raised when a rate changes its meaning.
VERSION = 1
# Processors, builds and versions that a file keeps.
_KEPT = 8
# Rounds of all measurements end at this time, the first three aside.
_SECONDS = 0.07
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 9
# Steps of what is kept, so that two probes of one machine agree.
_STEP = 1.05
# Of a measurement, median over least: a machine with so much other work is asked again by the next
# process.
_UNSTEADY = 1.3
# AVX-512 is taken where it is faster than AVX2 by more than the noise of a probe.
_GAIN = 1.08
# No thread is as slow, or as fast.
_RATES = (1e7, 1e13)

# Tiles of 4 x 4 outputs in a map of 28 x 28, all of 128 channels: few outputs are nearly all
# transforms, many nearly all products.
_SIZE, _CHANNELS, _FEW, _MANY = 28, 128, 16, 256
_OWN = ("few", "many", "pixels")
_TILE4, _TILES, _PRODUCTS, _VALUES = 5, 49, 36, (36 + 36, 16 + 36)


def kept(file: Path, cpu: Cpu) -> Processor | None:
    """The rates of this processor by the file, or by a probe that the file then has.

    None where they cannot be measured.
    """
    key = _key(cpu)
    entries = _read(file)
    if found := _processor(entries.get(key), file):
        return found
    try:
        found, steady = measure(cpu)
    except Exception as error:
        # Whatever it is, the nearest processor's rates serve.
        logger.warning("The rates of this processor could not be measured: %s", error)
        return None
    if not _plausible(found):
        return None
    if not steady:
        return dataclasses.replace(found, origin="probed beside other work, not kept")
    entries.pop(key, None)
    entries[key] = {k: v for k, v in dataclasses.asdict(found).items() if k != "origin"}
    newest = dict(list(entries.items())[-_KEPT:])
    with suppress(OSError):
        write_json(file, {"version": VERSION, "processors": newest})
    return dataclasses.replace(found, origin=_origin(file))


def measure(cpu: Cpu) -> tuple[Processor, bool]:
    """The rates of one thread and the fastest instruction sets; whether they were steady."""
    found: list[tuple[Processor, bool] | BaseException] = []

    def run() -> None:
        try:
            found.append(_measure(cpu))
        except BaseException as error:
            found.append(error)

    # Modes of PyTorch (inference, autocast, tracing with fake tensors) are those of a thread.
    thread = threading.Thread(target=run, name="deeplab_fast rates")
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _measure(cpu: Cpu) -> tuple[Processor, bool]:
    ops = torch.ops.deeplab_fast
    before_threads = torch.get_num_threads()
    named = os.environ.get("DEEPLAB_FAST_CPU_SET", "")
    sets = (named,) if named else cpu.sets
    families = ("convolutions", "upsampling")
    before = {family: ops._cpu_suggest_set(family, "") for family in families}
    times: dict[tuple[str, str], list[float]] = {}
    try:
        torch.set_num_threads(1)
        with torch.no_grad():
            own, onednn = _own_calls(), _onednn_calls()
            end = time.perf_counter() + _SECONDS
            for round_ in range(_MOST_ROUNDS):
                if round_ >= _LEAST_ROUNDS and time.perf_counter() > end:
                    break
                for name in sets:
                    for family in families:
                        ops._cpu_suggest_set(family, name)
                    for call, function in own.items():
                        _time(times, (name, call), function)
                for call, function in onednn.items():
                    _time(times, ("", call), function)
    finally:
        torch.set_num_threads(before_threads)
        for family, name in before.items():
            ops._cpu_suggest_set(family, name)
    least = {key: min(seconds) for key, seconds in times.items()}
    steady = all(statistics.median(each) < _UNSTEADY * min(each) for each in times.values())
    return found_by(sets, least), steady


def found_by(sets: Sequence[str], least: Mapping[tuple[str, str], float]) -> Processor:
    """What follows from times.

    Args:
        sets: instruction sets that were measured; of two the second one must be worth it.
        least: seconds of calls of ours, by set and name, and of oneDNN's, by "" and name; those
            that are not possible are missing.
    """

    def onednn(call: str, macs: int) -> float:
        return _coarse(macs / least["", call]) if ("", call) in least else 0.0

    rows = []
    for name in sets:
        multiply, pixels, line = _own_rates(*(least[name, call] for call in _OWN))
        for dtype in DTYPES:
            pointwise = onednn(f"1x1 {dtype}", 256 * 256 * 256)
            wide = onednn(f"3x3 {dtype}", 128 * 128 * (3 * 16 - 2) ** 2)
            # With maps in bfloat16 our kernels multiply in float32.
            rows.append(Rates(name, dtype, multiply, pixels, pointwise, wide, line))

    def fastest(*calls: str) -> str:
        seconds = [sum(least[name, call] for call in calls) for name in sets]
        return sets[-1] if seconds[0] > _GAIN * seconds[-1] else sets[0]

    # Batch norms wait for memory in every set.
    return Processor(
        tuple(rows),
        "probed",
        convolutions=fastest("many", "pixels"),
        upsampling=fastest("argmax"),
        batch_norm=sets[0],
    )


def _time(times: dict[tuple[str, str], list[float]], key: tuple[str, str], function: Any) -> None:
    # Time of the processor, not of the clock: other work does not count.
    begin = time.thread_time()
    function()
    times.setdefault(key, []).append(time.thread_time() - begin)


def _own_calls() -> dict[str, Callable[[], object]]:
    """By name: tiles with few and with many outputs, a 1x1 convolution, an upsampling op."""
    ops = torch.ops.deeplab_fast
    forms = [_TILE4, _TILE4]

    def tiles(outputs: int) -> Callable[[], object]:
        x, y = _map(_CHANNELS, _SIZE), _map(outputs, _SIZE)
        weight = torch.full((outputs, _CHANNELS, 3, 3), 0.01)
        prepared = [ops._conv_prepare_tiles_cpu(weight, *forms)]
        shift = torch.zeros(outputs)
        return lambda: ops._conv_tiles_cpu(x, prepared, shift, None, y, 0, 1, forms, forms, "relu")

    x, y = _map(256, 16), _map(256, 16)
    panels, shift = torch.full((16, 256, 16), 0.01), torch.zeros(256)
    logits = _map(21, 17)
    return {
        "few": tiles(_FEW),
        "many": tiles(_MANY),
        "pixels": lambda: ops._conv_pixels_cpu(x, panels, shift, None, y, 0, "relu"),
        "argmax": lambda: ops._upsample_argmax_cpu(logits, 129, 129, False, False),
    }


def _onednn_calls() -> dict[str, Callable[[], object]]:
    if not torch.backends.mkldnn.is_available():
        return {}

    def conv(channels: int, taps: int, dtype: torch.dtype) -> Callable[[], object]:
        x = _map(channels, 16).to(dtype)
        weight = torch.full((channels, channels, taps, taps), 0.01, dtype=dtype)
        geometry = ([taps // 2] * 2, [1, 1], [1, 1], 1)
        weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
        shift = torch.zeros(channels, dtype=dtype)
        run = torch.ops.mkldnn._convolution_pointwise
        return lambda: run(x, weight, shift, *geometry, "none", [], "")

    found: dict[str, Callable[[], object]] = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        # PyTorch refuses bfloat16 where the processor does not have it.
        with suppress(RuntimeError):
            found |= {f"1x1 {name}": conv(256, 1, dtype), f"3x3 {name}": conv(128, 3, dtype)}
    return found


def _map(channels: int, size: int) -> torch.Tensor:
    x = torch.full((1, channels, size, size), 0.5)
    return x.contiguous(memory_format=torch.channels_last)


def _own_rates(few: float, many: float, pixels: float) -> tuple[float, float, float]:
    """(multiply-adds of tiles, of a 1x1 convolution, seconds of a line) by the times of calls."""
    inner, outer = _VALUES

    def work(outputs: int) -> tuple[int, int]:
        lines = _TILES * (_CHANNELS // 16 * inner + outputs // 16 * outer)
        return _PRODUCTS * _TILES * _CHANNELS * outputs, lines

    (few_macs, few_lines), (macs, lines) = work(_FEW), work(_MANY)
    # few = few_macs / rate + few_lines * line, many likewise.
    determinant = few_macs * lines - macs * few_lines
    inverse = (few * lines - many * few_lines) / determinant
    line = (few_macs * many - macs * few) / determinant
    pixel_rate = 256 * 256 * 256 / pixels
    # Noise that makes one of both absurd: the same products run in the 1x1 convolution.
    if not 0.5 < inverse * pixel_rate < 2 or not 0.2e-9 < line < 50e-9:
        inverse = 1 / pixel_rate
        line = min(max((few - few_macs * inverse) / few_lines, 1e-9), 50e-9)
    return _coarse(1 / inverse), _coarse(pixel_rate), _coarse(line)


def _coarse(value: float) -> float:
    return float(f"{_STEP ** round(math.log(value, _STEP)):.3g}")


def _plausible(found: Processor) -> bool:
    least, most = _RATES
    names = [row.instruction_set for row in found.rates]
    sets = (found.convolutions, found.upsampling, found.batch_norm)
    return (
        len(names) > 0
        and set(names) <= set(SETS)
        and set(sets) <= {"", *names}
        and all(
            row.dtype in DTYPES
            and all(least < rate < most for rate in (row.multiply, row.pixels))
            and all(rate == 0 or least < rate < most for rate in (row.onednn_1x1, row.onednn_3x3))
            and 1e-11 < row.line_seconds < 1e-6
            for row in found.rates
        )
    )


def _key(cpu: Cpu) -> str:
    assert _ext.CPU.module is not None
    built = hashlib.sha256(Path(str(_ext.CPU.module.__file__)).read_bytes()).hexdigest()[:16]
    named = os.environ.get("DEEPLAB_FAST_CPU_SET", "") or "+".join(cpu.sets)
    which = f"{cpu.vendor} {cpu.family}.{cpu.model} {cpu.name}"
    return f"{which}, {named}, build {built}, torch {torch.__version__}"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(file), str(file))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return {}
    entries = content.get("processors")
    return entries if isinstance(entries, dict) else {}


def _processor(entry: object, file: Path) -> Processor | None:
    if not isinstance(entry, dict):
        return None
    try:
        found = records.made(Processor, {**entry, "origin": _origin(file)})
    except ValueError:
        return None
    return found if _plausible(found) else None


def _origin(file: Path) -> str:
    return f"probed, in {file}"
