"""Which ids a run has seen."""

from __future__ import annotations

import hashlib


class IdSet:
    """A set of ids that remembers digests of 16 bytes, so that its size does not depend on the ids' lengths."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, id: str) -> bool:
        """Adds an id; False where it was there already."""
        before = len(self._digests)
        self._digests.add(self._digest(id))
        return len(self._digests) > before

    def __contains__(self, id: str) -> bool:
        return self._digest(id) in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    @staticmethod
    def _digest(id: str) -> bytes:
        return hashlib.blake2b(id.encode(), digest_size=16).digest()
