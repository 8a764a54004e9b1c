"""The GPU tests are there to run, on a machine that has no GPU to run them.

Collection imports every module and makes every parameter, also those that ask for the device. It
must not need an extension, and a module that fails must not take the others with it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Collects as on an H100; pytest's exit status.
COLLECT = """
import sys
import pytest, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda device=None: (9, 0)
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"]))
"""


@pytest.mark.parametrize(
    "disabled", [pytest.param("0", id="as built"), pytest.param("1", id="without an extension")]
)
def test_every_module_is_collected(disabled: str) -> None:
    env = os.environ | {"DEEPLAB_FAST_DISABLE_EXT": disabled}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    collected = set(re.findall(r"^tests/gpu/(\w+\.py)::", done.stdout, re.MULTILINE))
    assert collected == {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}


def test_a_broken_module_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("raise RuntimeError('broken on purpose')\n")
    (tmp_path / "test_whole.py").write_text("def test_runs():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "broken on purpose" in done.stdout
    assert "1 passed, 1 error" in done.stdout
    assert done.returncode == 1
