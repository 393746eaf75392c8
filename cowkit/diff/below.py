"""What an image names as its backing file."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from cowkit.diff.qcow2.layout import MAGIC
from cowkit.diff.qcow2.reader import Qcow2Image

_PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


class Below(NamedTuple):
    """What an image of a chain names as its backing file."""

    image: str
    """Who names it."""
    name: str
    """As it is recorded."""
    path: str | None
    """Where that is; None where it is no path."""
    format: str | None
    """The format that is recorded."""

    @property
    def is_image(self) -> bool:
        """Whether a qcow2 image is there, and no other format is recorded."""
        return self.path is not None and self.format in (None, "qcow2") and _is_qcow2(self.path)


def below_of(image: Qcow2Image) -> Below | None:
    """What ``image`` names; None where it stands alone."""
    name = image.backing_file
    if name is None:
        return None
    path = None
    if not _PROTOCOL.match(name):
        path = os.path.join(os.path.dirname(os.path.abspath(image.path)), name)
    elif name.startswith("file:"):
        path = os.path.join(os.path.dirname(os.path.abspath(image.path)), name.removeprefix("file:"))
    return Below(image.path, name, path, image.backing_format)


def _is_qcow2(path: str) -> bool:
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False
