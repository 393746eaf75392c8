"""scripts/bench: what it says of figures is true of them, its outputs are whole, and it leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.benchmarks import catalog, markdown, picture, processes, servers
from scripts.benchmarks.bench import Bench
from scripts.benchmarks.command import main
from scripts.benchmarks.diff_rows import dirty_runs
from scripts.benchmarks.figures import short, times
from scripts.benchmarks.model import (
    COWKIT,
    NBDKIT,
    NBDKIT_4K,
    QEMU,
    BenchError,
    Experiment,
    Limit,
    Row,
    Times,
    UnavailableError,
)
from scripts.benchmarks.results import Results
from scripts.benchmarks.runner import run, turns_of

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 1 << 20
SVG = "{http://www.w3.org/2000/svg}"
ROW = Row("speed", "how fast | it is", "req/s", targets=(Times(2, NBDKIT), Limit(100)), picture=True)
COST = Row("cost", "what it costs <each>", "ms", "lower", targets=(Times(2, NBDKIT), Limit(5)), picture=True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Arguments for a short run in a folder of the test, on an image of 8 MiB."""
    monkeypatch.setattr(Bench, "area", 8 * MIB)
    return ["--dir", str(tmp_path), "--rounds", "1", "--seconds", "0.1"]


def fake(row: Row, figures: Mapping[str, list[float] | Exception]) -> Experiment:
    """An experiment whose contenders come out as given, round by round."""
    left = {name: iter(values) for name, values in figures.items() if not isinstance(values, Exception)}

    def measure(bench: Bench, contender: str) -> Mapping[str, float]:
        given = figures[contender]
        if isinstance(given, Exception):
            raise given
        return {row.name: next(left[contender])}

    return Experiment("Fakes", (row,), tuple(figures), measure)


def results_of(tmp_path: Path, *experiments: Experiment, rounds: int = 1) -> Results:
    names = [row.name for experiment in experiments for row in experiment.rows]
    with Bench(str(tmp_path), seconds=1) as bench:
        return run(bench, experiments, names, rounds=rounds, progress=lambda done, what: None)


# Which rows


def test_each_row_has_a_name_of_its_own_and_a_place_in_the_documentation() -> None:
    names = [row.name for row in catalog.rows_of(catalog.EXPERIMENTS)]
    assert len(set(names)) == len(names)
    page = (ROOT / "docs" / "speed.md").read_text()
    told = set(re.findall(r"`([\w.-]+)`", page))
    assert [name for name in names if name not in told and name.removesuffix("-speed") not in told] == []


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("read-4k-d1", {"read-4k-d1"}),
        ("read-4k", {"read-4k-d1", "read-4k-d8", "read-4k-d32", "read-4k-c4"}),
        ("*-1m", {"read-1m", "rewrite-1m", "fresh-1m"}),
        ("diff-1", {"diff-1"}),
    ],
)
def test_only_takes_names_beginnings_and_patterns(pattern: str, chosen: set[str]) -> None:
    experiments, wanted = catalog.choose([pattern], quick=False)
    assert wanted == chosen
    assert chosen <= {row.name for row in catalog.rows_of(experiments)}


def test_a_row_that_shares_its_measurement_is_shown_without_the_other() -> None:
    experiments, wanted = catalog.choose(["cpu-read-4k"], quick=False)
    assert [[row.name for row in one.rows] for one in experiments] == [["read-4k-d32", "cpu-read-4k"]]
    assert wanted == {"cpu-read-4k"}


def test_an_unknown_name_is_an_error_that_lists_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "raed"]) == 2
    said = capsys.readouterr().err
    assert "'raed'" in said
    assert all(row.name in said for row in catalog.rows_of(catalog.EXPERIMENTS))


def test_list_names_each_row_with_its_target_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [row.name for row in catalog.rows_of(catalog.EXPERIMENTS)]
    assert "2× nbdkit-cow; 3× qemu-nbd" in lines[0]


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--seconds", "nan"], ["--seconds", "-1"]])
def test_senseless_numbers_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


# Figures, ratios and targets


def test_a_ratio_says_how_many_times_better_whichever_way_is_better(tmp_path: Path) -> None:
    results = results_of(tmp_path, fake(ROW, {COWKIT: [300], NBDKIT: [100]}), fake(COST, {COWKIT: [2], NBDKIT: [8]}))
    assert [line.ratio(NBDKIT) for line in results.lines] == [3, 4]
    assert [line.ratio(QEMU) for line in results.lines] == [None, None]


def test_contenders_alternate_and_the_figure_is_the_median(tmp_path: Path) -> None:
    order: list[str] = []
    values = {COWKIT: iter([1.0, 9.0, 2.0]), NBDKIT: iter([5.0, 6.0, 40.0])}

    def measure(bench: Bench, contender: str) -> Mapping[str, float]:
        order.append(contender)
        return {ROW.name: next(values[contender])}

    results = results_of(tmp_path, Experiment("Fakes", (ROW,), (COWKIT, NBDKIT), measure), rounds=3)
    assert order == [COWKIT, NBDKIT] * 3
    assert results.lines[0].medians == {COWKIT: 2, NBDKIT: 6}


def test_a_sparing_run_measures_whoever_decides_no_target_in_every_third_round() -> None:
    one = fake(ROW, {COWKIT: [1], NBDKIT: [1], QEMU: [1]})
    assert turns_of(one, 4, sparing=True, quick=False) == [
        *(COWKIT, NBDKIT, QEMU),
        *(COWKIT, NBDKIT) * 2,
        *(COWKIT, NBDKIT, QEMU),
    ]
    assert turns_of(one, 4, sparing=False, quick=False) == [COWKIT, NBDKIT, QEMU] * 4


@pytest.mark.parametrize(
    ("row", "ours", "met"),
    [(ROW, 200, [True, True]), (ROW, 199, [False, True]), (ROW, 99, [False, False]),
     (COST, 5, [True, True]), (COST, 5.1, [False, False])],
)  # fmt: skip
def test_a_target_is_met_from_the_figure_on_that_it_names(
    tmp_path: Path, row: Row, ours: float, met: list[bool]
) -> None:
    theirs = 100 if row is ROW else 10
    line = results_of(tmp_path, fake(row, {COWKIT: [ours], NBDKIT: [theirs]})).lines[0]
    assert [each for _, each in line.verdicts()] == met


def test_a_peer_that_is_missing_is_a_dash_and_a_note_and_its_target_is_not_judged(tmp_path: Path) -> None:
    results = results_of(tmp_path, fake(ROW, {COWKIT: [300], NBDKIT: UnavailableError("no\nnbdkit")}), rounds=1)
    assert results.lines[0].verdicts() == [("2× nbdkit-cow", None), ("≥ 100 req/s", True)]
    assert results.notes == ["nbdkit-cow: no nbdkit"]
    assert (results.missed, results.failures) == ([], [])
    assert "| **300** | – |" in markdown.render(results)


def test_what_cannot_be_measured_of_cowkit_is_a_failure_and_the_other_rows_go_on(tmp_path: Path) -> None:
    results = results_of(
        tmp_path, fake(ROW, {COWKIT: BenchError("it broke"), NBDKIT: [1]}), fake(COST, {COWKIT: [2], NBDKIT: [8]})
    )
    assert results.failures == ["speed: it broke"]
    assert results.lines[1].ratio(NBDKIT) == 4


@pytest.mark.parametrize(
    ("ours", "check", "status"), [(300, True, 0), (150, True, 1), (150, False, 0)], ids=["met", "missed", "unchecked"]
)
def test_check_makes_a_missed_target_the_exit_status(
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ours: float,
    check: bool,
    status: int,
) -> None:
    monkeypatch.setattr(catalog, "EXPERIMENTS", (fake(ROW, {COWKIT: [ours], NBDKIT: [100]}),))
    assert main([*small, *(["--check"] if check else [])]) == status
    assert ("below target: speed" in capsys.readouterr().err) == (status == 1)


def test_a_failure_of_cowkit_is_the_exit_status(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalog, "EXPERIMENTS", (fake(ROW, {COWKIT: BenchError("it broke")}),))
    assert main(small) == 2
    assert "speed: it broke" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.1234, "0.12"), (9.996, "10.0"), (12.34, "12.3"), (99.96, "100"), (9999, "9999"), (9999.6, "10.0k"),
     (99_949, "99.9k"), (123_456, "123k")],
)  # fmt: skip
def test_a_figure_has_about_three_digits(value: float | None, text: str) -> None:
    assert short(value) == text


def test_a_ratio_of_any_size_is_short_and_never_shown_as_more_than_it_is() -> None:
    shown = {
        None: "–", 0.5: "0.50×", 0.998: "0.99×", 1.15: "1.15×", 9.999: "9.99×", 12.3: "12×", 99.6: "99×", 1234: "1234×",
    }  # fmt: skip
    assert {ratio: times(ratio) for ratio in shown} == shown


# Outputs


def two_rows(tmp_path: Path) -> Results:
    return results_of(
        tmp_path,
        fake(ROW, {COWKIT: [300], NBDKIT: [100], QEMU: [50]}),
        fake(COST, {COWKIT: [2], NBDKIT: UnavailableError("gone")}),
    )


def test_the_json_has_each_figure_ratio_and_target(tmp_path: Path) -> None:
    told = json.loads(json.dumps(two_rows(tmp_path).to_json(), allow_nan=False))
    assert told["schema"] == 1
    speed, cost = told["rows"]
    assert speed["medians"] == {COWKIT: 300, NBDKIT: 100, QEMU: 50}
    assert speed["times_better"] == {NBDKIT: 3, QEMU: 6}
    assert speed["targets"] == [{"target": "2× nbdkit-cow", "met": True}, {"target": "≥ 100 req/s", "met": True}]
    assert cost["notes"] == {NBDKIT: "gone"}
    assert cost["targets"][0]["met"] is None


def test_the_markdown_goes_between_the_markers_and_nothing_else_changes(tmp_path: Path) -> None:
    page = f"# Before\n\n{markdown.BEGIN}\nold\n{markdown.END}\n\nAfter\n"
    once = markdown.put(page, two_rows(tmp_path))
    assert once.startswith(f"# Before\n\n{markdown.BEGIN}\nOne run")
    assert once.endswith(f"{markdown.END}\n\nAfter\n")
    assert "old" not in once
    assert "how fast &#124; it is" in once
    assert markdown.put(once, two_rows(tmp_path)).count(markdown.BEGIN) == 1
    assert markdown.put("", two_rows(tmp_path)).startswith(markdown.BEGIN)


@pytest.mark.parametrize("page", ["text", f"{markdown.END}{markdown.BEGIN}", f"{markdown.BEGIN}"])
def test_a_page_without_the_two_markers_is_refused_before_anything_is_measured(
    tmp_path: Path, small: list[str], page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.md"
    path.write_text(page)
    assert main([*small, "--markdown", str(path)]) == 2
    assert "page.md" in capsys.readouterr().err
    assert path.read_text() == page


def test_an_output_in_a_folder_that_is_not_there_is_refused_before_anything_is_measured(
    tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, "--json", str(tmp_path / "none" / "all.json")]) == 2
    assert "all.json" in capsys.readouterr().err


def test_the_picture_is_a_drawing_with_a_bar_for_each_contender_within_its_frame(tmp_path: Path) -> None:
    root = ET.fromstring(picture.draw(two_rows(tmp_path)))
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    bars = list(root.iter(f"{SVG}rect"))[3:]  # behind the legend's
    assert [float(bar.attrib["width"]) for bar in bars] == [400, 133, 67, 400]
    for bar in bars:
        assert float(bar.attrib["x"]) + float(bar.attrib["width"]) < width
        assert float(bar.attrib["y"]) + float(bar.attrib["height"]) < height
    texts = {each.text for each in root.iter(f"{SVG}text")}
    assert {"what it costs <each>", "2.00 ms: less is better"} <= texts


def test_the_picture_has_a_bar_for_nbdkit_with_small_blocks_in_the_rows_that_have_it(tmp_path: Path) -> None:
    results = results_of(tmp_path, fake(ROW, {COWKIT: [200], NBDKIT: [100], NBDKIT_4K: [400], QEMU: [50]}))
    bars = list(ET.fromstring(picture.draw(results)).iter(f"{SVG}rect"))[4:]
    assert [float(bar.attrib["width"]) for bar in bars] == [200, 100, 400, 50]
    assert len({bar.attrib["class"] for bar in bars}) == 4


# The image, what is dirty, and the servers


def test_no_two_blocks_of_the_image_are_the_same_and_it_grows_in_place(tmp_path: Path) -> None:
    with Bench(str(tmp_path), seconds=1) as bench:
        first = Path(bench.image(20 * MIB)).read_bytes()
        whole = Path(bench.image(35 * MIB + 512)).read_bytes()
        assert len(first) == 20 * MIB
        assert len(whole) == 35 * MIB + 512
        assert whole.startswith(first)
        assert len({whole[at : at + 4096] for at in range(0, len(whole), 4096)}) == -(-len(whole) // 4096)
        assert bench.image(MIB) == bench.image(35 * MIB)
    assert list(tmp_path.iterdir()) == []


@given(dirty=st.integers(1, 200 * MIB), spare=st.integers(1, 4))
def test_what_is_dirty_adds_up_and_no_two_runs_meet(dirty: int, spare: int) -> None:
    size = (dirty // MIB + 4) * MIB * (spare + 1)
    runs = sorted(dirty_runs(dirty, size))
    assert abs(sum(length for _, length in runs) - dirty) <= 65536
    assert all(offset % length == 0 for offset, length in runs)
    assert all(offset + length <= after for (offset, length), (after, _) in itertools.pairwise(runs))
    assert runs[-1][0] + runs[-1][1] <= size


@pytest.mark.requires("nbdkit", "qemu-nbd", "nbd-server")
@pytest.mark.parametrize("contender", servers.SERVERS)
def test_each_server_answers_and_is_gone_afterwards_with_its_folder(tmp_path: Path, contender: str) -> None:
    with Bench(str(tmp_path), seconds=1) as bench:
        image = bench.image(MIB)
        room = bench.new_room()
        with servers.serving(contender, image, room) as served:
            pid = served.child.pid
            assert os.path.exists(f"/proc/{pid}")
        assert not os.path.exists(f"/proc/{pid}")
        assert not os.path.exists(room.folder)


def test_a_server_that_cannot_start_is_an_error_with_its_own_words(tmp_path: Path) -> None:
    with Bench(str(tmp_path), seconds=1) as bench:
        room = bench.new_room()
        os.mkdir(tmp_path / "directory")
        message = r"cowkit ended with status 2: cowkit: .*directory"
        with pytest.raises(BenchError, match=message), servers.serving(COWKIT, str(tmp_path / "directory"), room):
            pass
        assert not os.path.exists(room.folder)


def test_a_server_that_is_not_installed_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        Bench(str(tmp_path), seconds=1) as bench,
        pytest.raises(UnavailableError, match="apt install nbdkit"),
        servers.serving(NBDKIT, bench.image(MIB), bench.new_room()),
    ):
        pass


def test_idle_is_who_uses_no_more_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that works a quarter of a second, twice, with a pause that is shorter than those of one at rest."""
    monkeypatch.setattr(processes, "_AT_REST_SECONDS", 0.5)  # a busy machine lets it wait for less than that
    work = "until = time.process_time() + 0.25\nwhile time.process_time() < until: pass\n"
    program = f"import time\n{work}time.sleep(0.1)\n{work}time.sleep(60)"
    with processes.running([sys.executable, "-c", program]) as child:
        processes.wait_until_idle(child.pid)
        assert processes.cpu_seconds(child.pid) >= 0.5


# Whole runs


@pytest.mark.requires("fio", "nbdkit", "qemu-nbd", "nbd-server", "nbdcopy")
def test_a_run_measures_all_contenders_and_writes_all_its_outputs(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("read-4k-d32", "cpu-read-4k", "fresh-4k-c4", "striped-256k", "tcp-read-4k-d1", "nbdcopy")
    wanted = [word for name in names for word in ("--only", name)]
    files = [tmp_path / name for name in ("all.json", "all.svg", "all.md")]
    outputs = ["--json", str(files[0]), "--svg", str(files[1]), "--markdown", str(files[2])]
    assert main([*small, *wanted, *outputs]) == 0, capsys.readouterr().err
    rows = {row["name"]: row for row in json.loads(files[0].read_text())["rows"]}
    assert set(rows) == set(names)
    assert all(row["notes"] == {} and min(row["medians"].values()) >= 0 for row in rows.values())
    assert set(rows["read-4k-d32"]["medians"]) == set(servers.SERVERS) - {NBDKIT_4K}
    assert "nbd-server" not in rows["fresh-4k-c4"]["medians"]  # each of the four would have a disk of its own
    ET.parse(files[1])
    assert "4 KiB random read, depth 32" in files[2].read_text()
    assert "striped-256k" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == sorted(files)


@pytest.mark.requires("fio")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_and_no_file(tmp_path: Path, ending: signal.Signals) -> None:
    code = (
        "import sys; from scripts.benchmarks.bench import Bench; from scripts.benchmarks.command import main;"
        f"Bench.area = {8 * MIB}; sys.exit(main(['--dir', sys.argv[1], '--only', 'read-4k-d1', '--seconds', '30']))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as bench:
        while not (lines := command_lines_with(f"--tmpdir {tmp_path}")):
            assert bench.poll() is None, bench.communicate()
        bench.send_signal(ending)
        _, said = bench.communicate(timeout=60)
    assert bench.returncode == 128 + ending
    assert said == ""
    assert list(tmp_path.iterdir()) == []
    sockets = re.findall(r"--socket (/\S+)/\d+/nbd.sock", lines[0])[0]
    assert not os.path.exists(sockets)
    assert command_lines_with(str(tmp_path)) == command_lines_with(sockets) == []


def command_lines_with(words: str) -> list[str]:
    """Those of processes that have ``words``."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words in line:
            found.append(line)
    return found


@pytest.mark.parametrize(
    ("row", "unit"), [("rollback-100m", "ms"), ("checkpoint-64g", "ms"), ("memory-16t", "MiB"), ("create-close", "ms")]
)
def test_a_probe_tells_its_figure(small: list[str], tmp_path: Path, row: str, unit: str) -> None:
    told = tmp_path / "told.json"
    Bench.area = 128 * MIB  # type: ignore[assignment,method-assign] # put back by the fixture
    assert main([*small, "--only", row, "--json", str(told)]) == 0
    (line,) = json.loads(told.read_text())["rows"]
    assert line["unit"] == unit
    assert line["medians"][COWKIT] > 0
