"""An ext2, ext3 or ext4 file system in a file, as debugfs(8) tells it: its tree, and what an inode says."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import IO, NamedTuple

from cowkit.diff.answers.files.tools import need
from cowkit.errors import ImageError, ToolFailedError

ROOT = 2
"""The inode of the root directory."""

_AT_ONCE = 2000
"""Commands for one run, so that its output stays in bounds."""

_NEEDS_RECOVERY = 0x4
"""Of the incompatible features: the journal holds what is to be written yet."""

_ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC", "DEBUGFS_PAGER": "__none__", "PAGER": "__none__"}

_ENTRY = re.compile(rb"/(\d+)/([0-7]{6})/(-?\d+)/(-?\d+)/([^/]*)/(\d*)/\n")
"""A line of `ls -p`. A name may contain anything but a slash, even the end of a line."""
_TABLE = re.compile(rb"^ Group +(\d+): .*inode table at (\d+)", re.MULTILINE)
_NUMBER = re.compile(rb"^(Inodes per group|Inode size|Block size|Inode count):\s+(\d+)", re.MULTILINE)
_FACTS = re.compile(
    rb"Inode: (?P<ino>\d+) +Type: .*?Flags: (?P<flags>0x[0-9a-f]+)\nGeneration: (?P<generation>\d+) .*?\n"
    rb"User: +\d+ +Group: +\d+ +(?:Project: +(?P<project>\d+) +)?Size: \d+\n",
    re.DOTALL,
)
_TIME = re.compile(rb"^ ?(ctime|mtime|crtime): (0x[0-9a-f]+(?::[0-9a-f]+)?)", re.MULTILINE)
_ATTRIBUTES = re.compile(rb"^Extended attributes:\n((?:  .*\n)+)", re.MULTILINE)
_INLINE_DATA = re.compile(rb"^  system\.data \(.*\n", re.MULTILINE)
_TARGET = re.compile(rb'^Fast link dest: "(.*)"$', re.MULTILINE | re.DOTALL)
_DEVICE = re.compile(rb"^Device major/minor number: (\S+)", re.MULTILINE)
_BLOCKS = re.compile(rb"\((\d+)(?:-(\d+))?(\[u\])?\):(\d+)")
_MAP = re.compile(rb"^(?:EXTENTS|BLOCKS):\n(\(.*)$", re.MULTILINE)
_INLINE_FLAG = 0x10000000


class Entry(NamedTuple):
    """A file in a directory."""

    inode: int
    mode: int
    """Type and permissions, as stat(2) has them."""
    user: int
    group: int
    size: int
    """In bytes; 0 for directories."""


class Run(NamedTuple):
    """Neighbouring blocks of a file that lie beside each other on the disk, too."""

    logical: int
    length: int
    """In blocks, as the others are."""
    physical: int


class Facts(NamedTuple):
    """What an inode says of its file, apart from an :class:`Entry`."""

    flags: int
    generation: int
    project: bytes | None
    modified: bytes | None
    made: bytes | None
    attributes: bytes
    """The extended ones, as debugfs prints them."""
    target: bytes | None
    """Of a symbolic link that has it within its inode."""
    device: bytes | None
    blocks: tuple[Run, ...]
    """Without those that are allocated and never written."""

    @property
    def is_inline(self) -> bool:
        """Whether the file's content is within its inode."""
        return bool(self.flags & _INLINE_FLAG)


class ExtFiles:
    """The ext file system in ``image``, an open file.

    :param name: what messages call it, such as ``"ext4"``.
    :param check: called now and then; what it raises ends the work.
    :raises MissingToolError: debugfs is not installed.
    :raises ToolFailedError: it does not find a file system there, or the journal cannot be replayed.
    """

    def __init__(self, image: IO[bytes], name: str, check: Callable[[], None]) -> None:
        self._image = image
        self._check = check
        self._debugfs = need("debugfs", name)
        (features,) = struct.unpack("<I", os.pread(image.fileno(), 4, 1024 + 0x60).ljust(4, b"\0"))
        if features & _NEEDS_RECOVERY:
            self._replay(need("e2fsck", name))
        self._read_geometry()

    def _replay(self, program: str) -> None:
        """What a mount would do first."""
        path, fd = self._path
        command = [program, "-y", "-E", "journal_only", path]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[fd],
            check=False,
        )
        if done.returncode & ~0x3:  # 1 and 2: it did what was to be done
            raise ToolFailedError(command, done.returncode, done.stdout.decode(errors="replace"))

    @property
    def _path(self) -> tuple[str, int]:
        fd = self._image.fileno()
        return f"/proc/self/fd/{fd}", fd

    def _run(self, commands: Iterable[str]) -> list[bytes]:
        """What debugfs answers to each of ``commands``, and what it printed before the first."""
        path, fd = self._path
        wanted = list(commands)
        answers: list[bytes] = []
        for start in range(0, len(wanted), _AT_ONCE):
            self._check()
            some = wanted[start : start + _AT_ONCE]
            command = [self._debugfs, "-f", "-", path]
            done = subprocess.run(
                command,
                input="".join(f"{each}\n" for each in some).encode(),
                capture_output=True,
                pass_fds=[fd],
                env={**os.environ, **_ENVIRONMENT},
                check=False,
            )
            output, at = done.stdout, 0
            ends: list[tuple[int, int]] = []
            for each in some:  # what is echoed comes in this order
                echo = f"debugfs: {each}\n".encode()
                found = at if output.startswith(echo, at) else output.find(b"\n" + echo, at) + 1
                if not found and not output.startswith(echo):
                    raise ToolFailedError(command, done.returncode, done.stderr.decode(errors="replace"))
                ends.append((found, found + len(echo)))
                at = found + len(echo)
            ends.append((len(output), 0))
            answers += [output[first:last] for (_, first), (last, _) in pairwise(ends)]
        return answers

    def _read_geometry(self) -> None:
        (output,) = self._run(["stats"])
        numbers = {name: int(value) for name, value in _NUMBER.findall(output)}
        try:
            self.block_size = numbers[b"Block size"]
            self.inodes = numbers[b"Inode count"]
            self._inodes_per_group = numbers[b"Inodes per group"]
            self._inode_size = numbers[b"Inode size"]
            self._tables = [int(block) for _, block in _TABLE.findall(output)]
        except KeyError as error:
            raise ImageError(f"debugfs does not tell the {error.args[0].decode()} of the file system") from error

    def raw_inodes(self, group: int) -> bytes:
        """The inodes of a group, one after another, as they are on the disk."""
        length = self._inodes_per_group * self._inode_size
        return os.pread(self._image.fileno(), length, self._tables[group] * self.block_size).ljust(length, b"\0")

    def inodes_that_differ(self, other: ExtFiles) -> set[int] | None:
        """Those that are not the same, byte for byte, in both states; None where they cannot be compared so."""
        shape = (self._tables, self._inodes_per_group, self._inode_size, self.block_size)
        if shape != (other._tables, other._inodes_per_group, other._inode_size, other.block_size):
            return None
        size, found = self._inode_size, set[int]()
        for group in range(len(self._tables)):
            mine, others = self.raw_inodes(group), other.raw_inodes(group)
            if mine != others:
                first = group * self._inodes_per_group + 1
                for index in range(self._inodes_per_group):
                    if mine[index * size : index * size + size] != others[index * size : index * size + size]:
                        found.add(first + index)
        return found

    def tables(self) -> list[tuple[int, int]]:
        """First block and number of blocks of each inode table."""
        count = -(-self._inodes_per_group * self._inode_size // self.block_size)
        return [(first, count) for first in self._tables]

    def tree(self) -> dict[bytes, Entry]:
        """Each path with its file, the root (``/``) among them."""
        root, level = self._listed([ROOT])[0], [(b"", ROOT)]
        found = {b"/" * len(name): entry for name, entry in root if name == b"."}
        seen = {ROOT}
        lists = [root]
        while level:
            below: list[tuple[bytes, int]] = []
            for (path, _), entries in zip(level, lists, strict=True):
                for name, entry in entries:
                    if name in (b".", b".."):
                        continue
                    found[path + b"/" + name] = entry
                    if entry.mode & 0o170000 == 0o040000 and entry.inode not in seen:  # a damaged one may go in circles
                        seen.add(entry.inode)
                        below.append((path + b"/" + name, entry.inode))
            level = below
            lists = self._listed([inode for _, inode in level])
        return found

    def _listed(self, inodes: list[int]) -> list[list[tuple[bytes, Entry]]]:
        lists = []
        for output in self._run(f"ls -p <{inode}>" for inode in inodes):
            entries, at = [], 0
            while match := _ENTRY.match(output, at):
                inode, mode, user, group, name, size = match.groups()
                if int(inode):  # 0: what is free between entries
                    entries.append((name, Entry(int(inode), int(mode, 8), int(user), int(group), int(size or 0))))
                at = match.end()
            lists.append(entries)
        return lists

    def facts(self, inodes: Iterable[int]) -> dict[int, Facts]:
        """What each of ``inodes`` says; those that debugfs cannot read are left out."""
        wanted = sorted(inodes)
        answers = self._run(f"stat <{inode}>" for inode in wanted)
        return {inode: facts for inode, output in zip(wanted, answers, strict=True) if (facts := _facts(output))}

    def owners(self, blocks: list[int]) -> set[int]:
        """The inodes that ``blocks`` belong to."""
        found = set[int]()
        for start in range(0, len(blocks), 500):  # debugfs reads lines of up to 8 KiB
            (output,) = self._run(["icheck " + " ".join(map(str, blocks[start : start + 500]))])
            found.update(int(inode) for inode in re.findall(rb"^\d+\t(\d+)$", output, re.MULTILINE))
        return found

    def content(self, inode: int, size: int) -> bytes:
        """The content of a small file that lies within its inode."""
        (output,) = self._run([f"cat <{inode}>"])
        return output[:size]


def _facts(output: bytes) -> Facts | None:
    head = _FACTS.match(output)
    if head is None:
        return None
    times = dict(_TIME.findall(output))
    attributes, target, device = _ATTRIBUTES.search(output), _TARGET.search(output), _DEVICE.search(output)
    mapped = _MAP.search(output)
    runs = [
        Run(int(first), int(last or first) - int(first) + 1, int(physical))
        for first, last, unwritten, physical in (_BLOCKS.findall(mapped[1]) if mapped else ())
        if not unwritten
    ]
    return Facts(
        flags=int(head["flags"], 16),
        generation=int(head["generation"]),
        project=head["project"],
        modified=times.get(b"mtime"),
        made=times.get(b"crtime"),
        attributes=_INLINE_DATA.sub(b"", attributes[1]) if attributes else b"",
        target=target[1] if target else None,
        device=device[1] if device else None,
        blocks=tuple(runs),
    )
