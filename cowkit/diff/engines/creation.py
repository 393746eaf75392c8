"""QEMU's options for making an image, from the words that users give to the values that QMP takes.

QMP wants numbers as numbers and options within options as objects; which is which, and what there is, QEMU itself tells by
`query-qmp-schema` (docs/devel/qapi-code-gen, "Client JSON Protocol introspection"). So whatever a QEMU can write is at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cowkit.disk.sizes import parse_size
from cowkit.errors import UsageError

_TRUTH = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False, "n": False}

Json = dict[str, Any]


class _Renamed(NamedTuple):
    """What `qemu-img create -o` calls by another name than QMP, with the values of both."""

    name: str
    values: dict[str, str]


_OF_QEMU_IMG = {
    ("qcow2", "compat"): _Renamed("version", {"0.10": "v2", "v2": "v2", "1.1": "v3", "v3": "v3"}),
    ("vmdk", "compat6"): _Renamed("hwversion", {"on": "6", "off": "4"}),
    ("vdi", "static"): _Renamed("preallocation", {"on": "metadata", "off": "off"}),
}
"""By format and name, as block/qcow2.c, block/vmdk.c and block/vdi.c of QEMU translate them."""


class CreationOptions:
    """What `blockdev-create` of one QEMU takes.

    :param schema: the answer of `query-qmp-schema`.
    """

    def __init__(self, schema: Iterable[Json]) -> None:
        self._types = {each["name"]: each for each in schema}
        command = self._types[self._types["blockdev-create"]["arg-type"]]
        (options,) = (each["type"] for each in command["members"] if each["name"] == "options")
        self._variants = {each["case"]: each["type"] for each in self._types[options]["variants"]}

    @property
    def formats(self) -> list[str]:
        """The formats that it can write into a file."""
        return sorted(name for name, kind in self._variants.items() if "file" in self._members(kind))

    def has(self, format: str, option: str) -> bool:
        """Whether images of that format have that option."""
        return option in self._members(self._variants.get(format, ""))

    def check_format(self, format: str) -> None:
        """:raises UsageError: it cannot write that format into a file."""
        if format not in self.formats:
            raise UsageError(
                f"this QEMU cannot write the format {format!r} to a file: it can write {', '.join(self.formats)} and raw"
            )

    def typed(self, format: str, options: Mapping[str, str | int | bool]) -> Json:
        """The options, such as ``{"encrypt.format": "luks"}``, as the members of an object.

        :raises UsageError: there is no such option, or no such value of it.
        """
        result: Json = {}
        for key, value in options.items():
            name, what = str(key).replace("_", "-"), f"{key!r} of the format {format}"
            renamed = _OF_QEMU_IMG.get((format, name))
            if renamed is not None and name not in self._members(self._variants[format]):
                name, value = renamed.name, _translated(renamed, value, what)
            self._put(result, self._variants[format], name.split("."), value, what)
        return result

    def _put(self, into: Json, kind: str, names: list[str], value: str | int | bool, what: str) -> None:
        members = self._members(kind)
        name, *rest = names
        if name not in members:
            known = sorted(name for name in members if name not in ("file", "size"))
            raise UsageError(f"there is no image option {what}: QEMU has {', '.join(known)}")
        if rest:
            inner = into.setdefault(name, {})
            if not isinstance(inner, dict):
                raise UsageError(f"the image option {what} is given twice")
            self._put(inner, members[name], rest, value, what)
            return
        if name in into:
            raise UsageError(f"the image option {what} is given twice")
        into[name] = self._value(self._types[members[name]], value, what)

    def _value(self, kind: Json, value: str | int | bool, what: str) -> str | int | bool:
        word = str(value)
        match kind.get("json-type") or kind["meta-type"]:
            case "int":
                return parse_size(value, what=f"image option {what}")
            case "boolean":
                if isinstance(value, bool):
                    return value
                if word.lower() not in _TRUTH:
                    raise UsageError(f"the image option {what} is on or off, not {word!r}")
                return _TRUTH[word.lower()]
            case "enum":
                values = kind.get("values") or [each["name"] for each in kind["members"]]
                if word not in values:
                    raise UsageError(f"the image option {what} is none of {', '.join(values)}: {word!r}")
                return word
            case "string":
                return word
        raise UsageError(
            f"the image option {what} takes no value of its own: give its parts, each with a dot and its name behind that"
        )

    def _members(self, kind: str) -> dict[str, str]:
        """The name and type of each member of an object, those of all its variants included; none if it is no object."""
        described = self._types.get(kind, {})
        found = {each["name"]: each["type"] for each in described.get("members", []) if isinstance(each, dict)}
        if described.get("meta-type") != "object":
            return {}
        for variant in described.get("variants", []):
            found |= self._members(variant["type"])
        return found


def _translated(renamed: _Renamed, value: str | int | bool, what: str) -> str:
    word = str(value).lower()
    if word in _TRUTH and "on" in renamed.values:
        word = "on" if _TRUTH[word] else "off"
    if word not in renamed.values:
        raise UsageError(f"the image option {what} is none of {', '.join(renamed.values)}: {str(value)!r}")
    return renamed.values[word]
