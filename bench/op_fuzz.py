"""`python -m bench.op_fuzz`: random calls of the ops on a CPU, meant for a build with SANITIZE=1.

Three kinds of calls, in turn, each with an instruction set and a number of threads at random:

    steps     a declared op, form, dtype and implementation at random sizes, in odd strides, held
              against float64 by the rule of `dispatch.checks`, or against what is not finite
    layers    prepared convolutions of random geometry, held against float64
    hostile   a private op of the C++ extension as such a call called it, with one argument made
              wrong: it must be computed or refused in words

Ops come from their declarations and the extension's schemas: a new one is included by itself, and
one of the extension that no call reached is named at the end. Calls run in processes that may die;
what one died of is printed with the call. tests/aot/test_cpu_sanitized.py has the environment that
a build with sanitizers needs. Exit status 1 where a result is wrong, a call dies or
hangs, or an op was not reached by a run of at least 1,000 calls.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab_fast import reference, testing
from deeplab_fast.dispatch import checks
from deeplab_fast.dispatch.choice import use_backend
from deeplab_fast.dispatch.declare import declared_ops, exact, implementations, steps
from deeplab_fast.dispatch.errors import SAVING, Wrong, norm_error
from deeplab_fast.dispatch.examples import Size, Step
from deeplab_fast.ops.prepared import ACTIVATIONS, PreparedConv, activate_
from deeplab_fast.ops.prepared_bf16 import Bf16Conv
from deeplab_fast.ops.prepared_inverted_residual import Folded, PreparedInvertedResidual
from deeplab_fast.ops.quantized import Affine, quantised

# What a call may be refused with.
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError)
# Of a process: its calls, and the seconds of one of them.
CHUNK, SECONDS = 250, 60
# Calls of each private op that are kept to be made wrong.
_KEPT = 24
_NUMBERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 16, 255, 2**31 - 1, 2**31, 2**62, 2**63 - 1)
_FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-300, 1e308)
_WORDS = ("", "none", "relu", "relu6", "hardswish", "mean", "sum", "avx2", "NONE", "\0")

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Fuzzer:
    """Draws calls from a seed.

    Attributes:
        counts: (kind, outcome) -> calls.
        sets: instruction set -> calls.
        reached: names of the extension's ops that ran.
        problems: what was wrong.
    """

    def __init__(self, seed: int, note: Callable[[str], None] = lambda text: None) -> None:
        self.random = random.Random(seed)
        self._told, self._what = note, ""
        self.counts: Counter[tuple[str, str]] = Counter()
        self.sets: Counter[str] = Counter()
        self.reached: set[str] = set()
        self.problems: list[str] = []
        self._calls: dict[str, list[Call]] = {}
        self._available = testing.cpu_instruction_sets()
        self._ops = declared_ops()
        torch.manual_seed(seed)

    def note(self, what: str) -> None:
        """What is about to run."""
        self._what = what
        self._told(what)

    def run(self, calls: int) -> None:
        """Make so many calls."""
        kinds = (self._step, self._layer, self._hostile)
        for number in range(calls):
            kind = kinds[number % len(kinds)]
            if self._available:
                name = self.random.choice(self._available)
                torch.ops.deeplab_fast._cpu_instruction_set(name)
                self.sets[name] += 1
            torch.set_num_threads(self.random.choice((1, 1, 2, 3)))
            name = kind.__name__.strip("_")
            try:
                outcome = kind()
            except Wrong as wrong:
                outcome = "wrong"
                self.problems.append(f"{self._what}: {wrong}")
            except Exception as error:
                outcome = "traceback"
                self.problems.append(f"{self._what}: {type(error).__name__}: {error}"[:900])
            self.counts[name, outcome] += 1

    def _step(self) -> str:
        draw = self.random
        op = draw.choice(self._ops)
        form = draw.choice(op.examples.forms)
        dtype = draw.choice(("float32", "float32", "bfloat16", "float16", "float64"))
        size = self._size(draw.choice(op.examples.sizes))
        what = f"{op.name} {form} {dtype} {size}"
        self.note(what)
        try:
            found = steps(op.name, form, size, getattr(torch, dtype), seed=draw.randrange(1 << 30))
        except REFUSALS:
            return "refused"
        step = draw.choice(found)
        step = step.wide() if dtype == "float64" else step
        if draw.random() < 0.4:
            step = step.converted(self._odd_strides)
        runs = [i for i in op.implementations if i.backend in ("cpu", "reference")]
        runs = [i for i in runs if not self._reasons(i, step)]
        if not runs:
            return "refused"
        implementation = draw.choice(runs)
        self.note(f"{what} {implementation.backend}")
        spoilt = draw.random() < 0.1
        if spoilt:
            step = step.converted(self._spoil)
        with self._recorded():
            if spoilt or dtype == "float64" or size.n == 0:
                results = step.run(implementation.run)
            else:
                checks.check_step(step, implementation.run, dtype, "cpu")
        if not spoilt and dtype == "float64":
            self._compare64(step, results)
        elif not spoilt and size.n == 0:
            self._compare_nothing(results, step.run(reference_of(step.op)))
        return "accepted"

    def _reasons(self, implementation: Any, step: Step) -> Sequence[str]:
        with use_backend(implementation.backend):
            found: Sequence[str] = implementation.not_supported_reasons(step.desc)
        return found

    def _compare64(self, step: Step, results: Sequence[Tensor]) -> None:
        for kind, out, ref in zip(step.kinds, results, exact(step), strict=False):
            # Of no pixels what PyTorch divides by their number is nan.
            alike = torch.equal(out.isnan(), ref.isnan()) if out.shape == ref.shape else True
            if out.numel() and not (checks.error_of(kind, out, ref) <= 1e-9 or not step.size.n):
                raise Wrong(f"float64 is off by {checks.error_of(kind, out, ref):.1e}")
            if not alike:
                raise Wrong("float64: other values are nan")

    def _compare_nothing(self, results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for out, ref in zip(results, expected, strict=True):
            if out.shape != ref.shape or not torch.equal(out.isnan(), ref.isnan()):
                raise Wrong(f"{list(out.shape)} of no images, {list(ref.shape)} by the reference")

    def _size(self, size: Size) -> Size:
        """A size like one that the op is declared with, small, with edges."""
        draw = self.random

        def length() -> int:
            return draw.choice((1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 24))

        def channels() -> int:
            return draw.choice((1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40))

        rates = tuple(draw.choice((1, 2, 3, 6, 8, 12, 25, 2**31 - 1)) for _ in size.rates)
        if draw.random() < 0.3 and len(size.rates) <= 1:
            rates = () if rates else (draw.choice((1, 2, 5, 2**30)),)
        layers = tuple(
            (channels(), channels(), k, k) for k in draw.choices((1, 3, 7), k=len(size.layers))
        )
        return replace(
            size,
            n=draw.choice((0, 1, 1, 2, 3)),
            # Of one class a gradient is nothing but rounding.
            c=max(channels(), 2 if size.height else 1),
            h=length(),
            w=length(),
            height=size.height and draw.choice((1, 2, 5, 16, 17, 31, 33, 40)),
            width=size.width and draw.choice((1, 2, 5, 16, 17, 31, 33, 40)),
            filters=size.filters and channels(),
            rates=rates,
            pooled=size.pooled and channels(),
            classes=size.classes and channels(),
            stride=1 if rates else draw.choice((1, 1, 2, 3)),
            layers=layers,
        )

    def _odd_strides(self, t: Tensor) -> Tensor:
        """The same values in memory that has others between them."""
        if t.dim() == 0 or t.numel() == 0:
            return t
        axis, step = self.random.randrange(t.dim()), self.random.choice((1, 2, 3))
        shape = list(t.shape)
        shape[axis] = shape[axis] * step + 1
        wide = torch.full(shape, float("nan")).to(t.dtype)
        view = wide.narrow(axis, 1, t.shape[axis] * step)
        view = view[(slice(None),) * axis + (slice(None, None, step),)]
        return view.copy_(t)

    def _spoil(self, t: Tensor) -> Tensor:
        t = t.clone()
        if t.numel():
            values = t.view(-1) if t.is_contiguous() else t.reshape(-1)
            values[self.random.randrange(t.numel())] = self.random.choice(_FLOATS[:3])
            t = values.view(t.shape)
        return t

    def _layer(self) -> str:
        draw = self.random
        kind = draw.choice((self._conv, self._conv, self._conv, self._block, self._bytes))
        with torch.no_grad(), self._recorded():
            return kind()

    def _axis(self) -> tuple[int, int, int, int, int]:
        """(size, taps, stride, padding, dilation)."""
        draw = self.random
        size = draw.choice((1, 1, 2, 3, 4, 5, 6, 9, 14, 20))
        stride, dilation = draw.choice((1, 1, 1, 2, 2, 3, 5)), draw.choice((1, 1, 2, 3, 5, 8))
        taps = draw.choice((1, 1, 2, 3, 3, 3, 5))
        return size, taps, stride, draw.choice((0, 1, 2, dilation, dilation, 7)), dilation

    def _conv(self) -> str:
        draw = self.random
        rows = self._axis()
        columns = self._axis() if draw.random() < 0.4 else (draw.choice((1, 2, 6, 13)), *rows[1:])
        (height, *_), (width, *_) = rows, columns
        taps, stride, padding, dilation = zip(rows[1:], columns[1:], strict=True)
        c, k = draw.choice((1, 3, 4, 8, 16, 17, 33)), draw.choice((1, 2, 8, 16, 17, 40))
        groups = draw.choice((1, 1, 1, 2, c))
        c, k = (c, c) if groups == c else (c * groups, k * groups)
        act = draw.choice(ACTIVATIONS)
        bf16 = draw.random() < 0.3
        if draw.random() < 0.05:
            stride, dilation = draw.choice(
                ((stride, (2**31 - 1,) * 2), ((2**31 - 1,) * 2, dilation))
            )
        geometry = (stride, padding, dilation, groups)
        shape = (draw.choice((1, 2)), c, height, width)
        what = f"{'Bf16Conv' if bf16 else 'PreparedConv'} {shape} {(k, c // groups, *taps)}"
        what += f" {geometry} {act}"
        self.note(what)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        x, weight = torch.randn(shape), torch.randn(k, c // groups, *taps) / (c * max(taps)) ** 0.5
        scale, shift = torch.rand(k) + 0.5, torch.randn(k)
        make = Bf16Conv if bf16 else PreparedConv
        conv = (
            make(weight, scale, shift, act=act, reuse=True, **options)
            if not bf16
            else make(weight, scale, shift, act=act, **options)
        )
        if bf16:
            x = x.bfloat16()
        if draw.random() < 0.3:
            x = self._odd_strides(x)
        try:
            conv.plan(shape)
        except ValueError:
            return "refused"
        wide, shift64 = conv.folded()
        y = reference.convolution(x.double(), wide.double(), shift64.double(), *geometry)
        residual = None
        if draw.random() < 0.3:
            residual = torch.randn(y.shape).to(x.dtype)
            y = y + residual.double()
        exact_y = activate_(y, act)
        if bf16:
            found = conv(x) if residual is None else conv(x, residual)
            bound = 2.0**-7
        else:
            found, bound = conv(x, residual), SAVING
        # An activation may leave little of a map.
        error = norm_error(found, exact_y) if exact_y.abs().max() > 0.1 else 0.0
        if found.shape != exact_y.shape or not error <= 2 * bound:
            raise Wrong(f"{what} ({conv.plan(shape).kernel}) is off by {error:.1e}")
        return "accepted"

    def _block(self) -> str:
        draw = self.random
        rows = self._axis()
        columns = (draw.choice((1, 2, 6, 13)), *rows[1:])
        taps, stride, padding, dilation = zip(rows[1:], columns[1:], strict=True)
        c, k, out = (draw.choice((1, 3, 8, 16, 17, 40)) for _ in range(3))
        acts = [draw.choice(ACTIVATIONS) for _ in range(2)]
        expands = draw.random() < 0.7
        c = c if expands else k
        what = f"block {c}-{k}-{out} {rows} {columns} {acts} {expands}"
        self.note(what)

        def folded(*shape: int, act: str | None) -> Folded:
            weight = torch.randn(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5
            return Folded(weight, torch.rand(shape[0]) + 0.5, torch.randn(shape[0]), act)

        parts = [
            folded(k, c, 1, 1, act=acts[0]) if expands else None,
            folded(k, 1, *taps, act=acts[1]),
            folded(out, k, 1, 1, act=None),
        ]
        squeeze = draw.choice((None, lambda means: torch.sigmoid(means)))
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        block = PreparedInvertedResidual(*parts, **geometry, squeeze=squeeze)
        x = torch.randn(draw.choice((1, 2)), c, rows[0], columns[0])
        try:
            block.output_shape(x.shape, None)
        except ValueError:
            return "refused"
        y = x.double()
        for part in parts:
            if part is None:
                continue
            filters = part.weight.double() * part.scale.double()[:, None, None, None]
            spatial = part is parts[1]
            options = (stride, padding, dilation, k) if spatial else (1, 0, 1, 1)
            y = reference.convolution(y, filters, part.shift.double(), *options)
            y = activate_(y, part.act)
            if spatial and squeeze is not None:
                y = y * squeeze(y.mean((2, 3)))[:, :, None, None]
        found = block(x)
        error = norm_error(found, y)
        if found.shape != y.shape or not error <= 2 * SAVING:
            raise Wrong(f"{what} is off by {error:.1e}")
        return "accepted"

    def _bytes(self) -> str:
        draw = self.random
        n, c, h, w = (draw.choice((1, 2, 3, 5, 17, 33)) for _ in range(4))
        self.note(f"bytes, max pool, hash {(n, c, h, w)}")
        x = torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last)
        affine = Affine(0.05, draw.choice((0, 100, 255)))
        q = quantised(x, affine)
        assert q is not None
        wanted = (x / affine.scale).round().add(affine.zero_point).clamp(0, 255)
        again = (q.values.double() - affine.zero_point) * affine.scale
        # A product with a reciprocal may round a tie the other way.
        if (q.values.double() - wanted.double()).abs().max() > 1 or (
            norm_error(q.dequantised(), again) > 1e-6
        ):
            raise Wrong(f"bytes of {tuple(x.shape)} are wrong")
        ops = torch.ops.deeplab_fast
        kernel, stride = draw.choice((1, 2, 3)), draw.choice((1, 2))
        padding = draw.randrange(kernel // 2 + 1)
        if min(h, w) + 2 * padding >= kernel:
            pooled = torch.nn.functional.max_pool2d(x, kernel, stride, padding)
            out = torch.empty_like(pooled, memory_format=torch.channels_last)
            options = ([kernel] * 2, [stride] * 2, [padding] * 2, [1, 1])
            ops._max_pool_cpu(x, *options, out)
            if not torch.equal(out, pooled):
                raise Wrong(f"max pool of {tuple(x.shape)} {options} is wrong")
        ops._hash_bytes([x, q.values])
        ops._conv_form(draw.randrange(5))
        ops._bilinear_axis(h, w, draw.random() < 0.5, draw.random() < 0.5)
        ops._exp_nonpositive_cpu(-x.abs())
        ops._log_from_one_cpu(1 + x.abs())
        ops._conv_tile_units([n, c, h, w], 8, 1, [5, 5], [5, 5], 2)
        ops._cpu_suggest_set("upsampling", "")
        ops._conv_panels_bf16_cpu(torch.randn(2, c, 16))
        return "accepted"

    def _recorded(self) -> TorchDispatchMode:
        fuzzer = self

        class Recorded(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                kwargs = kwargs or {}
                name = func.name().partition("::")[2].partition(".")[0]
                if func.namespace == "deeplab_fast" and name.startswith("_"):
                    fuzzer.reached.add(name)
                    kept = fuzzer._calls.setdefault(name, [])
                    call = (func, _copied(args), _copied(kwargs))
                    if len(kept) < _KEPT:
                        kept.append(call)
                    elif fuzzer.random.random() < 0.1:
                        kept[fuzzer.random.randrange(_KEPT)] = call
                return func(*args, **kwargs)

        return Recorded()

    def _hostile(self) -> str:
        if not self._calls:
            return self._layer()
        name = self.random.choice(sorted(name for name in self._calls if name not in _TABLES))
        func, args, kwargs = self.random.choice(self._calls[name])
        # Results must not be read by later calls.
        args, kwargs = list(_copied(args)), _copied(kwargs)
        for _ in range(self.random.choice((1, 1, 1, 2))):
            place = self.random.randrange(len(args))
            try:
                args[place] = self._wrong(args[place])
            except RuntimeError:
                # What is wrong already may be too large for the second change.
                break
        self.note(f"hostile {name}({', '.join(_shown(a) for a in args)})")
        try:
            func(*args, **kwargs)
        except REFUSALS:
            return "refused"
        return "accepted"

    def _wrong(self, value: Any) -> Any:
        draw = self.random
        if isinstance(value, Tensor):
            return self._wrong_tensor(value)
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return draw.choice((*_NUMBERS, value + 1, value - 1))
        if isinstance(value, float):
            return draw.choice(_FLOATS)
        if isinstance(value, str):
            return draw.choice(_WORDS)
        if isinstance(value, (list, tuple)):
            changed = list(value)
            if changed and draw.random() < 0.8:
                place = draw.randrange(len(changed))
                changed[place] = self._wrong(changed[place])
            elif changed:
                changed.pop()
            return changed
        return draw.choice((None, torch.randn(3)))

    def _wrong_tensor(self, t: Tensor) -> Tensor:
        draw = self.random
        axis = draw.randrange(t.dim()) if t.dim() else -1
        ways: list[Callable[[], Tensor]] = [
            lambda: t.to(
                draw.choice((torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool))
            ),
            lambda: t.unsqueeze(0),
            lambda: t.flatten(),
            lambda: torch.full_like(t, float("nan")) if t.is_floating_point() else t - 300,
            lambda: torch.empty_like(t, device="meta"),
        ]
        if axis >= 0:
            ways += [
                lambda: t.narrow(axis, 0, 0),
                lambda: t.narrow(axis, 0, max(0, t.shape[axis] - 1)),
                lambda: torch.cat([t, t], axis),
                lambda: t.transpose(axis, 0),
                lambda: t.select(axis, 0) if t.shape[axis] else t,
                lambda: t.narrow(axis, 0, 1).expand_as(t) if t.shape[axis] else t,
                lambda: (
                    t.narrow(axis, 0, 1).expand(
                        *[2**40 if i == axis else s for i, s in enumerate(t.shape)]
                    )
                    if t.shape[axis]
                    else t
                ),
                lambda: self._odd_strides(t),
            ]
        return draw.choice(ways)()


def reference_of(op: str) -> Callable[..., Any]:
    """The reference's implementation of an op."""
    return implementations(op)["reference"].run


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        # Strides as they are.
        return value.clone() if value.untyped_storage().nbytes() == value.nbytes else value
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(part) for part in value)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return value


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}{list(value.stride())}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value)


def private_ops() -> list[str]:
    """Names of the C++ extension's private ops that have a schema."""
    names = torch._C._dispatch_get_all_op_names()
    found = (re.fullmatch(r"deeplab_fast::(_\w+)", name) for name in names)
    return sorted({match[1] for match in found if match})


# They set what all threads use, or make tables for tests, as long as they are asked for.
_SETTERS = ("_cpu_instruction_set", "_cpu_suggest_set", "_conv_bf16_set", "_conv_form")
_TABLES = ("_bilinear_axis", "_conv_tile_units")


def _work(seed: int, calls: int, report: Path) -> None:
    """Run a chunk in this process."""
    with open(report.with_suffix(".last"), "w") as last:

        def note(text: str) -> None:
            # Of the processor: others may be at work.
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            last.seek(0)
            last.write(text)
            last.truncate()
            last.flush()

        fuzzer = Fuzzer(seed, note)
        fuzzer.run(calls)
    found = {
        "counts": [[*key, count] for key, count in fuzzer.counts.items()],
        "sets": fuzzer.sets,
        "reached": sorted(fuzzer.reached),
        "problems": fuzzer.problems,
        "private": private_ops(),
    }
    report.write_text(json.dumps(found))


def _causes(text: str) -> str:
    """What a sanitizer or a traceback says, without the frames of Python and PyTorch."""
    telling = re.compile(r"ERROR|runtime error|WARNING: Thread|deeplab_fast|Error\b|^(READ|WRITE)")
    lines = [line for line in text.splitlines() if telling.search(line)]
    return "\n".join(line[:300] for line in lines[:20]) or text[-1000:]


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0 where all is right."""
    parser = argparse.ArgumentParser(prog="python -m bench.op_fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=CHUNK, help="calls of a process")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work:
        _work(options.seed, options.calls, options.work)
        return 0
    began, counts, sets = time.monotonic(), Counter(), Counter()
    reached: set[str] = set()
    private: set[str] = set()
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, first in enumerate(range(0, options.calls, options.chunk)):
            report = Path(folder, f"{number}.json")
            calls = min(options.chunk, options.calls - first)
            seed = options.seed + number
            command = [sys.executable, "-W", "ignore", "-m", "bench.op_fuzz"]
            command += ["--work", str(report), "--seed", str(seed), "--calls", str(calls)]
            ran = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if ran.returncode:
                last = report.with_suffix(".last")
                what = last.read_text() if last.exists() else "its start"
                end = "hung" if ran.returncode == -signal.SIGPROF else f"died ({ran.returncode})"
                counts["processes", end] += 1
                problems.append(f"seed {seed} {end} in {what}\n{_causes(ran.stderr)}")
                print(problems[-1], flush=True)
                continue
            found = json.loads(report.read_text())
            for kind, outcome, count in found["counts"]:
                counts[kind, outcome] += count
            sets.update(found["sets"])
            reached.update(found["reached"])
            private.update(found["private"])
            for problem in found["problems"]:
                problems.append(f"seed {seed} {problem}")
                print(problems[-1], flush=True)
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind} {outcome}: {count}")
    print("instruction sets:", ", ".join(f"{name} {n}" for name, n in sorted(sets.items())))
    missing = sorted(private - reached - {*_SETTERS, *_TABLES})
    print(f"private ops reached: {len(reached & private)}; not reached: {missing or 'none'}")
    print(f"{sum(counts.values())} calls in {time.monotonic() - began:.0f} s")
    return 1 if problems or (missing and options.calls >= 1000) else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
