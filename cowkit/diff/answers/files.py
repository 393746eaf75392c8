"""Which files changed, in each file system of the disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cowkit.diff.answers.file_change import FileSystemChanges
from cowkit.diff.answers.states import Partitions
from cowkit.disk.extent import Extent

if TYPE_CHECKING:
    from cowkit.diff.view import View


def changed_files(view: View, divided: Partitions, changed: Sequence[Extent]) -> tuple[FileSystemChanges, ...]:
    """The files of each file system of ``view`` that changed."""
    return ()
