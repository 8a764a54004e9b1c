"""What the command line says of its own arguments, before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import deeplab_fast
from deeplab_fast import cli
from deeplab_fast.cli.parser import CommandParser, did_you_mean

ROOT = Path(__file__).resolve().parents[2]


def said(capsys, *arguments: str) -> list[str]:
    """The lines of an error, which is one of bad arguments."""
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("predict", "a", "--tyle", "3"), "there is no option --tyle; did you mean "
                     "--tile?", id="misspelt"),
        pytest.param(("predict", "a", "--over", "0.5"), "there is no option --over; did you mean "
                     "--overlap?", id="abbreviated"),
        pytest.param(("eval", "--tyle=3"), "there is no option --tyle; did you mean --tile?",
                     id="with a value behind an equals sign"),
        pytest.param(("train", "--learning-rate", "3"), "there is no option "
                     "--learning-rate; did you mean --lr?", id="another library's name"),
        pytest.param(("train", "--batch_size", "3"), "there is no option --batch_size; did you "
                     "mean --batch-size?", id="underscore"),
        pytest.param(("info", "--qqqqq"), "there is no option --qqqqq", id="like no other"),
        pytest.param(("predict", "a", "--flip", "b"), "b: no option stands before it; name every "
                     "PATH in one place", id="a path behind options"),
        pytest.param(("info", "b"), "b: no option stands before it, and the command takes options "
                     "only; leave it out", id="no arguments at all"),
        pytest.param(("predict", "a", "--tile", "3"), "--tile: expected 2 arguments: --tile H W",
                     id="too few values"),
        pytest.param(("predict", "a", "--tile", "3", "b"), "--tile: value 2 is b, expected an "
                     "integer", id="one of several values"),
        pytest.param(("predict", "--scales", "1", "a.png"), "--scales: value 2 is a.png, expected "
                     "a number; PATH stands before --scales, or another option in between",
                     id="an option that takes the paths too"),
        pytest.param(("predict", "a", "--size", "1.5"), "--size: 1.5 was given, expected an "
                     "integer", id="None is no word of the command line"),
        pytest.param(("predict", "a", "--size.x", "1"), "there is no option --size.x; --size takes "
                     "an integer", id="a part of what has none"),
        pytest.param(("train", "--crop", "x"), "--crop: x was given, expected an integer or a list,"
                     " e.g. [1,2]", id="one of two kinds"),
        pytest.param(("train", "--crop", "[1,x]"), "--crop: x was given, expected an integer",
                     id="an element of one of two kinds"),
        pytest.param(("train", "--freeze", "backbone"), "--freeze: backbone was given, expected a "
                     "list: [backbone]", id="a word for a list of words"),
        pytest.param(("train", "--freeze", "[3]"), '--freeze: 3 was given, expected a text, '
                     'as in ["3"]', id="a number in a list of words"),
        pytest.param(("train", "--model_options.dropout", "0.5"), "there is no option "
                     "--model_options.dropout; did you mean --model-options.dropout?",
                     id="underscore before a part"),
        pytest.param(("predict", "a", "--flip=3"), "--flip takes no value; leave it out",
                     id="a switch"),
        pytest.param(("predict",), "PATH is missing", id="a required argument"),
        pytest.param(("predict", "a", "--config", "no.yaml"), "--config: File does not exist: ",
                     id="what jsonargparse says else"),
    ],
)  # fmt: skip
def test_bad_options(capsys, arguments, message):
    error, where = said(capsys, *arguments)
    command = arguments[0]
    assert error.startswith(f"deeplab-fast {command}: error: {message}")
    # Whole, but where a path of this machine follows.
    assert error.endswith(message) or "no.yaml" in arguments
    assert where == f"All options: deeplab-fast {command} --help"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("paths: a.jpg", "paths: a.jpg, expected a list; write paths: [a.jpg]",
                     id="a word"),
        pytest.param("tile: 3", "tile: 3, expected a list; write tile: [3]", id="a number"),
        pytest.param("paths: {a: 3}", "paths: {'a': 3}, expected a list", id="a map"),
    ],
)  # fmt: skip
def test_lists_in_a_configuration(capsys, tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    for arguments in (("--config", str(path)), (f"--config={path}",)):
        error, _ = said(capsys, "predict", *arguments)
        assert error == f"deeplab-fast predict: error: the configuration has {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("predikt",), "there is no command predikt; did you mean predict?", id="one"),
        pytest.param(("check_data",), "there is no command check_data; did you mean check-data?",
                     id="underscore"),
        pytest.param(("--versoin",), "there is no command --versoin; did you mean --version?",
                     id="option"),
        pytest.param(("xyz",), "there is no command xyz", id="like no other"),
        pytest.param((), "a command is missing", id="none"),
    ],
)  # fmt: skip
def test_bad_commands(capsys, arguments, message):
    error, commands = said(capsys, *arguments)
    assert error == f"deeplab-fast: error: {message}"
    assert commands.startswith("Commands: predict, eval, train, ")


def test_a_key_of_a_configuration(capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("overlapp: 0.5\n")
    error, _ = said(capsys, "predict", "a", "--config", str(file))
    expected = "the configuration has overlapp; there is no option --overlapp; did you mean "
    assert error == f"deeplab-fast predict: error: {expected}--overlap?"


def test_a_types_own_parser_raises():
    """jsonargparse makes parsers of the same class to try the members of a union."""
    import argparse

    with pytest.raises(argparse.ArgumentError, match="unrecognized arguments: --x"):
        CommandParser(exit_on_error=False).parse_args(["--x"])


@pytest.mark.parametrize(
    ("name", "means"),
    [
        pytest.param("--out", "--output, --output-stride", id="the beginning of two"),
        pytest.param("--rate", "--learning-rate", id="the end of one"),
        pytest.param("--x", "", id="too short to mean any"),
    ],
)
def test_did_you_mean(name, means):
    assert (
        did_you_mean(name, ["--x-ray", "--output", "--output-stride", "--learning-rate"]) == means
    )


def test_help_needs_no_pytorch():
    """Of the program and of every command, and a command needs no other's parser."""
    code = (
        "import contextlib, io, sys\n"
        "arguments, sys.argv = sys.argv[1:], ['bin/deeplab-fast']\n"
        "from deeplab_fast import cli\n"
        "texts = []\n"
        "for command in ('', *arguments):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as text:\n"
        "        assert cli.main([*command.split(), '--help']) == 0\n"
        "    if not command:\n"
        "        assert 'jsonargparse' not in sys.modules\n"
        "    texts.append(text.getvalue())\n"
        "assert 'torch' not in sys.modules\n"
        "for command, text in zip(arguments, texts[1:], strict=True):\n"
        "    assert text.startswith(f'usage: deeplab-fast {command}'), text\n"
        "    assert f'\\n    {command}' in texts[0], texts[0]\n"
    )
    commands = (
        "predict", "eval", "train", "check-data", "calibrate", "export", "tune", "info", "models",
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", code, *commands], check=True, cwd=ROOT)


def test_the_module_is_the_command(capsys):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deeplab_fast", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "deeplab_fast.cli" in done.stderr and "torch" not in done.stderr
    assert done.stdout == f"deeplab-fast {deeplab_fast.__version__}\n"
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == done.stdout


def test_threads_may_be_the_first_to_use_what_was_imported():
    code = (
        "import threading\n"
        "import deeplab_fast as dlf\n"
        "def load(): dlf.load('camvid')\n"
        "def inspect(): dlf.weights.inspect_weights('camvid')\n"
        "def models():\n"
        "    from deeplab_fast.models import deeplabv3_resnet50\n"
        "    assert deeplabv3_resnet50.__name__ in dlf.models.list_models()\n"
        "def weights():\n"
        "    from deeplab_fast.weights import from_checkpoint\n"
        "def predict():\n"
        "    from deeplab_fast.engine.predict import predict\n"
        "uses = [load, inspect, models, weights, predict, load]\n"
        "barrier, done = threading.Barrier(len(uses)), []\n"
        "def first(use):\n"
        "    barrier.wait()\n"
        "    use()\n"
        "    done.append(use)\n"
        "threads = [threading.Thread(target=first, args=(use,)) for use in uses]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "assert len(done) == len(uses)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_the_public_names_come_to_the_command_at_first_use():
    code = (
        "import inspect, sys\n"
        "sys.argv[0] = 'bin/deeplab-fast'\n"
        "import deeplab_fast\n"
        "inspect.unwrap(deeplab_fast)\n"
        "assert deeplab_fast.__version__ and 'torch' not in sys.modules\n"
        # What is registered by an import is there, whichever module is asked first.
        "from deeplab_fast.weights import embedded_path, inspect_weights\n"
        "assert inspect_weights(embedded_path('camvid')).model == 'deeplabv3_efficientnet_lite0'\n"
        "from deeplab_fast import *\n"
        "import torch\n"
        "assert deeplabv3_resnet50 is deeplab_fast.models.deeplabv3_resnet50\n"
        "assert deeplab_fast.__all__ and set(deeplab_fast.__all__) <= set(dir(deeplab_fast))\n"
        "assert deeplab_fast.export is deeplab_fast.exporting.export\n"
        "assert not hasattr(deeplab_fast, 'setup') and not hasattr(deeplab_fast, 'nope')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_ops_are_declared_whichever_module_is_asked_first():
    code = (
        "import torch\n"
        "from deeplab_fast.backends import registered_ops, why\n"
        "assert 'upsample_argmax' in registered_ops()\n"
        "why('upsample_argmax', torch.zeros(1, 3, 4, 4), (8, 8)).chosen\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
