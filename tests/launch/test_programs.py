"""Every launch that whole models make with this package's kernels, at the sizes of photos."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from typing import Any

import pytest
import torch

from bench.launch_stub import Launches, network
from deeplab_fast import get_model

pytestmark = pytest.mark.launch

# N, H, W.
IMAGES = {
    # Too few pixels for whole tiles of the ASPP, whose parts are summed; one shift.
    "one photo": (1, 520, 520),
    # Whole tiles; a shift for each image in the projection.
    "a batch": (16, 520, 520),
    "a street": (1, 1024, 2048),
    # 2^31 bytes in the map that the ASPP reads.
    "streets": (16, 1024, 2048),
    # No size of a map is a multiple of 8; parts as well.
    "odd": (3, 513, 385),
}
# Of ResNet-50: 1x1 convolutions of the blocks, their shortcuts, the projection, the classifier; the
# stem and all other convolutions leave the pass behind cuDNN's.
OF_RESNET = {
    "fold_filters_kernel": 1,
    "pointwise_kernel": 2 * 16 + 4 + 2,
    "bn_act_kernel": 1 + 16 + 1,
    "aspp_branches_kernel": 1,
    "image_shift_kernel": 1,
}


@cache
def model(name: str, weights: torch.dtype) -> Any:
    with torch.device("meta"):
        return get_model(name, output_stride=8, aux_loss=False).eval().to(weights)


def call(name: str, weights: torch.dtype, maps: torch.dtype, images: tuple[int, int, int]) -> None:
    """A call of a model up to its logits, as it runs on a GPU."""
    n, height, width = images
    y = network(model(name, weights), maps, (n, 3, height, width))["out"]
    assert y.dtype == maps and y.shape[2:] == (-(-height // 8), -(-width // 8))


def twice(launches: Launches, name: str, *given: Any) -> Counter[str]:
    """How often each kernel is launched; the second call compiles nothing new."""
    made = launches.of(name, partial(call, *given))
    assert launches.of(name, partial(call, *given)) == made
    return Counter(kernel for kernel, _ in made)


@pytest.mark.parametrize("images", IMAGES)
def test_resnet(images: str, launches: Launches) -> None:
    low = torch.bfloat16
    made = twice(launches, images, "deeplabv3_resnet50", low, low, IMAGES[images])
    parts = made.pop("aspp_sum_kernel", 0)
    assert made == OF_RESNET and parts == (images in ("one photo", "odd"))


@pytest.mark.parametrize(
    ("weights", "maps"),
    [
        pytest.param(torch.float32, torch.bfloat16, id="autocast"),
        pytest.param(torch.float16, torch.float16, id="fp16"),
        pytest.param(torch.float32, torch.float32, id="fp32"),
    ],
)
def test_dtypes(weights: torch.dtype, maps: torch.dtype, launches: Launches) -> None:
    made = twice(launches, "dtypes", "deeplabv3_resnet50", weights, maps, IMAGES["a batch"])
    made.pop("aspp_sum_kernel", 0)
    assert made == OF_RESNET


@pytest.mark.parametrize("gpu", ["A100", "RTX 3090", "B200"], indirect=True)
def test_other_gpus(launches: Launches) -> None:
    low = torch.bfloat16
    made = twice(launches, "other", "deeplabv3_resnet50", low, low, IMAGES["one photo"])
    made.pop("aspp_sum_kernel", 0)
    assert made == OF_RESNET


def test_mobilenet(launches: Launches) -> None:
    """Channels that no tile divides, activations that no 1x1 kernel has, vectors of its gates."""
    low = torch.bfloat16
    made = twice(
        launches, "mobilenet", "deeplabv3_mobilenet_v3_large", low, low, IMAGES["one photo"]
    )
    for kernel in ("fold_filters_kernel", "aspp_branches_kernel", "image_shift_kernel"):
        assert made[kernel] == 1
    assert made["pointwise_kernel"] and made["bn_act_kernel"]
