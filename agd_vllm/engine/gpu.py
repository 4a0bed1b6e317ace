"""Whether an engine fits what there is of a GPU, before it loads its weights."""

from __future__ import annotations

from typing import Any


def check_gpu(config: Any, planes: int) -> None:
    """Raises RuntimeError with one line where what vLLM may take of a GPU, by its `config`, is too little.

    `planes`: vectors of each head that its KV cache has for a token.
    """
    from vllm.platforms import current_platform

    from agd_vllm.models.architectures import FAMILIES
    from agd_vllm.models.gpu_memory import check_room, engine_needs

    model, cache = config.model_config, config.cache_config
    known = not FAMILIES.keys().isdisjoint(model.hf_config.architectures or ())
    if not known or model.quantization is not None or cache.kv_cache_memory_bytes is not None:
        return  # what it takes then only vLLM knows
    needs = engine_needs(model.hf_config, model.dtype, model.max_model_len, config.parallel_config.world_size, planes)
    # Not by torch, which would take memory of the GPU for this process, too.
    total = current_platform.get_device_total_memory()
    share = cache.gpu_memory_utilization
    remedies = (
        "take a lower --max-model-len, fewer --engines or --attribution-workers, a higher --engine-arg "
        "gpu_memory_utilization or tensor_parallel_size, or more GPUs"
    )
    check_room("an engine", needs, int(share * total), total, remedies)
