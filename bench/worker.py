"""A child process that runs one provider at a time, on commands from its parent.

One line of JSON in, one out. Peak memory of a CPU call can only be told as the high-water mark of a
process that does nothing else, and two versions of the package only fit into two processes.

    {"do": "prepare", "case", "mode", "provider", "suite", "seed", "copies"} -> {"package"}
    {"do": "time", "first", "calls"}                            -> {"seconds"}
    {"do": "errors"}                                            -> {"errors": {kind: error}}
    {"do": "release"}                                           -> {}
    {"do": "memory", "case", "mode", "provider", "suite", "seed"} -> {"peak", "held", "note"}

An error of a command comes back as {"error": text}; the process lives on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .files import ROOT, scratch

if TYPE_CHECKING:
    from .registry import Case, Provider

# glibc's malloptions: blocks from this size on are mapped by themselves, and return to the system
# when freed, so that the resident size between calls is what is really held.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_SMALLEST_MAPPED = 64 << 10


class WorkerError(RuntimeError):
    """A command failed in the worker, or the worker is gone; the message is its reason."""


class Worker:
    """The parent's side.

    Args:
        root: folder whose deeplab_fast and bench are imported.
        threads: of PyTorch in the child.
    """

    def __init__(self, root: Path = ROOT, threads: int | None = None) -> None:
        command = [sys.executable, "-m", "bench.worker", str(threads or 0)]
        # A child that is ended by force removes no folder.
        scratch()
        environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # A group of its own, so that what it forked ends with it.
            start_new_session=True,
        )

    def ask(self, seconds: float = 300.0, **command: object) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            WorkerError: the command failed, or took longer than `seconds`; the child is ended then.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(command).encode() + b"\n")
            stdin.flush()
            line = self._line(stdout, seconds)
        except OSError as error:
            self.close()
            raise WorkerError(f"the worker is gone ({error})") from error
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _line(self, stdout: IO[bytes], seconds: float) -> bytes:
        with selectors.DefaultSelector() as ready:
            ready.register(stdout, selectors.EVENT_READ)
            if not ready.select(seconds):
                self.close()
                raise WorkerError(f"no answer within {seconds:.0f} s")
        line = stdout.readline()
        if not line:
            status = self._process.wait()
            raise WorkerError(f"the worker ended with status {status}")
        return line

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


class _Served:
    """The child's side."""

    def __init__(self) -> None:
        self.run: Any = None

    def prepare(
        self, case: str, mode: str, provider: str, suite: str, seed: int, copies: int
    ) -> dict:
        """Build a provider at a case and keep it."""
        import deeplab_fast
        from bench.everything import registry

        self.release()
        chosen = registry.SUITES[suite]
        self.case, self.mode = registry.case(case), mode
        self.provider, self.suite = registry.provider(provider), chosen
        reason = registry.missing_reason(self.provider, self.case, mode, chosen)
        if reason:
            raise WorkerError(f"missing: {reason}")
        self.args = self.case.setup(chosen.device, chosen.dtype, seed, copies)
        before = _resident()
        self.run = self.provider.build(self.case, mode, chosen.device, chosen.dtype, self.args)
        # Inputs that were brought to another layout are the case's, not what the provider holds.
        there = {t.data_ptr() for given in self.args.inputs for t in given}
        inputs = [t for given in self.run.inputs for t in given if t.data_ptr() not in there]
        self.base = before + sum(t.nbytes for t in inputs)
        return {"package": str(Path(deeplab_fast.__file__).resolve().parent)}

    def time(self, first: int, calls: int) -> dict:
        """Seconds of a call of what was prepared."""
        from bench.measure import clock

        return {"seconds": clock(self.suite.device)(self.run, first, calls)}

    def errors(self) -> dict:
        """Errors of what was prepared, against the exact result."""
        from bench import gate
        from bench.providers import expected

        exact = expected(self.case, self.mode, self.args)
        found = gate.errors(self.case, self.mode, gate.outputs(self.run.probe()), exact)
        return {"errors": found}

    def memory(self, **what: str | int) -> dict:
        """Memory of a provider at a case, in a process forked for it alone.

        A fork carries over no threads. That is safe as long as this process has never computed
        anything: PyTorch starts its threads at the first parallel loop.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with os.fdopen(writer, "w") as answers:
                try:
                    answer = _answer(lambda: self._memory(**what))
                except BaseException as error:
                    answer = {"error": repr(error)}
                answers.write(json.dumps(answer))
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answers:
            text = answers.read()
        _, status = os.waitpid(child, 0)
        if not text:
            code = os.waitstatus_to_exitcode(status)
            raise WorkerError(f"its process ended with status {code}")
        return json.loads(text)

    def _memory(self, **what: Any) -> dict:
        _return_memory_at_once()
        self.prepare(**what, copies=1)
        self.run(0)
        resident = _resident()
        reset = _reset_high_water()
        before = _status("VmHWM")
        result = self.run(0)
        after = _status("VmHWM")
        del result
        note = ""
        if not reset and after == before:
            # The mark of the call before hides this one's.
            note = "peak memory is an upper bound: the high-water mark could not be reset"
        return {"peak": max(0, after - resident), "held": resident - self.base, "note": note}

    def release(self) -> dict:
        """Forget what was prepared."""
        self.run = self.args = None
        if "torch._dynamo" in sys.modules:
            import torch

            torch._dynamo.reset()
        gc.collect()
        return {}


def _resident() -> int:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int:
    """A size of this process in bytes: VmRSS, or VmHWM, its high-water mark."""
    try:
        text = Path("/proc/self/status").read_text("ascii")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in text.splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _reset_high_water() -> bool:
    """Bring the high-water mark down to the present size; not every system lets one."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    return True


def _return_memory_at_once() -> None:
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _SMALLEST_MAPPED)
        libc.mallopt(_M_TRIM_THRESHOLD, _SMALLEST_MAPPED)


def _answer(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return action()
    except WorkerError as error:
        return {"error": str(error)}
    except Exception as error:
        from deeplab_fast.dispatch.errors import one_line

        return {"error": one_line(error)}


def main() -> int:
    """Serve commands from standard input until it ends."""
    # Libraries print; answers go where only answers go.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    from bench.everything import registry

    registry.providers()
    if threads := int(sys.argv[1]):
        torch.set_num_threads(threads)
    served = _Served()
    actions = {
        "prepare": served.prepare,
        "time": served.time,
        "memory": served.memory,
        "errors": served.errors,
        "release": served.release,
    }
    for line in sys.stdin:
        command = json.loads(line)
        action = actions[command.pop("do")]
        answers.write(json.dumps(_answer(lambda a=action, c=command: a(**c))) + "\n")
    return 0


class CpuMemory:
    """Peak memory on a CPU, of each provider at each case in a process of its own.

    Args:
        suite: name of the suite.
        seed: of weights and inputs.
        threads: of PyTorch.
    """

    def __init__(self, suite: str, seed: int, threads: int) -> None:
        self.suite, self.seed, self.threads = suite, seed, threads
        self.worker: Worker | None = None

    def __call__(
        self, case: Case, mode: str, provider: Provider
    ) -> tuple[int | None, int | None, str]:
        """(peak bytes of a call, bytes held between calls, note); None where it failed."""
        if self.worker is None or not self.worker.alive:
            self.worker = Worker(threads=self.threads)
        what = {"case": case.id, "mode": mode, "provider": provider.name}
        try:
            found = self.worker.ask(do="memory", suite=self.suite, seed=self.seed, **what)
        except WorkerError as error:
            return None, None, f"memory not measured: {error}"
        return found["peak"], found["held"], found["note"]

    def close(self) -> None:
        """End the process."""
        if self.worker is not None:
            self.worker.close()

    def __enter__(self) -> CpuMemory:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


if __name__ == "__main__":
    # The class of WorkerError must be the one that other modules of the package raise.
    from bench.worker import main as serve

    sys.exit(serve())
