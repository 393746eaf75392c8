"""The copy-on-write engine: no sockets, no NBD words, no subprocesses."""

from cowkit.disk.base import Base, FileBase, Identity, ZeroBase
from cowkit.disk.checkpoint import Checkpoint, FrozenView
from cowkit.disk.disk import Disk
from cowkit.disk.extent import Extent, Kind

__all__ = ["Base", "Checkpoint", "Disk", "Extent", "FileBase", "FrozenView", "Identity", "Kind", "ZeroBase"]
