"""The tangent cache: for each sequence keys and values with their tangents, kept within a byte budget.

It is to the tangent pass what a KV cache is to decoding. A sequence owns one growing buffer; sequences that begin with
the same tokens and the same region weights on them compute that prefix once, the later ones copy it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from agd_vllm.attribution.regions import heads_by_layer, token_weights
from agd_vllm.records import Roi

STREAMS = 2
"""The value and its tangent."""

PREFIX_BLOCK = 16
"""Prefixes are shared in whole blocks of this many tokens."""

HEADROOM = 64
"""Tokens of room beyond those known when a buffer is made or grows: generated tokens arrive a few at a time."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Layers, key-value heads, head size, and whether keys have tangents (CP-LRP's have none)."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    key_tangents: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def key_streams(self) -> int:
        return STREAMS if self.key_tangents else 1

    @property
    def token_bytes(self) -> int:
        streams = self.key_streams + STREAMS
        return self.num_layers * self.num_kv_heads * self.head_dim * streams * self.dtype.itemsize


@dataclass(eq=False, slots=True)
class CachedSequence:
    """Tokens of one sequence, its region, and keys and values [layers, K, streams, capacity, D] of the first `length`.

    Of `tokens` the first `length` are computed. Stream 0 is the value, stream 1 the tangent.
    """

    shape: CacheShape
    roi: Roi
    tokens: list[int] = field(default_factory=list)
    length: int = 0
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    heads: dict[int, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.heads = heads_by_layer(self.roi)

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[3]

    @property
    def num_bytes(self) -> int:
        return self.capacity * self.shape.token_bytes

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens; what is computed moves along."""
        if capacity <= self.capacity:
            return
        shape, old_keys, old_values = self.shape, self.keys, self.values

        def buffer(streams: int) -> torch.Tensor:
            size = (shape.num_layers, shape.num_kv_heads, streams, capacity, shape.head_dim)
            return torch.empty(size, dtype=shape.dtype, device=shape.device)

        self.keys, self.values = buffer(shape.key_streams), buffer(STREAMS)
        if self.length:
            self.keys[:, :, :, : self.length] = old_keys[:, :, :, : self.length]
            self.values[:, :, :, : self.length] = old_values[:, :, :, : self.length]

    def copy_prefix(self, donor: CachedSequence, length: int) -> None:
        """Take over the first `length` computed tokens of `donor`; there must be room."""
        self.keys[:, :, :, :length] = donor.keys[:, :, :, :length]
        self.values[:, :, :, :length] = donor.values[:, :, :, :length]
        self.length = length


def prefix_digests(tokens: Sequence[int], roi: Roi) -> list[bytes]:
    """A digest for each whole block of `tokens`: of all tokens and region weights up to its end, and of the heads."""
    end = len(tokens) // PREFIX_BLOCK * PREFIX_BLOCK
    content = torch.tensor(tokens[:end]).numpy()
    weights = token_weights(roi, 0, end).numpy()
    digest = repr(heads_by_layer(roi)).encode()
    digests = []
    for start in range(0, end, PREFIX_BLOCK):
        block = slice(start, start + PREFIX_BLOCK)
        digest = hashlib.blake2b(digest + content[block].tobytes() + weights[block].tobytes(), digest_size=16).digest()
        digests.append(digest)
    return digests


class TangentCache:
    """Cached sequences by name, the least recently used first to go; finished ones stay as donors while there is room.

    `max_bytes` bounds what stays between calls. A call may pin more: its sequences are never evicted under it.
    """

    def __init__(self, shape: CacheShape, max_bytes: int):
        self.shape = shape
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._active: OrderedDict[str, CachedSequence] = OrderedDict()
        self._finished: OrderedDict[int, CachedSequence] = OrderedDict()
        self._donors: dict[bytes, list[CachedSequence]] = {}
        self._indexed: dict[int, list[bytes]] = {}

    def __len__(self) -> int:
        """Sequences that are not finished."""
        return len(self._active)

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

    def grow(self, sequence: CachedSequence, tokens: int, pinned: Iterable[CachedSequence]) -> None:
        """Make room for `tokens` in `sequence`, evicting others but none of `pinned` for it."""
        if tokens <= sequence.capacity:
            return
        capacity = max(tokens + HEADROOM, sequence.capacity * 3 // 2)
        before = sequence.num_bytes
        self.evict(capacity * self.shape.token_bytes - before, pinned)
        sequence.reserve(capacity)
        self.num_bytes += sequence.num_bytes - before

    def evict(self, extra_bytes: int, pinned: Iterable[CachedSequence] = ()) -> None:
        """Drop finished sequences, then the least recently used, until `extra_bytes` more fit or none is left."""
        keep = {id(sequence) for sequence in pinned}
        for held in (self._finished, self._active):
            for name in list(held):
                if self.num_bytes + extra_bytes <= self.max_bytes:
                    return
                if id(held[name]) not in keep:
                    self._drop(held.pop(name))

    def index(self, sequence: CachedSequence, digests: Sequence[bytes]) -> None:
        """Offer what is computed of `sequence` to others, under the `prefix_digests` of its tokens."""
        self._unindex(sequence)
        self._indexed[id(sequence)] = list(digests[: sequence.length // PREFIX_BLOCK])
        for digest in self._indexed[id(sequence)]:
            self._donors.setdefault(digest, []).append(sequence)

    def donor(self, digests: Sequence[bytes]) -> tuple[CachedSequence | None, int]:
        """A cached sequence that shares the longest prefix with these digests, and the prefix's length in tokens."""
        for blocks in range(len(digests), 0, -1):
            for sequence in self._donors.get(digests[blocks - 1], ()):
                if id(sequence) in self._finished:
                    self._finished.move_to_end(id(sequence))
                return sequence, blocks * PREFIX_BLOCK
        return None, 0

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Forget what is computed of `sequence` beyond `length` tokens."""
        sequence.length = min(sequence.length, length)
        self._unindex(sequence, keep=sequence.length // PREFIX_BLOCK)

    def _drop(self, sequence: CachedSequence) -> None:
        self._unindex(sequence)
        self.num_bytes -= sequence.num_bytes

    def _unindex(self, sequence: CachedSequence, keep: int = 0) -> None:
        digests = self._indexed.pop(id(sequence), [])
        for digest in digests[keep:]:
            donors = self._donors[digest]
            donors.remove(sequence)
            if not donors:
                del self._donors[digest]
        if digests[:keep]:
            self._indexed[id(sequence)] = digests[:keep]
