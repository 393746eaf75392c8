"""docs/control.md lists what a control socket can be asked, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cowkit.server.control_client import ControlClient
from cowkit.server.runtime import running
from tests.cli.helpers import Run, Serve

TEXT = (Path(__file__).parents[2] / "docs" / "control.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("runtime")
def test_the_document_lists_the_commands_that_there_are_with_their_arguments(serve: Serve) -> None:
    server = serve("--size", "1M")
    (info,) = running()
    with ControlClient(info.control) as client:
        known = {each["name"] for each in client.execute("query-commands")}
        disk = client.execute("cowkit-query-disk")
    server.end()
    section = TEXT.partition("## Commands")[2].partition("## Events")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])} == known
    (described,) = (line for line in section.splitlines() if line.startswith("| `cowkit-query-disk`"))
    assert {name for name in disk if name != "share"} <= set(re.findall(r"`([^`]+)`", described))


def test_a_server_of_another_runtime_directory_is_found_by_its_control_socket_alone(
    serve: Serve, cowkit: Run, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve("--size", "1M")
    (info,) = running()
    monkeypatch.setenv("COWKIT_RUNTIME_DIR", str(runtime.with_name("other")))
    assert cowkit("checkpoint").stderr.startswith("cowkit: nothing is being served: ")
    assert cowkit("checkpoint", "point", "--from", info.control).stdout == "point\n"
    assert cowkit("diff", "--from", info.control, "--stat").returncode == 0


def test_the_help_of_ls_says_where_it_looks_as_the_document_does(cowkit: Run) -> None:
    places = "$COWKIT_RUNTIME_DIR", "$XDG_RUNTIME_DIR/cowkit", "/tmp/cowkit-UID"
    shown = cowkit("ls", "--help").stdout
    assert all(place in shown and f"`{place}`" in TEXT for place in places)
