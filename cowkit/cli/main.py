"""The entry of the `cowkit` command: from arguments to an exit status, and from errors to one line each.

Exit status: 0 done; 1 the answer is no; 2 could not do it; 130 interrupted; 141 the reader of the output has gone.
`cowkit run` ends with its command's.
"""

from __future__ import annotations

import atexit
import os
import sys

from cowkit.cli.encodable import ENCODABLE
from cowkit.cli.standard_error import complain

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

FAILED = 2
INTERRUPTED = 128 + 2  # as a shell counts a command that SIGINT ended
READER_GONE = 128 + 13  # and SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (without the program's name) spells, and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ENCODABLE)
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:
            _flush_output()
    except BrokenPipeError:
        _drop_output()
        return READER_GONE
    except KeyboardInterrupt:
        _drop_output()
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("COWKIT_DEBUG"):
            raise
        _flush_what_there_is()
        complain(error)
        return FAILED
    return status


def command() -> NoReturn:
    """The `cowkit` command: :func:`main`, and the end of the process with its status."""
    try:
        from cowkit.cli.standard_output import name_standard_output

        name_standard_output()
        status = main()
        threading = sys.modules.get("threading")
        if threading is None or threading.active_count() == 1:
            # With all said and written, and nobody left to wait for, taking the interpreter apart is 3 to 6 ms for nothing.
            atexit._run_exitfuncs()
            os._exit(status)
    except KeyboardInterrupt:  # within the end itself
        os._exit(INTERRUPTED)
    sys.exit(status)


def _run(argv: Sequence[str]) -> int:
    from cowkit.cli.plain import plain_diff

    plain = plain_diff(argv)
    if plain is not None:
        from cowkit.cli import diff

        return diff.run(plain)
    from cowkit.cli.arguments import parse

    try:
        chosen, arguments = parse(argv)
    except SystemExit as ended:  # argparse, when help or the version was asked for
        return ended.code if isinstance(ended.code, int) else 0
    return chosen.run(arguments)


def _flush_output() -> None:
    """Write what is still buffered, while it can still be said that it failed."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise OSError(error.errno, f"{error.strerror}; all else is done", "standard output") from error


def _flush_what_there_is() -> None:
    """Write what was printed before something else went wrong, if that can be."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        _drop_output()


def _drop_output() -> None:
    """Have what is still buffered go nowhere: the interpreter would complain about it when it ends."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        pass


if __name__ == "__main__":
    command()
