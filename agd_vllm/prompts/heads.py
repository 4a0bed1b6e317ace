"""Head sets: files that name the attention heads which make a region of interest (`--roi-heads`)."""

from __future__ import annotations

from agd_vllm.input.named_once import NamedTwice, parse_json


def read_head_set(path: str, num_layers: int, num_heads: int) -> tuple[tuple[int, int], ...]:
    """The (layer, head) pairs of a JSON file {"heads": [[layer, head], ...]}, counted from 0.

    Raises ValueError with one line: no such file, no head set, an empty one, or a head that the model does not have.
    """
    try:
        with open(path) as file:
            heads = parse_json(file.read())["heads"]
        pairs = [(layer, head) for layer, head in heads]
    except OSError as error:
        raise ValueError(f"--roi-heads {path}: {error.strerror}") from error
    except NamedTwice as twice:
        raise ValueError(f"--roi-heads {path}: {twice}") from twice
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'--roi-heads {path}: no head set; it should be {{"heads": [[layer, head], ...]}}') from error
    if not pairs:
        raise ValueError(f"--roi-heads {path}: the head set is empty")
    for layer, head in pairs:
        fine = type(layer) is int and type(head) is int and 0 <= layer < num_layers and 0 <= head < num_heads
        if not fine:
            raise ValueError(
                f"--roi-heads {path}: no head [{layer}, {head}]; the model has layers 0 to {num_layers - 1} "
                f"with heads 0 to {num_heads - 1}"
            )
    return tuple(dict.fromkeys(pairs))
