"""The file of steering vectors: safetensors, `layer.<i>` [d] float32, with method, model and digest as metadata."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import fsspec
import safetensors
import torch
from safetensors.torch import load, save

from agd_vllm.input.files import unusable
from agd_vllm.input.named_once import NamedTwice, parse_json
from agd_vllm.output.storage import place_of_file

_NAME = re.compile(r"layer\.(0|[1-9][0-9]*)")
METADATA = ("method", "model", "digest")


@dataclass(frozen=True, slots=True)
class SteeringVectors:
    """`layers`: number of a decoder layer, from 0, to the vector [d], float32, for the stream that leaves it.

    `method` and `model` say what made them and of which model, as it was named; `model_digest` is that of
    `models.digest.model_digest`, None in a file that was made without one.
    """

    layers: Mapping[int, torch.Tensor]
    method: str
    model: str
    model_digest: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of names and values (little-endian float32), layer by layer, in hexadecimal."""
        found = hashlib.sha256()
        for number in sorted(self.layers):
            values = self.layers[number].contiguous().numpy().astype("<f4").tobytes()
            found.update(f"layer.{number}:{len(values)}:".encode() + values)
        return found.hexdigest()


def check_place(path: str) -> None:
    """Makes the folder of a file to write. Raises OutputFailed where it cannot, ValueError where the file is one."""
    place_of_file(path)[0].make_folder("")


def write_vectors(path: str, vectors: SteeringVectors) -> None:
    """Puts the file into place at once. Raises OutputFailed, in one line."""
    place, name = place_of_file(path)
    named = {f"layer.{number}": vector.contiguous() for number, vector in sorted(vectors.layers.items())}
    metadata = {"method": vectors.method, "model": vectors.model, "digest": vectors.digest}
    if vectors.model_digest is not None:
        metadata["model_digest"] = vectors.model_digest
    place.write(name, save(named, metadata))


def read_vectors(path: str) -> SteeringVectors:
    """Reads a path or URL. Raises ValueError (InputUnusable where it cannot be opened), in one line, for what is no
    file of steering vectors, or a damaged one."""
    with unusable(path):
        fs, name = fsspec.url_to_fs(path)
        data = fs.cat_file(name)
    try:
        tensors = load(data)
        metadata = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except NamedTwice as twice:
        raise _unreadable(path, f"{twice}") from twice
    except (safetensors.SafetensorError, ValueError) as error:
        raise _unreadable(path, "not a safetensors file") from error
    for key in METADATA:
        if key not in metadata:
            raise _unreadable(path, f"its metadata names no {key}")
    layers = {}
    for name, vector in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise _unreadable(path, f"{name!r} is no layer.<i>")
        if vector.dtype != torch.float32 or vector.ndim != 1:
            shown = f"{str(vector.dtype).removeprefix('torch.')} {list(vector.shape)}"
            raise _unreadable(path, f"{name} is {shown}, and should be float32 [d]")
        if not vector.isfinite().all():
            raise _unreadable(path, f"{name} holds numbers that are not finite")
        layers[int(match[1])] = vector
    if not layers:
        raise _unreadable(path, "it holds no layer")
    # A safetensors file is read in no order of its own.
    of_model = (metadata["method"], metadata["model"], metadata.get("model_digest"))
    vectors = SteeringVectors(dict(sorted(layers.items())), *of_model)
    if vectors.digest != metadata["digest"]:
        raise _unreadable(path, "its digest is not that of its vectors, so it is damaged")
    return vectors


def absolute(path: str) -> str:
    """The path or URL for a process that may stand in another folder."""
    return path if "://" in path else str(Path(path).absolute())


def _unreadable(path: str, reason: str) -> ValueError:
    return ValueError(f"--steering {path}: {reason}; give a file that `agd-vllm vectors` has written")
