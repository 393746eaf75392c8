"""Asserts about what is on a disk. When they fail they say where it differs, in which structure, and show the bytes."""

from cowkit.testing.asserts import assert_same, assert_unchanged
from cowkit.testing.contents import Comparable

__all__ = ["Comparable", "assert_same", "assert_unchanged"]
