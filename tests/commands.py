"""The command line in a process of its own, which is forked from one that has imported everything: seconds less."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import util
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["splitlearn.federation.launch", "splitlearn.train"])
NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET of sched.h


class Command:
    """`splitlearn-MODULE OVERRIDES`, as in a terminal of its own: it has a session, and says what it says to files.

    `host` is a network namespace that `ip netns add` has made.
    """

    def __init__(
        self,
        *overrides: str,
        cwd: Path,
        out: Path,
        err: Path | None = None,
        module: str = "train",
        host: str | None = None,
    ) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        args = (module, overrides, str(cwd), str(out), str(err or out), environment, host)
        self.process = CONTEXT.Process(target=_run, args=args)
        self.process.start()
        self.pid = self.process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """It and all processes that it has started, as a host that loses power."""
        for kill in (os.killpg, os.kill):  # it may not have a session yet
            with suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Return what a shell has in `$?`, or the signal that killed it as a negative number."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutExpired("splitlearn-train", timeout)
        return self.process.exitcode


def run_command(*overrides: str, cwd: Path, module: str = "train", timeout: float = 120) -> CompletedProcess:
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        command = Command(*overrides, cwd=cwd, out=out, err=err, module=module)
        try:
            code = command.wait(timeout)
        finally:
            command.kill()
        return CompletedProcess(overrides, code, out.read_text(), err.read_text())


def _run(
    module: str, overrides: tuple[str, ...], cwd: str, out: str, err: str, environment: dict[str, str], host: str | None
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if host is not None:
        with open(f"/var/run/netns/{host}") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), NETWORK_NAMESPACE) == 0
    torch.set_num_threads(1)
    util.spawnv_passfds = _fork  # type: ignore[assignment]
    sys.argv = [f"splitlearn-{module}", *overrides]
    try:
        import_module(f"splitlearn.{module}").main()
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def _fork(path: bytes, args: Sequence[str], passfds: Sequence[int]) -> int:
    """In place of a new interpreter, for the servers of multiprocessing: nothing is imported again."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        exec(args[-1])  # of `python -c`
        code = 0
    finally:
        os._exit(code)
