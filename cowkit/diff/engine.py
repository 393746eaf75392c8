"""What writes the image of a difference: cowkit itself, qemu-img, or a QEMU storage daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from cowkit.diff.identity import Progress
from cowkit.diff.options import EngineName, ImageOptions
from cowkit.diff.output import AtomicOutput
from cowkit.diff.qcow2.layout import Geometry
from cowkit.diff.recorded import Recorded
from cowkit.diff.tally import Tally

if TYPE_CHECKING:
    from cowkit.diff.view import View


class Order(NamedTuple):
    """An image to write; all of it has been checked to go together."""

    view: View
    """The two states."""
    shape: Geometry
    """Of a qcow2 image."""
    backing_file: str | None
    """The name of the base to record."""
    backing_format: str
    options: ImageOptions
    identity: Recorded | None
    """Who the base is, and the disk's size, for the image to record where it has a place for that."""
    progress: Progress | None
    snapshots: tuple[str | None, str | None] = (None, None)
    """What an rbd difference calls the state before and the state now; None where they have no names."""

    @property
    def portion(self) -> int:
        """What changes are looked for in, in bytes."""
        return self.shape.portion(self.view.block_size)


class Filled(NamedTuple):
    """What came of it."""

    tally: Tally
    virtual_size: int
    """The disk's size as the image has it, in bytes."""


class Engine(Protocol):
    """Writes the image of an order to an output that is open, and completes it."""

    @property
    def name(self) -> EngineName:
        """What users call it."""

    def fill(self, order: Order, output: AtomicOutput) -> Filled:
        """Write the image; the caller makes it appear, or throws it away if this raises.

        :raises OutputError: it cannot be written.
        :raises UsageError: the engine cannot do what the order asks for.
        """
