"""What kind of image a difference is written to."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from cowkit.diff.identity import Hash
from cowkit.diff.qcow2.bitmap_writer import check_bitmap_name
from cowkit.diff.qcow2.layout import DEFAULT_CLUSTER, check_cluster_size
from cowkit.disk.sizes import parse_size
from cowkit.errors import UsageError

Compression = Literal["zlib", "zstd"]


class ImageOptions(NamedTuple):
    """The image to write, as Python's, the command line's and the control socket's users say it."""

    cluster_size: int | str | None = None
    """From 4096 bytes to 2 MiB, a power of two; 64 KiB unless given."""
    subclusters: bool = False
    """Divide clusters by 32 (extended L2 entries): a small change costs little, and QEMU before 5.2 cannot read it."""
    compress: Compression | None = None
    """Compress each cluster."""
    bitmap: str | None = None
    """Put in what is dirty as a persistent bitmap of that name."""
    standalone: bool = False
    """Have all of the disk in the image, and no backing file."""
    raw: bool = False
    """Write a raw file with all of the disk instead of qcow2."""
    hash: Hash | None = None
    """What of the base its identity is made of: some blocks (``"sampled"``, unless given), or all of it as well (``"full"``)."""

    @property
    def has_all(self) -> bool:
        """Whether the image needs no base."""
        return self.standalone or self.raw

    @property
    def cluster(self) -> int:
        """The cluster size in bytes."""
        if self.cluster_size is None:
            return DEFAULT_CLUSTER
        return check_cluster_size(parse_size(self.cluster_size, what="cluster size"))

    def check(self) -> None:
        """See that they go together.

        :raises UsageError: they do not, or one of them makes no sense.
        """
        if self.raw:
            wrong = [name for name in ("cluster_size", "subclusters", "compress", "bitmap") if getattr(self, name)]
            if wrong:
                words = " and ".join(name.replace("_", " ") for name in wrong)
                raise UsageError(f"a raw file has no {words}: leave that out, or raw")
        if self.hash is not None and self.hash not in get_args(Hash):
            raise UsageError(f"hash is 'sampled' or 'full', not {self.hash!r}")
        if self.hash is not None and self.has_all:
            raise UsageError(
                "an image with all of the disk needs no base: leave out hash, which tells its base from others"
            )
        if self.compress is not None and self.compress not in get_args(Compression):
            raise UsageError(f"compress is 'zlib' or 'zstd', not {self.compress!r}")
        if self.compress is not None and self.subclusters:
            raise UsageError("a compressed cluster has no subclusters: choose one of the two")
        if self.bitmap is not None:
            check_bitmap_name(self.bitmap)
        self.cluster  # noqa: B018 - it refuses what is none
