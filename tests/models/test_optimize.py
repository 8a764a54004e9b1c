"""`deeplab_fast.optimize`: a frozen inference module with the original's outputs."""

from __future__ import annotations

import copy
import functools
import io
import logging
import pickle
import threading

import numpy as np
import pytest
import torch
from fast_models import error, plain, trained
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast.dispatch.errors import SAVING
from deeplab_fast.program import layers

BUILDERS = {
    "resnet18": lambda: dlf.deeplabv3_resnet18(num_classes=4, aspp_channels=16, aux_loss=True),
    "mobilenetv3": lambda: dlf.deeplabv3_mobilenet_v3_large(
        num_classes=4, aspp_channels=16, aux_loss=True
    ),
    "mobilenetv2": lambda: dlf.deeplabv3_mobilenet_v2_tf(
        num_classes=4, width=0.25, atrous_rates=(2,), aspp_channels=24
    ),
    "mmseg": lambda: dlf.deeplabv3_resnet18(num_classes=4, head="mmseg", aspp_channels=16),
}


@functools.cache
def built(name: str) -> dlf.DeepLabV3:
    return trained(BUILDERS[name]())


@pytest.fixture(params=BUILDERS)
def model(request: pytest.FixtureRequest) -> dlf.DeepLabV3:
    return copy.deepcopy(built(request.param))


@pytest.fixture
def small() -> dlf.DeepLabV3:
    return copy.deepcopy(built("mobilenetv2"))


@pytest.fixture
def resnet() -> dlf.DeepLabV3:
    return copy.deepcopy(built("resnet18"))


X = torch.randn(1, 3, 41, 56, generator=torch.Generator().manual_seed(7))


def test_outputs_are_the_originals(model: dlf.DeepLabV3) -> None:
    fast = dlf.optimize(model, keep_aux=True)
    lean = dlf.optimize(model)
    assert fast.reasons == () and not fast.training
    # Shapes change from call to call, down to one pixel.
    for n, h, w in ((2, 41, 56), (1, 64, 33), (1, 1, 1), (1, 41, 56)):
        x = torch.randn(n, 3, h, w)
        expected = plain(model, x)
        y = fast(x)
        assert list(y) == list(expected)
        for key, value in expected.items():
            assert error(y[key], value) <= SAVING
            assert y[key].is_contiguous() and value.is_contiguous()
        assert list(lean(x)) == ["out"]
        torch.testing.assert_close(lean(x)["out"], y["out"], rtol=0, atol=0)
        low = fast.forward_logits(x)
        assert low.shape[-2:] == (-(-h // model.output_stride), -(-w // model.output_stride))
        full = nn.functional.interpolate(
            low, (h, w), mode="bilinear", align_corners=model.align_corners
        )
        torch.testing.assert_close(full, y["out"], rtol=0, atol=0)
        same = y["out"].argmax(1) == expected["out"].argmax(1)
        assert same.float().mean() >= 0.999


def test_no_gradients_are_needed_or_given(small: dlf.DeepLabV3) -> None:
    fast = dlf.optimize(small)
    with torch.enable_grad():
        y = fast(X)["out"]
        assert not y.requires_grad
        (y * torch.ones(1, requires_grad=True)).sum().backward()
        with pytest.raises(RuntimeError, match=r"has no gradients; pass x\.detach\(\)"):
            fast(X.clone().requires_grad_())
    with torch.inference_mode():
        assert torch.equal(fast(X)["out"], y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(X)["out"], y)


def test_the_original_is_not_touched(resnet: dlf.DeepLabV3) -> None:
    resnet.train()
    resnet.backbone.layer1.eval()
    state = {k: v.clone() for k, v in resnet.state_dict().items()}
    versions = [p._version for p in resnet.parameters()]
    modes = [m.training for m in resnet.modules()]
    fast = dlf.optimize(resnet, keep_aux=True)
    fast(X)
    assert [m.training for m in resnet.modules()] == modes
    assert [p._version for p in resnet.parameters()] == versions
    assert all(p.requires_grad for p in resnet.parameters())
    assert all(torch.equal(v, state[k]) for k, v in resnet.state_dict().items())
    # Made from a model in training mode, it is that in eval mode.
    expected = plain(resnet.eval(), X)
    for key, value in expected.items():
        assert error(fast(X)[key], value) <= SAVING


def test_later_changes_of_the_original_do_not_reach_it(model: dlf.DeepLabV3) -> None:
    fast = dlf.optimize(model, keep_aux=True)
    # Forms are prepared on first use, after the change.
    late = dlf.optimize(model, keep_aux=True)
    before = {k: v.clone() for k, v in fast(X).items()}
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    for module in (fast, late, pickle.loads(pickle.dumps(fast)), copy.deepcopy(late)):
        for key, value in before.items():
            assert torch.equal(module(X)[key], value)


def test_optimised_again_after_load_state_dict(small: dlf.DeepLabV3) -> None:
    other = trained(BUILDERS["mobilenetv2"]())
    with torch.no_grad():
        other.classifier[1].weight.mul_(3)
    old = dlf.optimize(small)(X)["out"]
    small.load_state_dict(other.state_dict())
    new = dlf.optimize(small)(X)["out"]
    assert error(new, plain(other, X)["out"]) <= SAVING < error(new, old)


def test_copies_and_pickles(model: dlf.DeepLabV3) -> None:
    fast = dlf.optimize(model, keep_aux=True)
    y = fast(X)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(fast), torch.load(buffer, weights_only=False))
    # A pickle has one copy of the weights, at most.
    weights = sum(t.numel() * 4 for t in model.state_dict().values())
    assert buffer.getbuffer().nbytes <= 1.2 * weights + 2**20
    for twin in copies:
        assert twin.num_classes == 4 and twin.config == model.config
        for key, value in y.items():
            assert torch.equal(twin(X)[key], value)


def test_threads(small: dlf.DeepLabV3) -> None:
    fast = dlf.optimize(small)
    inputs = [torch.randn(1, 3, 33 + 8 * i, 40) for i in range(4)]
    expected = [plain(small, x)["out"] for x in inputs]
    results: dict[int, list[Tensor]] = {}
    start = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        start.wait()
        results[i] = [fast(inputs[i])["out"] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, value in enumerate(expected):
        assert all(error(y, value) <= SAVING for y in results[i])


def test_predict_and_attributes(resnet: dlf.DeepLabV3) -> None:
    resnet.classes = ("a", "b", "c", "d")
    fast = dlf.optimize(resnet)
    for name in (
        "num_classes",
        "output_stride",
        "atrous_rates",
        "align_corners",
        "classes",
        "palette",
        "preprocess",
        "config",
    ):
        assert getattr(fast, name) == getattr(resnet, name)
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for images, options in (
        (photo, {}),
        ([photo, photo[:30]], {"batch_size": 2}),
        (X, {"scales": (0.5, 1.0), "flip": True}),
        (X, {"tile": 32}),
        (X[:0], {}),
    ):
        with dlf.use_backend("reference"):
            expected = resnet.predict(images, **options)
        labels = fast.predict(images, **options)
        if not isinstance(images, list):
            labels, expected = [labels], [expected]
        for own, value in zip(labels, expected, strict=True):
            assert own.dtype == value.dtype and own.shape == value.shape
            assert len(own) == 0 or np.mean(np.asarray(own) == np.asarray(value)) >= 0.999


def test_what_it_cannot_do(small: dlf.DeepLabV3) -> None:
    fast = dlf.optimize(small)
    assert not list(fast.parameters()) and not fast.state_dict()
    assert fast.eval() is fast and fast.to("cpu") is fast and fast.float() is fast
    assert fast.to(memory_format=torch.channels_last) is fast
    with pytest.raises(RuntimeError, match="an optimised model cannot train: its batch norms"):
        fast.train()
    with pytest.raises(RuntimeError, match="load into the model that it was made from"):
        fast.load_state_dict(small.state_dict())
    for convert in (lambda m: m.half(), lambda m: m.double(), lambda m: m.to("meta")):
        with pytest.raises(RuntimeError, match=r"stays torch\.float32 on cpu; convert the model"):
            convert(fast)
    with pytest.raises(ValueError, match="the input is float64 on cpu; this model was optimised"):
        fast(X.double())
    with pytest.raises(ValueError, match=r"must be a tensor \[N, 3, H, W\], got \[3, 41, 56\]"):
        fast(X[0])
    with pytest.raises(ValueError, match=r"has 4 channels, the weight wants 3"):
        fast(torch.randn(1, 4, 33, 33))
    with pytest.raises(TypeError, match="takes the models that deeplab_fast builds, got Conv2d"):
        dlf.optimize(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="max_extra_bytes must be at least 0, got -1"):
        dlf.optimize(small, max_extra_bytes=-1)
    assert error(fast(X)["out"], plain(small, X)["out"]) <= SAVING


@pytest.mark.parametrize("why", ["hook", "double"])
def test_a_model_that_cannot_be_folded_is_copied(
    why: str, small: dlf.DeepLabV3, caplog: pytest.LogCaptureFixture
) -> None:
    x, reason = X, "backbone.Conv has forward hooks"
    if why == "hook":
        small.backbone.Conv.register_forward_hook(lambda m, args, y: 2 * y)
    else:
        small.double()
        x, reason = X.double(), "the weights are Parameter of float64 on cpu"
    small.train()
    with caplog.at_level(logging.WARNING, logger="deeplab_fast"):
        fast = dlf.optimize(small)
    assert reason in fast.reasons[0] and reason in caplog.text
    expected = plain(small.eval(), x)["out"]
    small.classifier[1].weight.data.zero_()
    assert torch.equal(fast(x)["out"], expected)
    assert fast.predict(x).shape == (1, 41, 56)
    assert torch.equal(copy.deepcopy(fast)(x)["out"], expected)
    assert fast.extra_bytes == 0 and fast.held_bytes > 0
    with pytest.raises(ValueError, match="the model runs its plain modules"):
        fast.layers()


def test_modules_that_are_not_known_are_copied(resnet: dlf.DeepLabV3) -> None:
    resnet.backbone.layer2[1] = nn.Sequential(nn.Conv2d(128, 128, 1), nn.PReLU(128))
    resnet.train()
    fast = dlf.optimize(resnet)
    expected = plain(resnet.eval(), X)["out"]
    resnet.backbone.layer2[1][1].weight.data.fill_(7)
    assert error(fast(X)["out"], expected) <= SAVING
    assert error(pickle.loads(pickle.dumps(fast))(X)["out"], expected) <= SAVING
    (row,) = [r for r in fast.layers((41, 56)) if r.name == "backbone.layer2.1.1"]
    assert (row.kernel, row.macs, row.input_shape) == ("aten", 0, (1, 128, 6, 7))


def test_memory_is_known_and_bounded(model: dlf.DeepLabV3) -> None:
    weights = sum(t.numel() * 4 for k, t in model.state_dict().items() if t.dim() == 4)
    free = dlf.optimize(model, keep_aux=True)
    # Even and odd sizes: every form of TensorFlow's padding.
    inputs = (X, torch.randn(1, 3, 48, 33))
    expected = [free(x)["out"] for x in inputs]
    assert free.extra_bytes > 0
    # One copy of the convolutions' weights, and the prepared forms. Strided convolutions with SAME
    # padding have two, of which those of a small model are a tenth.
    assert free.held_bytes == pytest.approx(weights + free.extra_bytes, rel=0.1)
    for bound in (weights, weights // 4, 0):
        fast = dlf.optimize(model, keep_aux=True, max_extra_bytes=bound)
        for x, y in zip(inputs, expected, strict=True):
            assert error(fast(x)["out"], y) <= SAVING
        assert fast.extra_bytes <= bound


def test_layers_of_a_shape(resnet: dlf.DeepLabV3) -> None:
    fast = dlf.optimize(resnet)
    rows = fast.layers((2, 3, 65, 49))
    by_name = {r.name: r for r in rows}
    # Each convolution once; the branches of the ASPP are one layer.
    convs = [n for n, m in resnet.named_modules() if isinstance(m, nn.Conv2d)]
    convs = [n for n in convs if not n.startswith(("classifier.0.convs", "aux_classifier"))]
    assert set(convs) <= set(by_name) and "classifier.0.convs" in by_name
    assert not any(name.startswith("aux") for name in by_name)
    stem = by_name["backbone.conv1"]
    assert (stem.input_shape, stem.output_shape) == ((2, 3, 65, 49), (2, 64, 33, 25))
    # All taps inside but at the border, which some kernels leave out.
    assert 0.8 * 2 * 64 * 147 * 33 * 25 <= stem.macs <= 2 * 64 * 147 * 33 * 25
    assert all(r.measured_seconds is None for r in rows)
    assert sum(r.predicted_seconds or 0 for r in rows) > 0
    # Nothing ran, so nothing is prepared.
    assert fast.extra_bytes == 0
    shapes: list[tuple[int, ...]] = []

    def record(layer: layers.Layer, *tensors: Tensor | None) -> Tensor:
        y = layer(*tensors)
        shapes.append(tuple(y.shape))
        return y

    fast._frozen.program.logits(torch.zeros(2, 3, 65, 49), record, False)
    assert shapes == [r.output_shape for r in rows]


def test_table(small: dlf.DeepLabV3) -> None:
    fast = dlf.optimize(small)
    lines = fast.table((33, 48), measure=True, repeats=1).splitlines()
    reports = fast.layers((33, 48))
    assert lines[0].split()[:4] == ["layer", "input", "output", "kernel"]
    assert len(lines) == len(reports) + 4
    for line, report in zip(lines[2:], reports, strict=False):
        cells = line.split()
        assert cells[0] == report.name and cells[1] == "x".join(map(str, report.input_shape))
        # predicted, measured, extra
        assert float(cells[-2]) >= 0
    assert lines[-1].startswith(f"{len(reports)} layers") and "MB of weights held" in lines[-1]
    for shape, repeats in (((3, 33, 48), 1), ((33, 0), 1), ((33, 33), 0)):
        with pytest.raises(ValueError, match=r"shape must be \(H, W\) or \(N, 3, H, W\)"):
            fast.layers(shape, repeats=repeats)


def test_within_compiled_code(small: dlf.DeepLabV3) -> None:
    fast = dlf.optimize(small)
    torch.compiler.reset()

    @torch.compile(backend="eager")
    def brightest(x: Tensor) -> Tensor:
        return fast(2 * x)["out"].amax(1)

    torch.testing.assert_close(brightest(X), fast(2 * X)["out"].amax(1), rtol=0, atol=0)
