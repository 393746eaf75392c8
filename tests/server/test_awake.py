"""When a process counts for a client, and in which way, with a clock and processes of the test's own."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import pytest

from cowkit.server import awake, counting, wire
from cowkit.server.awake import Awake
from tests.server.raw_client import RawClient, serving, where

US = 1000
MS = 1000 * US
SLOW = 40 * US
"""A wait of a client whose processor has to be woken."""
QUICK = 10 * US
JUDGED = (1 + awake._UNSEEN) * awake._SAMPLES
"""Waits of a judgement when a trial was passed."""


class System:
    """A clock, and processes that are started and ended in it."""

    def __init__(self) -> None:
        self.now = 1000 * MS
        self.running: list[int] = []
        self.dying: list[Callable[[], None]] = []
        self.die_at_once = True
        self.started = 0
        self.single = False
        """Whether the client makes one request at a time."""
        self.carrying_out = 0
        """What the server takes for each, in nanoseconds."""
        self.places: list[set[int]] = []
        self.behind: list[int] = []
        """Of the class that every other process goes before."""
        self.beside: list[int] = []
        """As nice as can be."""

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
            self.now += self.carrying_out + nanoseconds
            client.waited(nanoseconds, self.now, single=self.single)

    def start(self, client: Awake) -> None:
        """As many waits as it takes to start the trial."""
        self.wait(client, awake._SAMPLES, SLOW)
        assert client.running

    def settle(self, client: Awake) -> None:
        """As many waits as it takes until they count, and none that does."""
        self.now += awake._SETTLING_NS
        self.wait(client, awake._SETTLING, QUICK)

    def pass_trial(self, client: Awake) -> None:
        self.settle(client)
        self.wait(client, awake._SAMPLES, QUICK)
        assert client.running

    def fail_trial(self, client: Awake) -> None:
        assert client.running
        self.settle(client)
        self.wait(client, awake._CHANCES * awake._SAMPLES, SLOW)
        assert not client.running


@pytest.fixture
def system(own_process: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    made = System()
    monkeypatch.setattr(awake, "end", made.end)
    monkeypatch.setattr("os.posix_spawn", made.spawn)
    monkeypatch.setattr("os.sched_setscheduler", lambda child, *_: made.behind.append(child))
    monkeypatch.setattr("os.setpriority", lambda _, child, __: made.beside.append(child))
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
    counting.allow(yes=False)
    system.wait(client, 10 * awake._SAMPLES, SLOW)
    assert system.started == 0


@pytest.mark.parametrize("no", ["0", "no", "off", "False"])
@pytest.mark.parametrize("yes", ["", "1"])
def test_the_variable_forbids_it(
    client: Awake, system: System, monkeypatch: pytest.MonkeyPatch, no: str, yes: str
) -> None:
    monkeypatch.setenv("COWKIT_EAGER", no)
    counting.allow()
    system.wait(client, 10 * awake._SAMPLES, SLOW)
    assert system.started == 0
    monkeypatch.setenv("COWKIT_EAGER", yes)
    counting.allow()
    system.start(client)


def test_where_ended_children_vanish_unseen_it_is_not_allowed(client: Awake, system: System) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        counting.allow()
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
    system.wait(client, 20 * JUDGED, SLOW)  # whatever comes then
    assert (client.running, system.started) == (True, 1)


def test_the_first_waits_after_the_start_count_for_nothing(client: Awake, system: System) -> None:
    system.start(client)
    system.wait(client, awake._SETTLING, 4 * MS)
    system.wait(client, awake._SAMPLES, int(awake._GAIN * SLOW))
    system.wait(client, awake._CHANCES * awake._SAMPLES, SLOW)
    assert client.running


def test_nor_do_those_of_the_first_three_milliseconds(client: Awake, system: System) -> None:
    system.start(client)
    system.wait(client, awake._SETTLING_NS // SLOW, SLOW)
    system.wait(client, 1, SLOW)
    system.wait(client, awake._SAMPLES, int(awake._GAIN * SLOW))
    system.wait(client, awake._CHANCES * awake._SAMPLES, SLOW)
    assert client.running


def test_it_stops_after_a_trial_that_gained_too_little(client: Awake, system: System) -> None:
    system.start(client)
    system.settle(client)
    system.wait(client, awake._CHANCES * awake._SAMPLES - 1, int(awake._GAIN * SLOW) + US)
    assert client.running
    system.wait(client, 1, int(awake._GAIN * SLOW) + US)
    assert not client.running


@pytest.mark.parametrize("chance", range(awake._CHANCES))
def test_a_trial_is_passed_when_one_of_three_judgements_is_good(client: Awake, system: System, chance: int) -> None:
    system.start(client)
    system.settle(client)
    system.wait(client, chance * awake._SAMPLES, SLOW)
    system.wait(client, awake._SAMPLES, QUICK)
    system.wait(client, 2 * awake._CHANCES * awake._SAMPLES, SLOW)
    assert client.running


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
    system.wait(client, 2 * JUDGED, 2 * MS)
    assert not client.running
    system.wait(client, 1, awake.LONG_NS + 1)  # the count begins anew
    system.wait(client, awake._SAMPLES, 2 * MS)
    system.start(client)
    system.fail_trial(client)


def test_no_single_wait_outweighs_the_others(client: Awake, system: System) -> None:
    system.start(client)
    system.settle(client)
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
    system.wait(client, 5 * JUDGED, SLOW)
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


def test_a_client_that_stalls_does_not_keep_it_from_others(client: Awake, system: System, pair: socket.socket) -> None:
    system.start(client)
    system.pass_trial(client)
    other = Awake(pair)
    system.now += 2 * awake._RENEW_NS  # the process has ended by itself
    system.wait(other, awake._SAMPLES, SLOW)
    assert other.running
    system.wait(client, 1, SLOW)
    assert (client.running, other.running, system.started) == (False, True, 2)
    other.stop()
    assert not awake._one.locked()


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


# Together


@pytest.fixture
def one_at_a_time(system: System) -> None:
    system.single = True
    system.carrying_out = 40 * US


@pytest.mark.usefixtures("one_at_a_time")
def test_with_two_processors_it_takes_one_of_them_from_a_client_of_one_request_at_a_time(
    client: Awake, system: System
) -> None:
    system.start(client)
    assert client.together
    assert (system.beside, system.behind, system.places) == ([1], [], [])


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("processors", [{0, 1, 2}, {4, 5, 6, 7}])
def test_with_more_processors_it_lets_the_client_have_its_own(
    client: Awake, system: System, monkeypatch: pytest.MonkeyPatch, processors: set[int]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: processors)
    system.start(client)
    assert not client.together
    assert (system.beside, system.behind) == ([], [1])


def test_a_client_of_several_requests_at_a_time_keeps_its_own_processor(client: Awake, system: System) -> None:
    for number in range(awake._SAMPLES):
        system.single = number % 2 == 0
        system.wait(client, 1, SLOW)
    assert client.running
    assert not client.together
    assert (system.beside, system.behind) == ([], [1])


@pytest.mark.usefixtures("one_at_a_time")
def test_together_it_is_requests_that_have_to_be_quicker(client: Awake, system: System) -> None:
    system.start(client)
    system.settle(client)
    system.carrying_out = 20 * US
    system.wait(client, awake._SAMPLES, SLOW)
    system.carrying_out = 40 * US
    system.wait(client, awake._CHANCES * awake._SAMPLES, SLOW)
    assert client.together


@pytest.mark.usefixtures("one_at_a_time")
def test_together_it_is_not_waits_that_have_to_be_shorter(client: Awake, system: System) -> None:
    system.start(client)
    system.settle(client)
    system.carrying_out = 60 * US
    system.wait(client, awake._CHANCES * awake._SAMPLES, QUICK)
    assert (client.running, client.together) == (False, False)


@pytest.mark.usefixtures("one_at_a_time")
def test_a_wait_within_a_request_does_not_make_it_two(client: Awake, system: System) -> None:
    for _ in range(awake._SAMPLES // 3 + 1):  # the head, and then the payload
        system.single = False
        system.carrying_out = 0
        system.wait(client, 1, 5 * US)
        system.single = True
        system.carrying_out = 40 * US
        system.wait(client, 2, SLOW)
    assert client.together
    system.settle(client)
    system.wait(client, awake._SAMPLES, 15 * US)  # 55 us a request; without, half of them took 80 and half 85
    assert client.running
    system.wait(client, 2 * awake._CHANCES * awake._SAMPLES, SLOW)
    assert client.together


@pytest.mark.usefixtures("one_at_a_time")
def test_after_each_failed_trial_the_other_way_has_one(client: Awake, system: System) -> None:
    ways = []
    for _ in range(4):
        system.start(client)
        ways.append(client.together)
        system.fail_trial(client)
        assert not client.together
        system.now += 100 * awake._REST_NS
    assert ways == [True, False, True, False]


@pytest.mark.usefixtures("one_at_a_time")
def test_what_passed_one_way_is_no_proof_of_the_other(client: Awake, system: System) -> None:
    system.start(client)
    system.carrying_out = 0
    system.pass_trial(client)
    system.wait(client, 1, awake.LONG_NS + 1)
    system.single = False
    system.start(client)
    assert not client.together
    system.fail_trial(client)


@pytest.mark.usefixtures("one_at_a_time")
def test_when_the_client_begins_to_make_several_requests_at_a_time_it_has_its_processor_back(
    client: Awake, system: System
) -> None:
    system.start(client)
    system.carrying_out = 0
    system.pass_trial(client)
    system.single = False
    system.wait(client, JUDGED, SLOW)
    assert (client.running, client.together) == (False, False)
    system.start(client)
    assert not client.together


@pytest.mark.usefixtures("one_at_a_time")
def test_a_renewal_keeps_the_way(client: Awake, system: System) -> None:
    system.start(client)
    system.carrying_out = 0
    system.pass_trial(client)
    system.now += awake._RENEW_NS
    system.wait(client, 1, SLOW)
    assert client.together
    assert (system.beside, system.behind) == ([1, 2], [])


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


def test_where_processor_time_is_rationed_nothing_is_started(
    client: Awake, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awake, "is_rationed", lambda: True)
    system.wait(client, 10 * awake._SAMPLES, SLOW)
    assert (client.running, system.started) == (False, 0)
    assert not awake._one.locked()


# What it is told


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each wait: whether it was for the next request of a client that makes one at a time."""
    waits: list[bool] = []
    monkeypatch.setattr(Awake, "waited", lambda _, __, ___, *, single=False: waits.append(single))
    return waits


def test_each_request_that_has_its_reply_to_itself_is_one_at_a_time(told: list[bool]) -> None:
    with serving(1 << 20) as server, RawClient(where(server)).negotiate() as client:
        client.read(512, 0)
        told.clear()
        for _ in range(5):
            client.read(4096, 0)
            client.write(b"new", 0)
            client.write(bytes(64 << 10), 0)
        assert len(told) >= 15
        assert told.count(True) >= 14  # a payload may have come after its head


@pytest.mark.parametrize("command", [wire.CMD_READ, wire.CMD_WRITE])
def test_requests_that_came_together_are_not(told: list[bool], command: int) -> None:
    with serving(1 << 20) as server, RawClient(where(server)).negotiate() as client:
        client.read(512, 0)
        payload = b"new" if command == wire.CMD_WRITE else b""
        for _ in range(5):
            client.send(b"".join(client.request(command, 0, 3, payload)[1] for _ in range(2)))
            client.reply()
            client.reply()
            client.read(512, 0)  # the answer to which comes after the wait
        assert told.count(False) == 5


def test_nor_is_a_long_write(told: list[bool]) -> None:
    with serving(1 << 20) as server, RawClient(where(server)).negotiate() as client:
        for _ in range(3):
            client.write(bytes(512 << 10), 0)
        told.clear()
        for _ in range(3):
            client.write(bytes(512 << 10), 0)
        assert not any(told)
