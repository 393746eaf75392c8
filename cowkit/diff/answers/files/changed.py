"""Which files changed: the file systems of both states are found and paired, and each pair is compared by what knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from cowkit.diff.answers.file_change import FileSystemChanges
from cowkit.diff.answers.files.debugfs import ExtFiles
from cowkit.diff.answers.files.ext import Side, ext_changes
from cowkit.diff.answers.files.guest import guest_changes
from cowkit.diff.answers.files.scratch import Place, State, data_copy, metadata_copy, states_of
from cowkit.diff.answers.filesystems import CONTAINERS, WITHOUT_FILES, file_system_at
from cowkit.diff.answers.states import Now, Partitions
from cowkit.disk.extent import Extent
from cowkit.disk.layer import default_directory
from cowkit.errors import ImageError, ToolError

if TYPE_CHECKING:
    from cowkit.diff.view import View

EXT = ("ext2", "ext3", "ext4")


class _Found(NamedTuple):
    """Where a file system is in one state, and what it is; None: nothing known."""

    place: Place
    name: str | None

    @property
    def has_files(self) -> bool:
        """Whether it is something with files."""
        return self.name is not None and self.name not in WITHOUT_FILES


class _Pair(NamedTuple):
    partition: int | None
    before: _Found | None
    now: _Found | None


def changed_files(
    view: View, divided: Partitions, changed: Sequence[Extent], check: Callable[[], None] = lambda: None
) -> tuple[FileSystemChanges, ...]:
    """The files of each file system of ``view`` that changed; a file system that cannot be looked into has a ``problem``.

    :param changed: what of the disk changed, in order.
    :param check: called now and then; what it raises ends the work.
    """
    if divided.table == "damaged":
        problem = "the partition table is damaged, so nothing tells where its file systems are"
        return (FileSystemChanges(None, None, (), problem),)
    return tuple(
        answer for pair in _pairs(view, divided) if (answer := _answer(view, pair, changed, check)) is not None
    )


def _pairs(view: View, divided: Partitions) -> Iterator[_Pair]:
    now, base = Now(view), view.base
    numbers = sorted({each.number for each in (*divided.now, *divided.before)})
    then_places = {each.number: Place(each.offset, each.size) for each in divided.before}
    now_places = {each.number: Place(each.offset, each.size) for each in divided.now}
    if not divided.before:
        then_places[0] = Place(0, base.size)
    if not divided.now:
        now_places[0] = Place(0, now.size)
    for number in (0, *numbers):
        before_place, now_place = then_places.get(number), now_places.get(number)
        if before_place is None and now_place is None:
            continue
        yield _Pair(
            number or None,
            before_place and _Found(before_place, file_system_at(base, *before_place)),
            now_place and _Found(now_place, file_system_at(now, *now_place)),
        )


def _answer(view: View, pair: _Pair, changed: Sequence[Extent], check: Callable[[], None]) -> FileSystemChanges | None:
    was = pair.before.name if pair.before else None
    name = pair.now.name if pair.now else None
    place = pair.now.place if pair.now else Place(0, 0)
    touched = any(each.offset < place.offset + place.size and place.offset < each.end for each in changed)
    if pair.before is not None and pair.before.place == place and not touched:
        return None if name is None else FileSystemChanges(pair.partition, name, ())
    if name is None and was is None:
        if pair.partition is None and (pair.before is None or pair.now is None):
            return None  # the disk has a partition table in one of the states
        problem = "no known file system, so its files cannot be told" if touched else None
        return FileSystemChanges(pair.partition, None, (), problem) if problem else None
    if {was, name} <= {*WITHOUT_FILES, None}:
        return FileSystemChanges(pair.partition, name or was, ())
    try:
        return _compared(view, pair, was, name, changed, check)
    except (ToolError, ImageError) as error:
        return FileSystemChanges(pair.partition, name or was, (), str(error))
    except OSError as error:
        where = default_directory()
        problem = f"no copy of its metadata can be made in {where}: {error.strerror}; set TMPDIR to a place with room"
        return FileSystemChanges(pair.partition, name or was, (), problem)


def _compared(
    view: View, pair: _Pair, was: str | None, name: str | None, changed: Sequence[Extent], check: Callable[[], None]
) -> FileSystemChanges:
    shown = name or was
    for each in (name, was):
        if each in CONTAINERS:
            problem = f"it holds {CONTAINERS[each]}, which is not looked into"
            return FileSystemChanges(pair.partition, shown, (), problem)
    if name is None and pair.now is not None:
        problem = f"there was {was}, and nothing known is there now: its superblock is damaged or overwritten"
        return FileSystemChanges(pair.partition, shown, (), problem)
    if {was, name} <= {*EXT, *WITHOUT_FILES, None}:
        before, now = states_of(view)
        with ExitStack() as opened:
            sides = [
                _ext_side(state, found, opened, check) if found is not None and found.has_files else None
                for state, found in ((before, pair.before), (now, pair.now))
            ]
            return FileSystemChanges(pair.partition, shown, ext_changes(sides[0], sides[1], changed))
    before, now = states_of(view)
    with ExitStack() as opened:
        was_there, is_there = (
            data_copy(state, found.place, opened) if found is not None and found.has_files else None
            for state, found in ((before, pair.before), (now, pair.now))
        )
        called = next(each for each in (name, was) if each is not None and each not in WITHOUT_FILES)
        return FileSystemChanges(pair.partition, shown, guest_changes(was_there, is_there, called, check))


def _ext_side(state: State, found: _Found, opened: ExitStack, check: Callable[[], None]) -> Side:
    image = opened.enter_context(metadata_copy(state, found.place))
    return Side(ExtFiles(image, found.name or "ext4", check), state.read_into, found.place)
