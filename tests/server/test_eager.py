"""When a thread looks for a client's next bytes instead of sleeping, with a clock and a client of the test's own."""

from __future__ import annotations

import pytest

from cowkit.server import eager
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

    def clock(self) -> int:
        return self.now

    def poll(self, timeout: int | None) -> list[str]:
        if timeout is None:
            self.sleeps += 1
            self.now = max(self.now, self.next) + 30 * US
        else:
            self.looks += 1
            self.now += self.look_costs
            if self.now < self.next:
                return []
        self.next = self.now + self.pause
        return ["readable"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Client:
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
    assert made.looks <= 2


def test_with_one_processor_it_sleeps(made: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3})
    wait = EagerWait(made.poll)
    for _ in range(100):
        wait()
    assert made.looks == 0
