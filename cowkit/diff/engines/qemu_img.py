"""The engine "qemu-img": the usual recipe, `qemu-img create` and `qemu-img rebase`, on the state now as it is served.

- An image on top of the state now has nothing in it; `rebase` to the state before compares the two and keeps what differs.
  Then the name that is to be recorded is put in, unread (`rebase -u`).
- `rebase` of many versions cannot compress: then the image is made without a name of its own first, and `convert -c` compresses
  what is in it.
- All of the disk is one `convert`.

qemu-img does not tell what it found: changes are counted by cowkit itself afterwards.
"""

from __future__ import annotations

import os
import re
import select
import tempfile
from collections.abc import Callable, Iterator, Sequence

from cowkit.bases.qemu_nbd import QEMU_UTILS
from cowkit.diff.changed import Changes
from cowkit.diff.engine import Filled, Order
from cowkit.diff.engines.finishing import finish
from cowkit.diff.engines.link import linked
from cowkit.diff.engines.program import Program
from cowkit.diff.engines.sources import Readable, Sources
from cowkit.diff.identity import Progress
from cowkit.diff.options import EngineName
from cowkit.diff.output import AtomicOutput
from cowkit.errors import OutputError, ToolFailedError

_PERCENT = re.compile(rb"\(([0-9]+\.[0-9]+)/100%\)")
_TICK_MS = 200
"""How often whoever follows the progress is asked whether to go on, at least."""


class QemuImg:
    """Has qemu-img write images."""

    name: EngineName = "qemu-img"

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def fill(self, order: Order, output: AtomicOutput) -> Filled:
        """See :meth:`cowkit.diff.engine.Engine.fill`.

        :raises MissingToolError: qemu-img or setpriv is not installed.
        """
        size = order.view.size
        with linked(output, self._sources.directory) as link:
            recipe = _Recipe(order, output, link, self._sources)
            if order.options.has_all:
                recipe.whole()
            else:
                recipe.difference()
        finish(order, output)
        last_tell = None if order.progress is None else _told_to_the_end(order.progress, size)
        changes = Changes(order.view, order.portion, last_tell)
        for _ in changes:
            pass
        changes.tally.bytes_read += self._sources.bytes_served()
        return Filled(changes.tally, size if order.options.is_raw else order.shape.size)


class _Recipe:
    """The steps for one image."""

    def __init__(self, order: Order, output: AtomicOutput, link: str, sources: Sources) -> None:
        assert sources.now is not None
        self._order = order
        self._output = output
        self._link = link
        self._now: str = sources.now
        self._before = sources.before

    def whole(self) -> None:
        options = self._order.options
        if options.is_raw:
            self._run(["convert", "-p", "-f", "raw", "-O", "raw", self._now, self._link])
            return
        compress = ["-c"] if options.compress is not None else []
        self._run(
            ["convert", "-p", *compress, "-f", "raw", "-O", "qcow2", "-o", self._creation(), self._now, self._link]
        )

    def difference(self) -> None:
        if self._order.options.compress is None:
            self._rebased(self._link, (), 0, 1)
        else:
            self._compressed()
        name = self._order.backing_file
        if name is not None and Readable(name, self._order.backing_format) != self._before:
            self._run(
                [
                    "rebase",
                    "-u",
                    "-t",
                    "unsafe",
                    "-f",
                    "qcow2",
                    "-b",
                    name,
                    "-F",
                    self._order.backing_format,
                    self._link,
                ]
            )

    def _rebased(self, image: str, fds: Sequence[int], begin: float, end: float) -> None:
        """Make ``image`` what differs between now and before, on top of the latter."""
        create = ["create", "-q", "-f", "qcow2", "-o", self._creation(), "-b", self._now, "-F", "raw"]
        self._run([*create, image, str(self._order.shape.size)], fds)
        before = ["-b", ""] if self._before is None else ["-b", self._before.filename, "-F", self._before.format]
        self._run(["rebase", "-p", "-t", "unsafe", "-f", "qcow2", *before, image], fds, begin, end)

    def _compressed(self) -> None:
        directory = os.path.dirname(self._output.temporary)
        try:
            loose = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - no name: nothing is left of it
        except OSError as error:
            raise OutputError(f"cannot write {self._output.path}: {error.strerror}") from error
        with loose:
            image = f"/proc/self/fd/{loose.fileno()}"
            self._rebased(image, [loose.fileno()], 0, 0.8)
            before = [] if self._before is None else ["-B", self._before.filename, "-F", self._before.format]
            convert = ["convert", "-p", "-c", "-f", "qcow2", "-O", "qcow2", "-o", self._creation(), *before]
            self._run([*convert, image, self._link], [loose.fileno()], 0.8, 1)

    def _creation(self) -> str:
        """What `-o` takes."""
        options = self._order.options
        chosen = [f"cluster_size={self._order.shape.cluster_size}"]
        if options.subclusters:
            chosen.append("extended_l2=on")
        if options.compress is not None:
            chosen.append(f"compression_type={options.compress}")
        return ",".join(chosen)

    def _run(self, arguments: Sequence[str], fds: Sequence[int] = (), begin: float = 0, end: float = 1) -> None:
        """Run qemu-img, whose progress is that share of the whole."""
        path = self._output.path
        with Program(
            ["qemu-img", *arguments],
            purpose="the engine qemu-img",
            remedy=QEMU_UTILS,
            fds=fds,
            talks=True,
            renamed={self._link: path} | {f"/proc/self/fd/{fd}": path for fd in fds},
        ) as program:
            try:
                for share in _shares(program):
                    if self._order.progress is not None:
                        size = self._order.view.size
                        self._order.progress(int(size * (begin + (end - begin) * share)), size)
                program.wait()
            except ToolFailedError as error:
                raise OutputError(f"cannot write {path}: qemu-img: {program.last_words()}") from error


def _shares(program: Program) -> Iterator[float]:
    """How far it says it has got, from 0 to 1, until it closes its output; the same again now and then."""
    fd = program.output.fileno()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    share, rest = 0.0, b""
    while True:
        if poll.poll(_TICK_MS):
            more = os.read(fd, 4096)
            if not more:
                return
            rest += more
            found = _PERCENT.findall(rest)
            if found:
                share = min(1.0, float(found[-1]) / 100)
            rest = rest[-64:]  # where a figure may have begun
        yield share


def _told_to_the_end(progress: Progress, size: int) -> Callable[[int, int], None]:
    return lambda done, total: progress(size, size)
