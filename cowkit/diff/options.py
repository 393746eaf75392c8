"""What kind of image a difference is written to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple, Self, TypedDict, get_args

from cowkit.diff.identity import Hash
from cowkit.diff.qcow2.bitmap_writer import check_bitmap_name
from cowkit.diff.qcow2.layout import DEFAULT_CLUSTER, SMALLEST_CLUSTER, check_cluster_size
from cowkit.disk.arguments import check_flag, check_text
from cowkit.disk.files import path_text
from cowkit.disk.sizes import parse_size
from cowkit.errors import UsageError

Compression = Literal["zlib", "zstd"]

EngineName = Literal["native", "qemu-img", "qmp"]
"""Who writes the image: cowkit, qemu-img, or a QEMU storage daemon that is driven by QMP."""

STACKABLE = frozenset({"qcow2", "qed"})
"""Formats whose images have the name and the format of a backing file in them, and so can be differences."""

_OF_QCOW2 = ("cluster_size", "subclusters", "compress", "bitmap")

_WORDS = {"compress": "compression"}
"""What is not called as Python has it."""

_OUR_KINDS = ("qcow2", "raw", "rbd")
"""What cowkit writes by itself."""

_OURS = ("backing-file", "backing-fmt", "data-file", "driver", "extents", "file", "size")
"""QEMU's options for making an image that are not for users to choose."""
_SAID_OTHERWISE = {
    "cluster-size": "--cluster-size (in Python, cluster_size=)",
    "extended-l2": "--subclusters or --no-subclusters (in Python, subclusters=)",
    "compression-type": "--compress (in Python, compress=)",
}
"""QEMU's options for qcow2 that cowkit has options of its own for."""


class ImageChoice(TypedDict, total=False):
    """The members of :class:`ImageOptions`, which says what they are, as the keyword arguments of a function."""

    cluster_size: int | str | None
    subclusters: bool | None
    compress: Compression | None
    bitmap: str | None
    standalone: bool
    raw: bool
    hash: Hash | None
    engine: EngineName | None
    format: str | None
    image_options: Mapping[str, str | int | bool] | None
    secret_file: str | os.PathLike[str] | None


class ImageOptions(NamedTuple):
    """The image to write, as Python's, the command line's and the control socket's users say it."""

    cluster_size: int | str | None = None
    """A power of two from 4096 bytes to 2 MiB; 64 KiB unless given. For rbd: what is compared at once, 4 KiB unless given."""
    subclusters: bool | None = None
    """Divide clusters by 32 (extended L2 entries), so that a small change costs little; QEMU before 5.2 cannot read it. Unless
    given, cowkit chooses by :mod:`cowkit.diff.scattered`, where neither a cluster size nor another engine is given."""
    compress: Compression | None = None
    """Compress each cluster, by ``"zlib"`` or by ``"zstd"``, which QEMU before 5.1 cannot read."""
    bitmap: str | None = None
    """Put in what is dirty as a persistent bitmap of that name."""
    standalone: bool = False
    """Have all of the disk in the image, and no backing file."""
    raw: bool = False
    """Write a sparse raw file with all of the disk instead of qcow2."""
    hash: Hash | None = None
    """What of the base the image records, so that another one is not taken for it: its size and a digest of some blocks
    (``"sampled"``, unless given), or of all its bytes as well (``"full"``), which reads the whole base."""
    engine: EngineName | None = None
    """Who writes the image: cowkit itself (``"native"``), qemu-img by create and rebase (``"qemu-img"``), or a QEMU storage daemon
    (``"qmp"``); cowkit, unless given or only QEMU can."""
    format: str | None = None
    """The image's format as QEMU names it, such as ``"vmdk"``; ``"qcow2"`` unless given. ``"rbd"`` is what Ceph's
    ``rbd import-diff`` reads, with the checkpoints as its snapshots. Formats without backing files have all of the disk."""
    image_options: Mapping[str, str | int | bool] | None = None
    """QEMU's own options for making an image of that format, such as ``{"encrypt.format": "luks"}``."""
    secret_file: str | os.PathLike[str] | None = None
    """The file whose content, to its last byte, is the passphrase of an image that is encrypted."""

    @classmethod
    def chosen(cls, choice: ImageChoice) -> Self:
        """Those that a caller has given by name.

        :raises TypeError: there is none of that name.
        """
        unknown = sorted(choice.keys() - {*cls._fields})
        if unknown:
            raise TypeError(f"there is no image option {unknown[0]!r}: there are {', '.join(cls._fields)}")
        made = cls(**choice)
        if made.secret_file is None:
            return made
        return made._replace(secret_file=path_text(made.secret_file, "secret_file"))

    @property
    def has_all(self) -> bool:
        """Whether the image needs no base."""
        return self.standalone or not (self.kind in STACKABLE or self.is_rbd)

    @property
    def kind(self) -> str:
        """The image's format as QEMU names it."""
        if self.format is not None:
            return self.format
        return "raw" if self.raw else "qcow2"

    @property
    def is_raw(self) -> bool:
        """Whether it is a raw file."""
        return self.kind == "raw"

    @property
    def is_rbd(self) -> bool:
        """Whether it is a stream for Ceph's `rbd import-diff`; ``cluster_size`` is then what is compared at once, 4 KiB unless given."""
        return self.kind == "rbd"

    @property
    def needs_qemu(self) -> str | None:
        """What of the image only the engine qmp can write, in words; None where each engine can."""
        if self.kind not in _OUR_KINDS:
            return f"the format {self.kind!r}"
        if self.image_options:
            return f"the image option {next(iter(self.image_options))!r}"
        return "an encrypted image (secret file)" if self.secret_file is not None else None

    @property
    def chosen_engine(self) -> EngineName:
        """Who is to write the image."""
        if self.engine is not None:
            return self.engine
        return "native" if self.needs_qemu is None else "qmp"

    @property
    def names_base(self) -> bool:
        """Whether the image records the name of its base, if there is one."""
        return not (self.has_all or self.is_rbd)

    @property
    def cluster(self) -> int:
        """The cluster size in bytes."""
        if self.cluster_size is None:
            return SMALLEST_CLUSTER if self.is_rbd else DEFAULT_CLUSTER
        return check_cluster_size(parse_size(self.cluster_size, what="cluster size"))

    def check(self) -> None:
        """See that they go together.

        :raises UsageError: they do not, or one of them makes no sense.
        """
        self._check_types()
        if self.is_raw:
            wrong = [name for name in (*_OF_QCOW2, "image_options", "secret_file") if getattr(self, name)]
            if wrong:
                words = " and ".join(_WORDS.get(name, name.replace("_", " ")) for name in wrong)
                raise UsageError(f"a raw file has no {words}: leave that out, or raw")
        if self.hash is not None and self.hash not in get_args(Hash):
            raise UsageError(f"hash is 'sampled' or 'full', not {self.hash!r}")
        if self.hash is not None and self.kind == "qed":
            raise UsageError("the format 'qed' has no place for who the base is: leave out hash")
        if self.hash is not None and self.has_all:
            raise UsageError(
                "an image with all of the disk needs no base: leave out hash, which tells its base from others"
            )
        self._check_engine()
        if self.is_rbd:
            wrong = [
                name
                for name in (*_OF_QCOW2[1:], "standalone", "hash", "image_options", "secret_file")
                if getattr(self, name)
            ]
            if wrong:
                words = " and ".join(_WORDS.get(name, name.replace("_", " ")) for name in wrong)
                raise UsageError(f"a difference for rbd has no {words}: leave that out, or choose another format")
            if self.engine not in (None, "native"):
                raise UsageError(f"the engine {self.engine} cannot write what is for rbd: the engine native can")
        if self.compress is not None and self.compress not in get_args(Compression):
            raise UsageError(f"compress is 'zlib' or 'zstd', not {self.compress!r}")
        if self.compress is not None and self.subclusters:
            raise UsageError("a compressed cluster has no subclusters: choose one of the two")
        if self.bitmap is not None:
            check_bitmap_name(self.bitmap)
        self.cluster  # noqa: B018 - it refuses what is none

    def _check_types(self) -> None:
        for name in ("standalone", "raw"):
            check_flag(getattr(self, name), name)
        if self.subclusters is not None:
            check_flag(self.subclusters, "subclusters")
        for name in ("bitmap", "format"):
            if (text := getattr(self, name)) is not None:
                check_text(text, name)
        if self.secret_file is not None:
            path_text(self.secret_file, "secret_file")
        if self.image_options is not None and not (
            isinstance(self.image_options, Mapping) and all(isinstance(key, str) for key in self.image_options)
        ):
            raise UsageError(
                f"image_options are a mapping such as {{'encrypt.format': 'luks'}}, not {self.image_options!r}"
            )

    def _check_engine(self) -> None:
        if self.engine is not None and self.engine not in get_args(EngineName):
            raise UsageError(f"engine is 'native', 'qemu-img' or 'qmp', not {self.engine!r}")
        if self.format is not None and self.raw and not self.is_raw:
            raise UsageError(f"a raw file is not of the format {self.format!r}: leave out one of the two")
        if self.needs_qemu is not None and self.engine in ("native", "qemu-img"):
            raise UsageError(f"the engine {self.engine} cannot write {self.needs_qemu}: the engine qmp can")
        if self.engine == "qemu-img" and self.bitmap is not None:
            raise UsageError("the engine qemu-img cannot put in a bitmap: the engines native and qmp can")
        if self.kind not in _OUR_KINDS:
            wrong = [name for name in _OF_QCOW2 if getattr(self, name)]
            if wrong:
                words = " and ".join(_WORDS.get(name, name.replace("_", " ")) for name in wrong)
                raise UsageError(f"{words}: for the format qcow2, not for {self.kind!r}, which may have image options")
        for key, value in (self.image_options or {}).items():
            if not isinstance(value, str | int):  # a bool is an int
                raise UsageError(f"the image option {key!r} is a string, a number, true or false, not {value!r}")
            plain = key.replace("_", "-")
            if plain in _OURS:
                raise UsageError(f"the image option {key!r} is cowkit's own to choose: leave it out")
            if self.kind == "qcow2" and plain in _SAID_OTHERWISE:
                raise UsageError(f"the image option {key!r} is cowkit's own: give {_SAID_OTHERWISE[plain]} instead")
