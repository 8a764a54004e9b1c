"""The drop-in promise: torchvision's numbers, keys, arguments and errors."""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

import deeplab_fast as dlf
from deeplab_fast.testing import import_torchvision, torchvision_deeplabv3

torchvision = import_torchvision()
segmentation = torchvision.models.segmentation

PUBLISHED = ("resnet50", "resnet101", "mobilenet_v3_large")
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v3_large")

# The bound. The operations and their order are the same, so that the difference seen is 0
# or the rounding of another blocking of the same sums.
RELATIVE = 1e-5


def ours(backbone: str, **options):
    return getattr(dlf, f"deeplabv3_{backbone}")(**options)


def assert_same_logits(y: dict, expected: dict) -> None:
    assert list(y) == list(expected)
    for key, value in expected.items():
        error = (y[key] - value).abs().max() / value.abs().max()
        assert error <= RELATIVE, f"{key}: {error:.2e} of the largest logit"


@pytest.fixture(params=BACKBONES)
def pair(request):
    """Ours with torchvision's weights, and torchvision's, with trained-looking batch norm."""
    theirs = torchvision_deeplabv3(request.param, aux_loss=True).eval()
    for m in theirs.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(m.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
    model = ours(request.param, aux_loss=True).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model, theirs


def test_logits_equal_torchvision(pair, request) -> None:
    model, theirs = pair
    shapes = [
        (1, 321, 321),  # the paper's small crop: maps of odd size
        (1, 257, 513),  # not square
        (2, 97, 161),  # a batch
    ]
    if request.node.callspec.params["pair"] in ("resnet34", "resnet101", "resnet152"):
        # More of the blocks that ResNet-18 and 50 run at the larger sizes.
        shapes = shapes[-1:]
    for n, h, w in shapes:
        x = torch.randn(n, 3, h, w)
        with torch.inference_mode():
            expected = theirs(x)
            assert model.fast_reasons(x) == []
            assert_same_logits(model(x), expected)
    with dlf.use_backend("reference"), torch.inference_mode():
        assert_same_logits(model(x), expected)
    assert isinstance(model(x), OrderedDict)


def test_state_dict_loads_both_ways(pair) -> None:
    model, theirs = pair
    assert list(model.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(model.state_dict(), strict=True)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("backbone", "parameters", "keys"),
    [
        ("resnet50", 42_004_074, 370),
        ("resnet101", 60_996_202, 676),
        ("mobilenet_v3_large", 11_029_328, 360),
    ],
)
def test_published_parameter_counts(backbone: str, parameters: int, keys: int) -> None:
    model = ours(backbone, aux_loss=True)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == keys


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_one_seed_gives_torchvisions_weights(backbone: str) -> None:
    torch.manual_seed(7)
    expected = torchvision_deeplabv3(backbone, 5, aux_loss=True).state_dict()
    torch.manual_seed(7)
    state = ours(backbone, num_classes=5, aux_loss=True).state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_torchvisions_own_expected_output(shared_data: Path) -> None:
    path = shared_data / "torchvision_expect" / "ModelTester.test_deeplabv3_resnet50_expect.pkl"
    expected = torch.load(path, weights_only=True)
    torch.manual_seed(0)
    model = dlf.deeplabv3_resnet50(num_classes=10, aux_loss=False).eval()
    # 32 x 32 gives a 4 x 4 map: every off-centre tap of the atrous branches is outside it.
    x = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(x)["out"], expected, rtol=1e-5, atol=1e-5)


def test_defaults_are_torchvisions() -> None:
    model = dlf.deeplabv3_mobilenet_v3_large()
    assert (model.num_classes, model.output_stride, model.atrous_rates) == (21, 16, (12, 24, 36))
    assert model.aux_classifier is None
    assert model.training
    model = dlf.deeplabv3_resnet18()
    assert (model.output_stride, model.atrous_rates) == (8, (12, 24, 36))


def test_training_with_one_image_raises_torchvisions_error() -> None:
    x = torch.randn(1, 3, 33, 33)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        dlf.deeplabv3_resnet18()(x)
    model = dlf.deeplabv3_resnet18(image_pooling_norm="running")
    model(x)["out"].mean().backward()
    assert model.classifier[0].convs[-1][1].weight.grad.abs().max() > 0


def test_image_pooling_norm_is_batch_norm_otherwise() -> None:
    from deeplab_fast.nn import SingleValueBatchNorm2d

    for options in ({}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}):
        norm, plain = SingleValueBatchNorm2d(3, **options), torch.nn.BatchNorm2d(3, **options)
        for training in (True, False, True):
            x = torch.randn(2, 3, 4, 5)
            norm.train(training)
            plain.train(training)
            torch.testing.assert_close(norm(x), plain(x), rtol=0, atol=0)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(norm.state_dict()[key], value, rtol=0, atol=0)


def test_single_value_leaves_running_statistics_alone() -> None:
    from deeplab_fast.nn import SingleValueBatchNorm2d

    norm = SingleValueBatchNorm2d(3)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    y = norm(torch.full((1, 3, 1, 1), 2.0))
    # Running mean 0 and variance 1: the value itself, but for eps.
    torch.testing.assert_close(y, torch.full((1, 3, 1, 1), 2.0 / (1 + 1e-5) ** 0.5))
    assert all(torch.equal(v, norm.state_dict()[k]) for k, v in before.items())


class TestArguments:
    """torchvision's checks of its arguments, word for word where it has a word."""

    def test_weights_and_other_num_classes(self) -> None:
        with pytest.raises(
            ValueError, match="The parameter 'num_classes' expected value 21 but got 5 instead"
        ):
            dlf.deeplabv3_resnet50(weights="COCO_WITH_VOC_LABELS_V1", num_classes=5)

    def test_weights_and_no_aux_loss(self) -> None:
        with pytest.raises(
            ValueError, match="The parameter 'aux_loss' expected value True but got False instead"
        ):
            dlf.deeplabv3_resnet50(weights="DEFAULT", aux_loss=False)

    def test_weights_of_another_model(self) -> None:
        wrong = segmentation.DeepLabV3_ResNet101_Weights.DEFAULT
        with pytest.raises(TypeError, match="Invalid Weight class provided; expected"):
            dlf.deeplabv3_resnet50(weights=wrong)

    def test_unknown_name_lists_what_there_is(self) -> None:
        with pytest.raises(ValueError, match="COCO_WITH_VOC_LABELS_V1"):
            dlf.deeplabv3_resnet50(weights="IMAGENET")

    def test_no_published_weights(self) -> None:
        with pytest.raises(ValueError, match="No weights available for model deeplabv3_resnet18"):
            dlf.deeplabv3_resnet18(weights="DEFAULT")

    def test_published_weights_are_torchvisions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entry = segmentation.DeepLabV3_MobileNet_V3_Large_Weights
        state = torchvision_deeplabv3("mobilenet_v3_large", aux_loss=True).state_dict()
        asked = {}

        def get_state_dict(self, *args, **kwargs):
            asked.update(kwargs)
            return OrderedDict(state)

        monkeypatch.setattr(entry, "get_state_dict", get_state_dict)
        for weights in (entry.DEFAULT, "DEFAULT", "COCO_WITH_VOC_LABELS_V1"):
            model = dlf.deeplabv3_mobilenet_v3_large(weights=weights, progress=False)
            assert asked == {"progress": False, "check_hash": True}
            assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
            assert model.classes[15] == "person"

    def test_weights_backbone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entry = torchvision.models.ResNet18_Weights
        state = torchvision.models.resnet18(weights=None).state_dict()
        monkeypatch.setattr(entry, "get_state_dict", lambda self, *a, **k: OrderedDict(state))
        model = dlf.deeplabv3_resnet18(weights_backbone="IMAGENET1K_V1")
        loaded = model.backbone.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in loaded.items())

    def test_weights_without_torchvision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchvision.models.segmentation", None)
        with pytest.raises(ImportError, match="Install torchvision, or pass the path"):
            dlf.deeplabv3_resnet50(weights="DEFAULT")

    def test_positional_arguments_warn(self) -> None:
        with pytest.warns(
            UserWarning, match="'weights', 'progress' and 'num_classes' as positional"
        ):
            model = dlf.deeplabv3_resnet18(None, True, 5)
        assert model.num_classes == 5
        with pytest.raises(TypeError, match="at most 5 positional"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dlf.deeplabv3_resnet18(None, True, 5, None, None, 8)

    def test_pretrained_warns(self) -> None:
        with pytest.warns(UserWarning, match="deprecated since 0.13"):
            dlf.deeplabv3_resnet18(pretrained=False, pretrained_backbone=False)

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"output_strides": 16}, TypeError, "no option 'output_strides'; there are: weights"),
            ({"output_stride": 4}, ValueError, "output stride 8 or 16, got 4"),
            ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
            ({"head": "paspp"}, ValueError, "head must be one of"),
            ({"stem": "wide"}, ValueError, "stem must be one of"),
            ({"atrous_rates": (0, 1)}, ValueError, "atrous_rates must be at least 1"),
            ({"multi_grid": (1, 2)}, ValueError, "one unit rate for each of the 3 blocks"),
            ({"multi_grid": (1, 2, 0)}, ValueError, "multi_grid rates must be at least 1"),
            ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
            ({"aspp_channels": 0}, ValueError, "aspp_channels must be at least 1, got 0"),
            ({"image_pooling_norm": "group"}, ValueError, "image_pooling_norm must be one of"),
            (
                {"output_stride": 8, "replace_stride_with_dilation": (False, True, True)},
                ValueError,
                "give one of them",
            ),
            ({"replace_stride_with_dilation": (True, True)}, ValueError, "3-element tuple"),
            ({"head": "deeplabv2", "dropout": 0.1}, ValueError, "'deeplabv2' has no dropout"),
        ],
    )
    def test_options_are_checked(self, options: dict, error: type, text: str) -> None:
        with pytest.raises(error, match=text):
            dlf.deeplabv3_resnet50(**options)
