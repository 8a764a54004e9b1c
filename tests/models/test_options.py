"""Output stride, multi-grid, rates and heads, beyond torchvision's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deeplab_fast as dlf
from deeplab_fast.testing import import_torchvision


def dilations(stage: nn.Sequential) -> list[int]:
    return [block.conv2.dilation[0] for block in stage]


def convolutions(model: nn.Module) -> list[tuple]:
    return [
        (name, m.stride, m.dilation, m.padding)
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    ]


@pytest.mark.parametrize(
    ("options", "layer3", "layer4"),
    [
        # torchvision: the first block keeps the dilation before it.
        ({"output_stride": 8}, [1, 2, 2, 2, 2, 2], [2, 4, 4]),
        ({"output_stride": 16}, [1] * 6, [1, 2, 2]),
        # The paper, section 3.2.1: unit rates times the rate of the block.
        ({"output_stride": 16, "multi_grid": (1, 2, 4)}, [1] * 6, [2, 4, 8]),
        ({"output_stride": 8, "multi_grid": (1, 2, 4)}, [1, 2, 2, 2, 2, 2], [4, 8, 16]),
        # segmentation-models-pytorch: no contraction.
        ({"output_stride": 8, "contract_dilation": False}, [2] * 6, [4] * 3),
        # torchvision's own argument: nothing dilated, and only the last stage.
        ({"replace_stride_with_dilation": (False, False, False)}, [1] * 6, [1] * 3),
        ({"replace_stride_with_dilation": (False, False, True)}, [1] * 6, [1, 2, 2]),
    ],
)
def test_dilation_of_the_backbone(options: dict, layer3: list[int], layer4: list[int]) -> None:
    model = dlf.deeplabv3_resnet50(**options)
    assert dilations(model.backbone.layer3) == layer3
    assert dilations(model.backbone.layer4) == layer4


@pytest.mark.parametrize(
    ("build", "strides"),
    [
        (dlf.deeplabv3_resnet18, (16, 8)),
        (dlf.deeplabv3_resnet50, (16, 8)),
        (lambda **o: dlf.deeplabv3_resnet50(multi_grid=(1, 2, 4), **o), (16, 8)),
        (lambda **o: dlf.deeplabv3_resnet50(head="deeplabv2", **o), (8, 16)),
        (dlf.deeplabv3_mobilenet_v3_large, (16, 8)),
        (dlf.deeplabv3_cascaded_resnet50, (16, 8)),
        (dlf.deeplabv3_mobilenet_v2_tf, (8, 16)),
    ],
    ids=["resnet18", "resnet50", "multi-grid", "deeplabv2", "mobilenetv3", "cascaded", "tf"],
)
def test_set_output_stride_equals_building_with_it(build, strides: tuple[int, int]) -> None:
    before, after = strides
    model = build(output_stride=before)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert model.set_output_stride(after) is model
    assert model.output_stride == after
    assert convolutions(model) == convolutions(build(output_stride=after))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.set_output_stride(before).output_stride == before
    assert convolutions(model) == convolutions(build(output_stride=before))


@pytest.mark.parametrize(
    "build",
    [
        dlf.deeplabv3_resnet18,
        dlf.deeplabv3_resnet50,
        lambda **o: dlf.deeplabv3_resnet50(multi_grid=(1, 2, 4), **o),
        dlf.deeplabv3_mobilenet_v3_large,
    ],
    ids=["resnet18", "resnet50", "multi-grid", "mobilenetv3"],
)
def test_the_map_at_8_contains_the_map_at_16(build) -> None:
    """Atrous consistency: every other feature at stride 8 is the feature at stride 16."""
    model = build(output_stride=16).double().eval()
    x = torch.randn(1, 3, 65, 97, dtype=torch.float64)
    with torch.inference_mode():
        at_16 = model.backbone(x)["out"]
        branch_16 = model.classifier[0].convs[1](at_16)
        model.set_output_stride(8)
        at_8 = model.backbone(x)["out"]
        branch_8 = model.classifier[0].convs[1](at_8)
    # The same sums in another blocking, in float64.
    torch.testing.assert_close(at_8[..., ::2, ::2], at_16, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(branch_8[..., ::2, ::2], branch_16, rtol=1e-9, atol=1e-9)


def test_output_stride_of_a_backbone_whose_stages_are_a_property() -> None:
    model = dlf.deeplabv3_resnet18(output_stride=8)
    expected = convolutions(dlf.deeplabv3_resnet18(output_stride=16))
    dilated = model.backbone.__dict__.pop("dilated")

    class Backbone(type(model.backbone)):
        dilated = property(
            lambda self: self.stages, lambda self, value: setattr(self, "stages", value)
        )

    model.backbone.stages = dilated
    model.backbone.__class__ = Backbone
    model.set_output_stride(16)
    assert convolutions(model) == expected


def test_rates_that_cannot_be_halved_change_nothing() -> None:
    model = dlf.deeplabv3_resnet18(atrous_rates=(3, 6))
    before = convolutions(model)
    with pytest.raises(ValueError, match=r"atrous rates \(3, 6\) at output stride 8"):
        model.set_output_stride(16)
    with pytest.raises(ValueError, match="output stride 8 or 16, got 32"):
        model.set_output_stride(32)
    assert convolutions(model) == before


def test_a_backbone_of_the_users_own() -> None:
    class Backbone(nn.Module):
        def forward(self, x):
            return {"out": nn.functional.avg_pool2d(x, 8)}

    model = dlf.DeepLabV3(Backbone(), nn.Conv2d(3, 4, 1)).eval()
    assert model(torch.randn(1, 3, 17, 25))["out"].shape == (1, 4, 17, 25)
    with pytest.raises(ValueError, match="fixed output stride"):
        model.set_output_stride(16)


def test_cascade_doubles_the_rate_of_every_block() -> None:
    """Figure 3 (b) with the multi-grid of table 4."""
    model = dlf.deeplabv3_cascaded_resnet50()
    rates = [dilations(model.backbone[f"layer{i}"]) for i in (4, 5, 6, 7)]
    assert rates == [[2, 4, 2], [4, 8, 4], [8, 16, 8], [16, 32, 16]]
    assert model.num_classes == 21
    with pytest.raises(TypeError, match="no option 'atrous_rates'"):
        dlf.deeplabv3_cascaded_resnet50(atrous_rates=(6, 12, 18))
    y = model.eval()(torch.randn(1, 3, 33, 65))["out"]
    assert y.shape == (1, 21, 33, 65)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"head": "paper"}, {"classifier.0.project.0.weight": (256, 1280, 1, 1)}),
        ({"head": "paper", "atrous_rates": ()}, {"classifier.1.weight": (7, 256, 1, 1)}),
        (
            {"head": "mmseg"},
            {
                "classifier.0.project.0.weight": (512, 2560, 3, 3),
                "classifier.2.weight": (7, 512, 1, 1),
            },
        ),
        ({"head": "deeplabv2"}, {"classifier.convs.3.weight": (7, 512, 3, 3)}),
        ({"aspp_channels": 48}, {"classifier.1.weight": (48, 48, 3, 3)}),
        ({"stem": "deep"}, {"backbone.conv1.6.weight": (64, 32, 3, 3)}),
    ],
    ids=["paper", "no-rates", "mmseg", "deeplabv2", "channels", "deep-stem"],
)
def test_heads_and_stems(options: dict, keys: dict) -> None:
    model = dlf.deeplabv3_resnet18(num_classes=7, **options).eval()
    state = model.state_dict()
    for key, shape in keys.items():
        assert tuple(state[key].shape) == shape
    x = torch.randn(2, 3, 35, 51)
    y = model(x)["out"]
    assert y.shape == (2, 7, 35, 51)
    assert model.num_classes == 7
    assert model.forward_logits(x).shape == (2, 7, 5, 7)


def test_deeplabv2_head_is_a_sum_of_biased_atrous_convolutions() -> None:
    from deeplab_fast.nn import DeepLabV2Head

    head = DeepLabV2Head(5, 3, (1, 2, 4)).double()
    for conv in head.convs:
        nn.init.normal_(conv.bias)
    x = torch.randn(2, 5, 9, 7, dtype=torch.float64)
    expected = sum(
        nn.functional.conv2d(x, c.weight, c.bias, padding=r, dilation=r)
        for c, r in zip(head.convs, (1, 2, 4), strict=True)
    )
    torch.testing.assert_close(head(x), expected, rtol=1e-12, atol=1e-12)


def test_dropout_is_where_it_is_set() -> None:
    model = dlf.deeplabv3_resnet18(dropout=0.25)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.25]


def test_align_corners_reaches_the_logits() -> None:
    torch.manual_seed(1)
    model = dlf.deeplabv3_resnet18(align_corners=True).eval()
    x = torch.randn(1, 3, 41, 57)
    with torch.inference_mode():
        low = model.forward_logits(x)
        expected = nn.functional.interpolate(
            low, size=(41, 57), mode="bilinear", align_corners=True
        )
        torch.testing.assert_close(model(x)["out"], expected, rtol=0, atol=0)


def test_config_builds_the_model_again() -> None:
    model = dlf.deeplabv3_resnet18(num_classes=4, head="paper", output_stride=16)
    model.set_output_stride(8)
    name, options = model.config
    again = dlf.get_model(name, **options)
    assert convolutions(again) == convolutions(model)
    again.load_state_dict(model.state_dict(), strict=True)


def test_models_by_name() -> None:
    # Other tests register models of their own.
    names = dlf.list_models(module=dlf.models)
    assert "deeplabv3_resnet50" in names and "deeplabv3_mobilenet_v2_tf" in names
    for name in names:
        assert getattr(dlf.models, name).__name__ == name
        assert getattr(dlf.models, name).__doc__
    with pytest.raises(ValueError, match="no model is named 'deeplabv4'; there are:"):
        dlf.get_model("deeplabv4")


def test_names_in_any_case_as_torchvision_takes_them() -> None:
    model = dlf.get_model("DeepLabV3_ResNet18", num_classes=2)
    assert model.config[0] == "deeplabv3_resnet18"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "*mobilenet*"}, ["deeplabv3_mobilenet_v2_tf", "deeplabv3_mobilenet_v3_large"]),
        (
            {"include": ["deeplabv3_resnet1*", "fregu856_*34"], "exclude": "*152"},
            ["deeplabv3_resnet101", "deeplabv3_resnet18", "fregu856_resnet34"],
        ),
        ({"include": ("*resnet34", "*resnet18"), "exclude": ["deeplabv3_*18", "f*"]},
         ["deeplabv3_resnet34"]),
        ({"include": "none*"}, []),
    ],
    ids=["one-pattern", "patterns-and-exclude", "excludes", "nothing"],
)  # fmt: skip
def test_list_models_filters_as_torchvision_does(options: dict, expected: list[str]) -> None:
    assert dlf.list_models(module=dlf.models, **options) == expected
    assert dlf.list_models(**options)[: len(expected)] == expected


def test_weights_of_a_builder_are_torchvisions() -> None:
    torchvision = import_torchvision()
    segmentation = torchvision.models.segmentation
    enum = segmentation.DeepLabV3_ResNet50_Weights
    assert dlf.get_model_weights(dlf.deeplabv3_resnet50) is enum
    assert dlf.get_model_weights("DeepLabV3_ResNet50") is enum
    for name in dlf.list_models(module=dlf.models):
        theirs = getattr(segmentation, name, None)
        if theirs is None:
            with pytest.raises(ValueError, match=r"no weights are published .* some for: deeplab"):
                dlf.get_model_weights(name)
        else:
            expected = torchvision.models.get_model_weights(theirs)
            assert dlf.get_model_weights(name) is expected
    with pytest.raises(ValueError, match="no model is named 'deeplabv4'"):
        dlf.get_model_weights("deeplabv4")


def test_tf_mobilenet_checks_its_arguments() -> None:
    for options, text in (
        ({"norm": "group"}, "norm must be one of"),
        ({"width": 0}, "width must be above 0"),
        ({"output_stride": 32}, "output stride 8 or 16"),
    ):
        with pytest.raises(ValueError, match=text):
            dlf.deeplabv3_mobilenet_v2_tf(**options)


def test_tf_same_padding_of_even_and_odd_sizes() -> None:
    """ceil(size / stride) outputs; at stride 2 an even size is padded below and right only."""
    from deeplab_fast.models.mobilenetv2 import SamePadConv2d

    conv = SamePadConv2d(1, 1, 3, stride=2, bias=False)
    nn.init.ones_(conv.weight)
    odd, even = torch.arange(5.0), torch.arange(4.0)
    # Windows over the padded line, times three equal rows of which one is padding at each edge.
    assert conv(odd.expand(1, 1, 5, 5))[0, 0, 1].tolist() == [3.0, 18.0, 21.0]
    assert conv(even.expand(1, 1, 4, 4))[0, 0, 0].tolist() == [9.0, 15.0]


def test_deepcopy_is_independent() -> None:
    model = dlf.deeplabv3_resnet18().eval()
    twin = copy.deepcopy(model).set_output_stride(16)
    assert (model.output_stride, twin.output_stride) == (8, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"num_classes": 10**9}, "num_classes must be at most 65535", id="classes"),
        pytest.param({"num_classes": "3"}, "num_classes must be integers", id="text"),
        pytest.param({"num_classes": True}, "num_classes must be integers", id="true"),
        pytest.param({"aspp_channels": 10**9}, "aspp_channels must be at most 4096", id="channels"),
        pytest.param({"aspp_channels": 10**5000}, "too long to show", id="digits"),
        pytest.param({"atrous_rates": (2**31,)}, "at most 2147483647", id="rate"),
        pytest.param({"atrous_rates": range(1, 100)}, "at most 32 rates, got 99", id="branches"),
        pytest.param({"atrous_rates": "123"}, "must be a list of integers", id="text of rates"),
        pytest.param({"atrous_rates": 6}, "must be a list of integers", id="one rate"),
        pytest.param({"dropout": float("nan")}, r"dropout must be in \[0, 1\)", id="nan"),
        pytest.param({"multi_grid": (1, 2, 10**9)}, "rates must be at most 4096", id="grid"),
    ],
)
def test_absurd_values_are_refused_before_anything_is_allocated(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        dlf.deeplabv3_resnet50(**options)
    assert len(str(caught.value)) < 300
