"""`cowkit run`: serve a disk for as long as a command runs."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
from types import FrameType

from cowkit.cli.file_argument import file_argument
from cowkit.cli.image_arguments import add_image_arguments, asked_kind, image_options, note_names, option_of
from cowkit.cli.serving import Serving, add_disk_arguments
from cowkit.cli.standard_error import complain, note
from cowkit.errors import UsageError

DESCRIPTION = (
    "Serve BASE as a disk that may be wrecked, run CMD, and end with CMD's exit status (128 and the number of the signal, if "
    "one ended it). In CMD, {uri} becomes the disk's NBD URI and {socket} the path of its Unix socket; CMD's environment has "
    "them as $uri and $NBD_URI, and as $unixsocket. CMD always stands behind `--`."
)
EXAMPLES = """
cowkit run disk.img -- nbdinfo {uri}
cowkit run disk.img --diff diff.qcow2 -- qemu-io -f raw -c 'write 0 1M' {uri}
cowkit run disk.img --diff small.qcow2 --subclusters -- my-test {uri}
cowkit run --size 1G -- sh -c 'nbdcopy disk.img "$uri" && my-test "$uri"'
"""

_FORWARDED = (signal.SIGTERM, signal.SIGHUP)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit run` takes."""
    parser.usage = "cowkit run [OPTIONS] [BASE] [--diff OUT] -- CMD ..."
    add_disk_arguments(parser)
    keep = parser.add_argument_group("what becomes of the changes")
    file_argument(
        keep.add_argument(
            "--diff",
            metavar="OUT",
            help="keep what changed in OUT, a qcow2 image on top of BASE, whatever CMD's exit status (default: thrown away)",
        )
    )
    keep.add_argument(
        "--backing",
        metavar="NAME",
        help="with --diff: the name of the base to record in OUT, as seen from OUT's directory if it is relative (default: BASE's path)",
    )
    keep.add_argument(
        "--backing-format", metavar="FORMAT", help="with --diff: the format of the base to record (default: what it is)"
    )
    add_image_arguments(parser, format_option="--output-format", what=" --diff writes")


def run(arguments: argparse.Namespace) -> int:
    """Serve, run, keep, and tell."""
    command = arguments.behind
    if not command:
        raise UsageError("give a command to run, behind `--`: cowkit run ... -- CMD ... (see `cowkit run --help`)")
    if any("{file}" in word for word in command):
        raise UsageError("there is no {file}: give CMD {uri} or {socket}, which NBD clients take")
    if arguments.diff is None:
        if arguments.backing is not None or arguments.backing_format is not None:
            raise UsageError("--backing names the base in what --diff writes: give --diff OUT, too")
        for name in asked_kind(arguments):
            raise UsageError(f"{option_of(name)} says what kind of image --diff writes: give --diff OUT, too")
    if arguments.diff == "-":
        raise UsageError("a difference cannot be written to standard output: name a file (./- if it is to be called -)")
    if arguments.diff is not None and arguments.share != "all":
        raise UsageError(f"--diff keeps what changed on one disk, and with --share {arguments.share} there are several")
    # Until all is cleaned up; _Child passes them on while the command runs.
    before = {number: signal.signal(number, _end) for number in _FORWARDED}
    try:
        return _run(arguments, command)
    except _Ended as ended:
        return 128 + ended.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Ended(BaseException):
    """Somebody wants cowkit to end while no command runs that could be told."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended(number)


def _run(arguments: argparse.Namespace, command: list[str]) -> int:
    status = 0
    try:
        with Serving(arguments, local=True) as serving:
            if arguments.diff is not None:
                # Not when all the work is done
                serving.disk.check_diff(
                    arguments.diff,
                    backing_file=arguments.backing,
                    backing_format=arguments.backing_format,
                    image=image_options(arguments),
                )
            child = _Child(_filled_in(command, serving), _environment(serving))
            status = child.wait()
            _tell(serving, arguments)
    except Exception as error:
        if not status or os.environ.get("COWKIT_DEBUG"):
            raise
        complain(error)  # and CMD's own failure is the one that counts
    return status


def _tell(serving: Serving, arguments: argparse.Namespace) -> None:
    if arguments.diff is not None:
        report = serving.disk.diff(
            arguments.diff,
            backing_file=arguments.backing,
            backing_format=arguments.backing_format,
            **asked_kind(arguments),
        )
        for line in report.summary().splitlines():
            note(line)
        note_names(arguments.diff, arguments.backing, arguments)
        if (failure := serving.disk.overlay_failure) is not None:
            note(f"requests were refused: {failure}")
    else:
        note(serving.written())


def _filled_in(command: list[str], serving: Serving) -> list[str]:
    assert serving.socket is not None
    known = {"uri": serving.uris[0], "socket": serving.socket}
    # A shell's ${uri} is a variable of the environment, which has the same.
    return [re.sub(r"(?<!\$)\{(uri|socket)\}", lambda found: known[found[1]], word) for word in command]


def _environment(serving: Serving) -> dict[str, str]:
    assert serving.socket is not None
    uri = serving.uris[0]
    return {**os.environ, "uri": uri, "NBD_URI": uri, "unixsocket": serving.socket}


def _leave_it_to_the_command(number: int, frame: FrameType | None) -> None:
    """Go on waiting."""


class _Child:
    """The running command.

    ctrl-C reaches it from the terminal, as all of the foreground, and what it makes of that is its own affair: cowkit waits
    for it. What is sent to cowkit alone to end it (SIGTERM, SIGHUP) is passed on.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        # Functions, not SIG_IGN: the command would inherit that.
        self._before = {
            signal.SIGINT: signal.signal(signal.SIGINT, _leave_it_to_the_command),
            **{number: signal.signal(number, self._forward) for number in _FORWARDED},
        }
        try:
            self._process = subprocess.Popen(command, env=environment)
        except OSError as error:
            self._restore()
            raise UsageError(f"cannot run {command[0]}: {error.strerror}") from error
        except ValueError as error:
            self._restore()
            raise UsageError(f"cannot run {command[0]!r}: {error}") from error
        for number in self._early:
            self._process.send_signal(number)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> int:
        """The command's exit status as a shell counts it."""
        assert self._process is not None
        try:
            status = self._process.wait()
        finally:
            self._restore()
        return 128 - status if status < 0 else status
