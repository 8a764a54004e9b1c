"""Options of training: what they stand for, and what is said of those that do not fit."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from deeplab_fast import testing

testing.import_torchvision()

from lightning.pytorch import Callback  # noqa: E402

from deeplab_fast.data.check import DataError  # noqa: E402
from deeplab_fast.data.transforms import AugmentedDataset  # noqa: E402
from deeplab_fast.engine.augment import ColourJitter  # noqa: E402
from deeplab_fast.engine.config import (  # noqa: E402
    PRESETS,
    OptionError,
    TrainConfig,
    to_yaml,
    train_config,
)
from deeplab_fast.engine.datamodule import (  # noqa: E402
    SegmentationData,
    TrainBatches,
    permutation,
)
from deeplab_fast.engine.run_folder import check_resumable, run_config  # noqa: E402
from deeplab_fast.engine.sources import open_training, training_transform  # noqa: E402
from deeplab_fast.engine.train import fit, fit_stages, second_stage  # noqa: E402
from deeplab_fast.engine.trainer import trainer_arguments  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_second_stage_of_a_preset():
    plan = train_config("paper", data="voc", root="somewhere", output="run")
    two = second_stage(plan, "run/stage1/model.safetensors", {"steps": 10_000})
    assert (two.lr, two.output_stride, two.steps) == (pytest.approx(0.0007), 8, 10_000)
    # multi_grid belongs to the model, whatever the stride.
    assert two.model_options == {"head": "paper", "multi_grid": [1, 2, 4]}
    assert two.weights_backbone is None
    # Objects in the trainer's arguments stay objects.
    callback = Callback()
    with_object = plan.replace(trainer={"callbacks": [callback]})
    assert second_stage(with_object, "a.safetensors", {}).trainer["callbacks"] == [callback]


def test_batches_are_the_same_images_for_any_number_of_processes():
    def parts_of(world, accumulate, epoch):
        batches = [
            TrainBatches(26, 8, accumulate=accumulate, rank=rank, world=world, seed=5)
            for rank in range(world)
        ]
        for each in batches:
            each.set_epoch(epoch)
        assert {len(each) for each in batches} == {3 * accumulate}
        lists = [list(each) for each in batches]
        # Micro-batch by micro-batch, process by process.
        flat = [i for micro in zip(*lists, strict=True) for share in micro for i in share]
        assert all(len(share) == 8 // (world * accumulate) for own in lists for share in own)
        return flat

    whole = parts_of(1, 1, 0)
    assert len(whole) == len(set(whole)) == 24
    assert whole == permutation(26, 5, 0)[:24].tolist()
    for world, accumulate in ((2, 1), (1, 4), (2, 2), (8, 1)):
        assert parts_of(world, accumulate, 0) == whole
    assert parts_of(1, 1, 1) != whole
    # Both other images have their turn.
    seen = set().union(*(parts_of(1, 1, epoch) for epoch in range(20)))
    assert seen == set(range(26))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((10, 6, 4, 1), "a multiple of 4", id="parts"),
        pytest.param((10, 6, 1, 4), "a multiple of 4", id="processes"),
        pytest.param((5, 6, 1, 1), "use at most 5", id="more than there are"),
    ],
)
def test_batches_that_do_not_divide(arguments, message):
    length, size, accumulate, world = arguments
    with pytest.raises(ValueError, match=message):
        TrainBatches(length, size, accumulate=accumulate, world=world)


def test_transform_by_import_path(tiny, config):
    made = training_transform(
        config.replace(
            transform="deeplab_fast.data.transforms.Crop", transform_options={"size": [8, 16]}
        )
    )
    image, label = tiny.scene(0)
    assert AugmentedDataset([(image, label)], made)[0][0].shape == (3, 8, 16)
    for path, message in (
        ("Crop", "an import path"),
        ("deeplab_fast.nowhere.Crop", "deeplab_fast.nowhere"),
        ("deeplab_fast.data.transforms.Crup", "Crup"),
        ("deeplab_fast.data.transforms.Crop", "size"),
    ):
        with pytest.raises(ValueError, match=message):
            training_transform(config.replace(transform=path))


def test_colour_jitter(tiny):
    image, label = tiny.scene(1)
    generator = torch.Generator().manual_seed(0)
    same_image, same_label = ColourJitter()(image, label, generator)
    assert same_image is image and same_label is label
    grey = np.full((8, 8, 3), 100, np.uint8)
    for i in range(20):
        # Grey has no colour to change and equals its mean: all but brightness leave it alone.
        changed, _ = ColourJitter(0, 0.9, 0.9, 0.5)(grey, label, generator)
        np.testing.assert_allclose(changed.astype(int), 100, atol=1, err_msg=str(i))
    bright = [
        int(ColourJitter(brightness=0.5)(grey, label, generator)[0][0, 0, 0]) for _ in range(200)
    ]
    assert 50 <= min(bright) < 60 and 140 < max(bright) <= 150
    assert abs(np.mean(bright) - 100) < 10
    with pytest.raises(ValueError, match=r"hue is 0\.6"):
        ColourJitter(hue=0.6)


def test_copy_paste_takes_classes_of_the_data(config):
    data = SegmentationData(config.replace(copy_paste=["2", 1], copy_paste_probability=1.0))
    dataset = data.augmented()
    plain = SegmentationData(config).augmented()
    labels = [(dataset[i][1], plain[i][1]) for i in range(4)]
    changed = [new[new != old] for new, old in labels]
    assert any(len(each) for each in changed)
    assert all(set(each.tolist()) <= {1, 2} for each in changed)
    with pytest.raises(OptionError, match=r"copy_paste has unknown classes \['bird'\]; known: 0"):
        SegmentationData(config.replace(copy_paste=["bird"]))


def test_presets_are_the_published_numbers():
    paper = train_config("paper", data="voc")
    assert (paper.lr, paper.momentum, paper.power, paper.batch_size) == (0.007, 0.9, 0.9, 16)
    assert (paper.steps, paper.epochs, paper.crop, paper.scale) == (30_000, None, 513, [0.5, 2.0])
    assert (paper.output_stride, paper.eval_output_stride) == (16, 8)
    assert paper.batch_norm_momentum == pytest.approx(1 - 0.9997)
    two = train_config("paper-stage2", data="voc")
    assert two.freeze_batch_norm and two.output_stride == 8 and two.lr == 0.001
    city = train_config("paper", data="cityscapes")
    assert (city.crop, city.steps) == (769, 90_000)
    tv = train_config("torchvision")
    assert (tv.aux_weight, tv.aux_lr_factor, tv.crop, tv.base_size) == (0.5, 10.0, 480, 520)
    # What is given goes before; another model has none of the preset's builder options.
    own = train_config("paper", epochs=5, lr=0.1, model="tiny_deeplabv3")
    assert (own.epochs, own.steps, own.lr, own.model_options) == (5, None, 0.1, {})
    for name in PRESETS:
        assert isinstance(train_config(name), TrainConfig)
    # Its split and its names of classes are those of its data.
    camvid, other = train_config("camvid"), train_config("camvid", data="folder")
    assert (camvid.split, camvid.val_every, len(camvid.copy_paste)) == ("trainval", 0, 6)
    assert (other.split, other.val_every, other.copy_paste) == ("train", 1, [])
    with pytest.raises(ValueError, match=r"preset is 'papr', .*did you mean 'paper'\?"):
        train_config("papr")
    with pytest.raises(ValueError, match="learning_rate is no option of a training run"):
        train_config(learning_rate=1)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("batch_size", 0, "batch_size is 0, expected 1 to 65536"),
        ("accumulate", 3, "must divide into equal parts"),
        ("lr", 0, "lr is 0, expected above 0"),
        ("lr", float("nan"), "lr is nan"),
        ("ema", 1.0, "ema is 1.0"),
        ("output_stride", 4, "expected 8 or 16"),
        ("crop", [8], None),
        ("crop", [8, 8, 8], "crop is"),
        ("scale", [2.0, 0.5], "scale is"),
        ("steps", 5, "give one of them"),
        ("optimizer", "lion", "sgd or adamw"),
        ("max_time", "soon", "max_time is 'soon'"),
        ("flip", 1.5, "flip is 1.5"),
        ("clip_norm", 0.0, "clip_norm"),
        ("batch_norm_momentum", 2.0, "batch_norm_momentum"),
        ("export", "first", "last or best"),
        ("undo_class_weights", 1.5, "0 to 1"),
        ("copy_paste_probability", -0.1, "0 to 1"),
        ("input_size", -1, "0 to 16384, or null"),
    ],
)
def test_options_out_of_range(config, option, value, message):
    if message is None:
        assert config.replace(**{option: value}) is not None
        return
    with pytest.raises(ValueError, match=message):
        config.replace(**{option: value})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90m", 5400), ("1.5h", 5400), ("3600s", 3600), ("01:30:00", 5400), ("2:30", 150)),
        # Lightning's own form, whose hours may be more than a day.
        *(("00:12:00:00", 43200), ("1:02:03:04", 93784), ("00:36:00:00", 129600), ("7", 7)),
    ],
)
def test_wall_times(text, seconds):
    assert TrainConfig(max_time=text).max_seconds == seconds


def test_wrong_labels_stop_before_anything_is_written(tiny, config, tmp_path):
    root = tiny.write_scenes(tmp_path / "bad", 4)
    from PIL import Image

    label = np.asarray(Image.open(root / "masks" / "s02.png")).copy()
    label[10, 10] = 9
    Image.fromarray(label).save(root / "masks" / "s02.png")
    bad = config.replace(root=str(root), check_data=True)
    with pytest.raises(DataError, match=r"s02\.png: label 9 \(1 pixel\)"):
        fit(bad)
    assert not Path(bad.output).exists()
    # Without the check the batch that has it stops the run, with the same path.
    with pytest.raises(ValueError, match=r"s02\.png: label 9"):
        fit(bad.replace(check_data=False))


def test_things_that_do_not_fit_together(config, tmp_path):
    with pytest.raises(ValueError, match="output is missing"):
        fit(config.replace(output=None))
    with pytest.raises(ValueError, match="epochs or steps is missing"):
        fit(config.replace(epochs=None))
    with pytest.raises(ValueError, match="use at most 12"):
        fit(config.replace(batch_size=16))
    with pytest.raises(ValueError, match=r"trainer\.max_epochs is set by the options"):
        fit(config.replace(trainer={"max_epochs": 3}))
    with pytest.raises(ValueError, match="did you mean 'precision'"):
        fit(config.replace(trainer={"precison": "bf16-mixed"}))
    with pytest.raises(ValueError, match="stages is 3"):
        fit_stages(config, stages=3)
    with pytest.raises(ValueError, match="stages is 1"):
        fit_stages(config, stage2={"lr": 1.0})
    other = tmp_path / "names.txt"
    other.write_text("a\nb\nc\nd\n")
    data = open_training(config.replace(classes=str(other)))
    with pytest.raises(ValueError, match="they must be the same"):
        SegmentationData(config, train=open_training(config), val=data)
    fit(config.replace(epochs=1))
    with pytest.raises(ValueError, match="holds a run already"):
        fit(config)


def test_options_of_a_later_version_are_no_change(config, tmp_path):
    plain = {k: v for k, v in config.as_dict().items() if k not in ("focal_gamma", "label_map")}
    path = tmp_path / "last.ckpt"
    rest = {"state_dict": {}, "optimizer_states": [{}], "lr_schedulers": [{}], "loops": {}}
    torch.save({"global_step": 1, "epoch": 0, "train_config": plain, **rest}, path)
    told = []
    check_resumable(path, config, told.append)
    assert told == []
    check_resumable(path, config.replace(focal_gamma=1.0), told.append)
    assert "focal_gamma 2.0 -> 1.0" in told[0] and "label_map" not in told[0]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        pytest.param("seed", 2**64, "-9223372036854775808 to 18446744073709551615", id="64 bits"),
        pytest.param("seed", 10**5000, "a int too long to show, expected", id="digits"),
        pytest.param("split_seed", -(2**63) - 1, "18446744073709551615, or null", id="below"),
        pytest.param("crop", 10**9, "a side of 1 to 16384 pixels", id="crop"),
        pytest.param("crop", [32, 10**9], "a side of 1 to 16384 pixels", id="a side of two"),
        pytest.param("input_size", 10**9, "0 to 16384, or null", id="photos"),
        pytest.param("base_size", 0, "1 to 16384", id="no pixels"),
        pytest.param("workers", 10**6, "0 to 1024", id="processes that read"),
        pytest.param("batch_size", 10**9, "1 to 65536", id="images"),
        pytest.param("accumulate", 0, "1 to 65536", id="parts"),
        pytest.param("bootstrap_factor", 10**9, "1 to 1000", id="copies"),
        pytest.param("steps", 10**10, "1 to 1000000000, or null", id="steps"),
        pytest.param("scale", [0.5, 1e9], "0 < low <= high <= 64", id="scale"),
        pytest.param("scale", [0.5, float("nan")], "0 < low <= high <= 64", id="nan in a list"),
        pytest.param("scale_step", 1e-300, "0.001 to 64, or null", id="endless steps"),
        pytest.param("lr", float("inf"), "above 0, finite", id="inf"),
        pytest.param("lr", 10**400, "above 0, finite", id="an integer beyond floats"),
        pytest.param("weight_decay", float("nan"), "0 or more, finite", id="nan"),
        pytest.param("momentum", float("nan"), "0 or more and below 1", id="nan in an interval"),
        pytest.param(
            "clip_norm", float("nan"), r"above 0, or inf \(\.inf in YAML\)", id="nan, optional"
        ),
        pytest.param("clip_norm", -float("inf"), r", or inf \(.*\), or null", id="-inf"),
        pytest.param("checkpoint_minutes", 1e300, "0 to 5.256e\\+06", id="minutes"),
        pytest.param("label_smoothing", 1.0, "0 or more and below 1", id="open end"),
        pytest.param("class_weights", [1.0, float("inf")], "weights of 0 or more", id="weights"),
        pytest.param("class_weights", [], "weights of 0 or more", id="no weights"),
        pytest.param("max_time", "99:99:99", "minutes and seconds below 60", id="no time"),
        pytest.param("max_time", "inf", "3650 days at most", id="for ever"),
        pytest.param("max_time", "1e400", "3650 days at most", id="longer than floats"),
        pytest.param("max_time", "1:00:00:00:00", "hours, minutes", id="five parts"),
        pytest.param("max_time", "1:00:60:00", "days first", id="60 minutes"),
        pytest.param("max_time", "-1:48:00:00", "days first", id="days below 0"),
        pytest.param("max_time", "5000:00:00:00", "3650 days at most", id="days"),
        pytest.param("scale_step", 0, "0.001 to 64, or null", id="no step"),
        pytest.param("transform_options", {"a": 1}, "nothing beside transform paper", id="unused"),
        pytest.param("model_options", [1], "expected a map of names to values", id="no map"),
        pytest.param("freeze", "backbone", "expected a list of texts", id="no list"),
        pytest.param("lr", "fast", "is 'fast', expected a number", id="no number"),
        pytest.param("epochs", True, "is True, expected an integer or null", id="no integer"),
        pytest.param("root", "a\0b", "expected a text or null", id="no name of a file"),
    ],
)
def test_absurd_values_are_refused_with_their_range(name, value, expected):
    with pytest.raises(OptionError, match=expected) as caught:
        train_config(**{name: value})
    assert str(caught.value).startswith(f"{name} is ") and len(str(caught.value)) < 500


def test_numpys_numbers_are_pythons(config):
    """In lists and maps too, so that a record of them is what YAML and JSON have."""
    given = {
        "epochs": np.int64(5),
        "batch_size": np.uint8(4),
        "lr": np.float64(0.5),
        "momentum": np.float32(0.25),
        "weight_decay": np.longdouble(0.125),
        "power": np.int32(1),
        "flip": np.array(0.5),
        "fused": np.bool_(False),
        "model": np.str_("deeplabv3_resnet50"),
        "crop": [np.int64(32), 48],
        "scale": (np.float32(0.5), 2),
        "class_weights": [np.float64(1), np.float32(2)],
        "classes": np.int64(3),
        "model_options": {"aspp_channels": np.int64(16), "rates": [np.int8(6), 12]},
    }
    made = TrainConfig(**given)
    assert yaml.safe_load(to_yaml(made.as_dict())) == json.loads(json.dumps(made.as_dict()))
    for name, value in given.items():
        found = getattr(made, name)
        assert found == value, name
        for each in found if isinstance(found, (list, tuple)) else [found]:
            assert type(each) in (int, float, bool, str, dict), name
    assert type(made.epochs) is int and type(made.power) is int and made.fused is False
    assert list(map(type, made.model_options["rates"])) == [int, int]
    # Nothing else becomes another object.
    callbacks = [Callback()]
    assert TrainConfig(trainer={"callbacks": callbacks}).trainer["callbacks"] is callbacks
    for value in (np.float64(5), np.array([5]), np.datetime64(5, "s"), np.complex64(5)):
        with pytest.raises(OptionError, match=r"epochs is .*, expected an integer or null"):
            TrainConfig(epochs=value)
    with pytest.raises(OptionError, match="lr is nan"):
        TrainConfig(lr=np.float32("nan"))


def test_an_endless_norm_clips_nothing(config, tmp_path):
    """PyTorch's way to have norms measured only."""
    one = fit(config.replace(epochs=1, clip_norm=float("inf"), output=str(tmp_path / "a")))
    two = fit(config.replace(epochs=1, output=str(tmp_path / "b")))
    assert run_config(one.folder).clip_norm == float("inf")
    a, b = (load_file(each.weights) for each in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("given", ["01:30:00", "90:00", "5400s", "90m", "1.5h", "5400"])
def test_times_that_are_alike(given):
    assert train_config(max_time=given).max_seconds == 5400


@pytest.mark.parametrize(
    ("arguments", "option", "expected"),
    [
        pytest.param({"devices": 100_000}, "trainer.devices", "expected 1 to ", id="processes"),
        pytest.param({"devices": "9" * 5000}, "trainer.devices", "expected 1 to ", id="digits"),
        pytest.param({"devices": 0}, "trainer.devices", "expected 1 to ", id="none"),
        pytest.param({"devices": []}, "trainer.devices", "expected 1 to ", id="none of a list"),
        pytest.param(
            {"devices": list(range(100_000))}, "trainer.devices", "expected 1 to ", id="a list"
        ),
        pytest.param(
            {"devices": 1000 * (os.cpu_count() or 1)}, "trainer.devices", "processes", id="many"
        ),
        pytest.param({"num_nodes": 10**9}, "trainer.num_nodes", "1 to 10000 machines", id="nodes"),
        pytest.param({"accelerator": "tpu"}, "trainer", "does not fit", id="not there"),
    ],
)
def test_devices_that_are_not_there(arguments, option, expected, tmp_path):
    config = TrainConfig(trainer={"accelerator": "cpu", **arguments})
    with pytest.raises(OptionError, match=expected) as caught:
        trainer_arguments(config, tmp_path)
    assert caught.value.option == option and len(str(caught.value)) < 500


@pytest.mark.parametrize("devices", [4, "8"])
def test_more_processes_than_cpus(monkeypatch, tmp_path, devices):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    config = TrainConfig(trainer={"accelerator": "cpu", "devices": devices})
    assert trainer_arguments(config, tmp_path)["devices"] == devices
