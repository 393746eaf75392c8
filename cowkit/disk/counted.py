"""Something open that several hold, and that the last one to let go of it closes."""

from __future__ import annotations

import threading
from typing import Self


class Counted:
    """Begins with one holder, who made it."""

    def __init__(self) -> None:
        self._holders = 1
        self._counting = threading.Lock()

    def hold(self) -> Self:
        """One holder more."""
        with self._counting:
            self._holders += 1
        return self

    def hold_unless_closed(self) -> bool:
        """One holder more, unless the last one is gone; whether it was so."""
        with self._counting:
            if not self._holders:
                return False
            self._holders += 1
        return True

    @property
    def unshared(self) -> bool:
        """Whether there is one holder alone."""
        return self._holders == 1

    def release(self) -> None:
        """One holder less; the last one closes it."""
        with self._counting:
            self._holders -= 1
            if self._holders:
                return
        self._close()

    def _close(self) -> None:
        raise AssertionError("a subclass says what closing is")
