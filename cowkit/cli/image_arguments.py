"""What kind of image a difference is to be: the arguments, and what becomes of them."""

from __future__ import annotations

import os

from cowkit.cli.file_argument import file_argument
from cowkit.cli.standard_error import note
from cowkit.errors import UsageError

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from cowkit.diff import ImageOptions


_RAW_NAMES = {".raw": "raw", ".img": "raw", ".luks": "luks"}


def add_image_arguments(parser: argparse.ArgumentParser, *, format_option: str, what: str = "") -> None:
    """What says what to write, and who writes it.

    :param format_option: the long spelling of ``-O``.
    :param what: whose image it is, for the help page.
    """
    from argparse import BooleanOptionalAction  # who reads the commonest command lines does without

    image = parser.add_argument_group(f"what kind of image{what} (default: qcow2 on top of the base)")
    image.add_argument(
        "--cluster-size",
        metavar="SIZE",
        help="of qcow2: a power of two from 4K to 2M (default: 64K)",
    )
    image.add_argument(
        "--subclusters",
        action=BooleanOptionalAction,
        default=None,
        help="divide clusters by 32, so that a small change costs little (needs QEMU 5.2 to read it); "
        "default: where that saves 16M or more",
    )
    image.add_argument(
        "--compress", choices=("zlib", "zstd"), help="compress each cluster (zstd: needs QEMU 5.1 to read it)"
    )
    image.add_argument("--bitmap", metavar="NAME", help="put in what is dirty as a persistent bitmap of that name")
    image.add_argument(
        "--no-backing", dest="standalone", action="store_true", help="have all of the disk in OUT, and no backing file"
    )
    image.add_argument(
        "--hash",
        choices=("sampled", "full"),
        help="record a digest of some blocks of the base, or of all of it, which is then read (default: sampled)",
    )
    image.add_argument(
        "--raw", action="store_true", help="write a sparse raw file with all of the disk instead of qcow2"
    )
    image.add_argument(
        "-O",
        format_option,
        dest="image_format",
        metavar="FORMAT",
        help="qcow2 (default), raw, rbd (what Ceph's `rbd import-diff` reads), or what QEMU can write, such as vmdk or qed",
    )
    engine = parser.add_argument_group("who writes it (default: cowkit; whatever only QEMU can write: qmp)")
    engine.add_argument(
        "--engine",
        choices=("native", "qemu-img", "qmp"),
        help="cowkit itself, qemu-img (create and rebase), or a qemu-storage-daemon that is driven over QMP",
    )
    engine.add_argument(
        "--image-option",
        dest="image_options",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="QEMU's own option for making an image of that format, such as encrypt.format=luks; may be given again",
    )
    file_argument(
        engine.add_argument(
            "--secret-file",
            metavar="FILE",
            help="encrypt the image: the content of FILE, to its last byte, is the passphrase",
        )
    )


def asked_kind(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, by the names of :class:`cowkit.diff.ImageOptions`; nothing of what was not."""
    names = ("compress", "bitmap", "standalone", "raw", "hash", "engine")
    kind = {name: value for name in names if (value := getattr(arguments, name)) is not None and value is not False}
    if arguments.subclusters is not None:
        kind["subclusters"] = arguments.subclusters
    if arguments.image_format is not None:
        kind["format"] = arguments.image_format
    if arguments.cluster_size is not None:
        from cowkit.disk.sizes import parse_size  # the engine, for those who need it

        kind["cluster_size"] = parse_size(arguments.cluster_size, what="cluster size")
    if arguments.image_options:
        kind["image_options"] = _by_key(arguments.image_options)
    if arguments.secret_file is not None:
        kind["secret_file"] = os.path.abspath(arguments.secret_file)
    return kind


def image_options(arguments: argparse.Namespace) -> ImageOptions:
    """The same as an object."""
    from cowkit.diff import ImageOptions

    return ImageOptions(**asked_kind(arguments))


def note_names(output: str, backing: str | None, arguments: argparse.Namespace) -> None:
    """Say on standard error what of an image that was written may not be what its names say."""
    extension = os.path.splitext(output)[1].lower()
    if extension not in ("", ".qcow2") and arguments.image_format is None and not arguments.raw:
        from cowkit.bases.formats import format_of_name  # 16 ms, which the usual names do without

        claimed = _RAW_NAMES.get(extension) or format_of_name(output)
        if claimed not in (None, "qcow2"):
            note(f"{output} is a qcow2 image, whatever its name says (-O {claimed} writes another)")
    written = "raw" if arguments.raw else arguments.image_format
    if extension == ".qcow2" and written not in (None, "qcow2"):
        note(f"{output} is a {written} image, whatever its name says")
    if backing is None or "://" in backing:
        return
    folder = os.path.dirname(os.path.realpath(output))
    if not os.path.exists(os.path.join(folder, backing)):
        where = f", from OUT's directory: {os.path.join(folder, backing)}" if os.path.exists(backing) else ""
        note(f"{output} cannot be read as long as its backing file {backing} is not there{where}")


def as_members(kind: dict[str, Any]) -> dict[str, Any]:
    """The same as members of a QMP command."""
    return {name.replace("_", "-"): value for name, value in kind.items()}


def option_of(name: str) -> str:
    """The option that is asked with for the kind of that name."""
    spelt = {"standalone": "no-backing", "image_options": "image-option"}.get(name, name)
    return f"--{spelt.replace('_', '-')}"


def _by_key(options: list[str]) -> dict[str, str]:
    """KEY=VALUE, each of them once."""
    found: dict[str, str] = {}
    for each in options:
        key, equals, value = each.partition("=")
        if not key or not equals:
            raise UsageError(f"--image-option takes KEY=VALUE, not {each!r}")
        if key in found:
            raise UsageError(f"--image-option {key} is given twice")
        found[key] = value
    return found
