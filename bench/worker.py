"""A child process that runs one provider at a time, on commands from its parent.

One line of JSON in, one out. Peak memory of a CPU call can only be told as the high-water mark of a
process that does nothing else, and two versions of the package only fit into two processes.

    {"do": "prepare", "case", "mode", "provider", "suite", "seed", "copies"} -> {"package"}
    {"do": "time", "first", "calls"}                                         -> {"seconds"}
    {"do": "memory"}                                        -> {"peak", "held", "note"}
    {"do": "errors"}                                        -> {"errors": {kind: error}}
    {"do": "release"}                                       -> {}

An error of a command comes back as {"error": text}; the process lives on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

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
        memory: return freed memory to the system at once, which costs time.
        threads: of PyTorch in the child.
    """

    def __init__(self, root: Path = ROOT, memory: bool = False, threads: int | None = None) -> None:
        command = [sys.executable, "-m", "bench.worker", str(threads or 0)]
        environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            command + ["memory"] * memory,
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, seconds: float = 300.0, **command: Any) -> dict[str, Any]:
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

    def _line(self, stdout: Any, seconds: float) -> bytes:
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
            self._process.kill()
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

    def __init__(self, memory: bool) -> None:
        self.memory = memory
        self.run: Any = None

    def prepare(
        self, case: str, mode: str, provider: str, suite: str, seed: int, copies: int
    ) -> dict:
        import deeplab_fast
        from bench import registry

        self.release()
        chosen = registry.SUITES[suite]
        self.case, self.mode = registry.case(case), mode
        self.provider, self.suite = registry.provider(provider), chosen
        reason = registry.missing_reason(self.provider, self.case, mode, chosen)
        if reason:
            raise WorkerError(f"missing: {reason}")
        self.args = self.case.setup(chosen.device, chosen.dtype, seed, copies)
        before = self._resident()
        self.run = self.provider.build(self.case, mode, chosen.device, chosen.dtype, self.args)
        # Inputs that were brought to another layout are the case's, not what the provider holds.
        there = {t.data_ptr() for given in self.args.inputs for t in given}
        inputs = [t for given in self.run.inputs for t in given if t.data_ptr() not in there]
        self.base = before + sum(t.nbytes for t in inputs)
        return {"package": str(Path(deeplab_fast.__file__).resolve().parent)}

    def time(self, first: int, calls: int) -> dict:
        from bench.measure import clock

        return {"seconds": clock(self.suite.device)(self.run, first, calls)}

    def errors(self) -> dict:
        from bench import gate
        from bench.providers import expected

        exact = expected(self.case, self.mode, self.args)
        found = gate.errors(self.case, self.mode, gate.outputs(self.run.probe()), exact)
        return {"errors": found}

    def memory_of_call(self) -> dict:
        self.run(0)
        resident = self._resident()
        reset = _reset_high_water()
        before = _status("VmHWM")
        result = self.run(0)
        after = _status("VmHWM")
        del result
        note = ""
        if not reset and after == before:
            # The mark of an earlier call hides this one's.
            note = "peak memory is an upper bound: the high-water mark could not be reset"
        return {"peak": max(0, after - resident), "held": resident - self.base, "note": note}

    def release(self) -> dict:
        self.run = self.args = None
        if "torch._dynamo" in sys.modules:
            import torch

            torch._dynamo.reset()
        gc.collect()
        return {}

    def _resident(self) -> int:
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


def main() -> int:
    """Serve commands from standard input until it ends."""
    threads, memory = int(sys.argv[1]), "memory" in sys.argv[2:]
    if memory:
        _return_memory_at_once()
    # Libraries print; answers go where only answers go.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    if threads:
        torch.set_num_threads(threads)
    served = _Served(memory)
    actions = {
        "prepare": served.prepare,
        "time": served.time,
        "memory": served.memory_of_call,
        "errors": served.errors,
        "release": served.release,
    }
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = actions[command.pop("do")](**command)
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            known = isinstance(error, WorkerError)
            answer = {"error": text if known else f"{type(error).__name__}: {text}"}
        answers.write(json.dumps(answer) + "\n")
    return 0


class CpuMemory:
    """Peak memory on a CPU: one child for each provider, kept for the next case.

    Args:
        suite: name of the suite.
        seed: of weights and inputs.
        threads: of PyTorch.
    """

    def __init__(self, suite: str, seed: int, threads: int) -> None:
        self.suite, self.seed, self.threads = suite, seed, threads
        self.workers: dict[str, Worker] = {}

    def __call__(self, case: Any, mode: str, provider: Any) -> tuple[int | None, int | None, str]:
        """(peak bytes of a call, bytes held between calls, note); None where it failed."""
        name = provider.name
        worker = self.workers.get(name)
        if worker is None or not worker.alive:
            worker = self.workers[name] = Worker(memory=True, threads=self.threads)
        try:
            worker.ask(
                do="prepare",
                case=case.id,
                mode=mode,
                provider=name,
                suite=self.suite,
                seed=self.seed,
                copies=1,
            )
            found = worker.ask(do="memory")
            worker.ask(do="release")
        except WorkerError as error:
            return None, None, f"memory not measured: {error}"
        return found["peak"], found["held"], found["note"]

    def close(self) -> None:
        """End the children."""
        for worker in self.workers.values():
            worker.close()

    def __enter__(self) -> CpuMemory:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


if __name__ == "__main__":
    # The class of WorkerError must be the one that other modules of the package raise.
    from bench.worker import main as serve

    sys.exit(serve())
