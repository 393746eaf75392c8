"""Where two sources may differ, as far as that is known before they are compared.

An image says which of its bytes it holds itself (``qemu:allocation-depth``). So where two images stand on one file, or one on
the other, they can differ only in what lies above that file, in either of them. Of a server behind a URI nobody knows what its
metadata contexts are relative to: there, only the user can say so.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator

from cowkit.bases.image import ImageBase
from cowkit.bases.nbd_base import ClientBase
from cowkit.bases.nbd_client import ALLOCATION_DEPTH, DIRTY_BITMAP
from cowkit.diff.pieces import Range
from cowkit.disk import Base, FileBase
from cowkit.disk.base import Identity
from cowkit.errors import UsageError

Suspects = Callable[[], Iterable[Range]]


def check_context(name: str) -> str:
    """``name``, if it is a metadata context that can tell what changed.

    :raises UsageError: it cannot.
    """
    if name == ALLOCATION_DEPTH or (name.startswith(DIRTY_BITMAP) and name != DIRTY_BITMAP):
        return name
    raise UsageError(
        f"metadata context {name!r} does not tell what changed: give {DIRTY_BITMAP}NAME or {ALLOCATION_DEPTH}"
    )


def told_by(now: Base, base: Base, context: str) -> Suspects:
    """What the server of ``now`` marks in ``context``, of which the user says that it is about changes since ``base``.

    :raises UsageError: the server has no such context, or there is no server.
    """
    if not isinstance(now, ClientBase):
        raise UsageError(f"source {now.given} is read without any NBD server, so it has no metadata context {context}")
    if context not in now.contexts:
        offered = ", ".join(now.offered()) or "none that it lists"
        raise UsageError(f"the server of {now.given} has no metadata context {context}; it has: {offered}")
    chosen = _above_the_deepest if context == ALLOCATION_DEPTH else _set

    def suspects() -> Iterator[Range]:
        return heapq.merge(chosen(now.marks(context)), _longer(now, base))

    return suspects


def told_by_layers(now: Base, base: Base) -> Suspects | None:
    """What ``now`` and ``base`` have above the file that both stand on; None where there is none, or they do not tell."""
    above_now, above_base = _apart(_layers(now), _layers(base))
    if above_now < 0 or not (_tells(now, above_now) and _tells(base, above_base)):
        return None

    def suspects() -> Iterator[Range]:
        return heapq.merge(_top(now, above_now), _top(base, above_base), _longer(now, base))

    return suspects


def _apart(now: list[tuple[Identity, str]], base: list[tuple[Identity, str]]) -> tuple[int, int]:
    """How many layers each has above the first that both have; -1 where there is none."""
    for number, layer in enumerate(now):
        if layer in base:
            return number, base.index(layer)
    return -1, -1


def _layers(source: Base) -> list[tuple[Identity, str]]:
    """Files, and as what they are read, from the top down."""
    if isinstance(source, ImageBase):
        return [(file.identity, format) for file, format in source.layers if file.identity is not None]
    if isinstance(source, FileBase) and source.identity is not None:
        return [(source.identity, "raw")]
    return []


def _tells(source: Base, layers: int) -> bool:
    return layers == 0 or (isinstance(source, ClientBase) and ALLOCATION_DEPTH in source.contexts)


def _top(source: Base, layers: int) -> Iterator[Range]:
    """What lies in the topmost ``layers``."""
    if layers == 0:
        return
    assert isinstance(source, ClientBase)
    for offset, length, depth in source.marks(ALLOCATION_DEPTH):
        if 0 < depth <= layers:
            yield offset, offset + length


def _longer(now: Base, base: Base) -> Iterator[Range]:
    """What is beyond the end of ``base``, which counts as zeroes."""
    if now.size > base.size:
        yield base.size, now.size


def _set(marks: Iterable[tuple[int, int, int]]) -> Iterator[Range]:
    for offset, length, value in marks:
        if value & 1:
            yield offset, offset + length


def _above_the_deepest(marks: Iterable[tuple[int, int, int]]) -> Iterator[Range]:
    """All but the deepest layer, which is the base; the topmost is not, even where nothing deeper is to be seen."""
    known = list(marks)
    deepest = max((depth for _, _, depth in known), default=0)
    for offset, length, depth in known:
        if depth and (depth == 1 or depth < deepest):
            yield offset, offset + length
