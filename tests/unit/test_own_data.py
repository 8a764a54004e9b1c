"""Data of one's own: how pairs are found and split, and masks whose colours stand for classes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_fast.data.check import check_dataset
from deeplab_fast.data.classes import class_set
from deeplab_fast.data.datasets import ColourError, is_own_data, open_dataset, read_mask
from deeplab_fast.data.datasets.colours import colour_ids, read_colours
from deeplab_fast.data.datasets.splits import VAL_FRACTION, Split, group_of
from deeplab_fast.data.images import ImageReadError

SIZE = (4, 6)
ROAD, SKY = (128, 64, 128), (70, 130, 180)


def photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*SIZE, 3), 90, np.uint8)).save(path)


def mask(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.array(values, np.uint8)
    Image.fromarray(np.resize(values, (*SIZE, *values.shape[1:]))).save(path)


def pairs(root, images="images", masks="masks", names="abcdefghij", suffix=""):
    for number, name in enumerate(names):
        photo(root / images / f"{name}.jpg")
        mask(root / masks / f"{name}{suffix}.png", number % 2)


def names(dataset):
    return [sample.name for sample in dataset.samples]


# Folders


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        pytest.param("imgs", "labels", id="other usual names"),
        pytest.param("JPEGImages", "SegmentationClass", id="VOC's"),
        pytest.param("Images", "Annotations", id="capitals"),
        pytest.param("", "masks", id="photos in the root"),
    ],
)
def test_folders_by_usual_names(tmp_path, images, masks):
    pairs(tmp_path, images, masks, "ab")
    dataset = open_dataset("folder", tmp_path, classes=2)
    assert names(dataset) == ["a", "b"] and not dataset[0][1].any() and dataset[1][1].all()


def test_a_folder_is_a_source(tmp_path, monkeypatch):
    pairs(tmp_path / "mine", names="ab")
    for source in (tmp_path / "mine", str(tmp_path / "mine")):
        assert is_own_data(source) and names(open_dataset(source, classes=2)) == ["a", "b"]
    with pytest.raises(
        ValueError, match=r"--data is the folder .*mine and --root .*give one folder"
    ):
        open_dataset(tmp_path / "mine", tmp_path, classes=2)
    # A folder here that is called as a known data set is not taken for it.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voc").mkdir()
    assert is_own_data("mine") and is_own_data("x.CSV") and not is_own_data("voc")
    with pytest.raises(ValueError, match="voc: --root is missing"):
        open_dataset("voc")


def test_the_documented_names_go_before_others(tmp_path):
    pairs(tmp_path, names="a")
    pairs(tmp_path, "imgs", "labels", "bc")
    assert names(open_dataset("folder", tmp_path, classes=2)) == ["a"]
    chosen = open_dataset("folder", tmp_path, classes=2, images="imgs", masks="labels")
    assert names(chosen) == ["b", "c"]


def test_folders_that_cannot_be_told(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"images, imgs.*masks, mask.*the folders x and 0 p"
    ):
        open_dataset("folder", tmp_path, classes=2)
    pairs(tmp_path, "imgs", "labels", "a")
    pairs(tmp_path, "imgs", "gt", "a")
    with pytest.raises(ValueError, match=r"may hold the masks: gt, labels; name one with --masks"):
        open_dataset("folder", tmp_path, classes=2)
    with pytest.raises(
        FileNotFoundError, match=r"no folder ph of photos .*\(--images\); there are"
    ):
        open_dataset("folder", tmp_path, classes=2, images="ph", masks="gt")


@pytest.mark.parametrize(
    "form",
    [
        "images/{}, masks/{}",
        "{}/images, {}/masks",
        "{}, {}_labels",
        "{}, {}annot",
        "images/{}/scene, masks/{}/scene",
    ],
)
def test_parts_by_usual_names(tmp_path, form):
    for part, stems in (("training", "abc"), ("valid", "de")):
        pairs(tmp_path, *form.replace("{}", part).split(", "), stems)

    def names(dataset):
        return [sample.name.replace("scene/", "") for sample in dataset.samples]

    assert names(open_dataset("folder", tmp_path, "train", classes=2)) == ["a", "b", "c"]
    # As of other data sets.
    assert names(open_dataset("folder", tmp_path, classes=2)) == ["d", "e"]
    every = open_dataset("folder", tmp_path, "all", classes=2)
    assert sorted(names(every)) == ["train/a", "train/b", "train/c", "val/d", "val/e"]
    with pytest.raises(ValueError, match=r"has the parts train, val; --val-fraction is for pairs"):
        open_dataset("folder", tmp_path, "train", classes=2, val_fraction=0.5)
    with pytest.raises(FileNotFoundError, match=r"the split 'test'; there are: train, val"):
        open_dataset("folder", tmp_path, "test", classes=2)


def test_photos_and_masks_of_a_part_in_one_folder(tmp_path):
    for part, stems in (("train", "abc"), ("valid", "de")):
        pairs(tmp_path, part, part, stems, suffix="_mask")
    assert names(open_dataset("folder", tmp_path, "train", classes=2)) == ["a", "b", "c"]
    assert names(open_dataset("folder", tmp_path, "val", classes=2)) == ["d", "e"]


def test_folders_of_scenes_are_no_parts(tmp_path):
    for scene in "xyz":
        pairs(tmp_path, f"images/{scene}", f"masks/{scene}", "abcd")
    dataset = open_dataset("folder", tmp_path, classes=2)
    assert names(dataset) == [f"{scene}/{stem}" for scene in "xyz" for stem in "abcd"]
    assert dataset[1][1].all() and not dataset[2][1].any()
    assert names(open_dataset("folder", tmp_path, "y", classes=2)) == list("abcd")
    options = {"classes": 2, "group_by": "prefix"}
    val = names(open_dataset("folder", tmp_path, "val", **options))
    assert len(val) == 4 and len({name[0] for name in val}) == 1
    train = names(open_dataset("folder", tmp_path, "train", **options))
    assert sorted([*train, *val]) == sorted(names(dataset))


def test_a_training_part_alone(tmp_path):
    pairs(tmp_path, "images/train", "masks/train")
    with pytest.raises(FileNotFoundError, match=r"'val'; there are: train; --val-fraction 0\.2"):
        open_dataset("folder", tmp_path, "val", classes=2)
    assert len(open_dataset("folder", tmp_path, "train", classes=2)) == 10
    split = {"classes": 2, "val_fraction": 0.3}
    one, other = (names(open_dataset("folder", tmp_path, s, **split)) for s in ("train", "val"))
    assert len(other) == 3 and sorted([*one, *other]) == list("abcdefghij")


def test_pairs_beside_parts_are_told(tmp_path):
    pairs(tmp_path, names="abc")
    for part in ("train", "val"):
        pairs(tmp_path, f"images/{part}", f"masks/{part}", "xy")
    for split, count, note in (
        (
            "train",
            2,
            r"3 pictures in .*images itself are not taken, .* parts train, val; --split all",
        ),
        ("val", 2, "3 pictures in .*images itself are not taken"),
        ("all", 3, "the pairs in train, val of .*images are not taken"),
    ):
        dataset = open_dataset("folder", tmp_path, split, classes=2)
        assert len(dataset) == count and re.match(note, dataset.notes[0])


# Names of masks


@pytest.mark.parametrize(
    "suffix", ["_mask", "_labelIds", "-seg", "_L", "mask", "_by_ann"], ids=lambda text: text
)
def test_suffixes_of_masks_are_found(tmp_path, suffix):
    pairs(tmp_path, names=["a", "a_1", "b"], suffix=suffix)
    dataset = open_dataset("folder", tmp_path, classes=2)
    # a_1_mask is not of a.
    assert [sample.mask.name for sample in dataset.samples] == [
        f"{stem}{suffix}.png" for stem in ("a", "a_1", "b")
    ]
    assert dataset.notes == (
        f"the mask of NAME in {tmp_path}/images is NAME{suffix} in {tmp_path}/masks",
    )


def test_masks_of_several_suffixes(tmp_path):
    for suffix in ("_color", "_mask"):
        pairs(tmp_path, names="ab", suffix=suffix)
    message = r"NAME_color \(2\), NAME_mask \(2\); choose with --mask-suffix=_color"
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", tmp_path, classes=2)
    for given in ("_mask", "_mask.png"):
        dataset = open_dataset("folder", tmp_path, classes=2, mask_suffix=given)
        assert [sample.mask.name for sample in dataset.samples] == ["a_mask.png", "b_mask.png"]
    with pytest.raises(FileNotFoundError, match="no pair of a photo NAME and a mask NAME_gt"):
        open_dataset("folder", tmp_path, classes=2, mask_suffix="_gt")


def test_a_photo_whose_mask_is_missing_is_listed(tmp_path):
    pairs(tmp_path, names="ab", suffix="_mask")
    photo(tmp_path / "images" / "c.jpg")
    dataset = open_dataset("folder", tmp_path, classes=2)
    with pytest.raises(ImageReadError, match=r"c_mask\.png: No such file"):
        dataset[2]


@pytest.mark.parametrize("folder", ["", "images"], ids=["root", "images"])
def test_masks_beside_the_photos(tmp_path, folder):
    pairs(tmp_path, folder, folder, "abc", suffix="_mask")
    dataset = open_dataset("folder", tmp_path, classes=2)
    assert names(dataset) == ["a", "b", "c"] and dataset[1][1].all() and not dataset[2][1].any()
    assert "the mask of NAME is NAME_mask" in dataset.notes[0]


def test_masks_beside_the_photos_by_format(tmp_path):
    pairs(tmp_path, "", "", "ab")
    photo(tmp_path / "c.jpg")
    dataset = open_dataset("folder", tmp_path, classes=2)
    assert names(dataset) == ["a", "b", "c"] and dataset[1][1].all()
    assert [sample.image.suffix for sample in dataset.samples] == [".jpg"] * 3


def test_photos_and_masks_that_cannot_be_told(tmp_path):
    for stem in ("a", "a_x", "b", "b_x"):
        photo(tmp_path / f"{stem}.png")
    with pytest.raises(FileNotFoundError, match=r"do not tell photos from masks.*--mask-suffix"):
        open_dataset("folder", tmp_path, classes=2)
    assert names(open_dataset("folder", tmp_path, classes=2, mask_suffix="_x")) == ["a", "b"]


# Splits


def table(path, stems):
    path.write_text("\n".join(["image,mask", *(f"images/{s}.jpg,masks/{s}.png" for s in stems)]))


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_pairs_without_parts_are_split_by_name(tmp_path, kind):
    stems = [f"s{i:02d}" for i in range(40)]
    pairs(tmp_path, names=stems)

    def parts(order=stems, **options):
        if kind == "folder":
            source, root = "folder", tmp_path
        else:
            source, root = tmp_path / "pairs.csv", None
            table(source, order)
        opened = [open_dataset(source, root, s, classes=2, **options) for s in ("train", "val")]
        return *({Path(name).stem for name in names(each)} for each in opened), opened[0]

    train, val, dataset = parts()
    assert len(val) == VAL_FRACTION * 40 and train | val == set(stems) and not train & val
    assert (
        dataset.split_here
        and "8 of 40 pairs are for validation, chosen by name (--val-fraction 0.2, --split-seed 0)"
        in (dataset.notes[0])
    )
    # Of a table, whatever its order.
    assert parts(stems[::-1])[:2] == (train, val)
    assert len(parts(val_fraction=0.1)[1]) == 4 and parts(val_fraction=0.1)[1] < val
    assert parts(split_seed=1)[1] != val
    # Without a split all, with a fraction what is for validation.
    source = ("folder", tmp_path) if kind == "folder" else (tmp_path / "pairs.csv",)
    assert len(open_dataset(*source, classes=2)) == 40
    assert len(open_dataset(*source, classes=2, val_fraction=0.1)) == 4
    assert len(open_dataset(*source, split="all", classes=2, val_fraction=0.1)) == 40


def test_one_more_pair_moves_no_other(tmp_path):
    stems = [f"s{i:02d}" for i in range(40)]
    pairs(tmp_path, names=stems)
    before = set(names(open_dataset("folder", tmp_path, "val", classes=2)))
    pairs(tmp_path, names=["more"])
    after = set(names(open_dataset("folder", tmp_path, "val", classes=2)))
    # 0.2 of 41 are 8 as well: the new one can take the place of one.
    assert len(after) == 8 and len(before - after) <= 1 and after - before <= {"more"}


def test_groups_stay_together(tmp_path):
    stems = [f"clip{clip}_{i:03d}" for clip in "abcde" for i in range(8)]
    pairs(tmp_path, names=stems)
    for group_by in ("prefix", r"^clip(\w)_", r"clip\w"):
        val = names(open_dataset("folder", tmp_path, "val", classes=2, group_by=group_by))
        assert len({name[:5] for name in val}) == 1 and len(val) == 8
        dataset = open_dataset("folder", tmp_path, "val", classes=2, group_by=group_by)
        assert dataset.notes[0].endswith(f"--split-seed 0, --group-by {group_by})")
    # Each for itself they are of several.
    note = open_dataset("folder", tmp_path, "val", classes=2).notes[0]
    assert "the 5 beginnings of the names (clipa, clipb, clipc, ...) are sequences" in note
    assert len({n[:5] for n in names(open_dataset("folder", tmp_path, "val", classes=2))}) > 1
    for group_by, message in (
        ("clip", "40 pairs, the group 'clip' of --group-by clip, cannot be split"),
        ("frame", r"'frame', which the name 'clipa_000' does not match"),
        ("(", r"'\(', expected prefix or a regular expression"),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset("folder", tmp_path, "val", classes=2, group_by=group_by)


def test_groups_of_a_table_are_those_of_its_folder(tmp_path):
    stems = [f"{clip}{i:02d}" for clip in ("left", "right", "top") for i in range(4)]
    pairs(tmp_path, names=stems)
    rows = [f"images/{stem}.jpg,masks/{stem}.png" for stem in stems]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,mask", *rows]))
    given = {"split": "val", "classes": 2, "group_by": "prefix"}
    folder = open_dataset("folder", tmp_path, **given)
    table = open_dataset(tmp_path / "pairs.csv", **given)
    assert len(folder) == 4
    assert [s.image for s in table.samples] == [s.image for s in folder.samples]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("0016E5_07959", "0016E5"),
        ("Seq05VD_f00000", "Seq05VD"),
        ("a_b-03", "a_b"),
        ("clip1/12.jpg", "clip1"),
        ("left012", "left"),
        ("frame.0001", "frame"),
    ],
)
def test_prefixes(name, group):
    assert group_of(name, "prefix") == group


def test_fractions_at_the_ends(tmp_path):
    pairs(tmp_path)
    zero, one = {"classes": 2, "val_fraction": 0}, {"classes": 2, "val_fraction": 1}
    assert len(open_dataset("folder", tmp_path, "train", **zero)) == 10
    assert len(open_dataset("folder", tmp_path, "val", **one)) == 10
    with pytest.raises(ValueError, match="--val-fraction 0 leaves nothing for the split 'val'"):
        open_dataset("folder", tmp_path, "val", **zero)
    with pytest.raises(ValueError, match=r"--val-fraction is 1\.5, expected a part of the pairs"):
        open_dataset("folder", tmp_path, "val", classes=2, val_fraction=1.5)
    # Neither part is empty, however small the fraction.
    tiny = {"classes": 2, "val_fraction": 0.01}
    assert len(open_dataset("folder", tmp_path, "val", **tiny)) == 1
    most = {"classes": 2, "val_fraction": 0.99}
    assert len(open_dataset("folder", tmp_path, "train", **most)) == 1


def test_named_sets_and_tables_with_splits_are_not_split_again(tmp_path):
    with pytest.raises(ValueError, match=r"camvid is stored in one known way.*--val-fraction"):
        open_dataset("camvid", tmp_path, val_fraction=0.1)
    # Colours would give class ids where a label map of the set's own follows.
    with pytest.raises(ValueError, match=r"cityscapes is stored in one known way.*--mask-colours"):
        open_dataset("cityscapes", tmp_path, mask_colours="cityscapes")
    pairs(tmp_path, names="ab")
    path = tmp_path / "pairs.csv"
    path.write_text("image,mask,split\nimages/a.jpg,masks/a.png,train\n")
    with pytest.raises(ValueError, match=r"has a column split; --val-fraction is for tables"):
        open_dataset(path, split="train", classes=2, val_fraction=0.1)


def test_the_order_of_validation_is_that_of_the_names(tmp_path):
    pairs(tmp_path)
    val = names(open_dataset("folder", tmp_path, "val", classes=2, val_fraction=0.5))
    assert val == sorted(val) and len(val) == 5
    samples = open_dataset("folder", tmp_path, classes=2).samples
    part, _ = Split(0.5).part(samples[::-1], "val", "x")
    assert [sample.name for sample in part] == val[::-1]


# Colours


COLOURS = {"road": [ROAD], "sky": [SKY], "void": [(0, 0, 0)]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param(
            "c.csv", "name,r,g,b\nroad,128,64,128\nsky,70,130,180\nvoid,0,0,0\n", id="csv"
        ),
        pytest.param("c.txt", "road 128 64 128\n\n# air\nsky 70 130 180\nvoid 0 0 0\n", id="lines"),
        pytest.param(
            "c.txt", "128 64 128\t\troad\n70 130 180\tsky\n0 0 0\tvoid\n", id="label_colors"
        ),
        pytest.param(
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nroad:128,64,128::\nsky:70,130,180::\nvoid:0,0,0::\n",
            id="CVAT",
        ),
        pytest.param("c.txt", "road #804080\nsky #4682b4\nvoid #000000\n", id="hex"),
        pytest.param(
            "c.json",
            json.dumps({"road": ROAD, "sky": "#4682b4", "void": [[0, 0, 0]]}),
            id="json mapping",
        ),
        pytest.param(
            "c.json",
            json.dumps(
                [
                    {"name": "road", "color": ROAD},
                    {"name": "sky", "color": SKY, "id": 1},
                    {"name": "void", "colour": [0, 0, 0]},
                ]
            ),
            id="json list",
        ),
        pytest.param(
            "c.yaml", "road: [128, 64, 128]\nsky: [70, 130, 180]\nvoid: [0, 0, 0]\n", id="yaml"
        ),
        pytest.param(
            "c.yaml",
            "classes: [road, sky, void]\npalette: [[128, 64, 128], [70, 130, 180], [0, 0, 0]]\n",
            id="class file",
        ),
    ],
)
def test_files_of_colours(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_colours(tmp_path / name) == COLOURS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("road 128 64\n", "line 1: 'road 128 64'; expected a line a class", id="short"),
        pytest.param("road 128 64 300\n", "'road' has the colour .128, 64, 300.", id="range"),
        pytest.param("name,r,g,b,id\nroad,128,64,128,0\n", "line 2: 'road,128", id="more columns"),
        pytest.param("", "no colour; expected a line a class", id="empty"),
    ],
)
def test_files_of_no_colours(tmp_path, content, message):
    (tmp_path / "c.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_colours(tmp_path / "c.txt")


def test_colours_of_names(tmp_path):
    camvid = class_set("camvid")
    ids = colour_ids(read_colours("camvid"), camvid, 11)
    assert ids[camvid.palette[3]] == 3 and ids[0, 0, 0] == 11 and len(ids) == 12
    assert colour_ids({1: [ROAD], "Road_": [SKY]}, class_set("x,road"), 255) == {ROAD: 1, SKY: 1}
    with pytest.raises(
        ValueError, match=r"names car, which is no class; there are: road, sky, and"
    ):
        colour_ids({"car": [ROAD]}, class_set("road,sky"), 255)
    with pytest.raises(ValueError, match="to two classes, road and sky"):
        colour_ids({"road": [ROAD], "sky": [ROAD]}, class_set("road,sky"), 255)
    with pytest.raises(FileNotFoundError, match="no such file, and no class set of that name"):
        read_colours(str(tmp_path / "nowhere.csv"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_become_class_ids(tmp_path, mode):
    photo(tmp_path / "images" / "a.jpg")
    (tmp_path / "masks").mkdir()
    pixels = np.resize(np.array([ROAD, ROAD, SKY, (0, 0, 0), SKY], np.uint8), (*SIZE, 3))
    Image.fromarray(pixels).convert(mode).save(tmp_path / "masks" / "a.png")
    dataset = open_dataset("folder", tmp_path, mask_colours=COLOURS)
    # The colours name the classes, but for what is ignored, and paint them.
    assert dataset.classes.classes == ("road", "sky") and dataset.classes.palette == (ROAD, SKY)
    label = dataset[0][1]
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, np.resize(np.array([0, 0, 1, 255, 1]), SIZE))
    # Names of classes in another order decide the ids.
    dataset = open_dataset("folder", tmp_path, classes="sky,road", mask_colours=COLOURS)
    np.testing.assert_array_equal(dataset[0][1], np.resize(np.array([1, 1, 0, 255, 0]), SIZE))


def test_grey_masks_beside_colours(tmp_path):
    values = np.resize(np.array([0, 1, 255], np.uint8), SIZE)
    colours = {(0, 0, 0): 0, (1, 1, 1): 300, (255, 255, 255): 1}
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(values == 255).save(tmp_path / "bits.png")
    read = read_mask(tmp_path / "grey.png", colours)
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, np.resize(np.array([0, 300, 1]), SIZE))
    np.testing.assert_array_equal(read_mask(tmp_path / "bits.png", colours), values == 255)


def test_palettes_are_read_by_their_colours(tmp_path):
    values = np.resize(np.array([2, 0, 1, 1], np.uint8), SIZE)
    picture = Image.fromarray(values)
    # The palette's order is the saving program's: index 0 is class 1.
    picture.putpalette([*SKY, *ROAD, 9, 9, 8])
    picture.save(tmp_path / "m.png")
    known = {ROAD: 0, SKY: 1}
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), values)
    np.testing.assert_array_equal(
        read_mask(tmp_path / "m.png", known, unknown=255), np.resize(np.array([255, 1, 0, 0]), SIZE)
    )
    np.testing.assert_array_equal(
        read_mask(tmp_path / "m.png", {**known, (9, 9, 8): 300}),
        np.resize(np.array([300, 1, 0, 0]), SIZE),
    )
    with pytest.raises(
        ColourError, match="indices are the class numbers, leave --mask-colours"
    ) as e:
        read_mask(tmp_path / "m.png", known)
    assert e.value.colours == {(9, 9, 8): 6}
    picture.save(tmp_path / "clear.png", transparency=1)
    with pytest.raises(ImageReadError, match=r"12 pixels are transparent \(mode P\)"):
        read_mask(tmp_path / "clear.png", {**known, (9, 9, 8): 2})


def test_unknown_colours(tmp_path):
    pixels = np.resize(np.array([ROAD, (9, 9, 8), SKY, SKY], np.uint8), (*SIZE, 3))
    Image.fromarray(pixels).save(tmp_path / "m.png")
    known = {ROAD: 0, SKY: 1}
    with pytest.raises(ColourError) as caught:
        read_mask(tmp_path / "m.png", known)
    assert caught.value.colours == {(9, 9, 8): 6} and "m.png: 1 colour" in str(caught.value)
    np.testing.assert_array_equal(
        read_mask(tmp_path / "m.png", known, unknown=255), np.resize(np.array([0, 255, 1, 1]), SIZE)
    )
    with pytest.raises(ValueError, match="--unknown-colours is of masks whose colours stand"):
        open_dataset("folder", tmp_path, classes=2, unknown_colours="ignore")
    # The message on colours without any names the option.
    with pytest.raises(ImageReadError, match="--mask-colours FILE names them"):
        read_mask(tmp_path / "m.png")


# Classes


def test_classes_by_names(tmp_path):
    pairs(tmp_path, names="a")
    dataset = open_dataset("folder", tmp_path, classes="road, traffic light")
    assert dataset.classes.classes == ("road", "traffic light")
    assert open_dataset("folder", tmp_path, classes="road,").outputs == 1
    for text in ("a,,b", "a,a"):
        with pytest.raises(ValueError, match=re.escape(f"--classes is {text!r}, expected names")):
            open_dataset("folder", tmp_path, classes=text)
    with pytest.raises(ValueError, match="of one class 'road,'"):
        open_dataset("folder", tmp_path, classes="road")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param((0, 255), "hold 0, 255: .* --classes 1 --label-map 255=1", id="binary"),
        pytest.param((0, 1, 255), "--classes 1 is one class beside the background", id="0 and 1"),
        pytest.param((0, 1, 2), "hold 0, 1, 2: at least 3 classes", id="numbers"),
        pytest.param((ROAD, SKY), "colour picture .* --mask-colours FILE", id="colours"),
    ],
)
def test_what_the_first_masks_hold_where_classes_are_missing(tmp_path, values, message):
    photo(tmp_path / "images" / "a.jpg")
    mask(tmp_path / "masks" / "a.png", *values)
    with pytest.raises(ValueError, match=f"--classes is missing: .*{message}"):
        open_dataset("folder", tmp_path)


def test_a_file_that_may_name_the_classes_is_told(tmp_path):
    pairs(tmp_path, names="ab")
    path = tmp_path / "classes.txt"
    path.write_text("x\ny\n")
    with pytest.raises(
        ValueError, match=rf"a file of names; perhaps {path}\. The first masks hold"
    ):
        open_dataset("folder", tmp_path)


def test_a_file_that_may_name_the_colours_is_told(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    mask(tmp_path / "masks" / "a.png", ROAD, SKY)
    path = tmp_path / "class_dict.csv"
    path.write_text("name,r,g,b\nroad,128,64,128\nsky,70,130,180\n")
    with pytest.raises(ValueError, match=f"--mask-colours FILE names them; perhaps by {path}"):
        open_dataset("folder", tmp_path)
    report = check_dataset(open_dataset("folder", tmp_path, classes=2))
    assert report.hints == (f"{path} may name the colours of the masks: --mask-colours {path}",)
    assert check_dataset(open_dataset("folder", tmp_path, mask_colours=path)).problems == ()
