"""The files that an image consists of: itself, its backing files, and the files of data that it names.

QEMU would guess the format of a backing file that its image does not tell, and a guest that can write to a raw one could
make it guess wrong (see formats.py). So the chain is gone through here first, one image after the other, each opened without its
backing file, and what is not told is decided by name and content together, or refused.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import Any

from cowkit.bases.formats import COMPRESSED, HEAD, detect, format_of_name
from cowkit.bases.qemu_nbd import QEMU_UTILS, find_program
from cowkit.bases.unfinished import refuse_unfinished
from cowkit.disk.base import FileBase
from cowkit.errors import BaseOpenError

_LONGEST = 200
"""Images in a chain: QEMU itself gives up at some length, by then slowly."""

_PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


class Chain:
    """The chain of the image ``file`` of ``format``.

    :raises BaseOpenError: an image of it cannot be opened, or the format of a backing file is in doubt.
    """

    def __init__(self, file: FileBase, format: str) -> None:
        self.files: list[FileBase] = []
        """The further files, open, for their identity; each to be released."""
        self.options = [f"driver={format}", f"file.filename={_escaped(file.path)}"]
        """QEMU's options for the whole chain: the formats that it would have to guess are in them."""
        try:
            self._follow(file, format)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go of the files."""
        for file in self.files:
            file.release()

    def _follow(self, file: FileBase, format: str) -> None:
        seen = {file.path}
        prefix = ""
        path = file.path
        while True:
            info = _info(file.given, path, format)
            for name in _data_files(info):
                if os.path.join(os.path.dirname(path), name) != path:
                    self._add(file, path, name)
            named = info.get("full-backing-filename") or info.get("backing-filename")
            if not named:
                return
            prefix += "backing."
            told = info.get("backing-filename-format")
            if _PROTOCOL.match(named):  # json:{...}, nbd://...: QEMU opens it, and cowkit cannot look into it
                if told is None:
                    raise _untold(file.given, path, named)
                return
            if named in seen or len(seen) >= _LONGEST:
                raise BaseOpenError(
                    f"base {file.given} has a chain of backing files that is endless or over {_LONGEST} long"
                )
            seen.add(named)
            backing = self._add(file, path, named)
            if told is None:
                told = self._decide(file.given, path, backing)
                self.options.append(f"{prefix}driver={told}")
            if told == "raw":
                return
            path, format = named, told

    def _add(self, file: FileBase, image: str, name: str) -> FileBase:
        try:
            found = FileBase(os.path.join(os.path.dirname(image), name))
            refuse_unfinished(found.given, found.path)
        except BaseOpenError as error:
            raise BaseOpenError(f"base {file.given}: {image} needs {name}: {error}") from error
        self.files.append(found)
        return found

    def _decide(self, given: str, image: str, backing: FileBase) -> str:
        length = min(HEAD, backing.size)
        ends = backing.pread(length, 0), backing.pread(length, backing.size - length)
        try:
            found = detect(backing.given, *ends)
        except BaseOpenError as error:
            raise _untold(given, image, backing.given) from error
        if found in COMPRESSED:
            raise _untold(given, image, backing.given)
        return found


def _untold(given: str, image: str, backing: str) -> BaseOpenError:
    guess = format_of_name(backing) or "raw"
    return BaseOpenError(
        f"base {given}: {image} does not say which format its backing file {backing} has, and guessing is not safe: "
        f"record it (qemu-img rebase -u -F {guess} -b {backing} {image})"
    )


def _info(given: str, path: str, format: str) -> dict[str, Any]:
    program = find_program("qemu-img", f"opening the image {given}", QEMU_UTILS)
    command = [program, "info", "--output=json", "--image-opts", f"driver={format},file.filename={_escaped(path)}"]
    ran = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    if ran.returncode:
        lines = ran.stderr.decode(errors="replace").strip().splitlines() or [
            f"qemu-img ended with status {ran.returncode}"
        ]
        reason = lines[-1].removeprefix("qemu-img:").strip()
        raise BaseOpenError(f"cannot open base {given} as {format}: {reason}")
    info: dict[str, Any] = json.loads(ran.stdout)
    return info


def _data_files(info: dict[str, Any]) -> list[str]:
    """The local files that hold data of this very image: qcow2's external data file, vmdk's extents."""
    data = info.get("format-specific", {}).get("data", {})
    names = [data.get("data-file"), *(extent.get("filename") for extent in data.get("extents", []))]
    return [name for name in names if name and not _PROTOCOL.match(name)]


def _escaped(path: str) -> str:
    """A value in QEMU's ``key=value,...``: a comma is written twice."""
    return path.replace(",", ",,")
