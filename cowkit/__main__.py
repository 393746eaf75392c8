"""The `cowkit` command, also as `python -m cowkit`: nothing but what an interruption may come between."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from typing import NoReturn


def command() -> NoReturn:
    """Run the command: see :func:`cowkit.cli.main.command`. Ctrl-C ends it without a word while it is still being imported, too."""
    try:
        from cowkit.cli.main import command as run
    except KeyboardInterrupt:
        from os import _exit  # which Python has imported itself

        _exit(128 + 2)  # as cowkit.cli.main has it
    run()


if __name__ == "__main__":
    command()
