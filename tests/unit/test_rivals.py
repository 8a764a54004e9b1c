"""Other libraries' runtimes as the benchmarks run them, and the gate for precisions below fp32."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# `pytest` alone, unlike `python -m pytest`, does not look for bench/ in the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import files, gate, measure, model_cases, photos, providers
from bench.costs import Cost
from bench.everything import registry
from bench.registry import FORWARD, Suite

SUITE = Suite("rivals", "cpu", torch.float32, seconds=0.0, rounds=(2, 2), copies=2)


class Tiny(nn.Module):
    """Two convolutions and an upsampling, with the output of a segmentation model."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish())
        self.classifier = nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(self.body(x))
        return {"out": F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)}


@dataclass(frozen=True, kw_only=True)
class TinyLabels(model_cases.ModelLabels):
    """Labels of a network that takes no time."""

    def plain_model(self) -> nn.Module:
        return Tiny(self.classes)

    convolutions: int = 2

    def cost(self, mode: str, itemsize: int) -> Cost:
        return Cost(1, 1, 1, self.convolutions)


CASE = TinyLabels(
    op="model_labels", shape="tiny", suites=(), backbone="mbv3", output_stride=16,
    n=1, height=24, width=32, classes=5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _scratch(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("DEEPLAB_FAST_BENCH_SCRATCH", str(tmp_path))


def installed(name: str) -> bool:
    return not registry.missing_reason(registry.provider(name), CASE, FORWARD, SUITE)


def test_labels_are_those_of_the_plain_model(tmp_path) -> None:
    every = ("openvino", "onnxruntime", "onnxruntime_int8", "openvino_int8")
    names = [name for name in every if installed(name)]
    if not names:
        pytest.skip("neither OpenVINO nor ONNX Runtime is installed")
    results = measure.measure(CASE, FORWARD, SUITE, [registry.provider(n) for n in names], seed=0)
    assert [(r.status, len(r.samples)) for r in results] == [("ok", 2)] * len(names), results
    for r in results:
        assert r.equal is not None
        equal, least = r.equal
        if r.precision == "fp32":
            # Of 768 pixels at most one whose two best logits are closer than rounding.
            assert equal >= 1 - 1 / 768
        else:
            # Rounding to 8 bits moves some labels: it was done.
            assert 0.9 < least <= equal < 1
        assert all(f"{package} " in r.note for package in r.provider.packages)
    # Each graph is made once; the exported one is what both libraries read.
    assert len(list(tmp_path.glob("*-fp32.onnx"))) == 1


def test_what_a_rival_lacks_is_told(monkeypatch) -> None:
    p = replace(registry.provider("openvino"), packages=("openvino", "no_such_package"))
    reason = registry.missing_reason(p, CASE, FORWARD, SUITE)
    assert "no_such_package" in reason and "rivals" in reason
    for name in ("openvino", "openvino_default", "onnxruntime_int8", "ours-predict-int8"):
        p = registry.provider(name)
        assert "CPU" in p.missing_reason(CASE, FORWARD, "cuda", torch.float32)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    for name, instructions in (
        ("autocast", "avx512_bf16"),
        ("ours-predict-bf16", "avx512_bf16"),
        ("ours-predict-int8", "AVX2"),
    ):
        reason = registry.missing_reason(registry.provider(name), CASE, FORWARD, SUITE)
        assert instructions in reason


def test_a_suite_leaves_rivals_to_the_one_of_rivals() -> None:
    rivals = {"openvino", "onnxruntime", "openvino_int8", "onnxruntime_int8", "openvino_default"}
    for suite in registry.SUITES.values():
        names = {p.name for p in registry.applicable(CASE, FORWARD, suite)}
        assert names & rivals == (rivals if suite.name == "rivals" else set())
        assert "ours-predict" in names
    named = registry.applicable(CASE, FORWARD, registry.SUITES["quick"], ["openvino"])
    assert [p.name for p in named] == ["openvino"]


def test_share_of_labels_that_an_error_of_the_logits_leaves() -> None:
    # Against a simulation: independent normal errors on logits of two classes.
    logits = torch.randn(1, 2, 200, 300, dtype=torch.float64)
    truth = gate.Truth([], [])
    truth.add(logits)
    rms = logits.square().mean().sqrt()
    off = (logits + 0.1 * rms * torch.randn_like(logits)).argmax(1)
    least = truth.least_equal(0.1)
    # About 3 % of 60,000 labels move, off by at most 4 deviations of a count.
    assert truth.equal([off]) == pytest.approx(least, abs=4 * (0.03 / 60000) ** 0.5)
    assert 0.95 < least < 0.98
    assert truth.equal([off[:, 1:]]) == 0.0


def test_labels_that_no_rounding_explains_disagree() -> None:
    class Swapped(nn.Module):
        """The right labels but for every other column, which has another's."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            labels = self.module(x).clone()
            labels[..., ::2] = labels.roll(16, -1)[..., ::2]
            return labels

    def build(case, mode, device, dtype, args):
        return providers.runnable(
            case, mode, args, Swapped(args.module), dtype, torch.contiguous_format
        )

    p = replace(registry.provider("onnxruntime_int8"), name="swapped", build=build, packages=())
    # As deep as a backbone: the distance of a wrong label's logit alone is then within the limit.
    deep = replace(CASE, convolutions=60)
    (result,) = measure.measure(deep, FORWARD, SUITE, [p], seed=0)
    assert result.errors["labels"][0] < result.errors["labels"][1]
    assert result.status == "disagrees" and "of them equal, below" in result.note


def test_the_embedded_model_is_judged_on_photos(monkeypatch) -> None:
    case = registry.case("model_labels/camvid-os16-360x480-b1")
    monkeypatch.setattr(photos, "_CAMVID", Path("nowhere"))
    for cached in (photos.source, photos.judged, photos.for_calibration):
        monkeypatch.setattr(photos, cached.__name__, cached.__wrapped__)
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    assert case.judged_on == "16 photos of packages"
    assert not set(photos.judged()) & set(photos.for_calibration())
    args = case.setup("cpu", torch.float32, seed=0, copies=1)
    (x,) = args.inputs[0]
    assert x.shape == (1, 3, 360, 480)
    assert not torch.equal(x, case.photo(photos.for_calibration(), 0))
    # Trained weights stay as they are, and are run by plain modules.
    state = case.own_model(args).state_dict()
    assert all(torch.equal(t, state[name]) for name, t in args.module.model.state_dict().items())
    assert args.module.model.fast is False


def test_the_folder_of_a_run_is_shared_with_its_children(monkeypatch, tmp_path) -> None:
    assert files.scratch() == tmp_path
    monkeypatch.delenv("DEEPLAB_FAST_BENCH_SCRATCH")
    made = files.scratch()
    assert made.is_dir() and files.scratch() == made
