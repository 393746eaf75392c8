"""Work by several threads: results in order, few items at a time, and errors that reach whoever waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cowkit.diff.in_order import InOrder


def test_results_come_in_the_order_of_the_items() -> None:
    last = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert last.wait(60), "the first is done last"
        if item == 3:
            last.set()
        return item * item

    doing = InOrder(iter(range(100)), work, workers=3, ahead=4)
    assert list(doing) == [item * item for item in range(100)]
    doing.stop()


def test_no_item_is_taken_that_is_too_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(50):
            taken.append(item)
            yield item

    doing = InOrder(items(), lambda item: item, workers=2, ahead=5)
    for result in doing:
        assert len(taken) <= result + 5
    assert taken == list(range(50))
    doing.stop()


@pytest.mark.parametrize("workers", [1, 4])
def test_no_items_are_no_results(workers: int) -> None:
    doing: InOrder[int, int] = InOrder(iter([]), lambda item: item, workers=workers, ahead=2)
    assert list(doing) == []
    doing.stop()


@pytest.mark.parametrize("where", ["work", "items"])
def test_an_error_reaches_whoever_waits_and_ends_it_all(where: str) -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        if where == "items":
            raise ValueError("no more")

    def work(item: int) -> int:
        if where == "work" and item == 4:
            raise ValueError("no more")
        return item

    doing = InOrder(items(), work, workers=3, ahead=3)
    with pytest.raises(ValueError, match="no more"):
        list(doing)
    doing.stop()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("cowkit-compare")]


def test_it_can_be_left_in_the_middle() -> None:
    doing = InOrder(iter(range(1000)), lambda item: item, workers=3, ahead=6)
    assert next(iter(doing)) == 0
    doing.stop()
    doing.stop()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("cowkit-compare")]
