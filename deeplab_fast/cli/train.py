"""``deeplab-fast train``: training runs."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from deeplab_fast.cli.common import PROGRAM, UsageError, add_imports_argument, tell

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from deeplab_fast.engine.config import TrainConfig

# What is done in place of training.
_TRIES = ("validate_only", "find_lr", "find_batch_size")
_TO_SEE = ("curves.png", "classes.png", "confusion.png", "panels", "batch.png")
HELP = "train a model: the paper's protocol, or your own"


def parser() -> ArgumentParser:
    from deeplab_fast.cli.parser import CommandParser, Plain
    from deeplab_fast.engine.config import PRESETS, TrainConfig

    parser = CommandParser(
        "train",
        description="Trains a model, for instance: deeplab-fast train --data folder --root data/"
        " --weights camvid --epochs 30 --output runs/mine. Into the folder --output go config.yaml"
        " (runs again with --config), versions.json, metrics.jsonl, results.csv, tensorboard/,"
        " checkpoints/last.ckpt and best.ckpt, batch.png, curves.png, classes.png, confusion.png,"
        " panels/ and at the end model.safetensors (for predict and eval) and result.json."
        " SIGTERM and Ctrl+C save and stop; --resume goes on with the same result. Under torchrun"
        " or SLURM the processes share each batch. Needs pip install deeplab_fast[train].",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add(
        "--preset",
        type=str | None,
        metavar="NAME",
        help=f"{', '.join(PRESETS)}: values that the options below go before",
    )
    add(
        "--stages",
        type=int,
        default=1,
        metavar="1|2",
        help="2 adds the paper's second stage in OUTPUT/stage2, after OUTPUT/stage1: batch norm "
        "frozen, output stride 8, a tenth of the learning rate",
    )
    add(
        "--stage2",
        type=dict[str, Plain],
        default={},
        metavar="MAP",
        help="options of the second stage: --stage2.steps 10000",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from checkpoints/last.ckpt of --output, if there is one, with the run's own "
        "config.yaml unless --preset or --config is given; options given now stand above it",
    )
    add(
        "--validate-only",
        action="store_true",
        help="score --weights (or the untrained model) on the validation data, train nothing",
    )
    add(
        "--find-lr",
        action="store_true",
        help="try 100 steps at learning rates from 1e-6 to 1, print the losses and a tenth of the "
        "rate where they are lowest, train nothing",
    )
    add(
        "--find-batch-size",
        action="store_true",
        help="print the largest batch of crops that fits into the GPU's memory, train nothing",
    )
    add_imports_argument(add)
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory() if callable(field.default_factory) else None
        note = "" if default in (None, {}, []) else f" (default: {_shown(default)})"
        more: dict[str, Any] = {}
        if field.metadata["metavar"]:
            more["metavar"] = field.metadata["metavar"]
        if hints[field.name] is bool:
            # Alone it says yes.
            more |= {"nargs": "?", "const": True}
        add(
            "--" + field.name.replace("_", "-"),
            # Not given is told from given: a preset's value goes between.
            type=(dict[str, Plain] if hints[field.name] == dict[str, Any] else hints[field.name])
            | None,
            default=argparse.SUPPRESS,
            help=field.metadata["help"] + note,
            **more,
        )
    return parser


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def own_process() -> None:
    """What is done to a process that is there for this command alone."""
    import torch

    from deeplab_fast.engine.heap import keep_freed_memory

    if not torch.cuda.is_available():
        keep_freed_memory()


def run(config: Namespace) -> int:
    from deeplab_fast.backends import BackendUnavailable
    from deeplab_fast.engine.config import OptionError
    from deeplab_fast.engine.imports import imports_of
    from deeplab_fast.engine.train import TrainingUnavailable, fit_stages, validate

    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        planned = _plan(config)
        plan = planned.config
        # Where --transform and callbacks of the user lie; behind everything that is installed.
        # Not for runs without: the folder may be anybody's, with modules of any name.
        if imports_of({**plan.as_dict(), "stage2": planned.stage2}) and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        tries = [f"--{name.replace('_', '-')}" for name in _TRIES if config[name]]
        if len(tries) > 1:
            raise UsageError(f"{' and '.join(tries)} were given; expected one of them at a time")
        if config.find_lr or config.find_batch_size:
            _find(config, plan)
            return 0
        if config.validate_only:
            metrics = validate(plan, progress=sys.stderr.isatty())
            print(metrics.table())
            return 1 if metrics.not_finite else 0
        results = fit_stages(
            plan,
            stages=planned.stages,
            stage2=planned.stage2,
            resume=config.resume,
        )
    except OptionError as error:
        name, dot, argument = error.option.partition(".")
        option = f"--{name.replace('_', '-')}{dot}{argument}"
        raise UsageError(f"{option} {error.problem}") from error
    except (TrainingUnavailable, BackendUnavailable, ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    except (MemoryError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and text.startswith("[Errno") and error.errno == errno.ENOSPC:
            text = (
                f"{text}: {config.get('output')}; its checkpoints are whole: make room, then go on "
                "with --resume"
            )
        tell("train", text)
        return 1
    except RuntimeError as error:
        from deeplab_fast.engine.captured import CaptureFailed
        from deeplab_fast.engine.module import NonFiniteLoss
        from deeplab_fast.engine.runner import is_out_of_memory

        if not isinstance(error, (NonFiniteLoss, CaptureFailed)) and not is_out_of_memory(error):
            raise
        tell("train", str(error))
        return 1
    result = results[-1]
    if first and result.metrics is not None:
        print(result.metrics.table())
    if result.finished:
        if first:
            early = f" ({result.ended})" if result.ended else ""
            which = f"{result.exported} weights, of step {result.exported_step}"
            print(f"{result.steps} steps done{early}, the model is {result.weights} ({which})")
            drawn = [name for name in _TO_SEE if (result.folder / name).exists()]
            if drawn:
                print(f"to look at: {', '.join(drawn)} in {result.folder}")
        return 1 if result.last_metrics is not None and result.last_metrics.not_finite else 0
    if first:
        print(f"{result.stopped}, {result.steps} steps done; --resume goes on in {result.folder}")
    return {"SIGINT": 130, "SIGTERM": 143}.get((result.stopped or "").rsplit(" ", 1)[-1], 0)


@dataclass(frozen=True)
class _Plan:
    """The options of a run, and of its second stage where it has one."""

    config: TrainConfig
    stages: int
    stage2: dict[str, Any]


def _plan(config: Namespace) -> _Plan:
    """What is to be run: of a resumed run its own options, under those that are given now."""
    from deeplab_fast.engine.config import TrainConfig, train_config
    from deeplab_fast.engine.imports import check_imports
    from deeplab_fast.engine.run_folder import read_stages, run_config

    hints = get_type_hints(TrainConfig)
    given = config.as_dict() if hasattr(config, "as_dict") else dict(config)
    # null is a value where an option has none by default, else the default.
    options = {
        name: value
        for name, value in given.items()
        if name in hints and (value is not None or type(None) in get_args(hints[name]))
    }
    stages, stage2 = config.stages, dict(config.stage2 or {})
    base: dict[str, Any] = {}
    output = options.get("output")
    if config.resume and output and config.preset is None and not config.config:
        try:
            recorded = read_stages(output)
        except ValueError:
            # Told again it needs no record.
            if stages != 2:
                raise
            recorded = None
        if recorded is not None:
            stages, stage2 = 2, {**recorded, **stage2}
        before = run_config(Path(output, "stage1") if stages == 2 else output)
        if before is None and not {"epochs", "steps"} & options.keys():
            raise UsageError(f"--resume: there is no run in {output} to go on with")
        base = {} if before is None else before.as_dict()
        if not config.allow_imports:
            kept = {name: value for name, value in base.items() if name not in options}
            own = {**kept, "stage2": {k: v for k, v in stage2.items() if k not in config.stage2}}
            again = f"{PROGRAM} train --resume --output {shlex.quote(str(output))} --allow-imports"
            more = ", with your other options" if options.keys() - {"output"} else ""
            check_imports(own, f"the run in {output}", advice=f"type: {again}{more}")
        for one, other in (("epochs", "steps"), ("steps", "epochs")):
            if options.get(one) is not None:
                base.pop(other, None)
    return _Plan(train_config(config.preset, **{**base, **options}), stages, stage2)


def _find(config: Namespace, plan: TrainConfig) -> None:
    from deeplab_fast.engine.progress import say
    from deeplab_fast.engine.trainer import import_lightning

    import_lightning()
    from deeplab_fast.engine.aids import find_batch_size, find_lr

    if config.find_lr:
        found = find_lr(plan, tell=say)
        print(found.table())
        if found.suggestion is not None:
            print(f"train with --lr {found.suggestion:.2g} (now {plan.lr:g})")
        return
    size = find_batch_size(plan, tell=say)
    print(f"{size} crops of {plan.crop_size[1]}x{plan.crop_size[0]} fit: --batch-size {size}")
