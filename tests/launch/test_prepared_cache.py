"""A cache of Triton that was filled without a GPU, read where it was not filled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import prepare_gpu

pytestmark = pytest.mark.launch

# In a process of its own: Triton asks the cache for what the process has not launched yet.
FILL = """
import sys
from pathlib import Path
import torch
from bench import prepare_gpu
from deeplab_fast import ops

logits = torch.zeros(1, 21, 9, 9)
prepare_gpu.calls = lambda: [("argmax", lambda: ops.upsample_argmax(logits, (65, 65)))]
print(prepare_gpu.fill(Path(sys.argv[1])))
"""


def fill(cache: Path) -> int:
    command = [sys.executable, "-c", FILL, str(cache)]
    done = subprocess.run(
        command, cwd=prepare_gpu.ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1])


def test_a_cache_is_read_elsewhere(tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    assert fill(first) > 1
    prepare_gpu.pack_cache(first, tmp_path / "archive")
    first.rename(tmp_path / "moved")
    prepare_gpu.unpack_cache(tmp_path / "archive", other)
    assert fill(other) == 0
    (kernel,) = other.glob("*/upsample_argmax_kernel.cubin")
    kernel.with_suffix(".json").unlink()
    assert fill(other) == 1


def test_calls_have_names_of_their_own() -> None:
    names = [name for name, _ in prepare_gpu.calls()]
    assert len(set(names)) == len(names) > 100
