"""Exported files compute what their models do: each format, at two sizes and batches."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast.data.preprocess import Preprocess, PreprocessBGR
from deeplab_fast.engine.predict import predict
from deeplab_fast.exporting import ExportedModel, InputSizeError, load_exported
from deeplab_fast.testing import import_torchvision

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

# (N, H, W): one image of odd sides, two of others; the third has the size that models are for.
SHAPES = [(1, 161, 225), (2, 130, 99), (1, 360, 480)]
# CONTRIBUTING.md: of forms that save multiplications 1e-5 a convolution, by the square root of
# their number; a ResNet-50 with its head has 60, of which all here have fewer or as many.
BOUND = 1e-5 * 60**0.5
# Labels may differ where the two best logits are closer than the bound; of 1e4 pixels a few are, so
# that 0.1 % of the labels of a call have room, and a wrong graph, which changes a tenth, has none.


def _randomised(model: nn.Module) -> nn.Module:
    """With batch norms that are no identity."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_var, 0.5), (module.weight.data, 0.5)):
                tensor.uniform_(low, 1.5, generator=generator)
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.1, generator=generator)
    return model.eval()


def _tiny(**options: object) -> dlf.DeepLabV3:
    torch.manual_seed(0)
    model = dlf.deeplabv3_resnet18(num_classes=5, head="paper", aspp_channels=16, **options)
    model.classes = tuple("abcde")
    return _randomised(model)


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "camvid":
        return dlf.load("camvid")
    if name == "smp":
        import_torchvision()
        smp = pytest.importorskip("segmentation_models_pytorch")
        return _randomised(smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, classes=5))
    return _randomised(getattr(dlf, f"deeplabv3_{name}")(num_classes=21, aux_loss=True))


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """As torchvision's models give them: of full size."""
    with torch.inference_mode():
        output = model(x)
    return output if isinstance(output, Tensor) else output["out"]


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm())


def _photo(height: int, width: int) -> np.ndarray:
    """Smooth random colours: labels of noise change with every rounding."""
    generator = np.random.default_rng(height * width)
    small = torch.from_numpy(generator.random((1, 3, 9, 13)) * 255)
    full = torch.nn.functional.interpolate(small, (height, width), mode="bicubic")
    return full[0].permute(1, 2, 0).clamp(0, 255).to(torch.uint8).numpy()


@pytest.fixture(scope="module", params=["resnet50", "mobilenet_v3_large", "camvid", "smp"])
def onnx_file(request, tmp_path_factory) -> tuple[nn.Module, Path]:
    """A model and its ONNX file, of any size and batch: the paper's backbone with an auxiliary
    head, gates, TensorFlow's padding, another library's decoder."""
    model = _build(request.param)
    path = tmp_path_factory.mktemp("export") / f"{request.param}.onnx"
    with warnings.catch_warnings():
        # smp's does not tell its normalisation.
        warnings.simplefilter("ignore", UserWarning)
        report = dlf.export(model, path)
    assert report.check is not None and report.check.error is not None
    return model, path


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_onnx_of_any_size(onnx_file, runtime):
    model, path = onnx_file
    loaded = load_exported(path, runtime=runtime)
    multiple = loaded.description.multiple
    assert multiple == (16 if path.stem == "smp" else 1)
    for n, *sides in SHAPES:
        x = torch.randn(n, 3, *(-(-side // multiple) * multiple for side in sides))
        found, wanted = loaded(x), _logits(model, x)
        assert found.shape == wanted.shape
        assert _error(found, wanted) < BOUND


@pytest.mark.slow
def test_onnx_has_no_batch_norm_and_says_what_it_is(onnx_file):
    import onnx

    model, path = onnx_file
    file = onnx.load(path)
    assert [opset.version for opset in file.opset_import if not opset.domain] == [18]
    kinds = {node.op_type for node in file.graph.node}
    assert "BatchNormalization" not in kinds and not any(
        "deeplab" in n.domain for n in file.graph.node
    )
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    preprocess = getattr(model, "preprocess", Preprocess())
    assert json.loads(metadata["mean"]) == list(preprocess.mean)
    assert json.loads(metadata["std"]) == list(preprocess.std)
    if path.stem == "camvid":
        assert json.loads(metadata["classes"]) == list(model.classes)
        assert json.loads(metadata["palette"]) == [list(colour) for colour in model.palette]
    names = [d.dim_param or d.dim_value for d in file.graph.input[0].type.tensor_type.shape.dim]
    if path.stem != "smp":
        assert names == ["batch", 3, "height", "width"]


@pytest.mark.slow
def test_a_file_predicts_as_its_model(onnx_file):
    model, path = onnx_file
    loaded = load_exported(path)
    photo = _photo(150, 203)
    passes = [{}, {"scales": (0.75, 1.0), "flip": True}, {"tile": (96, 112), "overlap": 0.3}]
    for options in passes if path.stem == "mobilenet_v3_large" else passes[:1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            wanted = predict(model, photo, **options)
        found = loaded.predict(photo, **options)
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        # Logits of full input size are resized once more where the input is not of the photo's
        # size: at borders of classes labels change. 720 rows of camvid's, of 150.
        least = 0.98 if path.stem == "camvid" else 0.999
        assert (found == wanted).mean() >= least


@pytest.fixture(scope="module")
def tiny() -> dlf.DeepLabV3:
    return _tiny()


@pytest.mark.slow
def test_openvino_of_photos_gives_the_labels_of_predict(tmp_path):
    model = _tiny()
    model.preprocess = Preprocess((0.4, 0.5, 0.6), (0.3, 0.2, 0.25), size=130)
    model.palette = tuple((i, 2 * i, 3 * i) for i in range(5))
    path = tmp_path / "tiny.xml"
    report = dlf.export(model, path, labels=True, preprocessing=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.bin", "tiny.xml"]
    weights = sum(p.nbytes for p in model.parameters())
    assert 0.9 * weights < report.bytes < 1.3 * weights
    loaded = load_exported(path)
    assert loaded.classes == model.classes and loaded.palette == model.palette
    # Upright and wide: the shorter side decides.
    for photo in (_photo(150, 203), _photo(211, 140)):
        found, wanted = loaded.predict(photo), model.predict(photo)
        assert found.shape == photo.shape[:2] and found.dtype == np.uint8
        assert len(np.unique(wanted)) > 2
        # A level of a resized pixel that is rounded the other way moves logits by 1 / 100.
        assert (found == wanted).mean() > 0.99
    # The file would resize it itself, to millions of columns.
    with pytest.raises(InputSizeError, match=r"40x200000 pixels .* resized to 130x650000"):
        loaded.predict(np.zeros((40, 200_000, 3), np.uint8))


@pytest.mark.parametrize(
    ("size", "resize"),
    [
        pytest.param((60, 84), 90, id="enlarged"),
        pytest.param((130, 99), 66, id="reduced"),
        pytest.param((130, 99), (66, 99), id="one-side"),
        pytest.param((66, 80), None, id="as-it-is"),
    ],
)
def test_openvino_of_photos_of_one_size(tmp_path, size, resize):
    """Matrices that resize are constants then, which OpenVINO joins with what is around them."""
    model = _tiny()
    model.preprocess = Preprocess((0.4, 0.5, 0.6), (0.3, 0.2, 0.25), size=resize)
    path = tmp_path / "tiny.xml"
    dlf.export(model, path, preprocessing=True, size=size)
    photo = _photo(*size)
    found, wanted = load_exported(path).predict(photo), model.predict(photo)
    assert len(np.unique(wanted)) > 1
    assert (found == wanted).mean() > 0.99


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_torch_export(tiny, tmp_path, precision):
    path = tmp_path / "tiny.pt2"
    # Other precisions at one size, which is followed sooner.
    report = dlf.export(
        tiny, path, precision=precision, size=None if precision == "fp32" else (33, 49)
    )
    assert "fp32" in str(report) or precision in str(report)
    loaded = load_exported(path)
    # bf16 has 8 bits and fp16 11: of 24 convolutions each rounds map and weights once.
    bound = {"fp32": BOUND, "bf16": 2**-8 * 48**0.5, "fp16": 2**-11 * 48**0.5}[precision]
    # Dilated convolutions of bf16 and fp16 take seconds on this CPU.
    for n, *sides in SHAPES[:2] if precision == "fp32" else [(1, 33, 49)]:
        x = torch.randn(n, 3, *sides)
        assert _error(loaded(x), _logits(tiny, x)) < bound
    program = torch.export.load(path)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    # Nothing of the package is needed.
    code = (
        "import sys, torch; program = torch.export.load(sys.argv[1]); "
        "print(program.module()(torch.zeros(1, 3, 33, 49)).shape, 'deeplab_fast' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(path)]
    printed = subprocess.check_output(command, text=True, cwd=tmp_path)
    assert printed.strip() == "torch.Size([1, 5, 33, 49]) False"


@pytest.mark.slow
def test_aotinductor_package(tmp_path):
    torch.manual_seed(0)
    # Each kernel is compiled: bench.exports has the figures of whole networks.
    layers = (
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 5, 1),
    )
    model = _randomised(nn.Sequential(*layers))
    model.preprocess = Preprocess()
    model.classes = tuple("abcde")
    path = tmp_path / "small.pt2-package"
    dlf.export(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["small.pt2-package"]
    loaded = load_exported(path)
    assert loaded.classes == model.classes
    for n, *sides in SHAPES[:2]:
        x = torch.randn(n, 3, *sides)
        wanted = torch.nn.functional.interpolate(_logits(model, x), sides, mode="bilinear")
        assert _error(loaded(x), wanted) < BOUND
    # The machine code would read beside its input.
    with pytest.raises(ValueError, match=r"\[1, 4, 64, 64\].*takes a tensor images float32"):
        loaded(torch.zeros(1, 4, 64, 64))
    with pytest.raises(InputSizeError, match="33 or more"):
        loaded(torch.zeros(1, 3, 64, 20))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_static_files_refuse_another_size(tiny, tmp_path, suffix):
    path = tmp_path / f"static{suffix}"
    report = dlf.export(tiny, path, size=(96, 128), dynamic=False, labels=True)
    assert "images float32 [1,3,96,128] -> labels uint8 [1,96,128]" in str(report)
    loaded = load_exported(path)
    x = torch.randn(1, 3, 96, 128)
    assert (loaded(x) == _logits(tiny, x).argmax(1)).float().mean() > 0.999
    with pytest.raises(InputSizeError, match="has 96x130 pixels and the file takes 96x128 only"):
        loaded(torch.zeros(1, 3, 96, 130))
    with pytest.raises(InputSizeError, match="has 2 images and the file takes 1"):
        loaded(torch.zeros(2, 3, 96, 128))
    # Without this package too.
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        with pytest.raises(Exception, match=r"(?s)images.*Expected: 128"):
            session.run(None, {"images": np.zeros((1, 3, 96, 130), np.float32)})
    else:
        with pytest.raises(AssertionError, match=r"Guard failed.*== 128"):
            torch.export.load(path).module()(torch.zeros(1, 3, 96, 130))


def test_size_alone_is_fixed_and_the_batch_open(tiny, tmp_path):
    path = tmp_path / "size.pt2"
    report = dlf.export(tiny, path, size=64)
    assert report.description.size == (64, 64) and report.description.batch is None
    x = torch.randn(3, 3, 64, 64)
    assert _error(load_exported(path)(x), _logits(tiny, x)) < BOUND


def test_one_class_and_reversed_channels(tmp_path):
    torch.manual_seed(0)
    model = _randomised(dlf.deeplabv3_resnet18(num_classes=1, head="paper", aspp_channels=16))
    model.preprocess = PreprocessBGR((0.3, 0.4, 0.5), (0.2, 0.25, 0.3), size=70)
    path = tmp_path / "one.pt2"
    report = dlf.export(model, path, labels=True, preprocessing=True, size=(90, 101))
    assert report.check.same > 0.999
    loaded = load_exported(path)
    photo = _photo(90, 101)
    wanted = model.predict(photo)
    assert 0.02 < wanted.mean() < 0.98
    assert (loaded.predict(photo) == wanted).mean() > 0.998
    # Tensors of photos, one and several.
    pixels = torch.from_numpy(photo).permute(2, 0, 1)
    assert (loaded.predict(pixels).numpy() == loaded.predict(photo)).all()
    assert loaded.predict(torch.stack([pixels] * 2)).shape == (2, 90, 101)
    assert len(loaded.predict([photo, photo])) == 2
    with pytest.raises(InputSizeError, match="60x101 pixels and the file takes 90x101 only"):
        loaded.predict([photo, photo[:60]])


def test_more_than_256_classes(tmp_path):
    model = dlf.deeplabv3_resnet18(num_classes=300, head="paper", aspp_channels=16).eval()
    path = tmp_path / "many.pt2"
    dlf.export(model, path, labels=True, size=65)
    x = torch.randn(1, 3, 65, 65)
    labels = load_exported(path)(x)
    assert labels.dtype == torch.int64 and torch.equal(labels, _logits(model, x).argmax(1))


def test_the_model_is_not_touched(tmp_path):
    model = _tiny(aux_loss=True).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dlf.export(model, tmp_path / "m.pt2", size=64, check=False)
    assert all(m.training for m in model.modules()) and model.aux_classifier is not None
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_optimised_models_export_what_they_were_made_from(tiny, tmp_path):
    path = tmp_path / "optimised.pt2"
    dlf.export(dlf.optimize(tiny), path, labels=True, size=(97, 99))
    x = torch.randn(1, 3, 97, 99)
    assert (load_exported(path)(x) == _logits(tiny, x).argmax(1)).float().mean() > 0.999
    targets = {str(node.target) for node in torch.export.load(path).graph.nodes}
    assert not any("deeplab_fast" in target for target in targets)


def test_accelerated_models_and_their_padding(tmp_path):
    """Sizes that the library's model refuses are padded, as predict pads for the model itself."""
    import_torchvision()
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = _randomised(smp.DeepLabV3("resnet18", encoder_weights=None, classes=5))
    path = tmp_path / "smp.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dlf.export(dlf.accelerate(model), path)
        loaded = load_exported(path)
        photo = _photo(70, 100)
        assert loaded.description.multiple == 8
        assert (loaded.predict(photo) == predict(model, photo)).mean() > 0.999
    with pytest.raises(InputSizeError, match="multiples of 8"):
        loaded(torch.zeros(1, 3, 70, 100))


@pytest.fixture
def exported(tiny, tmp_path_factory) -> Iterator[ExportedModel]:
    path = tmp_path_factory.mktemp("labels") / "labels.pt2"
    tiny.preprocess = Preprocess(size=80)
    try:
        dlf.export(tiny, path, labels=True, check=False)
    finally:
        tiny.preprocess = Preprocess()
    yield load_exported(path)


def test_files_of_labels_say_what_they_cannot(exported):
    photo = _photo(90, 90)
    with pytest.raises(ValueError, match=r"flip, scales: labels\.pt2 gives labels and no logits"):
        exported.predict(photo, scales=(0.5, 1.0), flip=True)
    with pytest.raises(ValueError, match=r"tile: .*labels=False"):
        exported.predict(photo, tile=64)
    # Its labels would have another size than the photo.
    with pytest.raises(InputSizeError, match=r"90x90 is resized \(to 80\).*preprocessing=True"):
        exported.predict(photo)
    with pytest.raises(ValueError, match=r"precision is bf16 and labels\.pt2 computes in fp32"):
        exported.predict(photo, precision="bf16")
    assert exported.predict(_photo(80, 95)).shape == (80, 95)
    with pytest.raises(RuntimeError, match="cannot train"):
        exported.train()


def test_a_file_that_computes_something_else_is_not_kept(tiny, tmp_path, monkeypatch):
    from deeplab_fast.exporting import runtimes

    path = tmp_path / "wrong.pt2"
    call = runtimes._TorchProgram.__call__
    monkeypatch.setattr(runtimes._TorchProgram, "__call__", lambda self, x: call(self, x) * 1.001)
    with pytest.raises(dlf.exporting.ExportError, match="does not compute what deeplabv3_resnet18"):
        dlf.export(tiny, path, size=97)
    # Of labels another rule decides: those of clear pixels must stay.
    monkeypatch.setattr(runtimes._TorchProgram, "__call__", lambda self, x: 4 - call(self, x))
    with pytest.raises(dlf.exporting.ExportError, match="of the labels are others"):
        dlf.export(tiny, path, labels=True, size=97)
    assert not list(tmp_path.iterdir())


def test_broken_weights_are_told(tmp_path):
    model = _tiny()
    model.backbone.conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(dlf.exporting.ExportError, match="NaN or infinite on the photo"):
        dlf.export(model, tmp_path / "m.pt2", size=65)
    assert not list(tmp_path.iterdir())
    dlf.export(model, tmp_path / "m.pt2", size=65, check=False)


def test_reduced_precision_that_overflows_is_told(tmp_path):
    model = _tiny()
    with torch.no_grad():
        # Beyond 65504, undone by the convolution that follows.
        model.classifier[-1].weight.mul_(1e6)
        model.classifier[-1].bias.zero_()
    with pytest.raises(dlf.exporting.ExportError, match="in fp16 gives logits that are NaN"):
        dlf.export(model, tmp_path / "m.pt2", size=33, precision="fp16")
    assert not list(tmp_path.iterdir())


def test_the_callers_autocast_and_default_dtype_do_not_matter(tmp_path):
    model = _tiny()
    x = torch.randn(2, 3, 65, 65)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            report = dlf.export(model, tmp_path / "m.pt2", size=65, preprocessing=True)
            dlf.export(model, tmp_path / "x.pt2", size=65, check=False)
            found = load_exported(tmp_path / "x.pt2")(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    assert report.check.error < BOUND and _error(found, _logits(model, x)) < BOUND


def test_a_convolution_that_reads_no_bias_keeps_its_batch_norm(tmp_path):
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.conv2d(x, self.weight, None, self.stride, self.padding)

    torch.manual_seed(0)
    model = _randomised(
        nn.Sequential(Own(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))
    )
    model.preprocess = Preprocess()
    report = dlf.export(model, tmp_path / "m.pt2", size=65)
    assert report.check.error < BOUND
    program = torch.export.load(tmp_path / "m.pt2")
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)


def test_a_file_that_is_not_what_it_says_is_told(tiny, tmp_path):
    path = tmp_path / "m.pt2"
    dlf.export(tiny, path, size=65, check=False)
    loaded = load_exported(path)
    x = torch.zeros(1, 3, 65, 65)
    for change, words in (
        (
            {"num_classes": 4},
            r"gave torch\.float32 \[1, 5, 65, 65\]; expected logits .*\[N,4,65,65\]",
        ),
        ({"labels": True}, r"gave torch\.float32 .*expected labels uint8"),
        ({"size": (70, 70)}, r"m\.pt2 cannot be run in torch\.export"),
    ):
        loaded.description = replace(loaded.description, **change)
        with pytest.raises(ValueError, match=words):
            loaded(x if "size" not in change else torch.zeros(1, 3, 70, 70))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"precision": "int4"},
            r"precision is 'int4', and a \.pt2 file has fp32, fp16, bf16, int8",
        ),
        ({"precision": "int8"}, r"the model is not calibrated.*calibrate"),
        ({"size": (0, 5)}, r"size is \(0, 5\), expected \(height, width\)"),
        ({"size": 1.5}, "size is 1.5, expected"),
        ({"labels": "yes"}, "labels is 'yes', expected True or False"),
        ({"dynamic": 0}, "dynamic is 0, expected True or False"),
    ],
)
def test_arguments_that_are_not_allowed(tiny, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        dlf.export(tiny, tmp_path / "m.pt2", **options)
    assert not list(tmp_path.iterdir())


def test_names_and_models_that_are_not_allowed(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"'m\.tflite' has no format.*\.onnx, \.xml"):
        dlf.export(tiny, tmp_path / "m.tflite")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        dlf.export(tiny, tmp_path / "none" / "m.pt2")
    with pytest.raises(ValueError, match="the model is a dict"):
        dlf.export({}, tmp_path / "m.pt2")
    with pytest.raises(ValueError, match="precision is bf16 and the model was optimised in fp32"):
        dlf.export(dlf.optimize(tiny), tmp_path / "m.pt2", precision="bf16")

    class Own(Preprocess):
        pass

    model = _tiny()
    model.preprocess = Own()
    with pytest.raises(ValueError, match="which no file can describe"):
        dlf.export(model, tmp_path / "m.pt2")
    with pytest.raises(ValueError, match="on the meta device"):
        dlf.export(_tiny().to("meta"), tmp_path / "m.pt2")
    model.preprocess, model.palette = Preprocess(), ((0, 0, 300),) * 5
    with pytest.raises(ValueError, match=r"palette is 300.*set model\.classes and model\.palette"):
        dlf.export(model, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_libraries_that_are_missing(tiny, tmp_path, monkeypatch):
    from deeplab_fast.exporting import formats

    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match=r"needs onnxscript.*deeplab_fast\[onnx\]"):
        dlf.export(tiny, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_torch_export_does_not_follow(tmp_path):
    class Deciding(nn.Module):
        """Depends on its values."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.preprocess = Preprocess()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y if bool(y.mean() > 0) else -y

    with pytest.raises(dlf.exporting.ExportError, match=r"torch\.export does not follow Deciding"):
        dlf.export(Deciding().eval(), tmp_path / "m.pt2", size=64)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["override", "hook", "pre-hook"])
def test_a_model_with_a_forward_of_its_own_exports_that(tmp_path, kind):
    model = _tiny()
    if kind == "override":

        class Own(type(model)):
            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"out": -super().forward(x)["out"]}

        model.__class__ = Own
    elif kind == "hook":
        model.register_forward_hook(lambda module, args, output: {"out": output["out"] * 3})
    else:
        model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    dlf.export(model, tmp_path / "m.pt2", size=65)
    loaded = load_exported(tmp_path / "m.pt2")
    x = torch.randn(2, 3, 65, 65)
    assert _error(loaded(x), _logits(model, x)) < BOUND
    assert loaded.classes == model.classes


def test_no_images_give_no_labels(tiny, tmp_path):
    # OpenVINO would give what it gave before.
    path = tmp_path / "m.xml"
    dlf.export(tiny, path, size=(65, 97))
    logits = load_exported(path)
    assert logits(torch.randn(3, 3, 65, 97)).shape == (3, 5, 65, 97)
    assert logits(torch.zeros(0, 3, 65, 97)).shape == (0, 5, 65, 97)
    assert logits.predict(torch.zeros(0, 3, 65, 97)).shape == (0, 65, 97)
    again = copy.deepcopy(logits)
    x = torch.randn(1, 3, 65, 97)
    assert torch.equal(again(x), logits(x))


def test_options_that_predict_does_not_have(exported):
    photo = _photo(80, 90)
    with pytest.raises(TypeError, match="predict got treshold; its options are"):
        exported.predict(photo, treshold=0.3)
    with pytest.raises(ValueError, match="preprocess is a str"):
        exported.predict(photo, preprocess="x")
    assert exported.predict(torch.zeros(0, 3, 80, 90, dtype=torch.uint8)).shape == (0, 80, 90)
    assert pickle.loads(pickle.dumps(exported)).predict(photo, dtype="fp32").shape == (80, 90)


def test_several_threads_load_and_export(tiny, tmp_path):
    path = tmp_path / "m.pt2"
    dlf.export(tiny, path, size=33, check=False)
    filters, level = list(warnings.filters), logging.getLogger("torch.export").level

    def work(i: int) -> float:
        if i % 3 == 0:
            dlf.export(tiny, tmp_path / f"{i}.pt2", size=33, check=False)
        return float(load_exported(path)(torch.ones(1, 3, 33, 33)).sum())

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(work, range(6)))) == 1
    assert logging.getLogger("torch.export").level == level
    assert warnings.filters == filters
