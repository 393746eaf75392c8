"""Starts the probes: a fresh Python process for each."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator

from scripts.benchmarks.bench import Bench
from scripts.benchmarks.model import BenchError
from scripts.benchmarks.processes import Child, running

_SECONDS = 120.0


@contextlib.contextmanager
def started(bench: Bench, name: str, *arguments: str) -> Iterator[Child]:
    """The probe called ``name`` for the length of a block, on the image, with a folder of its own."""
    with bench.new_room() as room:
        command = [sys.executable, "-m", "scripts.benchmarks.probes", name, bench.image(), room.folder, *arguments]
        with running(command, environment=room.environment, talks=True) as child:
            yield child


def probe(bench: Bench, name: str, *arguments: str) -> dict[str, float]:
    """Its figures.

    :raises BenchError: it failed.
    """
    with started(bench, name, *arguments) as child:
        line = child.line(_SECONDS)
    try:
        found = json.loads(line)
    except ValueError:
        raise BenchError(f"the probe {name} printed {line[:100]!r}") from None
    assert isinstance(found, dict)
    return found
