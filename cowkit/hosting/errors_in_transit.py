"""Exceptions on their way from the host: the same type, message, attributes and causes at the other end."""

from __future__ import annotations

import pickle
import traceback
from typing import Any, NamedTuple

from cowkit.errors import CowkitError


class ErrorInTransit(NamedTuple):
    """An exception in parts that can be pickled."""

    error: BaseException | None
    """One that is not of cowkit's own: pickle knows how."""
    kind: type[CowkitError] | None
    """One of cowkit's own, which may be made from other arguments than those that it keeps."""
    arguments: tuple[Any, ...]
    attributes: dict[str, Any]
    trace: str | None
    """Where it was raised, for what is no error of cowkit's own and so a mistake somewhere."""
    cause: ErrorInTransit | None


def dismantled(error: BaseException, *, traced: bool = True) -> ErrorInTransit:
    """``error``, ready to be sent.

    :param traced: send where it was raised along, unless it is an error of cowkit's own.
    """
    cause = None if error.__cause__ is None else dismantled(error.__cause__, traced=False)
    if isinstance(error, CowkitError):
        return ErrorInTransit(None, type(error), error.args, dict(vars(error)), None, cause)
    trace = "".join(traceback.format_exception(error)).rstrip() if traced else None
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - what was made in this line
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")  # it cannot travel, but its words can
    return ErrorInTransit(error, None, (), {}, trace, cause)


def reassembled(parts: ErrorInTransit) -> BaseException:
    """The exception that was sent."""
    error = parts.error
    if error is None:
        assert parts.kind is not None
        error = parts.kind.__new__(parts.kind, *parts.arguments)
        error.args = parts.arguments
        vars(error).update(parts.attributes)
    if parts.trace is not None:
        error.add_note(f"in the host process of the disk:\n{parts.trace}")
    error.__cause__ = None if parts.cause is None else reassembled(parts.cause)
    return error
