"""Keeping what changed: cowkit's difference beside the recipe of `qemu-img create` and `qemu-img rebase`.

That is what nbdkit's manual tells its users to do, and so it is nbdkit's figure. With cowkit's server, which reads faster, it is another.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping

from scripts.benchmarks.bench import GIB, MIB, Bench
from scripts.benchmarks.model import COWKIT, NBDKIT, Experiment, Limit, Row, Times, UnavailableError
from scripts.benchmarks.servers import COWKIT_COMMAND, Served, need, serving
from scripts.benchmarks.timing import timed

RECIPE = "cowkit, create + rebase"
_SIZE = 2 * GIB
_RUNS = ((MIB, 0.5), (256 * 1024, 0.25), (64 * 1024, 0.25))
"""The lengths of what is written, in bytes, and how much of the dirty bytes is in such runs."""


def dirty_runs(dirty: int, size: int) -> list[tuple[int, int]]:
    """Where to write: offsets and lengths that add up to about ``dirty`` of ``size`` bytes, the same each time.

    Each run begins at a multiple of its length, and no two meet in the same place.
    """
    rng = random.Random(dirty)
    taken = bytearray(size // _RUNS[-1][0])
    found = []
    left = dirty
    for length, share in _RUNS:
        count = int(dirty * share) // length if length != _RUNS[-1][0] else max(1, round(left / length))
        wide = length // _RUNS[-1][0]
        for place in rng.sample(range(size // length), size // length):
            if count == 0:
                break
            if not any(taken[place * wide : (place + 1) * wide]):
                taken[place * wide : (place + 1) * wide] = b"\1" * wide
                found.append((place * length, length))
                left -= length
                count -= 1
    rng.shuffle(found)
    return found


@contextlib.contextmanager
def _dirtied(bench: Bench, server: str, share: float) -> Iterator[Served]:
    """A disk that ``server`` serves, with ``share`` of its bytes written."""
    try:
        import nbd
    except ImportError:
        raise UnavailableError(
            "`import nbd` does not work (Debian: apt install python3-libnbd; see `cowkit doctor`)"
        ) from None
    image = bench.image(_SIZE)
    room = bench.new_room()
    with serving(server, image, room) as served:
        handle = nbd.NBD()
        handle.connect_uri(served.uri)
        data = os.urandom(_RUNS[0][0])
        for offset, length in dirty_runs(int(_SIZE * share), _SIZE):
            handle.pwrite(data[:length], offset)
        handle.shutdown()
        os.sync()  # or what is still being written to the disk holds up both
        yield served


def _measure(share: float, names: tuple[str, str, str]) -> Callable[[Bench, str], Mapping[str, float]]:
    within, command, read = names

    def measure(bench: Bench, contender: str) -> Mapping[str, float]:
        if contender != COWKIT:
            need("qemu-img", "qemu-utils")
        with _dirtied(bench, NBDKIT if contender == NBDKIT else COWKIT, share) as served:
            image = bench.image()
            folder = os.path.dirname(image)
            output = os.path.join(folder, "diff.qcow2")
            try:
                if contender != COWKIT:
                    source = ["-f", "qcow2", "-F", "raw"]
                    created, _ = timed(["qemu-img", "create", "-q", *source, "-b", served.uri, output], folder)
                    rebased, _ = timed(["qemu-img", "rebase", "-q", *source, "-b", image, output], folder)
                    return {within: created + rebased, command: created + rebased}
                asked = [COWKIT_COMMAND, "diff", "--base", image, "-o", output, "--json"]
                taken, said = timed(asked, folder, served.room.environment)
                report = json.loads(said)
                return {
                    within: report["seconds"] * 1e3,
                    command: taken,
                    read: report["bytes_read"] / report["dirty_bytes"],
                }
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(output)

    return measure


def _experiment(
    short: str, share: float, factor: float | None, *, quick: bool = False, rounds: int | None = None
) -> Experiment:
    names = (f"diff-{short}", f"diff-{short}-command", f"diff-{short}-read")
    of = f"{share * 100:g} % of 2 GiB dirty"
    rows = (
        Row(
            names[0],
            f"difference, {of}",
            "ms",
            "lower",
            () if factor is None else (Times(factor, NBDKIT),),
            picture=quick,
        ),
        Row(names[1], f"difference by the command, {of}", "ms", "lower"),
        Row(names[2], f"bytes read for each dirty byte, {of}", "×", "lower", (Limit(1.2),) if factor else ()),
    )
    return Experiment("Differences", rows, (COWKIT, NBDKIT, RECIPE), _measure(share, names), quick=quick, rounds=rounds)


EXPERIMENTS = (
    _experiment("0.01", 0.0001, None, rounds=2),
    _experiment("1", 0.01, 100, quick=True),
    _experiment("50", 0.5, 3, rounds=3),
)
