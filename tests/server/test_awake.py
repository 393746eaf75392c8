"""When a process that counts keeps a client's processor awake, with a clock and processes of the test's own; and the real one."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowkit.server import awake
from cowkit.server.awake import Awake
from tests.server.raw_client import RawClient

US = 1000
MS = 1000 * US
SLOW = 40 * US
"""A wait of a client whose processor has to be woken."""
QUICK = 10 * US
ROOT = Path(__file__).resolve().parents[2]


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end


class System:
    """A clock, and processes that are started and ended in it."""

    def __init__(self) -> None:
        self.now = 1000 * MS
        self.running: list[int] = []
        self.dying: list[Callable[[], None]] = []
        self.die_at_once = True
        self.started = 0
        self.places: list[set[int]] = []

    def clock(self) -> int:
        return self.now

    def spawn(self, path: str, *_: object, **__: object) -> int:
        self.started += 1
        self.running.append(self.started)
        return self.started

    def place(self, child: int, processors: set[int]) -> None:
        self.places.append(processors)

    def end(self, child: int, gone: Callable[[], None] = lambda: None) -> None:
        self.running.remove(child)
        if self.die_at_once:
            gone()
        else:
            self.dying.append(gone)

    def wait(self, client: Awake, times: int, nanoseconds: int) -> None:
        """So many waits of this length."""
        for _ in range(times):
            self.now += nanoseconds
            client.waited(nanoseconds, self.now)

    def start(self, client: Awake) -> None:
        """As many waits as it takes to start the trial."""
        self.wait(client, awake._SAMPLES, SLOW)
        assert client.running

    def pass_trial(self, client: Awake) -> None:
        self.wait(client, awake._SETTLING + awake._SAMPLES, QUICK)
        assert client.running

    def fail_trial(self, client: Awake) -> None:
        assert client.running
        self.wait(client, awake._SETTLING + awake._SAMPLES, SLOW)
        assert not client.running


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in `cowkit serve`, where no cgroup has a quota."""
    monkeypatch.delenv("COWKIT_EAGER", raising=False)
    monkeypatch.setattr(awake, "_is_rationed", lambda: False)
    awake.allow()
    yield
    awake.allow(yes=False)
    until(lambda: not awake._one.locked())


@pytest.fixture
def pair() -> Iterator[socket.socket]:
    here, there = socket.socketpair()
    with here, there:
        yield here


@pytest.fixture
def system(own_process: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    made = System()
    monkeypatch.setattr(awake, "perf_counter_ns", made.clock)
    monkeypatch.setattr(awake, "_end", made.end)
    monkeypatch.setattr("os.posix_spawn", made.spawn)
    monkeypatch.setattr("os.sched_setscheduler", lambda *_: None)
    monkeypatch.setattr("os.sched_setaffinity", made.place)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    yield made
    for gone in made.dying:
        gone()


@pytest.fixture
def client(system: System, pair: socket.socket) -> Iterator[Awake]:
    made = Awake(pair)
    yield made
    made.stop()
    assert system.running == []


# When


def test_nothing_is_started_in_a_process_that_is_not_the_servers_own(client: Awake, system: System) -> None:
    awake.allow(yes=False)
    system.wait(client, 10 * awake._SAMPLES, SLOW)
    assert system.started == 0


@pytest.mark.parametrize("value", ["", "1"])
def test_the_variable_forbids_it_with_0_alone(
    client: Awake, system: System, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("COWKIT_EAGER", "0")
    awake.allow()
    system.wait(client, 10 * awake._SAMPLES, SLOW)
    assert system.started == 0
    monkeypatch.setenv("COWKIT_EAGER", value)
    awake.allow()
    system.start(client)


def test_where_ended_children_vanish_unseen_it_is_not_allowed(client: Awake, system: System) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        awake.allow()
    finally:
        signal.signal(signal.SIGCHLD, before)
    system.wait(client, 10 * awake._SAMPLES, SLOW)
    assert system.started == 0


def test_it_starts_after_so_many_waits_and_not_before(client: Awake, system: System) -> None:
    system.wait(client, awake._SAMPLES - 1, SLOW)
    assert system.started == 0
    system.wait(client, 1, SLOW)
    assert system.started == 1
    assert client.running


def test_it_does_not_start_for_waits_that_are_too_short_to_be_worth_it(client: Awake, system: System) -> None:
    system.wait(client, 10 * awake._SAMPLES, awake._WORTH // awake._SAMPLES)
    assert system.started == 0


def test_a_long_wait_in_between_begins_the_count_anew(client: Awake, system: System) -> None:
    system.wait(client, awake._SAMPLES - 1, SLOW)
    system.wait(client, 1, awake.LONG_NS + 1)
    system.wait(client, awake._SAMPLES - 1, SLOW)
    assert system.started == 0
    system.wait(client, 1, SLOW)
    assert system.started == 1


def test_it_goes_on_after_a_trial_that_is_passed(client: Awake, system: System) -> None:
    system.start(client)
    system.pass_trial(client)
    system.wait(client, 20 * awake._SAMPLES, SLOW)  # whatever comes then
    assert (client.running, system.started) == (True, 1)


def test_the_first_waits_after_the_start_count_for_nothing(client: Awake, system: System) -> None:
    system.start(client)
    system.wait(client, awake._SETTLING, 4 * MS)
    system.wait(client, awake._SAMPLES, int(awake._GAIN * SLOW))
    system.wait(client, awake._SAMPLES, SLOW)
    assert client.running


def test_it_stops_after_a_trial_that_gained_too_little(client: Awake, system: System) -> None:
    system.start(client)
    system.wait(client, awake._SETTLING + awake._SAMPLES - 1, int(awake._GAIN * SLOW) + US)
    assert client.running
    system.wait(client, 1, int(awake._GAIN * SLOW) + US)
    assert not client.running


def test_after_each_failed_trial_it_rests_twice_as_long(client: Awake, system: System) -> None:
    rest = awake._REST_NS
    for _ in range(5):
        system.start(client)
        system.fail_trial(client)
        failed, started = system.now, system.started
        while system.now - failed < rest - SLOW:
            system.wait(client, 1, SLOW)
        assert system.started == started
        system.wait(client, 1, awake.LONG_NS + 1)  # the rest is over, and the count begins anew
        rest *= 2


def test_a_trial_that_is_passed_makes_the_rest_short_again(client: Awake, system: System) -> None:
    for _ in range(4):
        system.start(client)
        system.fail_trial(client)
        system.now += 100 * awake._REST_NS
    system.start(client)
    system.pass_trial(client)
    system.wait(client, 1, awake._PROVEN_NS)
    system.start(client)
    system.fail_trial(client)
    system.now += awake._REST_NS
    system.start(client)


def test_a_wait_of_over_20_ms_stops_it_and_no_shorter_one(client: Awake, system: System) -> None:
    system.start(client)
    system.wait(client, 1, 20 * MS)
    assert client.running
    system.wait(client, 1, 20 * MS + 1)
    assert not client.running


def test_a_trial_that_a_pause_ended_is_not_begun_anew_for_each_burst_of_requests(client: Awake, system: System) -> None:
    for _ in range(5):
        system.wait(client, awake._SAMPLES + 5, SLOW)
        client.stop()
    assert system.started == 1
    system.now += awake._REST_NS
    system.start(client)


def test_after_a_pause_it_goes_on_without_a_trial_while_the_last_one_is_not_long_ago(
    client: Awake, system: System
) -> None:
    system.start(client)
    system.pass_trial(client)
    system.wait(client, 1, awake.LONG_NS + 1)
    assert not client.running
    system.start(client)
    system.wait(client, 5 * awake._SAMPLES, SLOW)
    assert client.running


def test_after_a_long_pause_it_has_to_pass_another_trial(client: Awake, system: System) -> None:
    system.start(client)
    system.pass_trial(client)
    system.wait(client, 1, awake._PROVEN_NS)
    system.start(client)
    system.fail_trial(client)


def test_it_is_not_started_for_a_client_that_has_other_things_to_do(client: Awake, system: System) -> None:
    for _ in range(10 * awake._SAMPLES):
        system.wait(client, 3, SLOW)
        system.wait(client, 1, 2 * MS)
    assert system.started == 0


def test_it_stops_when_the_client_begins_to_have_other_things_to_do(client: Awake, system: System) -> None:
    system.start(client)
    system.pass_trial(client)
    system.wait(client, 2 * awake._SAMPLES, 2 * MS)
    assert not client.running
    system.wait(client, awake._SAMPLES, 2 * MS)
    system.start(client)
    system.fail_trial(client)


def test_no_single_wait_outweighs_the_others(client: Awake, system: System) -> None:
    system.start(client)
    system.wait(client, awake._SETTLING, QUICK)
    system.wait(client, 1, 19 * MS)
    system.wait(client, awake._SAMPLES - 1, QUICK)
    system.wait(client, 5 * awake._SAMPLES, SLOW)
    assert client.running


# Renewing


def test_it_is_renewed_before_its_second_of_processor_time_is_over(client: Awake, system: System) -> None:
    system.start(client)
    system.pass_trial(client)
    begun, first = system.now, list(system.running)
    for _ in range(4):
        last, started = system.now, system.started
        while system.started == started:
            system.wait(client, 1, 900 * US)
            assert system.now - last < 1000 * MS
        assert system.now - last > 800 * MS
        assert len(system.running) == 1
    assert system.now > begun + 3000 * MS
    assert client.running
    assert system.running != first


def test_a_renewal_is_no_new_trial(client: Awake, system: System) -> None:
    system.start(client)
    system.pass_trial(client)
    system.now += awake._RENEW_NS
    system.wait(client, 1, SLOW)
    assert system.started == 2
    system.wait(client, 5 * awake._SAMPLES, SLOW)
    assert (client.running, system.started) == (True, 2)


def test_where_it_cannot_be_renewed_it_ends_and_rests_and_is_tried_anew(
    client: Awake, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.start(client)
    system.pass_trial(client)
    system.now += awake._RENEW_NS
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_spawn", fail(errno.EAGAIN))
        system.wait(client, 1, SLOW)
    assert not client.running
    assert system.running == []
    assert not awake._one.locked()
    system.wait(client, awake._SAMPLES, SLOW)
    assert not client.running
    system.now += awake._PROVEN_NS
    system.start(client)
    system.fail_trial(client)


def fail(number: int) -> Callable[..., int]:
    def failing(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return failing


# One for all


def test_while_one_client_has_it_no_other_gets_one(client: Awake, system: System, pair: socket.socket) -> None:
    system.start(client)
    other = Awake(pair)
    system.wait(other, 3 * awake._SAMPLES, SLOW)
    assert (other.running, system.started) == (False, 1)
    client.stop()
    system.start(other)
    other.stop()


def test_as_long_as_an_ended_one_is_not_gone_there_is_no_other(client: Awake, system: System) -> None:
    system.die_at_once = False
    system.start(client)
    client.stop()
    system.now += awake._REST_NS
    system.wait(client, 3 * awake._SAMPLES, SLOW)
    assert system.started == 1
    system.dying.pop()()
    system.start(client)


def test_stopping_what_does_not_run_takes_it_from_nobody(client: Awake, system: System, pair: socket.socket) -> None:
    system.start(client)
    other = Awake(pair)
    other.stop()
    system.wait(other, awake._SAMPLES, SLOW)
    assert (client.running, other.running) == (True, False)


# Where


def test_with_two_processors_it_runs_where_the_system_likes(client: Awake, system: System) -> None:
    system.start(client)
    assert system.places == []


def test_with_more_than_two_processors_it_is_bound_to_the_clients(
    client: Awake, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    system.start(client)
    ((place,),) = system.places  # the pair's other end is ours, too
    assert 0 <= place < (os.cpu_count() or 1)


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
        place = awake._processor(here)
    assert place is not None
    assert 0 <= place < (os.cpu_count() or 1)


class Socket:
    """One that knows little of its other end."""

    def __init__(self, family: int, option: bytes | int) -> None:
        self.family = family
        self._option = option

    def getsockopt(self, *_: int) -> bytes | int:
        return self._option


NOBODY = (0).to_bytes(4, sys.byteorder) * 3
"""SO_PEERCRED of a client in another namespace."""


@pytest.mark.parametrize(
    "sock", [Socket(socket.AF_UNIX, NOBODY), Socket(40, -1)], ids=["of another namespace", "of a kind without"]
)
def test_with_more_than_two_processors_it_is_not_started_where_the_clients_is_unknown(
    system: System, monkeypatch: pytest.MonkeyPatch, sock: socket.socket
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    client = Awake(sock)
    system.wait(client, 3 * awake._SAMPLES, SLOW)
    assert (client.running, system.started) == (False, 0)
    assert not awake._one.locked()


def test_a_clients_name_may_end_within_a_character(pair: socket.socket) -> None:
    name = Path("/proc/self/comm")
    before = name.read_bytes()
    try:
        name.write_bytes(b"half a caf\xc3")
        assert awake._processor(pair) is not None
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
    monkeypatch.setattr(awake, "_MEMBERSHIPS", str(tmp_path / "memberships"))
    monkeypatch.setattr(awake, "_CGROUPS", str(tmp_path / "groups"))
    if memberships is not None:
        (tmp_path / "memberships").write_text(memberships, errors="surrogateescape")
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert awake._is_rationed() is rationed


def test_where_processor_time_is_rationed_nothing_is_started(
    client: Awake, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awake, "_is_rationed", lambda: True)
    system.wait(client, 10 * awake._SAMPLES, SLOW)
    assert (client.running, system.started) == (False, 0)
    assert not awake._one.locked()


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
    monkeypatch.setattr(awake, "_COUNT", awake._COUNT.replace("ulimit -t 1", "ulimit -t many"))
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


@pytest.mark.parametrize("missing", ["the shell", "the class"])
def test_where_it_cannot_be_it_is_just_not_started(
    own_process: None, pair: socket.socket, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing == "the shell":
        monkeypatch.setattr(awake, "_SHELL", "/none/sh")
    else:
        monkeypatch.setattr("os.sched_setscheduler", fail(errno.EPERM))
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
awake._is_rationed = lambda: False
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


def counting(client: RawClient, server: int) -> int:
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
        child = counting(client, process.pid)
        assert os.sched_getscheduler(child) == os.SCHED_IDLE
    until(lambda: is_gone(child))
    assert children_of(process.pid) == []


def test_no_process_is_left_when_the_server_ends(served: tuple[subprocess.Popen[bytes], str]) -> None:
    process, where = served
    with RawClient(where).negotiate() as client:
        child = counting(client, process.pid)
        process.terminate()
        assert client.at_end()
        process.wait()
    until(lambda: is_gone(child))


def test_a_client_that_begins_to_have_many_requests_under_way_ends_it(
    served: tuple[subprocess.Popen[bytes], str],
) -> None:
    process, where = served
    with RawClient(where).negotiate() as client:
        child = counting(client, process.pid)

        def many() -> bool:
            client.send(b"".join(client.request(0, 0, 512)[1] for _ in range(64)))
            for _ in range(64):
                assert client.reply().error == 0
            return is_gone(child)

        until(many)
