"""A gate that many go through at once, or one holds shut.

Every request is carried out inside a *pass*. Taking a checkpoint, rolling back and freezing need a moment with no request
under way: they *shut* the gate. A pass is a lock of its own for each connection, so that going through costs one
uncontended lock and nothing is shared between connections; shutting takes all the passes' locks. (With one shared counter
instead, four connections queue for its mutex, and one that loses the interpreter while holding it stops the others for a
whole switch interval.)

What holds: an exception that comes from outside at any moment, as ctrl-C and the signal of a time limit do in the main
thread, leaves no lock taken. ``with lock:`` on a lock itself is safe, since the interpreter looks for signals neither
between taking the lock and entering the block nor between leaving and releasing it; any Python code in between is not, and
that goes for events, conditions and context managers written in Python. So whoever may be interrupted goes through by
:meth:`Gate.borrow` and ``with pass_.lock:``, and :meth:`Gate.shut` releases what it finds that it holds, rather than what it
remembers to have taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class Pass:
    """One way through the gate, for one thread at a time: ``with pass_: ...`` in a thread that no signal interrupts."""

    __slots__ = ("_gate", "lock")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        # An RLock can tell whether this thread holds it. It is no license to go through twice.
        self.lock: Any = threading.RLock()

    def __enter__(self) -> None:
        # Looking before and after taking the lock keeps a busy connection from starving whoever shuts the gate.
        while True:
            self._gate.wait_until_open()
            self.lock.acquire()
            if not self._gate.closed:
                return
            self.lock.release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.release()


class Gate:
    """See the module's note."""

    def __init__(self) -> None:
        self.closed = False
        self._shutting = threading.Lock()
        self._passes: list[Pass] = []
        self._spare: list[Pass] = []

    def wait_until_open(self) -> None:
        """Wait while somebody shuts the gate or holds it shut."""
        if self.closed:
            with self._shutting:
                pass

    def new_pass(self) -> Pass:
        """A pass for one connection's use; give it back with :meth:`discard`."""
        new = Pass(self)
        with self._shutting:
            self._passes.append(new)
        return new

    def discard(self, old: Pass) -> None:
        """Forget a pass that nobody uses any more."""
        with self._shutting:
            self._passes.remove(old)

    def borrow(self) -> Pass:
        """A pass from the gate's own stock, for ``with pass_.lock:``; any number of threads may. :meth:`give_back` it.

        One that an interrupt keeps from being given back is lost to the stock, and otherwise in nobody's way.
        """
        self.wait_until_open()
        try:
            return self._spare.pop()
        except IndexError:
            return self.new_pass()

    def give_back(self, borrowed: Pass) -> None:
        """End of :meth:`borrow`."""
        self._spare.append(borrowed)

    @property
    def busy(self) -> bool:
        """Whether anybody else is inside just now."""
        for each in list(self._passes):
            if not each.lock.acquire(blocking=False):
                return True
            each.lock.release()
        return False

    def shut(self, work: Callable[[], T]) -> T:
        """Carry out ``work`` while nobody is inside, and keep everybody out meanwhile."""
        with self._shutting:
            try:
                self.closed = True
                for each in self._passes:
                    each.lock.acquire()
                return work()
            finally:
                try:
                    self._open()
                finally:  # an interrupt may have stopped that
                    self._open()

    def _open(self) -> None:
        self.closed = False
        for each in self._passes:
            if each.lock._is_owned():
                each.lock.release()
