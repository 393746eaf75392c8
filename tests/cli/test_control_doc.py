"""docs/control.md lists what a control socket can be asked, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cowkit.server.control_client import ControlClient
from cowkit.server.runtime import running
from tests.cli.helpers import Serve

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
