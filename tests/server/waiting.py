"""Waiting for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(true: Callable[[], object]) -> None:
    """Come back when it is so, within 20 seconds."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
