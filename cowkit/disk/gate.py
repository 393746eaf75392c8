"""A gate that many go through at once, or one holds shut.

Every request is carried out inside a *pass*. Taking a checkpoint, rolling back and freezing need a moment with no request
under way: they *close* the gate. A pass is a lock of its own for each connection, so that going through costs one
uncontended lock and nothing is shared between connections; closing takes all the passes' locks. (With one shared counter
instead, four connections queue for its mutex, and one that loses the interpreter while holding it stops the others for a
whole switch interval.)

Whoever is inside a pass must not close the gate: it would wait for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class Pass:
    """One way through the gate, for one thread at a time: ``with pass_: ...``. Not reentrant."""

    __slots__ = ("_gate", "_lock")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        # Looking before and after taking the lock keeps a busy connection from starving whoever closes the gate.
        while True:
            if self._gate.closed:
                self._gate.opened.wait()
            self._lock.acquire()
            if not self._gate.closed:
                return
            self._lock.release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


class Gate:
    """See the module's note."""

    def __init__(self) -> None:
        self.closed = False
        self.opened = threading.Event()
        self.opened.set()
        self._closing = threading.Lock()
        self._passes: list[Pass] = []
        self._spare: list[Pass] = []

    def new_pass(self) -> Pass:
        """A pass for one connection's use; give it back with :meth:`discard`."""
        new = Pass(self)
        with self._closing:
            self._passes.append(new)
        return new

    def discard(self, old: Pass) -> None:
        """Forget a pass that nobody uses any more."""
        with self._closing:
            self._passes.remove(old)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Go through once, on a pass from the gate's own stock; any number of threads may at once."""
        try:
            own = self._spare.pop()
        except IndexError:
            own = self.new_pass()
        try:
            with own:
                yield
        finally:
            self._spare.append(own)

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Wait until nobody is inside, and keep everybody out meanwhile."""
        with self._closing:
            self.opened.clear()
            self.closed = True
            held: list[Pass] = []
            try:
                for each in self._passes:
                    each._lock.acquire()
                    held.append(each)
                yield
            finally:
                self.closed = False
                for each in held:
                    each._lock.release()
                self.opened.set()
