"""Throwaway disks for ``unittest``.

::

    class InstallerTest(CowDiskMixin, unittest.TestCase):
        cow_base = "images/debian.img"

        def test_it(self):
            subprocess.run(["my-installer", self.cow_disk.uri], check=True)

It goes with ``unittest.IsolatedAsyncioTestCase``, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from cowkit.cow_disk import CowDisk

if TYPE_CHECKING:
    from unittest import TestCase as _TestCase
else:
    _TestCase = object

BLANK_SIZE = "64M"
"""The size of a disk for which neither a base nor a size is given."""


class CowDiskMixin(_TestCase):
    """Gives each test of a ``unittest.TestCase`` a disk of its own, :attr:`cow_disk`, made at its first use and closed at the end."""

    cow_base: ClassVar[str | os.PathLike[str] | None] = None
    """What the disk is of: a path (a relative one is relative to the current directory), an NBD URI, or None for a blank disk."""
    cow_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """The other options of :class:`cowkit.CowDisk`; a blank disk has 64 MiB unless its ``size`` is here."""

    @cached_property
    def cow_disk(self) -> CowDisk:
        """This test's disk.

        :raises CowkitError: what :class:`cowkit.CowDisk` raises.
        """
        return self.make_cow_disk(self.cow_base, **self.cow_options)

    def make_cow_disk(self, base: str | os.PathLike[str] | None = None, **options: Any) -> CowDisk:
        """One more disk, which is closed at the end of the test; what went wrong in its servers is an error of the test.

        :raises CowkitError: what :class:`cowkit.CowDisk` raises.
        """
        if base is None and options.get("size") is None:
            options = {**options, "size": BLANK_SIZE}
        disk = CowDisk(base, **options)

        def close() -> None:
            try:
                disk.close()
            finally:
                for error in disk.server_errors:
                    raise error

        self.addCleanup(close)
        return disk
