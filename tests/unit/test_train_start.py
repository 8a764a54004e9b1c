"""What a training run starts from, how it goes on with other options, and why it ends early."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from deeplab_fast import testing

testing.import_torchvision()

from lightning.pytorch.callbacks import Callback, EarlyStopping  # noqa: E402

import deeplab_fast as dlf  # noqa: E402
from deeplab_fast import cli  # noqa: E402
from deeplab_fast.data.transforms import RandomScale  # noqa: E402
from deeplab_fast.engine.config import OptionError, train_config  # noqa: E402
from deeplab_fast.engine.schedule import poly_factor  # noqa: E402
from deeplab_fast.engine.start import build_model, told_by_weights  # noqa: E402
from deeplab_fast.engine.train import fit, imbalance_advice  # noqa: E402
from deeplab_fast.weights import (  # noqa: E402
    CheckpointError,
    embedded_path,
    find_weights,
    from_checkpoint,
    read_state_dict,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plan(tiny, tmp_path_factory):
    root = tiny.write_scenes(tmp_path_factory.mktemp("scenes"), 8)
    return train_config(**tiny.recipe(root), epochs=2, lr=0.1, log_every=1)


@pytest.fixture(scope="module")
def run(plan, tmp_path_factory):
    """A finished run, from which others start."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("first") / "run"
    # A preprocessing of its own, which must come along.
    fit(plan.replace(output=str(folder), input_size=44), quiet=True)
    return folder


class Rates(Callback):
    """Learning rate, decay and momentum before each step, by group."""

    def __init__(self, stop_after=None):
        self.seen, self.stop_after = {}, stop_after

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen[trainer.global_step] = [
            (g["name"], g["lr"], g["weight_decay"], g.get("momentum"), g.get("betas"))
            for g in optimizer.param_groups
        ]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.stop_after:
            raise KeyboardInterrupt


def test_where_weights_lie(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_weights("camvid") == embedded_path("camvid")
    # A data set's folder of that name does not hide it.
    (tmp_path / "camvid").mkdir()
    assert find_weights("camvid") == embedded_path("camvid")
    with pytest.raises(CheckpointError, match="a folder without weights"):
        find_weights("./camvid")
    assert find_weights(run) == run / "model.safetensors"
    cut = tmp_path / "cut/checkpoints"
    cut.mkdir(parents=True)
    for name in ("last.ckpt", "best.ckpt"):
        (cut / name).write_bytes((run / "checkpoints" / name).read_bytes())
        assert find_weights(tmp_path / "cut") == cut / name
    wanted = read_state_dict(run / "checkpoints/best.ckpt")
    found = from_checkpoint(tmp_path / "cut").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(FileNotFoundError, match=r"embedded model \(camvid\); did you mean camvid"):
        find_weights("camvd")
    assert (
        dlf.deeplabv3_efficientnet_lite0(weights="camvid", head="paper", aspp_channels=192).classes
        == dlf.load("camvid").classes
    )


def test_the_weights_tell_the_rest(plan, run, tmp_path):
    """No model, no classes, no size are given: they are the run's, and the record says so."""
    config = plan.replace(
        model=None, classes=None, weights=str(run), output=str(tmp_path / "b"), epochs=1
    )
    told = []
    result = fit(config, tell=told.append)
    record = yaml.safe_load((tmp_path / "b/config.yaml").read_text())
    assert (record["model"], record["classes"]) == (
        "tiny_deeplabv3",
        ["grey", "red", "green", "blue"],
    )
    assert any(
        line.startswith("tiny_deeplabv3") and f"from the weights {run}" in line for line in told
    )
    assert any("shorter side of 44 pixels in training and validation" in line for line in told)
    model = from_checkpoint(result.folder)
    assert model.preprocess.size == 44 and model.classes == ("grey", "red", "green", "blue")
    assert not any("random numbers" in line for line in told)
    own = fit(config.replace(input_size=0, output=str(tmp_path / "c")), quiet=True)
    assert from_checkpoint(own.folder).preprocess.size is None


def test_ranges_for_int8_are_not_those_of_trained_weights():
    assert dlf.load("camvid").calibration is not None
    config = train_config("camvid", weights="camvid")
    assert build_model(config, len(dlf.load("camvid").classes)).calibration is None


def test_the_head_starts_anew_for_other_classes(plan, run):
    """The rest, and the preprocessing, are those of the weights."""
    config = plan.replace(model=None, weights=str(run))
    told = []
    kept = build_model(config, 4, tell=told.append).state_dict()
    assert told == [] and torch.equal(
        kept["classifier.1.weight"], read_state_dict(run)["classifier.1.weight"]
    )
    reset = build_model(config, 3, dlf.data.generic_classes(3), tell=told.append)
    assert (
        len(told) == 1 and "has 4 classes (grey, red, green, ...) and the data 3 classes" in told[0]
    )
    assert reset.preprocess.size == 44 and reset.num_classes == 3
    same = [n for n, v in reset.state_dict().items() if n in kept and v.shape == kept[n].shape]
    assert len(same) == len(kept) - 2
    assert all(torch.equal(reset.state_dict()[name], kept[name]) for name in same)
    asked = build_model(config.replace(reset_head=True), 4).state_dict()
    assert not torch.equal(asked["classifier.1.weight"], kept["classifier.1.weight"])
    told.clear()
    names = dlf.data.generic_classes(4, ["grey", "scarlet", "green", "blue"])
    build_model(config, 4, names, tell=told.append)
    assert len(told) == 1 and "(red -> scarlet)" in told[0]
    told.clear()
    with_aux = build_model(config.replace(aux_weight=0.4), 4, tell=told.append)
    assert "no auxiliary head" in told[0]
    assert torch.equal(with_aux.state_dict()["classifier.1.weight"], kept["classifier.1.weight"])


def test_a_start_without_weights_is_told(plan, tmp_path):
    told = []
    fit(plan.replace(output=str(tmp_path / "run"), epochs=1), tell=told.append)
    assert any("from random numbers (--weights NAME" in line for line in told)
    assert told_by_weights(plan.replace(model=None)).model == "deeplabv3_resnet50"
    # A preset's model is for a start without weights; one that is given stands.
    assert told_by_weights(train_config("torchvision", weights="camvid")).model == (
        "deeplabv3_efficientnet_lite0"
    )
    given = train_config("torchvision", weights="camvid", model="deeplabv3_resnet50")
    assert told_by_weights(given).model == "deeplabv3_resnet50"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"weights": "camvd"}, "weights is 'camvd'.*did you mean camvid", id="name"),
        pytest.param(
            {"model": "deeplabv3_mobilenet_v3_large", "weights_backbone": "a.pth"},
            r"weights_backbone is 'a\.pth', no such",
            id="file",
        ),
        pytest.param({"model": "tiny_deeplab"}, "did you mean 'tiny_deeplabv3'", id="model"),
    ],
)
def test_what_it_cannot_start_from(plan, given, message):
    with pytest.raises(OptionError, match=message) as caught:
        build_model(plan.replace(**given), 4)
    assert "\n" not in str(caught.value)


def test_another_rate_at_a_resume_is_what_runs(plan, tmp_path):
    """Of 4 steps 3 are done; the last has the new base at its place on the curve."""
    for optimizer in ("sgd", "adamw"):
        config = plan.replace(output=str(tmp_path / optimizer), optimizer=optimizer)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(config.replace(checkpoint_minutes=0.0), callbacks=[Rates(3)], quiet=True)
        changes = {
            "lr": 0.02,
            "weight_decay": 0.3,
            "momentum": 0.5,
            "power": 2.0,
            "backbone_lr_factor": 0.1,
        }
        rates, told = Rates(), []
        fit(config.replace(**changes), resume=True, callbacks=[rates], tell=told.append)
        assert any("lr 0.1 -> 0.02" in line and "from step" in line for line in told)
        assert 0 not in rates.seen and max(rates.seen) == 3
        for step, groups in rates.seen.items():
            factor = poly_factor(step, 4, 2.0)
            for name, lr, decay, momentum, betas in groups:
                base = 0.002 if name.startswith("backbone") else 0.02
                assert lr == pytest.approx(base * factor, rel=1e-12)
                assert decay == (0.0 if name.endswith("/no_decay") else 0.3)
                assert (momentum if optimizer == "sgd" else betas[0]) == 0.5
        record = yaml.safe_load((tmp_path / optimizer / "config.yaml").read_text())
        assert {name: record[name] for name in changes} == changes


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"optimizer": "adamw"}, id="optimizer"),
        pytest.param({"decay_norm_and_bias": True}, id="groups of parameters"),
        pytest.param({"aux_weight": 0.4}, id="head"),
        pytest.param({"model_options": {"dropout": 0.2}}, id="model"),
    ],
)
def test_what_a_resumed_run_cannot_change(plan, run, given):
    config = plan.replace(output=str(run), input_size=44, epochs=3, **given)
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(OptionError, match=rf"^{next(iter(given))} is .* that is resumed has"):
        fit(config, resume=True, quiet=True)
    assert (run / "config.yaml").read_bytes() == before


def test_resume_on_the_command_line_takes_the_runs_options(tiny, plan, run, tmp_path, capsys):
    folder = tmp_path / "run"
    fit(plan.replace(output=str(folder), epochs=1), quiet=True)
    status = cli.main(
        ["train", "--resume", "--output", str(folder), "--epochs", "2", "--lr", "0.05"]
    )
    assert status == 0, capsys.readouterr()
    record = yaml.safe_load((folder / "config.yaml").read_text())
    assert (record["epochs"], record["lr"], record["batch_size"], record["model"]) == (
        2,
        0.05,
        4,
        "tiny_deeplabv3",
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lr" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"early_stopping": 2}, id="option"),
        pytest.param(
            {
                "trainer": {
                    "callbacks": [
                        {
                            "class_path": "EarlyStopping",
                            "init_args": {"monitor": "val/miou", "mode": "max", "patience": 2},
                        }
                    ]
                }
            },
            id="by class",
        ),
    ],
)
def test_an_early_stop_is_an_end_and_reported(plan, tmp_path, given):
    # So small a rate changes no label.
    still = {"lr": 1e-12, "freeze_batch_norm": True}
    config = plan.replace(output=str(tmp_path / "run"), epochs=9, **still, **given)
    result = fit(config, quiet=True)
    # The first validation is the best, two more are not better.
    assert (result.steps, result.finished, result.stopped) == (6, True, None)
    assert result.ended.startswith("early stop: val/miou was not better than")
    assert result.weights.exists()
    assert json.loads((tmp_path / "run/result.json").read_text())["ended"] == result.ended
    record = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert record["trainer"] == config.trainer and record["early_stopping"] == config.early_stopping


def test_an_object_in_the_record_asks_for_its_arguments(plan, tmp_path):
    stop = EarlyStopping("val/miou", patience=5)
    config = plan.replace(output=str(tmp_path / "run"), epochs=1, trainer={"callbacks": [stop]})
    fit(config, quiet=True)
    record = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    name = "lightning.pytorch.callbacks.early_stopping.EarlyStopping"
    assert record["trainer"]["callbacks"][0]["class_path"] == name
    again = train_config(**{**record, "output": str(tmp_path / "again")})
    with pytest.raises(OptionError, match=r"made in Python.*give class_path and init_args"):
        fit(again, quiet=True)


class _Fails(Callback):
    def on_fit_start(self, trainer, pl_module):
        raise RuntimeError("no device")


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        pytest.param("EarlyStoping", "did you mean 'EarlyStopping'", id="name"),
        pytest.param("os.path.join", "does not correspond to a subclass", id="no callback"),
        pytest.param([{"class_path": "EarlyStopping"}], "required: monitor", id="arguments"),
    ],
)
def test_callbacks_that_cannot_be_made(plan, tmp_path, callbacks, message):
    config = plan.replace(output=str(tmp_path / "run"), trainer={"callbacks": callbacks})
    with pytest.raises(OptionError, match=rf"trainer\.callbacks has .*{message}"):
        fit(config, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_before_the_first_step_leaves_no_folder(plan, tmp_path):
    for folder in (tmp_path / "run", tmp_path / "there"):
        if folder.name == "there":
            folder.mkdir()
        with pytest.raises(RuntimeError, match="no device"):
            fit(plan.replace(output=str(folder)), callbacks=[_Fails()], quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_transform_of_the_current_folder(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_transforms_of_a_test.py").write_text(
        "def cut(*pair):\n    return [each[4:36, 8:40] for each in pair]\n"
    )
    recipe = tmp_path / "recipe.yaml"
    values = {**plan.as_dict(), "epochs": 1, "transform": "own_transforms_of_a_test.cut"}
    recipe.write_text(yaml.safe_dump(values))
    command = ["train", "--config", str(recipe), "--output", "run"]
    assert cli.main(command) == 2
    assert "type: deeplab-fast train --config" in capsys.readouterr().err
    command.append("--allow-imports")
    assert cli.main(command) == 2
    assert "cannot tell how" in capsys.readouterr().err
    assert cli.main([*command, "--transform-style", "pair"]) == 0, capsys.readouterr()


def test_scale_from_the_size_of_the_network(tiny):
    image, label = tiny.scene(0, 40, 60)
    scaled, labels = RandomScale(0.5, 0.5, base=80)(image, label, torch.Generator())
    assert scaled.shape == (40, 60, 3) and labels.shape == (40, 60)
    scaled, labels = RandomScale(1.0, 1.0, base=(30, 20))(image, label, torch.Generator())
    assert scaled.shape == (30, 20, 3) and set(np.unique(labels)) <= set(np.unique(label))


def test_advice_for_rare_classes():
    config = train_config()
    names = ("road", "pole", "sky")
    text = imbalance_advice([9_000, 50, 950], names, config)
    assert "pole 0.50%" in text and "most are of road, 90%" in text and "sky" not in text
    # Even shares; absent classes, which nothing helps; what is done already.
    assert imbalance_advice([10, 9, 11], names, config) == ""
    assert imbalance_advice([10, 0, 11], names, config) == ""
    done = config.replace(class_weights="inverse_log")
    assert imbalance_advice([9_000, 50, 950], names, done) == ""


def test_a_learning_rate_is_found_and_nothing_is_left(plan, tmp_path, monkeypatch, capsys):
    from deeplab_fast.engine import aids

    monkeypatch.chdir(tmp_path)
    told = []
    found = aids.find_lr(plan.replace(output=None, epochs=None), steps=12, tell=told.append)
    assert len(found.rates) == len(found.losses) and found.rates[0] == pytest.approx(1e-6, rel=1e-3)
    assert all(a < b for a, b in zip(found.rates, found.rates[1:], strict=False))
    assert found.lowest is None or found.suggestion == found.rates[found.lowest] / 10
    assert found.table().count("\n") <= 14 and f"{found.rates[0]:.2e}" in found.table()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(plan.as_dict()))
    assert cli.main(["train", "--config", "r.yaml", "--find-lr", "--validate-only"]) == 2
    assert "--validate-only and --find-lr were given" in capsys.readouterr().err


def test_a_batch_size_is_searched_until_memory_runs_out(plan, monkeypatch):
    """On a stand-in of a GPU's memory that holds 11 images: 10, a twentieth less."""
    from deeplab_fast.engine import aids
    from deeplab_fast.engine.module import SegmentationModule
    from deeplab_fast.engine.train import prepare

    sizes = []
    inputs = SegmentationModule.inputs

    def limited(self, images):
        sizes.append(len(images))
        if len(images) > 11:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return inputs(self, images)

    monkeypatch.setattr(SegmentationModule, "inputs", limited)
    ready = prepare(plan.replace(batch_size=1), tell=lambda text: None)
    assert aids.largest_batch(ready, 1024) == 10
    # More than there are images.
    assert max(sizes) == 16
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="find_batch_size needs a GPU"):
            aids.find_batch_size(plan)


def test_the_suggested_rate_is_below_the_lowest_loss():
    from deeplab_fast.engine.aids import LearningRates

    rates = tuple(10.0 ** (i / 5 - 6) for i in range(31))
    # The first values, of which smoothing knows little, are the lowest of all.
    losses = (0.1, 0.2, 0.3, *(1.0 - 0.02 * i for i in range(20)), *(1.0 + i for i in range(8)))
    found = LearningRates(rates, losses)
    assert found.lowest == 22 and found.suggestion == rates[22] / 10
    assert LearningRates(rates, tuple(map(float, range(31)))).suggestion is None


def test_no_folder_that_was_there_is_taken_away(plan, tmp_path, monkeypatch):
    """Neither by a way over a folder that the run would make, nor the one that one stands in."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(kept)
    for output in (tmp_path / "new/../kept", "new/..", kept):
        with pytest.raises(RuntimeError, match="no device"):
            fit(plan.replace(output=str(output)), callbacks=[_Fails()], quiet=True)
        assert (kept / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "new").exists() and not (kept / "new").exists()


def test_another_patience_at_a_resume_is_what_counts(plan, tmp_path):
    still = {"lr": 1e-12, "freeze_batch_norm": True}
    config = plan.replace(output=str(tmp_path / "run"), epochs=9, early_stopping=1, **still)
    assert fit(config, quiet=True).steps == 4
    result = fit(config.replace(early_stopping=3), resume=True, quiet=True)
    # Two more validations that are not better.
    assert result.steps == 8 and "in 3 validations" in result.ended
    line = json.loads((tmp_path / "run/changes.jsonl").read_text())
    assert line == {"from_step": 4, "changed": {"early_stopping": [1, 3]}}


def test_changes_are_of_the_run_that_goes_on(plan, run, tmp_path):
    """A checkpoint of another run's folder is read only."""
    before = sorted(path.name for path in run.iterdir())
    config = plan.replace(output=str(tmp_path / "b"), input_size=44, epochs=3, lr=0.05)
    fit(config, resume=run / "checkpoints/last.ckpt", quiet=True)
    assert sorted(path.name for path in run.iterdir()) == before
    line = json.loads((tmp_path / "b/changes.jsonl").read_text())
    assert line["from_step"] == 4 and line["changed"]["lr"] == [0.1, 0.05]


def test_a_finished_run_stays_as_it_is(plan, tmp_path):
    for export in ("best", "last"):
        config = plan.replace(output=str(tmp_path / export), export=export, early_stopping=5)
        first = fit(config, quiet=True)
        before = (first.folder / "result.json").read_bytes()
        told = []
        again = fit(config, resume=True, tell=told.append)
        assert "is finished, 4 steps" in told[-1] and again.finished
        assert (again.steps, again.miou, again.weights) == (4, first.miou, first.weights)
        assert (first.folder / "result.json").read_bytes() == before
    # Exported anew: the scores are those of what is exported now.
    other = fit(config.replace(export="best"), resume=True, quiet=True)
    assert (other.exported, other.steps) == ("best", 4)
    assert other.miou == pytest.approx(first.miou)
    assert other.metrics.miou == pytest.approx(other.best_miou)


def test_a_best_model_of_steps_that_were_lost_keeps_its_score(plan, tmp_path):
    """best.ckpt is newer than the last.ckpt that the run goes on from."""
    config = plan.replace(output=str(tmp_path / "run"), epochs=4)
    fit(config.replace(epochs=2), quiet=True)
    folder = tmp_path / "run/checkpoints"
    early = (folder / "last.ckpt").read_bytes()
    fit(config, resume=True, quiet=True)
    best = torch.load(folder / "best.ckpt", weights_only=True)
    assert best["global_step"] > 4
    (folder / "last.ckpt").write_bytes(early)
    (tmp_path / "run/result.json").unlink()
    # Nothing is learnt from here on: the best one stays.
    result = fit(config.replace(lr=1e-12, freeze_backbone_statistics=True), resume=True, quiet=True)
    assert result.exported_step == best["global_step"]
    assert result.metrics.miou == pytest.approx(result.best_miou)
    found = read_state_dict(result.weights)
    wanted = read_state_dict(folder / "best.ckpt")
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_steps_are_done_behind_epochs_of_another_length(plan, tmp_path):
    config = plan.replace(output=str(tmp_path / "run"), epochs=None, steps=9)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(config.replace(checkpoint_minutes=0.0), callbacks=[Rates(3)], quiet=True)
    # 8 images: 4 steps an epoch in place of 2.
    result = fit(config.replace(batch_size=2), resume=True, quiet=True)
    assert (result.steps, result.ended) == (9, None)


def test_an_end_by_the_trainers_arguments_is_no_callbacks(plan, tmp_path):
    config = plan.replace(output=str(tmp_path / "run"), trainer={"limit_train_batches": 1})
    result = fit(config, quiet=True)
    assert result.steps == 2 and "limit_train_batches" in result.ended


def test_classes_to_bootstrap_are_names_or_numbers():
    for text, found in (("[3]", [3]), ("[rare]", ["rare"]), ("[road, 2]", ["road", 2])):
        assert cli.COMMANDS["train"].parser().parse_args(["--bootstrap", text]).bootstrap == found


def test_null_is_a_value(plan, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**plan.as_dict(), "early_stopping": 2, "flip": 0.25}))
    folder = tmp_path / "run"
    command = ["train", "--config", str(recipe), "--output", str(folder)]
    assert cli.main([*command, "--early-stopping", "null", "--flip", "null"]) == 0
    record = yaml.safe_load((folder / "config.yaml").read_text())
    # Of an option that must have a value: its default.
    assert (record["early_stopping"], record["flip"]) == (None, 0.5)
    capsys.readouterr()
    assert cli.main(["train", "--resume", "--output", str(tmp_path / "none")]) == 2
    assert "there is no run in" in capsys.readouterr().err


def test_a_second_stage_is_remembered(plan, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**plan.as_dict(), "epochs": 1}))
    folder = tmp_path / "run"
    command = ["train", "--config", str(recipe), "--output", str(folder), "--stages", "2"]
    assert cli.main([*command, "--stage2.steps", "3"]) == 0
    shutil.rmtree(folder / "stage2")
    assert cli.main(["train", "--resume", "--output", str(folder)]) == 0
    assert json.loads((folder / "stage2/result.json").read_text())["steps"] == 3


def test_a_run_goes_on_without_its_start_weights(plan, run, tmp_path):
    start = tmp_path / "start.safetensors"
    shutil.copy(run / "model.safetensors", start)
    config = plan.replace(model=None, weights=str(start), output=str(tmp_path / "run"), epochs=1)
    fit(config, quiet=True)
    start.unlink()
    assert cli.main(["train", "--resume", "--output", str(tmp_path / "run"), "--epochs", "2"]) == 0
    model = from_checkpoint(tmp_path / "run")
    assert model.preprocess.size == 44
    record = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (record["weights"], record["epochs"]) == (str(start), 2)


def test_the_size_is_that_of_a_model_that_is_given(plan, tmp_path):
    model = build_model(plan, 4)
    result = fit(plan.replace(output=str(tmp_path / "a"), input_size=32), model=model, quiet=True)
    assert from_checkpoint(result.folder).preprocess.size == 32


def test_weights_of_a_backbone_alone_are_pointed_to_their_option(plan, run, tmp_path):
    state = {k: v for k, v in read_state_dict(run).items() if k.startswith("backbone.")}
    torch.save(state, tmp_path / "backbone.pth")
    told = []
    with pytest.raises((OptionError, CheckpointError)) as caught:
        build_model(plan.replace(weights=str(tmp_path / "backbone.pth")), 4, tell=told.append)
    assert "weights_backbone" in str(caught.value) and told == []


def test_backends_are_given_back(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    deterministic = {"trainer": {"deterministic": True}, "epochs": 1}
    for name, given in (("a", {"epochs": 1}), ("b", deterministic)):
        fit(plan.replace(output=str(tmp_path / name), **given), quiet=True)
        assert not torch.backends.cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled()


def test_what_a_callback_lacks_is_one_line(plan, tmp_path):
    config = plan.replace(
        output=str(tmp_path / "run"), trainer={"callbacks": "LearningRateMonitor"}
    )
    with pytest.raises(OptionError, match=r"trainer does not fit: .*logger") as caught:
        fit(config, quiet=True)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_eval_reads_masks_as_the_training_did(tiny, plan, tmp_path, capsys):
    root = tiny.binary_scenes(tmp_path / "binary", 255)
    own = {"root": str(root), "classes": "1", "label_map": "255=1", "epochs": 1}
    result = fit(plan.replace(**own, output=str(tmp_path / "run")), quiet=True)
    data = ["--data", "folder", "--root", str(root), "--split", "all"]
    command = ["eval", *data, "--output", str(tmp_path / "e"), "--weights"]
    assert cli.main([*command, str(tmp_path / "run")]) == 0
    told = capsys.readouterr().err
    assert "as in the training of" in told and "--label-map 255=1" in told
    written = json.loads((tmp_path / "e/metrics.json").read_text())
    assert written["miou"] == pytest.approx(result.metrics.miou)
    # Weights that say nothing of it: what is scored is told to be of one class alone.
    shutil.copy(result.weights, tmp_path / "alone.safetensors")
    assert cli.main([*command, str(tmp_path / "alone.safetensors")]) == 0
    assert "every pixel that counts is of 'background'" in capsys.readouterr().err
