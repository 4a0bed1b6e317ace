"""Which layers DoLa contrasts with."""

from __future__ import annotations

BUCKETS = ("low", "high")
# Of deeper models the published implementations take the first or last 20 layers as they come.
DEEP, OF_DEEP = 40, 20


def names_layers(layers: object) -> bool:
    """Whether `layers` is a bucket or numbers of layers: I,J,... or I+J+..."""
    return isinstance(layers, str) and (layers in BUCKETS or all(part.isdecimal() for part in _parts(layers)))


def candidate_layers(layers: str, num_layers: int, tied: bool) -> list[int]:
    """The numbers of the candidate layers, ascending: 0 is the embeddings, i the stream after layer i.

    `low` and `high` are every other layer of either half; where embeddings and unembedding are `tied` the embeddings
    predict the token itself, and `low` begins at 2 (as Transformers has it). Raises ValueError, in one line.
    """
    if layers in BUCKETS:
        low = layers == "low"
        if num_layers > DEEP:
            return list(range(2 if tied else 0, OF_DEEP, 2) if low else range(num_layers - OF_DEEP, num_layers, 2))
        half = num_layers // 2
        start = 2 if tied else 0
        if not low:
            return list(range(half, num_layers, 2))
        if start > half:
            raise ValueError(f"dola_layers low: a model of {num_layers} layers has none; name layers, or take high")
        return [start] if start == half else list(range(start, half, 2))
    found = sorted({int(part) for part in _parts(layers)})
    if found[-1] >= num_layers:
        raise ValueError(f"dola_layers: layer {found[-1]} is not before the last; the model has {num_layers} layers")
    return found


def _parts(layers: str) -> list[str]:
    return layers.replace("+", ",").split(",")
