"""Which files of an ext2, ext3 or ext4 file system changed: two states of it compared.

Both trees are listed. An inode that is the same in both states, byte for byte, is not asked about, unless one of its blocks
changed. Of others, the content is compared where it may differ: so a file that was changed in place is told even if all its
times were put back, and one that was rewritten with the same content is not said to have another.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from cowkit.diff.answers.file_change import FileChange
from cowkit.diff.answers.files.debugfs import Entry, ExtFiles, Facts, Run
from cowkit.diff.answers.files.scratch import Place, ReadInto
from cowkit.disk.extent import Extent

_PIECE = 1 << 20
_MOST_ASKED = 2000
"""Blocks that debugfs is asked for the owners of; it looks through all inodes for each 500. Beyond, all files are looked at."""

_FLAGS = 0x629378FF | 0x40000000
"""Those that chattr(1) sets or that say what kind of content a file has: no others are the user's."""

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFBLK: "block device",
    stat.S_IFCHR: "character device",
}


class Side(NamedTuple):
    """One state of the file system."""

    files: ExtFiles
    read_into: ReadInto
    """Fills a buffer from an offset of the disk on, in that state."""
    place: Place


def ext_changes(before: Side | None, now: Side | None, changed: Sequence[Extent]) -> tuple[FileChange, ...]:
    """Each path that is not what it was, in order.

    :param before: None where there was none; and so for ``now``.
    :param changed: what of the disk changed, in order.
    """
    old = before.files.tree() if before else {}
    new = now.files.tree() if now else {}
    if before is None or now is None:
        side = before or now
        assert side is not None
        change = "removed" if now is None else "added"
        paths = ((path, entry) for path, entry in sorted((old or new).items()) if path != b"/")
        return tuple(_whole(path, entry, change == "added") for path, entry in paths)
    return tuple(_Comparison(before, now, old, new, changed).changes())


def _whole(path: bytes, entry: Entry, added: bool) -> FileChange:
    size = entry.size if stat.S_ISREG(entry.mode) else None
    return FileChange(
        os.fsdecode(path),
        "added" if added else "removed",
        _type(entry),
        size=size if added else None,
        size_before=None if added else size,
    )


def _type(entry: Entry) -> str:
    return _TYPES.get(stat.S_IFMT(entry.mode), "file")


class _Comparison:
    def __init__(
        self, before: Side, now: Side, old: dict[bytes, Entry], new: dict[bytes, Entry], changed: Sequence[Extent]
    ) -> None:
        self._before, self._now = before, now
        self._old, self._new = old, new
        self._changed = changed
        self._starts = [each.offset for each in changed]
        self._old_facts: dict[int, Facts] = {}
        self._new_facts: dict[int, Facts] = {}
        self._ask()

    # What is asked about

    def _ask(self) -> None:
        """Have what all inodes say that may be of files that changed."""
        old = {entry.inode for entry in self._old.values()}
        new = {entry.inode for entry in self._new.values()}
        differ = self._now.files.inodes_that_differ(self._before.files)
        if differ is None:
            self._ask_for(old, new)
            return
        differ |= old ^ new
        differ |= {entry.inode for path, entry in self._new.items() if self._old.get(path) != entry}
        differ |= {entry.inode for path, entry in self._old.items() if self._new.get(path) != entry}
        self._ask_for(old & differ, new & differ)
        rest = self._unexplained()
        more = new if rest is None else self._now.files.owners(rest)
        self._ask_for(old & more - differ, new & more - differ)

    def _ask_for(self, old: set[int], new: set[int]) -> None:
        self._old_facts |= self._before.files.facts(old)
        self._new_facts |= self._now.files.facts(new)

    def _unexplained(self) -> list[int] | None:
        """Blocks that changed, and are not of what was asked about; None if there are too many of them."""
        files, place = self._now.files, self._now.place
        size = files.block_size
        known = [(run.physical, run.length) for facts in self._new_facts.values() for run in facts.blocks]
        known = sorted(known + files.tables())
        starts = [first for first, _ in known]
        found: list[int] = []
        for extent in self._changed:
            at = max(extent.offset - place.offset, 0) // size
            end = -(-min(extent.end - place.offset, place.size) // size)
            while at < end:
                index = bisect_right(starts, at) - 1
                if index >= 0 and at < known[index][0] + known[index][1]:
                    at = known[index][0] + known[index][1]
                    continue
                stop = min(end, starts[index + 1] if index + 1 < len(starts) else end)
                if len(found) + stop - at > _MOST_ASKED:
                    return None
                found += range(at, stop)
                at = stop
        return found

    # What comes of it

    def changes(self) -> Iterator[FileChange]:
        """Each path that is not what it was."""
        found: list[tuple[bytes, FileChange]] = []
        removed = {path: entry for path, entry in self._old.items() if path not in self._new}
        added = {path: entry for path, entry in self._new.items() if path not in self._old}
        for path in self._old.keys() & self._new.keys():
            change = self._same_path(path)
            if change is not None:
                found.append((path, change))
        renamed = self._renames(removed, added)
        for source, target in renamed.items():
            what = self._what(self._old[source], self._new[target])
            parent, name = os.path.split(target)
            old_parent, old_name = os.path.split(source)
            if not what and name == old_name and renamed.get(old_parent) == parent:
                continue  # it went with its directory
            found.append((target, self._change(target, self._old[source], "renamed", what, os.fsdecode(source))))
        gone = set(renamed)
        come = set(renamed.values())
        found += [(path, _whole(path, entry, False)) for path, entry in removed.items() if path not in gone]
        found += [(path, _whole(path, entry, True)) for path, entry in added.items() if path not in come]
        for _, change in sorted(found, key=lambda each: each[0]):
            yield change

    def _same_path(self, path: bytes) -> FileChange | None:
        old, new = self._old[path], self._new[path]
        what = ("type",) if stat.S_IFMT(old.mode) != stat.S_IFMT(new.mode) else self._what(old, new)
        return self._change(path, old, "changed", what) if what else None

    def _change(
        self, path: bytes, old: Entry, change: str, what: tuple[str, ...], source: str | None = None
    ) -> FileChange:
        new = self._new[path]
        return FileChange(
            os.fsdecode(path),
            "renamed" if change == "renamed" else "changed",
            _type(new),
            what,
            size=new.size if stat.S_ISREG(new.mode) else None,
            size_before=old.size if stat.S_ISREG(old.mode) else None,
            renamed_from=source,
        )

    def _renames(self, removed: dict[bytes, Entry], added: dict[bytes, Entry]) -> dict[bytes, bytes]:
        """Which of the paths that are gone is which of the new ones: those of the same file."""
        waiting: dict[int, list[bytes]] = {}
        for path in sorted(added, reverse=True):
            waiting.setdefault(added[path].inode, []).append(path)
        found: dict[bytes, bytes] = {}
        for path in sorted(removed):
            targets = waiting.get(removed[path].inode)
            if not targets:
                continue
            (old_parent, old_name), (parent, name) = os.path.split(path), os.path.split(targets[-1])
            went_along = old_name == name and found.get(old_parent) == parent
            if self._is_same_file(removed[path], added[targets[-1]], went_along):
                found[path] = targets.pop()
        return found

    def _is_same_file(self, old: Entry, new: Entry, went_along: bool) -> bool:
        """Whether it is one inode in the same use; ``went_along``: it has its old name, in its directory's new place."""
        if stat.S_IFMT(old.mode) != stat.S_IFMT(new.mode):
            return False
        then, now = self._old_facts.get(old.inode), self._new_facts.get(new.inode)
        if then is None or now is None:
            return then is now  # neither was asked about: it is the same inode, byte for byte
        if (then.generation, then.made) != (now.generation, now.made):
            return False
        # An inode that is used again gets another generation from the kernel, and 0 from the tools.
        is_known = went_along or now.generation or stat.S_ISDIR(new.mode)
        return bool(is_known) or not self._content_differs(old, new)

    def _what(self, old: Entry, new: Entry) -> tuple[str, ...]:
        """What is different of two files of the same type."""
        then, now = self._old_facts.get(old.inode), self._new_facts.get(new.inode)
        if then is None or now is None:
            return ()
        found: list[str] = []
        is_link, is_directory = stat.S_ISLNK(new.mode), stat.S_ISDIR(new.mode)
        if not is_directory and self._content_differs(old, new):
            found.append("target" if is_link else "content")
        if old.mode != new.mode:
            found.append("mode")
        if (old.user, old.group, then.project) != (new.user, new.group, now.project):
            found.append("owner")
        if not is_directory and then.modified != now.modified:
            found.append("times")
        if then.device != now.device:
            found.append("device")
        if then.attributes != now.attributes:
            found.append("attributes")
        if then.flags & _FLAGS != now.flags & _FLAGS:
            found.append("flags")
        return tuple(found)

    # Content

    def _content_differs(self, old: Entry, new: Entry) -> bool:
        if not (stat.S_ISREG(new.mode) or stat.S_ISLNK(new.mode)):
            return False
        if old.size != new.size:
            return True
        then, now = self._old_facts.get(old.inode), self._new_facts.get(new.inode)
        if then is None or now is None:
            return False
        if then.target is not None or now.target is not None:
            return then.target != now.target
        if then.is_inline or now.is_inline:
            return self._inline_differs(old, new, then, now)
        sizes = self._before.files.block_size, self._now.files.block_size
        if sizes[0] != sizes[1]:
            return True
        return any(self._piece_differs(*piece, sizes[0], new.size) for piece in _both(then.blocks, now.blocks))

    def _inline_differs(self, old: Entry, new: Entry, then: Facts, now: Facts) -> bool:
        if then.is_inline and now.is_inline:
            return self._before.files.content(old.inode, old.size) != self._now.files.content(new.inode, new.size)
        return True  # it grew out of its inode, or shrank into it, and was written

    def _piece_differs(
        self, logical: int, count: int, then: int | None, now: int | None, block_size: int, size: int
    ) -> bool:
        start = logical * block_size
        length = min(count * block_size, size - start)
        if length <= 0 or (then is None and now is None):
            return False
        old = None if then is None else self._before.place.offset + then * block_size
        new = None if now is None else self._now.place.offset + now * block_size
        if old is None or new is None or old != new:
            return self._bytes_differ(old, new, length)
        index = max(0, bisect_right(self._starts, new) - 1)
        while index < len(self._changed) and self._changed[index].offset < new + length:
            first, last = max(self._changed[index].offset, new), min(self._changed[index].end, new + length)
            if first < last and self._bytes_differ(first, first, last - first):
                return True
            index += 1
        return False

    def _bytes_differ(self, old: int | None, new: int | None, length: int) -> bool:
        for at in range(0, length, _PIECE):
            piece = min(_PIECE, length - at)
            then, now = bytearray(piece), bytearray(piece)
            if old is not None:
                self._before.read_into(memoryview(then), old + at)
            if new is not None:
                self._now.read_into(memoryview(now), new + at)
            if then != now:
                return True
        return False


_Piece = tuple[int, int, int | None, int | None]


def _both(then: tuple[Run, ...], now: tuple[Run, ...]) -> Iterator[_Piece]:
    """Pieces of a file: first block, number of blocks, and where they were and are (None: nowhere)."""
    edges = sorted({edge for run in (*then, *now) for edge in (run.logical, run.logical + run.length)})
    find_old, find_new = _finder(then), _finder(now)
    for first, last in pairwise(edges):
        yield first, last - first, find_old(first), find_new(first)


def _finder(runs: tuple[Run, ...]) -> Callable[[int], int | None]:
    """What tells where a block of the file is."""
    ordered = sorted(runs)
    starts = [run.logical for run in ordered]

    def find(block: int) -> int | None:
        index = bisect_right(starts, block) - 1
        if index < 0 or block >= ordered[index].logical + ordered[index].length:
            return None
        return ordered[index].physical + block - ordered[index].logical

    return find
