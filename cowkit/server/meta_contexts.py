"""Which metadata contexts a client's queries mean ("Metadata querying" in proto.md; docs/interop/nbd.txt in QEMU).

A query is a context's whole name, or, when listing only, a wildcard: a namespace with nothing behind its colon
(``base:``, ``qemu:``), or ``qemu:dirty-bitmap:``. A wildcard selects nothing, and a query that means nothing here,
whether of an unknown namespace or not, is ignored. Contexts come in the order in which the export offers them, each
once, however often asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from cowkit.server.wire import DIRTY_BITMAP


def listed(offered: Sequence[str], queries: Sequence[str]) -> list[str]:
    """What LIST_META_CONTEXT with ``queries`` lists of the contexts ``offered``; without any query, all of them."""
    if not queries:
        return list(offered)
    names = set(queries)
    wildcards = tuple(query for query in names if _is_wildcard(query))
    return [context for context in offered if context in names or context.startswith(wildcards)]


def selected(offered: Sequence[str], queries: Sequence[str]) -> list[tuple[int, str]]:
    """What SET_META_CONTEXT with ``queries`` selects of the contexts ``offered``, with ids; without any query, nothing.

    The id is the context's place among those offered: unique, and the same as long as the export offers the same.
    """
    names = set(queries)
    return [(place, context) for place, context in enumerate(offered) if context in names]


def _is_wildcard(query: str) -> bool:
    return query == DIRTY_BITMAP or query.find(":") == len(query) - 1
