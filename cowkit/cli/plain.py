"""`cowkit diff` as it is mostly typed, read without argparse.

`cowkit diff` is measured against what it replaces, and most of its time is its start: of 46 ms, a bare Python takes 17. The
import of argparse and the telling of thirty arguments, of which one command line has two or three, take 8 of the others.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence
    from typing import Any
else:
    from types import SimpleNamespace as Namespace

_VALUES = {"--base": "base", "--from": "source", "-o": "output", "--output": "output"}
_FLAGS = {"--json": "json"}

DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("output", "backing_file", "backing_format", "base", "source", "since", "at", "svg")),
    **dict.fromkeys(("base_format", "from_format", "from_context")),
    **dict.fromkeys(("cluster_size", "compress", "bitmap", "hash", "image_format", "engine", "secret_file", "behind")),
    "subclusters": None,
    **dict.fromkeys(("json", "json_schema", "exit_code", "stat", "map", "files", "estimate"), False),
    **dict.fromkeys(("standalone", "raw"), False),
    "image_options": [],
}
"""What `cowkit diff` has for each argument that is not given."""


def plain_diff(words: Sequence[str]) -> Namespace | None:
    """The arguments of a whole command line that is `cowkit diff` with no more than its commonest options.

    None for any other, and where there is anything to be said about it: argparse reads that one.
    """
    if not words or words[0] != "diff":
        return None
    given: dict[str, Any] = {}
    rest = iter(words[1:])
    for word in rest:
        if word in _FLAGS:
            given[_FLAGS[word]] = True
            continue
        name = _VALUES.get(word)
        value = next(rest, "-")
        if name is None or name in given or value.startswith("-"):
            return None
        given[name] = value
    return Namespace(**{**DEFAULTS, **given})
