"""When a server has nobody left to serve, and when its process's parent has ended."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowkit.disk import Disk, ZeroBase
from cowkit.errors import ListenError
from cowkit.server.parent import ParentWatch
from cowkit.server.server import NbdServer
from tests.server.negotiating import ABORT, ACK, INFO, infos
from tests.server.raw_client import TIMEOUT, RawClient, where


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk(ZeroBase(1 << 20)) as disk:
        yield disk


def test_it_is_idle_when_the_last_client_that_chose_has_left(disk: Disk) -> None:
    told: list[int] = []
    idle = threading.Event()

    def on_idle() -> None:
        told.append(server.connections)
        idle.set()

    with NbdServer(disk, on_idle=on_idle) as server:
        with RawClient(where(server)) as looker:  # nbdinfo and QEMU look before they come to stay
            looker.greet()
            assert looker.ask(INFO, infos("")) == ACK
            assert looker.ask(ABORT) == ACK
            assert looker.at_end()
        with RawClient(where(server)) as one, RawClient(where(server)) as other:
            one.negotiate()
            other.negotiate()
            one.send(one.header(2))
            assert one.at_end()
            assert other.read(1, 0) == b"\0"
            assert told == []
        assert idle.wait(TIMEOUT)
        assert told == [0]


def test_a_server_that_is_not_started_lets_clients_wait(disk: Disk) -> None:
    with NbdServer(disk, start=False) as server, RawClient(where(server)) as client:
        assert not select.select([client.sock], [], [], 0.05)[0]
        server.start()
        client.negotiate()
    with NbdServer(disk, start=False):
        pass


def test_a_server_that_is_stopped_is_not_idle(disk: Disk) -> None:
    told: list[int] = []
    with NbdServer(disk, on_idle=lambda: told.append(1)) as server, RawClient(where(server)) as client:
        client.negotiate()
        server.stop()
    assert told == []


_CHILD = (
    "import os, sys, threading; from cowkit.server.parent import ParentWatch; ended = threading.Event()\n"
    "with ParentWatch(ended.set):\n print('watching', flush=True)\n print('ended' if ended.wait(30) else 'late', flush=True)"
)


@pytest.mark.parametrize("way", ["process", "thread"])
def test_the_end_of_the_parent_process_is_told_and_that_of_its_thread_is_not(way: str) -> None:
    """PR_SET_PDEATHSIG would tell of the thread's, too."""
    start = f"child = subprocess.Popen([sys.executable, '-c', {_CHILD!r}])"
    if way == "thread":
        start = f"def start():\n {start}\nthread = threading.Thread(target=start); thread.start(); thread.join()"
    parent = f"import subprocess, sys, threading\n{start}\nsys.stdin.read()\nimport os; os._exit(0)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    with process:
        assert process.stdout.readline() == "watching\n"
        assert not select.select([process.stdout], [], [], 0.1)[0], "not yet"
        process.stdin.close()
        assert process.stdout.read() == "ended\n"


def test_a_watch_that_is_over_tells_nothing_and_leaves_nothing() -> None:
    before = set(os.listdir("/proc/self/fd"))
    told: list[int] = []
    with ParentWatch(lambda: told.append(1)):
        pass
    assert (told, set(os.listdir("/proc/self/fd"))) == ([], before)
    assert not [thread for thread in threading.enumerate() if thread.name == "cowkit-parent"]


def test_a_parent_that_ended_before_it_could_be_watched_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.getppid()
    answers = [real, real + 1]  # between the two questions the parent ended, and another took this process in
    monkeypatch.setattr(os, "getppid", lambda: answers.pop(0))
    ended = threading.Event()
    with ParentWatch(ended.set):
        assert ended.wait(TIMEOUT)


@pytest.mark.parametrize("parent", [0, 1])
def test_no_parent_to_watch_is_said_so(monkeypatch: pytest.MonkeyPatch, parent: int) -> None:
    monkeypatch.setattr(os, "getppid", lambda: parent)
    with pytest.raises(ListenError, match="the parent process has ended already, or is none that can be watched"):
        ParentWatch(lambda: None)


def test_the_servers_threads_take_no_signals() -> None:
    with Disk(ZeroBase(1 << 20)) as disk, NbdServer(disk) as server, RawClient(where(server)) as client:
        client.negotiate()
        for thread in threading.enumerate():
            if thread.name.startswith("cowkit-"):
                status = Path(f"/proc/self/task/{thread.native_id}/status").read_text(encoding="ascii")
                blocked = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGALRM):
                    assert blocked >> (number - 1) & 1, (thread.name, number)
