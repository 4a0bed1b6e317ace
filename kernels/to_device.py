"""Small tables on their way to where they are used."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

ALIGNMENT = 16


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`host` on `device`; to a GPU from pinned memory, so that the host does not wait for it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def arrays_to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Contiguous `arrays` on `device`, in one copy; on a CPU they are not copied."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    places, size = {}, 0
    for name, array in arrays.items():
        places[name] = slice(size, size + array.nbytes)
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    host = torch.empty(size, dtype=torch.uint8)
    for name, array in arrays.items():
        host.numpy()[places[name]] = array.reshape(-1).view(np.uint8)
    there = to_device(host, device)
    return {
        name: there[places[name]].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for name, array in arrays.items()
    }
