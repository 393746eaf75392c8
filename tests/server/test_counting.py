"""The process that counts: where it runs, what it holds, when it ends."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowkit.server import awake, counting
from cowkit.server.awake import Awake
from tests.server.raw_client import RawClient
from tests.server.waiting import until

SLOW = 40_000
"""Nanoseconds: a wait of a client whose processor has to be woken."""
ROOT = Path(__file__).resolve().parents[2]


# Where


@contextmanager
def tcp_pair() -> Iterator[socket.socket]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as there,
        listener.accept()[0] as here,
    ):
        there.sendall(b"!")
        here.recv(1)
        yield here


def test_a_tcp_clients_processor_is_where_its_bytes_come_from() -> None:
    with tcp_pair() as here:
        place = counting._processor(here)
    assert place is not None
    assert 0 <= place < (os.cpu_count() or 1)


def test_a_clients_name_may_end_within_a_character(pair: socket.socket) -> None:
    name = Path("/proc/self/comm")
    before = name.read_bytes()
    try:
        name.write_bytes(b"half a caf\xc3")
        assert counting._processor(pair) is not None
    finally:
        name.write_bytes(before.rstrip(b"\n"))


# Quotas


@pytest.mark.parametrize(
    ("memberships", "files", "rationed"),
    [
        pytest.param("0::/\n", {}, False, id="2: no controller"),
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, False, id="2: max"),
        pytest.param("0::/\n", {"cpu.max": "200000 100000\n"}, True, id="2: a container's own"),
        pytest.param("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n"}, True, id="2: its own"),
        pytest.param(
            "0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, True, id="2: one above"
        ),
        pytest.param(
            "0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/c/cpu.max": "50000 100000\n"}, False, id="2: one beside"
        ),
        pytest.param("0::/a/b\n", {"a/b/cpu.max": ""}, False, id="2: an empty file"),
        pytest.param("0::/a/caf\udce9\n", {"a/cpu.max": "50000 100000\n"}, True, id="2: a name of any bytes"),
        pytest.param("4:memory:/\n3:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1\n"}, False, id="1: none"),
        pytest.param("3:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "50000\n"}, True, id="1: a container's own"),
        pytest.param("3:cpuacct,cpu:/a:b\n", {"cpu/a:b/cpu.cfs_quota_us": "50000\n"}, True, id="1: its own"),
        pytest.param(
            "3:cpu:/a/b\n",
            {"cpu/a/b/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_quota_us": "50000\n"},
            True,
            id="1: one above",
        ),
        pytest.param(
            "3:cpu:/outside/box\n", {"cpu/cpu.cfs_quota_us": "50000\n"}, True, id="1: a path of another namespace"
        ),
        pytest.param("3:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "50000\n"}, False, id="1: another controller"),
        pytest.param("2:name=systemd:/\n1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n"}, False, id="both: none"),
        pytest.param("1:cpu:/x\n0::/\n", {"cpu/x/cpu.cfs_quota_us": "9000\n"}, True, id="both: of 1"),
        pytest.param("1:cpu:/x\n0::/y\n", {"y/cpu.max": "9000 10000\n"}, True, id="both: of 2"),
        pytest.param(None, {}, True, id="unknown"),
    ],
)
def test_processor_time_is_rationed_where_a_cgroup_above_has_a_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memberships: str | None, files: dict[str, str], rationed: bool
) -> None:
    monkeypatch.setattr(counting, "_MEMBERSHIPS", str(tmp_path / "memberships"))
    monkeypatch.setattr(counting, "_CGROUPS", str(tmp_path / "groups"))
    if memberships is not None:
        (tmp_path / "memberships").write_text(memberships, errors="surrogateescape")
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert counting.is_rationed() is rationed


# The real process


def has_idle_class() -> bool:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        try:
            os.sched_setscheduler(child.pid, os.SCHED_IDLE, os.sched_param(0))
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def idle_class() -> None:
    if not has_idle_class():
        pytest.skip("no process may be of the class SCHED_IDLE here")


@pytest.fixture
def real(own_process: None, idle_class: None, pair: socket.socket) -> Iterator[Awake]:
    """One with a child."""
    made = Awake(pair)
    for _ in range(awake._SAMPLES):
        made.waited(SLOW, time.perf_counter_ns())
    assert made.running
    yield made
    made.stop()


def child_of(made: Awake) -> int:
    assert made._child is not None
    return made._child


def is_gone(child: int) -> bool:
    """It is no zombie, either."""
    return not Path(f"/proc/{child}").exists()


def test_the_process_is_of_the_class_that_every_other_goes_before(real: Awake) -> None:
    assert os.sched_getscheduler(child_of(real)) == os.SCHED_IDLE


def test_where_client_and_server_are_to_be_together_the_process_is_as_nice_as_can_be(
    own_process: None, pair: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    made = Awake(pair)
    for _ in range(awake._SAMPLES):
        made.waited(SLOW, time.perf_counter_ns(), single=True)
    child = child_of(made)
    assert os.getpriority(os.PRIO_PROCESS, child) == 19
    assert os.sched_getscheduler(child) == os.SCHED_OTHER
    made.stop()
    until(lambda: is_gone(child))


@pytest.fixture
def inherited() -> Iterator[int]:
    """A descriptor that whoever started us may have left us."""
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    os.close(read_end)
    yield write_end
    os.close(write_end)


def test_the_process_holds_nothing_of_ours(inherited: int, real: Awake) -> None:
    until(lambda: Path(f"/proc/{child_of(real)}/cwd").readlink() == Path("/"))
    folder = Path(f"/proc/{child_of(real)}/fd")
    for number in range(3):
        assert (folder / str(number)).readlink() == Path("/dev/null")
    for number in (real._sock.fileno(), inherited):
        assert number > 2
        assert not os.path.lexists(folder / str(number))
    assert Path(f"/proc/{child_of(real)}/environ").read_bytes() == b""


def test_the_process_has_a_second_of_processor_time(real: Awake) -> None:
    until(lambda: resource.prlimit(child_of(real), resource.RLIMIT_CPU) == (1, 1))


def test_a_shell_that_cannot_limit_itself_does_not_count(
    own_process: None, idle_class: None, pair: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_COUNT", counting._COUNT.replace("ulimit -t 1", "ulimit -t many"))
    made = Awake(pair)
    for _ in range(awake._SAMPLES):
        made.waited(SLOW, time.perf_counter_ns())
    stat = Path(f"/proc/{child_of(made)}/stat")
    until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")  # it has ended
    made.stop()


def test_stopping_leaves_no_process_and_no_thread(real: Awake) -> None:
    child = child_of(real)
    real.stop()
    assert not real.running
    until(lambda: is_gone(child))
    with pytest.raises(ChildProcessError):
        os.waitpid(child, 0)
    until(lambda: all(thread.name != "cowkit-reaper" for thread in threading.enumerate()))
    real.stop()  # once more: nothing to do


def test_a_process_that_ends_can_have_those_that_were_ended_gone_before(real: Awake) -> None:
    child = child_of(real)
    real.stop()
    counting.wait_for_ended()
    assert is_gone(child)


def test_stopping_waits_for_no_processor_that_the_process_would_need_to_die(
    real: Awake, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, may_go_on = threading.Event(), threading.Event()
    waitpid = os.waitpid

    def wait_long(child: int, options: int) -> tuple[int, int]:
        waiting.set()
        assert may_go_on.wait(20)
        return waitpid(child, options)

    monkeypatch.setattr("os.waitpid", wait_long)
    child = child_of(real)
    real.stop()
    assert waiting.wait(20)
    assert awake._one.locked()
    may_go_on.set()
    until(lambda: is_gone(child) and not awake._one.locked())


def test_a_process_that_somebody_killed_is_none_that_is_left(real: Awake) -> None:
    child = child_of(real)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, and still to be waited for
    real.stop()
    until(lambda: is_gone(child) and not awake._one.locked())


def test_a_process_that_somebody_waited_for_is_no_trouble(real: Awake) -> None:
    child = child_of(real)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    real.stop()
    assert not awake._one.locked()


def test_without_a_thread_to_be_had_it_is_waited_for_all_the_same(real: Awake, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: object) -> None:
        raise RuntimeError("can't start new thread")

    child = child_of(real)
    monkeypatch.setattr("threading.Thread.start", none)
    real.stop()
    assert is_gone(child)


def test_a_renewal_leaves_one_process(real: Awake) -> None:
    first = child_of(real)
    real.waited(SLOW, time.perf_counter_ns() + awake._RENEW_NS + 1)
    second = child_of(real)
    assert second != first
    until(lambda: is_gone(first))
    assert not is_gone(second)
    assert awake._one.locked()


def refuse(*_: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("missing", ["the shell", "the class"])
def test_where_it_cannot_be_it_is_just_not_started(
    own_process: None, pair: socket.socket, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing == "the shell":
        monkeypatch.setattr(counting, "_SHELL", "/none/sh")
    else:
        monkeypatch.setattr("os.sched_setscheduler", refuse)
    others = children_of(os.getpid())  # such as the host of a test before
    made = Awake(pair)
    for _ in range(3 * awake._SAMPLES):
        made.waited(SLOW, time.perf_counter_ns())
    assert not made.running
    assert not awake._one.locked()
    until(lambda: children_of(os.getpid()) == others)


# `cowkit serve`

SERVE = """
import sys
from cowkit.server import awake, eager
awake._SAMPLES, awake._WORTH, awake._GAIN, awake.LONG_NS = 4, -1, 1 << 62, 1 << 62
awake.is_rationed = lambda: False
eager._AWAKE_MS = 60_000
from cowkit.cli.main import main
sys.exit(main(["serve", "--size", "1M", *sys.argv[1:]]))
"""
"""One that starts the process early, and keeps it for clients that are slow."""


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state = path.read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(state[1]) == pid:
            found.append(int(path.parent.name))
    return found


@pytest.fixture
def served(
    idle_class: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process of such a server, and where it is."""
    monkeypatch.delenv("COWKIT_EAGER", raising=False)
    where = str(tmp_path / "nbd")
    environment = os.environ | {"COWKIT_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, "--socket", where], env=environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline()
        yield process, where
        process.terminate()
        process.communicate()
    assert process.returncode == 0


def counting_for(client: RawClient, server: int) -> int:
    """The process that the server started for the client, which makes one request at a time until then."""
    found: list[int] = []

    def started() -> bool:
        for _ in range(50):
            client.read(512, 0)
        found[:] = children_of(server)
        return bool(found)

    until(started)
    (child,) = found
    return child


def test_a_server_starts_one_process_and_none_is_left_when_the_client_goes(
    served: tuple[subprocess.Popen[bytes], str],
) -> None:
    process, where = served
    with RawClient(where).negotiate() as client:
        child = counting_for(client, process.pid)
        until(lambda: os.sched_getscheduler(child) == os.SCHED_IDLE or os.getpriority(os.PRIO_PROCESS, child) == 19)
    until(lambda: is_gone(child))
    assert children_of(process.pid) == []


def test_no_process_is_left_when_the_server_ends(served: tuple[subprocess.Popen[bytes], str]) -> None:
    process, where = served
    with RawClient(where).negotiate() as client:
        child = counting_for(client, process.pid)
        process.terminate()
        assert client.at_end()
        process.wait()
    until(lambda: is_gone(child))


def test_a_client_that_begins_to_have_many_requests_under_way_ends_it(
    served: tuple[subprocess.Popen[bytes], str],
) -> None:
    process, where = served
    with RawClient(where).negotiate() as client:
        child = counting_for(client, process.pid)

        def many() -> bool:
            client.send(b"".join(client.request(0, 0, 512)[1] for _ in range(64)))
            for _ in range(64):
                assert client.reply().error == 0
            return is_gone(child)

        until(many)
