"""`cowkit doctor`: which outside tools are here, what each is for, and how to install the missing ones."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import cowkit
from cowkit.cli.tools import TOOLS, Tool
from cowkit.errors import with_pip
from cowkit.programs import find_program, folder_off_path

DESCRIPTION = (
    "Look which outside tools are here, what each is for and how to install the missing ones, and whether this machine has "
    "what cowkit itself needs. A missing tool is no failure: cowkit does without any of them."
)
EXAMPLES = """
cowkit doctor
cowkit doctor --json | jq '.tools[] | select(.version == null).name'
"""

_TIMEOUT_SECONDS = 10
_BINDING_PLACES = (
    "/usr/lib/python3/dist-packages/nbd.py",
    f"/usr/lib64/python3.{sys.version_info.minor}/site-packages/nbd.py",
)


class Check(NamedTuple):
    """What was looked at, whether it is as it should be, and how it is."""

    name: str
    fine: bool
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit doctor` takes."""
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Look at everything and tell; 1 if cowkit itself lacks something."""
    checks = [check() for check in _CHECKS]
    versions = {tool: version_of(tool) for tool in TOOLS}
    missing = [tool for tool, version in versions.items() if version is None]
    install = {
        "apt": _install("apt-get install", {tool.apt for tool in missing if tool.apt}),
        "dnf": _install("dnf install", {tool.dnf for tool in missing if tool.dnf}),
        "pip": _with_pip({tool.pip for tool in missing if tool.pip}),
    }
    if arguments.json:
        print(
            json.dumps(
                {
                    "cowkit": cowkit.__version__,
                    "checks": [check._asdict() for check in checks],
                    "tools": [
                        {"name": tool.name, "purpose": tool.purpose, "version": versions[tool]} for tool in TOOLS
                    ],
                    "install": install,
                },
                indent=2,
            )
        )
    else:
        print(f"cowkit {cowkit.__version__}")
        _print((check.name, "ok" if check.fine else "NOT OK", check.detail) for check in checks)
        print()
        _print(
            ((f"import {tool.name}" if tool.is_module else tool.name), versions[tool] or "missing", tool.purpose)
            for tool in TOOLS
        )
        if hidden := _hidden_binding():
            print(f"\n{hidden}")
        for folder, names in _off_path().items():
            print(
                f"\n{', '.join(names)}: in {folder}, which is not on PATH; cowkit finds programs there, a shell and your tests do not:\n"
                f"  export PATH=$PATH:{folder}"
            )
        for what, line in install.items():
            if line:
                print(
                    f"or ({what}):\n  {line}" if what == "dnf" else f"\nto install what is missing ({what}):\n  {line}"
                )
    return 0 if all(check.fine for check in checks) else 1


def _install(command: str, packages: set[str]) -> str | None:
    return f"sudo {command} {' '.join(sorted(packages))}" if packages else None


def _with_pip(packages: set[str]) -> str | None:
    return with_pip(" ".join(sorted(packages))).replace("`, then `", " && ").strip("`") if packages else None


def _print(rows: Iterable[tuple[str, str, str]]) -> None:
    table = list(rows)
    first, second = (max(len(row[column]) for row in table) for column in (0, 1))
    for name, state, detail in table:
        print(f"  {name:{first}}  {state:{second}}  {detail}")


def version_of(tool: Tool) -> str | None:
    """The version of ``tool``, ``"?"`` if it does not tell one, or None if it is not here."""
    if tool.pip:
        return _version_by_pip(tool)
    if tool.is_module:
        return _binding_version()
    path = find_program(tool.name)
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, *tool.version],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # e2fsprogs tell it there
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "?"
    # One that fails may print any numbers: nbdsh, where the first python3 has no binding, prints the path of that one.
    match = re.search(r"\d+(?:\.\d+)+", done.stdout) if not done.returncode else None
    return match[0] if match else "?"


def _off_path() -> dict[str, list[str]]:
    """The programs that are here and that no shell finds, by folder."""
    found: dict[str, list[str]] = {}
    for tool in TOOLS:
        folder = None if tool.is_module else folder_off_path(tool.name)
        if folder is not None:
            found.setdefault(folder, []).append(tool.name)
    return found


def _version_by_pip(tool: Tool) -> str | None:
    """The version of a module that pip installs; what Python itself has instead has Python's."""
    if tool.name == "backports.zstd" and sys.version_info >= (3, 14):
        return platform.python_version()
    try:
        return version(tool.pip)
    except PackageNotFoundError:
        return None


def _hidden_binding() -> str | None:
    """A word on a binding that is installed, where this Python does not see it."""
    if _binding_version() is not None or not any(os.path.exists(place) for place in _BINDING_PLACES):
        return None
    return (
        "the binding `import nbd` is installed, for the distribution's Python; this environment does not see it: make it with\n"
        "  /usr/bin/python3 -m venv --system-site-packages DIR"
    )


def _binding_version() -> str | None:
    try:
        import nbd

        return str(nbd.NBD().get_version())
    except Exception:
        return None


def _python() -> Check:
    return Check("Python", sys.version_info >= (3, 11), f"{platform.python_version()} ({sys.executable})")


def _runtime_directory() -> Check:
    from cowkit.errors import ListenError
    from cowkit.server.runtime import runtime_dir

    try:
        return Check("runtime directory", True, str(runtime_dir()))
    except ListenError as error:
        return Check("runtime directory", False, str(error))


def _overlays() -> Check:
    """Whether overlays can live where they live by default: sparse and unlinked files, with holes punched."""
    from cowkit.cow_disk import CowDisk
    from cowkit.errors import CowkitError

    try:
        with CowDisk(size="64M") as disk:
            disk.pwrite(b"x" * (1 << 20), 32 << 20)
            disk.trim(1 << 20, 32 << 20)
            fine = disk.pread(4096, 32 << 20) == bytes(4096)
    except CowkitError as error:
        return Check("overlays", False, str(error))
    return Check("overlays", fine, f"files in {os.environ.get('TMPDIR') or '/var/tmp'} can be written and trimmed")


_CHECKS: tuple[Callable[[], Check], ...] = (_python, _runtime_directory, _overlays)
