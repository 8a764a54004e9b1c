"""A model in eval mode takes the fast path by itself: same numbers, and never stale."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import pytest
import torch
from fast_models import (
    CHANGES,
    FAMILIES,
    OWN,
    SAME_NUMBERS,
    X,
    assert_close,
    block_of,
    conv_of,
    error,
    plain,
    quick,
    small,
    small_resnet,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deeplab_fast as dlf
from deeplab_fast.dispatch.errors import SAVING
from deeplab_fast.program import fast_path, layers
from deeplab_fast.testing import deterministic


def prepared(model: nn.Module) -> layers.Program:
    """The one program that a model holds."""
    (state,) = model._fast_path._states.values()
    return state.program


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[layers.Program]:
    """The program of every call that took the fast path."""
    ran: list[layers.Program] = []
    original = layers.Program.maps

    def maps(self: layers.Program, x: object, *args: object) -> dict[str, Tensor]:
        # Without tensors the places of maps are planned.
        if isinstance(x, Tensor):
            ran.append(self)
        return original(self, x, *args)

    monkeypatch.setattr(layers.Program, "maps", maps)
    return ran


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_every_family(family: str, programs: list) -> None:
    model = quick(FAMILIES[family])
    # Even and odd, two images: both sides of TensorFlow's padding, a batch; then maps of 1 and 2
    # rows, with dilations far beyond them. The largest model takes the second only.
    for n, h, w in ((2, 50, 65), (1, 9, 17))[family == "cascaded" :]:
        x = torch.randn(n, 3, h, w)
        expected = plain(model, x)
        assert not programs
        with torch.inference_mode():
            y, low = model(x), model.forward_logits(x)
        assert len(programs) == 2
        programs.clear()
        assert_close(y, expected)
        with dlf.use_backend("reference"), torch.no_grad():
            expected_low = model.forward_logits(x)
        assert low.is_contiguous() == expected_low.is_contiguous()
        assert error(low, expected_low) <= SAVING
        same = (y["out"].argmax(1) == expected["out"].argmax(1)).float().mean()
        # Rounding decides ties only: one pixel in a thousand is generous for random weights.
        assert same >= 0.999
    # No module was run as it is.
    assert not [p for p in prepared(model).layers if isinstance(p, PLAIN)]


PLAIN = layers.PlainLayer


@pytest.mark.parametrize("family", ["resnet18", "mobilenetv3", "mobilenetv2"])
def test_error_against_float64(family: str) -> None:
    model = quick(FAMILIES[family])
    x = torch.randn(1, 3, 65, 65)
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        assert model.fast_reasons(x) == []
        y, expected = model(x), exact(x.double())
    for key, value in expected.items():
        assert error(y[key], value) <= SAVING


def test_prepared_once_for_all_shapes_and_methods(programs: list, folds: list) -> None:
    model = small()
    with torch.inference_mode():
        for n, h, w in ((1, 33, 33), (2, 64, 17), (1, 1, 1), (1, 33, 33)):
            model(torch.randn(n, 3, h, w))
            model.forward_logits(torch.randn(n, 3, h, w))
    labels = model.predict(X)
    assert labels.dtype == torch.uint8
    assert len(programs) == 9 and len(folds) == 1


def test_predict_on_a_training_model_puts_its_mode_back(programs: list, folds: list) -> None:
    model = small().train()
    for _ in range(2):
        model.predict(X)
        assert model.training and model.backbone.Conv.bn.training
    assert len(programs) == 2 and len(folds) == 1


# --- Never stale ------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(change: str) -> None:
    model = small()
    with torch.no_grad():
        before = model(X)["out"].clone()
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


def test_modes_of_inner_modules() -> None:
    """A batch norm in training mode within a model in eval mode, and Monte Carlo dropout."""
    model = small()
    norm, dropout = block_of(model).depthwise.bn, model.classifier[0].project[3]
    dropout.p = 0.5
    with torch.no_grad():
        first = model(X)["out"]
        norm.train()
        statistics = norm.running_mean.clone()
        norm.momentum = 0.5
        learning = model(X)["out"]
        assert not torch.equal(norm.running_mean, statistics)
        assert error(learning, first) > 1e-4
        norm.eval()
        expected = plain(model, X)["out"]
        assert error(model(X)["out"], expected) <= SAVING
        dropout.train()
        assert not torch.equal(model(X)["out"], model(X)["out"])
        model.eval()
        assert error(model(X)["out"], expected) <= SAVING


def test_hooks_run_and_leave(programs: list) -> None:
    model = small()
    seen = []
    handle = model.backbone.register_forward_hook(lambda m, args, y: seen.append(y["out"].shape))
    with torch.no_grad():
        model(X)
        assert len(seen) == 1 and not programs
        assert model.fast_reasons(X) == ["backbone has forward hooks"]
        handle.remove()
        model(X)
    assert len(seen) == 1 and len(programs) == 1
    # Hooks of the model itself run outside of what is prepared.
    model.register_forward_hook(lambda m, args, y: seen.append(y["out"].shape))
    with torch.no_grad():
        model(X)
    assert len(seen) == 2 and len(programs) == 2


def test_functional_call_has_the_weights_it_is_given() -> None:
    model = small()
    doubled = {
        name: (2 if name.startswith("classifier.0.project") else 1) * p.detach()
        for name, p in model.named_parameters()
    }
    with torch.no_grad():
        own = model(X)["out"]
        y = torch.func.functional_call(model, doubled, (X,))["out"]
        with dlf.use_backend("reference"):
            expected = torch.func.functional_call(model, doubled, (X,))["out"]
        assert error(y, expected) <= SAVING < error(own, expected)
        assert torch.equal(model(X)["out"], own)


def test_nothing_changed_prepares_nothing(folds: list) -> None:
    model = small()
    with torch.no_grad():
        y = model(X)["out"]
        # Same values in the same places.
        conv_of(model).weight.requires_grad_(False)
        model.eval()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        assert torch.equal(model(X)["out"], y)
    assert len(folds) == 1


def test_two_models_of_shared_weights() -> None:
    model = small()
    twin = small()
    twin.load_state_dict(model.state_dict())
    twin.classifier[1].weight = model.classifier[1].weight
    with torch.no_grad():
        before = model(X)["out"], twin(X)["out"]
        model.classifier[1].weight.data.mul_(3)
        for m, old in zip((model, twin), before, strict=True):
            y = m(X)["out"]
            assert error(y, plain(m, X)["out"]) <= SAVING and error(y, old) > 0.1


# --- Where the plain modules must run ------------------------------------------------------------


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        yield


CONTEXTS = {
    "reference": lambda: dlf.use_backend("reference"),
    "environment": lambda: _environment("DEEPLAB_FAST_BACKEND", "reference"),
    "gradients": lambda: torch.enable_grad(),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "onednn-off": lambda: torch.backends.mkldnn.flags(enabled=False),
    "flop-counter": lambda: FlopCounterMode(display=False),
    "forward-mode": lambda: torch.autograd.forward_ad.dual_level(),
    "global-hook": lambda: _handle(
        nn.modules.module.register_module_forward_hook(lambda m, args, y: None)
    ),
}


@contextmanager
def _handle(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(handle.remove)
        yield


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_of_the_plain_modules(context: str, programs: list) -> None:
    model = small()
    with torch.no_grad(), CONTEXTS[context]():
        assert model.fast_reasons(X)
        y = model(X)["out"]
        assert not programs
    with torch.no_grad():
        assert model.fast_reasons(X) == []
        assert error(model(X)["out"], y) <= (0.1 if context == "autocast" else SAVING)
        assert len(programs) == 1


def test_contexts_of_the_fast_path(programs: list) -> None:
    model = small()
    for context in (torch.no_grad(), torch.inference_mode(), torch.device("cpu")):
        with torch.no_grad(), context:
            model(X)
    model.requires_grad_(False)
    model(X)
    with dlf.use_backend("cpu"), torch.no_grad():
        model(X)
    assert len(programs) == 5
    # A result of no_grad is an ordinary tensor.
    with torch.no_grad():
        y = model(X)["out"]
    y.add_(1)
    (y * torch.ones(1, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (X.clone().requires_grad_(), "gradients may be needed"),
        (X.double(), "the input is float64"),
        (X[:0], "shape [0, 3, 48, 33]"),
        (X.to("meta"), "on meta"),
    ],
    ids=["grad", "double", "empty", "meta"],
)
def test_inputs_of_the_plain_modules(x: Tensor, reason: str, programs: list) -> None:
    model = small().requires_grad_(False)
    assert reason in model.fast_reasons(x)[0]
    if x.is_meta:
        model = model.to("meta")
    if x.dtype == torch.float64:
        model = model.double()
    assert model(x)["out"].shape == (x.shape[0], 4, 48, 33)
    assert not programs


def test_training_and_switched_off(programs: list) -> None:
    model = small()
    with torch.no_grad():
        model.fast = False
        assert model.fast_reasons(X) == ["model.fast is False"]
        off = model(X)["out"]
        assert torch.equal(off, plain(model, X)["out"]) and not programs
        model.fast = True
        model.train()
        assert "training mode" in model.fast_reasons(X)[0]
        model(torch.randn(2, 3, 33, 33))
    assert not programs


def test_wrong_channels_get_the_plain_error() -> None:
    model = small()
    x = torch.randn(1, 4, 33, 33)
    with torch.no_grad():
        assert "4 channels, the model wants 3" in model.fast_reasons(x)[0]
        with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels"):
            model(x)


def test_transformations_see_the_plain_modules(programs: list) -> None:
    model = small_resnet()
    x = torch.randn(1, 3, 33, 41)
    expected = plain(model, x)

    def check(y: dict[str, Tensor]) -> None:
        # The plain modules' operations in the same order.
        for key, value in expected.items():
            assert error(y[key], value) <= 1e-6
        assert not programs

    with torch.no_grad():
        check(torch.jit.script(model)(x))
        check(torch.jit.trace(model, x, strict=False, check_trace=False)(x))
        check(torch.fx.symbolic_trace(model)(x))
        state = {k: v[None] for k, v in {**dict(model.named_parameters())}.items()}

        def one(weights: dict[str, Tensor]) -> dict[str, Tensor]:
            return dict(torch.func.functional_call(model, weights, (x,)))

        check({k: v[0] for k, v in torch.func.vmap(one)(state).items()})
        batched = torch.func.vmap(lambda one: dict(model(one[None])))(x)
        check({k: v[0] for k, v in batched.items()})
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert model(torch.empty(1, 3, 33, 41))["out"].shape == (1, 4, 33, 41)
    assert not programs
    gradient = torch.func.grad(lambda x: model(x)["out"].sum())(x)
    assert gradient.isfinite().all() and not programs


def test_export_and_compilation_see_the_plain_modules(programs: list) -> None:
    model = OWN["backbone"]().eval()
    expected = plain(model, X)["out"]
    torch.compiler.reset()
    with torch.no_grad():
        assert model.fast_reasons(X) == []
        exported = torch.export.export(model, (X,)).module()(X)["out"]
        compiled = torch.compile(model, fullgraph=True, backend="eager")(X)["out"]
    assert error(exported, expected) <= 1e-6 and error(compiled, expected) <= 1e-6
    assert not programs


def test_inner_module_that_is_compiled(programs: list) -> None:
    torch.compiler.reset()
    model = small()
    expected = plain(model, X)["out"]
    with torch.no_grad():
        model(X)
        model.classifier.compile(backend="eager")
        assert error(model(X)["out"], expected) <= SAVING
    assert [type(p).__name__ for p in programs[-1].layers][-1] == "PlainLayer"


# --- Modules of the user's own -------------------------------------------------------------------


@pytest.mark.parametrize("own", OWN)
def test_modules_of_the_users_own(own: str, programs: list, folds: list) -> None:
    model = OWN[own]().eval()
    x = torch.randn(2, 3, 41, 57)
    expected = plain(model, x)
    with torch.inference_mode():
        for _ in range(2):
            assert_close(model(x), expected)
    assert len(programs) == 2 and len(folds) == 1
    if own == "frozen":
        assert not [p for p in programs[0].layers if isinstance(p, layers.PlainLayer)]


# --- Copies, memory, threads ---------------------------------------------------------------------


def test_a_model_that_an_earlier_version_pickled_loads() -> None:
    model = dlf.deeplabv3_resnet18(num_classes=3).eval()
    data = pickle.dumps(model, protocol=2)
    before = data.replace(
        b"deeplab_fast.program.fast_path\n", b"deeplab_fast.inference.fast_path\n"
    )
    assert before != data
    x = torch.randn(1, 3, 65, 65)
    with torch.inference_mode():
        assert torch.equal(pickle.loads(before)(x)["out"], model(x)["out"])


def test_copies_and_pickles_carry_no_prepared_weights(folds: list) -> None:
    model = small()
    fresh = len(pickle.dumps(model))
    keys = list(model.state_dict())
    with torch.no_grad():
        y = model(X)["out"]
        assert model.prepared_bytes > 0
        data = pickle.dumps(model)
        assert len(data) == fresh
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (
            copy.deepcopy(model),
            copy.copy(model),
            pickle.loads(data),
            torch.load(buffer, weights_only=False),
        ):
            # A shallow copy has the same modules, and may have what is prepared from them.
            assert twin.prepared_bytes == 0 or twin._fast_path is model._fast_path
            assert torch.equal(twin(X)["out"], y)
    assert list(model.state_dict()) == keys
    assert len(folds) == 4


def test_a_copy_changes_alone() -> None:
    model = small()
    with torch.no_grad():
        y = model(X)["out"]
        twin = copy.deepcopy(model)
        conv_of(twin).weight.data.neg_()
        assert error(twin(X)["out"], plain(twin, X)["out"]) <= SAVING
        assert torch.equal(model(X)["out"], y)


def test_memory_is_known_bounded_and_freed(folds: list) -> None:
    model = small_resnet()
    weights = sum(p.numel() * 4 for p in model.parameters())
    with torch.no_grad():
        assert model.prepared_bytes == 0
        y = model(X)["out"]
        free = model.prepared_bytes
        assert free > 0.9 * weights
        for bound in (weights // 4, 0):
            model.max_extra_bytes = bound
            assert error(model(X)["out"], y) <= SAVING
            program = prepared(model)
            assert program.extra_bytes <= bound
        assert len(folds) == 3
        assert model.prepared_bytes < free
        model.train()
        assert model.prepared_bytes == 0
        model.eval()(X)
        model.double()
        assert model.prepared_bytes == 0


def test_threads_share_one_preparation(programs: list, folds: list) -> None:
    model = small()
    inputs = [torch.randn(1, 3, 33 + i, 40) for i in range(4)]
    expected = [plain(model, x)["out"] for x in inputs]
    results: dict[int, list[Tensor]] = {}
    start = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        start.wait()
        with torch.no_grad():
            results[i] = [model(inputs[i])["out"] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, value in enumerate(expected):
        for y in results[i]:
            assert error(y, value) <= SAVING
    assert len(folds) == 1 and len(programs) == 12


@pytest.mark.parametrize("weights", ["contiguous", "channels_last"])
@pytest.mark.parametrize("given", ["contiguous", "channels_last", "strided"])
def test_memory_format_is_that_of_the_plain_modules(weights: str, given: str) -> None:
    model = small()
    if weights == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    x = {
        "contiguous": X,
        "channels_last": X.to(memory_format=torch.channels_last),
        "strided": torch.randn(1, 6, 48, 66)[:, ::2, :, ::2],
    }[given]
    expected = plain(model, x)
    with torch.no_grad():
        assert model.fast_reasons(x) == []
        assert_close(model(x), expected)


def test_predict_with_tiles_scales_and_flips(programs: list) -> None:
    model = small()
    x = torch.randn(1, 3, 70, 60)
    for options in ({"scales": (0.5, 1.0), "flip": True}, {"tile": 40}, {}):
        with dlf.use_backend("reference"):
            expected, prob = model.predict(x, return_prob=True, **options)
        programs.clear()
        labels, fast_prob = model.predict(x, return_prob=True, **options)
        assert programs
        assert (labels == expected).float().mean() >= 0.999
        torch.testing.assert_close(fast_prob, prob, rtol=1e-4, atol=1e-5)


def test_photo_of_any_kind(programs: list) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert small().predict(photo).shape == (40, 50)
    assert programs


def test_backends_of_the_reasons_are_those_that_exist() -> None:
    model = small()
    with torch.no_grad(), nullcontext():
        for backend in ("triton", "cuda"):
            with dlf.use_backend(backend):
                assert model.fast_reasons(X) == [f"backend '{backend}' is asked for"]
    assert isinstance(model._fast_path, fast_path.FastPath)
