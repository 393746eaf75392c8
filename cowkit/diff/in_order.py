"""Work on many items by several threads, with the results in the items' order, and never many of them in memory.

The items are taken from their iterator by the threads, too, one thread at a time: what the items come from may be a server
that does not answer, and whoever waits for the results can still be interrupted. For the same reason it waits at queues, whose
operations are one call each: a lock could be left in any state by Ctrl-C.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Done(NamedTuple, Generic[R]):
    number: int
    result: R | None
    """None with the number of items, when there are no more of them."""
    error: BaseException | None


class InOrder(Generic[T, R]):
    """The results of ``work`` for each of ``items``; to be gone through once, and stopped at the end.

    :param workers: how many threads there are.
    :param ahead: how many items may be under way or waiting to be taken.
    """

    def __init__(self, items: Iterator[T], work: Callable[[T], R], *, workers: int, ahead: int) -> None:
        self._items = enumerate(items)
        self._work = work
        self._taken = 0
        self._taking = threading.Lock()
        self._turns: SimpleQueue[None] = SimpleQueue()
        """One for each item that may be taken."""
        self._done: SimpleQueue[_Done[R]] = SimpleQueue()
        self._stopping = False
        for _ in range(ahead):
            self._turns.put(None)
        self._threads = [
            threading.Thread(target=self._run, name=f"cowkit-compare-{number}", daemon=True)
            for number in range(workers)
        ]

    def __iter__(self) -> Iterator[R]:
        """The results.

        Raises what ``work`` or the items raised, as soon as it is known. Whoever leaves early calls :meth:`stop`.
        """
        for thread in self._threads:
            thread.start()
        waiting: dict[int, R] = {}
        number, end = 0, -1
        while number != end:
            done = self._done.get()
            if done.error is not None:
                raise done.error
            if done.result is None:
                end = done.number
            else:
                waiting[done.number] = done.result
            while number in waiting:
                yield waiting.pop(number)
                number += 1
                self._turns.put(None)

    def stop(self) -> None:
        """Have the threads end after the items that they are at; may be called again."""
        self._stopping = True
        for _ in self._threads:
            self._turns.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _run(self) -> None:
        number = -1
        try:
            while True:
                self._turns.get()
                with self._taking:
                    if self._stopping:
                        return
                    taken = next(self._items, None)
                    if taken is None:
                        self._stopping = True
                        self._done.put(_Done(self._taken, None, None))
                        for _ in self._threads:
                            self._turns.put(None)
                        return
                    number, item = taken
                    self._taken = number + 1
                self._done.put(_Done(number, self._work(item), None))
        except BaseException as error:
            self._stopping = True
            self._done.put(_Done(number, None, error))
