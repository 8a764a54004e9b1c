"""Models in int8: calibration, which layers run in 8 bits, errors, what is not finite, files."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast.dispatch import limits
from deeplab_fast.dispatch.errors import SAVING
from deeplab_fast.program import calibrate as calibrating
from deeplab_fast.program import inference, int8_layers
from deeplab_fast.program.calibrate import CalibrationWarning
from deeplab_fast.program.calibration import Calibration, CalibrationError, fingerprint
from deeplab_fast.program.int8_layers import Int8Forms
from deeplab_fast.program.layers import ConvSpec, Layer, Program
from tests.helpers.fast_models import FAMILIES, error, narrow, quick, small

pytestmark = [
    pytest.mark.skipif(bool(limits.cpu_int8()), reason=limits.cpu_int8()),
    # Models of random weights lose more labels than trained ones.
    pytest.mark.filterwarnings("ignore::deeplab_fast.program.calibrate.CalibrationWarning"),
]
IMAGES = torch.randn(2, 3, 33, 41, generator=torch.Generator().manual_seed(3))


def programs(model: nn.Module, images: Tensor = IMAGES) -> tuple[Program, Program]:
    """In fp32 and in int8, calibrated by the whole ranges of these images."""
    model.calibrate(images, method="minmax", batch_size=2)
    fp32, _ = inference.fold(model)
    int8, _ = inference.fold(model, Int8Forms(model.calibration))
    assert fp32 is not None and int8 is not None
    return fp32, int8


def in_bytes(program: Program, x: Tensor = IMAGES) -> dict[str, bool]:
    """Whether each layer's convolutions run in 8 bits."""
    found: dict[str, bool] = {}

    def plan(layer: Layer, *tensors: Tensor | None) -> Tensor:
        shapes = [None if t is None else tuple(t.shape) for t in tensors]
        found[layer.name] = any(p.form == "int8" for p in layer.plans(*shapes))
        return torch.empty(layer.output_shape(*shapes), device="meta")

    program.logits(x.to("meta"), plan)
    return found


# Of one layer, 2-norms: 8-bit maps of which the largest value is 8 times the norm's mean are off by
# 8 / 255 / sqrt(12) = 0.9 %, in and out; weights of 7 bits, 4 times, by 4 / 64 / sqrt(12) = 1.8 %.
LAYER_ERROR = math.sqrt(2 * 0.009**2 + 0.018**2)


@pytest.mark.parametrize(
    ("family", "everywhere"),
    [
        pytest.param("resnet18", True, id="residuals, auxiliary head"),
        pytest.param("resnet18", False, id="tiles in fp32 between"),
        pytest.param("mobilenetv3", False, id="hardswish, squeeze-excitation"),
        pytest.param("mobilenetv2-os8", False, id="linear bottlenecks, SAME padding"),
        pytest.param("mmseg", True, id="3x3 projection"),
        pytest.param("40 classes", True, id="sum of branches"),
    ],
)
def test_error_of_networks(family, everywhere, monkeypatch) -> None:
    torch.manual_seed(0)
    if everywhere:
        # As on processors whose sums do not saturate.
        monkeypatch.setattr(int8_layers, "_tiles_are_faster", lambda spec: False)
    model = (
        quick(lambda: dlf.deeplabv3_resnet18(num_classes=40, head="deeplabv2"))
        if family == "40 classes"
        else narrow(FAMILIES[family], 2)
    )
    fp32, int8 = programs(model)
    found = in_bytes(int8)
    assert sum(found.values()) >= (len(found) / 2 if everywhere else 4)
    with torch.inference_mode():
        expected, y = fp32.logits(IMAGES), int8.logits(IMAGES)
        again = int8.logits(IMAGES)
        # As each rounding's error is independent of the others', they add up as squares.
        bound = LAYER_ERROR * math.sqrt(len(found))
        for name, value in expected.items():
            assert error(y[name], value) <= bound, name
            assert torch.equal(y[name], again[name])
        # Whatever is not finite stays where fp32 has it, and touches no other image.
        for spoil in (math.nan, math.inf):
            x = IMAGES.clone()
            x[1, 2, 20, 30] = spoil
            got = int8.logits(x)
            for name, value in fp32.logits(x).items():
                assert torch.equal(got[name].isfinite(), value.isfinite()), name
                # A ReLU6 makes a number of infinity.
                assert spoil == math.inf or not value.isfinite().all()
                assert error(got[name][0], expected[name][0]) <= bound


def test_layers_in_8_bits(monkeypatch) -> None:
    def is_square(spec: ConvSpec) -> bool:
        return tuple(spec.weight.shape[2:]) == (3, 3) and spec.groups == 1

    # As where products are added in 16 bits, with compiled tiles.
    monkeypatch.setattr(int8_layers, "_tiles_are_faster", is_square)
    torch.manual_seed(0)
    model = narrow(FAMILIES["mobilenetv3"], 2)
    _, int8 = programs(model)
    found = in_bytes(int8)
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for name, runs in found.items():
        if name in convs:
            wide = convs[name].out_channels > int8_layers.NARROW
            first_or_last = name in ("backbone.0.0", "classifier.4", "aux_classifier.4")
            kept = first_or_last or (convs[name].kernel_size == (3, 3) and convs[name].groups == 1)
            assert runs == (wide and not kept), name
    # One branch of 1x1 is enough.
    assert found["classifier.0.convs"]


def test_what_was_not_measured_stays_in_fp32() -> None:
    model = small_wide()
    fp32, int8 = programs(model)
    known = model.calibration
    # A map of nothing but zeros has no range of its own.
    for ranges in ({}, dict.fromkeys(known.ranges, (0.0, 0.0))):
        nothing = Calibration(ranges, "minmax", 1, known.fingerprint, 1.0)
        same, _ = inference.fold(model, Int8Forms(nothing))
        assert same is not None
        assert not any(in_bytes(same).values())
        with torch.inference_mode():
            # Blocks are no layers of their own here: sums are in another order.
            assert error(same.logits(IMAGES)["out"], fp32.logits(IMAGES)["out"]) <= SAVING
    some = {k: v for k, v in known.ranges.items() if "block1" not in k}
    part, _ = inference.fold(model, Int8Forms(Calibration(some, "", 1, known.fingerprint, 1.0)))
    assert part is not None
    assert 0 < sum(in_bytes(part).values()) < sum(in_bytes(int8).values())
    with torch.inference_mode():
        assert error(part.logits(IMAGES)["out"], fp32.logits(IMAGES)["out"]) <= 0.2


def small_wide() -> nn.Module:
    torch.manual_seed(1)
    return narrow(FAMILIES["efficientnet-lite"], 2)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_wide()


class TestCalibrate:
    def test_every_method_gives_ranges_within_the_whole_one(self, model) -> None:
        whole = model.calibrate(IMAGES, method="minmax").calibration.ranges
        for method in ("percentile", None):
            report = model.calibrate(IMAGES, method=method)
            found = model.calibration
            assert report.calibration is found
            assert found.method in report.candidates
            assert report.candidates[found.method] == max(report.candidates.values())
            assert report.agreement == report.candidates[found.method]
            assert report.worst <= report.agreement
            assert report.worst_image in ("image 0 of the tensor", "image 1 of the tensor")
            assert found.ranges.keys() == whole.keys()
            for name, (low, high) in found.ranges.items():
                step = (whole[name][1] - whole[name][0]) / 1000
                # Zero is held by all.
                assert min(whole[name][0], 0) - step <= low <= high <= whole[name][1] + step
            assert f"{report.agreement:.2%}" in str(report)
        assert report.candidates.keys() == {
            "minmax",
            "percentile 99.99",
            "percentile 99.999",
            "entropy",
        }
        # Twice the same.
        assert model.calibrate(IMAGES).calibration == model.calibration

    def test_images_of_every_kind(self, model, tmp_path) -> None:
        from PIL import Image

        array = np.random.default_rng(0).integers(0, 256, (33, 41, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "a.png")
        photo = torch.from_numpy(array).permute(2, 0, 1)
        calls = [str(tmp_path / "a.png"), array, Image.open(tmp_path / "a.png"), photo, [array]]
        found = []
        for images in calls:
            report = model.calibrate(images, method="minmax")
            assert report.calibration.images == 1
            found.append(report.calibration.ranges)
        assert all(ranges == found[0] for ranges in found)
        assert model.calibrate([array] * 3, method="minmax", limit=2).calibration.images == 2
        assert model.calibrate([array] * 3, method="minmax", batch_size=3).calibration.images == 3

    @pytest.mark.parametrize(
        ("images", "options", "message"),
        [
            ([], {}, "list of images is empty"),
            (torch.zeros(0, 3, 9, 9), {}, "no images"),
            (torch.zeros(1, 4, 9, 9), {}, "expected .N,3,H,W"),
            ([3], {}, "is a int"),
            (IMAGES, {"method": "best"}, "expected one of minmax, percentile, entropy"),
            (IMAGES, {"limit": 0}, "limit is 0"),
            (IMAGES, {"batch_size": 0}, "batch_size is 0"),
            (torch.full((1, 3, 40, 40), math.nan), {}, "not finite on an image"),
        ],
    )
    def test_what_is_refused(self, model, images, options, message) -> None:
        before = model.calibration
        with pytest.raises(ValueError, match=message):
            model.calibrate(images, **options)
        assert model.calibration is before

    def test_models_and_processors_that_cannot(self, model, monkeypatch) -> None:
        with pytest.raises(CalibrationError, match="dense float32"):
            copy.deepcopy(model).double().calibrate(IMAGES.double())
        monkeypatch.setattr(limits, "cpu_int8", lambda: "no such instructions")
        with pytest.raises(CalibrationError, match="no such instructions"):
            model.calibrate(IMAGES)

    def test_few_equal_labels_are_warned_of(self, model, monkeypatch) -> None:
        monkeypatch.setattr(calibrating, "WANTED_AGREEMENT", 1.01)
        with pytest.warns(CalibrationWarning, match="less than 101%"):
            model.calibrate(IMAGES, method="minmax")

    def test_modes_and_precision_stay(self, model) -> None:
        trained = copy.deepcopy(model).train()
        trained.calibrate(IMAGES, method="minmax")
        assert all(m.training for m in trained.modules())
        assert trained.precision == "fp32"


def test_autocast_and_the_auxiliary_head_do_not_matter() -> None:
    torch.manual_seed(0)
    model = narrow(FAMILIES["resnet18"], 2)
    model.calibrate(IMAGES, method="minmax")
    plain = model.calibration
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.calibrate(IMAGES, method="minmax")
    assert model.calibration == plain
    model.precision = "int8"
    with torch.inference_mode():
        y = model.forward_logits(IMAGES)
        model.aux_classifier = None
        assert torch.equal(model.forward_logits(IMAGES), y)


def test_distributions_that_ranges_are_chosen_from() -> None:
    # Fifty values in a million lie far out.
    values = calibrating._Values(0.0, 8.0, np.zeros(calibrating._BINS))
    quarter = calibrating._BINS // 4
    values.counts[:quarter] = 1e6 / quarter
    values.counts[-1] = 50
    assert calibrating._percentile(values, 99.99) == pytest.approx((0.0, 2.0), abs=0.01)
    assert calibrating._percentile(values, 99.999) == pytest.approx((0.0, 8.0), abs=0.01)
    # A bell, of which 256 levels of the whole range would be too coarse.
    values.counts[:] = np.exp(-0.5 * (np.linspace(0, 8, calibrating._BINS) / 0.25) ** 2) * 1e5
    values.counts[-1] = 50
    low, high = calibrating._entropy(values)
    assert low == 0.0
    assert high <= 2.0
    even = calibrating._Values(-1.0, 1.0, np.ones(calibrating._BINS))
    assert calibrating._entropy(even) == pytest.approx((-1.0, 1.0), abs=0.03)
    nothing = calibrating._Values(0.0, 0.0, np.zeros(calibrating._BINS))
    assert calibrating._entropy(nothing) == calibrating._percentile(nothing, 99.9) == (0.0, 0.0)


class TestWeights:
    def test_other_weights_are_refused_until_calibrated_again(self) -> None:
        model = small_wide()
        model.calibrate(IMAGES, method="minmax")
        model.precision = "int8"
        with torch.inference_mode():
            y = model.forward_logits(IMAGES)
            for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert again.calibration == model.calibration
                assert torch.equal(again.forward_logits(IMAGES), y)
            state = {k: v.clone() for k, v in model.state_dict().items()}
            changed = {k: v * 1.5 if k == "classifier.1.weight" else v for k, v in state.items()}
            model.load_state_dict(changed)
            with pytest.raises(CalibrationError, match=r"call model\.calibrate"):
                model.forward_logits(IMAGES)
            model.load_state_dict(state)
            assert torch.equal(model.forward_logits(IMAGES), y)
            model.load_state_dict(changed)
            model.calibrate(IMAGES, method="minmax")
            assert not torch.equal(model.forward_logits(IMAGES), y)

    def test_fingerprint(self) -> None:
        model = small()
        mark = fingerprint(model)
        assert mark == fingerprint(copy.deepcopy(model))
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        norm.num_batches_tracked.add_(1)
        assert fingerprint(model) == mark
        norm.running_mean.data.add_(1e-6)
        assert fingerprint(model) != mark


@pytest.fixture(scope="module")
def calibrated() -> nn.Module:
    model = small_wide()
    model.calibrate(IMAGES, method="minmax")
    return model


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("m.safetensors", None),
            ("m.safetensors", torch.float16),
            ("m.pth", torch.float16),
            ("state.pth", None),
        ],
    )
    def test_a_file_gives_the_calibration_back(self, calibrated, tmp_path, name, dtype) -> None:
        path = tmp_path / name
        if name == "state.pth":
            torch.save(calibrated.state_dict(), path)
        else:
            dlf.save_weights(calibrated, path, dtype=dtype)
        again = dlf.from_checkpoint(path).eval()
        assert again.precision == "fp32"
        known = calibrated.calibration
        assert again.calibration == replace(known, fingerprint=again.calibration.fingerprint)
        assert (again.calibration == known) == (dtype is None)
        with torch.inference_mode():
            y = again.forward_logits(IMAGES)
            again.precision = "int8"
            assert 0 < error(again.forward_logits(IMAGES), y) < 0.2
        into = copy.deepcopy(again)
        into.calibration = None
        dlf.load_weights(into, path)
        assert into.calibration == again.calibration

    def test_a_stale_calibration_stays_stale(self, calibrated, tmp_path) -> None:
        model = copy.deepcopy(calibrated)
        model.classifier[-1].weight.data += 1
        dlf.save_weights(model, tmp_path / "m.safetensors", dtype=torch.float16)
        again = dlf.from_checkpoint(tmp_path / "m.safetensors")
        with pytest.raises(CalibrationError, match="not those"):
            again.calibration.check(again)

    def test_a_model_without_one_has_none(self, tmp_path) -> None:
        dlf.save_weights(small(), tmp_path / "m.safetensors")
        assert dlf.from_checkpoint(tmp_path / "m.safetensors").calibration is None

    def test_a_checkpoint_that_is_hostile(self, calibrated) -> None:
        state = calibrated.state_dict()
        state._metadata[""]["deeplab_fast"]["calibration"]["ranges"]["x"] = [0, "1"]
        with pytest.raises(ValueError, match="range of x is no pair"):
            dlf.from_checkpoint(state)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ranges": [1, 2]}, "no mapping of at most"),
            ({"ranges": {str(i): [0, 1] for i in range(10_001)}}, "no mapping of at most"),
            ({"ranges": {"a": [0, math.nan]}}, "range of a is no pair"),
            ({"ranges": {"a": [0, math.inf]}}, "range of a is no pair"),
            ({"ranges": {"a": [1, 0]}}, "range of a is no pair"),
            ({"ranges": {"a": [0, 10**400]}}, "range of a is no pair"),
            ({"ranges": {"a": [0, 1, 2]}}, "range of a is no pair"),
            ({"ranges": {"a": [False, True]}}, "range of a is no pair"),
            ({"ranges": {"a" * 501: [0, 1]}}, "no short text"),
            ({"ranges": {3: [0, 1]}}, "no short text"),
            ({"method": 3}, "method or fingerprint"),
            ({"fingerprint": None}, "method or fingerprint"),
            ({"images": 0}, "number of images is 0"),
            ({"images": True}, "number of images is True"),
            ({"agreement": 1.5}, "agreement is 1.5"),
            ({"agreement": "all"}, "agreement is 'all'"),
        ],
    )
    def test_values_that_are_refused(self, calibrated, change, message) -> None:
        value = calibrated.calibration.as_plain()
        assert Calibration.from_plain(json.loads(json.dumps(value))) == calibrated.calibration
        with pytest.raises(CalibrationError, match=message):
            Calibration.from_plain({**value, **change})
        with pytest.raises(CalibrationError, match="no mapping"):
            Calibration.from_plain([value])


def test_the_embedded_model_keeps_its_labels(shared_data: Path) -> None:
    photos = {
        part: sorted((shared_data / "camvid" / part).glob("*.*")) for part in ("train", "val")
    }
    model = dlf.load("camvid")
    report = model.calibrate(photos["train"][::200], method="minmax")
    assert report.agreement >= 0.99
    # Photos that it was not calibrated on.
    others = photos["val"][::60]
    fp32, int8 = (model.predict(others, precision=name) for name in ("fp32", "int8"))
    same = np.mean([np.mean(a == b) for a, b in zip(fp32, int8, strict=True)])
    assert 0.99 <= same < 1
