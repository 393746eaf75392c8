"""The command line: which commands there are, and how their arguments are read.

Each command is a module of this package with the names of :class:`CommandModule`; only the one that is asked for is
imported, for `cowkit serve` is to be ready in a tenth of a second.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

import cowkit
from cowkit.errors import UsageError

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn, Protocol

    class CommandModule(Protocol):
        """What the module of a command has."""

        DESCRIPTION: str
        """What the command does, in one or two sentences."""
        EXAMPLES: str
        """How it is used: lines of a shell."""

        def add_arguments(self, parser: argparse.ArgumentParser) -> None:
            """Tell ``parser`` what the command takes."""

        def run(self, arguments: argparse.Namespace) -> int:
            """Do it, and return the exit status."""


COMMANDS = {
    "demo": "see the main job done on a real file system",
    "serve": "serve a disk until it is told to stop",
    "run": "serve a disk for as long as a command runs",
    "diff": "keep what changed on a disk that is being served",
    "verify": "check a difference by two independent readers",
    "apply": "merge a difference into a copy of its base, or the base",
    "map": "draw where a disk or a difference changed",
    "ls": "list what is being served",
    "checkpoint": "freeze this moment of a disk",
    "rollback": "put a disk back to a checkpoint",
    "reset": "put a disk back to its base",
    "doctor": "look which outside tools are here",
    "completion": "print shell completion",
}
"""Each command with what it does; the module of this package that does it has the same name."""

WRAPPERS = frozenset({"run"})
"""Those that run another command, which stands behind ``--``."""

_DESCRIPTION = (
    "Gives tests a writable disk that they may wreck: a copy-on-write view of a read-only base, served over NBD. What is "
    "written is thrown away at the end, unless it is kept as a qcow2 difference."
)
_EXAMPLES = """\
examples:
  cowkit serve disk.img
  cowkit diff --base disk.img -o diff.qcow2
  cowkit run disk.img --diff diff.qcow2 -- qemu-io -f raw -c 'write 0 1M' {uri}

`cowkit COMMAND --help` tells more of each."""


class Parser(argparse.ArgumentParser):
    """A parser that has no say in how the program ends: what is wrong is an error like any other."""

    _showing_help = False

    def error(self, message: str) -> NoReturn:
        """Refuse what was typed."""
        if (
            message.startswith("unrecognized arguments: ")
            and message[24] != "-"
            and "--base" in self._option_string_actions
        ):
            message += ": a base is given by --base"
        raise UsageError(f"{message} (see `{self.prog} --help`)")

    def format_help(self) -> str:
        """The help page: the description filled, the examples as they are."""
        import textwrap

        if self.description:
            self.description = textwrap.fill(self.description, 78)
        self._showing_help = True
        return super().format_help()

    def _get_formatter(self) -> argparse.HelpFormatter:
        # argparse asks for one at each add_argument(), too: that one costs nothing, not even asking how wide the terminal is.
        return _help_formatter(self.prog) if self._showing_help else argparse.HelpFormatter(self.prog, width=80)


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    """What lays out a help page, with colours where they can be seen."""
    kind: type[argparse.HelpFormatter] = argparse.RawDescriptionHelpFormatter
    if sys.stdout is not None and sys.stdout.isatty():
        try:
            from rich_argparse import RawDescriptionRichHelpFormatter
        except ImportError:
            pass
        else:
            plain = {"text_markup": False, "help_markup": False, "group_name_formatter": str}  # brackets are brackets
            kind = type("Formatter", (RawDescriptionRichHelpFormatter,), plain)
    return kind(prog, max_help_position=26)


def _parser(prog: str, description: str, epilog: str) -> Parser:
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,  # an abbreviation means something else once there are more options
    )


def module_of(name: str) -> CommandModule:
    """The module of the command ``name``."""
    module: CommandModule = import_module(f"cowkit.cli.{name}")
    return module


def _describe(parser: argparse.ArgumentParser, module: CommandModule) -> None:
    parser.description = module.DESCRIPTION
    parser.epilog = "examples:\n" + "".join(f"  {line}\n" for line in module.EXAMPLES.strip().splitlines())
    module.add_arguments(parser)


def whole_parser(*, complete: bool) -> Parser:
    """The parser of the whole command line, for help and completion.

    :param complete: whether to have each command's arguments, too.
    """
    parser = _parser("cowkit", _DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "--version", action="version", version=f"cowkit {cowkit.__version__}", help="print the version and stop"
    )
    parser.usage = "cowkit [--help] [--version] COMMAND ..."
    # The metavar is long enough for argparse to leave room beside it for the longest command.
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND ARGUMENTS", dest="command", prog="cowkit", parser_class=Parser
    )
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, prog=f"cowkit {name}", allow_abbrev=False)
        if complete:
            _describe(command, module_of(name))
    return parser


def parse(argv: Sequence[str]) -> tuple[CommandModule, argparse.Namespace]:
    """What is to be done: the command's module and its arguments.

    For a command that runs another, all that is behind the first ``--`` is in ``arguments.behind``, whatever it looks like.

    :raises UsageError: what was typed makes no sense.
    :raises SystemExit: help or the version was asked for, and is printed.
    """
    words = list(argv)
    if not words or words[0] not in COMMANDS:
        parser = whole_parser(complete=False)
        if words and not words[0].startswith("-"):
            raise UsageError(f"there is no command {words[0]!r}{_suggestion(words[0])} (see `cowkit --help`)")
        parser.parse_args(words)
        raise UsageError("give a command: " + ", ".join(COMMANDS) + " (see `cowkit --help`)")
    name, words = words[0], words[1:]
    module = module_of(name)
    behind: list[str] | None = None
    if name in WRAPPERS and "--" in words:
        words, behind = words[: words.index("--")], words[words.index("--") + 1 :]
    elif name in WRAPPERS and not {"-h", "--help"} & set(words):
        raise UsageError(
            f"give a command to run, behind `--`: cowkit {name} ... -- CMD ... (see `cowkit {name} --help`)"
        )
    parser = _parser(f"cowkit {name}", "", "")
    _describe(parser, module)
    arguments = parser.parse_args(words)
    arguments.behind = behind
    return module, arguments


def _suggestion(word: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, COMMANDS, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
