"""Hostile configurations, lists, records and options: a clear error of one line, or accepted.

DEEPLAB_FAST_FUZZ=N tries N inputs each (`tests/helpers/fuzz.py`).
"""

import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import fuzz
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

from deeplab_fast import cli, testing
from deeplab_fast._documents import DocumentError, parse_json, parse_yaml

testing.import_torchvision()

from deeplab_fast.data.classes import class_set  # noqa: E402
from deeplab_fast.data.datasets import open_dataset  # noqa: E402
from deeplab_fast.data.datasets.colours import read_colours  # noqa: E402
from deeplab_fast.dispatch import records  # noqa: E402
from deeplab_fast.engine.config import OptionError, TrainConfig, to_yaml, train_config  # noqa: E402
from deeplab_fast.engine.history import History  # noqa: E402
from deeplab_fast.engine.run_folder import (  # noqa: E402
    check_resumable,
    is_finished,
    read_stages,
    run_config,
)
from deeplab_fast.engine.runner import PredictOptions  # noqa: E402
from deeplab_fast.engine.train import fit  # noqa: E402
from deeplab_fast.models import get_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

BOMB = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(12))
SEEDS = [
    BOMB,
    "[" * 3000,
    "- " * 3000,
    "{a: " * 3000,
    "&a [*a]",
    "9" * 5000,
    "0x" + "f" * 9000,
    "1" + ":59" * 400,
    "!!python/object/apply:os.system [ls]",
    "? {a: b}\n: c",
    "a: 1\na: 2",
    "<<: {a: 1}\n<<: [*b]",
    "%YAML 9.9\n---\na",
    "\ufeffa: \ud800",
    "2026-13-45",
    "=",
    "<<",
]
EDGES = [0, 1, -1, 2, 2**31, 2**63, 2**64, -(2**70), 10**9, 10**400]
FLOATS = [0.0, -0.0, 1e-300, 1e300, 0.5, 1.0, math.inf, -math.inf, math.nan]
WORDS = [
    *("", "paper", "none", "null", "a.b", "os.system", "subprocess.check_output", "cpu", "auto"),
    *("99:99:99", "1e400", "inf", "nan", "9" * 5000, "\0", "\x1b[31m", "\ud800", "a\nb", "../.."),
    *("class_path", "init_args", "x" * 10_000, "*", "[", "{", "%s %n", "${HOME}", "s3://a/b"),
]

atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(EDGES),
    st.integers(),
    st.sampled_from(FLOATS),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=20),
)
keys = st.one_of(st.sampled_from(["class_path", "init_args", "devices", "a"]), st.text(max_size=5))
values = st.recursive(
    atoms,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=8,
)
grammar = st.lists(
    st.sampled_from(
        [*"[]{}:,-?*&!|>%@`#'\"\n\t ab01.~=<", "<<", "*a", "&a ", "- ", "a: ", "!!set ", "\0"]
    ),
    max_size=60,
).map("".join)
texts = st.one_of(st.sampled_from(SEEDS), grammar, st.text(max_size=60))
NAMES = [field.name for field in fields(TrainConfig)]


@st.composite
def changed(draw, seeds):
    """Bytes of a seed, cut, doubled, overwritten; or any."""
    data = draw(st.one_of(st.sampled_from(seeds), st.binary(max_size=60)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.sampled_from([0, 1, 4, 1000])))
        new = draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from(
                    [b"\0" * 30, b"[" * 200, b"9" * 5000, b"\n", b"&a ", b"*a", b"\xff"]
                ),
                st.just(data[at:to] * 2),
            )
        )
        data = data[:at] + new + data[to:]
    return data


def kept(path, data):
    path.write_bytes(data)
    return path


@fuzz.examples(25)
@given(texts, st.booleans())
@example(BOMB, False)
def test_yaml(text, exponents):
    fuzz.answer("YAML", lambda: parse_yaml(text, exponents=exponents), DocumentError)


@fuzz.examples(25)
@given(texts)
@example('{"a": ' * 5000)
def test_json(text):
    fuzz.answer("JSON", lambda: parse_json(text), DocumentError)


LISTS = [
    b"road\ncar\n",
    b"[road, car]",
    b'{"classes": ["a", "b"], "palette": [[0, 0, 0], [1, 2, 3]], "ignore_index": 7}',
    b"0: road\n1: car\n",
    b"road,1,2,3\ncar,4,5,6\n",
    b'{"road": [1, 2, 3], "car": "#aabbcc"}',
    b'[{"name": "road", "color": [1, 2, 3]}]',
    *(seed.encode("utf-8", "surrogatepass") for seed in SEEDS),
]


@fuzz.examples(20)
@given(changed(LISTS), st.sampled_from([".txt", ".json", ".yaml", ".csv"]))
def test_lists_of_classes_and_colours(tmp_path_factory, data, suffix):
    path = kept(tmp_path_factory.getbasetemp() / f"list{suffix}", data)
    fuzz.answer("classes", lambda: class_set(path), ValueError)
    fuzz.answer("colours", lambda: read_colours(path), ValueError)


SPECS = [
    b"name: folder\nroot: scenes\nclasses: [a, b]\nlabel_map: {255: 1}\nval_fraction: 0.2\n",
    b'{"name": "csv", "file": "t.csv", "classes": 4}',
    b"name: camvid\nroot: scenes\nsplit: val\n",
    *(seed.encode("utf-8", "surrogatepass") for seed in SEEDS),
]
SPEC_KEYS = ["root", "split", "classes", "label_map", "unmapped", "ignore_index", "mask_colours"]
SPEC_KEYS += ["val_fraction", "split_seed", "group_by", "images", "masks", "mask_suffix", "file"]


@fuzz.examples(20)
@given(st.data())
def test_specifications_of_data(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    if data.draw(st.booleans()):
        content = data.draw(changed(SPECS))
    else:
        spec = data.draw(st.dictionaries(st.sampled_from(SPEC_KEYS), values, max_size=4))
        name = data.draw(st.one_of(st.sampled_from(["folder", "csv", "voc"]), values))
        content = written({"name": name, "root": ".", **spec})
    path = kept(folder / "data.json", content)
    fuzz.answer("data", lambda: open_dataset(path), ValueError, OSError)


def written(value):
    try:
        return json.dumps(value).encode()
    # An integer of more digits than Python shows.
    except ValueError:
        return b"9" * 5000


@fuzz.examples(80)
@given(st.dictionaries(st.sampled_from(NAMES), values, max_size=3))
def test_options_of_training(given_values):
    fuzz.answer("train_config", lambda: train_config(**given_values), OptionError)


@pytest.fixture(scope="module")
def imported():
    """What a training imports is not counted as its answer's time."""
    cli.main(["train", "--epochs", "1"])


@pytest.mark.usefixtures("imported")
@fuzz.examples(6)
@given(st.data())
def test_train_with_a_configuration(tmp_path_factory, data):
    """Exit status 2 and a line, nothing imported."""
    known = set(sys.modules)
    folder = tmp_path_factory.getbasetemp()
    if data.draw(st.booleans()):
        content = data.draw(changed([to_yaml(TrainConfig().as_dict()).encode(), *LISTS]))
    else:
        names = st.sampled_from([*NAMES, "stage2", "stages", "config", "preset"])
        content = written(data.draw(st.dictionaries(names, values, max_size=3)))
    path = kept(folder / "config.yaml", content)

    def run():
        status = cli.main(["train", "--config", str(path), "--data", "nowhere/at/all"])
        assert status == 2, status

    fuzz.answer("train --config", run)
    assert not {"ctypes.wintypes", "antigravity", "this"} & (set(sys.modules) - known)


@pytest.mark.usefixtures("imported")
@fuzz.examples(8)
@given(
    st.sampled_from(NAMES), st.sampled_from([*WORDS, *map(repr, FLOATS), "1e9", "-1", "[1", BOMB])
)
def test_train_with_an_option(name, value):
    def run():
        option = f"--{name.replace('_', '-')}={value}"
        status = cli.main(["train", option, "--data", "nowhere/at/all"])
        assert status == 2, status

    fuzz.answer("train --OPTION", run)


RECORDS = [
    to_yaml(TrainConfig(data="folder", classes=["a", "b"]).as_dict()).encode(),
    b"stage2: {lr: 0.1, steps: 3}\n",
    b'{"finished": true, "steps": 3, "val_miou": 0.5, "best_val_miou": null}',
    b'{"step": 1, "epoch": 0, "train/loss": 1.5, "lr": 0.1}\n'
    b'{"step": 1, "epoch": 0, "val/miou": 0}\n',
    *(seed.encode("utf-8", "surrogatepass") for seed in SEEDS),
]


@fuzz.examples(20)
@given(changed(RECORDS))
def test_records_of_a_run(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    for name in ("config.yaml", "stages.yaml", "result.json", "metrics.jsonl"):
        kept(folder / name, data)
    fuzz.answer("config.yaml", lambda: run_config(folder), ValueError)
    fuzz.answer("stages.yaml", lambda: read_stages(folder), ValueError)
    fuzz.answer("result.json", lambda: is_finished(folder))

    def history():
        history = History(folder / "metrics.jsonl")
        history.update()
        history.csv()

    fuzz.answer("metrics.jsonl", history)


@fuzz.examples(30)
@given(changed([records.SHIPPED.read_bytes()[:3000], b'{"version": 1, "records": [{}]}', *LISTS]))
def test_records_of_kernels(tmp_path_factory, data):
    path = kept(tmp_path_factory.getbasetemp() / "records.json", data)
    fuzz.answer("records.json", lambda: records.read(path), ValueError)


MODEL = ["num_classes", "output_stride", "atrous_rates", "head", "aspp_channels", "dropout"]
MODEL += ["align_corners", "stem", "multi_grid", "image_pooling_norm", "contract_dilation"]
MODEL += ["replace_stride_with_dilation", "aux_loss", "width", "norm"]
MODELS = ["deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "deeplabv3_mobilenet_v2_tf"]


@fuzz.examples(20)
@given(st.sampled_from(MODELS), st.dictionaries(st.sampled_from(MODEL), values, max_size=2))
def test_options_of_models(name, options):
    def build():
        # What is allowed is not allocated here.
        with torch.device("meta"):
            get_model(name, **options)

    fuzz.answer("get_model", build, ValueError, TypeError)


PREDICT = ["scales", "flip", "tile", "overlap", "batch_size", "threshold"]


@fuzz.examples(60)
@given(st.dictionaries(st.sampled_from(PREDICT), values, max_size=3))
def test_options_of_predict(options):
    fuzz.answer("PredictOptions", lambda: PredictOptions.checked(**options), ValueError)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run's config and the bytes of its checkpoint."""
    folder = tmp_path_factory.mktemp("fuzz")
    root = tiny.write_scenes(folder / "scenes", 4)
    config = TrainConfig(**tiny.recipe(root), epochs=1, output=str(folder / "run"))
    return config, fit(config, quiet=True).last_checkpoint.read_bytes()


@fuzz.examples(20)
@given(data=st.data())
def test_checkpoints_of_a_run(run, tmp_path_factory, data):
    config, whole = run
    content = data.draw(changed([whole]))
    path = kept(Path(tmp_path_factory.getbasetemp()) / "last.ckpt", content)
    resume = lambda: check_resumable(path, config, lambda text: None)  # noqa: E731
    fuzz.answer("last.ckpt", resume, ValueError)
