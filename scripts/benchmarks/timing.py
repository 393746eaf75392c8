"""Running a program to its end, and how long that took."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence

from scripts.benchmarks.model import BenchError

_SECONDS = 120.0


def timed(command: Sequence[str], folder: str, environment: Mapping[str, str] | None = None) -> tuple[float, str]:
    """The milliseconds that ``command`` took in ``folder``, and what it printed.

    :param environment: what it has besides this program's own.
    :raises BenchError: it failed, or did not end.
    """
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=None if environment is None else {**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{command[0]} did not end within {_SECONDS:g} s") from None
    taken = time.perf_counter() - begun
    if done.returncode:
        raise BenchError(f"{os.path.basename(command[0])} failed: {done.stderr.strip()[-500:] or done.returncode}")
    return taken * 1e3, done.stdout
