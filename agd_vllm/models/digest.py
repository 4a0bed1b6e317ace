"""What tells one model from another without reading it whole: folders move, and a file may change under its name."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from transformers import PretrainedConfig

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Of each weight file: this many pieces, evenly spread from its first byte to its last, of so many bytes.
PIECES, PIECE_BYTES = 16, 64 << 10


def model_digest(path: str, config: PretrainedConfig) -> str | None:
    """The same for two folders of one model, another one for other weights or another config.json.

    Of a folder: config.json without `_name_or_path`, and of each weight file its size and PIECES pieces. Of a model of
    the hub: the commit of its files. None where neither is there to be read.
    """
    if not os.path.isdir(path):
        commit = getattr(config, "_commit_hash", None)
        return f"commit {commit}" if commit else None
    digest = hashlib.blake2b(digest_size=16)
    described = json.loads((Path(path) / "config.json").read_bytes())
    described.pop("_name_or_path", None)
    digest.update(json.dumps(described, sort_keys=True).encode())
    for file in sorted(file for file in Path(path).iterdir() if file.suffix in WEIGHTS):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as weights:
            for piece in range(PIECES):
                weights.seek(max(0, size - PIECE_BYTES) * piece // (PIECES - 1))
                digest.update(weights.read(PIECE_BYTES))
    return digest.hexdigest()
