"""Code that a file names is not imported: not without --allow-imports, or typed as well."""

import inspect
import shlex
import sys

import pytest
import yaml

from deeplab_fast import cli, testing
from deeplab_fast.engine.imports import check_imports, imports_of

testing.import_torchvision()

pytestmark = pytest.mark.usefixtures("one_thread")

MARKED = "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\n"


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """The folder of a module that leaves a file where it is imported, as the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "trap.py").write_text(
        MARKED + "from tiny_training import inner_crop as crop\n"
        "def build():\n    raise SystemExit('built')\n"
        "def make(**options):\n    return crop\n"
    )
    yield tmp_path
    sys.modules.pop("trap", None)


def run(capsys, *arguments):
    status = cli.main([*map(str, arguments)])
    return status, capsys.readouterr().err


CALLBACK = {"class_path": "trap.Callback", "init_args": {}}
NESTED = {
    "class_path": "lightning.pytorch.strategies.DDPStrategy",
    "init_args": {"cluster_environment": {"class_path": "trap.Environment"}},
}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        pytest.param({"transform": "trap.make"}, "--transform trap.make", id="transform"),
        pytest.param(
            {"stage2": {"transform": "trap.make"}}, "--stage2.transform trap.make", id="stage 2"
        ),
        pytest.param(
            {"trainer": {"callbacks": [CALLBACK]}}, "--trainer.callbacks trap.", id="callback"
        ),
        pytest.param(
            {"trainer": {"callbacks": "trap.Callback"}}, "--trainer.callbacks trap.", id="by name"
        ),
        pytest.param(
            {"trainer": {"logger": {"class_path": "trap.Logger"}}},
            "--trainer.logger trap.Logger",
            id="logger",
        ),
        pytest.param({"trainer": {"strategy": NESTED}}, "--trainer.strategy", id="class inside"),
        pytest.param({"trainer": {"plugins": [CALLBACK]}}, "--trainer.plugins", id="plugin"),
        pytest.param(
            {
                "trainer": {
                    "callbacks": [
                        {
                            "class_path": "LambdaCallback",
                            "init_args": {"on_fit_start": "trap.make"},
                        }
                    ]
                }
            },
            "--trainer.callbacks LambdaCallback",
            id="callables as arguments",
        ),
        pytest.param(
            {
                "trainer": {
                    "callbacks": {
                        "class_path": "StochasticWeightAveraging",
                        "init_args": {"swa_lrs": 0.1, "avg_fn": "trap.make"},
                    }
                }
            },
            "--trainer.callbacks StochasticWeightAveraging",
            id="a callable among the arguments",
        ),
        pytest.param(
            {
                "trainer": {
                    "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "s3://there"}}
                }
            },
            "--trainer.logger CSVLogger",
            id="another machine",
        ),
        pytest.param(
            {"trainer": {"callbacks": ["lightning.pytorch.callbacks.trap.EarlyStopping"]}},
            "--trainer.callbacks",
            id="a module below Lightning's",
        ),
        pytest.param(
            {"trainer": {"callbacks": ["pytorch_lightning.callbacks.trap.EarlyStopping"]}},
            "--trainer.callbacks",
            id="a module below the other package",
        ),
        pytest.param(
            {
                "trainer": {
                    "strategy": {
                        "class_path": "SingleDeviceStrategy",
                        "init_args": {"device": "trap.Device"},
                    }
                }
            },
            "--trainer.strategy SingleDeviceStrategy",
            id="a path for a device",
        ),
    ],
)
def test_a_configuration_imports_nothing(capsys, trap, values, names):
    (trap / "c.yaml").write_text(yaml.safe_dump({"epochs": 1, "output": "run", **values}))
    status, errors = run(capsys, "train", "--config", "c.yaml")
    assert status == 2 and f"c.yaml has {names}" in errors and "--allow-imports" in errors
    assert not (trap / "RAN").exists()


@pytest.mark.parametrize(
    "option", ["model_options", "data_options", "val_options", "transform_options"]
)
def test_parsing_imports_nothing(capsys, trap, option):
    """Also where it is none that a run would make an object of."""
    (trap / "c.yaml").write_text(yaml.safe_dump({option: {"a": [CALLBACK], **CALLBACK}}))
    assert run(capsys, "train", "--config", "c.yaml")[0] == 2
    assert not (trap / "RAN").exists()


@pytest.mark.parametrize("command", ["predict", "eval", "export"])
def test_no_model_of_a_configurations_code(capsys, trap, command):
    (trap / "c.yaml").write_text("model_from: trap:build\n")
    (trap / "x.png").touch()
    paths = ("x.png",) if command == "predict" else ()
    more = {"predict": ("--output", "o"), "eval": ("--data", "x"), "export": ("--output", "m.pt2")}
    given = (command, "--config", "c.yaml", *paths, *more[command])
    status, errors = run(capsys, *given)
    assert status == 2 and "c.yaml has --model-from trap:build" in errors
    assert not (trap / "RAN").exists()
    # Typed as well it is the user's own.
    if command != "eval":
        assert "its code failed" in run(capsys, *given, "--model-from", "trap:build")[1]
        assert (trap / "RAN").exists()


def test_a_configuration_allows_nothing_itself(capsys, trap):
    (trap / "c.yaml").write_text("transform: trap.make\nallow_imports: true\n")
    status, errors = run(capsys, "train", "--config", "c.yaml")
    assert status == 2 and "has allow_imports, which is for the command line alone" in errors


def test_the_later_one_counts(capsys, trap):
    """Options that are typed stand above a file before them, and below one behind them."""
    (trap / "c.yaml").write_text("transform: trap.make\n")
    for typed in (("--config", "c.yaml", "--transform", "none"), ("--transform", "trap.make")):
        status, errors = run(capsys, "train", *typed)
        assert status == 2 and "allow" not in errors and "--output is missing" in errors
    for typed in (("--transform", "none"), ("--transform", "other.make")):
        errors = run(capsys, "train", *typed, "--config", "c.yaml")[1]
        assert "c.yaml has --transform trap.make" in errors
    assert not (trap / "RAN").exists()


def test_a_runs_own_configuration_is_a_file(capsys, trap, tiny, scenes):
    out = trap / "run"
    (trap / "r.yaml").write_text(yaml.safe_dump({**tiny.recipe(scenes), "epochs": 1}))
    typed = ("--config", "r.yaml", "--output", out, "--transform", "trap.make")
    typed = (*typed, "--transform-options", "{size: 3}")
    status, errors = run(capsys, "train", *typed)
    assert status == 0, errors
    (trap / "RAN").unlink()
    sys.modules.pop("trap")
    again = ("train", "--resume", "--output", out, "--epochs", "2")
    status, errors = run(capsys, *again)
    assert status == 2 and f"the run in {out} has --transform trap.make" in errors
    # Reading masks as the run did imports nothing either.
    data = ("--data", scenes, "--classes", scenes / "classes.txt")
    assert run(capsys, "eval", "--weights", out, *data)[0] == 0
    assert not (trap / "RAN").exists()
    status, errors = run(capsys, *again, "--transform", "trap.make")
    assert status == 0, errors
    status, errors = run(capsys, *again[:-1], "3", "--allow-imports")
    assert status == 0, errors
    assert (trap / "RAN").exists()


def spec(name, **arguments):
    return {"class_path": name, "init_args": arguments}


@pytest.mark.parametrize(
    ("argument", "value", "told"),
    [
        pytest.param(
            "callbacks",
            ["trap.Callback"],
            r"trap\.Callback, code that would be .* only these classes .*: BatchSizeFinder, ",
            id="class",
        ),
        pytest.param(
            "strategy",
            spec("DDPStrategy", static_graph=True, ddp_comm_hook="trap.make"),
            r"DDPStrategy, with its argument ddp_comm_hook, which .* may come .*, static_graph",
            id="argument",
        ),
        pytest.param(
            "strategy",
            spec("DDPStrategy", static_graph="trap.make"),
            r"argument static_graph, which is 'trap\.make'; .* true, false or a number",
            id="a text for a switch",
        ),
        pytest.param(
            "strategy",
            spec("SingleDeviceStrategy", device="trap.Device"),
            r"argument device, which is 'trap\.Device'; from a file a device such as cpu",
            id="no device",
        ),
        pytest.param(
            "logger",
            spec("CSVLogger", save_dir="s3://there"),
            r"argument save_dir, which is 's3://there'; .* no addresses of other machines",
            id="address",
        ),
        pytest.param(
            "callbacks",
            ["lightning.pytorch.trap.EarlyStopping"],
            r"trap\.EarlyStopping, code that .* Lightning's own is EarlyStopping, which may come",
            id="path",
        ),
        pytest.param(
            "logger",
            {**spec("CSVLogger", save_dir="x"), "dict_kwargs": {}},
            r"CSVLogger, with dict_kwargs beside class_path and init_args",
            id="more than a class and arguments",
        ),
        pytest.param(
            "logger",
            {"class_path": "CSVLogger", "init_args": [1]},
            r"CSVLogger, with init_args \[1\], expected a map",
            id="arguments that are none",
        ),
        pytest.param(
            "plugins",
            [spec("trap.Plugin")],
            r"trap\.Plugin, code .* no class may come for this argument",
            id="argument of the trainer",
        ),
    ],
)
def test_what_is_refused_is_named(argument, value, told):
    pytest.importorskip("lightning")
    with pytest.raises(ValueError, match=rf"^f has --trainer\.{argument} .*{told}") as caught:
        check_imports({"trainer": {argument: value}}, "f")
    assert str(caught.value).endswith(". If you trust the file, add --allow-imports")


HONEST = [
    ("strategy", spec("DDPStrategy", static_graph=True, gradient_as_bucket_view=True)),
    ("strategy", spec("DDPStrategy", find_unused_parameters=True, bucket_cap_mb=25)),
    ("strategy", spec("pytorch_lightning.strategies.DDPStrategy", broadcast_buffers=False)),
    ("strategy", spec("SingleDeviceStrategy", device="cpu")),
    ("callbacks", spec("StochasticWeightAveraging", swa_lrs=0.1, device="cpu")),
    ("callbacks", spec("EMAWeightAveraging", device="cuda:0")),
    ("callbacks", "pytorch_lightning.callbacks.LearningRateMonitor"),
    ("callbacks", spec("pytorch_lightning.callbacks.EarlyStopping", monitor="val/loss")),
    ("logger", spec("TensorBoardLogger", save_dir="logs", flush_secs=30)),
]


@pytest.mark.parametrize(("argument", "value"), HONEST)
def test_plain_arguments_of_listed_classes(tmp_path, argument, value):
    """They come from a file, and are made without an import of what a text names."""
    pytest.importorskip("lightning")
    if "TensorBoard" in str(value):
        pytest.importorskip("tensorboard")
    from deeplab_fast.engine.config import TrainConfig
    from deeplab_fast.engine.trainer import trainer_arguments

    trainer = {"accelerator": "cpu", argument: value}
    check_imports({"trainer": trainer}, "a file")
    made = trainer_arguments(TrainConfig(trainer=trainer), tmp_path)[argument]
    made = made[0] if isinstance(made, list) else made
    name = value["class_path"] if isinstance(value, dict) else value
    assert type(made).__name__ == name.rpartition(".")[2]
    assert type(made).__module__.startswith("lightning.pytorch.")
    if isinstance(value, dict) and "static_graph" in value["init_args"]:
        assert made._ddp_kwargs["static_graph"] and made._ddp_kwargs["gradient_as_bucket_view"]


def test_the_whole_command_is_told(capsys, trap, tiny, scenes):
    """To resume a run whose own callback came from a file, or a transform that was typed."""
    (trap / "own.py").write_text(
        "from lightning.pytorch import Callback\n"
        "from tiny_training import inner_crop as cut\n"
        "class Mine(Callback):\n    pass\n"
    )
    values = {**tiny.recipe(scenes), "epochs": 1, "pictures": False}
    (trap / "r.yaml").write_text(yaml.safe_dump(values))
    values["trainer"] = {**values.get("trainer", {}), "callbacks": [{"class_path": "own.Mine"}]}
    (trap / "c.yaml").write_text(yaml.safe_dump(values))
    starts = {
        "its run": ("--config", "c.yaml", "--allow-imports"),
        "typed": ("--config", "r.yaml", "--transform", "own.cut", "--transform-style", "generator"),
    }
    try:
        for out, start in starts.items():
            status, errors = run(capsys, "train", *start, "--output", out)
            assert status == 0, errors
            status, errors = run(capsys, "train", "--resume", "--output", out)
            told = f"type: deeplab-fast train --resume --output {shlex.quote(out)} --allow-imports"
            assert status == 2 and f"the run in {out} has --tra" in errors
            assert errors.splitlines()[0].endswith(told)
            status, errors = run(capsys, *shlex.split(told)[2:])
            assert status == 0, errors
        again = ("train", "--config", "c.yaml", "--resume", "--output", "its run")
        status, errors = run(capsys, *again)
        told = f"type: deeplab-fast {shlex.join(again)} --allow-imports"
        assert status == 2 and errors.splitlines()[0].endswith(told)
        assert run(capsys, *shlex.split(told)[2:])[0] == 0
        # One that is too long to be shown whole is not shown.
        errors = run(capsys, *again, "--data", "x" * 600)[1]
        assert errors.splitlines()[0].endswith("add --allow-imports")
    finally:
        sys.modules.pop("own", None)


def test_safe_classes_of_lightning_take_plain_values():
    pytest.importorskip("lightning")
    from lightning.pytorch import callbacks, loggers, profilers, strategies

    rooms = {
        "callbacks": callbacks,
        "logger": loggers,
        "strategy": strategies,
        "profiler": profilers,
    }
    for argument, room in rooms.items():
        for name in room.__all__:
            cls = getattr(room, name)
            if not isinstance(cls, type) or name == "StrategyRegistry":
                continue
            for parameter in inspect.signature(cls).parameters.values():
                if "Callable" in str(parameter.annotation):
                    made = spec(name, **{parameter.name: "os.system"})
                    assert imports_of({"trainer": {argument: made}}), (name, parameter.name)
    honest = {
        "callbacks": [
            "LearningRateMonitor",
            {
                "class_path": "lightning.pytorch.callbacks.EarlyStopping",
                "init_args": {"monitor": "val/loss", "patience": 3},
            },
            {"class_path": "ModelCheckpoint", "init_args": {"save_top_k": 2}},
        ],
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}},
        "strategy": "ddp",
        "profiler": "simple",
        "precision": "bf16-mixed",
        "devices": [0, 1],
    }
    check_imports({"trainer": honest, "transform": "paper", "stage2": {"lr": 0.1}}, "a file")
