"""What is read without argparse is read as argparse would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowkit.cli.arguments import parse
from cowkit.cli.plain import plain_diff
from cowkit.errors import UsageError
from tests.cli.helpers import COWKIT, Serve

WORDS = st.sampled_from(
    [
        "--base",
        "--from",
        "-o",
        "--output",
        "--json",
        "--stat",
        "--since",
        "--",
        "-",
        "",
        "a.img",
        "b c",
        "-ob",
        "--base=x",
        "-h",
    ]
)


@given(st.lists(WORDS, max_size=7))
def test_a_plain_command_line_is_read_as_argparse_reads_it(words: list[str]) -> None:
    plain = plain_diff(["diff", *words])
    if plain is None:
        return
    _, whole = parse(["diff", *words])
    assert vars(plain) == vars(whole)


@pytest.mark.parametrize(
    "line",
    ["diff --base a -o b", "diff --base a --from 12 --output b --json", "diff --json -o b", "diff"],
)
def test_the_commonest_command_lines_are_plain(line: str) -> None:
    assert plain_diff(line.split()) is not None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "serve a",
        "diff --base",
        "diff -o b -o c",
        "diff x",
        "diff --base -x",
        "diff --json=1",
        "diff -h",
        "diff --stat",
    ],
)
def test_whatever_there_is_anything_to_be_said_about_is_left_to_argparse(line: str) -> None:
    assert plain_diff(line.split()) is None


SLOW_MODULES = ("argparse", "socket", "typing", "threading", "re", "enum", "json", "collections", "contextlib")


@pytest.mark.parametrize("served", [False, True], ids=["refused", "written"])
def test_a_plain_command_imports_nothing_that_takes_long(
    served: bool, serve: Serve, base: Path, tmp_path: Path
) -> None:
    if served:
        serve(str(base))
    code = (
        "import sys\nfrom cowkit.cli.main import main\n"
        f"assert main(['diff', '--base', {str(base)!r}, '-o', {str(tmp_path / 'x.qcow2')!r}, '--json']) == {0 if served else 2}\n"
        f"print([name for name in {SLOW_MODULES!r} if name in sys.modules], file=sys.stderr)"
    )
    # -S: what other packages have the interpreter import at its start is not ours
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_the_command_ends_with_what_was_to_be_done_at_the_end_of_the_process() -> None:
    code = (
        "import atexit, sys\nfrom cowkit.cli.main import command\natexit.register(print, 'at the end')\n"
        "sys.argv = ['cowkit', '--version']\ncommand()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stdout.endswith("at the end\n")


def test_a_plain_command_that_makes_no_sense_is_refused_as_any_other() -> None:
    with pytest.raises(UsageError):
        parse(["diff", "--base"])
    done = subprocess.run(
        [*COWKIT, "diff", "--base", "a", "-o", ""], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("cowkit: ")
    assert len(done.stderr.splitlines()) == 1
