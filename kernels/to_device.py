"""Small tables on their way to where they are used."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

ALIGNMENT = 16


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`host` on `device`; to a GPU from pinned memory, so that the host does not wait for it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def packed_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Of contiguous `arrays` one behind the other."""
    return sum(map(_aligned, arrays.values()))


def pack(arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
    """Contiguous `arrays` as bytes."""
    host = torch.empty(packed_bytes(arrays), dtype=torch.uint8)
    for name, place in _places(arrays).items():
        host.numpy()[place] = arrays[name].reshape(-1).view(np.uint8)
    return host


def unpack(packed: torch.Tensor, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Views of what `pack` made of `arrays`, wherever that lies now."""
    return {
        name: packed[place].view(torch.from_numpy(arrays[name][:0]).dtype).view(arrays[name].shape)
        for name, place in _places(arrays).items()
    }


def _places(arrays: Mapping[str, np.ndarray]) -> dict[str, slice]:
    """Where each lies, in bytes, when they are packed one behind the other."""
    found, size = {}, 0
    for name, array in arrays.items():
        found[name] = slice(size, size + array.nbytes)
        size += _aligned(array)
    return found


def _aligned(array: np.ndarray) -> int:
    """Its bytes and what follows them, so that the next one begins at a multiple of ALIGNMENT."""
    return -(-array.nbytes // ALIGNMENT) * ALIGNMENT
