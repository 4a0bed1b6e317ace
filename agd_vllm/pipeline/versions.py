"""Versions of what a run depends on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from agd_vllm.version import __version__

PACKAGES = ("vllm", "torch", "transformers", "lxt", "ray")


def versions() -> dict[str, str | None]:
    """Version by package, agd-vllm first; None for one that is not installed."""
    return {"agd-vllm": __version__, **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    # The CPU build of vLLM has a name of its own.
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
