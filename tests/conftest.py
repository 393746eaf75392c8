"""What all tests share: the marks ``requires``, ``slow`` and ``long``."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "requires(*programs, modules=()): skip where a program or module from outside is missing; fail instead where CI=true",
    )
    config.addinivalue_line("markers", "slow: runs only with RUN_SLOW=1 or -m slow")
    config.addinivalue_line(
        "markers", "long: takes a minute; begins first, lest all other workers wait for it at the end"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if os.environ.get("RUN_SLOW") or "slow" in config.getoption("markexpr"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.hookimpl(tryfirst=True)  # before any fixture needs the program
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires"):
        requires(*mark.args, **mark.kwargs)


def requires(*programs: str, modules: Iterable[str] = ()) -> None:
    """Skip the running test where one of ``programs`` or ``modules`` is missing; with CI=true fail it instead."""
    missing = [program for program in programs if shutil.which(program) is None]
    missing += [f"import {module}" for module in modules if not _importable(module)]
    if not missing:
        return
    message = f"not installed: {', '.join(missing)}"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{message} (with CI=true nothing may be missing)", pytrace=False)
    pytest.skip(message)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False
