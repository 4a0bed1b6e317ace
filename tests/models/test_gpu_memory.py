"""What a model needs of a GPU, and the line that says how much is missing; the GPU itself is made up."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, GPT2Config
from vllm.platforms import current_platform

from agd_vllm.attribution import worker as worker_module
from agd_vllm.attribution.block_pool import BLOCK_TOKENS
from agd_vllm.attribution.static_pass import SIZES
from agd_vllm.attribution.worker import AttributionSettings, AttributionWorker
from agd_vllm.engine.gpu import check_gpu
from agd_vllm.inline.arguments import cache_planes
from agd_vllm.models.gpu_memory import (
    GIB,
    KEYS_AND_VALUES,
    LEAST_CACHE_BYTES,
    check_room,
    engine_needs,
    weight_bytes,
    worker_needs,
)
from benchmarks.random_model import SHAPES

LLAMA_8B = SHAPES["llama-3.1-8b"]


def test_weights_are_counted_without_being_made():
    assert weight_bytes(LLAMA_8B, torch.bfloat16) == 2 * 8_030_261_248
    assert weight_bytes(LLAMA_8B, torch.float32) == 4 * 8_030_261_248


def test_an_8b_model_fits_one_card_for_engine_and_worker_or_two():
    """bfloat16, halves of a card: 80 GiB are enough, 24 GiB are not; a card of its own of 24 GiB is."""
    worker = sum(worker_needs(LLAMA_8B, torch.bfloat16, SIZES, 8192, BLOCK_TOKENS).values())
    engine = sum(engine_needs(LLAMA_8B, torch.bfloat16, 8192, 1).values())
    assert 15 * GIB < worker < 17 * GIB < engine + GIB
    assert 16 * GIB < engine < 17 * GIB < 0.45 * 80 * GIB
    assert 24 * GIB / 2 < worker + LEAST_CACHE_BYTES < 24 * GIB
    for rule, more in (("attnlrp", GIB), ("cplrp", GIB // 2)):
        with_tangents = engine_needs(LLAMA_8B, torch.bfloat16, 8192, 1, cache_planes(rule))
        assert sum(with_tangents.values()) - engine == more
    shared_out = sum(engine_needs(LLAMA_8B, torch.bfloat16, 8192, 2).values())
    assert shared_out < 0.55 * engine


def test_the_line_says_what_is_missing():
    check_room("an engine", {"weights": 10 * GIB}, 10 * GIB, 24 * GIB, "take less")
    with pytest.raises(RuntimeError) as error:
        check_room("an engine", {"weights": 10 * GIB, "cache": GIB // 2}, 9 * GIB, 24 * GIB, "take less")
    assert str(error.value) == (
        "an engine needs 10.5 GiB of GPU memory (weights 10.0, cache 0.5) and has 9.0 of the GPU's 24.0 GiB: "
        "1.5 GiB are missing; take less"
    )


@pytest.fixture
def gpu(monkeypatch):
    """Makes up a GPU of so many bytes, of which so many are free."""

    def make(free: int, total: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, total))
        properties = type("Properties", (), {"total_memory": total})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
        monkeypatch.setattr(type(current_platform), "get_device_total_memory", lambda *_: total)

    return make


@pytest.mark.parametrize(("free", "hint"), [(2 * GIB, False), (GIB // 2, True)])
def test_a_worker_says_so_before_it_loads_its_model(smollm2, gpu, free, hint):
    gpu(free, 2 * GIB)
    settings = AttributionSettings("forward", "attnlrp", "float32", gpu_share=0.5)
    with pytest.raises(RuntimeError, match=r"an attribution worker needs 2\.\d GiB .* are missing") as error:
        AttributionWorker(str(smollm2), None, False, settings)
    assert "--attribution-dtype bfloat16" in str(error.value) and "\n" not in str(error.value)
    assert ("gpu_memory_utilization" in str(error.value)) == hint


def test_a_workers_cache_is_what_its_share_leaves(smollm2, gpu):
    """Its share of the GPU, or what others left of it, and a gibibyte at least."""
    config = AutoConfig.from_pretrained(smollm2)
    beside = sum(worker_needs(config, torch.float32, SIZES, 4096, BLOCK_TOKENS).values())
    settings = AttributionSettings("forward", "attnlrp", "float32", gpu_share=0.5, max_model_len=4096)

    def cache(free: int) -> int:
        gpu(free * GIB, 40 * GIB)
        return worker_module._cache_bytes(str(smollm2), None, False, settings)

    assert [cache(40), cache(20), cache(10)] == [int(0.9 * (room * GIB - beside)) for room in (20, 20, 10)]
    with pytest.raises(RuntimeError, match="least tangent cache"):
        cache(1)


def test_models_that_attribution_cannot_read_are_left_to_vllm(gpu):
    gpu(GIB, GIB)
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=GPT2Config(architectures=["GPT2LMHeadModel"]), quantization=None),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=None),
    )
    check_gpu(config, KEYS_AND_VALUES)


def test_an_engine_says_so_by_vllms_own_configuration(smollm2, gpu):
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = AsyncEngineArgs(model=str(smollm2), max_model_len=8192, gpu_memory_utilization=0.45)
    config = args.create_engine_config()
    gpu(GIB, 4 * GIB)
    check_gpu(config, KEYS_AND_VALUES)
    gpu(GIB, GIB)
    with pytest.raises(RuntimeError) as error:
        check_gpu(config, KEYS_AND_VALUES)
    line = re.sub(r"\d+\.\d", "N", str(error.value))
    assert line.startswith(
        "an engine needs N GiB of GPU memory (weights N, KV cache of one row of 8192 tokens N, the rest N) "
        "and has N of the GPU's N GiB: N GiB are missing; take a lower --max-model-len"
    )
