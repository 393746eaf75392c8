"""Text for an output in whatever encoding: nothing that is printed may fail for a name or a picture in it."""

from __future__ import annotations

import codecs

ENCODABLE = "cowkit-encodable"
"""The handler of errors, for streams: names of files are bytes, and come out as they went in; of others, what has no form becomes ``?``."""


def _encodable(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    numbers = map(ord, error.object[error.start : error.end])
    return bytes(number - 0xDC00 if 0xDC80 <= number <= 0xDCFF else ord("?") for number in numbers), error.end


codecs.register_error(ENCODABLE, _encodable)
