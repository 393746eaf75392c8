"""Programs that are measured: started with a word of their own errors, ended for certain, and what they cost."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from scripts.benchmarks.interrupts import held
from scripts.benchmarks.model import BenchError

START_SECONDS = 20.0
"""How long a server may take until it answers."""
_STOP_SECONDS = 10.0
_END_SECONDS = 3.0
_AT_REST_SECONDS = 0.06  # the kernel tells processor time in steps of 10 ms
_COMES_TO_REST_SECONDS = 2.0
_GREETING = b"NBDMAGIC"
_TICKS = os.sysconf("SC_CLK_TCK")


class Child:
    """A program that runs while it is measured. What it says on its standard error is kept, and shown if it fails."""

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, talks: bool = False
    ) -> None:
        """:param talks: with pipes at its standard input and output, for :meth:`line` and :meth:`say`."""
        self.name = os.path.basename(command[0])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else subprocess.DEVNULL,
                stderr=self._errors,
                env=None if environment is None else {**os.environ, **environment},
                # A ctrl-C is for the benchmark, which then ends what it has started.
                process_group=0,
            )
        except OSError as error:
            self._errors.close()
            raise BenchError(f"{self.name} cannot be started: {error}") from None

        self.pid = self.process.pid
        """The process id; a daemon's once :meth:`follow` has found it."""

    def follow(self, pid_file: str) -> None:
        """The program puts itself into the background: from now on this is the process that ``pid_file`` names.

        :raises BenchError: there is none.
        """
        try:
            self.process.wait(START_SECONDS)
            until = time.monotonic() + START_SECONDS
            while not (text := _content(pid_file)) and time.monotonic() < until:
                time.sleep(0.001)
            self.pid = int(text)
        except (subprocess.TimeoutExpired, ValueError):
            raise BenchError(f"{self.name} did not go into the background: {self.said()}") from None

    @property
    def is_daemon(self) -> bool:
        """Whether it is no child of this process any more."""
        return self.pid != self.process.pid

    def said(self) -> str:
        """The last of what it said on its standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()[-1000:]

    def check(self) -> None:
        """Whether it still runs.

        :raises BenchError: it has ended.
        """
        status = self.process.poll()
        if self.is_daemon:
            if not os.path.exists(f"/proc/{self.pid}"):
                raise BenchError(f"{self.name} has ended; the system's log may say why")
        elif status is not None:
            raise BenchError(f"{self.name} ended with status {status}: {self.said() or 'it gave no reason'}")

    def line(self, seconds: float = START_SECONDS) -> str:
        """The next line of its standard output, of which it prints one at a time.

        :raises BenchError: it ended, or printed none in time.
        """
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise BenchError(f"{self.name} said nothing for {seconds:g} s")
        text = self.process.stdout.readline().decode(errors="replace").rstrip("\n")
        if not text:
            self.process.wait(_STOP_SECONDS)
            self.check()
        return text

    def stop(self) -> None:
        """End it, with force if need be; may be called again."""
        try:
            if self.process.stdin is not None:  # the end of its input is a probe's sign to end in order
                with contextlib.suppress(OSError):
                    self.process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(_END_SECONDS)
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                try:
                    self.process.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    pass
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            if self.is_daemon:
                _end(self.pid)
            for pipe in (self.process.stdout, self._errors):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


def _content(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def _end(pid: int) -> None:
    """End a process that is no child of this one. At once: nbd-server takes seconds to do it in order."""
    until = time.monotonic() + _STOP_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        while time.monotonic() < until:
            os.kill(pid, 0)
            time.sleep(0.002)


@contextlib.contextmanager
def running(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, talks: bool = False
) -> Iterator[Child]:
    """The program for the length of a block."""
    child = None
    try:
        with held():  # or an interrupt might come when it runs and nobody knows it yet
            child = Child(command, environment=environment, talks=talks)
        yield child
    finally:
        if child is not None:
            with held():
                child.stop()


def wait_for_greeting(child: Child, address: str | tuple[str, int]) -> None:
    """Wait until an NBD server greets at a Unix socket's path or at a TCP host and port. Asks each tenth of a millisecond.

    :raises BenchError: the server ended, or does not answer.
    """
    until = time.monotonic() + START_SECONDS
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    while time.monotonic() < until:
        with socket.socket(family, socket.SOCK_STREAM) as attempt:
            attempt.settimeout(START_SECONDS)
            try:
                attempt.connect(address)
                if attempt.recv(len(_GREETING), socket.MSG_WAITALL) == _GREETING:
                    return
            except OSError:
                pass
        child.check()
        time.sleep(0.0001)
    raise BenchError(f"{child.name} did not greet a client within {START_SECONDS:g} s: {child.said()}")


def wait_until_idle(pid: int) -> None:
    """Wait until the process and those that it started have nothing more to do, for two seconds at the most.

    A server may go on with its start when it has greeted a client, and that is no request's time.
    """
    until = time.monotonic() + _COMES_TO_REST_SECONDS
    used, since = cpu_seconds(pid), time.monotonic()
    while (now := time.monotonic()) < until and now - since < _AT_REST_SECONDS:
        time.sleep(_AT_REST_SECONDS / 4)
        if (more := cpu_seconds(pid)) != used:
            used, since = more, time.monotonic()


def family(pid: int) -> list[int]:
    """The process and all that it has started, and they in turn."""
    found = [pid]
    for each in found:
        try:
            for task in os.listdir(f"/proc/{each}/task"):
                with open(f"/proc/{each}/task/{task}/children") as file:
                    found.extend(map(int, file.read().split()))
        except OSError:  # it has just ended
            continue
    return found


def cpu_seconds(pid: int) -> float:
    """The processor time that the process has used and those that it started, in the kernel and outside, in seconds."""
    total = 0
    for each in family(pid):
        try:
            with open(f"/proc/{each}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))  # utime, stime, and those of children that have ended: proc(5)
    return total / _TICKS


def own_memory() -> int:
    """The memory of this process and those that it started, in bytes; what they share counts once (proc(5): Pss)."""
    total = 0
    for each in family(os.getpid()):
        try:
            with open(f"/proc/{each}/smaps_rollup") as file:
                total += next(int(line.split()[1]) for line in file if line.startswith("Pss:")) * 1024
        except (OSError, StopIteration):  # it has just ended
            continue
    return total
