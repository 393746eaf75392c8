"""docs/clients.md is true: each of its blocks marked `sh` runs as it stands."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import requires

TEXT = (Path(__file__).parent.parent / "docs" / "clients.md").read_text(encoding="utf-8")


def recipes() -> list[object]:
    found: list[object] = []
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        title = section.splitlines()[0]
        needs = re.search(r"^Needs: (.*)\.$", section, flags=re.MULTILINE)
        blocks = re.findall(r"^```sh\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
        assert bool(needs) == bool(blocks), f"{title}: what runs says what it needs"
        for number, block in enumerate(blocks):
            assert needs is not None
            found.append(pytest.param(needs[1].split(", "), block, id=f"{title.split(':')[0]}-{number}"))
    return found


@pytest.mark.parametrize(("needs", "block"), recipes())
def test_a_recipe_runs_as_it_stands_and_leaves_the_image_alone(tmp_path: Path, needs: list[str], block: str) -> None:
    requires(*(need for need in needs if not need.startswith("/")))
    for need in needs:
        if need.startswith("/") and not Path(need).exists():
            pytest.skip(f"there is no {need} here")
    image = tmp_path / "disk.img"
    content = random.Random(0).randbytes(16 << 20)
    image.write_bytes(content)
    program = shutil.which("cowkit", path=os.path.dirname(sys.executable))
    assert program is not None, "the package is installed for the tests"
    path = f"{os.path.dirname(program)}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert image.read_bytes() == content
