"""What users do to a model: copy, cast, pickle, script, trace, export, compile, differentiate."""

from __future__ import annotations

import copy
import io
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import deeplab_fast as dlf

BUILDERS = {
    "resnet18": lambda: dlf.deeplabv3_resnet18(num_classes=5),
    "resnet50-aux": lambda: dlf.deeplabv3_resnet50(num_classes=5, aux_loss=True),
    "mobilenetv3": lambda: dlf.deeplabv3_mobilenet_v3_large(num_classes=5, aux_loss=True),
    "mobilenetv2": lambda: dlf.deeplabv3_mobilenet_v2_tf(num_classes=5, width=0.5),
    "deeplabv2": lambda: dlf.deeplabv3_resnet18(num_classes=5, head="deeplabv2"),
    "cascaded": lambda: dlf.deeplabv3_cascaded_resnet50(num_classes=5),
    "running-norm": lambda: dlf.deeplabv3_resnet18(num_classes=5, image_pooling_norm="running"),
}


@pytest.fixture(params=BUILDERS, scope="module")
def model(request):
    torch.manual_seed(0)
    return BUILDERS[request.param]().eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(1, 3, 65, 49, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def expected(model, x):
    with torch.inference_mode():
        return model(x)


def assert_same(y: dict, expected: dict, tolerance: float = 0.0) -> None:
    assert list(y) == list(expected)
    for key, value in expected.items():
        atol = tolerance * float(value.abs().max())
        torch.testing.assert_close(y[key], value, rtol=0, atol=atol)


def test_deepcopy_and_pickle(model, x, expected) -> None:
    with torch.inference_mode():
        assert_same(copy.deepcopy(model)(x), expected)
        assert_same(pickle.loads(pickle.dumps(model))(x), expected)


def test_double(model, x, expected) -> None:
    with torch.inference_mode():
        y = copy.deepcopy(model).double()(x.double())
    for key, value in expected.items():
        assert y[key].dtype == torch.float64
        # fp32 against fp64 over some 60 layers; an unnormalised random model keeps 4 digits.
        error = (y[key] - value).abs().max() / y[key].abs().max()
        assert error < 1e-4


def test_channels_last_gives_the_same(model, x, expected) -> None:
    with torch.inference_mode():
        y = copy.deepcopy(model).to(memory_format=torch.channels_last)(
            x.to(memory_format=torch.channels_last)
        )
    assert_same(y, expected, 1e-4)


def test_script_and_reload(model, x, expected) -> None:
    scripted = torch.jit.script(model)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    with torch.inference_mode():
        # torchvision's tolerances for a scripted and a reloaded model.
        assert_same(dict(scripted(x)), dict(expected), 1e-4)
        assert_same(dict(torch.jit.load(buffer)(x)), dict(expected), 3e-4)


def test_symbolic_trace(model, x, expected, request) -> None:
    if "running-norm" in request.node.name or "mobilenetv2" in request.node.name:
        pytest.skip("its padding or norm depends on the size, which symbolic tracing cannot follow")
    with torch.inference_mode():
        assert_same(torch.fx.symbolic_trace(model)(x), expected, 1e-5)


def test_export(model, x, expected) -> None:
    exported = torch.export.export(model, (x,))
    with torch.inference_mode():
        assert_same(exported.module()(x), expected, 1e-5)


def test_compile_fullgraph(model, x, expected) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert_same(compiled(x), expected, 1e-5)


def test_gradient_reaches_the_input(model, x) -> None:
    x = x.clone().requires_grad_()
    model(x)["out"].sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0


def test_autocast_runs(model, x, expected) -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert list(y) == list(expected)
    assert all(v.isfinite().all() for v in y.values())


_SMALL = dlf.deeplabv3_resnet18(num_classes=3, aux_loss=True).eval()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 2),
    h=st.integers(1, 70),
    w=st.integers(1, 70),
    output_stride=st.sampled_from((8, 16)),
    channels_last=st.booleans(),
)
def test_any_size_and_batch(n: int, h: int, w: int, output_stride: int, channels_last: bool):
    x = torch.randn(n, 3, h, w)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    model = _SMALL.set_output_stride(output_stride)
    with torch.inference_mode():
        y = model(x)
        low = model.forward_logits(x)
    assert y["out"].shape == y["aux"].shape == (n, 3, h, w)
    # Every stride rounds up.
    assert low.shape == (n, 3, -(-h // output_stride), -(-w // output_stride))
    assert y["out"].isfinite().all()
