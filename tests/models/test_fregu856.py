"""fregu856's models against an independent statement of his modules and key names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast.data import Preprocess
from deeplab_fast.models import fregu856, get_model, list_models
from deeplab_fast.weights import CheckpointError, from_checkpoint, inspect_weights, load_weights

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
# Each case is the smallest of its kind: both strides of the basic blocks, the bottleneck.
CASES = [(18, 8), (18, 16), (34, 8), (50, 16)]
IDS = [f"resnet{depth}-os{stride}" for depth, stride in CASES]


class Block(nn.Module):
    """His BasicBlock and Bottleneck: every 3x3 of the block is dilated."""

    def __init__(self, cin: int, width: int, stride: int, dilation: int, bottleneck: bool) -> None:
        super().__init__()
        cout = width * 4 if bottleneck else width
        if bottleneck:
            self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
            self.conv3 = nn.Conv2d(width, cout, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(cout)
        else:
            self.conv1 = nn.Conv2d(cin, width, 3, stride, dilation, dilation, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.downsample = nn.Sequential()
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(
                nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout)
            )
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + self.downsample(x))


def stage(
    cin: int, width: int, count: int, stride: int, dilation: int, deep: bool
) -> nn.Sequential:
    blocks = []
    for i in range(count):
        blocks.append(Block(cin, width, stride if i == 0 else 1, dilation, deep))
        cin = width * 4 if deep else width
    return nn.Sequential(*blocks)


class Net(nn.Module):
    """resnet.resnet: torchvision's first children; layer4, layer5 and the ASPP: his own."""

    def __init__(self, depth: int, output_stride: int, num_classes: int = 20) -> None:
        super().__init__()
        deep = depth >= 50
        e = 4 if deep else 1
        n = BLOCKS[depth]
        children = [
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            stage(64, 64, n[0], 1, 1, deep),
            stage(64 * e, 128, n[1], 2, 1, deep),
        ]
        self.resnet = nn.Module()
        if output_stride == 16:
            children.append(stage(128 * e, 256, n[2], 2, 1, deep))
        self.resnet.resnet = nn.Sequential(*children)
        if output_stride == 8:
            self.resnet.layer4 = stage(128, 256, n[2], 1, 2, deep)
        self.resnet.layer5 = stage(256 * e, 512, n[3], 1, 32 // output_stride, deep)
        self.aspp = aspp = nn.Module()
        cin = 512 * e
        aspp.conv_1x1_1 = nn.Conv2d(cin, 256, 1)
        aspp.bn_conv_1x1_1 = nn.BatchNorm2d(256)
        for i, rate in enumerate((6, 12, 18), 1):
            conv = nn.Conv2d(cin, 256, 3, padding=rate, dilation=rate)
            aspp.add_module(f"conv_3x3_{i}", conv)
            aspp.add_module(f"bn_conv_3x3_{i}", nn.BatchNorm2d(256))
        aspp.conv_1x1_2 = nn.Conv2d(cin, 256, 1)
        aspp.bn_conv_1x1_2 = nn.BatchNorm2d(256)
        aspp.conv_1x1_3 = nn.Conv2d(1280, 256, 1)
        aspp.bn_conv_1x1_3 = nn.BatchNorm2d(256)
        aspp.conv_1x1_4 = nn.Conv2d(256, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.resnet.resnet(x)
        if hasattr(self.resnet, "layer4"):
            y = self.resnet.layer4(y)
        y = self.resnet.layer5(y)
        a = self.aspp
        branches = [F.relu(a.bn_conv_1x1_1(a.conv_1x1_1(y)))]
        for i in (1, 2, 3):
            conv, bn = getattr(a, f"conv_3x3_{i}"), getattr(a, f"bn_conv_3x3_{i}")
            branches.append(F.relu(bn(conv(y))))
        pooled = F.relu(a.bn_conv_1x1_2(a.conv_1x1_2(F.adaptive_avg_pool2d(y, 1))))
        branches.append(pooled.expand(-1, -1, *y.shape[-2:]))
        y = F.relu(a.bn_conv_1x1_3(a.conv_1x1_3(torch.cat(branches, 1))))
        return F.interpolate(a.conv_1x1_4(y), size=x.shape[-2:], mode="bilinear")


def trained(net: nn.Module) -> nn.Module:
    """Statistics and affine values of batch norm that a swap of two tensors would show."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.2, 0.2)
    return net.eval()


@pytest.mark.parametrize(("depth", "output_stride"), CASES, ids=IDS)
def test_numbers_of_the_original(depth: int, output_stride: int) -> None:
    theirs = trained(Net(depth, output_stride))
    ours = get_model(f"fregu856_resnet{depth}", output_stride=output_stride).eval()
    report = load_weights(ours, theirs.state_dict())
    assert set(report.loaded) == set(ours.state_dict())
    assert not (report.missing or report.unexpected or report.reset or report.ignored)
    # Non-square, and no multiple of the stride.
    x = torch.rand(2, 3, 65, 97)
    with torch.inference_mode():
        expected, out = theirs(x), ours(x)
    assert list(out) == ["out"]
    # The same operations in the same order, so fp32 rounding of at most a few sums differs.
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(out["out"], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("depth", "output_stride"), CASES, ids=IDS)
def test_the_checkpoint_tells_depth_stride_and_classes(depth: int, output_stride: int) -> None:
    info = inspect_weights(Net(depth, output_stride, num_classes=7).state_dict())
    assert (info.layout, info.model) == ("fregu856", f"fregu856_resnet{depth}")
    assert (info.num_classes, info.options) == (7, {"output_stride": output_stride})
    assert not info.aux


def test_from_a_file_of_its_time(tmp_path: Path) -> None:
    """PyTorch 0.4.0: no zip container, no num_batches_tracked."""
    state = Net(18, 16, num_classes=5).state_dict()
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    file = tmp_path / "model_epoch_580.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    for model in (
        from_checkpoint(file),
        fregu856.fregu856_resnet18(output_stride=16, num_classes=5, weights=file),
    ):
        assert model.output_stride == 16
        assert torch.equal(model.classifier[1].weight, state["aspp.conv_1x1_4.weight"])


def test_weights_of_the_other_stride_fit_and_warn() -> None:
    ours = fregu856.fregu856_resnet18(output_stride=8)
    with pytest.warns(UserWarning, match=r"output_stride=16 \(the model has 8\); build it so: "):
        assert load_weights(ours, Net(18, 16).state_dict()).loaded


def test_torchvision_form_is_refused_with_the_builder_that_fits() -> None:
    model = get_model("deeplabv3_resnet18", num_classes=20, head="paper", output_stride=16)
    with pytest.raises(CheckpointError) as error:
        load_weights(model, Net(18, 16).state_dict())
    message = str(error.value)
    assert "6 unexpected: aspp.conv_1x1_1.bias" in message
    assert "deeplab_fast.fregu856_resnet18(num_classes=20, output_stride=16)" in message


def test_all_five_are_listed_and_have_their_strides() -> None:
    names = [f"fregu856_resnet{depth}" for depth in (18, 34, 50, 101, 152)]
    assert set(names) <= set(list_models())
    with pytest.raises(ValueError, match="fregu856_resnet50 has output stride 16, got 8"):
        fregu856.fregu856_resnet50(output_stride=8)
    with pytest.raises(ValueError, match="output stride 8 or 16, got 32"):
        fregu856.fregu856_resnet34(output_stride=32)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        fregu856.fregu856_resnet18(num_classes=0)


def test_defaults_of_the_original() -> None:
    model = fregu856.fregu856_resnet18()
    assert (model.output_stride, model.num_classes, model.align_corners) == (8, 20, False)
    # The paper doubles the rates at output stride 8, he does not.
    assert model.atrous_rates == (6, 12, 18)
    assert model.classes[:2] == ("road", "sidewalk") and model.classes[19] == "void"
    assert len(model.palette) == 20
    assert fregu856.fregu856_resnet18(num_classes=3).classes is None


def test_preprocessing_feeds_bgr() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    model = fregu856.fregu856_resnet18()
    # His scripts: cv2.imread (B, G, R), then the means that belong to R, G, B.
    pixels = photo[..., ::-1].astype(np.float32) / 255
    expected = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    tensor = model.preprocess(photo)[0].permute(1, 2, 0).numpy()
    # Two roundings of values below 3.
    np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-6)
    assert isinstance(model.preprocess, Preprocess)


def test_gradients_reach_the_biases() -> None:
    model = fregu856.fregu856_resnet18().train()
    model(torch.rand(2, 3, 33, 33))["out"].square().mean().backward()
    biases = [p for name, p in model.classifier.named_parameters() if name.endswith(".bias")]
    assert all(p.grad is not None for p in biases)
