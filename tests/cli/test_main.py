"""The `cowkit` command itself: help, errors, exit statuses, completion, and `cowkit doctor`."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import cowkit as package
from cowkit.cli.arguments import COMMANDS, module_of, whole_parser
from cowkit.cli.completion_functions import ZSH
from cowkit.cli.doctor import version_of
from cowkit.cli.main import main
from cowkit.cli.standard_error import complain
from cowkit.cli.tools import TOOLS, Tool
from cowkit.errors import CowkitError
from tests.cli.helpers import COWKIT, PATIENCE, Run, Serve, complaint


def test_the_version_is_the_packages(cowkit: Run) -> None:
    done = cowkit("--version")
    assert (done.returncode, done.stdout) == (0, f"cowkit {package.__version__}\n")


def test_help_names_every_command(cowkit: Run) -> None:
    done = cowkit("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, summary in COMMANDS.items():
        assert re.search(rf"^    {name} +{re.escape(summary)}$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_says_what_it_does_and_ends_with_examples(name: str, cowkit: Run) -> None:
    done = cowkit(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: cowkit {name}")
    module = module_of(name)
    assert " ".join(module.DESCRIPTION.split()) in " ".join(done.stdout.split())
    examples = module.EXAMPLES.strip().splitlines()
    assert [line.strip() for line in done.stdout.splitlines()[-len(examples) :]] == examples


def test_help_in_a_terminal_says_the_same(cowkit: Run) -> None:
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            [*COWKIT, "run", "--help"], stdout=theirs, check=True, env={**os.environ, "COLUMNS": "80", "TERM": "xterm"}
        )
        shown = ""
        while "my-test" not in shown:
            shown += os.read(ours, 100000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "usage: cowkit run [OPTIONS] [BASE] [--diff OUT] -- CMD ..." in shown.replace("Usage", "usage")
    assert "{uri}" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give a command: "),
        (["dif"], "there is no command 'dif'; did you mean 'diff'? (see `cowkit --help`)"),
        (["frobnicate"], "there is no command 'frobnicate' (see `cowkit --help`)"),
        (["--frobnicate"], "(see `cowkit --help`)"),
        (["diff", "disk.img", "-o", "x"], "unrecognized arguments: disk.img: a base is given by --base"),
        (["ls", "more"], "unrecognized arguments: more (see `cowkit ls --help`)"),
        (["ls", "--", "more"], "unrecognized arguments"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(arguments: list[str], expected: str, cowkit: Run) -> None:
    assert expected in complaint(cowkit(*arguments))


def test_a_traceback_is_shown_if_asked_for(cowkit: Run) -> None:
    done = cowkit("serve", "none.img", COWKIT_DEBUG="1")
    assert done.returncode == 1
    assert "BaseOpenError" in done.stderr
    assert "Traceback" in done.stderr


def test_a_message_of_several_lines_is_said_in_one(capsys: pytest.CaptureFixture[str]) -> None:
    complain(CowkitError("one\ntwo"))
    complain(ValueError("odd"))
    complain(OSError(28, "No space left on device"))
    assert capsys.readouterr().err == (
        "cowkit: one two\ncowkit: internal error: ValueError: odd (COWKIT_DEBUG=1 shows where)\n"
        "cowkit: No space left on device\n"
    )


def test_a_reader_that_goes_away_is_no_complaint() -> None:
    command = f"{' '.join(COWKIT)} doctor --json"
    done = subprocess.run(
        ["bash", "-c", f"{command} | exec <&-; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("141\n", "")


@pytest.mark.parametrize(
    ("unbuffered", "arguments", "more"),
    [
        ("", ["ls", "--json"], "; all else is done"),
        ("1", ["ls", "--json"], ""),
        ("", ["diff", "--json-schema"], ""),  # more than a buffer holds
        ("1", ["serve", "--size", "1M"], ""),
    ],
)
def test_output_that_cannot_be_written_is_said(unbuffered: str, arguments: list[str], more: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COWKIT, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=PATIENCE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (2, f"cowkit: standard output: No space left on device{more}\n")


def test_what_was_printed_before_an_error_is_not_lost() -> None:
    code = (
        "import sys, cowkit.cli.ls as ls, cowkit.cli.main as main\n"
        "def run(arguments): print('before'); raise OSError(5, 'odd')\n"
        "ls.run = run\n"
        "sys.argv = ['cowkit', 'ls']\n"
        "main.command()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "before\n", "cowkit: odd\n")


def test_an_interruption_is_quiet() -> None:
    code = (
        "import sys, cowkit.cli.ls as ls, cowkit.cli.main as main\n"
        "def stop(): raise KeyboardInterrupt\n"
        "ls.running = stop\n"
        "sys.exit(main.main(['ls']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_interruption_at_the_end_is_quiet_too() -> None:
    code = "import cowkit.cli.main as main\ndef stop(): raise KeyboardInterrupt\nmain.main = stop\nmain.command()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_an_interruption_while_the_command_is_being_imported_is_quiet_too() -> None:
    code = (
        "import sys, cowkit.__main__ as program\n"
        "class Stop:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.startswith('cowkit.'): raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "program.command()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(shell: str, cowkit: Run) -> None:
    done = cowkit("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(word in done.stdout for word in ("checkpoint", "backing", "cow-on-read"))


@pytest.mark.requires("bash")
def test_bash_completes_commands_options_and_files(cowkit: Run, tmp_path: Path) -> None:
    script = cowkit("completion", "bash").stdout
    (tmp_path / "some.img").touch()

    def complete(*words: str) -> set[str]:
        line = " ".join(words)
        code = (
            f"{script}\nCOMP_WORDS=({' '.join(word or chr(39) * 2 for word in words)}); COMP_CWORD={len(words) - 1}; "
            f"COMP_LINE='{line}'; COMP_POINT={len(line)}; "
            "eval \"$(complete -p cowkit | sed 's/.*-F \\([^ ]*\\).*/\\1/') cowkit '${COMP_WORDS[COMP_CWORD]}'\"; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
        return set(done.stdout.split())

    assert complete("cowkit", "ch") == {"checkpoint"}
    assert complete("cowkit", "serve", "--cow") == {"--cow-on-read", "--cow-on-cache"}
    assert "some.img" in complete("cowkit", "diff", "--base", "so")


@pytest.fixture
def served(serve: Serve, cowkit: Run, tmp_path: Path) -> dict[str, str]:
    """Two servers with checkpoints; an environment that has the command on PATH."""
    for name, points in (("one", ["first", "second $(touch run)"]), ("other", ["third"])):
        serve("--size", "1M", "--name", name)
        for point in points:
            assert cowkit("checkpoint", "--from", name, point).returncode == 0
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cowkit").write_text(f'#!/bin/sh\nexec {shlex.join(COWKIT)} "$@"\n')
    (tmp_path / "bin" / "cowkit").chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def printed_by(shell: str, code: str, folder: Path, environment: dict[str, str]) -> list[str]:
    done = subprocess.run([shell, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.stderr == ""
    assert not (folder / "run").exists()
    return sorted(done.stdout.splitlines())


@pytest.mark.requires("bash")
def test_bash_completes_servers_and_the_checkpoints_of_the_one_that_is_chosen(
    served: dict[str, str], cowkit: Run, tmp_path: Path
) -> None:
    script = cowkit("completion", "bash").stdout
    for typed, expected in (
        (["rollback", "--from", "o"], ["one", "other"]),
        (["diff", "--from", "ot"], ["other"]),
        (["diff", "--from", "b"], ["bin"]),
        (["diff", "--from", "one", "--since", ""], ["first", r"second\ \$\(touch\ run\)"]),
        (["rollback", "--from", "one", "f"], ["first"]),
        (["map", "--from", "=", "other", "--at", ""], ["third"]),  # as readline splits --from=other
        (["rollback", "--from", "none", ""], []),
        (["rollback", ""], []),  # of which of the two?
    ):
        words = f"COMP_WORDS=({shlex.join(['cowkit', *typed])}); COMP_CWORD={len(typed)}"
        code = f'{script}\n{words}; _shtab_cowkit; for each in "${{COMPREPLY[@]}}"; do echo "$each"; done'
        assert printed_by("bash", code, tmp_path, served) == expected


@pytest.mark.requires("zsh")
def test_zsh_completes_servers_and_the_checkpoints_of_the_one_that_is_chosen(
    served: dict[str, str], cowkit: Run, tmp_path: Path
) -> None:
    script = cowkit("completion", "zsh").stdout
    # Each option's line ends so; shtab of different versions calls the argument differently.
    endings = re.findall(r":[^:\]]+:(_cowkit_[a-z_]+)\"", script)
    assert "_cowkit_servers" in endings and "_cowkit_servers_and_files" in endings
    assert endings.count("_cowkit_checkpoints") == 5
    for function, typed, expected in (
        ("_cowkit_servers", [], ["one", "other"]),
        ("_cowkit_servers_and_files", [], ["_files", "one", "other"]),
        ("_cowkit_checkpoints", ["diff", "--from", "one", "--since", ""], ["first", "second $(touch run)"]),
        ("_cowkit_checkpoints", ["map", "--from=other", "--at", ""], ["third"]),
        ("_cowkit_checkpoints", ["rollback", "--from", "none", ""], []),
        ("_cowkit_checkpoints", ["rollback", ""], []),  # of which of the two?
    ):
        # What zsh's own functions do takes a line editor.
        own = 'compadd() { for each in ${(P)2}; do print -r -- "$each"; done }; _files() { print _files }'
        code = f"{ZSH}\n{own}\nwords=({shlex.join(typed)}); {function}"
        assert printed_by("zsh", code, tmp_path, served) == expected
    subprocess.run(["zsh", "-n"], input=script, text=True, check=True)


def test_an_unknown_shell_is_said(cowkit: Run) -> None:
    assert "invalid choice: 'dos'" in complaint(cowkit("completion", "dos"))


def test_every_command_is_in_the_whole_parser() -> None:
    assert set(COMMANDS) <= set(whole_parser(complete=True).format_help().split())


# Names and pictures on any output


def test_what_an_output_has_no_form_for_is_a_question_mark_and_bytes_of_names_stay(
    cowkit: Run, serve: Serve, base: Path, tmp_path: Path
) -> None:
    serve(base, "--name", "m\xfcll")
    other = os.fsdecode(os.fsencode(tmp_path) + b"/m\xfc.img")
    shutil.copy(base, other)
    serve(other, "--name", "bytes")
    for encoding, name in (("ascii", "m?ll"), ("latin-1", "m\udcfcll"), ("utf-8", "m\xfcll")):
        listed = cowkit("ls", PYTHONIOENCODING=encoding)
        assert (listed.returncode, listed.stderr) == (0, "")
        assert name in listed.stdout
        assert other in listed.stdout
    drawn = cowkit("map", "--from", "bytes", PYTHONIOENCODING="ascii")
    assert (drawn.returncode, drawn.stderr) == (0, "")


def test_a_name_cannot_move_the_cursor_of_who_lists_it(cowkit: Run, serve: Serve, base: Path) -> None:
    serve(base, "--name", "a\x1b[31mb\nc")
    assert r"a\x1b[31mb\x0ac" in cowkit("ls").stdout


# The doctor


def test_the_doctor_lists_every_tool_with_its_purpose(cowkit: Run) -> None:
    done = cowkit("doctor", "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert all(check["fine"] for check in report["checks"])
    assert [tool["name"] for tool in report["tools"]] == [tool.name for tool in TOOLS]
    assert all(tool["purpose"] for tool in report["tools"])
    for tool in report["tools"]:
        if tool["name"] in ("qemu-img", "nbdinfo", "fio", "nbdkit") and shutil.which(tool["name"]):
            assert re.fullmatch(r"\d+(\.\d+)+", tool["version"])


def test_a_missing_module_is_told_with_the_pip_that_gets_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr("cowkit.cli.doctor.version", none)
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^  import indexed_gzip +missing +reading compressed bases: \.gz$", told, re.MULTILINE)
    assert re.search(r" -m pip install .*indexed-gzip python-xz qemu\.qmp$", told, re.MULTILINE)


def test_a_missing_tool_is_no_failure_and_how_to_get_it_is_said(cowkit: Run, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = cowkit("doctor", PATH=str(tmp_path / "bin"))
    assert done.returncode == 0
    assert re.search(r"^  nbdkit +missing ", done.stdout, re.MULTILINE)
    assert re.search(
        r"^  nbdsh +missing +reading and writing a served disk in lines of Python$", done.stdout, re.MULTILINE
    )
    assert re.search(
        r"^  sudo apt-get install .*libnbd-bin.*nbdkit.*python3-libnbd.*qemu-utils", done.stdout, re.MULTILINE
    )
    assert re.search(r"^  sudo dnf install .*libnbd.*nbdkit", done.stdout, re.MULTILINE)


def test_a_tool_that_no_shell_finds_is_told_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e2fsck").write_text("#!/bin/sh\necho 1.47.0\n")
    (tmp_path / "e2fsck").chmod(0o755)
    monkeypatch.setattr("cowkit.programs._SYSTEM_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", "/none")
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^  e2fsck +1\.47\.0 ", told, re.MULTILINE)
    assert f"\ne2fsck: in {tmp_path}, which is not on PATH; " in told
    assert f"\n  export PATH=$PATH:{tmp_path}\n" in told


def test_what_cowkit_itself_lacks_is_a_no(cowkit: Run, runtime: Path) -> None:
    none = runtime.parent / "none"
    done = cowkit("doctor", COWKIT_RUNTIME_DIR=str(none / "run"), TMPDIR=str(none))
    assert done.returncode == 1
    assert re.search(r"^  runtime directory +NOT OK +cannot make", done.stdout, re.MULTILINE)
    assert re.search(r"^  overlays +NOT OK ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("script", "version"),
    [
        ("echo tool 1.2.3-4", "1.2.3"),
        ("echo hello; exit 3", "?"),
        ("echo no 3.11.7; exit 1", "?"),
        ("echo x 5.0 >&2", "5.0"),
        (None, None),
    ],
)
def test_a_tools_version_is_found_in_what_it_prints(
    script: str | None, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "no-such-tool").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "no-such-tool").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert version_of(Tool("no-such-tool", "testing", ("--version",), "a", "b")) == version


def test_the_module_called_nbd_that_is_something_else_is_not_taken_for_the_binding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nbd.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nbd", raising=False)
    try:
        assert version_of(TOOLS[0]) is None
    finally:
        sys.modules.pop("nbd", None)


def test_main_returns_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert main(["nonsense"]) == 2
    assert capsys.readouterr().out == f"cowkit {package.__version__}\n"
