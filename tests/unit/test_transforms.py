"""Augmentation: what each step does, and that only (seed, epoch, index) decides."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from deeplab_fast.data import transforms as T
from deeplab_fast.data.classes import generic_classes
from deeplab_fast.data.datasets import LabelError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def example(height=40, width=50, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 5, (height, width), np.uint8)
    # The label is also the photo's red: what belongs together stays recognisable.
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    image[..., 0] = label
    return image, label


class Pairs(Dataset):
    """Photos of different sizes in memory."""

    classes = generic_classes(5)
    num_classes = 5
    ignore_index = 255

    def __init__(self, length=5):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return example(30 + index, 50 - index, index)


# Steps


def test_resize_pair_keeps_photo_and_labels_aligned():
    label = np.zeros((8, 8), np.uint8)
    label[:, 4:] = 1
    image = np.repeat(label[:, :, None] * 200, 3, axis=2)
    for size in ((16, 16), (4, 4), (9, 13), (5, 7)):
        new_image, new_label = T.resize_pair(image, label, size)
        assert new_image.shape == (*size, 3) and new_label.shape == size
        # The edge lies in the middle: an odd width has its middle column on it.
        inside = np.ones(size[1], bool)
        inside[(size[1] - 1) // 2 : size[1] // 2 + 1] = size[1] % 2 == 0 and size[1] < 8
        np.testing.assert_array_equal((new_image[..., 0] > 100)[:, inside], new_label[:, inside])
    unchanged, same = T.resize_pair(image, label, (8, 8))
    assert unchanged is image and same is label


@pytest.mark.parametrize("size", [(64, 31), (17, 90)])
def test_labels_are_taken_as_by_nearest_exact(size):
    _, label = example()
    _, resized = T.resize_pair(*example(), size)
    exact = F.interpolate(torch.from_numpy(label)[None, None], size, mode="nearest-exact")
    np.testing.assert_array_equal(resized, exact[0, 0].numpy())


def test_random_scale():
    image, label = example()
    sizes = {T.RandomScale(0.5, 2)(image, label, generator(i))[1].shape for i in range(60)}
    heights, widths = zip(*sizes, strict=True)
    # Of 60 even draws from 20..80 one falls into each outer seventh with 1 - 2e-4.
    assert 20 <= min(heights) < 29 and 71 < max(heights) <= 80
    assert all(abs(h / 40 - w / 50) <= 0.5 / 40 + 0.5 / 50 for h, w in sizes)
    assert min(widths) >= 25 and max(widths) <= 100
    steps = {T.RandomScale(0.5, 2, 0.25)(image, label, generator(i))[1].shape[0] for i in range(60)}
    assert steps == {20, 30, 40, 50, 60, 70, 80}


def test_random_short_side_has_torchvisions_sizes():
    step = T.RandomShortSide(20, 60)
    for shape, long_side in (((40, 50), 1), ((50, 40), 0)):
        sizes = {step(*example(*shape), generator(i))[1].shape for i in range(40)}
        shorts = {size[1 - long_side] for size in sizes}
        assert min(shorts) >= 20 and max(shorts) <= 60 and len(shorts) > 15
        for size in sizes:
            assert size[long_side] == int(size[1 - long_side] * 50 / 40)


def test_random_flip():
    image, label = example()
    flips = 0
    for seed in range(50):
        new_image, new_label = T.RandomFlip()(image, label, generator(seed))
        np.testing.assert_array_equal(new_image[..., 0], new_label)
        flips += not np.array_equal(new_label, label)
        assert np.array_equal(new_label, label) or np.array_equal(new_label, label[:, ::-1])
    # Binomial(50, 1/2) leaves 10..40 with probability 1e-5.
    assert 10 <= flips <= 40
    assert T.RandomFlip(0)(image, label, generator())[1] is label
    np.testing.assert_array_equal(T.RandomFlip(1)(image, label, generator())[1], label[:, ::-1])


def test_crop_inside():
    image, label = example()
    places = set()
    for seed in range(40):
        new_image, new_label = T.Crop((30, 45))(image, label, generator(seed))
        assert new_label.shape == (30, 45)
        np.testing.assert_array_equal(new_image[..., 0], new_label)
        found = [
            (y, x)
            for y, x in itertools.product(range(11), range(6))
            if np.array_equal(label[y : y + 30, x : x + 45], new_label)
        ]
        places.update(found)
    assert {y for y, _ in places} >= {0, 10} and {x for _, x in places} == set(range(6))


@pytest.mark.parametrize(
    ("ignore_index", "dtype"),
    [pytest.param(255, np.uint8, id="byte"), pytest.param(-1, np.int32, id="wide")],
)
def test_crop_pads_right_and_below(ignore_index, dtype):
    image, label = example()
    crop = T.Crop(45, (1, 2, 3), ignore_index)
    new_image, new_label = crop(image, label, generator())
    assert new_label.dtype == dtype
    # 40 rows: 5 of padding; 50 columns: 45 of them chosen.
    np.testing.assert_array_equal(new_image[:40, :, 0], new_label[:40])
    assert (new_label[40:] == ignore_index).all() and (new_label[:40] != ignore_index).all()
    assert (new_image[40:] == (1, 2, 3)).all()


def test_the_papers_recipe_pads_with_the_mean():
    image, label = example(10, 10)
    transform = T.paper_training(65, scale=(1, 1), flip=0)
    new_image, new_label = transform(image, label, generator())
    assert new_image.shape == (65, 65, 3)
    np.testing.assert_array_equal(new_image[:10, :10], image)
    # 255 * (0.485, 0.456, 0.406).
    assert (new_image[10:] == (124, 116, 104)).all() and (new_label[:, 10:] == 255).all()
    assert T.paper_evaluation()(image, label, generator())[0] is image


def test_steps_in_a_row_are_the_steps_alone():
    image, label = example()
    row = T.Compose(T.RandomFlip(1), T.RandomScale(0.5, 2), T.RandomFlip(1), T.Crop(20))
    found = row(image, label, generator(3))
    expected, source = (image, label), generator(3)
    for step in row.transforms:
        expected = step(*expected, source)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.flags.c_contiguous and ours.dtype == theirs.dtype


def test_copy_paste():
    data = Pairs()
    image, label = example(seed=9)
    crop = T.Crop((24, 32))
    pasted = 0
    for seed in range(30):
        paste = T.CopyPaste(crop, data, [1, 3], 0.5)
        pair = T.to_tensors(*paste(image, label, generator(seed)))
        new_image, new_label = pair[0].permute(1, 2, 0).numpy(), pair[1].numpy()
        # The label is the photo's red, of whatever sample.
        np.testing.assert_array_equal(new_image[..., 0], new_label)
        source = generator(seed)
        own_image, _ = crop(image, label, source)
        over = (new_image != own_image).any(-1)
        assert set(np.unique(new_label[over])) <= {1, 3}
        if torch.rand((), generator=source, dtype=torch.float64) < 0.5:
            index = int(torch.randint(0, len(data), (), generator=source))
            other, things = crop(*data[index], source)
            where = np.isin(things, (1, 3))
            np.testing.assert_array_equal(new_image[where], other[where])
            np.testing.assert_array_equal(new_image[~where], own_image[~where])
            pasted += 1
        else:
            assert not over.any()
    # Binomial(30, 1/2) leaves 3..27 with probability 1e-5.
    assert 3 <= pasted <= 27


def test_copy_paste_behind_a_transform_that_gives_tensors():
    data = Pairs()

    def tensors(image, label, generator):
        return T.to_tensors(*T.Crop((24, 32))(image, label, generator))

    image, label = example(seed=9)
    found = T.CopyPaste(tensors, data, [1, 3], 1.0)(image, label, generator(5))
    expected = T.CopyPaste(T.Crop((24, 32)), data, [1, 3], 1.0)(image, label, generator(5))
    assert all(map(torch.equal, found, expected))


def test_a_call_of_a_subclass_is_called():
    class Dark(T.RandomFlip):
        def __call__(self, image, label, generator):
            return image * 0, label

    row = T.Compose(Dark(), T.Crop(20))
    assert not row(*example(), generator())[0].any()


def test_copy_paste_needs_one_size():
    with pytest.raises(ValueError, match=r"copy-paste: one sample is 50x40 .* end with a crop"):
        T.CopyPaste(T.Compose(), Pairs(1), [1], 1.0)(*example(), generator())


def test_copy_paste_refuses_labels_that_are_no_class():
    data = Pairs(1)
    data.num_classes = 3
    with pytest.raises(LabelError, match=r"outside the classes 0\.\.2"):
        T.CopyPaste(T.Crop(8), data, [1], 1.0)(*example(), generator())


def test_torchvisions_recipes():
    image, label = example(60, 80)
    new_image, new_label = T.torchvision_training(52, 48)(image, label, generator())
    assert new_image.shape == (48, 48, 3) and new_label.shape == (48, 48)
    step = T.torchvision_training().transforms[0]
    assert (step.low, step.high) == (260, 1040)
    assert T.torchvision_evaluation(30)(image, label, generator())[1].shape == (30, 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: T.RandomScale(2, 1), "scale is 2 to 1", id="scale"),
        pytest.param(lambda: T.RandomScale(1, 2, 0), "step is 0", id="step"),
        pytest.param(lambda: T.RandomShortSide(0), "shorter side is 0", id="side"),
        pytest.param(lambda: T.RandomFlip(2), "probability is 2", id="flip"),
        pytest.param(lambda: T.Crop(0), "crop is 0", id="crop"),
        pytest.param(
            lambda: T.CopyPaste(T.Crop(8), Pairs(), [1], 1.5), "probability is 1.5", id="pasting"
        ),
    ],
)
def test_arguments_that_are_not_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Determinism


def epoch_of(dataset, workers, order=None, **options):
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, sampler=order or range(5), **options
    )
    return [(image.clone(), label.clone()) for image, label in loader]


def equal(left, right):
    return all(
        a.shape == b.shape and torch.equal(a, b)
        for one, two in zip(left, right, strict=True)
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("kind", ["own", "global"])
def test_the_same_for_every_number_of_workers_and_order(kind):
    def noisy(image, label):
        assert image.dtype == np.uint8
        shift = random.randrange(50) + np.random.randint(50) + int(torch.randint(50, ()))
        return image // 2 + np.uint8(shift % 100), label

    transform = T.paper_training(33) if kind == "own" else noisy
    dataset = T.AugmentedDataset(Pairs(), transform, seed=3)
    alone = epoch_of(dataset, 0)
    assert equal(alone, epoch_of(dataset, 2))
    # Whatever was drawn before.
    torch.manual_seed(9)
    random.seed(9)
    backwards = epoch_of(dataset, 0, order=[4, 3, 2, 1, 0])
    assert equal(alone, backwards[::-1])
    again = T.AugmentedDataset(Pairs(), transform, seed=3)
    assert equal(alone, [again[i] for i in range(5)])
    other_seed = T.AugmentedDataset(Pairs(), transform, seed=4)
    assert not equal(alone[:1], [other_seed[0]])
    dataset.set_epoch(1)
    assert not equal(alone[:1], [dataset[0]]) and dataset.epoch == 1
    assert equal([dataset[-1]], [dataset[4]])


def test_workers_that_stay_see_the_new_epoch():
    dataset = T.AugmentedDataset(Pairs(), T.paper_training(33))
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 2):
        dataset.set_epoch(epoch)
        got = list(loader)
        assert equal(got, [dataset[i] for i in range(5)])
    seen = [T.AugmentedDataset(Pairs(), T.paper_training(33))[i] for i in range(5)]
    assert not equal(got, seen)


def test_the_global_generators_are_left_as_they_were():
    dataset = T.AugmentedDataset(
        Pairs(), lambda image, label: (image, label * (np.random.rand() > 2))
    )
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    dataset[0]
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    np.testing.assert_array_equal(before[2], np.random.get_state()[1])


def test_seeds_differ():
    draws = {T.sample_seed(s, e, i) for s in (-1, 0, 1) for e in range(10) for i in range(50)}
    assert len(draws) == 3 * 10 * 50


# Tensors and labels


def test_tensors_without_a_transform():
    dataset = T.AugmentedDataset(Pairs())
    image, label = dataset[1]
    expected = example(31, 49, 1)
    assert image.dtype == label.dtype == torch.uint8 and image.is_contiguous()
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected[0])
    np.testing.assert_array_equal(label.numpy(), expected[1])
    assert dataset.num_classes == 5 and dataset.classes is Pairs.classes
    with pytest.raises(AttributeError, match="palette"):
        _ = dataset.palette
    with pytest.raises(IndexError):
        dataset[5]


def test_a_label_that_is_no_class_is_refused_before_it_reaches_a_device():
    class Wrong(Pairs):
        num_classes = 4

    with pytest.raises(LabelError, match=r"sample 2: label 4 \(\d+ pixels\), outside .* 0\.\.3"):
        T.AugmentedDataset(Wrong())[2]
    assert T.AugmentedDataset(Wrong(), check_labels=False)[2][1].max() == 4


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        pytest.param(lambda a, b: (a, b[1:]), "gave an image .* and labels", id="size"),
        pytest.param(lambda a, b: (a.astype(int), b), "image of torch.int64", id="image-dtype"),
        pytest.param(lambda a, b: (a, b / 2), "labels of torch.float64", id="label-dtype"),
    ],
)
def test_results_that_fit_no_network(transform, message):
    with pytest.raises(ValueError, match=message):
        T.AugmentedDataset(Pairs(), transform)[0]


# Other libraries' transforms


def test_styles_by_signature():
    image, label = example()

    class Keywords:
        def __call__(self, *, image, mask):
            return {"image": image[:, ::-1].copy(), "mask": mask[:, ::-1].copy()}

    def three(image, label, generator):
        return image, label + 1

    assert T.adapt(three) is three
    new_image, new_label = T.adapt(Keywords())(image, label, generator())
    np.testing.assert_array_equal(new_image, image[:, ::-1])
    np.testing.assert_array_equal(new_label, label[:, ::-1])
    assert T.adapt(lambda a, b: (a, b))(image, label, generator())[0] is image
    for wrong, error, message in (
        (lambda a: a, TypeError, "cannot tell how"),
        (3, TypeError, "a int, expected a callable"),
    ):
        with pytest.raises(error, match=message):
            T.adapt(wrong)
    with pytest.raises(ValueError, match="style is 'x'"):
        T.adapt(three, style="x")


def test_torchvision_v2():
    from deeplab_fast.testing import import_torchvision

    try:
        import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
    from torchvision.transforms import Resize, v2

    transform = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomCrop(20)])
    dataset = T.AugmentedDataset(Pairs(), transform)
    image, label = dataset[0]
    assert type(image) is type(label) is torch.Tensor and image.shape == (3, 20, 20)
    # Photo and labels went through the same.
    assert torch.equal(image[0], label)
    assert equal([dataset[0]], [(image, label)])
    dataset.set_epoch(1)
    assert not equal([dataset[0]], [(image, label)])
    floats = T.AugmentedDataset(Pairs(), v2.ToDtype(torch.float32, scale=True))[0][0]
    assert floats.dtype == torch.float32 and floats.max() <= 1
    with pytest.raises(TypeError, match=r"use the one of torchvision\.transforms\.v2"):
        T.adapt(Resize(20))


def test_albumentations():
    albumentations = pytest.importorskip("albumentations")
    transform = albumentations.Compose(
        [albumentations.HorizontalFlip(p=1.0), albumentations.RandomCrop(20, 20)]
    )
    dataset = T.AugmentedDataset(Pairs(), transform)
    image, label = dataset[0]
    assert image.shape == (3, 20, 20) and torch.equal(image[0], label)
    assert equal([dataset[0]], [(image, label)])
    dataset.set_epoch(1)
    assert not equal([dataset[0]], [(image, label)])
