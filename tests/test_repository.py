"""Claims about the repository itself: scripts, packaging, and what may stand in no file."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "scripts/bench",
    "scripts/campaigns",
    "scripts/compare-diff",
    "scripts/cowkit",
    "scripts/fixture-speed",
    "scripts/lib",
    "scripts/test",
    "scripts/versions",
    ".ci/run",
]
# Where somebody's files lie: such a path works on one machine. (/dev, /mnt, /tmp, /usr and the like are everybody's.)
PERSONAL_PATH = re.compile(r"(?<![\w./~$}>])/(?:home|root|Users|work|opt|srv)/[\w.-]+")


def files_of(root: Path) -> list[Path]:
    """What is in the repository, or is new and not ignored; where there is no git, such as in a source archive, all there is."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        ignored = {".git", *(line.strip("/") for line in (root / ".gitignore").read_text().split())}
        names = [path.relative_to(root) for path in root.rglob("*")]
        return sorted(
            root / name for name in names if not any(fnmatch(part, each) for part in name.parts for each in ignored)
        )
    return sorted(root / name for name in listed.stdout.split("\0") if name)


def text_files() -> list[tuple[str, str]]:
    found = []
    for path in files_of(ROOT):
        if path.is_symlink() or not path.is_file() or path == Path(__file__).resolve():
            continue
        try:
            found.append((str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def test_what_git_ignores_is_no_part_of_the_repository_also_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    for name in (
        "new.py",
        "cow-artifacts/test/summary.json",
        "pkg/__pycache__/x.pyc",
        ".venv/bin/python",
        "pkg/new.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    expected = [".gitignore", "new.py", "pkg/new.py"]
    if shutil.which("git"):
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        assert [str(path.relative_to(tmp_path)) for path in files_of(tmp_path)] == expected
        shutil.rmtree(tmp_path / ".git")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = [path for path in files_of(tmp_path) if path.is_file()]
    assert [str(path.relative_to(tmp_path)) for path in found] == expected


def test_a_newcomer_at_a_terminal_is_told_what_the_first_run_waits_for_and_nobody_else() -> None:
    code = 'root=$1; . "$root/scripts/lib"; is_made() { false; }; build_venv() { :; }; make_venv installed x'
    run = ["bash", "-c", code, "bash", str(ROOT)]
    assert subprocess.run(run, check=True, capture_output=True).stderr == b""
    ours, theirs = pty.openpty()
    try:
        subprocess.run(run, check=True, stderr=theirs)
        assert b".venv is being made, which may take half a minute; " in os.read(ours, 10000)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_shell_parses_the_script(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "scripts/lib"])
def test_the_script_can_be_run(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111 == 0o111


def test_no_file_names_a_path_of_one_machine() -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if PERSONAL_PATH.search(line)
    ]
    assert found == []


def test_no_file_names_a_package_index() -> None:
    pattern = re.compile(r"--(?:extra-)?index-url|--find-links|--trusted-host|PIP_INDEX_URL")
    assert [name for name, text in text_files() if pattern.search(text)] == []


def test_the_unrelated_package_called_nbd_is_no_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert [one for one in wanted if re.match(r"(lib)?nbd\b", one)] == []


def test_every_dependency_has_a_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    # One extra may stand for another of this project, and a package may be for some versions of Python only.
    others = [one.partition(";")[0] for one in wanted if not one.startswith("cowkit[")]
    assert [one for one in others if not re.fullmatch(r"[\w.-]+>=[\d.]+", one)] == []


def test_the_script_of_versions_has_the_bounds_of_the_project() -> None:
    script = (ROOT / "scripts" / "versions").read_text()
    test = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    assert set(re.findall(r"'(\w+>=[\d.]+)'", script)) - {"uv>=0.5"} <= set(test)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--none"], "versions: there is no option --none: see versions --help; what is for pytest goes behind --"),
        (["--oldest", "--free-threaded"], "versions: --oldest and --free-threaded are two runs: give one of them"),
        (["--python"], "versions: --python takes a path or the name of a program"),
        (["--python", "/bin/sh"], "versions: /bin/sh is no Python 3.11 or newer that runs"),
    ],
)
def test_what_makes_no_sense_to_the_script_of_versions_is_refused_in_a_line(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    shown = subprocess.run(
        [ROOT / "scripts" / "versions", *arguments], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert (shown.returncode, shown.stdout, shown.stderr) == (2, "", f"{said}\n")


def test_a_python_with_the_lock_is_not_taken_for_a_free_threaded_one() -> None:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("this Python is free-threaded")
    shown = subprocess.run(
        [ROOT / "scripts" / "versions", "--free-threaded", "--python", sys.executable],
        check=False,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 2
    assert re.fullmatch(r"versions: \S+ is not free-threaded\n", shown.stderr)


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "cowkit" / "py.typed").is_file()


def test_importing_the_package_imports_no_terminal_and_no_pytest() -> None:
    code = (
        "import sys, cowkit; print(sorted({'rich', 'pytest', 'argparse', 'qemu', 'cowkit.server'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"


@pytest.fixture
def marked_tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An inner pytest with this project's marks, neither in CI nor with slow tests."""
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("RUN_SLOW", raising=False)
    return pytester


def test_a_missing_program_or_module_skips_the_test_but_fails_it_in_ci(
    marked_tests: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked_tests.makepyfile("""
        import pytest

        @pytest.mark.requires("no-such-program")
        def test_program(): pass

        @pytest.mark.requires(modules=["no_such_package.module"])
        def test_module(): pass

        @pytest.mark.requires("sh", modules=["json"])
        def test_all_here(): pass
    """)
    marked_tests.runpytest_inprocess("--strict-markers").assert_outcomes(passed=1, skipped=2)
    monkeypatch.setenv("CI", "true")
    result = marked_tests.runpytest_inprocess()
    assert result.parseoutcomes()["passed"] == 1
    assert "skipped" not in result.parseoutcomes()
    result.stdout.fnmatch_lines(
        ["not installed: no-such-program (*", "not installed: import no_such_package.module (*"]
    )


def test_slow_tests_run_only_when_asked_for(marked_tests: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    marked_tests.makepyfile("""
        import pytest

        @pytest.mark.slow
        def test_slow(): pass

        def test_quick(): pass
    """)
    marked_tests.runpytest_inprocess("--strict-markers").assert_outcomes(passed=1, deselected=1)
    marked_tests.runpytest_inprocess("-m", "slow").assert_outcomes(passed=1, deselected=1)
    monkeypatch.setenv("RUN_SLOW", "1")
    marked_tests.runpytest_inprocess().assert_outcomes(passed=2)
