"""Other libraries' models, accelerated in place, against themselves before."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import other_models
import pytest
import torch
from other_models import CASES, Case, tensors
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast import testing
from deeplab_fast.dispatch.errors import SAVING, norm_error, norms_error

# float64 leaves about 1e-16 for each operation, and a hundred layers that amplify it.
EXACT = 1e-9
# A gradient that is nearly 0 in exact arithmetic (of a bias in front of a norm, of what stands in
# front of a norm of two values) is the rounding of larger ones.
SMALL = 1e-3


# One of each library, for what does not depend on the structure.
FEW = {case.library: name for name, case in reversed(CASES.items())}.values()


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest) -> tuple[Case, nn.Module]:
    """A case and its model, which no test may change."""
    return _built(CASES[request.param])


@pytest.fixture(scope="module", params=FEW)
def one_of_library(request: pytest.FixtureRequest) -> tuple[Case, nn.Module]:
    """As `built`."""
    return _built(CASES[request.param])


def _built(case: Case) -> tuple[Case, nn.Module]:
    if case.requires:
        reason = f"{case.library}'s models need {case.requires}"
        try:
            testing.import_torchvision()
        except ImportError:
            pytest.skip(f"{reason}, and that torchvision")
        pytest.importorskip(case.requires, reason=reason)
    return case, case.model()


def bound(model: nn.Module, dtype: torch.dtype) -> float:
    """What an output may be off: in fp32 a minimal filter in every convolution."""
    if dtype == torch.float64:
        return EXACT
    return SAVING * math.sqrt(sum(isinstance(m, nn.Conv2d) for m in model.modules()))


def assert_same_results(found: Any, expected: Any, tolerance: float) -> None:
    """The same structure, and tensors that are as close as the tolerance says, each."""
    assert type(found) is type(expected)
    ours, theirs = tensors(found), tensors(expected)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        assert norm_error(ours[name].detach(), value.detach()) <= tolerance, name


def assert_runs_in_our_forms(case: Case, model: nn.Module) -> None:
    """As much as there was, and nothing that its own results spoke against."""
    report = dlf.accelerate_report(model)
    assert "differ" not in str(report), report
    assert report.accelerated >= case.share * report.total, report


def test_inference_is_the_plain_model(built) -> None:
    assert_inference(*built, torch.float32, torch.no_grad)


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        # No form for inference on a CPU: the plain modules must run.
        pytest.param(torch.float64, torch.no_grad, id="float64"),
        # Its tensors have no version counter.
        pytest.param(torch.float32, torch.inference_mode, id="float32 inference_mode"),
    ],
)
def test_inference_in_another_way(one_of_library, dtype, mode) -> None:
    assert_inference(*one_of_library, dtype, mode)


def assert_inference(case: Case, model: nn.Module, dtype: torch.dtype, mode: Any) -> None:
    """Results are the plain model's, and inputs stay as they are."""
    model = copy.deepcopy(model).to(dtype)
    # One image and two, of another size: what was prepared for one holds for the other.
    xs = [case.map(1, 0, dtype), case.map(2, 1, dtype)]
    with mode():
        expected = [case.call(model, x) for x in xs]
        assert dlf.accelerate(model) is model
        for x, y in zip(xs, expected, strict=True):
            before = x.clone()
            assert_same_results(case.call(model, x), y, bound(model, dtype))
            assert torch.equal(x, before)
    assert_runs_in_our_forms(case, model)


def loss_of(result: Any) -> Tensor:
    """Every pixel and class with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for y in tensors(result).values():
        total = total + (y.double() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    return total


def step(case: Case, model: nn.Module, x: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """The result of a step of training, and all that it leaves behind, by name."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    result = case.call(model, x)
    loss_of(result).backward()
    assert x.grad is not None
    left = {"grad x": x.grad}
    left |= {f"grad {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    left |= {f"buffer {k}": b.detach().double().clone() for k, b in model.named_buffers()}
    return result, left


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of the relative errors of gradients and buffers, small ones relative to more."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for kind in ("grad", "buffer"):
        names = [name for name in expected if name.startswith(kind)]
        norms = {name: float(expected[name].double().norm()) for name in names}
        least = SMALL * max(norms.values(), default=1.0)
        for name in names:
            error = float((found[name].double() - expected[name].double()).norm())
            assert math.isfinite(error), name
            worst = max(worst, error / max(norms[name], least))
    return worst


def error_of_all(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The larger of the relative errors of all gradients as one vector, and of all buffers."""
    assert found.keys() == expected.keys()
    return max(
        norms_error([(found[name], expected[name]) for name in expected if name.startswith(kind)])
        for kind in ("grad", "buffer")
    )


def test_training_is_the_plain_model(built) -> None:
    assert_training(*built, torch.float64)


def test_training_in_float32(one_of_library) -> None:
    assert_training(*one_of_library, torch.float32)


def assert_training(case: Case, model: nn.Module, dtype: torch.dtype) -> None:
    """A step in training mode, and one in eval mode with the statistics that it left."""
    plain = other_models.without_randomness(copy.deepcopy(model).to(dtype))
    model = dlf.accelerate(copy.deepcopy(plain))
    exact = copy.deepcopy(plain).double() if dtype == torch.float32 else None
    x = case.map(2, 0, dtype)
    for mode in (True, False) if case.trains else (False,):
        for m in (plain, model, exact):
            if m is not None:
                m.train(mode)
        expected, left = step(case, plain, x)
        found, ours = step(case, model, x)
        tolerance = bound(model, dtype)
        if exact is None:
            assert_same_results(found, expected, tolerance)
            assert largest_error(ours, left) <= tolerance
        else:
            truth, exactly = step(case, exact, x.double())
            for name, value in tensors(truth).items():
                plainly = norm_error(tensors(expected)[name].detach(), value.detach())
                error = norm_error(tensors(found)[name].detach(), value.detach())
                assert error <= 2 * plainly + tolerance, name
            # The gradients behind a ReLU jump with its sign: an error e of activations moves about
            # e of them, the square root of e of the norm of all.
            error = error_of_all(ours, exactly)
            assert error <= 2 * error_of_all(left, exactly) + math.sqrt(tolerance)
    assert_runs_in_our_forms(case, model)


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The attributes of all modules: tensors and modules by identity, collections as copies."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
        }
    return found


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from leaves(each)
    else:
        yield value


def assert_same_objects(found: dict[str, dict], expected: dict[str, dict]) -> None:
    assert list(found) == list(expected)
    for name, theirs in expected.items():
        ours = found[name]
        assert list(ours) == list(theirs), name
        for key, value in theirs.items():
            same = zip(leaves(ours[key]), leaves(value), strict=True)
            assert all(a is b or a == b for a, b in _plain(same)), f"{name}.{key}"


def _plain(pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Tensors by their identity: they compare by element."""
    for a, b in pairs:
        yield (id(a), id(b)) if isinstance(a, Tensor) or isinstance(b, Tensor) else (a, b)


def test_the_object_stays_and_restoring_leaves_no_trace(one_of_library) -> None:
    case, model = one_of_library
    model = copy.deepcopy(model)
    x = case.map(1)
    before = attributes(model)
    classes = [type(m) for m in model.modules()]
    members = list(model.named_modules(remove_duplicate=False))
    parameters, buffers = list(model.named_parameters()), list(model.named_buffers())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = case.call(model, x)

    assert dlf.accelerate(model) is model
    with torch.no_grad():
        case.call(model, x)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.named_modules(remove_duplicate=False)) == members
    for now, then in ((model.named_parameters(), parameters), (model.named_buffers(), buffers)):
        for (name, value), (key, old) in zip(now, then, strict=True):
            assert name == key and value is old
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    dlf.restore(model)
    assert_same_objects(attributes(model), before)
    with torch.no_grad():
        assert_same_results(case.call(model, x), expected, 0.0)


def test_the_readme_shows_a_report() -> None:
    try:
        testing.import_torchvision()
    except ImportError:
        pytest.skip("segmentation_models_pytorch needs a torchvision that goes with PyTorch")
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = dlf.accelerate(smp.DeepLabV3Plus("resnet50", encoder_weights=None))
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = readme.split("<!-- report:begin -->")[1].split("<!-- report:end -->")[0]
    assert textwrap.dedent(shown).strip() == str(dlf.accelerate_report(model))
