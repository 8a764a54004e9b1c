"""The inference program of a GPU, on CPU tensors: its numbers, never stale, its CUDA graphs."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from fast_models import (
    CHANGES,
    FAMILIES,
    OWN,
    SAME_NUMBERS,
    X,
    assert_close,
    conv_of,
    error,
    in_place,
    one_bit,
    plain,
    quick,
    shared_storage,
    small,
    small_resnet,
    through_numpy,
)
from stand_in_capture import StandInCapture
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import deeplab_fast as dlf
from deeplab_fast.dispatch.errors import SAVING, norm_error
from deeplab_fast.ops import _cudnn, folded_conv
from deeplab_fast.program import (
    capture,
    fast_path,
    gpu_layers,
    layers,
    optimize,
)
from deeplab_fast.testing import deterministic

# One rounding of what is stored; the rest of the error rule is twice PyTorch's own error.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInCapture]:
    """Calls on CPU tensors are a GPU's, and graphs are made without one."""
    monkeypatch.setattr(gpu_layers, "on_gpu", lambda x: True)
    with capture.using(StandInCapture()) as stand_in:
        yield stand_in


def exact(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return plain(copy.deepcopy(model).double(), x.double())


def assert_within_rule(
    y: dict[str, Tensor], own: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """At most twice the error of the plain modules `own` in the same dtype, and a rounding."""
    for key, value in expected.items():
        assert y[key].dtype == own[key].dtype and y[key].stride() == own[key].stride()
        bound = 2 * error(own[key], value) + ROUNDING[own[key].dtype]
        assert error(y[key], value) <= bound, key


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_every_family(family: str) -> None:
    model = quick(FAMILIES[family])
    # Two images: a shift for each. Sizes that are odd at every stride; maps of few rows.
    x = torch.randn(2, 3, 34, 49) if family != "cascaded" else torch.randn(1, 3, 9, 17)
    with torch.inference_mode():
        assert model.fast_reasons(x) == []
        assert_close(model(x), plain(model, x))
    expected = exact(model, x)
    model, x = model.bfloat16(), x.bfloat16()
    with torch.inference_mode():
        y = model(x)
    assert_within_rule(y, plain(model, x), expected)
    program = model._fast_path._gpu._state.program
    assert not [layer for layer in program.layers if isinstance(layer, layers.PlainLayer)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_masters_once(dtype: torch.dtype) -> None:
    model = small_resnet()
    x = torch.randn(1, 3, 65, 49)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert model.fast_reasons(x) == []
        y, low = model(x), model.forward_logits(x)
        model.fast = False
        own, own_low = model(x), model.forward_logits(x)
    model.fast = True
    assert low.dtype == own_low.dtype == dtype
    expected = exact(model, x)
    for key, value in expected.items():
        assert y[key].dtype == own[key].dtype
        assert error(y[key], value) <= 2 * error(own[key], value) + ROUNDING[dtype]


@pytest.mark.parametrize("own", OWN)
def test_modules_of_the_users_own(own: str) -> None:
    model = OWN[own]().eval()
    x = torch.randn(2, 3, 41, 57)
    expected = plain(model, x)
    with torch.inference_mode():
        assert_close(model(x), expected)
    if own in ("attention", "inner-group-norm"):
        # Between layers of the program, under autocast.
        low, exactly = torch.bfloat16, exact(model, x)
        with torch.inference_mode(), torch.autocast("cpu", low):
            y = model(x)
            model.fast = False
            plainly = model(x)
        for key, value in exactly.items():
            assert error(y[key], value) <= 2 * error(plainly[key], value) + ROUNDING[low]


class Last(nn.Module):
    """As a softmax under autocast, which gives fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class First(nn.Module):
    """Takes differences that bf16 does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 100


def test_dtypes_around_modules_that_run_as_they_are() -> None:
    model = small_resnet()
    model.classifier = nn.Sequential(model.classifier, Last()).eval()
    model.backbone.conv1 = nn.Sequential(First(), model.backbone.conv1)
    x = 100 + X
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.fast_reasons(x) == []
        y = model(x)
        model.fast = False
        own = model(x)
    for key, value in exact(model, x).items():
        assert y[key].dtype == own[key].dtype
        assert error(y[key], value) <= 2 * error(own[key], value) + ROUNDING[torch.bfloat16]


def test_vectors_lie_where_kernels_read_them_best() -> None:
    """Of a layer behind a classifier of 21 classes too."""
    model = dlf.deeplabv3_mobilenet_v3_large(num_classes=21, aux_loss=True).eval()
    x = torch.randn(1, 3, 17, 17)
    with torch.no_grad():
        assert model.fast_reasons(x) == []
        values = model._fast_path._gpu._state.sources.fold(
            torch.bfloat16, folded_conv.Settings.now()
        )
    for filters in values.filters():
        for tensor in filters:
            first = (values.flat if tensor.dim() == 4 else values.bias).data_ptr()
            assert tensor.data_ptr() % 16 == 0 or (tensor.data_ptr() - first) % 16 == 0


# --- Never stale --------------------------------------------------------------------------------


# Without graphs one change of each kind: all else is the same for both.
KERNELS = ("add_", "data-add_", "data-assigned", "parameter", "module", "forward", "eps", "hook")


@pytest.mark.parametrize(
    ("change", "with_graphs"),
    [*((change, True) for change in CHANGES), *((change, False) for change in KERNELS)],
    ids=lambda value: value if isinstance(value, str) else ("kernels", "graphs")[value],
)
def test_never_stale(change: str, with_graphs: bool, graphs: StandInCapture) -> None:
    model = small()
    model.cuda_graphs = with_graphs
    with torch.no_grad():
        before = [model(X)["out"].clone() for _ in range(3)][-1]
        assert graphs.replays == (2 if with_graphs else 0)
        assert model.fast_reasons(X) == []
        CHANGES[change](model)
        y = model(X)["out"]
        again = model(X)["out"]
    expected = plain(model, X)["out"]
    # Far below any change, and above the rounding of a model that is trained at random.
    assert error(y, expected) <= 1e-4
    assert torch.equal(y, again)
    moved = error(before, expected)
    assert moved > 1e-3 or change in SAME_NUMBERS, moved


VALUES = {
    "add_": in_place(lambda w: w.add_(0.1)),
    "numpy": through_numpy,
    "one bit": one_bit,
    "storage": shared_storage,
    "DLPack": lambda m: torch.from_dlpack(conv_of(m).weight.detach()).neg_(),
    "running_var": lambda m: m.backbone.Conv.bn.running_var.data.mul_(3),
}


@pytest.mark.parametrize("write", VALUES)
def test_values_are_folded_anew_by_the_same_graph(
    write: str, graphs: StandInCapture, folds: list
) -> None:
    model = small()
    model.cuda_graphs = True
    with torch.no_grad():
        before = [model(X)["out"] for _ in range(2)][-1]
        VALUES[write](model)
        y = model(X)["out"]
    assert error(y, plain(model, X)["out"]) <= SAVING < error(before, y)
    assert (graphs.captures, graphs.replays, len(folds)) == (1, 2, 1)


def test_a_change_while_the_gpu_works_is_noticed_behind_it(
    graphs: StandInCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison stands behind the launches: what changes meanwhile drops the result."""
    model = small()
    original = layers.Program.maps
    changes = [lambda: CHANGES["hook"](model)]

    def maps(self: layers.Program, *args: object) -> dict[str, Tensor]:
        y = original(self, *args)
        if changes:
            changes.pop()()
        return y

    monkeypatch.setattr(layers.Program, "maps", maps)
    with torch.no_grad():
        y = model(X)["out"]
    assert torch.equal(y, plain(model, X)["out"])


@pytest.mark.parametrize("change", ["channels", "dtype"])
def test_a_reason_that_is_out_of_date(change: str, folds: list) -> None:
    model, x = small(), torch.randn(1, 4, 33, 33)
    with torch.no_grad():
        model(X)
        if change == "channels":
            conv = model.backbone.Conv.conv
            conv.weight = nn.Parameter(torch.randn(conv.out_channels, 4, *conv.kernel_size))
            conv.in_channels = 4
        else:
            model.backbone.bfloat16(), model.classifier.bfloat16()
            x = X.bfloat16()
        for _ in range(2):
            model(x)
    assert len(folds) == 2


def test_errors_of_a_program_that_is_out_of_date_are_not_the_users(folds: list) -> None:
    model = small()
    with torch.no_grad():
        model(X)
        # In place of the old tensor's memory, so that addresses do not tell.
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.num_features += 0
        conv = conv_of(model)
        conv.weight.data = conv.weight.data[:12].clone()
        with pytest.raises(RuntimeError, match=r"running_mean should contain 12 elements"):
            model(X)


def test_memory_that_is_gone_is_not_read(folds: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP does: the storage is freed under the parameter."""
    model = small()
    with torch.no_grad():
        model(X)
        monkeypatch.setattr(
            gpu_layers.Sources, "fold", lambda self, *args: pytest.fail("read what is gone")
        )
        conv_of(model).weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            model(X)


# --- Where the plain modules must run -----------------------------------------------------------


CONTEXTS = {
    "reference": lambda: dlf.use_backend("reference"),
    "gradients": torch.enable_grad,
    "deterministic": deterministic,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_of_the_plain_modules(context: str, folds: list) -> None:
    model = small()
    with torch.no_grad(), CONTEXTS[context]():
        assert model.fast_reasons(X)
        model(X)
    assert not folds


def test_dtypes_that_do_not_fit() -> None:
    model = small()
    with torch.no_grad():
        assert "the input is float64" in model.fast_reasons(X.double())[0]
        (reason,) = model.fast_reasons(X.bfloat16())
        assert reason == "the input is bfloat16, the weights are float32"
        with pytest.raises(RuntimeError, match="expected scalar type"):
            model(X.bfloat16())
        model.double()
        (reason,) = model.fast_reasons(X)
        assert "the weights are Parameter of float64" in reason


def test_a_foreign_capture_sees_the_plain_modules(graphs: StandInCapture, folds: list) -> None:
    model = small()
    graphs.capturing = True
    with torch.no_grad():
        assert model.fast_reasons(X) == [
            "a CUDA graph is being captured, in whose replays no change of the model would show"
        ]
        assert torch.equal(model(X)["out"], plain(model, X)["out"])
    assert not folds


def test_replicas_of_data_parallel_run_plain(folds: list) -> None:
    model = small()
    model._is_replica = True
    with torch.no_grad():
        model(X)
    assert not folds


# --- CUDA graphs --------------------------------------------------------------------------------


def calls(model: nn.Module, x: Tensor, times: int) -> list[Tensor]:
    with torch.inference_mode():
        return [model(x)["out"] for _ in range(times)]


def test_graphs_are_of_a_shape_and_its_settings(graphs: StandInCapture) -> None:
    model = small_resnet()
    model.cuda_graphs = True
    expected = calls(model, X, 3)[0]
    assert (graphs.captures, graphs.replays, graphs.pools) == (1, 2, 1)
    y, low = calls(model, X[:, :, :33], 2)[1], model.forward_logits
    assert error(y, plain(model, X[:, :, :33])["out"]) <= SAVING
    assert graphs.captures == 2
    with torch.inference_mode():
        # Without the auxiliary head; under another dtype; by other rules for kernels.
        low(X), low(X)
        assert graphs.captures == 3
        with torch.autocast("cpu", torch.bfloat16):
            model(X), model(X)
        assert graphs.captures == 4
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            model(X), model(X)
        assert graphs.captures == 5
        replays = graphs.replays
        assert torch.equal(model(X)["out"], expected)
        assert graphs.replays == replays + 1
    assert graphs.pools == 1


def test_results_stay_those_of_their_call(graphs: StandInCapture) -> None:
    model = small()
    model.cuda_graphs = True
    other = torch.randn_like(X)
    for x in (X, X.to(memory_format=torch.channels_last)):
        calls(model, x, 2)
        (first,) = calls(model, x, 1)
        kept = first.clone()
        (second,) = calls(model, other, 1)
        assert torch.equal(first, kept) and not torch.equal(first, second)
        # Results are ordinary tensors, that may be written.
        with torch.no_grad():
            model(x)["out"].zero_()
        assert torch.equal(calls(model, x, 1)[0], kept)
    with torch.no_grad():
        low = model.forward_logits(X), model.forward_logits(X), model.forward_logits(X)
        low[1].zero_()
        assert torch.equal(model.forward_logits(X), low[2])


def test_a_graph_serves_both_modes_without_gradients(graphs: StandInCapture) -> None:
    model = small()
    model.cuda_graphs = True
    calls(model, X, 2)
    with torch.no_grad():
        model(X)["out"].add_(1)
    calls(model, X, 1)
    assert (graphs.captures, graphs.replays) == (1, 3)


@pytest.mark.parametrize(
    ("seconds", "captures"),
    [(0.0, 1), (1e3, 0), (None, 0)],
    ids=["launches dominate", "the GPU does", "the GPU is behind"],
)
def test_automatic_where_launches_dominate(
    seconds: float | None, captures: int, graphs: StandInCapture
) -> None:
    model = small()
    assert model.cuda_graphs is None
    graphs.device_seconds = seconds
    calls(model, X, 5)
    assert graphs.captures == captures
    # Where they do not, nothing is measured any more.
    calls(model, X, 15)
    marks = graphs.marks
    calls(model, X, 2)
    assert graphs.marks == marks


def test_graphs_are_few(graphs: StandInCapture) -> None:
    model = small()
    model.cuda_graphs = True
    for width in range(17, 27):
        calls(model, X[..., :width], 2)
    held = model._fast_path._gpu._state.graphs
    assert (graphs.captures, len(held)) == (10, 8)
    # Nothing is freed that may still run.
    assert graphs.fences.count("synchronize") == 2
    calls(model, X[..., :26], 1)
    assert graphs.captures == 10


def test_memory_of_graphs_is_bounded(graphs: StandInCapture) -> None:
    model = small()
    model.cuda_graphs, graphs.bytes_of_pool = True, 10_000_000
    for bound, captures in ((0, 0), (10_000_000, 1), (20_000_000, 1)):
        model.max_extra_bytes, before = bound, graphs.captures
        model._fast_path.drop()
        calls(model, X, 4)
        assert graphs.captures - before == captures
        # Of the second bound the input is too much.
        assert (model.prepared_bytes > 0) == (bound == 20_000_000)
    model.max_extra_bytes, graphs.bytes_of_device = None, 10_000_000
    model._fast_path.drop()
    calls(model, X, 4)
    assert model.prepared_bytes == 0
    # A bound that is set later counts too.
    model.max_extra_bytes, graphs.bytes_of_device = 20_000_000, 2**34
    calls(model, X, 2)
    assert model.prepared_bytes > 0
    model.max_extra_bytes = 0
    calls(model, X, 1)
    assert model.prepared_bytes == 0
    # Several that do not fit together: each gets its turn, but not for ever.
    model.max_extra_bytes, before = 10_000_000 + 5 * X.nbytes // 4, graphs.captures
    model._fast_path.drop()
    for _ in range(8):
        calls(model, X, 1), calls(model, X[..., :32], 1)
    assert 2 <= graphs.captures - before <= 6


def test_switching_graphs_off_and_training_free_them(graphs: StandInCapture) -> None:
    model = small()
    graphs.bytes_of_pool = 1000
    for free in (
        lambda: setattr(model, "cuda_graphs", False) or calls(model, X, 1),
        lambda: model.train().eval(),
        lambda: model.half().float(),
    ):
        model.cuda_graphs = True
        calls(model, X, 2)
        assert model.prepared_bytes > 1000
        free()
        assert model.prepared_bytes == 0


@pytest.mark.parametrize(
    ("error", "message", "others"),
    [
        (RuntimeError("operation not permitted"), "operation not permitted", 0),
        (torch.OutOfMemoryError("CUDA out of memory"), "no memory", 1),
    ],
    ids=["failed", "memory"],
)
def test_a_capture_that_fails_is_not_tried_again(
    error: Exception,
    message: str,
    others: int,
    graphs: StandInCapture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = small()
    model.cuda_graphs, graphs.error = True, error
    with caplog.at_level("INFO", "deeplab_fast"):
        y = calls(model, X, 4)[-1]
    assert graphs.captures == 0 and message in caplog.text
    assert norm_error(y, plain(model, X)["out"]) <= SAVING
    # Another shape may have the memory.
    calls(model, X[..., :17], 2)
    assert graphs.captures == others


def test_out_of_memory_frees_graphs_first(
    graphs: StandInCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    model.cuda_graphs = True
    calls(model, X, 2)
    original, left = gpu_layers.Sources.fold, [1]

    def fold(self: gpu_layers.Sources, *args: object) -> object:
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *args)

    monkeypatch.setattr(gpu_layers.Sources, "fold", fold)
    (y,) = calls(model, X[..., :30], 1)
    assert error(y, plain(model, X[..., :30])["out"]) <= SAVING
    assert len(model._fast_path._gpu._state.graphs) == 0
    left.append(1)
    # Nothing is left to free.
    with pytest.raises(torch.OutOfMemoryError):
        calls(model, X[..., :30], 1)


@pytest.mark.parametrize("frozen", [False, True], ids=["model", "optimised"])
def test_memory_for_logits_of_full_size_is_taken_from_graphs(
    frozen: bool, graphs: StandInCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    model.cuda_graphs = True
    used = dlf.optimize(model) if frozen else model
    expected = calls(used, X, 2)[1]
    original, left = fast_path.upsampled, [1]

    def upsampled(*args: object) -> dict[str, Tensor]:
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args)

    for where in (fast_path, optimize):
        monkeypatch.setattr(where, "upsampled", upsampled)
    assert torch.equal(calls(used, X, 1)[0], expected)
    left.append(1)
    # Nothing is left to free.
    with pytest.raises(torch.OutOfMemoryError):
        calls(used, X, 1)


def test_an_optimised_model_frees_graphs_first(
    graphs: StandInCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    model.cuda_graphs = True
    fast = dlf.optimize(model)
    expected = calls(fast, X, 2)[1]
    original, left = layers.Program.maps, [1]

    def maps(self: layers.Program, *args: object) -> dict[str, Tensor]:
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *args)

    monkeypatch.setattr(layers.Program, "maps", maps)
    assert torch.equal(calls(fast, X, 1)[0], expected)


def test_replays_follow_each_other_on_any_stream(graphs: StandInCapture) -> None:
    model = small()
    model.cuda_graphs = True
    calls(model, X, 4)
    assert graphs.fences == ["wait", "record"] * 3


def test_threads(graphs: StandInCapture, folds: list) -> None:
    model = small()
    model.cuda_graphs = True
    inputs = [torch.randn(1, 3, 33 + i % 2, 40) for i in range(4)]
    expected = [plain(model, x)["out"] for x in inputs]
    results: dict[int, list[Tensor]] = {}
    start = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        start.wait()
        results[i] = calls(model, inputs[i], 4)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, value in enumerate(expected):
        for y in results[i]:
            assert error(y, value) <= SAVING
    assert len(folds) == 1 and graphs.captures == 2


def test_copies_and_pickles_carry_no_graphs(graphs: StandInCapture) -> None:
    model = small()
    fresh = len(pickle.dumps(model))
    model.cuda_graphs = True
    expected = calls(model, X, 3)[-1]
    assert abs(len(pickle.dumps(model)) - fresh) < 100
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.prepared_bytes == 0 and twin.cuda_graphs is True
        assert torch.equal(calls(twin, X, 3)[-1], expected)
    assert graphs.captures == 3


def test_a_model_that_was_pickled_before_graphs(graphs: StandInCapture) -> None:
    model = small()
    del model.__dict__["cuda_graphs"]
    twin = pickle.loads(pickle.dumps(model))
    assert twin.cuda_graphs is None
    assert torch.equal(calls(twin, X, 1)[0], calls(small(), X, 1)[0])


class _Cuda:
    """torch.cuda as far as a capture goes: the current device and stream."""

    def __init__(self) -> None:
        self.device, self.stream, self.fails = 0, "the caller's", False
        self.captured: list[tuple[int, object]] = []

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        try:
            yield
        finally:
            self.device = before

    def on_stream(self, stream: object) -> _OnStream:
        return _OnStream(self, stream)

    def graph(cuda) -> type:
        class Graph:
            def capture_begin(self, *args: object, **options: object) -> None:
                cuda.captured.append((cuda.device, cuda.stream))

            def capture_end(self) -> None:
                if cuda.fails:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self) -> None:
                pass

        return Graph


class _OnStream:
    def __init__(self, cuda: _Cuda, stream: object) -> None:
        self.cuda, self.stream = cuda, stream

    def __enter__(self) -> None:
        self.before, self.cuda.stream = self.cuda.stream, self.stream

    def __exit__(self, *error: object) -> None:
        self.cuda.stream = self.before


def test_a_capture_is_on_its_device_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By torch.cuda.graph's own Python, whose default stream is that of the first device."""
    cuda = _Cuda()
    for name, value in {
        "CUDAGraph": cuda.graph(),
        "Stream": lambda device=None: f"a stream of {device}",
        "stream": cuda.on_stream,
        "device": cuda.on_device,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_host_emptyCache", "_cuda_clearCublasWorkspaces"):
        monkeypatch.setattr(torch._C, name, lambda: None, raising=False)
    made = capture.CudaCapture()
    for index in (0, 1, 0):
        made.record(lambda: None, torch.device("cuda", index), (0, 1))
    assert cuda.captured == [(i, f"a stream of cuda:{i}") for i in (0, 1, 0)]
    cuda.fails = True
    with pytest.raises(RuntimeError, match="previous error"):
        made.record(lambda: None, torch.device("cuda", 1), (0, 1))
    assert (cuda.device, cuda.stream) == (0, "the caller's")


# --- optimize -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["resnet18", "mobilenetv3", "mmseg"])
def test_optimised_models(family: str, graphs: StandInCapture) -> None:
    model = quick(FAMILIES[family])
    x = torch.randn(2, 3, 34, 49)
    expected = plain(model, x)
    fast = dlf.optimize(model, keep_aux=True)
    assert not fast.reasons and (fast.dtype, fast.device.type) == (torch.float32, "cpu")
    weights = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Conv2d))
    # Filters alone, each from a multiple of 16 bytes on.
    assert weights <= fast.held_bytes <= 1.01 * weights
    for _ in range(2):
        assert_close(fast(x), expected)
    fast.cuda_graphs = True
    for twin in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        for _ in range(3):
            assert_close(twin(x), expected)
    assert graphs.captures == 3
    # Filters are views of one allocation, which a pickle has once.
    assert len(pickle.dumps(fast)) <= 1.02 * fast.held_bytes
    # Frozen: what becomes of the model is no matter.
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_close(fast(x), expected)


def test_optimised_to_another_dtype() -> None:
    model = small_resnet()
    exactly = exact(model, X)
    fast = dlf.optimize(model, keep_aux=True, dtype="bf16")
    assert fast.dtype == torch.bfloat16
    half = copy.deepcopy(model).bfloat16()
    own = plain(half, X.bfloat16())
    for x in (X, X.bfloat16()):
        # Autocast has no effect.
        with torch.autocast("cpu", torch.float16) if x is X else nullcontext():
            assert_within_rule(fast(x), own, exactly)
    labels = fast.predict(X)
    assert (labels == model.predict(X)).float().mean() > 0.95
    with pytest.raises(ValueError, match="fp16 was asked for and the model's parameters are bf16"):
        fast.predict(X, dtype="fp16")
    with pytest.raises(ValueError, match="optimised for bfloat16 on cpu"):
        fast(X.double())
    with pytest.raises(RuntimeError, match=r"an optimised model stays torch\.bfloat16 on cpu"):
        fast.float()
    for dtype in ("fp8", torch.float64):
        with pytest.raises(ValueError, match="dtype is"):
            dlf.optimize(model, dtype=dtype)


@pytest.mark.parametrize("own", ["attention", "group-norm", "reflect", "leaky-relu"])
def test_modules_that_stay_plain_get_the_dtype(own: str) -> None:
    model = OWN[own]().eval()
    x = torch.randn(1, 3, 33, 41)
    fast = dlf.optimize(model, dtype="bf16")
    half = copy.deepcopy(model).bfloat16()
    y = OrderedDict(out=fast(x)["out"])
    own_y = OrderedDict(out=plain(half, x.bfloat16())["out"])
    assert_within_rule(y, own_y, {"out": exact(model, x)["out"]})


def test_the_table_names_the_kernel_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folded_conv, "has_cudnn", lambda device: True)
    fast = dlf.optimize(
        dlf.deeplabv3_resnet50(num_classes=5, aspp_channels=16).eval(), dtype="bf16"
    )
    kernels = {r.name: r.kernel for r in fast.layers((65, 65))}
    assert kernels["backbone.conv1"] == "cuDNN"
    assert kernels["backbone.layer1.0.conv1"] == "cuBLASLt"
    assert kernels["backbone.layer1.0.conv2"] == "cuDNN fused"
    assert kernels["backbone.layer1.0.conv3"] == "cuDNN fused"
    assert kernels["backbone.layer2.0.downsample.0"] == "cuDNN"
    assert kernels["classifier.0.convs"] == "cuBLASLt+cuDNN fused"
    assert kernels["classifier.4"] == "cuBLASLt"
    assert "cuDNN fused" in fast.table((65, 65))
    reports = {r.name: r for r in fast.layers((520, 520))}
    # 9 taps of 2048 by 16 filters at 65x65 pixels, those inside the map; least at 989 TFLOP/s.
    convs = reports["classifier.0.convs"]
    assert 0.4 < convs.macs / (4225 * 2048 * 16 * 28) < 1.0
    assert convs.predicted_seconds > 2 * convs.macs / 1e15


# --- Kernels for each class ---------------------------------------------------------------------


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """cuDNN's fused convolution by PyTorch's operations, and how often it ran."""
    ran = {"fused": 0}

    def fused(x: Tensor, weight: Tensor, bias: Tensor, residual: object, geometry: tuple) -> Tensor:
        ran["fused"] += 1
        with record_function("cuDNN fused"):
            y = F.conv2d(x, weight, bias, *geometry)
            return F.relu(y if residual is None else y + residual)

    monkeypatch.setattr(folded_conv, "has_cudnn", lambda device: True)
    monkeypatch.setattr(_cudnn, "fused", fused)
    return ran


def test_dispatcher_calls_of_a_forward(cudnn: dict[str, int]) -> None:
    """ResNet-50: what an H100 is asked for, one call each, views aside."""
    model = quick(lambda: dlf.deeplabv3_resnet50(num_classes=5, aspp_channels=16))
    x = torch.randn(1, 3, 33, 33)
    expected = plain(model, x)

    def events(run: object) -> dict[str, int]:
        run(x)
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            run(x)
        found: dict[str, int] = {}
        for event in profiler.events():
            if event.cpu_parent is None and event.name not in VIEWS:
                found[event.name] = found.get(event.name, 0) + 1
        return found

    with torch.inference_mode():
        live = events(model.forward_logits)
        frozen = events(dlf.optimize(model).forward_logits)
        model.fast = False
        before = events(model.forward_logits)
        model.fast = True
        assert_close(model(x), expected)
    convs = 53 + 6 + 1
    # Plain: a convolution, a norm and mostly an activation each.
    assert sum(before.values()) > 2.5 * convs
    # One call a convolution, and what stands between them: the stem's three passes and pooling,
    # four shortcuts' shifts, the concat, the pooled vector's mean and shift, the input's layout.
    assert sum(frozen.values()) <= convs + 20, frozen
    # Folding without a kernel of this package: one call for the filters of each convolution (of the
    # projection two), a dozen for their vectors.
    assert live.pop("aten::mul") == convs + 2
    assert sum(live.values()) <= sum(frozen.values()) + 12, live


VIEWS = {
    "aten::as_strided", "aten::detach", "aten::expand", "aten::flatten", "aten::permute",
    "aten::reshape", "aten::select", "aten::slice", "aten::split", "aten::split_with_sizes",
    "aten::t", "aten::to", "aten::unsqueeze", "aten::view",
}  # fmt: skip


@pytest.fixture
def _two_threads() -> Iterator[None]:
    """With one PyTorch's small convolutions on a CPU are another library's, in NCHW."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_no_layout_is_converted(cudnn: dict[str, int]) -> None:
    """But the input's once, and that of the logits to what plain modules give."""
    model = quick(lambda: dlf.deeplabv3_resnet50(num_classes=5, aspp_channels=16))
    fast = dlf.optimize(model)
    x = torch.randn(2, 3, 33, 33)
    fast.forward_logits(x)
    activities = [ProfilerActivity.CPU]
    with torch.inference_mode(), profile(activities=activities, record_shapes=True) as profiler:
        fast.forward_logits(x)
    copies = [e.input_shapes[0] for e in profiler.events() if e.name == "aten::copy_"]
    assert [shape for shape in copies if len(shape) == 4] == [[2, 3, 33, 33], [2, 5, 5, 5]]


def test_forms_are_timed_where_pytorch_is_asked_to(
    cudnn: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[object] = []

    def slowest_first(run: object, device: torch.device) -> float:
        timed.append(run())
        return -len(timed)

    monkeypatch.setattr(folded_conv, "_time", slowest_first)
    monkeypatch.setattr(folded_conv, "_fastest", {})
    conv = folded_conv.FoldedConv((1, 1), (0, 0), (1, 1), 1, "relu")
    weight, vector = torch.randn(8, 16, 1, 1), torch.randn(8)
    filters = folded_conv.Filters(weight, vector, vector, torch.ones(8), torch.zeros(8))
    x = torch.randn(2, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    expected = F.relu(F.conv2d(x, weight, vector))
    usual = folded_conv.Settings.now()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        measured = folded_conv.Settings.now()
    # TF32 for convolutions and not for products: no product of matrices for fp32.
    names = []
    for settings in (usual, usual._replace(tf32=True), measured, measured):
        torch.testing.assert_close(conv(x, filters, settings), expected)
        call = conv.call(x.shape, weight.shape, False, x.dtype, x.device)
        names.append(conv.plan(call, settings).kernel)
    assert names == ["cuDNN fused", "cuBLASLt", "cuDNN", "cuDNN"]
    assert len(timed) == 2
    deterministic_ = usual._replace(deterministic=True)
    torch.testing.assert_close(conv(x, filters, deterministic_), expected)
    assert conv.plan(call, deterministic_).kernel == "cuDNN"


@pytest.mark.parametrize("keeps", [True, False], ids=["keeps NaN", "makes 0 of NaN"])
def test_an_epilogue_that_loses_nan_is_left_out(
    keeps: bool, cudnn: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a maximum with 0 may; its cuDNN sibling is tried in tests/unit/test_conv_ops.py."""
    calls: list[int] = []

    def epilogue(bias: Tensor, matrix: Tensor, weight: Tensor) -> Tensor:
        calls.append(1)
        y = torch.addmm(bias, matrix, weight)
        return y.relu() if keeps else y.nan_to_num(0.0).relu()

    monkeypatch.setattr(torch, "_addmm_activation", epilogue)
    conv = folded_conv.FoldedConv((1, 1), (0, 0), (1, 1), 1, "relu")
    weight, vector = torch.randn(8, 16, 1, 1), torch.randn(8)
    filters = folded_conv.Filters(weight, vector, vector, torch.ones(8), torch.zeros(8))
    x = torch.randn(2, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    x[1, 3, 2, 4] = float("nan")
    settings = folded_conv.Settings.now()._replace(tf32=True, conv_tf32=True)
    y = conv(x, filters, settings)
    call = conv.call(x.shape, weight.shape, False, x.dtype, x.device)
    assert conv.plan(call, settings).kernel == "cuBLASLt"
    torch.testing.assert_close(y, F.relu(F.conv2d(x, weight, vector)), equal_nan=True)
    assert y[1, :, 2, 4].isnan().all()
    # Once to try it.
    assert len(calls) == (2 if keeps else 1)


def test_nothing_is_tried_or_remembered_while_somebody_captures(
    cudnn: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = folded_conv.FoldedConv((1, 1), (1, 1), (1, 1), 1, "relu")
    weight, vector = torch.randn(8, 16, 3, 3), torch.randn(8)
    filters = folded_conv.Filters(weight, vector, vector, torch.ones(8), torch.zeros(8))
    x = torch.randn(2, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    expected, settings = F.relu(F.conv2d(x, weight, vector, padding=1)), folded_conv.Settings.now()
    for captures, fused in ((True, 0), (False, 2)):
        monkeypatch.setattr(folded_conv, "capturing", lambda x, captures=captures: captures)
        torch.testing.assert_close(conv(x, filters, settings), expected)
        # One for NaN.
        assert cudnn["fused"] == fused


def test_predict_makes_no_logits_of_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: pytest.fail("interpolated"))
    # Exchanged functions are a reason for the plain modules, but for this one's sake.
    monkeypatch.setattr("deeplab_fast.program.fast_path.functional_is_intact", lambda: True)
    x = torch.randn(1, 3, 48, 40)
    with dlf.use_backend("cpu"):
        assert model.predict(x).shape == (1, 48, 40)
