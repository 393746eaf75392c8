"""Which files changed, in each file system of the disk."""

from cowkit.diff.answers.files.changed import changed_files

__all__ = ["changed_files"]
