"""What is left to do on an image that a program of QEMU's has written."""

from __future__ import annotations

from cowkit.diff.engine import Order
from cowkit.diff.output import AtomicOutput
from cowkit.diff.qcow2.stamp import stamp
from cowkit.errors import ImageError, UsageError


def finish(order: Order, output: AtomicOutput) -> None:
    """Record who the base is, where the image has a place for that, and count what the image takes.

    :raises UsageError: it has none, and the user asked for it.
    """
    if order.options.is_raw:
        output.truncate(order.view.size)  # QEMU counts in sectors
    if order.identity is not None:
        try:
            stamp(output.temporary, order.identity)
        except ImageError as error:  # of version 2, or with a first cluster that is full
            if order.options.hash is not None:
                raise UsageError(
                    f"the image {output.path} has no place for who its base is: leave out hash, or version=v2"
                ) from error
    output.count_allocated()
