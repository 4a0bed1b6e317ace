"""Attribution-guided decoding (AGD, arXiv 2509.26307) of whole datasets on vLLM and Ray."""

from typing import TYPE_CHECKING

from agd_vllm.version import __version__

if TYPE_CHECKING:
    from agd_vllm.pipeline.decoder import Decoder

__all__ = ["Decoder", "__version__"]


def __getattr__(name: str):
    # Ray, torch and Transformers are imported on first use of Decoder: `agd-vllm --help` does not wait for them.
    if name == "Decoder":
        from agd_vllm.pipeline.decoder import Decoder

        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
