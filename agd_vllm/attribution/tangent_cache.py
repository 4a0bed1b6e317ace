"""The tangent cache: for each sequence keys and values with their tangents, in blocks of one pool.

It is to the tangent pass what a paged KV cache is to decoding. Nothing is copied when a sequence grows; sequences that
begin with the same tokens and the same region weights on them share the blocks of that prefix.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from agd_vllm.attribution.block_pool import BLOCK_TOKENS, BlockPool, CacheShape, blocks_for
from agd_vllm.attribution.regions import heads_by_layer, token_weights
from agd_vllm.records import Roi


@dataclass(eq=False, slots=True)
class CachedSequence:
    """Tokens of one sequence, its region, and the blocks (int32) that hold keys and values of the first `length`.

    `weights`: the region's, float32, of the tokens up to the region's end.
    """

    roi: Roi
    tokens: list[int] = field(default_factory=list)
    length: int = 0
    blocks: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    weights: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.weights = token_weights(self.roi, 0, max((span.end for span in self.roi.spans), default=0)).numpy()


def prefix_digests(tokens: Sequence[int], roi: Roi) -> list[bytes]:
    """A digest for each whole block of `tokens`: of all tokens and region weights up to its end, and of the heads."""
    end = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
    content = np.array(tokens[:end], np.int64)
    weights = token_weights(roi, 0, end).numpy()
    digest = repr(heads_by_layer(roi)).encode()
    digests = []
    for start in range(0, end, BLOCK_TOKENS):
        block = slice(start, start + BLOCK_TOKENS)
        digest = hashlib.blake2b(digest + content[block].tobytes() + weights[block].tobytes(), digest_size=16).digest()
        digests.append(digest)
    return digests


class TangentCache:
    """Cached sequences by name, the least recently used first to go; finished ones stay as donors while there is room.

    All of them together have the blocks that `max_bytes` suffice for.
    """

    def __init__(self, shape: CacheShape, max_bytes: int):
        self.shape = shape
        self.pool = BlockPool(shape, max_bytes // shape.block_bytes)
        self._active: OrderedDict[str, CachedSequence] = OrderedDict()
        self._finished: OrderedDict[int, CachedSequence] = OrderedDict()
        self._donors: dict[bytes, list[CachedSequence]] = {}
        self._indexed: dict[int, list[bytes]] = {}

    def __len__(self) -> int:
        """Sequences that are not finished."""
        return len(self._active)

    @property
    def num_bytes(self) -> int:
        """Of the blocks that are held."""
        return (self.pool.num_blocks - self.pool.num_free) * self.shape.block_bytes

    def get(self, name: str) -> CachedSequence | None:
        """The sequence of that name, now the most recently used; None if unknown, finished or evicted."""
        sequence = self._active.get(name)
        if sequence is not None:
            self._active.move_to_end(name)
        return sequence

    def add(self, name: str, sequence: CachedSequence) -> None:
        """Hold an empty sequence under `name`, instead of any that was there."""
        self.discard(name)
        self._active[name] = sequence

    def discard(self, name: str) -> None:
        """Forget the sequence of that name, if there is one."""
        sequence = self._active.pop(name, None)
        if sequence is not None:
            self._drop(sequence)

    def release(self, name: str) -> None:
        """The sequence of that name is finished: from now on it is only a donor of prefixes."""
        sequence = self._active.pop(name, None)
        if sequence is not None:
            self._finished[id(sequence)] = sequence

    def share(self, sequence: CachedSequence, donor: CachedSequence, length: int) -> None:
        """An empty sequence takes over the first `length` computed tokens of `donor`, which fill whole blocks."""
        sequence.blocks = donor.blocks[: length // BLOCK_TOKENS].copy()
        sequence.length = length
        self.pool.share(sequence.blocks)

    def grow(self, sequence: CachedSequence, tokens: int, pinned: Iterable[CachedSequence]) -> None:
        """Blocks for `tokens`, whose computed ones it keeps, evicting others but none of `pinned` for them.

        The block that its next token goes to becomes its own: if others hold it, too, it is copied first. Raises
        MemoryError where there is no room beside those pinned.
        """
        used = sequence.length // BLOCK_TOKENS
        cut = sequence.length % BLOCK_TOKENS != 0 and self.pool.is_shared(sequence.blocks[used])
        missing = blocks_for(tokens) - len(sequence.blocks) + cut
        if missing <= 0:
            return
        self.evict(missing, pinned)
        blocks = self.pool.take(missing)
        if cut:
            own, shared = blocks[:1], sequence.blocks[used : used + 1].copy()
            self.pool.copy(shared[0], own[0])
            self.pool.give_back(shared)
            sequence.blocks[used], blocks = own[0], blocks[1:]
        sequence.blocks = np.concatenate((sequence.blocks, blocks))

    def evict(self, num_blocks: int, pinned: Iterable[CachedSequence] = ()) -> None:
        """Drop finished sequences, then the least recently used, until so many blocks are free or none is left."""
        if self.pool.num_free >= num_blocks:
            return
        keep = {id(sequence) for sequence in pinned}
        for held in (self._finished, self._active):
            for name in list(held):
                if self.pool.num_free >= num_blocks:
                    return
                if id(held[name]) not in keep:
                    self._drop(held.pop(name))

    def index(self, sequence: CachedSequence, digests: Sequence[bytes]) -> None:
        """Offer what is computed of `sequence` to others, under the `prefix_digests` of its tokens."""
        self._unindex(sequence)
        self._indexed[id(sequence)] = list(digests[: sequence.length // BLOCK_TOKENS])
        for digest in self._indexed[id(sequence)]:
            self._donors.setdefault(digest, []).append(sequence)

    def donor(self, digests: Sequence[bytes]) -> tuple[CachedSequence | None, int]:
        """A cached sequence that shares the longest prefix with these digests, and the prefix's length in tokens."""
        for blocks in range(len(digests), 0, -1):
            for sequence in self._donors.get(digests[blocks - 1], ()):
                if id(sequence) in self._finished:
                    self._finished.move_to_end(id(sequence))
                return sequence, blocks * BLOCK_TOKENS
        return None, 0

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Forget what is computed of `sequence` beyond `length` tokens, and give back the blocks beyond."""
        sequence.length = min(sequence.length, length)
        self._unindex(sequence, keep=sequence.length // BLOCK_TOKENS)
        kept = blocks_for(sequence.length)
        if kept < len(sequence.blocks):
            self.pool.give_back(sequence.blocks[kept:])
            sequence.blocks = sequence.blocks[:kept]

    def _drop(self, sequence: CachedSequence) -> None:
        self._unindex(sequence)
        self.pool.give_back(sequence.blocks)
        sequence.blocks = sequence.blocks[:0]

    def _unindex(self, sequence: CachedSequence, keep: int = 0) -> None:
        digests = self._indexed.pop(id(sequence), [])
        for digest in digests[keep:]:
            donors = self._donors[digest]
            donors.remove(sequence)
            if not donors:
                del self._donors[digest]
        if digests[:keep]:
            self._indexed[id(sequence)] = digests[:keep]
