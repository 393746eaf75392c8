"""Arguments of a type that cannot be: said where they are given, in one line, and not by whatever meets them later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cowkit.errors import UsageError


def check_text(value: object, what: str) -> None:
    """See that ``value`` is a string.

    :param what: what it is, for the error message.
    :raises UsageError: it is none.
    """
    if not isinstance(value, str):
        raise UsageError(f"{what} is a text, not {value!r}")


def check_number(value: object, what: str) -> None:
    """See that ``value`` is a whole number.

    :raises UsageError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{what} is a whole number, not {value!r}")


def check_flag(value: object, what: str) -> None:
    """See that ``value`` is a flag, or what equals one, as 0 and 1 do: ``"no"`` is no False.

    :raises UsageError: it is none.
    """
    if value is not True and value is not False and not (isinstance(value, int) and value in (0, 1)):
        raise UsageError(f"{what} is True or False, not {value!r}")


def check_function(value: object, what: str) -> None:
    """See that ``value`` can be called.

    :raises UsageError: it cannot.
    """
    if not callable(value):
        raise UsageError(f"{what} is a function, not {value!r}")


def check_names(given: Iterable[object], known: Sequence[str], what: str) -> None:
    """See that all that is ``given`` by name is ``known``.

    :param what: what takes them, for the error message.
    :raises UsageError: something is not; the message names what there is.
    """
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        raise UsageError(f"{what} has no argument {', '.join(unknown)}: it has {', '.join(known)}")
