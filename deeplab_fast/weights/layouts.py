"""The names that other libraries give to the tensors of a DeepLabv3, as a table of rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import registry
from ._common import CheckpointError, StateDict, shorten
from .libraries import (
    Origin,
    fregu856_options,
    mmseg_differs,
    mmseg_options,
    mmseg_settings,
    smp_differs,
    smp_options,
    smp_plus_options,
    tflite_options,
    vainf_options,
)
from .rules import Rule, hwio, hwio_pool_to_end, pool_to_end, slim
from .settings import Settings


@dataclass(frozen=True)
class Layout:
    """Names of a library's tensors, and what a model needs to give the library's numbers.

    Attributes:
        name: what `load_weights(layout=...)` calls it.
        detect: regular expressions; each must match the beginning of at least one key. None: that
            of the models' image classifiers.
        rules: tried in order behind those of the models' backbones (`registry.ModelEntry`), the
            first that matches a key renames it.
        options: builder options for the same numbers, from the state dict under its own names and
            what lies beside it.
        settings: what has to be set on the model beyond options, from the state dict under our
            names and what lies beside it.
        differs: why nothing gives the library's numbers, as `options`; empty where something does.
        untold: options that decide on the numbers and that names and shapes do not tell.
        notes: what a user should know; part of error messages and of `inspect_weights`.
        branches: pattern whose first group numbers the ASPP branches before image pooling, where
            the layout's names leave the index of the pooling branch open.
        lacks: pattern of keys of a model that the layout has no tensors for. Such a checkpoint
            loads with reset_head=True only.
        pins_defaults: the library offers no other dilation or upsampling than that of `options`
            and the builders' defaults, so that a model with another one is warned about.
    """

    name: str
    detect: tuple[str, ...]
    rules: tuple[Rule, ...]
    options: Callable[[Mapping[str, Tensor], Origin], dict[str, Any]] = lambda state, origin: {}
    settings: Callable[[Mapping[str, Tensor], Origin], Settings] = lambda state, origin: {}
    differs: Callable[[Mapping[str, Tensor], Origin], str] = lambda state, origin: ""
    untold: tuple[str, ...] = ()
    notes: str = ""
    branches: str = ""
    lacks: str = ""
    pins_defaults: bool = False

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """The rules of all backbones in this layout, then its own."""
        return (*registry.foreign_rules(self.name), *self.rules)

    def has(self, key: str) -> bool:
        """Whether a rule is about the key."""
        return any(re.fullmatch(rule.pattern, key) for rule in self.all_rules)


_OWN_KEYS = r"(?:backbone|classifier|aux_classifier)\..+"
_HEAD_KEYS = r"(?:aux_)?classifier\..+"
# Everything behind the ASPP, and the auxiliary head.
_DECODER_KEYS = r"classifier\.(?!0\.).+|aux_classifier\..+"

_OWN_UNTOLD = (
    "output_stride",
    "atrous_rates",
    "align_corners",
    "multi_grid",
    "contract_dilation",
)

_V3PLUS = "DeepLabv3+: its decoder has no counterpart here."

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="smp",
        detect=(r"encoder\.", r"decoder\.(aspp|0)\.convs\.", "segment"),
        rules=(
            Rule(r"encoder\.(?:model\.)?(.+)", r"backbone.\1"),
            Rule(r"decoder\.(?:aspp|0)\.(.+)", r"classifier.0.\1"),
            Rule(r"decoder\.(?:conv|1)\.(.+)", r"classifier.1.\1"),
            Rule(r"decoder\.(?:bn|2)\.(.+)", r"classifier.2.\1"),
            Rule(r"segmentation_head\.0\.(.+)", r"classifier.4.\1"),
            Rule(r"classification_head\..+", None),
        ),
        options=smp_options,
        differs=smp_differs,
        untold=("output_stride", "atrous_rates"),
        notes=(
            "segmentation-models-pytorch dilates without contraction and upsamples with "
            "align_corners=True. The output stride is in the config.json of save_pretrained, not "
            "in the weights: it is 8 unless encoder_output_stride was 16, which needs "
            "output_stride=16, atrous_rates=(12, 24, 36). A classification head (aux_params) is "
            "left out."
        ),
        pins_defaults=True,
    ),
    Layout(
        name="smp-v3plus",
        detect=(r"encoder\.", r"decoder\.aspp\.0\.convs\."),
        rules=(
            Rule(r"encoder\.(?:model\.)?(.+)", r"backbone.\1"),
            Rule(r"decoder\.aspp\.0\.(.+)", r"classifier.0.\1"),
            Rule(r"(?:decoder|segmentation_head|classification_head)\..+", None),
        ),
        options=smp_plus_options,
        untold=("output_stride", "atrous_rates"),
        notes=f"{_V3PLUS} Its separable ASPP (the default there) has no counterpart either.",
        lacks=_DECODER_KEYS,
    ),
    Layout(
        name="mmseg",
        detect=(r"backbone\.", r"decode_head\.aspp_modules\.0\.conv\.", r"decode_head\.bottleneck"),
        rules=(
            Rule(r"backbone\.(.+)", r"backbone.\1"),
            Rule(r"decode_head\.aspp_modules\.(\d+)\.conv\.(.+)", r"classifier.0.convs.\1.0.\2"),
            Rule(r"decode_head\.aspp_modules\.(\d+)\.bn\.(.+)", r"classifier.0.convs.\1.1.\2"),
            Rule(r"decode_head\.image_pool\.1\.conv\.(.+)", r"classifier.0.convs.{pool}.1.\1"),
            Rule(r"decode_head\.image_pool\.1\.bn\.(.+)", r"classifier.0.convs.{pool}.2.\1"),
            # The bottleneck reads image pooling first, the ASPP here last.
            Rule(
                r"decode_head\.bottleneck\.conv\.weight",
                "classifier.0.project.0.weight",
                pool_to_end,
            ),
            Rule(r"decode_head\.bottleneck\.bn\.(.+)", r"classifier.0.project.1.\1"),
            Rule(r"decode_head\.conv_seg\.(.+)", r"classifier.2.\1"),
            Rule(r"auxiliary_head\.convs\.0\.conv\.(.+)", r"aux_classifier.0.\1"),
            Rule(r"auxiliary_head\.convs\.0\.bn\.(.+)", r"aux_classifier.1.\1"),
            Rule(r"auxiliary_head\.conv_seg\.(.+)", r"aux_classifier.4.\1"),
            Rule(r"data_preprocessor\..+", None),
        ),
        options=mmseg_options,
        settings=mmseg_settings,
        differs=mmseg_differs,
        untold=("output_stride", "atrous_rates", "multi_grid", "align_corners"),
        notes=(
            "mmsegmentation: the config in a checkpoint's meta, or else the name of a published "
            "file, tells d8 from d16 (output_stride=16), multi-grid and the 769x769 configurations "
            "(align_corners=True); names and shapes of the tensors do not."
        ),
        branches=r"decode_head\.aspp_modules\.(\d+)\.",
    ),
    Layout(
        name="mmseg-v3plus",
        detect=(r"decode_head\.c1_bottleneck\.",),
        rules=(),
        notes=(
            "mmsegmentation's DeepLabv3+ has a separable ASPP and a decoder, which have no "
            "counterpart here."
        ),
    ),
    Layout(
        name="vainf",
        detect=(r"backbone\.", r"classifier\.classifier\.0\.convs\."),
        rules=(
            Rule(r"backbone\.(.+)", r"backbone.\1"),
            Rule(r"classifier\.classifier\.(.+)", r"classifier.\1"),
        ),
        options=vainf_options,
        untold=("output_stride",),
        notes=(
            "DeepLabV3Plus-Pytorch: the output stride is in the name of its files (_os16), not in "
            "the weights. Its builders default to 8, its training script to 16 (output_stride=16)."
        ),
        pins_defaults=True,
    ),
    Layout(
        name="vainf-v3plus",
        detect=(r"backbone\.", r"classifier\.aspp\.convs\."),
        rules=(
            Rule(r"backbone\.(.+)", r"backbone.\1"),
            Rule(r"classifier\.aspp\.(.+)", r"classifier.0.\1"),
            Rule(r"classifier\.(?:project|classifier)\..+", None),
        ),
        options=vainf_options,
        untold=("output_stride",),
        notes=_V3PLUS,
        lacks=_DECODER_KEYS,
    ),
    Layout(
        name="jfzhang95",
        detect=(r"backbone\.", r"aspp\.aspp1\.atrous_conv\.", r"decoder\."),
        rules=(
            Rule(r"backbone\.(.+)", r"backbone.\1"),
            *(
                rule
                for i in range(4)
                for rule in (
                    Rule(rf"aspp\.aspp{i + 1}\.atrous_conv\.(.+)", rf"classifier.0.convs.{i}.0.\1"),
                    Rule(rf"aspp\.aspp{i + 1}\.bn\.(.+)", rf"classifier.0.convs.{i}.1.\1"),
                )
            ),
            Rule(r"aspp\.global_avg_pool\.([12])\.(.+)", r"classifier.0.convs.4.\1.\2"),
            Rule(r"aspp\.conv1\.(.+)", r"classifier.0.project.0.\1"),
            Rule(r"aspp\.bn1\.(.+)", r"classifier.0.project.1.\1"),
            Rule(r"decoder\..+", None),
        ),
        untold=("output_stride",),
        options=lambda state, origin: {"multi_grid": (1, 2, 4), "contract_dilation": False},
        notes=(
            f"pytorch-deeplab-xception is {_V3PLUS} The output stride is not in the weights; its "
            "training script defaults to 16 (output_stride=16)."
        ),
        lacks=_DECODER_KEYS,
        pins_defaults=True,
    ),
    Layout(
        name="fregu856",
        detect=(r"resnet\.resnet\.0\.", r"resnet\.layer5\.", r"aspp\.conv_1x1_1\."),
        rules=(
            Rule(r"aspp\.conv_1x1_1\.(.+)", r"classifier.0.convs.0.0.\1"),
            Rule(r"aspp\.bn_conv_1x1_1\.(.+)", r"classifier.0.convs.0.1.\1"),
            Rule(r"aspp\.conv_3x3_([123])\.(.+)", r"classifier.0.convs.\1.0.\2"),
            Rule(r"aspp\.bn_conv_3x3_([123])\.(.+)", r"classifier.0.convs.\1.1.\2"),
            Rule(r"aspp\.conv_1x1_2\.(.+)", r"classifier.0.convs.4.1.\1"),
            Rule(r"aspp\.bn_conv_1x1_2\.(.+)", r"classifier.0.convs.4.2.\1"),
            Rule(r"aspp\.conv_1x1_3\.(.+)", r"classifier.0.project.0.\1"),
            Rule(r"aspp\.bn_conv_1x1_3\.(.+)", r"classifier.0.project.1.\1"),
            Rule(r"aspp\.conv_1x1_4\.(.+)", r"classifier.1.\1"),
        ),
        options=fregu856_options,
        notes="fregu856/deeplabv3 was trained on images in BGR order with the means of RGB.",
    ),
    Layout(
        name="tflite",
        detect=(r"MobilenetV2\.Conv\.", r"image_pooling\.", r"logits\.semantic\."),
        rules=(
            Rule(r"aspp(\d+)\.(.+)", r"classifier.0.convs.\1.0.\2"),
            Rule(r"image_pooling\.(.+)", r"classifier.0.convs.{pool}.1.\1"),
            # Its input channels are (image_pooling, aspp0, ...).
            Rule(r"concat_projection\.weight", "classifier.0.project.0.weight", pool_to_end),
            Rule(r"concat_projection\.bias", "classifier.0.project.0.bias"),
            Rule(r"logits\.semantic\.(.+)", r"classifier.1.\1"),
        ),
        options=tflite_options,
        untold=("output_stride",),
        notes=(
            "TensorFlow Lite weights, OIHW, batch norm folded; the output stride is not in them "
            "unless the file's header lists the ops."
        ),
        branches=r"aspp(\d+)\.",
    ),
    Layout(
        name="slim",
        detect=(r"MobilenetV2/Conv/", r"logits/semantic/"),
        rules=(
            Rule(
                r"global_step|.+/(?:Momentum|Adam(?:_1)?|RMSProp(?:_1)?|ExponentialMovingAverage)",
                None,
            ),
            *slim(r"aspp(\d+)", r"classifier.0.convs.\1.0", r"classifier.0.convs.\1.1"),
            *slim(r"image_pooling", r"classifier.0.convs.{pool}.1", r"classifier.0.convs.{pool}.2"),
            *slim(
                r"concat_projection",
                "classifier.0.project.0",
                "classifier.0.project.1",
                hwio_pool_to_end,
            ),
            Rule(r"logits/semantic/weights", "classifier.1.weight", hwio),
            Rule(r"logits/semantic/biases", "classifier.1.bias"),
        ),
        untold=("output_stride",),
        notes="TensorFlow DeepLab variables, HWIO; the output stride is not in the weights.",
        branches=r"aspp(\d+)[/_]",
    ),
    Layout(
        name="imagenet",
        detect=(),
        rules=(Rule(r"(?:fc|classifier)\..+", None),),
        notes="An image classifier: it has a backbone and no head.",
        lacks=_HEAD_KEYS,
    ),
    # Also WZMIAOMIAO's, a copy of torchvision.
    Layout(
        name="torchvision",
        detect=(
            r"backbone\.(conv1\.weight|0\.0\.weight)",
            r"classifier\.0\.convs\.",
            r"classifier\.4\.weight",
        ),
        rules=(Rule(f"({_OWN_KEYS})", r"\1"),),
        untold=_OWN_UNTOLD,
    ),
    Layout(
        name="deeplab_fast",
        detect=(r"backbone\.|classifier\.",),
        rules=(Rule(f"({_OWN_KEYS})", r"\1"),),
        untold=_OWN_UNTOLD,
    ),
)

# Tensors that training frameworks keep beside a model.
NOT_MODEL = re.compile(
    r"(?:criterion|loss(?:_\w+)?|metrics?|(?:train|val|test)_\w+)\..+|(?:.+\.)?n_averaged"
)


def layout_named(name: str) -> Layout:
    """The layout of that name; ValueError lists the names there are."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise ValueError(f"no layout is named {name!r}; there are: auto, {known}")


def known_layout(names: Iterable[str]) -> Layout | None:
    """The first layout whose names these are."""
    names = list(names)
    for layout in LAYOUTS:
        patterns = layout.detect or (registry.classifiers(),)
        if all(any(re.match(d, name) for name in names) for d in patterns):
            return layout
    return None


def detect_layout(state: Mapping[str, Tensor], label: str) -> Layout:
    """The first layout whose names a state dict has; CheckpointError, with `label`, for none."""
    layout = known_layout(state)
    if layout is not None:
        return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise CheckpointError(
        f"{label}: the names of its tensors are those of no known DeepLabv3 ({known}); it has "
        f"{shorten(list(state))}"
    )


@dataclass(frozen=True)
class Renamed:
    """A state dict under the names used here."""

    state: StateDict
    foreign: dict[str, str]
    unknown: tuple[str, ...]
    ignored: tuple[str, ...]


def rename_tensors(
    state: Mapping[str, Tensor],
    layout: Layout,
    label: str,
    rules: Sequence[Rule] | None = None,
) -> Renamed:
    """A state dict under our names; two keys for one are an error.

    Args:
        state, layout: under the layout's names.
        label: of the checkpoint, for messages.
        rules: in place of all that the layout has.
    """
    rules = layout.all_rules if rules is None else rules
    pool = 0
    if layout.branches:
        pool = len({m[1] for key in state if (m := re.match(layout.branches, key))})
    renamed: StateDict = {}
    foreign: dict[str, str] = {}
    unknown, ignored = [], []
    for key, tensor in state.items():
        if NOT_MODEL.fullmatch(key):
            ignored.append(key)
            continue
        rule, match = next(
            ((r, m) for r in rules if (m := re.fullmatch(r.pattern, key))), (None, None)
        )
        if rule is None or match is None:
            unknown.append(key)
        elif rule.target is None:
            ignored.append(key)
        else:
            target = match.expand(rule.target).format(pool=pool)
            if target in renamed:
                raise CheckpointError(
                    f"{label}: {foreign[target]} and {key} are both {target} here; one is too many"
                )
            renamed[target] = rule.transform(tensor, pool) if rule.transform else tensor
            foreign[target] = key
    return Renamed(renamed, foreign, tuple(unknown), tuple(ignored))
