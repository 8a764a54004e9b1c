"""A saved model comes back as it was, with what its user set and exchanged, or is not saved."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast.data import Preprocess, PreprocessBGR
from deeplab_fast.engine.batch_norm import freeze_batch_norm
from deeplab_fast.nn import DeepLabHead, SingleValueBatchNorm2d
from deeplab_fast.testing import import_torchvision
from deeplab_fast.weights import (
    CheckpointError,
    from_checkpoint,
    inspect_weights,
    load_weights,
    model_metadata,
    save_weights,
)

pytest.importorskip("safetensors")


@functools.cache
def drawn(name: str, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    model = dlf.get_model(name, **dict(options))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return model


def built(name: str = "deeplabv3_resnet18", **options: Any) -> nn.Module:
    if name == "deeplabv3_resnet18":
        options = {"num_classes": 3, "aspp_channels": 8, **options}
    return copy.deepcopy(drawn(name, tuple(options.items())))


def small(**options: Any) -> nn.Module:
    return built("deeplabv3_mobilenet_v2_tf", num_classes=3, width=0.25, aspp_channels=8, **options)


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """By the modules themselves, so that equal modules give equal bits."""
    model.eval().fast = False
    with torch.inference_mode():
        return model(x)["out"]


def values(module: nn.Module) -> dict[str, Any]:
    return {
        k: v
        for k, v in vars(module).items()
        if not k.startswith(("_", "config", "aux_classifier"))
        and isinstance(v, (bool, int, float, str, tuple, dict, type(None)))
    }


def same_model(a: nn.Module, b: nn.Module, channels: int = 3) -> None:
    """The same bits in eval mode, and the same values of what acts in training only."""
    x = torch.randn(1, channels, 41, 57)
    torch.testing.assert_close(plain(a, x), plain(b, x), rtol=0, atol=0)
    described = [
        [(name, type(m).__name__, values(m)) for name, m in model.named_modules()]
        for model in (a, b)
    ]
    assert described[0] == described[1]
    assert {k: v.shape for k, v in a.state_dict().items()} == {
        k: v.shape for k, v in b.state_dict().items()
    }


def through_safetensors(model: nn.Module, folder: Path) -> Any:
    return save_weights(model, folder / "w.safetensors")


def through_pth(model: nn.Module, folder: Path) -> Any:
    return save_weights(model, folder / "w.pth")


def through_torch_save(model: nn.Module, folder: Path) -> Any:
    torch.save(model.state_dict(), folder / "w.pth")
    return folder / "w.pth"


def through_training_checkpoint(model: nn.Module, folder: Path) -> Any:
    wrapped = nn.DataParallel(model)
    torch.save({"model": wrapped.state_dict(), "epoch": 3}, folder / "w.pth")
    return folder / "w.pth"


def through_state_dict(model: nn.Module, folder: Path) -> Any:
    return model.state_dict()


WAYS = [
    through_safetensors,
    through_pth,
    through_torch_save,
    through_training_checkpoint,
    through_state_dict,
]


def back(way: Callable[..., Any], model: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return from_checkpoint(way(model, folder))


def everything(model: nn.Module) -> None:
    model.align_corners = not model.align_corners
    model.backbone.Conv.bn.eps = 0.1
    model.backbone.Conv.bn.momentum = None
    model.backbone.expanded_conv_3.depthwise.conv.dilation = (2, 2)
    model.classifier[0].project[2] = nn.SiLU()
    model.classifier[1] = nn.Conv2d(8, 5, 3, padding=1, padding_mode="reflect", bias=False)


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_of_saving(way, tmp_path: Path) -> None:
    model = small()
    before = plain(model, torch.ones(1, 3, 33, 33))
    everything(model)
    assert plain(model, torch.ones(1, 3, 33, 33)).shape != before.shape
    again = back(way, model, tmp_path)
    same_model(model, again)
    assert again.backbone.Conv.bn.momentum is None


def set_on(path: str, **values: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        module = model.get_submodule(path)
        for name, value in values.items():
            assert getattr(module, name) != value
            setattr(module, name, value)

    return change


def exchange(path: str, make: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.set_submodule(path, make())

    return change


def grouped() -> nn.Module:
    return nn.Conv2d(128, 128, 3, padding=1, groups=4, bias=False)


CHANGES = {
    "align_corners": set_on("", align_corners=True),
    "eps": set_on("backbone.bn1", eps=0.1),
    "eps-of-all": lambda m: [
        setattr(b, "eps", 0.01) for b in m.modules() if isinstance(b, nn.BatchNorm2d)
    ],
    "momentum": set_on("classifier.2", momentum=0.003),
    "dropout-p": set_on("classifier.0.project.3", p=0.9),
    "dilation": set_on("backbone.layer2.1.conv2", dilation=(2, 2), padding=(2, 2)),
    "dilation-as-int": set_on("backbone.layer2.1.conv1", dilation=3, padding=3),
    "stride": set_on("backbone.maxpool", stride=3),
    "padding-mode": set_on("backbone.conv1", padding_mode="circular"),
    "stale-padding-of-a-mode": set_on(
        "backbone.layer1.0.conv1", padding_mode="replicate", padding=(4, 4)
    ),
    "groups": exchange("backbone.layer2.1.conv2", grouped),
    "activation": exchange("backbone.layer1.0.relu", lambda: nn.LeakyReLU(0.3)),
    "identity": exchange("backbone.maxpool", nn.Identity),
    "group-norm": exchange("classifier.2", lambda: nn.GroupNorm(4, 8, eps=0.1)),
    "norm-without-statistics": exchange(
        "classifier.2", lambda: nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "norm-of-one-value": exchange("classifier.0.convs.4.2", lambda: SingleValueBatchNorm2d(8)),
    "classes": exchange("classifier.4", lambda: nn.Conv2d(8, 7, 1)),
    "last-without-bias": exchange("classifier.4", lambda: nn.Conv2d(8, 7, 1, bias=False)),
    "last-3x3": exchange("classifier.4", lambda: nn.Conv2d(8, 3, 3, padding="same")),
    "last-in-a-sequence": exchange(
        "classifier.4", lambda: nn.Sequential(nn.Dropout(0.2), nn.Conv2d(8, 4, 1))
    ),
    "head": exchange("classifier", lambda: DeepLabHead(512, 6, (2, 4), 16)),
    "more-in-a-sequence": lambda m: m.classifier.append(nn.Softmax(dim=1)),
    "less-in-a-sequence": lambda m: m.classifier.__delitem__(3),
    "added-downsample": lambda m: setattr(
        m.backbone.layer1[0], "downsample", nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU())
    ),
    "output-stride": lambda m: m.set_output_stride(16),
    "backbone-only-stride": lambda m: m.backbone.set_output_stride(16),
    "backbone-set-dilated": lambda m: m.backbone.set_dilated((False, False, False)),
    "atrous-rate": set_on("classifier.0.convs.2.0", dilation=(5, 5), padding=(5, 5)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_was_set_or_exchanged_comes_back(change, tmp_path: Path) -> None:
    model = built()
    untouched = [(name, type(m), values(m)) for name, m in model.named_modules()]
    change(model)
    assert [(name, type(m), values(m)) for name, m in model.named_modules()] != untouched
    again = back(through_state_dict, model, tmp_path)
    same_model(model, again)
    # And saved again, the same is written.
    assert model_metadata(again) == model_metadata(model)


@pytest.mark.parametrize("channels", [1, 4, 13], ids=["grey", "rgb-and-infrared", "bands"])
def test_other_channels_of_the_stem(channels: int, tmp_path: Path) -> None:
    model = built()
    model.backbone.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    again = back(through_safetensors, model, tmp_path)
    same_model(model, again, channels)
    # The shape tells it where nothing else does.
    with pytest.warns(UserWarning, match="nothing in it tells output_stride"):
        bare = from_checkpoint(dict(model.state_dict()))
    same_model(model, bare, channels)


def test_options_that_names_and_shapes_do_not_tell(tmp_path: Path) -> None:
    options = {"multi_grid": (1, 2), "output_stride": 16, "contract_dilation": False}
    model = built(atrous_rates=(3, 6), dropout=0.3, image_pooling_norm="running", **options)
    again = back(through_torch_save, model, tmp_path)
    same_model(model, again)
    assert again.config == model.config and again.output_stride == 16


def test_aux_head_removed_and_added(tmp_path: Path) -> None:
    model = built(aux_loss=True)
    model.aux_classifier = None
    again = back(through_safetensors, model, tmp_path)
    assert again.aux_classifier is None
    same_model(model, again)
    with_aux = built(aux_loss=True)
    late = built()
    late.aux_classifier, late.backbone.return_layers = with_aux.aux_classifier, {
        "layer4": "out", "layer3": "aux",
    }  # fmt: skip
    again = back(through_safetensors, late, tmp_path)
    same_model(late, again)
    x = torch.randn(1, 3, 33, 33)
    with torch.inference_mode():
        torch.testing.assert_close(again(x)["aux"], late(x)["aux"], rtol=0, atol=0)


def test_stride_of_a_model_built_by_torchvisions_argument(tmp_path: Path) -> None:
    model = built(replace_stride_with_dilation=(False, False, True)).set_output_stride(8)
    assert dlf.get_model(model.config[0], **model.config[1]).output_stride == 8
    same_model(model, back(through_safetensors, model, tmp_path))


def test_stride_that_the_builder_does_not_take(tmp_path: Path) -> None:
    """fregu856's builders have fixed rates, and one output stride for bottlenecks."""
    model = built("fregu856_resnet18", num_classes=3).set_output_stride(16)
    again = back(through_state_dict, model, tmp_path)
    same_model(model, again)
    assert again.atrous_rates == model.atrous_rates == (3, 6, 9)


@pytest.mark.parametrize("kind", [Preprocess, PreprocessBGR])
def test_preprocessing_comes_back_with_its_kind(kind, tmp_path: Path) -> None:
    for model in (small(), built("fregu856_resnet18", num_classes=3)):
        model.preprocess = kind(mean=(0.1, 0.2, 0.3), size=(32, 48))
        again = back(through_state_dict, model, tmp_path)
        assert type(again.preprocess) is kind and again.preprocess == model.preprocess


def test_torchvisions_head_comes_back_as_ours(tmp_path: Path) -> None:
    torchvision = import_torchvision()
    model = built()
    head = torchvision.models.segmentation.deeplabv3.DeepLabHead(512, 3, (2, 3, 4))
    model.classifier = head
    again = back(through_state_dict, model, tmp_path)
    x = torch.randn(1, 3, 41, 57)
    torch.testing.assert_close(plain(again, x), plain(model, x), rtol=0, atol=0)
    assert isinstance(again.classifier, DeepLabHead)


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OwnPreprocess(Preprocess):
    pass


def tie(model: nn.Module) -> None:
    first, second = (model.backbone[f"expanded_conv_{i}"].depthwise.bn for i in (4, 5))
    second.weight = first.weight


def share(model: nn.Module) -> None:
    model.backbone.expanded_conv_5.project = model.backbone.expanded_conv_4.project


LOSSES = {
    "own-class": (exchange("classifier.0.project.2", Own), "classifier.0.project.2: .*Own"),
    "subclass": (exchange("classifier.1", lambda: OwnConv(8, 3, 1)), "classifier.1: .*OwnConv"),
    "parametrization": (
        lambda m: nn.utils.parametrizations.weight_norm(m.classifier[1]),
        "classifier.1: .*ParametrizedConv2d",
    ),
    "old-weight-norm": (
        lambda m: torch.nn.utils.spectral_norm(m.classifier[1]), "classifier.1: .*weight_orig",
    ),
    "buffer": (lambda m: m.register_buffer("mean", torch.zeros(3)), "the model: .*mean"),
    "parameter": (
        lambda m: m.backbone.Conv.conv.register_parameter("gain", nn.Parameter(torch.ones(1))),
        "backbone.Conv.conv: .*gain",
    ),
    "forward": (lambda m: setattr(m.classifier[1], "forward", Own()), "classifier.1: .*forward"),
    "method": (
        lambda m: setattr(m.backbone, "forward", lambda x: {"out": x}), "backbone: forward",
    ),
    "tensor-as-eps": (
        lambda m: setattr(m.backbone.Conv.bn, "eps", torch.tensor(0.1)), "Conv.bn: eps",
    ),
    "shared-tensor": (tie, "expanded_conv_5.depthwise.bn: .*expanded_conv_4"),
    "shared-module": (share, "expanded_conv_5.project"),
    "preprocess": (lambda m: setattr(m, "preprocess", OwnPreprocess()), "preprocess: .*OwnPre"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_file_cannot_hold_is_refused(change, says: str, tmp_path: Path) -> None:
    model = small()
    change(model)
    for name in ("w.safetensors", "w.pth"):
        with pytest.raises(ValueError, match=rf"{name} could not give this model back: .*{says}"):
            save_weights(model, tmp_path / name)
    assert not list(tmp_path.iterdir())
    # The tensors alone are written where they are asked for, and what is lost is said on loading.
    file = save_weights(model, tmp_path / "w.safetensors", strict=False)
    for source in (file, model.state_dict()):
        with pytest.raises(CheckpointError, match=rf"cannot give back .*{says}"):
            from_checkpoint(source)


def test_what_nobody_reads_is_no_difference(tmp_path: Path) -> None:
    model = small()
    model.note, model.backbone.Conv.bn.history = object(), [1, 2]
    model.classifier[1].register_forward_hook(lambda *_: None)
    model.fast, model.fused, model.max_extra_bytes = False, False, 5
    assert model_metadata(model)["settings"] == {}
    assert from_checkpoint(save_weights(model, tmp_path / "w.safetensors")).fast


def test_numbers_of_numpy_and_torch_in_options(tmp_path: Path) -> None:
    model = built(num_classes=np.int64(3), atrous_rates=(np.int64(2), 4))
    again = back(through_safetensors, model, tmp_path)
    assert (again.num_classes, again.atrous_rates) == (3, (2, 4))
    assert model_metadata(model)["settings"] == {}


def holding_itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["it"] = value
    return value


# What a user keeps on a model -> what of it a file cannot hold, "" for nothing.
KEPT = {
    "array": (lambda m: setattr(m, "w", np.zeros(3)), ""),
    "array-in-a-list": (lambda m: setattr(m, "w", [np.zeros(3)]), ""),
    "array-in-a-dict": (lambda m: setattr(m.backbone, "w", {"a": np.zeros(3)}), ""),
    "array-of-a-submodule": (lambda m: setattr(m.classifier[1], "w", np.zeros((2, 2))), ""),
    "tuple-as-key": (
        lambda m: setattr(m.backbone, "return_layers", {(1, 2): "out"}), "backbone: return_layers",
    ),
    "complex-number": (
        lambda m: setattr(m.classifier[1], "dilation", np.complex64(1j)), "classifier.1: dilation",
    ),
    "holds-itself": (lambda m: setattr(m, "w", holding_itself()), ""),
    "array-that-is-read": (
        lambda m: setattr(m.classifier[1], "dilation", np.ones(2, int)), "classifier.1: dilation",
    ),
    "classes-set": (lambda m: setattr(m, "classes", {"a", "b", "c"}), "classes: .*set"),
    "classes-of-objects": (lambda m: setattr(m, "classes", [object()]), "classes: .*object"),
    "palette-without-values": (
        lambda m: setattr(m, "palette", torch.zeros(3, 3, device="meta")), "palette: .*Tensor",
    ),
    "config-dict": (lambda m: setattr(m, "config", {"lr": 1}), "config: dict"),
    "config-of-two-keys": (lambda m: setattr(m, "config", {"a": 1, "b": 2}), "config: dict"),
    "config-with-objects": (
        lambda m: setattr(m, "config", (m.config[0], {"width": object()})), "options: .*object",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("keep", "says"), KEPT.values(), ids=KEPT.keys())
def test_a_state_dict_never_fails_for_what_is_kept_on_the_model(keep, says: str) -> None:
    model = small()
    keep(model)
    about = model.state_dict()._metadata[""]["deeplab_fast"]
    json.dumps(about)
    if says:
        assert re.search(says, "; ".join(about["lost"]))
    else:
        assert "lost" not in about and about["settings"] == {}


@pytest.mark.parametrize(
    ("classes", "palette"),
    [
        (np.array(["a", "b", "c"]), np.arange(9, dtype=np.uint8).reshape(3, 3)),
        (range(3), torch.arange(9).view(3, 3)),
    ],
    ids=["arrays", "range-and-tensor"],
)
def test_names_and_colours_as_arrays(classes: Any, palette: Any, tmp_path: Path) -> None:
    model = small()
    model.classes, model.palette = classes, palette
    again = back(through_safetensors, model, tmp_path)
    assert again.classes == tuple(list(classes))
    assert again.palette == ((0, 1, 2), (3, 4, 5), (6, 7, 8))


def test_a_changed_model_is_built_once_for_all_its_state_dicts(monkeypatch) -> None:
    from deeplab_fast.weights import registry

    model = small()
    model.backbone.Conv.bn.eps = 0.017
    first = model.state_dict()._metadata[""]["deeplab_fast"]
    monkeypatch.setattr(registry, "get_model", lambda *_, **__: pytest.fail("built again"))
    second = model.state_dict()._metadata[""]["deeplab_fast"]
    assert first == second and "lost" not in first
    assert first["settings"]["backbone.Conv.bn"]["values"]["eps"] == 0.017


def test_a_state_dict_draws_no_random_number_and_is_torchs() -> None:
    model = small()
    before = torch.get_rng_state()
    state = model.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    small().load_state_dict(state, strict=True)
    assert set(state) == set(nn.Module.state_dict(model))


def test_a_state_dict_of_fake_tensors() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        model = dlf.deeplabv3_resnet18(num_classes=2, aspp_channels=24)
        model.backbone.bn1.eps = 0.1
        about = model.state_dict()._metadata[""]["deeplab_fast"]
    assert list(about["settings"]) == ["backbone.bn1"] and "lost" not in about


@pytest.mark.parametrize("name", dlf.list_models(module=dlf.models))
def test_every_builders_tensors_tell_the_builder(name: str) -> None:
    """No builder can be forgotten: the names alone, without what the state dict carries."""
    with torch.device("meta"):
        model = dlf.get_model(name, num_classes=5)
    info = inspect_weights({k: torch.empty_like(v) for k, v in model.state_dict().items()})
    assert (info.model, info.num_classes) == (name, 5)


@pytest.mark.parametrize("way", [through_state_dict, through_safetensors])
@pytest.mark.parametrize("name", dlf.list_models(module=dlf.models))
def test_every_builders_model_comes_back(
    name: str, way: Callable[[nn.Module, Path], Any], tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = dlf.get_model(name, num_classes=5, output_stride=16)
    model.to_empty(device="cpu")
    for number, value in enumerate(model.state_dict().values()):
        value.fill_(number)
    model.preprocess = dataclasses.replace(model.preprocess, size=224)
    again = from_checkpoint(way(model, tmp_path))
    assert again.config == model.config and again.preprocess == model.preprocess
    assert model_metadata(again) == model_metadata(model)
    kinds = [[(n, type(m)) for n, m in one.named_modules()] for one in (again, model)]
    assert kinds[0] == kinds[1]
    state = model.state_dict()
    assert list(state) == list(again.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


def test_the_embedded_models_own_state_dict(tmp_path: Path) -> None:
    model = dlf.load("camvid")
    again = back(through_torch_save, model, tmp_path)
    same_model(model, again)
    assert (again.classes, again.preprocess) == (model.classes, model.preprocess)
    # Of a copy the names tell the architecture, and the rest is said to be assumed.
    with pytest.warns(UserWarning) as caught:
        bare = from_checkpoint(dict(model.state_dict()))
    assert len(caught) == 1 and "output_stride=16, atrous_rates=(6, 12, 18)" in str(caught[0])
    x = torch.randn(1, 3, 41, 57)
    torch.testing.assert_close(plain(bare, x), plain(model, x), rtol=0, atol=0)


def test_a_bare_state_dict_says_what_is_assumed_and_what_changes_it() -> None:
    model = built(output_stride=16, align_corners=True)
    state = dict(model.state_dict())
    with pytest.warns(UserWarning) as caught:
        from_checkpoint(state)
    (message,) = [str(w.message) for w in caught]
    for part in ("output_stride=8", "align_corners=False", "multi_grid=None", "pass output_stride"):
        assert part in message
    told = {"output_stride": 16, "align_corners": True, "multi_grid": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = from_checkpoint(state, contract_dilation=True, **told)
    same_model(model, again)


def test_a_file_of_torchvisions_own_model_needs_no_warning() -> None:
    with torch.device("meta"):
        state = dict(dlf.deeplabv3_resnet50().state_dict())
    assert inspect_weights(state).untold == ()
    assert inspect_weights(dict(built().state_dict())).untold


def test_a_model_put_together_by_hand_is_not_taken_for_torchvisions() -> None:
    with torch.device("meta"):
        model = dlf.deeplabv3_resnet50()
    model.config = None
    assert "output_stride" in inspect_weights(model.state_dict()).untold


def test_loading_into_a_model_without_the_settings_says_so(tmp_path: Path) -> None:
    model = small()
    model.backbone.Conv.bn.eps, model.align_corners = 0.1, False
    file = save_weights(model, tmp_path / "w.safetensors")
    with pytest.warns(UserWarning) as caught:
        load_weights(small(), file)
    (message,) = [str(w.message) for w in caught]
    for part in (
        "Conv.bn: eps=0.1 (the model has 0.001)",
        "align_corners=False",
        "from_checkpoint",
    ):
        assert part in message
    same = small()
    same.backbone.Conv.bn.eps, same.align_corners = 0.1, False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(same, file)


def test_a_config_of_the_users_own_is_not_taken_for_the_builders(tmp_path: Path) -> None:
    other = save_weights(dlf.deeplabv3_resnet18(num_classes=7), tmp_path / "w.safetensors")
    model = dlf.deeplabv3_resnet18(num_classes=5)
    model.config = {"lr": 1}
    with pytest.raises(CheckpointError, match="DeepLabV3"):
        load_weights(model, other)


def test_builders_given_a_path_put_the_settings_back(tmp_path: Path) -> None:
    model = built()
    model.backbone.bn1.eps = 0.1
    file = save_weights(model, tmp_path / "w.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_model(model, dlf.deeplabv3_resnet18(weights=file))
    # Options of one's own stand above the file's.
    other = dlf.deeplabv3_resnet18(weights=file, output_stride=16)
    assert (other.output_stride, other.backbone.bn1.eps) == (16, 0.1)


def test_the_model_that_fits_another_stem_is_that_of_the_checkpoint() -> None:
    model = built()
    model.backbone.conv1 = nn.Conv2d(4, 64, 7, stride=2, padding=3, bias=False)
    bare = dict(nn.Module.state_dict(model))
    for state in (model.state_dict(), bare):
        with pytest.raises(
            CheckpointError, match=r"it fits: deeplab_fast\.from_checkpoint\(path\)"
        ):
            load_weights(built(), state)


def test_overrides_stand_above_settings(tmp_path: Path) -> None:
    model = built()
    model.backbone.bn1.eps = 0.1
    model.classifier[4] = nn.Conv2d(8, 3, 1, bias=False)
    model.backbone.set_output_stride(16)
    file = save_weights(model, tmp_path / "w.safetensors")
    again = from_checkpoint(file, num_classes=6, reset_head=True)
    assert again.num_classes == 6 and again.backbone.bn1.eps == 0.1 and again.output_stride == 16
    other = from_checkpoint(file, output_stride=16, align_corners=True)
    assert (other.align_corners, other.backbone.bn1.eps) == (True, 0.1)


def test_an_option_leaves_out_only_the_values_that_it_decides(tmp_path: Path) -> None:
    model = built(output_stride=16)
    conv = model.backbone.layer4[1].conv2
    conv.dilation, conv.padding, conv.padding_mode = (5, 5), (5, 5), "reflect"
    conv._reversed_padding_repeated_twice = [5, 5, 5, 5]
    model.backbone.layer4[0].conv1 = nn.Conv2d(256, 512, 3, 1, 1)
    model.classifier[4] = nn.Conv2d(8, 3, 1, bias=False)
    file = save_weights(model, tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match="by hand where the options given decide") as caught:
        other = from_checkpoint(file, output_stride=8)
    message = str(caught[0].message)
    assert "layer4.1.conv2: dilation=(5, 5)" in message and "conv2: padding=(5, 5)" in message
    assert "classifier" not in message
    plan = built(output_stride=8).backbone.layer4
    for ours, there in ((other.backbone.layer4[i], plan[i]) for i in (0, 1)):
        assert ours.conv1.dilation == there.conv1.dilation
        assert ours.conv2.dilation == there.conv2.dilation == (4, 4)
    conv = other.backbone.layer4[1].conv2
    assert (conv.padding, conv.padding_mode) == ((4, 4), "reflect")
    assert list(conv._reversed_padding_repeated_twice) == [4, 4, 4, 4]
    # A bias that was added is the file's.
    torch.testing.assert_close(
        other.backbone.layer4[0].conv1.bias, model.backbone.layer4[0].conv1.bias, rtol=0, atol=0
    )
    again = from_checkpoint(file, num_classes=6, reset_head=True)
    assert again.num_classes == 6 and again.classifier[4].bias is None


def test_an_exchanged_head_is_said_to_be_left_out_for_other_classes(tmp_path: Path) -> None:
    model = small()
    model.classifier[1] = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1))
    file = save_weights(model, tmp_path / "w.safetensors")
    with (
        pytest.raises(CheckpointError),
        pytest.warns(UserWarning, match="left out is classifier.1$"),
    ):
        from_checkpoint(file, num_classes=6)


def dilations(model: Any) -> list[tuple[Any, Any, Any]]:
    return [(m.stride, m.dilation, m.padding) for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_dilations_set_by_hand_move_with_the_output_stride_and_back() -> None:
    model = built(output_stride=16, multi_grid=None)
    for block, rate in zip(model.backbone.layer4, (1, 3), strict=True):
        for conv in (block.conv1, block.conv2):
            conv.dilation, conv.padding = (rate, rate), (rate, rate)
    # The first convolution of the stage keeps the dilation before it.
    before = dilations(model)
    model.set_output_stride(8)
    assert [b.conv2.dilation for b in model.backbone.layer4] == [(2, 2), (6, 6)]
    assert model.backbone.layer4[1].conv1.padding == (6, 6)
    model.set_output_stride(16)
    assert dilations(model) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: setattr(m.layer4[1].conv2, "dilation", (3, 3)), r"layer4\.1\.conv2 .* \(3, 3\)"),
        (
            lambda m: setattr(m.layer3[0].conv1, "stride", (2, 2)),
            r"layer3\.0\.conv1 .* stride \(2, 2",
        ),
    ],
    ids=["dilation-no-half", "stride"],
)
def test_what_cannot_move_with_the_output_stride_is_refused(change, says: str) -> None:
    model = built(output_stride=8)
    change(model.backbone)
    before, config = dilations(model), model.config
    with pytest.raises(ValueError, match=rf"cannot become 16: backbone\.{says}"):
        model.set_output_stride(16)
    assert (dilations(model), model.config, model.output_stride) == (before, config, 8)


def write(file: Path, model: nn.Module, settings: Any) -> Path:
    from safetensors.torch import save_file

    about = {**model_metadata(model), "settings": settings}
    header = {"deeplab_fast": json.dumps(about)}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file, metadata=header)
    return file


@pytest.mark.parametrize(
    "settings",
    [
        {"classifier.1": {"class": "os.system", "new": True, "values": {}}},
        {"classifier.1": {"class": "Conv2d", "new": True, "values": {"in_channels": "x"}}},
        {"classifier.9.9": {"class": "ReLU", "new": True, "values": {}}},
        {"classifier.1": {"class": "BatchNorm2d", "new": False, "values": {}}},
        {"classifier.1": "Conv2d"},
        {"classifier.__class__": {"class": "ReLU", "new": True, "values": {}}},
    ],
    ids=["foreign-class", "bad-value", "nowhere", "another-class", "no-entry", "no-module"],
)
def test_settings_that_make_no_sense_are_refused(settings: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "w.safetensors", small(), settings)
    with pytest.raises(CheckpointError, match=r"settings of classifier.* cannot be put back"):
        from_checkpoint(file)


def test_settings_set_values_and_nothing_else(tmp_path: Path) -> None:
    values = {"forward": "x", "__class__": "x", "_parameters": {}, "eps": 0.5, "unknown": 1}
    settings = {"backbone.Conv.bn": {"class": "BatchNorm2d", "new": False, "values": values}}
    again = from_checkpoint(write(tmp_path / "w.safetensors", small(), settings))
    bn = again.backbone.Conv.bn
    assert bn.eps == 0.5 and not hasattr(bn, "unknown") and "forward" not in vars(bn)
    assert len(bn._parameters) == 2


def test_frozen_batch_norms_come_back_as_they_were_before(tmp_path: Path) -> None:
    """Freezing acts in training only: the class that a layer had is saved."""
    model = built()
    model.classifier[0].convs[4][2] = SingleValueBatchNorm2d(8, eps=0.1)
    expected = model_metadata(model)
    freeze_batch_norm(model)
    again = back(through_state_dict, model, tmp_path)
    assert {type(m) for m in again.modules() if isinstance(m, nn.BatchNorm2d)} == {
        nn.BatchNorm2d,
        SingleValueBatchNorm2d,
    }
    assert model_metadata(model) == expected == model_metadata(again)
