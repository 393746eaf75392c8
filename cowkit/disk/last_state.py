"""What a closed disk was at the end. Making it costs next to nothing: it takes over what the disk would let go of."""

from __future__ import annotations

from cowkit.disk.base import Base
from cowkit.disk.checkpoint import FrozenView
from cowkit.disk.layer import Layer
from cowkit.disk.owner_map import BASE, FrozenMap
from cowkit.disk.source import Source


class LastState:
    """The content of a disk that nobody writes to any more.

    :param layers: the disk's, each held once; this lets go of them, and of ``base``, when it is released.
    """

    def __init__(
        self,
        map: FrozenMap,
        *,
        base: Base,
        size: int,
        block_size: int,
        sources: list[Source | None],
        layers: list[Layer],
    ) -> None:
        self.map = map
        self.base = base
        self.size = size
        self.block_size = block_size
        self._sources = sources
        self._layers = layers

    @property
    def dirty_bytes(self) -> int:
        """How many bytes were written or zeroed, in whole blocks."""
        count = self.map.dirty_blocks() * self.block_size
        over = self.map.blocks * self.block_size - self.size
        return count - over if over and self.map.owner(self.map.blocks - 1) != BASE else count

    def view(self) -> FrozenView:
        """A view of it. Close it when done."""
        return FrozenView(
            self.map,
            base=self.base,
            size=self.size,
            block_size=self.block_size,
            sources=self._sources,
            layers=self._layers,
            on_close=lambda view: None,
        )

    def release(self) -> None:
        """Let go of the overlay's files and the base."""
        for layer in self._layers:
            layer.release()
        self.base.release()
