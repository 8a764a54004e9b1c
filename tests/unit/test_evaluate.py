"""Evaluation against the same worked out by hand, over processes, and through the command line."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import deeplab_fast as dlf
from deeplab_fast import ops
from deeplab_fast.data.classes import generic_classes
from deeplab_fast.data.datasets import open_dataset
from deeplab_fast.data.preprocess import Preprocess
from deeplab_fast.data.transforms import AugmentedDataset, resize_pair
from deeplab_fast.engine import counting, pictures
from deeplab_fast.engine import evaluate as module
from deeplab_fast.engine.evaluate import ShardSampler, confusion_image, evaluate
from deeplab_fast.engine.finite import NotFiniteWarning
from deeplab_fast.engine.predict import predict

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 4

pytestmark = pytest.mark.usefixtures("one_thread")


class Small(nn.Module):
    """One convolution, with the interface that evaluation asks for."""

    def __init__(self, stride=4, num_classes=CLASSES, size=None):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        kernel = 2 * stride - 1
        self.conv = nn.Conv2d(3, num_classes, kernel, stride, padding=kernel // 2)
        with torch.no_grad():
            weight = torch.randn(self.conv.weight.shape, generator=generator)
            self.conv.weight.copy_(weight * 3 / kernel)
            self.conv.bias.zero_()
        self.norm = nn.BatchNorm2d(num_classes)
        self.num_classes = num_classes
        self.align_corners = False
        self.preprocess = Preprocess(size=size)

    def exact(self):
        """Whole numbers below 2^24 throughout: equal in any batch and number of threads."""
        with torch.no_grad():
            self.conv.weight.mul_(8).round_()
        self.norm.eps = 0
        self.preprocess = Preprocess(mean=(0, 0, 0), std=(1 / 255,) * 3)
        return self

    def forward_logits(self, x):
        assert torch.is_inference_mode_enabled() and not self.norm.training
        return self.norm(self.conv(x))


def scene(height, width, seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    label = rng.integers(0, CLASSES, (4, 5)).repeat(height, 0).repeat(width, 1)[::4, ::5]
    label = label[:height, :width].astype(np.uint8)
    label[rng.random((height, width)) < 0.1] = 255
    return image, label


# Two sizes, and an odd number for two processes.
SIZES = [(24, 32), (24, 32), (30, 20), (24, 32), (30, 20)]


class Scenes(Dataset):
    classes = generic_classes(CLASSES)
    num_classes = CLASSES
    ignore_index = 255
    name = "scenes"

    def __init__(self, sizes=SIZES):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return scene(*self.sizes[index], seed=index)


def count(target, labels):
    """The matrix, pixel by pixel of the definition."""
    matrix = np.zeros((CLASSES, CLASSES), np.int64)
    valid = target != 255
    np.add.at(matrix, (target[valid], labels[valid]), 1)
    return matrix


def by_hand(model, dataset, **options):
    parts = [count(label, predict(model, image, **options)) for image, label in dataset]
    return sum(parts), parts


def test_how_far_it_is_is_told(monkeypatch):
    monkeypatch.setattr(counting, "_SECONDS", 0.0)
    lines = []
    options = {"tile": (16, 20), "overlap": 0, "tell": lines.append}
    evaluate(Small(), Scenes(), progress=True, **options)
    told = [re.sub(r"[\d.]+ (ms|s) an image, [\d:]+ left", "PACE", line) for line in lines]
    told = [re.sub(r", [\d:]+ left", "", line) for line in told]
    # Images of 24x32 have four windows, of 30x20 two; the last of each, and of all, is no news.
    assert told[:6] == [
        "0/5 images, window 1/4 of the next",
        "0/5 images, window 2/4 of the next",
        "0/5 images, window 3/4 of the next",
        "1/5 images, PACE",
        "1/5 images, window 1/4 of the next",
        "1/5 images, window 2/4 of the next",
    ]
    assert told[-2:] == ["4/5 images, PACE", "4/5 images, window 1/2 of the next"]
    lines.clear()
    evaluate(Small(), Scenes(), progress=False, **options)
    assert lines == []


OPTIONS = [
    pytest.param({}, id="single"),
    pytest.param({"scales": (0.75,)}, id="one-other-scale"),
    pytest.param({"scales": (0.5, 1.0, 1.5), "flip": True}, id="scales-flip"),
    pytest.param({"tile": (16, 20), "overlap": 0.5}, id="windows"),
    pytest.param({"tile": (24, 32)}, id="windows-that-some-images-fit"),
    pytest.param({"tile": 16, "flip": True, "scales": (1.0, 1.5)}, id="windows-scales"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [None, 28])
def test_counts_are_those_of_predict(options, size):
    model, dataset = Small(size=size), Scenes()
    result = evaluate(model, dataset, **options)
    expected, parts = by_hand(model, dataset, **options)
    np.testing.assert_array_equal(result.confusion, expected)
    assert result.confusion.dtype == np.int64
    assert (expected.sum(0) > 0).sum() >= 3, "the test's model gives too few classes"
    for i, (row, part) in enumerate(zip(result.images, parts, strict=True)):
        hits, union = np.diag(part), part.sum(0) + part.sum(1) - np.diag(part)
        assert (row.index, row.name, row.pixels) == (i, f"sample {i}", part.sum())
        assert row.miou == pytest.approx((hits[union > 0] / union[union > 0]).mean())
        assert row.pixel_accuracy == pytest.approx(hits.sum() / part.sum())


@pytest.mark.parametrize(
    ("batch_size", "workers"), [pytest.param(2, 0, id="batches"), pytest.param(3, 2, id="workers")]
)
def test_batches_and_workers_change_nothing(batch_size, workers):
    model = Small().exact()
    alone = evaluate(model, Scenes())
    together = evaluate(model, Scenes(), batch_size=batch_size, workers=workers)
    np.testing.assert_array_equal(alone.confusion, together.confusion)
    assert alone.images == together.images


def test_full_size_logits_are_never_made(monkeypatch):
    seen = []
    original = ops.upsample_confusion

    def recorded(logits, target, **options):
        seen.append((tuple(logits.shape), tuple(target.shape)))
        return original(logits, target, **options)

    monkeypatch.setattr(ops, "upsample_confusion", recorded)
    monkeypatch.setattr(ops, "upsample_argmax", None)
    monkeypatch.setattr(ops, "upsample_softmax_add", None)
    evaluate(Small(), Scenes([(24, 32), (30, 20)]))
    assert seen == [((1, 4, 6, 8), (1, 24, 32)), ((1, 4, 8, 5), (1, 30, 20))]


def test_against_interpolate_and_argmax():
    model, dataset = Small().double(), Scenes([(24, 32)])
    image, label = dataset[0]
    result = evaluate(model, dataset)
    model.eval()
    with torch.inference_mode():
        logits = model.forward_logits(model.preprocess(image).double())
        labels = F.interpolate(logits, label.shape, mode="bilinear").argmax(1)[0].numpy()
    np.testing.assert_array_equal(result.confusion, count(label, labels))


def test_float_pictures_are_taken_as_normalised():
    model, dataset = Small(), Scenes([(24, 32)])

    class Floats(Scenes):
        def __getitem__(self, index):
            image, label = dataset[index]
            return model.preprocess(image)[0], torch.from_numpy(label).long()

    expected = evaluate(model, dataset).confusion
    with pytest.warns(UserWarning, match="no panels: the data set gives normalised floats"):
        result = evaluate(model, Floats([(24, 32)]), panels=1)
    np.testing.assert_array_equal(result.confusion, expected)
    augmented = AugmentedDataset(dataset)
    np.testing.assert_array_equal(evaluate(model, augmented).confusion, expected)


def test_modes_and_output_stride_are_restored():
    model = dlf.deeplabv3_mobilenet_v2_tf(num_classes=CLASSES, width=0.25, aspp_channels=8)
    model.train()
    model.backbone.eval()
    config = model.config
    seen = []
    model.classifier.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[-1]))
    at_16 = evaluate(model, Scenes([(64, 64)]))
    at_8 = evaluate(model, Scenes([(64, 64)]), output_stride=8)
    assert seen == [4, 8]
    assert (at_16.settings["output_stride"], at_8.settings["output_stride"]) == (16, 8)
    assert model.output_stride == 16 and model.config == config
    assert model.training and not model.backbone.training
    with pytest.raises(ValueError, match="8 or 16, got 4"):
        evaluate(model, Scenes([(64, 64)]), output_stride=4)

    class Broken(Scenes):
        def __getitem__(self, index):
            raise ValueError("no sample")

    with pytest.raises(ValueError, match="no sample"):
        evaluate(model, Broken(), output_stride=8)
    assert model.output_stride == 16 and model.training
    with pytest.raises(ValueError, match="Small cannot change its output stride"):
        evaluate(Small(), Scenes(), output_stride=8)


def test_an_image_that_is_ignored_whole_and_absent_classes():
    class Partly(Scenes):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, np.full_like(label, 255 if index == 0 else 2)

    model = Small()
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.bias.copy_(torch.tensor([0.0, 1, 0, 0]))
    result = evaluate(model, Partly(SIZES[:2]), panels=2)
    assert math.isnan(result.images[0].miou) and result.images[0].pixels == 0
    assert result.metrics.absent == ("class 0", "class 3") and result.metrics.miou == 0
    # An image without a score is neither worst nor best, and none is both.
    assert [(p.kind, p.score.index) for p in result.panels] == [("worst", 1)]
    assert result.as_dict()["images"][0]["miou"] is None


def test_panels_are_the_worst_and_the_best():
    model, dataset = Small(), Scenes()
    result = evaluate(model, dataset, panels=2, scales=(0.5, 1.0))
    order = sorted(range(5), key=lambda i: result.images[i].miou)
    assert [(p.kind, p.rank, p.score.index) for p in result.panels] == [
        ("worst", 1, order[0]),
        ("worst", 2, order[1]),
        ("best", 1, order[4]),
        ("best", 2, order[3]),
    ]
    for panel in result.panels:
        image, label = dataset[panel.score.index]
        np.testing.assert_array_equal(panel.image, image)
        np.testing.assert_array_equal(panel.truth, label)
        expected = predict(model, image, scales=(0.5, 1.0))
        np.testing.assert_array_equal(panel.prediction, expected)


def test_saved_files(tmp_path):
    result = evaluate(Small(), Scenes(), panels=1)
    paths = result.save(tmp_path / "new" / "out", builder="small")
    out = tmp_path / "new" / "out"
    content = json.loads((out / "metrics.json").read_text())
    assert paths["metrics"] == out / "metrics.json"
    assert content["builder"] == "small" and content["miou"] == result.metrics.miou
    assert content["confusion"] == result.confusion.tolist()
    assert content["settings"]["samples"] == 5 and len(content["images"]) == 5
    names = {entry["file"] for entry in content["panels"]}
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert written == {"metrics.json", "confusion.png", *names} and len(names) == 2
    for entry in content["panels"]:
        # The longer side is at least 320.
        height, width = (side * 320 // max(SIZES[entry["index"]]) for side in SIZES[entry["index"]])
        with Image.open(out / entry["file"]) as image:
            # The title, three pictures with gaps of 6 under a headline of 20, the legend.
            assert image.width >= 3 * width + 12 and image.height > height + 20
            pixels = np.asarray(image)[:, :width]
        photo, _ = resize_pair(*Scenes()[entry["index"]], (height, width))
        places = range(len(pixels) - height)
        assert any(np.array_equal(pixels[top : top + height], photo) for top in places)


def test_a_failed_write_leaves_nothing_half_written(tmp_path, monkeypatch):
    result = evaluate(Small(), Scenes(), panels=1)
    result.save(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "png_writer", lambda image: full)
    with pytest.raises(OSError, match="No space left"):
        result.save(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("classes", [2, 40])
def test_confusion_picture(classes):
    matrix = np.zeros((classes, classes), np.int64)
    matrix[0, 1] = 5
    names = [f"class {i}" for i in range(classes)]
    image = np.asarray(confusion_image(matrix, names, "weights"))
    # Of 40 classes the 38 that occur nowhere are left out.
    cell, shown = 36, 2
    size = shown * cell
    heat = image[-size - 8 : -8, -size - 8 : -8]
    corners = heat[2::cell, 2::cell]
    # All of row 0 went to class 1; rows without pixels are grey.
    assert (corners[0, 1] == (8, 48, 107)).all() and (corners[0, 0] == 255).all()
    assert (corners[1:] == 224).all()


def test_words_of_the_confusion_picture(monkeypatch):
    matrix = np.zeros((40, 40), np.int64)
    matrix[3, 3], matrix[3, 39] = 3, 1
    lines = []
    monkeypatch.setattr(
        pictures, "text_image", lambda text, *a: lines.extend(text) or Image.new("RGB", (9, 9))
    )
    confusion_image(matrix, [f"c{i}" for i in range(40)], "run/model.safetensors")
    left_out = ", ".join(f"c{i}" for i in range(40) if i not in (3, 39))
    # IoU 3/4 and 0.
    assert lines == [
        "run/model.safetensors",
        "mIoU 37.50 % of 2 of 40 classes",
        "rows: labels with their IoU in %; columns: predictions; % of the row",
        f"Left out, in neither labels nor predictions: {left_out}",
    ]


def test_labels_that_are_no_class_name_the_file(tiny, tmp_path):
    tiny.write_scenes(tmp_path, 3)
    bad = tmp_path / "masks" / "s01.png"
    Image.fromarray(np.full((40, 48), 9, np.uint8)).save(bad)
    dataset = open_dataset("folder", tmp_path, classes=CLASSES)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"s01\.png: label 9 \(1920 pixels\), outside"):
            evaluate(Small(), dataset, workers=workers)
    bad.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"s01\.png"):
        evaluate(Small(), dataset, workers=1)


def test_out_of_memory_says_where_and_what_to_lower():
    class Large(Small):
        def forward_logits(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryError, match=r"sample 0, sample 1 \(32x24 pixels\); use a smaller"):
        evaluate(Large(), Scenes(), batch_size=2)

    class Wrong(Small):
        def forward_logits(self, x):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        evaluate(Wrong(), Scenes())


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        pytest.param({}, {"panels": -1}, "panels is -1", id="panels"),
        pytest.param({}, {"scales": ()}, "scales is", id="scales"),
        pytest.param({"classes": ("a",)}, {}, "without classes", id="no-class-set"),
        pytest.param({"classes": generic_classes(5)}, {}, "model has 4 classes .* 5", id="count"),
        pytest.param({"sizes": []}, {}, "is empty", id="empty"),
    ],
)
def test_what_cannot_be_evaluated(change, options, message):
    dataset = Scenes()
    for name, value in change.items():
        setattr(dataset, name, value)
    with pytest.raises(ValueError, match=message):
        evaluate(Small(), dataset, **options)


class Spoilt(Small):
    """NaN in one logit of every image that is dark in its first pixel."""

    def forward_logits(self, x):
        logits = super().forward_logits(x)
        dark = x[:, 0, 0, 0] < 0
        logits[dark, 0, 1, 2] = math.nan
        return logits


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="single"),
        pytest.param({"flip": True}, id="flip"),
        pytest.param({"batch_size": 2}, id="batches"),
    ],
)
@pytest.mark.parametrize("classes", [1, CLASSES])
def test_a_broken_model_is_not_scored_in_silence(tmp_path, options, classes):
    model = Spoilt(num_classes=classes)

    class Some(Scenes):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            image = image.copy()
            image[0, [0, -1]] = 0 if index in (1, 4) else 255
            return image, label if classes > 1 else np.where(label == 255, 255, label & 1)

    dataset = Some()
    if classes == 1:
        dataset.classes, dataset.num_classes = generic_classes(1).of_labels(), 2
    expected = {}
    for i in (1, 4):
        logits = torch.zeros(1, 1, *(n // 4 if n % 4 == 0 else n // 4 + 1 for n in SIZES[i]))
        logits[..., 1, 2] = math.nan
        bad = F.interpolate(logits, SIZES[i], mode="bilinear").isnan()
        bad = bad | bad.flip(-1) if "flip" in options else bad
        expected[f"sample {i}"] = int(bad.sum())
    with pytest.warns(NotFiniteWarning, match=r"pixels of sample 1, \d+ pixels of sample 4 are"):
        result = evaluate(model, dataset, **options)
    assert result.not_finite == expected and len(set(expected.values())) == 2
    assert [image.not_finite > 0 for image in result.images] == [False, True, False, False, True]
    total = sum(expected.values())
    assert result.metrics.not_finite == total
    note = f"{total} pixels have logits that are NaN or infinite: these are the scores of a broken"
    assert note in result.metrics.table()
    result.save(tmp_path)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["not_finite_pixels"] == total and note in content["note"]
    assert content["images"][4]["not_finite"] == expected["sample 4"]


def test_a_sound_model_has_no_note():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate(Small(), Scenes())
    assert result.not_finite == {} and result.metrics.note == "" == result.as_dict()["note"]


@pytest.mark.parametrize("options", OPTIONS)
def test_one_class_is_scored_on_background_and_class(options):
    class Binary(Scenes):
        classes = generic_classes(1).of_labels()
        num_classes = 2

        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, np.where(label == 255, 255, label & 1).astype(np.uint8)

    model, dataset = Small(num_classes=1), Binary()
    for threshold in (None, 0.7):
        given = {**options, "threshold": threshold}
        result = evaluate(model, dataset, panels=1, **given)
        expected, _ = by_hand(model, dataset, **given)
        np.testing.assert_array_equal(result.confusion, expected[:2, :2])
        assert result.confusion.shape == (2, 2) and result.confusion.all()
        assert result.settings["threshold"] == (threshold or 0.5)
    assert result.metrics.classes == ("background", "foreground")
    assert [p.prediction.max() for p in result.panels] == [1, 1]
    with pytest.raises(ValueError, match="the model has 4 classes, of which the largest"):
        evaluate(Small(), Scenes(), threshold=0.7)
    with pytest.raises(ValueError, match=r"the model has 1 classes and the data set 4 .*of_labels"):
        evaluate(model, Scenes())
    # Named with or without the background.
    for names in (("foreground",), ("background", "foreground")):
        model.classes = names
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluate(model, dataset)
    model.classes = ("crack",)
    with pytest.warns(UserWarning, match="class 1 is 'crack' to the model and 'foreground'"):
        evaluate(model, dataset)


def test_classes_in_another_order_are_noticed():
    model, dataset = Small(), Scenes([(24, 32)])
    dataset.classes = generic_classes(CLASSES, ["background", "a", "b", "c"])
    model.classes = ("__background__", "b", "a", "c")
    with pytest.warns(UserWarning, match="class 1 is 'b' to the model and 'a' to the data set"):
        evaluate(model, dataset)


# Several processes


@pytest.mark.parametrize(("length", "world"), [(5, 2), (1, 3), (6, 3), (0, 2)])
def test_shards_have_every_index_once(length, world):
    shards = [list(ShardSampler(length, rank, world)) for rank in range(world)]
    assert sorted(index for shard in shards for index in shard) == list(range(length))
    assert [len(ShardSampler(length, r, world)) for r in range(world)] == list(map(len, shards))
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        ShardSampler(length, 2, 2)


WORKER = """
    import importlib.util, pickle, sys
    import torch, torch.distributed as dist
    path, rank, store, out, mode = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("scenes", path)
    scenes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scenes)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    dataset = scenes.Scenes()
    if mode == "broken" and rank == "1":
        dataset.ignore_index = 1
    try:
        result = scenes.evaluate(scenes.Small().exact(), dataset, panels=1, batch_size=2)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    with open(out + rank, "wb") as file:
        pickle.dump(result if isinstance(result, str) else
            (result.confusion, result.images, len(result.panels), result.metrics.miou), file)
    dist.destroy_process_group()
"""


def in_two_processes(tmp_path, mode):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, __file__, str(rank), tmp_path / "store", tmp_path / "r", mode],
            env=environment,
        )
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    return [pickle.loads((tmp_path / f"r{rank}").read_bytes()) for rank in range(2)]


def test_two_processes_count_every_sample_once(tmp_path):
    alone = evaluate(Small().exact(), Scenes(), batch_size=1)
    first, second = in_two_processes(tmp_path, "good")
    for confusion, images, panels, miou in (first, second):
        np.testing.assert_array_equal(confusion, alone.confusion)
        assert [image.index for image in images] == [0, 1, 2, 3, 4]
        assert images == alone.images and miou == alone.metrics.miou
        assert panels == (2 if images is first[1] else 0)


def test_an_error_in_one_process_ends_both(tmp_path):
    first, second = in_two_processes(tmp_path, "broken")
    assert second.startswith("LabelError: sample 1: label 255")
    assert first.startswith("RuntimeError: evaluation failed in another process: process 1: sample")


def test_eval_of_camvid_itself(shared_data):
    dataset = open_dataset("camvid", shared_data / "camvid").select([0, 50, 100])
    model = dlf.deeplabv3_mobilenet_v2_tf(num_classes=11, width=0.25, aspp_channels=8)
    result = evaluate(model, dataset)
    valid = sum(int((dataset[i][1] != 11).sum()) for i in range(3))
    assert result.confusion.sum() == valid
    assert [image.name for image in result.images] == [s.name for s in dataset.samples]
