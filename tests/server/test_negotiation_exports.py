from __future__ import annotations

from typing import Any

import pytest

from cowkit.errors import UsageError
from cowkit.server.exports import NEGOTIATED_FLAGS, Export
from cowkit.server.wire import TransmissionFlag


@pytest.mark.parametrize(
    "values",
    [
        {"name": "x" * 4097},
        {"name": "é" * 2049},
        {"name": "a\0b"},
        {"name": "\udc80"},
        {"description": "x" * 4097},
        {"size": -1},
        {"size": 2**63},
        {"flags": TransmissionFlag.HAS_FLAGS},
        {"flags": TransmissionFlag.SEND_DF},
        {"flags": TransmissionFlag.BLOCK_STATUS_PAYLOAD},
        {"flags": TransmissionFlag.SEND_FAST_ZERO},
        {"minimum_block": 0},
        {"minimum_block": 3},
        {"minimum_block": 131072, "preferred_block": 131072},
        {"minimum_block": 8192},
        {"preferred_block": 256},
        {"preferred_block": 5000},
        {"preferred_block": 2**32, "maximum_payload": 2**32},
        {"maximum_payload": 4095},
        {"maximum_payload": 2**32},
        {"contexts": ("allocation",)},
        {"contexts": (":allocation",)},
        {"contexts": ("base:" + "x" * 4092,)},
        {"contexts": ("base:allocation", "base:allocation")},
    ],
)
def test_an_export_that_could_not_go_on_the_wire_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Export(**{"name": "disk", "size": 4096, **values})


@pytest.mark.parametrize(
    "values",
    [
        {"name": "é" * 2048, "description": "x" * 4096},
        {"name": ""},
        {"size": 0},
        {"size": 2**63 - 1},
        {"flags": TransmissionFlag(0xFFFF) & ~NEGOTIATED_FLAGS},
        {"minimum_block": 65536, "preferred_block": 65536},
        {"preferred_block": 512, "maximum_payload": 512},
        {"preferred_block": 2**31, "maximum_payload": 2**32 - 1},
        {"contexts": ("base:allocation", "qemu:dirty-bitmap:a:b", "base:" + "x" * 4091)},
    ],
)
def test_an_export_at_the_limits_of_the_protocol_is_fine(values: dict[str, Any]) -> None:
    Export(**{"name": "disk", "size": 4096, **values})
