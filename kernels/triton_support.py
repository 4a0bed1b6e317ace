"""Whether Triton's kernels can be used here: each has a twin in PyTorch that is used where they cannot."""

from __future__ import annotations

import functools
import logging
import re

MINIMUM = (3, 4)

log = logging.getLogger("agd_vllm")


@functools.cache
def available() -> bool:
    """To be asked where there is an NVIDIA GPU. Warns once where Triton is missing or too old."""
    try:
        import triton
    except ImportError as error:
        return _without(f"{error}")
    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < MINIMUM:
        return _without(f"Triton {triton.__version__} is too old")
    return True


def interpreted() -> bool:
    """Whether the kernels run on the CPU, one program after another (TRITON_INTERPRET=1: for tests only)."""
    import triton

    return triton.knobs.runtime.interpret


def _without(reason: str) -> bool:
    needed = ".".join(map(str, MINIMUM))
    log.warning("the GPU is used without kernels of its own, which is slower: %s (needs triton>=%s)", reason, needed)
    return False
