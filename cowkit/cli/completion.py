"""`cowkit completion`: print what makes a shell complete the command line."""

from __future__ import annotations

import argparse
from typing import Any

from cowkit.cli.arguments import whole_parser
from cowkit.cli.completion_functions import BASH, ZSH
from cowkit.cli.file_argument import COMPLETES_FILES
from cowkit.cli.served_argument import COMPLETES_SERVED, SERVERS_AND_FILES
from cowkit.errors import MissingToolError, with_pip

DESCRIPTION = (
    "Print shell code that makes the shell complete cowkit's commands, options and file names; bash and zsh also the names of "
    "running servers and of their checkpoints."
)
EXAMPLES = """
cowkit completion bash > ~/.local/share/bash-completion/completions/cowkit
cowkit completion zsh > ~/.zfunc/_cowkit   # a directory of $fpath
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cowkit completion` takes."""
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "tcsh"), help="bash, zsh or tcsh")


def run(arguments: argparse.Namespace) -> int:
    """Have shtab write it."""
    try:
        import shtab
    except ImportError as error:
        remedy = with_pip("shtab")
        raise MissingToolError("shtab (a Python package)", purpose="cowkit completion", remedy=remedy) from error
    parser = whole_parser(complete=True)
    _complete(parser, shtab.FILE)
    functions = {"bash": BASH, "zsh": ZSH}.get(arguments.shell, "")  # tcsh has none
    print(shtab.complete(parser, arguments.shell, preamble=functions))
    return 0


def _complete(parser: argparse.ArgumentParser, files: dict[str, Any]) -> None:
    for action in parser._actions:
        if hasattr(action, COMPLETES_FILES):
            action.complete = files  # type: ignore[attr-defined]
        if hasattr(action, COMPLETES_SERVED):
            function = getattr(action, COMPLETES_SERVED)
            tcsh = files["tcsh"] if function == SERVERS_AND_FILES else ""
            action.complete = {"bash": function, "zsh": function, "tcsh": tcsh}  # type: ignore[attr-defined]
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete(command, files)
