"""The GPU that is tuned for, as a child process finds it, and what stands in for it in a rehearsal.

The process that forks makes no CUDA context: it learns from a child what the GPU is.

`DEEPLAB_FAST_STAND_IN` names a JSON file that makes the CPU play the GPU, so that everything but
the GPU itself can be tried where there is none:

    {"faults": {"PART OF A UNIT'S NAME": "hang" | "crash" | "wrong" | "error" | "slow"}}

"triton" is then the C++ code for the CPU and "cuda" the reference; records have compute capability
0.0, which no GPU has.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..dispatch.errors import Wrong
from ..dispatch.examples import Run
from ..dispatch.records import Versions

STAND_IN = "DEEPLAB_FAST_STAND_IN"
_STAND_IN_CAPABILITY = (0, 0)
FAULTS = ("hang", "crash", "wrong", "error", "slow")


@dataclass(frozen=True)
class Machine:
    """What is tuned for.

    Attributes:
        device: of tensors, "cuda", or "cpu" for a stand-in.
        gpu: its name.
        capability: compute capability.
        multiprocessors: streaming multiprocessors.
        memory_mb: of the device, MiB.
        driver, torch, triton: versions.
    """

    device: str
    gpu: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_mb: int
    driver: str
    torch: str
    triton: str

    def as_dict(self) -> dict[str, Any]:
        """The facts as JSON has them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Machine:
        """What `as_dict` gave."""
        return cls(**{**facts, "capability": tuple(facts["capability"])})

    def implementation(self, op: str, backend: str) -> backends.Implementation:
        """An op's implementation on a backend, or what stands in for it.

        Raises:
            KeyError: the op has none.
        """
        table = backends.implementations(op)
        found = table[backend]
        if self.device == "cuda":
            return found
        return table["reference"] if backend == "cuda" or "cpu" not in table else table["cpu"]

    def reasons(self, op: str, backend: str, desc: backends.OpDesc) -> list[str]:
        """Why a call, described for another device, cannot run on a backend here."""
        implementation = self.implementation(op, backend)
        if self.device != "cuda":
            return implementation.not_supported_reasons(replace(desc, device=self.device))
        on_gpu = replace(desc, device="cuda", capability=self.capability, gpu=self.gpu)
        return implementation.not_supported_reasons(on_gpu)


def why_none() -> str:
    """Why there is no GPU to tune for, as far as that is known without a CUDA context; else ""."""
    if os.environ.get(STAND_IN):
        return ""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return ""


def identity() -> dict[str, Any]:
    """The facts of the GPU; makes a CUDA context, so it is for a child process.

    Raises:
        Wrong: there is no GPU.
    """
    versions = Versions.here()
    if os.environ.get(STAND_IN):
        machine = Machine(
            "cpu", "stand-in", _STAND_IN_CAPABILITY, 1, 0,
            versions.driver, versions.torch, versions.triton,
        )  # fmt: skip
        return machine.as_dict()
    if not torch.cuda.is_available():
        raise Wrong("no CUDA device is visible")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    machine = Machine(
        "cuda",
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.total_memory >> 20,
        versions.driver,
        versions.torch,
        versions.triton,
    )
    return machine.as_dict()


def fault_of(unit: str) -> str:
    """What the stand-in does to a unit, of FAULTS; "" for nothing.

    Raises:
        ValueError: the file names another fault.
    """
    path = os.environ.get(STAND_IN)
    if not path:
        return ""
    faults = json.loads(Path(path).read_text("utf-8")).get("faults", {})
    fault = next((fault for part, fault in faults.items() if part in unit), "")
    if fault and fault not in FAULTS:
        raise ValueError(f"{path}: fault {fault!r} of {unit!r} is none of {', '.join(FAULTS)}")
    return fault


def suffer(fault: str) -> None:
    """Do in a child what a GPU kernel might; the rest is `spoiled`'s part."""
    if fault == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(60)
    if fault == "crash":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)


def spoiled(run: Run, fault: str) -> Run:
    """An implementation whose results are wrong or late, or that raises."""
    if fault not in ("wrong", "slow", "error"):
        return run

    def wrong(*args: object) -> object:
        if fault == "error":
            raise RuntimeError("CUDA error: an illegal memory access was encountered (rehearsed)")
        if fault == "slow":
            time.sleep(0.05)
            return run(*args)
        results = run(*args)
        for t in [results] if isinstance(results, Tensor) else results or args[:1]:
            if isinstance(t, Tensor) and t.numel():
                # One element: what a norm over all of them might hide.
                t[(-1,) * t.dim()] += 100
        return results

    return wrong
