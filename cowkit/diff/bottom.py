"""Opening a difference with all that it stands on, the base as well, for who has but its name."""

from __future__ import annotations

import os
from contextlib import ExitStack

from cowkit.bases import open_base
from cowkit.diff.chain import DiffChain
from cowkit.disk import Base
from cowkit.errors import BaseOpenError


def open_bottom(
    chain_path: str | os.PathLike[str], base: str | os.PathLike[str] | None, format: str | None, stack: ExitStack
) -> tuple[DiffChain, Base | None]:
    """The chain of a difference and the base at its bottom, open until ``stack`` ends; the one is not put on the other yet.

    :param base: where the base is; where the chain says, unless given.
    :param format: the base's format; what the chain says, or what name and content agree on.
    :raises ImageError: an image is damaged.
    :raises BaseOpenError: the base cannot be opened.
    """
    opened: Base | None = None
    if base is not None:
        opened = open_base(base, format=format)
        stack.callback(opened.release)
    chain = stack.enter_context(DiffChain(chain_path, opened))
    if opened is None and chain.below is not None:
        below = chain.below
        if below.path is None and not below.name.startswith("nbd"):
            raise BaseOpenError(
                f"{below.image} stands on {below.name}, which cowkit cannot open: name the base (--base)"
            )
        try:
            opened = open_base(below.path or below.name, format=format or below.format)
        except BaseOpenError as error:
            if chain.missing is not None:
                raise BaseOpenError(f"{error}; {chain.missing}") from error
            raise BaseOpenError(
                f"{error}; {below.image} stands on it: name the base, if it is elsewhere (--base)"
            ) from error
        stack.callback(opened.release)
    return chain, opened
