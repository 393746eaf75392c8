from __future__ import annotations

from tests.bases.conftest import no_leaks

__all__ = ["no_leaks"]
