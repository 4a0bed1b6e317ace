"""The names of vLLM's that sessions and inline attribution lean on and that nobody promises: one that is gone is named
here, not in a stack of another error."""

import importlib
import inspect

import pytest

NAMES = [
    ("vllm.config", "ModelConfig.model_class_overrides"),
    ("vllm.config", "VllmConfig.additional_config"),
    ("vllm.config", "CompilationConfig.static_forward_context"),
    ("vllm.forward_context", "get_forward_context"),
    ("vllm.forward_context", "ForwardContext.attn_metadata"),
    ("vllm.model_executor.layers.attention_layer_base", "AttentionLayerBase.bind_kv_cache"),
    ("vllm.model_executor.layers.layernorm", "GemmaRMSNorm"),
    ("vllm.model_executor.layers.rotary_embedding.base", "RotaryEmbedding._compute_cos_sin_cache"),
    ("vllm.v1.attention.backend", "AttentionBackend.get_supported_kernel_block_sizes"),
    ("vllm.v1.attention.backend", "AttentionMetadataBuilder.build"),
    ("vllm.v1.attention.backend", "CommonAttentionMetadata.query_start_loc_cpu"),
    ("vllm.v1.attention.backend", "CommonAttentionMetadata.seq_lens"),
    ("vllm.v1.attention.backend", "CommonAttentionMetadata.block_table_tensor"),
    ("vllm.v1.attention.backend", "CommonAttentionMetadata.slot_mapping"),
    ("vllm.v1.kv_cache_interface", "FullAttentionSpec.max_memory_usage_bytes"),
    ("vllm.v1.kv_cache_interface", "FullAttentionSpec.head_size_v"),
    ("vllm.v1.kv_cache_interface", "KVCacheLayout.LBHNC"),
    ("vllm.v1.sample.logits_processor.builtin", "process_dict_updates"),
    ("vllm.v1.engine.async_llm", "AsyncLLM._add_request"),
    ("vllm.v1.engine.async_llm", "AsyncLLM._run_output_handler"),
    ("vllm.v1.engine", "EngineCoreRequest.resumable"),
    ("vllm.exceptions", "VLLMClientError"),
    ("vllm.v1.core.sched.async_scheduler", "AsyncScheduler.add_request"),
    ("vllm.v1.core.sched.scheduler", "Scheduler.add_request"),
    ("vllm.v1.core.sched.scheduler", "Scheduler.finish_requests"),
    ("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output"),
    ("vllm.v1.engine", "EngineCoreOutput.stop_reason"),
    ("vllm.v1.engine", "EngineCoreOutputs.outputs"),
    ("vllm.v1.request", "Request.update_block_hashes"),
    ("vllm.v1.request", "RequestStatus.FINISHED_ERROR"),
    ("vllm.v1.engine.input_processor", "InputProcessor.assign_request_id"),
    ("vllm.v1.engine.output_processor", "RequestOutputCollector.get"),
    ("vllm.v1.engine.llm_engine", "LLMEngine.add_request"),
    ("vllm.v1.engine.llm_engine", "LLMEngine.abort_request"),
    ("vllm.v1.engine.llm_engine", "LLMEngine.step"),
    ("vllm.v1.executor.abstract", "Executor.get_class"),
]


@pytest.mark.parametrize(("module", "path"), NAMES)
def test_vllm_has(module, path):
    found = importlib.import_module(module)
    *owners, name = path.split(".")
    for owner in owners:
        found = getattr(found, owner)
    annotations = inspect.get_annotations(found) if inspect.isclass(found) else {}
    fields = getattr(found, "__dataclass_fields__", {})
    assert hasattr(found, name) or name in annotations or name in fields, f"vLLM lost {module}.{path}"


def test_layers_of_the_supported_models_have_what_the_adapters_read():
    """In the constructors, where the models make it."""
    from vllm.model_executor.models import gemma3, llama, qwen2, qwen3

    attention = ("qkv_proj", "o_proj", "rotary_emb", "attn", "num_heads", "num_kv_heads", "head_dim", "scaling")
    norms = ("input_layernorm", "post_attention_layernorm")
    of_gemma = (*norms, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    expected = [
        (llama.LlamaAttention, attention),
        (llama.LlamaDecoderLayer, norms),
        (qwen2.Qwen2Attention, attention),
        (qwen3.Qwen3Attention, (*attention, "q_norm", "k_norm")),
        (gemma3.Gemma3Attention, (*attention, "q_norm", "k_norm")),
        (gemma3.Gemma3DecoderLayer, of_gemma),
        (llama.LlamaMLP, ("gate_up_proj", "down_proj")),
        (gemma3.Gemma3MLP, ("gate_up_proj", "down_proj")),
    ]
    for owner, names in expected:
        source = inspect.getsource(owner)
        missing = [name for name in names if f"self.{name} =" not in source and f"self.{name}," not in source]
        # LlamaAttention makes its rotary embedding in a method of its own.
        assert not missing, f"{owner.__name__} lost {missing}"
