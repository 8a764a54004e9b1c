"""Optimised models through torch.export and torch.onnx.export: numbers, sizes, ops, refusals."""

from __future__ import annotations

import copy
import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fast_models import FAMILIES, error, narrow, plain, quick, small
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import deeplab_fast as dlf
from deeplab_fast import ops
from deeplab_fast.dispatch import limits
from deeplab_fast.dispatch.declare import decompositions
from deeplab_fast.exporting.graph import pools_of_any_size
from deeplab_fast.program import gpu_layers
from deeplab_fast.program.frozen import Frozen, freeze

pytestmark = pytest.mark.filterwarnings(
    "ignore::deeplab_fast.program.calibrate.CalibrationWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)
DYNAMIC = ({0: Dim("batch"), 2: Dim("height", min=33), 3: Dim("width", min=33)},)
# fp32 by a form that saves multiplications (1e-5), over at most 60 convolutions one after another.
FP32 = 1e-5 * 60**0.5
BF16 = torch.bfloat16


def images(*shape: int, seed: int = 0) -> Tensor:
    """Blots of some pixels, as photos have them."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(shape[0], 3, 9, 11, generator=generator)
    return F.interpolate(few, size=shape[1:], mode="bicubic")


X = images(2, 49, 65)
# PyTorch's convolutions in bf16 take long on many processors.
SMALL = images(1, 33, 41)


def traced(model: nn.Module, dynamic: bool = True, x: Tensor = X) -> ExportedProgram:
    # Without it PyTorch before 2.13 has no pooling of any size.
    with pools_of_any_size():
        return torch.export.export(model, (x,), dynamic_shapes=DYNAMIC if dynamic else None)


def nodes(program: ExportedProgram) -> Counter[str]:
    """The calls of a graph, by the names of ops."""
    return Counter(
        str(node.target).split(".default")[0]
        for node in program.graph.nodes
        if node.op == "call_function"
    )


def ours(program: ExportedProgram) -> set[str]:
    return {name for name in nodes(program) if name.startswith("deeplab_fast")}


@torch.no_grad()
def assert_same(program: ExportedProgram, model: nn.Module, x: Tensor, bound: float) -> None:
    y, expected = program.module()(x), model(x)
    assert list(y) == list(expected)
    for key, value in expected.items():
        assert y[key].dtype == value.dtype and y[key].stride() == value.stride(), key
        assert error(y[key], value) <= bound, key


@torch.no_grad()
def assert_within_twice_pytorchs(program: ExportedProgram, own: nn.Module) -> None:
    """The rule below fp32: twice the error of PyTorch's own modules in bf16, and a rounding."""
    exact = plain(copy.deepcopy(own).double(), SMALL.double())["out"]
    theirs = plain(copy.deepcopy(own).to(BF16), SMALL.to(BF16))["out"]
    y = program.module()(SMALL)["out"]
    assert 0 < error(y, exact) <= 2 * error(theirs, exact) + 2.0**-9


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        pytest.param("resnet18", "aspp_branches", id="residuals, max pooling, auxiliary head"),
        pytest.param("mobilenetv3", "aspp_project", id="hardswish, squeeze-excitation, strips"),
        pytest.param("efficientnet-lite", "aspp_branches", id="uneven SAME padding, relu6"),
        pytest.param("mobilenetv2", "conv_bn_act", id="SAME padding beside dilations"),
        pytest.param("paper", "conv_bn_act", id="head without pooled branch"),
        pytest.param("mmseg", "conv_bn_act", id="3x3 projection of the pooled vector"),
        pytest.param("deeplabv2", "conv_bn_act", id="sum of branches"),
    ],
)
def test_sizes_that_may_change(family: str, expected: str) -> None:
    model = dlf.optimize((quick if family == "deeplabv2" else narrow)(FAMILIES[family]))
    program = traced(model)
    assert f"deeplab_fast.{expected}" in nodes(program)
    # Another number of images and others of the stride's remainders; the least that is allowed.
    for shape in ((2, 49, 65), (3, 64, 82), (1, 33, 33)):
        assert_same(program, model, images(*shape), FP32)


@pytest.mark.parametrize("family", ["resnet18", "efficientnet-lite"])
def test_fixed_sizes(family: str) -> None:
    model = dlf.optimize(narrow(FAMILIES[family]), keep_aux=True)
    program = traced(model, dynamic=False)
    assert_same(program, model, X, FP32)
    # A size that is known has its padding in the convolutions, or beside them as numbers.
    assert not any("built-in" in name for name in nodes(program))


def test_memory_formats_and_logits_alone() -> None:
    class Logits(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.model.forward_logits(x)}

    for memory_format in (torch.contiguous_format, torch.channels_last):
        own = narrow(FAMILIES["resnet18"]).to(memory_format=memory_format)
        model = Logits(dlf.optimize(own))
        assert_same(traced(model, dynamic=False), model, X, FP32)


def test_weights_are_those_that_run() -> None:
    """Panels, tiles and strips of a model that has run, whose own weights were given up."""
    model = dlf.optimize(small())
    model(X)
    assert_same(traced(model, dynamic=False), model, X, FP32)


def test_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cpu_bf16", lambda: "")
    # Rounded residuals; hardswish, squeeze-excitation, vectors in fp32.
    for family in ("mmseg", "mobilenetv3"):
        own = narrow(FAMILIES[family])
        model = dlf.optimize(own, precision="bf16")
        program = traced(model, False, SMALL)
        assert program.module()(SMALL)["out"].dtype == torch.float32
        assert_within_twice_pytorchs(program, own)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_programs_of_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_layers, "on_gpu", lambda x: True)
    # Vectors and hardswish are the same layers in both dtypes.
    families = ("resnet18", "mobilenetv3", "mmseg") if dtype == torch.float32 else ("mmseg",)
    for family in families:
        own = narrow(FAMILIES[family])
        model = dlf.optimize(own, dtype=dtype)
        dynamic = family == "resnet18"
        program = traced(model, dynamic, X if dtype == torch.float32 else SMALL)
        if dtype == torch.float32:
            assert_same(program, model, X, FP32)
            continue
        assert_within_twice_pytorchs(program, own)


def in_8_bits(program: ExportedProgram) -> int:
    return nodes(program)["quantized_decomposed.dequantize_per_channel"]


@pytest.mark.skipif(bool(limits.cpu_int8()), reason=limits.cpu_int8())
def test_int8() -> None:
    own = dlf.load("camvid")
    own.calibrate(X, batch_size=2)
    model = dlf.optimize(own, precision="int8")
    program = traced(model)
    assert in_8_bits(program) > 30
    exact = dlf.optimize(own, precision="fp32")
    x = images(3, 64, 82, seed=1)
    with torch.no_grad():
        y, expected, wide = (m(x)["out"] for m in (program.module(), model, exact))
    # Sums are exact in both; values that lie at the middle of two steps may take the other, which
    # is less than the steps themselves cost.
    assert error(y, expected) <= 0.5 * error(expected, wide)
    assert (y.argmax(1) == expected.argmax(1)).double().mean() >= 0.99


class Portable(nn.Module):
    def __init__(self, frozen: Frozen) -> None:
        super().__init__()
        self.frozen = frozen

    def forward(self, x: Tensor) -> Tensor:
        low = self.frozen.exported(x, False)["out"]
        return F.interpolate(low, size=x.shape[2:], mode="bilinear")


def test_int8_for_other_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    own = dlf.load("camvid")
    own.calibrate(X, batch_size=2)

    def refuse(*_: object) -> str:
        raise AssertionError("a portable program asks nothing of this processor")

    with monkeypatch.context() as patch:
        for name in ("cpu_int8", "extension"):
            patch.setattr(limits, name, refuse)
        frozen, reason = freeze(own, False, None, None, "int8", portable=True)
    assert frozen is not None, reason
    # Of one size, whose padding is a number in ONNX.
    x = images(2, 97, 129, seed=1)
    program = torch.export.export(Portable(frozen), (x,))
    # All 50 convolutions of more than 32 channels with a known range, 3x3 ones and those of narrow
    # blocks among them, but the classifier's.
    convs = [m for m in own.modules() if isinstance(m, nn.Conv2d) and m.out_channels > 32]
    assert in_8_bits(program) >= len(convs) - 2
    for weight in program.constants.values():
        if isinstance(weight, Tensor) and weight.dtype == torch.int8:
            assert weight.abs().max() <= 64
    with torch.no_grad():
        y, expected = program.module()(x), dlf.optimize(own)(x)["out"]
    # 48 layers whose weights of 7 bits are off by 1.8 % and maps by 0.9 %, as in `test_int8`, of
    # which a trained network's redundant channels leave less.
    assert error(y, expected) <= 0.02 * 48**0.5
    assert (y.argmax(1) == expected.argmax(1)).double().mean() >= 0.99
    made = torch.onnx.export(program, dynamo=True, verbose=False)
    kinds = Counter(node.op_type for node in made.model.graph)
    assert kinds["QuantizeLinear"] >= 40 and kinds["DequantizeLinear"] >= 80
    made.save(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (got,) = map(torch.from_numpy, session.run(None, {session.get_inputs()[0].name: x.numpy()}))
    # Other roundings of the same integers, less than the steps themselves.
    assert error(got, y) <= 0.5 * error(y, expected)
    assert (got.argmax(1) == y.argmax(1)).double().mean() >= 0.99


def test_a_copy_exports_its_plain_modules() -> None:
    own = narrow(FAMILIES["resnet18"])
    own.backbone.layer1.register_forward_hook(lambda *_: None)
    model = dlf.optimize(own)
    assert model.copy is not None
    assert_same(traced(model), model, images(1, 64, 49), FP32)


def test_modules_that_run_as_they_are() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    own = narrow(FAMILIES["resnet18"])
    own.backbone.layer1.append(Doubled())
    model = dlf.optimize(own)
    assert model.copy is None
    assert_same(traced(model, dynamic=False), model, X, FP32)


class Labels(nn.Module):
    """What a user makes of an optimised model and an op."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return ops.upsample_argmax(self.model.forward_logits(x), x.shape[-2:])


def test_graphs_of_pytorchs_ops_alone() -> None:
    model = Labels(dlf.optimize(narrow(FAMILIES["resnet18"])))
    program = traced(model)
    with pools_of_any_size():
        kept = program.run_decompositions()
        table = torch.export.default_decompositions() | decompositions()
        whole = program.run_decompositions(table)
    assert ours(kept) == ours(program) and len(ours(kept)) == 4
    assert ours(whole) == set()
    for shape in ((2, 49, 65), (1, 64, 82)):
        x = images(*shape)
        with torch.no_grad():
            labels, expected = whole.module()(x), model(x)
        assert labels.dtype == torch.uint8
        # But where the two best logits are closer than their error.
        assert (labels == expected).double().mean() >= 0.999


def test_compilers_keep_the_ops() -> None:
    from torch._inductor.decomposition import select_decomp_table

    assert not set(decompositions()) & set(select_decomp_table())


@pytest.mark.parametrize("op", ["conv_bn_act", "aspp_branches", "aspp_project", "upsample_argmax"])
def test_decompositions_compute_what_the_ops_do(op: str) -> None:
    overload = getattr(torch.ops.deeplab_fast, op).default
    x, vector = torch.randn(2, 6, 9, 7, dtype=torch.double), torch.rand(4).double()
    weight, residual = torch.randn(4, 6, 3, 3).double(), torch.randn(2, 4, 9, 7).double()
    pooled, to_pooled = torch.randn(2, 3).double(), torch.randn(4, 9, 1, 1).double()
    classifier = torch.randn(5, 4, 1, 1).double(), torch.randn(5).double()
    calls: dict[str, list[tuple[Any, ...]]] = {
        "conv_bn_act": [
            (x, weight, scale, vector, added, 1, 2, 2, 1, act)
            for scale in (vector + 1, None)
            for added in (residual, None)
            for act in ("relu", None)
        ],
        "aspp_branches": [
            (x, [weight, weight[..., :1, :1]], scales, [vector] * 2, [2, 1])
            for scales in ([vector + 1] * 2, [])
        ],
        "aspp_project": [
            (x, pooled, to_pooled, scale, vector, *last)
            for scale in (vector + 1, None)
            for last in (classifier, ())
        ],
        "upsample_argmax": [
            (x, 17, 23, align, prob) for align in (False, True) for prob in (False, True)
        ],
    }
    for args in calls[op]:
        y, expected = decompositions()[overload](*args), overload(*args)
        several = isinstance(expected, tuple)
        pairs = zip(y, expected, strict=True) if several else [(y, expected)]
        for own, value in pairs:
            assert own.dtype == value.dtype and own.stride() == value.stride()
            torch.testing.assert_close(own, value, rtol=1e-9, atol=1e-9)


def test_scale_is_one_where_there_is_none() -> None:
    x, weight = torch.randn(1, 6, 9, 7), torch.randn(4, 6, 1, 1, requires_grad=True)
    shift, one = torch.randn(4), torch.ones(4)
    wide, pooled = torch.randn(4, 9, 1, 1, requires_grad=True), torch.randn(1, 3)
    for without, given in (
        (ops.conv_bn_act(x, weight, None, shift), ops.conv_bn_act(x, weight, one, shift)),
        (
            ops.aspp_branches(x, [weight], None, [shift], [1]),
            ops.aspp_branches(x, [weight], [one], [shift], [1]),
        ),
        (
            ops.aspp_project(x, pooled, wide, None, shift),
            ops.aspp_project(x, pooled, wide, one, shift),
        ),
    ):
        assert torch.equal(without, given) and without.requires_grad


def test_onnx_of_ops_and_optimised_models(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Labels(dlf.optimize(narrow(FAMILIES["resnet18"]))).eval()
    made = torch.onnx.export(model, (X,), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    kinds = Counter(node.op_type for node in made.model.graph)
    # Batch norms are in filters and shifts.
    assert kinds["Mul"] == 0 and kinds["Conv"] == 27 and kinds["ArgMax"] == kinds["Resize"] == 1
    made.save(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for shape in ((2, 49, 65), (1, 64, 82)):
        x = images(*shape, seed=2)
        (labels,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected = model(x)
        # But where the two best logits are closer than their error.
        assert (torch.from_numpy(labels) == expected).double().mean() >= 0.999


def test_torchscript_is_refused() -> None:
    model = dlf.optimize(small())
    for call, what in (
        (lambda: torch.jit.script(model), "torch.jit.script"),
        (lambda: torch.jit.script(nn.Sequential(model)), "torch.jit.script"),
        (lambda: torch.jit.trace(model, X), "torch.jit.trace"),
        (lambda: torch.onnx.export(model, (X,), io.BytesIO(), dynamo=False), "dynamo=False"),
    ):
        with pytest.raises(RuntimeError, match=f"{what}.* of an optimised model.*export") as error:
            call()
        assert "the model that it was made from" in str(error.value)


def test_what_is_refused() -> None:
    model = dlf.optimize(small())
    with pytest.raises(Exception, match="strict=False, which is the default"):
        torch.export.export(model, (X,), strict=True)
    with pytest.raises(Exception, match="the input is float64 on cpu"):
        torch.export.export(model, (X.double(),))
    with pytest.raises(Exception, match="has 4 channels, the weight wants 3"):
        torch.export.export(model, (torch.zeros(1, 4, 33, 33),))
