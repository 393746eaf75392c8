"""Users' words become what QMP takes, by what a QEMU says of itself."""

from __future__ import annotations

from typing import Any

import pytest

from cowkit.diff.engines.creation import CreationOptions
from cowkit.errors import UsageError

SCHEMA: list[dict[str, Any]] = [
    {"name": "blockdev-create", "meta-type": "command", "arg-type": "1"},
    {
        "name": "1",
        "meta-type": "object",
        "members": [{"name": "job-id", "type": "str"}, {"name": "options", "type": "2"}],
    },
    {
        "name": "2",
        "meta-type": "object",
        "tag": "driver",
        "members": [{"name": "driver", "type": "drivers"}],
        "variants": [{"case": "new", "type": "3"}, {"case": "remote", "type": "4"}, {"case": "none", "type": "5"}],
    },
    {
        "name": "3",
        "meta-type": "object",
        "members": [
            {"name": "file", "type": "ref"},
            {"name": "size", "type": "int"},
            {"name": "grain-size", "type": "int"},
            {"name": "hwversion", "type": "str"},
            {"name": "eager", "type": "bool"},
            {"name": "old-enum", "type": "old"},
            {"name": "new-enum", "type": "new"},
            {"name": "encrypt", "type": "6"},
        ],
    },
    {"name": "4", "meta-type": "object", "members": [{"name": "location", "type": "5"}]},
    {"name": "5", "meta-type": "object", "members": []},
    {
        "name": "6",
        "meta-type": "object",
        "tag": "format",
        "members": [{"name": "format", "type": "old"}],
        "variants": [{"case": "a", "type": "7"}],
    },
    {"name": "7", "meta-type": "object", "members": [{"name": "iter-time", "type": "int"}]},
    {"name": "old", "meta-type": "enum", "values": ["a", "b"]},
    {"name": "new", "meta-type": "enum", "members": [{"name": "c"}, {"name": "d"}]},
    {"name": "int", "meta-type": "builtin", "json-type": "int"},
    {"name": "str", "meta-type": "builtin", "json-type": "string"},
    {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
    {"name": "ref", "meta-type": "alternate"},
]


@pytest.fixture
def options() -> CreationOptions:
    return CreationOptions(SCHEMA)


def test_values_get_the_types_that_qemu_wants(options: CreationOptions) -> None:
    asked: dict[str, str | int | bool] = {
        "grain_size": "64K",
        "hwversion": "6",
        "eager": "off",
        "old-enum": "a",
        "new_enum": "d",
        "encrypt.format": "a",
        "encrypt.iter-time": 10,
    }
    assert options.typed("new", asked) == {
        "grain-size": 65536,
        "hwversion": "6",
        "eager": False,
        "old-enum": "a",
        "new-enum": "d",
        "encrypt": {"format": "a", "iter-time": 10},
    }


def test_formats_are_those_that_go_into_a_file(options: CreationOptions) -> None:
    assert options.formats == ["new"]
    options.check_format("new")
    for other in ("remote", "none", "unheard of"):
        with pytest.raises(UsageError, match="it can write new and raw"):
            options.check_format(other)


def test_what_it_has_is_asked_by_name(options: CreationOptions) -> None:
    assert options.has("new", "encrypt")
    assert not options.has("new", "key-secret")
    assert not options.has("unheard of", "encrypt")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"colour": "red"}, "there is no image option 'colour' of the format new: QEMU has eager, "),
        (
            {"encrypt.colour": "red"},
            "there is no image option 'encrypt.colour' of the format new: QEMU has format, iter-time",
        ),
        ({"hwversion.x": "1"}, "there is no image option"),
        ({"encrypt": "a"}, "takes no value of its own"),
        ({"new-enum": "a"}, "is none of c, d: 'a'"),
        ({"eager": "2"}, "is on or off, not '2'"),
        ({"eager": "on", "Eager": "on"}, "there is no image option 'Eager' of the format new"),
        ({"grain-size": 1, "grain_size": 2}, "is given twice"),
        ({"": "1"}, "there is no image option"),
    ],
)
def test_what_it_does_not_have_is_said(
    options: CreationOptions, asked: dict[str, str | int | bool], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        options.typed("new", asked)
    assert words in str(caught.value)
