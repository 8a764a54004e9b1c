"""Fixtures that run a test with every implementation there is on a CPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import deeplab_fast as dlf
from deeplab_fast import _ext
from deeplab_fast.engine import checked
from deeplab_fast.engine.config import TrainConfig, train_config
from deeplab_fast.testing import cpu_instruction_sets

OPS = torch.ops.deeplab_fast


@pytest.fixture(autouse=True, scope="session")
def own_checks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data checks are remembered apart from the user's."""
    folder = tmp_path_factory.mktemp("checks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checked, "checks_folder", lambda: folder)
        yield


@pytest.fixture(params=["reference", *cpu_instruction_sets()])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the reference and with the C++ code of every instruction set."""
    if request.param == "reference":
        with dlf.use_backend("reference"):
            yield request.param
        return
    OPS._cpu_instruction_set(request.param)
    with dlf.use_backend("cpu"):
        yield request.param
    OPS._cpu_instruction_set("auto")


@pytest.fixture
def compiled() -> Iterator[None]:
    """Runs the test with the C++ code that the processor gets by default."""
    if not _ext.CPU.loaded:
        pytest.skip(_ext.CPU.reason)
    with dlf.use_backend("cpu"):
        yield


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny_training; ``tiny.__file__`` is a script for processes."""
    path = Path(__file__).with_name("tiny_training.py")
    spec = importlib.util.spec_from_file_location("tiny_training", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Configs name its transforms.
    sys.modules["tiny_training"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def scenes(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 photos with masks, and classes.txt."""
    return tiny.write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny convolutions sum in one order, and take 17 ms and not 740 on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tiny: ModuleType, scenes: Path, tmp_path: Path) -> TrainConfig:
    """A run of the tiny model on the 12 scenes, 3 steps an epoch."""
    return train_config(
        **tiny.recipe(scenes),
        scale=[1.0, 1.0],
        epochs=2,
        lr=0.1,
        log_every=1,
        export="last",
        output=str(tmp_path / "run"),
    )
