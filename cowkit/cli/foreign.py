"""`cowkit diff` of what no cowkit serves: an NBD export of another server, or an image file, compared with a base."""

from __future__ import annotations

import argparse
import os
import re
import stat

from cowkit.cli.choose import choose, matching
from cowkit.errors import ControlError, UsageError

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from collections.abc import Callable

    from cowkit.diff import DiffReport

_URI = re.compile(r"nbds?(\+[a-z]+)?://", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit diff` takes for such a source."""
    group = parser.add_argument_group("a source that no cowkit serves (--from URI or IMAGE, with --base)")
    group.add_argument("--format", metavar="FORMAT", help="the format of BASE (default: told by its name and content)")
    group.add_argument("--from-format", metavar="FORMAT", help="the format of IMAGE (default: told the same way)")
    group.add_argument(
        "--from-context",
        metavar="CONTEXT",
        help="believe what this metadata context of the source says has changed since BASE, instead of comparing all: "
        "qemu:dirty-bitmap:NAME, or qemu:allocation-depth",
    )


def is_foreign(arguments: argparse.Namespace) -> bool:
    """Whether ``--from`` names an NBD URI or a file, and no running cowkit.

    :raises UsageError: an option makes sense for the other kind of source alone.
    :raises ControlError: it is such a source, and there is no base.
    """
    source: str | None = arguments.source
    if source is None or not (_URI.match(source) or _is_disk(source)) or matching(source):
        for name in ("format", "from_format", "from_context"):
            if getattr(arguments, name) is not None:
                option = name.replace("_", "-")
                raise UsageError(
                    f"--{option} is for a source that no cowkit serves (--from URI or --from IMAGE): leave it out"
                )
        return False
    if arguments.base is None:
        try:
            choose(None, source)
        except ControlError as error:
            raise ControlError(f"{error}; to compare {source} itself with a base, give --base") from error
    for name in ("since", "at"):
        if getattr(arguments, name) is not None:
            raise UsageError(
                f"--{name} names a checkpoint of a disk that cowkit serves, and {source} is none: leave it out"
            )
    return True


def _is_disk(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def keep(arguments: argparse.Namespace, progress: Callable[[int, int], None] | None) -> DiffReport:
    """Compare the source with the base."""
    from cowkit.diff import ImageOptions
    from cowkit.keeping.foreign import keep_foreign

    return keep_foreign(
        arguments.source,
        arguments.base,
        arguments.output,
        options=ImageOptions(
            arguments.cluster_size,
            arguments.subclusters,
            arguments.compress,
            arguments.bitmap,
            arguments.standalone,
            arguments.raw,
        ),
        now_format=arguments.from_format,
        base_format=arguments.format,
        context=arguments.from_context,
        backing_file=arguments.backing_file,
        backing_format=arguments.backing_format,
        progress=progress,
    )
