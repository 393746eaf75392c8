"""docs/disk.md names all that a disk can do."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from cowkit import CowDisk

PAGE = Path(__file__).parent.parent / "docs" / "disk.md"


def test_the_page_names_each_method_and_property_and_nothing_else() -> None:
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    found = {text for row in rows for text in re.findall("`([^`]+)`", row)}
    named = {text.partition("(")[0]: "(" in text for text in found}
    public = {name: inspect.getattr_static(CowDisk, name) for name in dir(CowDisk) if not name.startswith("_")}
    assert named == {name: inspect.isfunction(member) for name, member in public.items()}
    for text in found:
        name, _, rest = text.partition("(")
        if rest:
            wanted = [each.partition("=")[0] for each in rest.rstrip(")").split(", ") if each]
            assert list(inspect.signature(public[name]).parameters)[1:][: len(wanted)] == wanted, name
