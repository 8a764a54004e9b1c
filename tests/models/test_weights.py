"""Checkpoints: files, foreign layouts by number and by name, errors, resets, saving.

Foreign models are stated again below, in their libraries' names, so that a wrong rule shows as
other numbers.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import pickle
import re
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast import weights
from deeplab_fast.data import Preprocess
from deeplab_fast.models import get_model
from deeplab_fast.weights import (
    CheckpointError,
    from_checkpoint,
    inspect_weights,
    load_weights,
    read_state_dict,
    save_weights,
)

# Both sides run the same convolutions on the same values; what differs is fp32 rounding of the
# sums over a concat in another order: relative 1e-6 a layer, over some fifty layers.
RTOL = 5e-5


def close(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=RTOL * scale)


def trained(net: nn.Module) -> nn.Module:
    """Values of batch norm with which a swap of two tensors shows in the numbers."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.2, 0.2)
    return net.eval()


@functools.cache
def drawn(options: tuple[tuple[str, object], ...]) -> nn.Module:
    return dlf.deeplabv3_resnet18(**dict(options))


def resnet18(**options: object) -> nn.Module:
    """A model of one's own; drawing the random weights is most of the cost of a builder."""
    return copy.deepcopy(drawn(tuple(options.items())))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


class Block(nn.Module):
    def __init__(self, cin: int, width: int, stride: int, dilation: int, deep: bool) -> None:
        super().__init__()
        cout = width * 4 if deep else width
        d = dilation
        if deep:
            self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, d, d, bias=False)
            self.conv3 = nn.Conv2d(width, cout, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(cout)
        else:
            self.conv1 = nn.Conv2d(cin, width, 3, stride, d, d, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, d, d, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.deep = deep
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(
                nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.deep:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet(nn.Module):
    """`dilations`: of each block of layer3 and layer4; a dilated stage has stride 1."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        deep: bool,
        dilations: tuple[tuple[int, ...], tuple[int, ...]],
        stem: bool = False,
    ) -> None:
        super().__init__()
        if stem:
            layers: list[nn.Module] = []
            for cin, cout, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
                layers += [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)]
                layers.append(nn.ReLU())
            self.stem = nn.Sequential(*layers)
        else:
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
        rates = [(1,) * blocks[0], (1,) * blocks[1], *dilations]
        cin = 64
        for i, (count, stage) in enumerate(zip(blocks, rates, strict=True)):
            assert len(stage) == count
            layers = []
            for j, d in enumerate(stage):
                stride = 2 if i > 0 and j == 0 and max(stage) == 1 else 1
                layers.append(Block(cin, 64 * 2**i, stride, d, deep))
                cin = 64 * 2**i * (4 if deep else 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x) if hasattr(self, "stem") else F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        x = self.layer3(self.layer2(self.layer1(x)))
        return x, self.layer4(x)


R18, R50 = (2, 2, 2, 2), (3, 4, 6, 3)


def conv_bn(cin: int, cout: int, k: int = 1, dilation: int = 1) -> list[nn.Module]:
    padding = dilation * (k // 2)
    conv = nn.Conv2d(cin, cout, k, padding=padding, dilation=dilation, bias=False)
    return [conv, nn.BatchNorm2d(cout), nn.ReLU()]


class ASPP(nn.Module):
    """smp's and VainF's, both after torchvision's."""

    def __init__(self, cin: int, rates: tuple[int, ...], width: int = 256) -> None:
        super().__init__()
        branches = [conv_bn(cin, width), *(conv_bn(cin, width, 3, r) for r in rates)]
        branches.append([nn.AdaptiveAvgPool2d(1), *conv_bn(cin, width)])
        self.convs = nn.ModuleList(nn.Sequential(*b) for b in branches)
        self.project = nn.Sequential(*conv_bn(width * len(branches), width))

    def forward(self, x: Tensor) -> Tensor:
        y = [conv(x) for conv in self.convs]
        y[-1] = y[-1].expand_as(y[0])
        return self.project(torch.cat(y, 1))


class Smp(nn.Module):
    """smp.DeepLabV3: no contraction of dilation, corners aligned."""

    def __init__(self, output_stride: int, classes: int = 5) -> None:
        super().__init__()
        rates = {8: ((2, 2), (4, 4)), 16: ((1, 1), (2, 2))}
        self.encoder = ResNet(R18, False, rates[output_stride])
        self.decoder = nn.Module()
        self.decoder.aspp = ASPP(512, (12, 24, 36))
        self.decoder.conv = nn.Conv2d(256, 256, 3, padding=1, bias=False)
        self.decoder.bn = nn.BatchNorm2d(256)
        self.segmentation_head = nn.Sequential(
            nn.Conv2d(256, classes, 1),
            nn.Upsample(scale_factor=output_stride, mode="bilinear", align_corners=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.decoder.aspp(self.encoder(x)[1])
        return self.segmentation_head(F.relu(self.decoder.bn(self.decoder.conv(y))))


@pytest.fixture(scope="module")
def smp_state() -> dict[str, Tensor]:
    """smp.DeepLabV3("resnet18", classes=5), output stride 8."""
    return trained(Smp(8)).state_dict()


@pytest.mark.parametrize(
    "options",
    [{}, {"output_stride": 16, "atrous_rates": (12, 24, 36)}],
    ids=["os8", "os16-rates-of-smp"],
)
def test_smp_gives_its_numbers(options: dict) -> None:
    options = options or {"output_stride": 8, "atrous_rates": (12, 24, 36)}
    theirs = trained(Smp(options["output_stride"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = from_checkpoint(theirs.state_dict(), **options).eval()
    # smp takes multiples of the output stride only.
    x = torch.rand(1, 3, 32, 64)
    with torch.inference_mode():
        close(ours(x)["out"], theirs(x))


def save_pretrained(folder: Path, state: dict[str, Tensor], **config: object) -> Path:
    """What smp 0.6 writes."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    about = {
        "_model_class": "DeepLabV3", "encoder_name": "resnet18", "encoder_depth": 5,
        "encoder_weights": None, "encoder_output_stride": 8, "decoder_channels": 256,
        "decoder_atrous_rates": [12, 24, 36], "decoder_aspp_separable": False,
        "decoder_aspp_dropout": 0.5, "in_channels": 3, "classes": 5, "activation": None,
        "upsampling": None, "aux_params": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**about, **config}))
    return folder


@pytest.mark.parametrize("file", ["", "model.safetensors"], ids=["folder", "file"])
def test_smp_config_beside_the_weights_is_read(tmp_path: Path, file: str) -> None:
    theirs = trained(Smp(16))
    folder = save_pretrained(tmp_path / "m", theirs.state_dict(), encoder_output_stride=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = from_checkpoint(folder / file).eval()
    assert (ours.output_stride, ours.atrous_rates) == (16, (12, 24, 36))
    x = torch.rand(1, 3, 32, 64)
    with torch.inference_mode():
        close(ours(x)["out"], theirs(x))
    # A model that was built otherwise is told so.
    with pytest.warns(UserWarning, match=r"output_stride=16 \(the model has 8\)"):
        load_weights(resnet18(num_classes=5, align_corners=True, contract_dilation=False), folder)


def test_smp_config_rates_dropout_and_channels(tmp_path: Path, smp_state) -> None:
    state = {**smp_state, "encoder.conv1.weight": torch.rand(64, 4, 7, 7)}
    config = {"decoder_atrous_rates": [2, 4, 6], "decoder_aspp_dropout": 0.1, "in_channels": 4}
    ours = from_checkpoint(save_pretrained(tmp_path, state, **config))
    assert ours.atrous_rates == (2, 4, 6) and ours.backbone.conv1.in_channels == 4
    assert ours.classifier[0].project[3].p == 0.1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"activation": "sigmoid"}, "activation='sigmoid', this one returns logits"),
        ({"upsampling": 4}, "upsamples by 4 at output stride 8"),
        ({"encoder_depth": 4}, "its head reads stage 4"),
    ],
    ids=["activation", "upsampling", "depth"],
)
def test_smp_config_that_gives_other_numbers(tmp_path, smp_state, config, says) -> None:
    with pytest.warns(UserWarning) as caught:
        from_checkpoint(save_pretrained(tmp_path, smp_state, **config))
    assert len(caught) == 1 and says in str(caught[0].message)


def test_smp_without_its_config_says_what_is_assumed(tmp_path: Path, smp_state) -> None:
    folder = save_pretrained(tmp_path, smp_state)
    (folder / "config.json").rename(folder / "other.json")
    for source in (folder, folder / "model.safetensors", smp_state):
        with pytest.warns(UserWarning) as caught:
            from_checkpoint(source)
        (message,) = [str(w.message) for w in caught]
        assert "assumed is output_stride=8, atrous_rates=(12, 24, 36)" in message
    with pytest.warns(UserWarning, match=r"assumed is atrous_rates=\(6, 12, 18\)"):
        from_checkpoint(folder, output_stride=16)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json, which says .* cannot be read"):
        from_checkpoint(folder)


def test_smp_options_are_found(smp_state: dict[str, Tensor]) -> None:
    info = inspect_weights(smp_state)
    assert (info.layout, info.model, info.num_classes) == ("smp", "deeplabv3_resnet18", 5)
    assert info.options == {"align_corners": True, "contract_dilation": False}
    assert not info.aux


def test_smp_before_0_3_named_the_decoder_by_number(smp_state: dict[str, Tensor]) -> None:
    names = {
        "decoder.aspp.": "decoder.0.",
        "decoder.conv.": "decoder.1.",
        "decoder.bn.": "decoder.2.",
    }
    old = {}
    for key, value in smp_state.items():
        for new, number in names.items():
            key = key.replace(new, number)
        old[key] = value
    assert "decoder.0.convs.4.1.weight" in old
    assert same(from_checkpoint(old).state_dict(), from_checkpoint(smp_state).state_dict())


def test_smp_classification_head_is_left_out(smp_state: dict[str, Tensor]) -> None:
    extra = {"classification_head.3.weight": torch.ones(4, 512)}
    report = load_weights(from_checkpoint(smp_state), {**smp_state, **extra})
    assert report.ignored == ("classification_head.3.weight",)


def test_smp_timm_encoders_contract(smp_state: dict[str, Tensor]) -> None:
    timm = {k.replace("encoder.", "encoder.model."): v for k, v in smp_state.items()}
    info = inspect_weights(timm)
    assert (info.layout, info.model) == ("smp", "deeplabv3_resnet18")
    # timm dilates as torchvision does.
    assert info.options == {"align_corners": True}
    assert from_checkpoint(timm).backbone.contract_dilation


def test_smp_v3plus_names_what_is_missing() -> None:
    state = {
        "encoder.conv1.weight": torch.zeros(1),
        "decoder.aspp.0.convs.0.0.weight": torch.ones(1),
    }
    with pytest.raises(CheckpointError, match=r"(?s)smp-v3plus layout.*decoder has no count"):
        load_weights(resnet18(), state)


class ConvModule(nn.Module):
    """mmcv's: conv, bn, activation."""

    def __init__(self, cin: int, cout: int, k: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv, self.bn, _ = conv_bn(cin, cout, k, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class MMSeg(nn.Module):
    """EncoderDecoder of ResNetV1c-50 (contracted dilation), ASPPHead and FCNHead."""

    def __init__(self, width: int = 32, classes: int = 6) -> None:
        super().__init__()
        self.backbone = ResNet(R50, True, ((1, *[2] * 5), (2, 4, 4)), stem=True)
        self.decode_head = head = nn.Module()
        head.conv_seg = nn.Conv2d(width, classes, 1)
        head.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvModule(2048, width))
        head.aspp_modules = nn.ModuleList(
            ConvModule(2048, width, 1 if d == 1 else 3, d) for d in (1, 12, 24, 36)
        )
        head.bottleneck = ConvModule(5 * width, width, 3)
        self.auxiliary_head = aux = nn.Module()
        aux.conv_seg = nn.Conv2d(256, classes, 1)
        aux.convs = nn.Sequential(ConvModule(1024, 256, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c4, c5 = self.backbone(x)
        head, aux = self.decode_head, self.auxiliary_head
        y = [m(c5) for m in head.aspp_modules]
        # Image pooling comes first.
        y = head.bottleneck(torch.cat([head.image_pool(c5).expand_as(y[0]), *y], 1))
        logits = head.conv_seg(y), aux.conv_seg(aux.convs(c4))
        return tuple(F.interpolate(z, size=x.shape[-2:], mode="bilinear") for z in logits)


def test_mmseg_gives_its_numbers() -> None:
    theirs = trained(MMSeg())
    checkpoint = {"meta": {"CLASSES": ["a"]}, "state_dict": theirs.state_dict(), "optimizer": {}}
    info = inspect_weights(checkpoint)
    assert (info.layout, info.model) == ("mmseg", "deeplabv3_resnet50")
    assert (info.num_classes, info.aux) == (6, True)
    assert info.options == {"stem": "deep", "head": "mmseg", "aspp_channels": 32}
    with pytest.warns(UserWarning, match="nothing in it tells output_stride, atrous_rates, multi"):
        ours = from_checkpoint(checkpoint).eval()
    x = torch.rand(1, 3, 49, 33)
    with torch.inference_mode():
        out, (main, aux) = ours(x), theirs(x)
    close(out["out"], main)
    close(out["aux"], aux)
    shuffled = from_checkpoint(checkpoint).eval()
    weight = shuffled.classifier[0].project[0].weight
    weight.data = torch.cat([weight[:, -32:], weight[:, :-32]], 1)
    with torch.inference_mode(), pytest.raises(AssertionError):
        close(shuffled(x)["out"], main)


# As mmengine writes it into "meta": names and values that decide, among others that do not.
MMSEG_CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='ResNetV1c', depth=50, num_stages=4, out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1), multi_grid=(1, 2, 4),
        norm_cfg=dict(type='SyncBN', requires_grad=True), contract_dilation=True),
    decode_head=dict(type='ASPPHead', dilations=(1, 6, 12, 18), dropout_ratio=0.2,
        align_corners=True, loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0)),
    test_cfg=dict(mode='slide', stride=(513, 513)))
load_from = None
work_dir = os.path.join('a', 'b')
"""


def d16_mg124() -> nn.Module:
    """Literal dilations 1, 2, 4 in the last stage."""
    theirs = MMSeg()
    theirs.backbone = ResNet(R50, True, ((1,) * 6, (1, 2, 4)), stem=True)
    # What `ResNet` takes for a dilated stage has stride 1 there, as all of this one's.
    for i, rate in enumerate((6, 12, 18), 1):
        theirs.decode_head.aspp_modules[i].conv.dilation = (rate, rate)
        theirs.decode_head.aspp_modules[i].conv.padding = (rate, rate)
    return trained(theirs)


def test_mmseg_multi_grid_of_the_config_or_the_published_name(tmp_path: Path) -> None:
    theirs = d16_mg124()
    x = torch.rand(1, 3, 49, 33)
    with torch.inference_mode():
        expected = theirs(x)[0]
    name = "deeplabv3_r50-d16-mg124_512x1024_40k_cityscapes_20200908_005644-67b0c992.pth"
    config = MMSEG_CONFIG.replace("align_corners=True", "align_corners=False")
    for file, meta in (("iter_40000.pth", {"cfg": config}), (name, {}), ("a", {"config": config})):
        torch.save({"meta": meta, "state_dict": theirs.state_dict()}, tmp_path / file)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            ours = from_checkpoint(tmp_path / file).eval()
        assert (ours.output_stride, ours.atrous_rates) == (16, (6, 12, 18))
        with torch.inference_mode():
            close(ours(x)["out"], expected)
        (tmp_path / file).unlink()


@pytest.mark.parametrize(
    ("name", "meta", "options"),
    [
        ("x.pth", {"cfg": MMSEG_CONFIG}, {"align_corners": True, "dropout": 0.2}),
        ("deeplabv3_r50-d8_769x769_80k_x.pth", {}, {"align_corners": True, "output_stride": 8}),
        ("deeplabv3_r101b-d8_512x512_80k_x.pth", {}, {"align_corners": False, "output_stride": 8}),
        ("deeplabv3_r50-d16_512x512_x.pth", {"cfg": "not a config ("}, {"output_stride": 16}),
        ("my.pth", {"cfg": "import os"}, {}),
        ("my_d16.pth", {}, {}),
    ],
    ids=["config", "name-769", "name-b", "name-where-no-config", "nothing", "other-name"],
)
def test_mmseg_what_tells_and_what_does_not(name: str, meta: dict, options: dict) -> None:
    from deeplab_fast.weights.layouts import Origin, layout_named

    found = layout_named("mmseg").options({}, Origin(name, {}, {}, meta))
    assert {k: found[k] for k in options} == options and bool(found) == bool(options)


def test_mmseg_config_that_cannot_be_had_is_said() -> None:
    from deeplab_fast.weights.layouts import Origin, layout_named

    for before, after, says in (
        ("dilations=(1, 1, 1, 2)", "dilations=(1, 1, 1, 3)", "dilations (1, 1, 1, 3)"),
        ("dilations=(1, 6, 12, 18)", "dilations=(6, 12, 18)", "head has dilations (6, 12, 18)"),
    ):
        origin = Origin(meta={"cfg": MMSEG_CONFIG.replace(before, after)})
        assert says in layout_named("mmseg").differs({}, origin)
    assert layout_named("mmseg").differs({}, Origin(meta={"cfg": MMSEG_CONFIG})) == ""


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("align_corners", "act_cfg=dict(type='GELU'), align_corners", "act_cfg={'type': 'GELU'}"),
        ("align_corners", "in_index=2, align_corners", "decode_head.in_index=2"),
        ("align_corners", "out_channels=1, threshold=0.4, align_corners", "threshold=0.4"),
        ("test_cfg", "data_preprocessor=dict(mean=[0, 0, 0]), test_cfg", "mean=(0, 0, 0)"),
        ("test_cfg", "data_preprocessor={'bgr_to_rgb': False}, test_cfg", "bgr_to_rgb=False"),
        ("dilations=(1, 6, 12, 18)", "dilations=r", "decode_head.dilations in a form"),
        ("strides=(1, 2, 2, 1)", "strides=None", "backbone.strides in a form"),
        ("multi_grid=(1, 2, 4)", "multi_grid=grid", "backbone.multi_grid in a form"),
        ("dict(type='SyncBN', requires_grad=True), c", "norm, c", "backbone.norm_cfg in a form"),
    ],
    ids=["act", "in-index", "binary", "mean", "bgr", "rates", "strides", "grid", "norm"],
)
def test_mmseg_config_names_what_it_does_not_give(before: str, after: str, says: str) -> None:
    from deeplab_fast.weights.layouts import Origin, layout_named

    assert before in MMSEG_CONFIG
    origin = Origin(meta={"cfg": MMSEG_CONFIG.replace(before, after)})
    layout = layout_named("mmseg")
    assert says in layout.differs({}, origin)
    options = layout.options({}, origin)
    assert ("atrous_rates" in options) == (after != "dilations=r")
    assert ("output_stride" in options) == (after != "strides=None")


def test_mmseg_caffe_style_and_eps_are_restored() -> None:
    state = d16_mg124().state_dict()
    config = MMSEG_CONFIG.replace("multi_grid", "style='caffe', multi_grid")
    config = config.replace("requires_grad=True), c", "eps=0.002), c")
    config = config.replace("align_corners", "norm_cfg=dict(type='BN', eps=0.003), align_corners")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = from_checkpoint({"state_dict": state, "meta": {"cfg": config}})
    for stage in (ours.backbone.layer2, ours.backbone.layer3):
        assert (stage[0].conv1.stride, stage[0].conv2.stride) == ((2, 2), (1, 1))
    assert ours.backbone.layer4[0].conv1.stride == (1, 1)
    for part, eps in ((ours.backbone, 0.002), (ours.classifier, 0.003)):
        norms = [m for m in part.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms and {m.eps for m in norms} == {eps}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("decoder_atrous_rates", None),
        ("decoder_atrous_rates", 6),
        ("encoder_output_stride", None),
    ],
    ids=["rates-null", "rates-number", "stride-null"],
)
def test_smp_config_values_that_cannot_be_read_are_said(
    key: str, value: Any, tmp_path: Path, smp_state
) -> None:
    folder = save_pretrained(tmp_path / "m", smp_state, **{key: value})
    with pytest.warns(UserWarning, match=rf"config.json has {key}={value}, which cannot be read"):
        from_checkpoint(folder)


def test_mmseg_basic_blocks_warn() -> None:
    state = resnet18(head="mmseg", aspp_channels=16, num_classes=3).state_dict()
    renamed = {}
    for key, value in state.items():
        for ours, theirs in (
            ("classifier.0.convs.4.1.", "decode_head.image_pool.1.conv."),
            ("classifier.0.convs.4.2.", "decode_head.image_pool.1.bn."),
            *(
                (f"classifier.0.convs.{i}.0.", f"decode_head.aspp_modules.{i}.conv.")
                for i in range(4)
            ),
            *(
                (f"classifier.0.convs.{i}.1.", f"decode_head.aspp_modules.{i}.bn.")
                for i in range(4)
            ),
            ("classifier.0.project.0.", "decode_head.bottleneck.conv."),
            ("classifier.0.project.1.", "decode_head.bottleneck.bn."),
            ("classifier.2.", "decode_head.conv_seg."),
        ):
            key = key.replace(ours, theirs)
        renamed[key] = value
    with pytest.warns(UserWarning, match="mmsegmentation dilates a basic block's first"):
        assert from_checkpoint(renamed).num_classes == 3


def test_mmseg_v3plus_is_named() -> None:
    state = {"decode_head.c1_bottleneck.conv.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"mmsegmentation's DeepLabv3\+ has a separable"):
        load_weights(resnet18(), state)


class VainF(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        # Output stride 16, contracted as torchvision.
        self.backbone = ResNet(R50, True, ((1,) * 6, (1, 2, 2)))
        self.classifier = nn.Module()
        self.classifier.classifier = nn.Sequential(
            ASPP(2048, (6, 12, 18)),
            nn.Conv2d(256, 256, 3, padding=1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.Conv2d(256, classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.classifier.classifier(self.backbone(x)[1])
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


def test_vainf_gives_its_numbers() -> None:
    theirs = trained(VainF())
    checkpoint = {"cur_itrs": 10, "model_state": theirs.state_dict(), "best_score": 0.7}
    info = inspect_weights(checkpoint)
    assert (info.layout, info.model, info.options) == ("vainf", "deeplabv3_resnet50", {})
    ours = from_checkpoint(checkpoint, output_stride=16).eval()
    x = torch.rand(1, 3, 33, 49)
    with torch.inference_mode():
        close(ours(x)["out"], theirs(x))


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("best_deeplabv3_resnet50_voc_os16.pth", 16),
        ("latest_deeplabv3_resnet50_cityscapes_os8.pth", 8),
        ("deeplabv3_os16_mine.pth", 16),
        ("deeplabv3_os160.pth", None),
    ],
    ids=["16", "8", "inside", "another-number"],
)
def test_vainf_stride_in_the_files_name(tmp_path: Path, name: str, stride: int | None) -> None:
    state = {
        k.replace("classifier.", "classifier.classifier."): v
        for k, v in resnet18(num_classes=3).state_dict().items()
    }
    torch.save({"model_state": state}, tmp_path / name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        ours = from_checkpoint(tmp_path / name)
    rates = (6, 12, 18) if stride == 16 else (12, 24, 36)
    assert (ours.output_stride, ours.atrous_rates) == (stride or 8, rates)
    assert [("assumed is output_stride=8" in str(w.message)) for w in caught] == (
        [] if stride else [True]
    )


class JfZhang95(nn.Module):
    """DeepLab (v3+): multi-grid (1, 2, 4) without contraction, his names for the ASPP."""

    def __init__(self, classes: int = 21) -> None:
        super().__init__()
        self.backbone = ResNet(R50, True, ((2,) * 6, (4, 8, 16)))
        self.aspp = aspp = nn.Module()
        for i, rate in enumerate((1, 12, 24, 36), 1):
            branch = nn.Module()
            branch.atrous_conv, branch.bn, _ = conv_bn(2048, 256, 3 if i > 1 else 1, rate)
            aspp.add_module(f"aspp{i}", branch)
        aspp.global_avg_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn(2048, 256))
        aspp.conv1, aspp.bn1, _ = conv_bn(1280, 256)
        self.decoder = nn.Module()
        self.decoder.conv1, self.decoder.bn1, _ = conv_bn(256, 48)
        self.decoder.last_conv = nn.Sequential(
            *conv_bn(304, 256, 3), nn.Dropout(), *conv_bn(256, 256, 3), nn.Dropout(),
            nn.Conv2d(256, classes, 1),
        )  # fmt: skip

    def features(self, x: Tensor) -> Tensor:
        c5 = self.backbone(x)[1]
        aspp = self.aspp
        y = [getattr(aspp, f"aspp{i}") for i in range(1, 5)]
        y = [F.relu(m.bn(m.atrous_conv(c5))) for m in y]
        y.append(aspp.global_avg_pool(c5).expand_as(y[0]))
        return F.relu(aspp.bn1(aspp.conv1(torch.cat(y, 1))))


def test_jfzhang95_loads_up_to_its_decoder() -> None:
    theirs = trained(JfZhang95())
    checkpoint = {"epoch": 3, "state_dict": theirs.state_dict(), "best_pred": 0.5}
    info = inspect_weights(checkpoint)
    assert (info.layout, info.model, info.num_classes) == ("jfzhang95", "deeplabv3_resnet50", None)
    assert info.options == {"multi_grid": (1, 2, 4), "contract_dilation": False}
    with pytest.raises(
        CheckpointError, match=r"DeepLabv3\+: its decoder has no counterpart.*--reset-head"
    ):
        from_checkpoint(checkpoint)
    ours = get_model(info.model, num_classes=3, **info.options)
    before = copied(ours)
    report = load_weights(ours, checkpoint, reset_head=True)
    ours.eval()
    x = torch.rand(1, 3, 33, 49)
    with torch.inference_mode():
        close(ours.classifier[0](ours.backbone(x)["out"]), theirs.features(x))
    assert set(report.reset) == {
        k for k in before if k.startswith(("classifier.1", "classifier.2", "classifier.4"))
    }
    assert all(key.startswith("decoder.") for key in report.ignored)
    assert not report.missing and not report.unexpected
    assert not torch.equal(ours.classifier[4].weight, before["classifier.4.weight"])


def slim_names(model: nn.Module) -> dict[str, np.ndarray]:
    """TensorFlow's variables of our MobileNetV2 model, by scope."""
    out = {}

    def put(
        scope: str, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, weight: Tensor | None = None
    ) -> None:
        w = (conv.weight if weight is None else weight).detach().numpy()
        if conv.groups > 1:
            # [channels, 1, h, w] -> [h, w, channels, 1].
            out[f"{scope}/depthwise_weights"] = np.transpose(w, (2, 3, 0, 1))
        else:
            out[f"{scope}/weights"] = np.transpose(w, (2, 3, 1, 0))
        if bn is not None:
            values = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
            for name, value in zip(
                ("gamma", "beta", "moving_mean", "moving_variance"), values, strict=True
            ):
                out[f"{scope}/BatchNorm/{name}"] = value.detach().numpy()

    for name, block in model.backbone.items():
        if name == "Conv":
            put("MobilenetV2/Conv", block.conv, block.bn)
            continue
        for part in ("expand", "depthwise", "project"):
            layer = getattr(block, part)
            if layer is not None:
                put(f"MobilenetV2/{name}/{part}", layer.conv, layer.bn)
    aspp, classifier = model.classifier
    *branches, pooling = aspp.convs
    for i, branch in enumerate(branches):
        put(f"aspp{i}", branch[0], branch[1])
    put("image_pooling", pooling[1], pooling[2])
    # (image_pooling, aspp0, ...) there; pooling is last here.
    parts = aspp.project[0].weight.split(pooling[1].out_channels, dim=1)
    put(
        "concat_projection",
        aspp.project[0],
        aspp.project[1],
        torch.cat([parts[-1], *parts[:-1]], 1),
    )
    put("logits/semantic", classifier, None)
    out["logits/semantic/biases"] = classifier.bias.detach().numpy()
    return out


@pytest.mark.parametrize("rates", [(), (6, 12, 18)], ids=["pooling-only", "atrous-branches"])
def test_slim_variables(tmp_path: Path, rates: tuple[int, ...]) -> None:
    options = {"width": 0.25, "aspp_channels": 16, "atrous_rates": rates}
    model = trained(dlf.deeplabv3_mobilenet_v2_tf(num_classes=4, **options))
    state = slim_names(model)
    state["global_step"] = np.int64(7)
    state["MobilenetV2/Conv/weights/Momentum"] = np.zeros(3, np.float32)
    state["MobilenetV2/Conv_1/weights"] = np.zeros(3, np.float32)
    file = tmp_path / "variables.npz"
    np.savez(file, **state)
    info = inspect_weights(file)
    assert (info.layout, info.model, info.num_classes) == ("slim", "deeplabv3_mobilenet_v2_tf", 4)
    expected = {k: v for k, v in options.items() if v != ()}
    assert info.options == expected
    ours = from_checkpoint(file)
    assert same(ours.state_dict(), model.state_dict())
    report = load_weights(ours, file)
    assert len(report.ignored) == 3 and not report.missing


def test_tflite_names(tmp_path: Path) -> None:
    model = dlf.deeplabv3_mobilenet_v2_tf(num_classes=4, width=0.5, norm="folded", aspp_channels=8)
    for p in model.parameters():
        nn.init.uniform_(p, -1, 1)
    state = {}
    for key, value in model.backbone.state_dict().items():
        state[f"MobilenetV2.{key.replace('.conv.', '.')}"] = value
    aspp, classifier = model.classifier
    for name, conv in (
        ("aspp0", aspp.convs[0][0]),
        ("image_pooling", aspp.convs[1][1]),
        ("concat_projection", aspp.project[0]),
        ("logits.semantic", classifier),
    ):
        state[f"{name}.weight"], state[f"{name}.bias"] = conv.weight.data, conv.bias.data
    # (image_pooling, aspp0) there.
    state["concat_projection.weight"] = state["concat_projection.weight"].roll(8, dims=1)
    assert "MobilenetV2.Conv.weight" in state
    assert "MobilenetV2.expanded_conv_3.depthwise.weight" in state
    info = inspect_weights(state)
    assert (info.layout, info.num_classes) == ("tflite", 4)
    assert info.options == {"width": 0.5, "norm": "folded", "aspp_channels": 8}
    assert same(from_checkpoint(state).state_dict(), model.state_dict())


def test_the_real_tflite_file(shared_data: Path) -> None:
    file = shared_data / "deeplabv3_257" / "deeplabv3_257_mv_gpu_folded.safetensors"
    info = inspect_weights(file)
    assert (info.layout, info.num_classes) == ("tflite", 21)
    # The stride is in the header's list of ops.
    assert info.options == {"width": 0.5, "norm": "folded", "output_stride": 8}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deeplabv3_resnet18", {}),
        ("deeplabv3_resnet34", {"head": "paper", "stem": "deep"}),
        ("deeplabv3_resnet18", {"head": "mmseg", "aspp_channels": 64, "aux_loss": True}),
        ("deeplabv3_resnet18", {"head": "mmseg"}),
        ("deeplabv3_resnet18", {"head": "deeplabv2"}),
        ("deeplabv3_resnet18", {"aspp_channels": 32}),
        ("deeplabv3_resnet50", {"aux_loss": True}),
        ("deeplabv3_mobilenet_v3_large", {"aux_loss": True}),
        ("deeplabv3_mobilenet_v2_tf", {"width": 1.4}),
        ("deeplabv3_mobilenet_v2_tf", {"width": 0.35, "norm": "folded"}),
        ("deeplabv3_cascaded_resnet50", {}),
        ("fregu856_resnet18", {}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)) or "default",
)
def test_names_and_shapes_tell_the_builder(name: str, options: dict) -> None:
    model = get_model(name, num_classes=3, **options)
    # A copy: the state dict itself carries the options.
    info = inspect_weights(dict(model.state_dict()))
    aux = options.pop("aux_loss", False)
    assert (info.model, info.num_classes, info.aux) == (name, 3, aux)
    assert info.options == options


def test_head_unknown_here_fits_no_builder() -> None:
    """torchvision's FCN has the same backbone and another head."""
    model = resnet18(num_classes=3)
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    fcn = {
        "classifier.0.weight": torch.zeros(128, 512, 3, 3),
        "classifier.4.weight": torch.zeros(3, 128, 1, 1),
    }
    assert inspect_weights({**backbone, **fcn}).model is None
    with pytest.raises(CheckpointError, match="no builder of this package fits it"):
        from_checkpoint({**backbone, **fcn})


def test_image_classifier_fills_the_backbone() -> None:
    ours = resnet18(num_classes=3, aux_loss=True)
    state = {
        k: torch.rand_like(v) if v.is_floating_point() else v
        for k, v in ours.backbone.state_dict().items()
    }
    classifier = {**state, "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    with pytest.raises(CheckpointError, match="image classifier"):
        load_weights(ours, classifier)
    report = load_weights(ours, classifier, reset_head=True)
    assert report.layout == "imagenet" and report.ignored == ("fc.weight", "fc.bias")
    assert same(ours.backbone.state_dict(), state)
    assert set(report.reset) == {k for k in ours.state_dict() if "classifier." in k}


def test_builders_take_a_path(tmp_path: Path) -> None:
    model = resnet18(num_classes=3, aux_loss=True, stem="deep")
    file = save_weights(model, tmp_path / "w.pth")
    built = dlf.deeplabv3_resnet18(weights=file)
    assert same(built.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="expected value 3 but got 21"):
        dlf.deeplabv3_resnet18(weights=file, num_classes=21)


TINY = {"backbone.conv1.weight": torch.arange(6.0).view(2, 3), "classifier.4.bias": torch.ones(2)}


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in TINY.items()}


@pytest.mark.parametrize(
    "content",
    [
        TINY,
        OrderedDict(TINY),
        {"model": TINY, "epoch": 3, "args": argparse.Namespace(lr=0.1, path=Path("x"))},
        {"state_dict": TINY, "best_pred": np.float64(0.5), "history": np.arange(3)},
        {"model_state": TINY, "optimizer_state": {"state": {0: {"momentum": torch.ones(2)}}}},
        {"model_state_dict": TINY},
        {"model": {"state_dict": TINY}},
        {"state_dict": prefixed("model.")},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        {k.replace("backbone.", "backbone._orig_mod."): v for k, v in TINY.items()},
        {**TINY, "epoch": 3, "name": "x"},
    ],
    ids=[
        "plain", "ordered", "torchvision-wzm", "jfzhang95", "vainf", "model_state_dict", "nested",
        "lightning", "ddp", "compile", "ddp-compile", "compiled-part", "other-values",
    ],
)  # fmt: skip
def test_containers_and_prefixes(tmp_path: Path, content: dict) -> None:
    file = tmp_path / "c.pth"
    torch.save(content, file)
    assert same(read_state_dict(file), TINY)


def test_lightning_keeps_what_is_not_the_model_apart(smp_state: dict[str, Tensor]) -> None:
    state = {f"model.{k}": v for k, v in smp_state.items()}
    state["criterion.weight"] = torch.ones(5)
    report = load_weights(from_checkpoint(smp_state), {"state_dict": state})
    assert report.ignored == ("criterion.weight",)


class HistoryBuffer:
    """mmengine's, as far as pickling goes: its __init__, __getstate__ and what they call."""

    _statistics_methods: ClassVar[dict] = {}

    def __init__(self, log_history=(), count_history=(), max_length: int = 1000000) -> None:
        self.max_length = max_length
        self._set_default_statistics()
        self._log_history = np.array(log_history)
        self._count_history = np.array(count_history)

    def _set_default_statistics(self) -> None:
        self._statistics_methods.setdefault("min", HistoryBuffer.min)
        self._statistics_methods.setdefault("max", HistoryBuffer.max)
        self._statistics_methods.setdefault("current", HistoryBuffer.current)
        self._statistics_methods.setdefault("mean", HistoryBuffer.mean)

    def mean(self, window_size=None): ...

    def max(self, window_size=None): ...

    def min(self, window_size=None): ...

    def current(self): ...

    def __getstate__(self) -> dict:
        self.__dict__.update(statistics_methods=self._statistics_methods)
        return self.__dict__

    def __setstate__(self, state) -> None:
        raise AssertionError("the class is not to be loaded")


@pytest.fixture
def mmengine(monkeypatch: pytest.MonkeyPatch):
    """The modules that mmengine's classes are pickled by, while they are."""
    name = "mmengine.logging.history_buffer"
    module = types.ModuleType(name)
    module.HistoryBuffer = HistoryBuffer
    with monkeypatch.context() as patch:
        patch.setattr(HistoryBuffer, "__module__", name)
        # Methods are pickled by the module that they say they are of.
        for method in ("min", "max", "mean", "current"):
            patch.setattr(getattr(HistoryBuffer, method), "__module__", name)
        for part in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        patch.setitem(sys.modules, name, module)
        yield patch


def test_mmengine_loss_curves_do_not_hinder(tmp_path: Path, mmengine) -> None:
    file = tmp_path / "iter_80000.pth"
    logs = {"log_scalars": OrderedDict(loss=HistoryBuffer([0.5, 0.4], [1, 1]))}
    torch.save({"meta": {"iter": 80000}, "state_dict": TINY, "message_hub": logs}, file)
    with zipfile.ZipFile(file) as archive:
        pickled = archive.read("iter_80000/data.pkl")
    assert b"cbuiltins\ngetattr\n" in pickled or b"c__builtin__\ngetattr\n" in pickled
    mmengine.undo()
    assert "mmengine.logging" not in sys.modules
    assert same(read_state_dict(file), TINY)


class Called:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return getattr, (Trap(self.folder), "x")


def test_getattr_in_a_pickle_looks_nothing_up_and_calls_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    file = tmp_path / "w.pth"
    torch.save({"model": TINY, "extra": Called(trap)}, file)
    with pytest.raises(CheckpointError, match=r"mkdir, which would run code"):
        read_state_dict(file)
    # By hand: {"a.weight": getattr("a", "upper")()}.
    looked = b"cbuiltins\ngetattr\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00uppertR)R"
    key = b"X\x08\x00\x00\x00a.weight"
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in parts.items():
            hand = b"\x80\x02}" + key + looked + b"s."
            archive.writestr(name, hand if name.endswith("data.pkl") else data)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_state_dict(file)
    assert not trap.exists()


class OwnLog:
    pass


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": TINY, "log": OwnLog()},
        {"model": TINY, "log": OwnLog()},
        {**TINY, "log": OwnLog()},
        nn.Sequential(OrderedDict(a=nn.Linear(2, 2))),
        {"model": nn.Sequential(OrderedDict(a=nn.Linear(2, 2))), "epoch": 3},
    ],
    ids=["state_dict", "model", "plain", "whole-module", "module-in-a-container"],
)
def test_the_recipe_for_trusted_files_works_as_it_stands(tmp_path: Path, content) -> None:
    file = tmp_path / "w.pth"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="convert it where that class") as error:
        read_state_dict(file)
    recipe = str(error.value).partition("can be imported: ")[2]
    recipe = recipe.replace("'weights.pth'", repr(str(tmp_path / "new.pth")))
    exec(recipe, {"torch": torch, "path": file})
    new = torch.load(tmp_path / "new.pth", weights_only=False)
    expected = {"a.weight", "a.bias"} if "Sequential" in str(content) else set(TINY)
    assert set(new) - {"log"} == expected


def test_averaged_models_own_file() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(resnet18(num_classes=3))
    state = averaged.state_dict()
    assert "n_averaged" in state
    model = resnet18(num_classes=3)
    for source in (
        state,
        {"model": state},
        {"state_dict": {f"model.{k}": v for k, v in state.items()}},
    ):
        report = load_weights(model, source)
        assert [k.rpartition(".")[2] for k in report.ignored] == ["n_averaged"]
        assert same(copied(model), averaged.module.state_dict())


def shifted(by: float) -> dict[str, Tensor]:
    return {k: v + by for k, v in TINY.items()}


def under(**parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{k}": v for name, state in parts.items() for k, v in state.items()}


SEVERAL = {
    "model-and-ema": (
        {"model": shifted(0), "model_ema": shifted(1), "epoch": 3}, ["model", "model_ema"],
    ),
    "unusual-key": ({"state_dict": shifted(0), "teacher": shifted(1)}, ["state_dict", "teacher"]),
    "no-usual-key": ({"student": shifted(0), "teacher": shifted(1)}, ["student", "teacher"]),
    "prefixes": (
        {"state_dict": under(student=shifted(0), teacher=shifted(1))}, ["student", "teacher"],
    ),
    "lightning": (under(model=shifted(0), ema_model=shifted(1)), ["model", "ema_model"]),
    "averaged-beside": (
        {**under(model=shifted(0), averaged=under(module=shifted(1))),
         "averaged.n_averaged": torch.tensor(3)},
        ["model", "averaged"],
    ),
    "inside-a-wrapper": (
        under(module=under(net=under(student=shifted(0), teacher=shifted(1)))),
        ["student", "teacher"],
    ),
    "beside-the-model-itself": ({**shifted(0), **under(ema=shifted(1))}, [".", "ema"]),
    "both-levels": (
        {"model": under(student=shifted(0), teacher=shifted(2)), "model_ema": shifted(1)},
        ["model/student", "model_ema"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "parts"), SEVERAL.values(), ids=SEVERAL.keys())
def test_of_several_networks_one_is_chosen_by_name_only(tmp_path, content, parts) -> None:
    file = tmp_path / "w.pth"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="holds more than one network") as error:
        read_state_dict(file)
    for part in parts:
        assert part.partition("/")[0] in str(error.value)
    assert "part=" in str(error.value)
    for i, part in enumerate(parts):
        found = read_state_dict(file, part=part)
        assert same({k: v for k, v in found.items() if k != "n_averaged"}, shifted(i))
    with pytest.raises(CheckpointError, match=r"holds more than one|has no part 'absent'"):
        read_state_dict(file, part="absent")


def test_lightnings_averaged_weights_are_its_model() -> None:
    content = {
        "pytorch-lightning_version": "2.6", "state_dict": under(model=shifted(1)),
        "current_model_state": under(model=shifted(0)), "averaging_state": {"n_averaged": 3},
    }  # fmt: skip
    for part, by in ((None, 1), ("state_dict", 1), ("current_model_state", 0)):
        assert same(weights.files.open_checkpoint(content, part).state, shifted(by))


def test_part_of_every_function(tmp_path: Path) -> None:
    first, second = (resnet18(num_classes=n).state_dict() for n in (3, 4))
    content = {"model": first, "model_ema": second}
    assert inspect_weights(content, part="model_ema").num_classes == 4
    ema = from_checkpoint(content, part="model_ema")
    assert same(ema.state_dict(), second)
    assert load_weights(resnet18(num_classes=3), content, part="model").loaded
    for function in (from_checkpoint, inspect_weights):
        with pytest.raises(CheckpointError, match="under the keys model, model_ema"):
            function(content)
    with pytest.raises(CheckpointError, match="has no part 'x'; leave part out"):
        from_checkpoint(first, part="x")


def test_one_network_beside_other_tensors_is_named() -> None:
    state = {**under(student=TINY), "projector.weight": torch.ones(2)}
    with pytest.raises(
        CheckpointError, match=r"under student\. beside .*projector.*part='student'"
    ):
        inspect_weights(state)
    # What is no network of this kind does not ask for a choice.
    checkpoint = {"model": TINY, "criterion": {"weight": torch.ones(3)}, "optimizer": {"a": 1}}
    assert inspect_weights(checkpoint).layout == "deeplab_fast"


def write_pth(path: Path) -> None:
    torch.save(TINY, path)


def write_legacy(path: Path) -> None:
    torch.save(TINY, path, _use_new_zipfile_serialization=False)


def write_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(TINY, path)


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{k: v.numpy() for k, v in TINY.items()})


FORMATS = [write_pth, write_legacy, write_safetensors, write_npz]


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.npz", "w"])
def test_the_content_decides_not_the_suffix(tmp_path: Path, write, name: str) -> None:
    write(tmp_path / name)
    assert same(read_state_dict(tmp_path / name), TINY)
    assert same(read_state_dict(str(tmp_path / name)), TINY)


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_files(tmp_path: Path, write, kept: float) -> None:
    file = tmp_path / "w.pth"
    write(file)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match=r"w\.pth .*not written to its end"):
        read_state_dict(file)


@pytest.mark.parametrize("low", range(256))
def test_headers_of_every_length(tmp_path: Path, low: int) -> None:
    """The first byte of a .safetensors file is the low byte of its header's length."""
    file = tmp_path / "w.safetensors"
    entries = {"a.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    header = json.dumps(entries).encode().ljust(256 + low)
    data = np.array([1.0, 2.0], np.float32).tobytes()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert file.read_bytes()[0] == low
    assert read_state_dict(file)["a.weight"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "length",
    [0x0A3C, 0x8B1F, 0x0280, 0x0A3C20],
    ids=["web-page", "gzip", "pickle-protocol-2", "web-page-behind-a-space"],
)
def test_headers_whose_length_looks_like_another_file(tmp_path: Path, length: int) -> None:
    file = tmp_path / "model.ckpt.index"
    header = b'{"a.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    file.write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert read_state_dict(file)["a.weight"].tolist() == [0.0]


@pytest.mark.parametrize("padding", range(0, 256, 8))
def test_own_files_of_every_header_length(tmp_path: Path, padding: int) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "w.safetensors"
    save_file(TINY, file, metadata={"format": "pt", "note": "x" * padding})
    assert same(read_state_dict(file), TINY)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.pth", b"", "is empty"),
        ("a.pth", b"\xef\xbb\xbf\n<!DOCTYPE html><html>Not found", "is a web page"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("a.tflite", b"\x1c\0\0\0TFL3" + bytes(20), "TensorFlow Lite model"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("a.pth.gz", b"\x1f\x8b\x08", "gzip archive; unpack"),
        ("a.npy", b"\x93NUMPY\x01", "single array"),
        ("model.ckpt.index", b"\0\1\2", "part of a TensorFlow checkpoint"),
        ("model.ckpt.data-00000-of-00001", b"\0\1\2", "part of a TensorFlow checkpoint"),
        ("a.pth", b"hello world, no weights", "is not a checkpoint: it starts with b'hello wo'"),
        ("a.json", b'{"error": "not found"}', "is not a checkpoint"),
    ],
    ids=[
        "empty", "html", "lfs", "tflite", "hdf5", "gzip", "npy", "tf-index", "tf-data", "text",
        "json",
    ],
)  # fmt: skip
def test_files_that_are_no_checkpoint(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_state_dict(file)
    assert str(file) in str(error.value) and says in str(error.value)


def test_no_file_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: .*absent\.pth"):
        read_state_dict(tmp_path / "absent.pth")
    write_pth(tmp_path / "inside.pth")
    with pytest.raises(CheckpointError, match=r"is a folder.*it holds inside\.pth"):
        read_state_dict(tmp_path)


def test_torchscript_and_other_archives(tmp_path: Path) -> None:
    file = tmp_path / "s.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), file)
    with pytest.raises(CheckpointError, match=r"TorchScript archive.*torch\.jit\.load"):
        read_state_dict(file)
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(CheckpointError, match=r"zip archive without a checkpoint.*notes\.txt"):
        read_state_dict(tmp_path / "z.pth")


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_pickle_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    file, trap = tmp_path / "w.pth", tmp_path / "ran"
    torch.save({"model": TINY, "extra": Trap(trap)}, file)
    with pytest.raises(CheckpointError, match=r"object of (posix|nt)\.mkdir, which would run code"):
        read_state_dict(file)
    assert not trap.exists()
    file.write_bytes(pickle.dumps({"model": Trap(trap)}))
    with pytest.raises(CheckpointError):
        read_state_dict(file)
    assert not trap.exists()


def test_whole_pickled_modules_are_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(nn.Linear(2, 2), file)
    with pytest.raises(
        CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"
    ):
        read_state_dict(file)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(2)], "holds a list, expected a state dict"),
        (torch.ones(2), "holds a Tensor, expected a state dict"),
        ({"epoch": 3, "model": "x"}, "'epoch' (int), 'model' (str)"),
        ({}, "it has nothing"),
    ],
    ids=["list", "tensor", "no-tensors", "empty"],
)
def test_content_that_is_no_state_dict(tmp_path: Path, content: object, says: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as error:
        read_state_dict(tmp_path / "w.pth")
    assert says in str(error.value)


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match="plain arrays"):
        read_state_dict(tmp_path / "w.npz")


@pytest.fixture
def model() -> nn.Module:
    return resnet18(num_classes=4)


@pytest.fixture
def small() -> nn.Module:
    """A few hundred kilobytes, for what is written to disk."""
    return dlf.deeplabv3_mobilenet_v2_tf(num_classes=2, width=0.25, aspp_channels=8)


def test_keys_that_do_not_fit_are_named_shortened_and_counted(model: nn.Module) -> None:
    before = copied(model)
    state = copied(model)
    for i in range(2):
        for j in (1, 2):
            del state[f"backbone.layer1.{i}.conv{j}.weight"]
    del state["classifier.1.weight"]
    state.update({f"extra.{i}.weight": torch.ones(1) for i in range(23)})
    state["backbone.conv1.weight"] = torch.ones(64, 1, 7, 7)
    state["backbone.bn1.bias"] = torch.ones(64, dtype=torch.int64)
    with pytest.raises(CheckpointError) as error:
        load_weights(model, state)
    message = str(error.value)
    assert "(torchvision layout) does not fit deeplabv3_resnet18:" in message
    assert "5 missing: backbone.layer1.0.conv1.weight, backbone.layer1.0.conv2.weight" in message
    assert "23 unexpected: extra.0.weight" in message and "extra.9.weight and 13 more" in message
    assert "1 of another shape: backbone.conv1.weight: [64, 1, 7, 7], not [64, 3, 7, 7]" in message
    assert "1 of another kind: backbone.bn1.bias: torch.int64, not torch.float32" in message
    assert same(copied(model), before)


def test_strict_false_reports_instead(model: nn.Module) -> None:
    state = {
        k: torch.rand_like(v) if v.is_floating_point() else v for k, v in copied(model).items()
    }
    kept = model.classifier[1].weight.clone()
    del state["classifier.1.weight"]
    state["extra.weight"] = torch.ones(1)
    report = load_weights(model, state, strict=False)
    assert report.missing == ("classifier.1.weight",) and report.unexpected == ("extra.weight",)
    assert torch.equal(model.classifier[1].weight, kept)
    assert torch.equal(model.backbone.conv1.weight, state["backbone.conv1.weight"])
    text = str(report)
    assert "1 missing: classifier.1.weight" in text and "1 unexpected: extra.weight" in text
    with pytest.raises(CheckpointError, match="not one of its tensors"):
        load_weights(model, {"backbone.nothing": torch.ones(1)}, strict=False)
    # Shapes are an error also then, as with torch's load_state_dict.
    with pytest.raises(CheckpointError, match="1 of another shape"):
        load_weights(model, {**state, "backbone.bn1.bias": torch.ones(3)}, strict=False)


@pytest.mark.parametrize("aux", [False, True], ids=["main-head", "and-auxiliary-head"])
def test_another_number_of_classes(aux: bool) -> None:
    source = resnet18(num_classes=7, aux_loss=aux)
    model = resnet18(num_classes=4, aux_loss=aux)
    before = copied(model)
    with pytest.raises(CheckpointError) as error:
        load_weights(model, source.state_dict())
    message = str(error.value)
    for part in (
        "it has 7 classes, the model 4",
        "num_classes=7",
        "reset_head=True",
        "--reset-head",
    ):
        assert part in message
    assert ("aux_classifier.4" in message) == aux
    assert "missing" not in message and "shape" not in message
    assert same(copied(model), before)

    report = load_weights(model, source.state_dict(), reset_head=True)
    heads = ("classifier.4", "aux_classifier.4") if aux else ("classifier.4",)
    reset = {f"{head}.{p}" for head in heads for p in ("weight", "bias")}
    assert set(report.reset) == reset
    after = copied(model)
    for key, value in source.state_dict().items():
        if key in reset:
            assert not torch.equal(after[key], before[key])
        else:
            assert torch.equal(after[key], value)


def test_reset_head_also_where_the_classes_agree(model: nn.Module) -> None:
    state = copied(model)
    report = load_weights(model, state, reset_head=True)
    assert set(report.reset) == {"classifier.4.weight", "classifier.4.bias"}
    assert not torch.equal(model.classifier[4].weight, state["classifier.4.weight"])
    # Everything else must fit.
    with pytest.raises(CheckpointError, match=r"1 missing: classifier\.2\.bias"):
        load_weights(
            model, {k: v for k, v in state.items() if k != "classifier.2.bias"}, reset_head=True
        )


def test_reset_of_the_summed_head() -> None:
    model = resnet18(num_classes=4, head="deeplabv2")
    source = resnet18(num_classes=5, head="deeplabv2")
    with pytest.raises(CheckpointError, match=r"5 classes, the model 4 \(classifier\.convs\.0, "):
        load_weights(model, source.state_dict())
    report = load_weights(model, source.state_dict(), reset_head=True)
    assert len(report.reset) == 8
    # The head's own initialisation: std 0.01, three standard errors of 4 * 512 * 9 draws.
    assert (
        abs(model.classifier.convs[2].weight.std().item() / 0.01 - 1) < 3 / (2 * 4 * 512 * 9) ** 0.5
    )
    assert not model.classifier.convs[2].bias.any()


def test_auxiliary_head_too_many_is_reported() -> None:
    source = resnet18(num_classes=4, aux_loss=True)
    model = resnet18(num_classes=4)
    report = load_weights(model, source.state_dict())
    assert set(report.ignored) == {k for k in source.state_dict() if k.startswith("aux_classifier")}
    assert not report.unexpected and not report.missing
    assert "ignored: aux_classifier.0.weight" in str(report)


def test_auxiliary_head_missing_says_what_to_do() -> None:
    source = resnet18(num_classes=4)
    model = resnet18(num_classes=4, aux_loss=True)
    aux = copied(model.aux_classifier)
    with pytest.raises(CheckpointError, match=r"aux_loss=False, or pass strict=False"):
        load_weights(model, source.state_dict())
    report = load_weights(model, source.state_dict(), strict=False)
    assert all(key.startswith("aux_classifier.") for key in report.missing) and report.missing
    assert same(copied(model.aux_classifier), aux)
    assert same(copied(model.classifier), source.classifier.state_dict())


def test_other_dilation_warns_with_the_call_that_fits(smp_state: dict[str, Tensor]) -> None:
    model = resnet18(num_classes=5)
    with pytest.warns(UserWarning) as caught:
        load_weights(model, smp_state)
    message = str(caught[0].message)
    call = (
        "deeplab_fast.deeplabv3_resnet18(num_classes=5, aux_loss=False, align_corners=True, "
        "contract_dilation=False)"
    )
    assert "align_corners=True (the model has False)" in message and message.endswith(call)
    # The call is good as it stands.
    fitting = eval(call, {"deeplab_fast": dlf})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(fitting, smp_state)


def test_a_warning_made_an_error_changes_nothing(smp_state: dict[str, Tensor]) -> None:
    model = resnet18(num_classes=5)
    before = copied(model)
    with warnings.catch_warnings(), pytest.raises(UserWarning):
        warnings.simplefilter("error")
        load_weights(model, smp_state)
    assert same(copied(model), before)


def test_another_architecture_is_named_with_the_call_that_fits(model: nn.Module) -> None:
    source = dlf.deeplabv3_resnet34(num_classes=4, head="paper", stem="deep")
    with pytest.raises(CheckpointError) as error:
        load_weights(model, source.state_dict())
    call = "deeplab_fast.deeplabv3_resnet34(num_classes=4, head='paper', stem='deep')"
    assert f"the model that it fits: {call}" in str(error.value)


def resnext(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ResNeXt's shapes under a ResNet's names."""
    return {
        k: v[:, : v.shape[1] // 4] if re.search(r"layer\d\.\d+\.conv2\.weight", k) else v
        for k, v in state.items()
    }


def test_a_builder_that_does_not_fit_is_not_named_as_one_that_does(model: nn.Module) -> None:
    for state in (resnext(copied(model)), {**copied(model), "backbone.se.weight": torch.ones(1)}):
        for function in (lambda s: load_weights(model, s), from_checkpoint):
            with pytest.raises(CheckpointError) as error:
                function(state)
            message = str(error.value)
            assert "the model that it fits" not in message
            assert "no builder of this package fits it" in message
            assert "the nearest is deeplab_fast.deeplabv3_resnet18(num_classes=4), with 1" in (
                message.replace(", with 8", ", with 1")
            )


def test_what_is_named_as_fitting_does_fit() -> None:
    other = dlf.deeplabv3_resnet34(num_classes=4, aspp_channels=8)
    other.backbone.conv1 = nn.Conv2d(4, 64, 7, 2, 3, bias=False)
    with pytest.raises(CheckpointError, match=r"that it fits: deeplab_fast\.from_checkpoint\(path"):
        load_weights(resnet18(num_classes=4), other.state_dict())
    assert from_checkpoint(other.state_dict()).backbone.conv1.in_channels == 4


def test_reset_head_is_advised_where_it_helps_only(model: nn.Module) -> None:
    state = copied(resnet18(num_classes=7))
    with pytest.raises(CheckpointError, match=r"7 classes, the model 4.*\n.*reset_head=True"):
        load_weights(model, state)
    broken = {k: v for k, v in state.items() if k != "classifier.1.weight"}
    with pytest.raises(CheckpointError) as error:
        load_weights(model, broken)
    assert "it has 7 classes" in str(error.value) and "reset_head" not in str(error.value)
    # An image classifier of another backbone, and one that fits.
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if "backbone" in k}
    with pytest.raises(CheckpointError, match=r"has no head for deeplabv3_resnet18.*reset_head"):
        load_weights(model, backbone)
    with pytest.raises(CheckpointError) as error:
        load_weights(model, resnext(backbone))
    assert "reset_head" not in str(error.value) and "8 of another shape" in str(error.value)


@pytest.mark.parametrize(
    "key",
    ["_conv_stem.weight", "features.0.0.weight", "patch_embed1.proj.weight", "stem.conv.weight"],
    ids=["efficientnet", "mobilenet-v2", "mix-transformer", "xception"],
)
def test_encoders_of_smp_that_are_not_here_are_said_to_be(
    smp_state: dict[str, Tensor], key: str
) -> None:
    state = {k: v for k, v in smp_state.items() if not k.startswith("encoder.")}
    state[f"encoder.{key}"] = torch.ones(8, 3, 3, 3)
    assert (inspect_weights(state).layout, inspect_weights(state).model) == ("smp", None)
    with pytest.raises(CheckpointError, match=r"smp layout\): no builder of this package fits it"):
        from_checkpoint(state)
    with pytest.raises(CheckpointError, match=r"(?s)smp layout\) does not fit.*no builder"):
        load_weights(resnet18(num_classes=5), state)


def test_counters_of_batch_norm_may_be_absent(model: nn.Module) -> None:
    state = {k: v for k, v in copied(model).items() if not k.endswith("num_batches_tracked")}
    model.backbone.bn1.num_batches_tracked.fill_(5)
    report = load_weights(model, state)
    assert not report.missing and model.backbone.bn1.num_batches_tracked == 5


def test_half_precision_checkpoints_become_the_models_precision(model: nn.Module) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in copied(model).items()}
    load_weights(model, state)
    assert model.classifier[4].weight.dtype == torch.float32
    assert torch.equal(model.classifier[4].weight, state["classifier.4.weight"].float())


def test_quantised_tensors_are_refused(model: nn.Module) -> None:
    state = copied(model)
    state["classifier.4.weight"] = torch.quantize_per_tensor(
        state["classifier.4.weight"], 0.1, 0, torch.qint8
    )
    with pytest.raises(
        CheckpointError, match=r"quantised or sparse tensors \(classifier\.4\.weight"
    ):
        load_weights(model, state)


def test_layouts_by_name(model: nn.Module, smp_state: dict[str, Tensor]) -> None:
    assert load_weights(model, copied(model), layout="torchvision").layout == "torchvision"
    with pytest.raises(ValueError, match=r"no layout is named 'caffe'; there are: auto, smp"):
        load_weights(model, copied(model), layout="caffe")
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(model, smp_state, layout="torchvision", strict=True)
    with pytest.raises(CheckpointError, match=r"names of its tensors .* it has transformer\.0"):
        load_weights(model, {"transformer.0.weight": torch.ones(2)})
    with pytest.raises(TypeError, match="path of a checkpoint or a state dict, got int"):
        load_weights(model, 3)


def test_layout_names_are_unique_and_two_names_for_one_tensor_are_seen(smp_state) -> None:
    names = [layout.name for layout in weights.LAYOUTS]
    assert len(set(names)) == len(names)
    doubled = {
        **smp_state,
        "decoder.0.project.0.weight": smp_state["decoder.aspp.project.0.weight"],
    }
    with pytest.raises(CheckpointError, match="are both classifier"):
        inspect_weights(doubled)


def test_wrapped_models(small: nn.Module, tmp_path: Path) -> None:
    state = {k: v + 1 for k, v in copied(small).items()}
    for wrapped in (nn.DataParallel(small), torch.compile(small)):
        nn.init.zeros_(small.classifier[1].weight)
        load_weights(wrapped, state)
        assert same(copied(small), state)
        file = save_weights(wrapped, tmp_path / "w.pth")
        assert list(torch.load(file, weights_only=True)) == list(small.state_dict())


def test_from_checkpoint_overrides(tmp_path: Path) -> None:
    file = save_weights(resnet18(num_classes=4, aux_loss=True), tmp_path / "w.pth")
    model = from_checkpoint(file, reset_head=True, num_classes=2, aux_loss=False, output_stride=16)
    assert (model.num_classes, model.aux_classifier, model.output_stride) == (2, None, 16)
    with pytest.raises(CheckpointError, match="it has 4 classes, the model 2"):
        from_checkpoint(file, num_classes=2)


def test_safetensors_bring_options_classes_and_preprocessing_back(tmp_path: Path) -> None:
    options = {
        "multi_grid": (1, 2),
        "output_stride": 16,
        "align_corners": True,
        "atrous_rates": (3, 6),
    }
    model = resnet18(num_classes=2, aux_loss=True, **options)
    model.classes, model.palette = ("sky", "ground"), ((0, 0, 255), (9, 9, 9))
    model.preprocess = Preprocess(size=(64, 96))
    file = save_weights(model.to(memory_format=torch.channels_last), tmp_path / "w.safetensors")
    info = inspect_weights(file)
    assert info.options == options and info.model == "deeplabv3_resnet18" and info.aux
    again = from_checkpoint(file)
    assert same(again.state_dict(), model.state_dict())
    assert (again.config, again.classes, again.palette) == (
        model.config,
        model.classes,
        model.palette,
    )
    assert again.preprocess == model.preprocess and again.backbone.multi_grid == (1, 2)
    # Names that the user gave stay.
    again.classes = ("a", "b")
    load_weights(again, file)
    assert again.classes == ("a", "b")


def test_pth_is_a_plain_state_dict(small: nn.Module, tmp_path: Path) -> None:
    file = save_weights(small, str(tmp_path / "w.pt"))
    assert same(torch.load(file, weights_only=True), copied(small))


@pytest.mark.parametrize(
    ("name", "function"),
    [("w.pth", "torch.save"), ("w.pth", "os.fsync"), ("w.safetensors", "os.fsync")],
    ids=["pth", "pth-at-its-end", "safetensors-at-its-end"],
)
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, function: str
) -> None:
    file = save_weights(small, tmp_path / name)
    before = file.read_bytes()

    def half(*arguments: object) -> None:
        if function == "torch.save":
            arguments[1].write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(function, half)
    with pytest.raises(OSError, match="no space left"):
        save_weights(small, file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


def test_saving_where_it_cannot_be(small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.safetensors, \.pth or \.pt, got 'w\.bin'"):
        save_weights(small, tmp_path / "w.bin")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        save_weights(small, tmp_path / "absent" / "w.pth")
