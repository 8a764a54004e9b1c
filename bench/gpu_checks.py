"""Programs of whole models on a GPU, checked: units of `bench.gpu`.

What tests show of them on CPU tensors (`tests/models/test_on_gpu.py`) is asked of the device: their
numbers with its kernels, CUDA graphs, streams, threads, captures of others, memory that runs out.
"""

from __future__ import annotations

import copy
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from deeplab_fast import backends, get_model, optimize
from deeplab_fast.dispatch.errors import DIRECT, Wrong, norm_error
from deeplab_fast.ops.folded_conv import Filters, FoldedConv, Settings
from deeplab_fast.program import capture, gpu_layers
from deeplab_fast.testing import tf32
from deeplab_fast.tuning.machine import Machine

from .files import ROOT
from .gpu_measure import synchronize, tiny
from .launch_stub import network
from .registry import spread_batch_norm

# Of every kind of block and head that has a rule: (builder, options).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet50": ("deeplabv3_resnet50", {"aux_loss": True}),
    "mobilenetv3": ("deeplabv3_mobilenet_v3_large", {}),
    "mobilenetv2": ("deeplabv3_mobilenet_v2_tf", {}),
    "efficientnet-lite": ("deeplabv3_efficientnet_lite0", {}),
    "fregu856": ("fregu856_resnet18", {}),
    "wide projection": ("deeplabv3_resnet18", {"head": "mmseg", "aspp_channels": 64}),
    "sum of branches": ("deeplabv3_resnet18", {"head": "deeplabv2"}),
}
# Of these, those that have all of our kernels.
FORCED = ("resnet50", "mobilenetv3")
_CLASSES = 5
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows and columns that no stride divides; one image has a shift of its own in the projection, two
# have one each.
_SIDES = (49, 66)
_TINY_SIDES = (17, 18)
_BATCHES = (2, 1)
_THREADS, _CALLS = 4, 6

Logits = dict[str, Tensor]


@contextmanager
def as_on_gpu(machine: Machine) -> Iterator[None]:
    """Models run as on a GPU: in a rehearsal too, with a stand-in for CUDA graphs."""
    if not tiny(machine):
        yield
        return
    folder = str(ROOT / "tests" / "helpers")
    if folder not in sys.path:
        sys.path.append(folder)
    from stand_in_capture import StandInCapture

    with patch.object(gpu_layers, "on_gpu", lambda x: True), capture.using(StandInCapture()):
        yield


def numbers(machine: Machine, family: str, backend: str) -> dict[str, Any]:
    """A family's programs against plain modules in float64: dtypes, batches, with graphs and
    without, under autocast, optimised.

    Args:
        machine: the GPU.
        family: of `FAMILIES`.
        backend: the choice of kernels.

    Raises:
        Wrong: an error exceeds the bound, or a call took another way than it should.
    """
    rows = []
    with _checking(machine), torch.no_grad():
        model = _model(machine.device, family)
        # A CPU emulates the types of 16 bits.
        few = slice(1 if tiny(machine) else None)
        for batch in _BATCHES[few]:
            x = torch.randn(batch, 3, *_sides(machine), device=machine.device)
            exact = _plain(copy.deepcopy(model).double(), x.double())
            for dtype in _DTYPES[few]:
                own, given = copy.deepcopy(model).to(dtype), x.to(dtype)
                plain = _plain(own, given)
                with backends.use_backend(backend):
                    for name, run in _ways(machine, model, own, x, given):
                        group = f"{family} b{batch} {dtype} {name}"
                        for _ in range(3):
                            y = run()
                            synchronize(machine.device)
                        rows.append(_compared(group, model, y, plain, exact))
    return {"rows": rows}


def _ways(
    machine: Machine, masters: nn.Module, own: Any, x: Tensor, given: Tensor
) -> Iterator[tuple[str, Callable[[], Logits]]]:
    """(name, call) of what a dtype can be run by; `own` and `given` have it, the others fp32."""
    for graphs in (False, True):
        own.cuda_graphs = graphs
        if reasons := own.fast_reasons(given):
            raise Wrong(f"plain modules run: {'; '.join(reasons)}")
        yield f"graphs={graphs}", partial(own.all_logits, given)
    frozen = optimize(masters, keep_aux=True, dtype=given.dtype)
    frozen.cuda_graphs = True
    if frozen.reasons:
        raise Wrong(f"not optimised: {'; '.join(frozen.reasons)}")

    def frozen_logits() -> Logits:
        # What follows the logits is the same for all.
        with patch.object(torch.nn.functional, "interpolate", lambda y, **options: y):
            return frozen(given)

    yield "optimize", frozen_logits
    if given.dtype != torch.float32:

        def under_autocast() -> Logits:
            with torch.autocast(machine.device, given.dtype):
                return masters.all_logits(x)

        yield "autocast", under_autocast


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of what `numbers` runs of `FORCED` by Triton, without data."""
    for family, batch, dtype in product(FORCED, _BATCHES, _DTYPES):
        for weights in dict.fromkeys((dtype, torch.float32)):
            model = _model("meta", family).to(weights)
            call = partial(network, model, dtype, (batch, 3, *_SIDES))
            yield f"program {family} b{batch} {dtype} from {weights}", call


def never_stale(machine: Machine) -> dict[str, Any]:
    """Changes of a model that runs by graphs show in its next call.

    Raises:
        Wrong: one does not.
    """
    rows = []
    for name, change in _CHANGES.items():
        with _checking(machine):
            model, x = _small(machine)
            model.cuda_graphs = True
            before = [_logits(model, x) for _ in range(3)][-1]
            change(model)
            after = _plain(model, x)
            if norm_error(after["out"], before["out"]) < 1e-2:
                raise Wrong(f"{name}: the change shows in nothing")
            exact = _plain(copy.deepcopy(model).double(), x.double())
            for _ in range(3):
                rows.append(_compared(name, model, _logits(model, x), after, exact))
    return {"rows": rows}


def _double_filters(model: Any) -> None:
    _first(model, nn.Conv2d).weight.data.mul_(2)


def _statistics(model: Any) -> None:
    _first(model, nn.BatchNorm2d).running_var.data.mul_(4)


def _on_a_side_stream(model: Any) -> None:
    weight = _first(model, nn.Conv2d).weight
    if not weight.is_cuda:
        weight.detach().mul_(-1)
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        weight.detach().mul_(-1)
    torch.cuda.current_stream().wait_stream(stream)


def _other_parameter(model: Any) -> None:
    conv = _first(model, nn.Conv2d)
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def _eps(model: Any) -> None:
    _first(model, nn.BatchNorm2d).eps = 3.0


_CHANGES: dict[str, Callable[[Any], None]] = {
    "a write through .data": _double_filters,
    "a write to statistics": _statistics,
    "a write on another stream": _on_a_side_stream,
    "another parameter": _other_parameter,
    "an attribute": _eps,
}


def _first(model: nn.Module, kind: type[nn.Module]) -> Any:
    return next(m for m in model.modules() if isinstance(m, kind))


def streams(machine: Machine) -> dict[str, Any]:
    """Calls of one model in turns on two streams, whose graphs share a pool.

    Raises:
        Wrong: a result is not that of its input.
    """
    with _checking(machine):
        model, _ = _small(machine)
        model.cuda_graphs = True
        inputs = _inputs(machine, 2 * _CALLS)
        expected = [_both(model, x) for x in inputs]
        sides = [_Side(machine) for _ in range(2)]
        for x in inputs[:2]:
            _logits(model, x)
        synchronize(machine.device)
        results = []
        for i, x in enumerate(inputs):
            with sides[i % 2]:
                results.append(_logits(model, x))
        synchronize(machine.device)
        pairs = zip(results, expected, strict=True)
        return {"rows": [_compared("stream", model, y, *both) for y, both in pairs]}


def threads(machine: Machine) -> dict[str, Any]:
    """Calls of one model in several threads, each on a stream of its own.

    Raises:
        Wrong: a result is not that of its input, or a thread raised.
    """
    with _checking(machine):
        model, _ = _small(machine)
        model.cuda_graphs = True
        inputs = _inputs(machine, _THREADS)
        expected = [_both(model, x) for x in inputs]
        results: list[list[Logits]] = [[] for _ in inputs]
        problems: list[str] = []
        start = threading.Barrier(_THREADS)

        def work(i: int) -> None:
            try:
                start.wait()
                with _Side(machine):
                    results[i] += [_logits(model, inputs[i]) for _ in range(_CALLS)]
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}")

        running = [threading.Thread(target=work, args=(i,)) for i in range(_THREADS)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        synchronize(machine.device)
        if problems:
            raise Wrong(f"{len(problems)} threads raised, first: {problems[0][:200]}")
        return {
            "rows": [
                _compared(f"thread {i}", model, y, *expected[i])
                for i, own in enumerate(results)
                for y in own
            ]
        }


def foreign_capture(machine: Machine) -> dict[str, Any]:
    """A model in a CUDA graph of its caller runs its plain modules: replays see changed weights.

    Raises:
        Wrong: a replay is stale.
    """
    with _checking(machine):
        model, x = _small(machine)
        model.cuda_graphs = True
        for _ in range(3):
            _logits(model, x)
        replay, y = _captured(machine, model, x)
        _double_filters(model)
        replay()
        synchronize(machine.device)
        row = _compared("foreign capture", model, y, *_both(model, x))
        # The model's own graphs go on.
        again = _compared("behind it", model, _logits(model, x), *_both(model, x))
        return {"rows": [row, again]}


def _captured(machine: Machine, model: Any, x: Tensor) -> tuple[Callable[[], None], Logits]:
    """A replay, by the caller, of the model's call, and what it writes."""
    y: Logits = {}
    if tiny(machine):
        stand_in: Any = capture.current()

        def replay() -> None:
            stand_in.capturing = True
            y.update(_logits(model, x))
            stand_in.capturing = False

        return replay, y
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _plain(model, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.update(_logits(model, x))
    return graph.replay, y


def out_of_memory(machine: Machine) -> dict[str, Any]:
    """Where memory runs out the graphs are freed, and the call goes on.

    Raises:
        Wrong: it does not, or graphs are left.
    """
    with _checking(machine):
        model, _ = _small(machine)
        model.cuda_graphs = True
        model.max_extra_bytes = 2**40
        batch, side = (1, 33) if tiny(machine) else (8, 512)
        large = torch.randn(batch, 3, side, side, device=machine.device)
        for _ in range(3):
            _logits(model, large)
        # As large, and of another shape: its first call is run without a graph.
        other = large[..., 1:].contiguous()
        both = _both(model, other)
        with _little_memory(machine):
            y = _logits(model, other)
        row = _compared("out of memory", model, y, *both)
        if model.prepared_bytes:
            raise Wrong("graphs were kept: the memory sufficed", rows=[row])
        return {"rows": [row]}


def not_finite(machine: Machine) -> dict[str, Any]:
    """NaN stays NaN behind every activation, whatever kernel has it in its epilogue.

    Raises:
        Wrong: it became a number.
    """
    rows: list[dict[str, Any]] = []
    with _checking(machine), torch.no_grad():
        for kernel, act, residual in product((1, 3), ("relu", "relu6", None), (False, True)):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                made = (f"{kernel}x{kernel} act={act} residual={residual} {dtype}", kernel, act)
                rows.append(_nan_through_a_convolution(machine, *made, residual, dtype))
        # In a network: of the norms behind 1x1 convolutions, and behind others, the last ones.
        for kernel in (1, 3):
            model, x = _small(machine)
            pairs = zip(model.modules(), list(model.modules())[1:], strict=False)
            norm = [
                norm
                for conv, norm in pairs
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (kernel, kernel)
                if isinstance(norm, nn.BatchNorm2d)
            ][-1]
            norm.bias[0] = float("nan")
            ours, plain = _logits(model, x)["out"], _plain(model, x)["out"]
            if not plain.isnan().any() or not torch.equal(ours.isnan(), plain.isnan()):
                raise Wrong(f"NaN behind a {kernel}x{kernel} convolution is lost in a network")
    return {"rows": rows}


def _nan_through_a_convolution(
    machine: Machine, what: str, kernel: int, act: str | None, residual: bool, dtype: torch.dtype
) -> dict[str, Any]:
    channels = 16
    half = kernel // 2
    conv = FoldedConv((1, 1), (half, half), (1, 1), 1, act)
    given = torch.randn(2, 2, channels, 9, 9, device=machine.device).to(dtype)
    x, other = (t.contiguous(memory_format=torch.channels_last) for t in given)
    weight = torch.randn(channels, channels, kernel, kernel, device=machine.device).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    shift, one = (torch.ones(channels, device=machine.device) for _ in range(2))
    shift[0] = float("nan")
    filters = Filters(weight, shift, shift.to(dtype), one, torch.zeros_like(one))
    y = conv(x, filters, Settings.now(), other if residual else None)
    lost = int((~y[:, 0].isnan()).sum())
    row = {"what": what, "out": [lost, 0]}
    if lost or not y[:, 1:].isfinite().all():
        raise Wrong(f"{what}: {lost} of {y[:, 0].numel()} NaN became numbers", rows=[row])
    return row


@contextmanager
def _little_memory(machine: Machine) -> Iterator[None]:
    """Little more than what is held already; in a rehearsal the next fold fails."""
    if tiny(machine):
        fold, left = gpu_layers.Sources.fold, [1]

        def failing(self: gpu_layers.Sources, *args: Any) -> Any:
            if left:
                left.pop()
                raise torch.OutOfMemoryError("CUDA out of memory (rehearsed)")
            return fold(self, *args)

        with patch.object(gpu_layers.Sources, "fold", failing):
            yield
        return
    synchronize(machine.device)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    # Holds the input and its copy; the maps of a call take several times as much.
    spare = 2**27
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class _Side:
    """The block's work goes to a stream of its own, behind what the current one has to do."""

    def __init__(self, machine: Machine) -> None:
        self._stream = None if tiny(machine) else torch.cuda.Stream()
        self._inside: AbstractContextManager[object] = nullcontext()

    def __enter__(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream())
            self._inside = torch.cuda.stream(self._stream)
        self._inside.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inside.__exit__(*error)


@contextmanager
def _checking(machine: Machine) -> Iterator[None]:
    """Products of fp32 are exact, as the bounds suppose."""
    torch.manual_seed(0)
    with ExitStack() as stack:
        stack.enter_context(tf32(False))
        flags = {"enabled": True, "benchmark": False, "allow_tf32": False}
        stack.enter_context(torch.backends.cudnn.flags(**flags))
        stack.enter_context(as_on_gpu(machine))
        yield


def _model(device: str, family: str) -> Any:
    name, options = FAMILIES[family]
    with torch.device(device):
        model = get_model(name, num_classes=_CLASSES, **options)
    spread_batch_norm(model)
    return model.eval()


def _small(machine: Machine) -> tuple[Any, Tensor]:
    model = _model(machine.device, "fregu856")
    return model, _inputs(machine, 1)[0]


def _inputs(machine: Machine, count: int) -> Sequence[Tensor]:
    """Of two shapes in turns."""
    rows, columns = _sides(machine)
    return [torch.randn(1, 3, rows, columns - i % 2, device=machine.device) for i in range(count)]


def _sides(machine: Machine) -> tuple[int, int]:
    return _TINY_SIDES if tiny(machine) else _SIDES


def _logits(model: Any, x: Tensor) -> Logits:
    with torch.inference_mode():
        return model.all_logits(x)


def _plain(model: Any, x: Tensor) -> Logits:
    """By PyTorch's own layers."""
    with backends.use_backend("reference"), torch.no_grad():
        return model.all_logits(x)


def _both(model: Any, x: Tensor) -> tuple[Logits, Logits]:
    """(plain modules in the model's dtype, exact)."""
    return _plain(model, x), _plain(copy.deepcopy(model).double(), x.double())


def _compared(
    what: str, model: nn.Module, y: Logits, plain: Logits, exact: Logits
) -> dict[str, Any]:
    """A row, by the rule of CONTRIBUTING.md: at most twice the error of plain modules of the same
    dtype, and one rounding of what is stored; of fp32, sums in another order in each convolution.

    Raises:
        Wrong: it is off by more.
    """
    row: dict[str, Any] = {"what": what}
    if list(y) != list(exact):
        raise Wrong(f"{what}: logits {list(y)} in place of {list(exact)}")
    for name, value in exact.items():
        theirs, ours = norm_error(plain[name], value), norm_error(y[name], value)
        dtype = y[name].dtype
        convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
        rounding = (
            DIRECT * math.sqrt(convolutions)
            if dtype == torch.float32
            else torch.finfo(dtype).eps / 2
        )
        row[name] = [ours, theirs]
        if not math.isfinite(theirs):
            raise Wrong(f"{what}: {name} of plain modules is not finite, it shows nothing")
        if not ours <= 2 * theirs + rounding:
            raise Wrong(f"{what}: {name} is off by {ours:.2e}, plain modules by {theirs:.2e}")
    return row


CHECKS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    "never stale": never_stale,
    "two streams": streams,
    "threads": threads,
    "foreign capture": foreign_capture,
    "not finite": not_finite,
    "out of memory": out_of_memory,
}
