"""Throwaway disks for ``unittest``.

::

    class InstallerTest(CowDiskMixin, unittest.TestCase):
        cow_base = "images/debian.img"

        def test_it(self):
            subprocess.run(["my-installer", self.cow_disk.uri], check=True)

It goes with ``unittest.IsolatedAsyncioTestCase``, too. Where pytest runs such a test, its disks are kept if it fails, and are
where ``--cow-server`` says, as those of the plugin's fixtures; their base is the class's own in any case.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from cowkit.cow_disk import CowDisk
from cowkit.disk.arguments import check_names
from cowkit.errors import UsageError

if TYPE_CHECKING:
    from unittest import TestCase as _TestCase
else:
    _TestCase = object

BLANK_SIZE = "64M"
"""The size of a disk for which neither a base nor a size is given."""


class Run(Protocol):
    """Who runs the tests."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Of the disks, unless the class or the call gives others."""

    def add(self, disk: CowDisk) -> None:
        """The test has made that disk, which is closed when the test is over."""


class CowDiskMixin(_TestCase):
    """Gives each test of a ``unittest.TestCase`` a disk of its own, :attr:`cow_disk`, made at its first use and closed at the end."""

    cow_base: ClassVar[str | os.PathLike[str] | None] = None
    """What the disk is of: a path (a relative one is relative to the current directory), an NBD URI, or None for a blank disk."""
    cow_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """The other options of :class:`cowkit.CowDisk`; a blank disk has 64 MiB unless its ``size`` is here."""

    cow_run: ClassVar[Run | None] = None
    """Set by whoever runs the tests and looks after their disks: the pytest plugin."""

    @cached_property
    def cow_disk(self) -> CowDisk:
        """This test's disk.

        :raises CowkitError: what :class:`cowkit.CowDisk` raises.
        :raises UsageError: ``cow_options`` is no mapping, or has what CowDisk does not.
        """
        if not isinstance(self.cow_options, Mapping):
            raise UsageError(
                f"cow_options is a dict of CowDisk's options, such as {{'size': '1G'}}, not {self.cow_options!r}"
            )
        check_names(self.cow_options, _names_of_options(), "cow_options")
        return self.make_cow_disk(self.cow_base, **self.cow_options)

    def make_cow_disk(self, base: str | os.PathLike[str] | None = None, **options: Any) -> CowDisk:
        """One more disk, which is closed at the end of the test; what went wrong in its servers is an error of the test.

        :raises CowkitError: what :class:`cowkit.CowDisk` raises.
        :raises UsageError: an option that it does not have.
        """
        check_names(options, _names_of_options(), "make_cow_disk")
        if base is None and options.get("size") is None:
            options = {**options, "size": BLANK_SIZE}
        run = self.cow_run
        disk = CowDisk(base, **options if run is None else {**run.options, **options})

        def close() -> None:
            try:
                disk.close()
            finally:
                for error in disk.server_errors:
                    raise error

        self.addCleanup(close)
        if run is not None:
            run.add(disk)
        return disk


def _names_of_options() -> list[str]:
    return [name for name in inspect.signature(CowDisk).parameters if name != "base"]
