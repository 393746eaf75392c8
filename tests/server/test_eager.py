"""When a thread looks for a client's next bytes instead of sleeping, with a clock and a client of the test's own."""

from __future__ import annotations

import pytest

from cowkit.server import eager
from cowkit.server.awake import Awake
from cowkit.server.eager import EagerWait

US = 1000
LOOK_COSTS = 1 * US


class Client:
    """Sends its next request ``pause`` after the last one was taken. Sleeping until then is free, and waking takes a while."""

    def __init__(self, pause: int) -> None:
        self.now = 0
        self.pause = pause
        self.next = pause
        self.looks = 0
        self.sleeps = 0
        self.look_costs = LOOK_COSTS
        self.naps: list[int] = []
        """The timeouts, in milliseconds, of sleeps that had one."""

    def clock(self) -> int:
        return self.now

    def poll(self, timeout: int | None) -> list[str]:
        if timeout is None:
            self.sleeps += 1
            self.now = max(self.now, self.next) + 30 * US
        elif timeout:
            self.naps.append(timeout)
            end = self.now + timeout * 1000 * US
            self.now = min(end, max(self.now, self.next) + 30 * US)
            if self.now < self.next:
                return []
        else:
            self.looks += 1
            self.now += self.look_costs
            if self.now < self.next:
                return []
        self.next = self.now + self.pause
        return ["readable"]


class Kept(Awake):
    """What would keep the client's processor awake."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.waits: list[int] = []
        self.runs = False
        self.together = False
        self.stops: list[int] = []
        self.single: list[bool] = []

    @property
    def running(self) -> bool:
        return self.runs

    def waited(self, nanoseconds: int, now: int, *, single: bool = False) -> None:
        assert now == self.client.now
        self.waits.append(nanoseconds)
        self.single.append(single)

    def stop(self) -> None:
        self.stops.append(self.client.now)
        self.runs = False


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.delenv("COWKIT_EAGER", raising=False)
    client = Client(20 * US)
    monkeypatch.setattr(eager, "perf_counter_ns", client.clock)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    return client


def test_a_client_that_comes_again_at_once_is_waited_for_awake(made: Client) -> None:
    wait = EagerWait(made.poll)
    for _ in range(100):
        assert wait() == ["readable"]
    assert made.sleeps == 1


def test_a_client_that_takes_its_time_is_waited_for_asleep(made: Client) -> None:
    made.next = made.pause = 1000 * US
    wait = EagerWait(made.poll)
    for _ in range(100):
        wait()
    assert made.looks == 0


def test_a_client_that_is_always_a_little_too_late_is_rarely_looked_for(made: Client) -> None:
    made.pause = 210 * US
    wait = EagerWait(made.poll)
    for _ in range(1000):
        wait()
    assert made.looks * LOOK_COSTS < 0.08 * made.now


def test_a_pause_now_and_then_does_not_end_it(made: Client) -> None:
    wait = EagerWait(made.poll)
    for _ in range(100):
        wait()
    made.next = made.now + 10_000 * US
    wait()
    slept = made.sleeps
    for _ in range(100):
        wait()
    assert made.sleeps == slept


def test_beside_a_thread_that_computes_it_sleeps(made: Client) -> None:
    made.look_costs = 5000 * US  # a whole switch interval
    made.pause = 1 * US
    wait = EagerWait(made.poll)
    wait()
    made.next = made.now + 20_000 * US
    for _ in range(500):
        wait()
        made.pause = 1 * US
    assert made.looks <= 6  # each costs as much as a wait does there: one in a hundred is not felt


def test_with_one_processor_it_sleeps(made: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3})
    wait = EagerWait(made.poll)
    for _ in range(100):
        wait()
    assert made.looks == 0


def test_the_variable_lets_each_wait_be_slept(made: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWKIT_EAGER", "0")
    wait = EagerWait(made.poll)
    for _ in range(1000):
        wait()
    assert (made.looks, made.sleeps) == (0, 1000)


@pytest.mark.parametrize("pause", [20 * US, 1000 * US, 20_000 * US])
def test_what_keeps_the_processor_awake_is_told_how_long_each_wait_was(made: Client, pause: int) -> None:
    made.next = made.pause = pause
    kept = Kept(made)
    wait = EagerWait(made.poll, kept)
    for _ in range(100):
        before = made.now
        wait()
        assert kept.waits[-1] == made.now - before >= pause
    assert len(kept.waits) == 100
    assert made.naps == []


def test_it_is_told_which_waits_were_for_a_client_of_one_request(made: Client) -> None:
    kept = Kept(made)
    wait = EagerWait(made.poll, kept)
    wait()
    wait(single=True)
    wait(single=False)
    assert kept.single == [False, True, False]


def test_where_the_client_is_to_run_on_our_processor_it_is_not_looked_for(made: Client) -> None:
    kept = Kept(made)
    wait = EagerWait(made.poll, kept)
    for _ in range(10):
        wait()
    looks = made.looks
    kept.runs = kept.together = True
    for _ in range(100):
        wait()
    assert made.looks == looks
    assert made.naps == [20] * 100
    kept.runs = kept.together = False
    wait()
    assert made.looks > looks


def test_while_the_processor_is_kept_awake_a_sleep_of_up_to_20_ms_does_not_end_that(made: Client) -> None:
    made.next = made.pause = 19_900 * US
    kept = Kept(made)
    kept.runs = True
    wait = EagerWait(made.poll, kept)
    for _ in range(100):
        assert wait() == ["readable"]
    assert made.naps == [20] * 100
    assert kept.stops == []
    assert made.sleeps == 0


def test_a_sleep_of_over_20_ms_lets_the_processor_halt_while_it_lasts(made: Client) -> None:
    made.next = made.pause = 60_000 * US
    kept = Kept(made)
    kept.runs = True
    wait = EagerWait(made.poll, kept)
    for _ in range(3):
        assert wait() == ["readable"]
    assert made.naps == [20]
    assert kept.stops == [20_000 * US]
    assert made.sleeps == 3
    assert kept.waits[0] >= made.pause
