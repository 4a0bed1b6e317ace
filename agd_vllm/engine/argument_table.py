"""What each of vLLM's engine arguments means to a Hugging Face copy of the model beside the engine.

A copy (an attribution worker, the model that perplexity is measured with) must compute what the engine computes. So
every field of vLLM's AsyncEngineArgs stands here once, or in `arguments.OWN` or `arguments.FIXED`; one that vLLM adds
is refused where there are copies until it stands here.
"""

from __future__ import annotations

from typing import Any

# Copies are made with the same value.
PASSED_ON = ("revision", "hf_overrides")

# These change weights, configuration or arithmetic, or may, and copies do not follow; but for the named values (and for
# None), which change nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    # weights
    "allow_deprecated_quantization": (False,),
    "default_mm_loras": ({},),
    "enable_lora": (False,),
    "ignore_patterns": ("original/**/*", ["original/**/*"]),
    # All of these read the safetensors that Transformers reads.
    "load_format": ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"),
    "model_weights": ("",),
    "quantization": (),
    "quantization_config": (),
    "weight_transfer_config": (),
    # configuration
    "code_revision": (),
    "config_format": ("auto", "hf"),
    "convert": ("auto", "none"),
    "hf_config_path": (),
    "model_class_overrides": ({},),
    "model_impl": ("auto", "vllm", "transformers"),
    "runner": ("auto", "generate"),
    # arithmetic; `kv_cache_dtype` may name the model's own dtype, too
    "attention_config": ({},),
    "diffusion_config": (),
    "kv_cache_dtype": ("auto",),
    "kv_cache_dtype_skip_layers": ([],),
    # Keys and values that another engine computed, or that were compressed on the way.
    "kv_transfer_config": (),
    "watermark_config": (),
    # Code that is not vLLM's.
    "additional_config": ({},),
    "worker_cls": ("auto",),
    "worker_extension_cls": ("",),
    # Tokens that others proposed: short forms of `speculative_config`.
    "spec_method": (),
    "spec_model": (),
    "spec_tokens": (),
}

# The model is the same, and so is what it computes, but for the order of a sum.
_HARMLESS = {
    "where it runs, and beside what": """
        _api_process_count _api_process_rank all2all_backend cp_kv_cache_interleave_size cpu_distributed_timeout_seconds
        data_parallel_address data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb
        data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port data_parallel_size_local
        data_parallel_start_rank dbo_decode_token_threshold dbo_prefill_token_threshold dcp_comm_backend
        dcp_kv_cache_interleave_size dcp_q_replicate decode_context_parallel_size device_ids disable_custom_all_reduce
        disable_nccl_for_dp_synchronization distributed_executor_backend distributed_timeout_seconds dp_sync_interval
        elastic_ep_max_dp_size enable_batch_sharded_sampling enable_dbo enable_elastic_ep enable_ep_weight_filter
        enable_eplb enable_expert_parallel enable_fault_tolerance enable_hc_sp enable_nccl_comm_suspend
        enable_shm_tensor_arena eplb_config expert_placement_strategy fault_tolerance_config master_addr master_port
        max_parallel_loading_workers nnodes node_rank numa_bind numa_bind_cpus numa_bind_nodes pipeline_parallel_size
        prefill_context_parallel_size ray_workers_use_nsight shutdown_timeout tensor_parallel_size ubatch_size
    """,
    "memory, and where weights and caches lie": """
        block_size cpu_offload_gb cpu_offload_params disable_sliding_window download_dir enable_cumem_allocator
        enable_prefix_caching enable_sleep_mode engram_config gpu_memory_utilization hf_token kv_cache_memory_bytes
        kv_offloading_backend kv_offloading_size kv_sharing_fast_prefill model_loader_extra_config
        num_gpu_blocks_override offload_backend offload_group_size offload_num_in_group offload_params
        offload_prefetch_step prefix_cache_retention_interval prefix_caching_hash_algo prefix_match_unit
        pt_load_map_location safetensors_load_strategy safetensors_prefetch_block_size safetensors_prefetch_num_threads
        sleep_mode_offload_cudagraph sleep_preserve_parameter_names swa_bounded_replay use_tqdm_on_load
    """,
    "what is computed when": """
        async_scheduling disable_chunked_mm_input enable_chunked_prefill long_prefill_token_threshold
        long_prefill_token_threshold_adaptive max_num_active_seqs max_num_batched_tokens max_num_queued_reqs
        max_num_queued_tokens max_num_scheduled_tokens max_num_seqs prefill_schedule_interval scheduler_reserve_full_isl
        stream_interval watermark
    """,
    "by which kernel, compiled or not": """
        attention_backend compilation_config cudagraph_capture_sizes disable_cascade_attn enable_flashinfer_autotune
        enforce_eager gdn_prefill_backend ir_op_priority jit_monitor_mode jit_monitor_verbose kda_decode_backend
        kda_prefill_backend kernel_config linear_backend max_cudagraph_capture_size moe_backend optimization_level
        performance_mode sparse_indexer_topk_backend
    """,
    "of models that are none of those that attribution reads": """
        enable_mamba_cache_stochastic_rounding enable_mamba_shared_prefix_checkpoint mamba_backend mamba_block_size
        mamba_cache_dtype mamba_cache_mode mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype
        mamba_ssu_algorithm pooler_config replayssm_buffer_len use_replayssm
    """,
    "of images, sound and video, which rows do not have": """
        allowed_local_media_path allowed_media_domains ec_manager_config ec_transfer_config enable_mm_embeds
        enable_mm_processor_stats enable_tower_connector_lora interleave_mm_strings io_processor_plugin
        language_model_only limit_mm_per_prompt media_io_kwargs mm_device_do_normalize mm_encoder_attn_backend
        mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path
        mm_encoder_only mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb
        mm_processor_cache_type mm_processor_device mm_processor_kwargs mm_shm_cache_max_object_size_mb mm_tensor_ipc
        skip_mm_profiling video_pruning_method video_pruning_rate
    """,
    "of LoRA, without effect but for `enable_lora`": """
        enable_mixed_moe_lora_format enable_moe_shared_loras fully_sharded_loras lora_dtype lora_target_modules
        max_cpu_loras max_lora_cls_labels max_lora_rank max_loras specialize_active_lora
    """,
    "of requests, which are ours: greedy, as token ids, with stops of our own": """
        aux_output_config enable_prompt_embeds enable_return_routed_experts enable_trace_replay generation_config
        logprobs_mode max_logprobs override_generation_config reasoning_config reasoning_parser reasoning_parser_plugin
        renderer_num_workers return_sampling_mask served_model_name skip_tokenizer_init structured_outputs_config
        tokenizer_mode tokenizer_revision tokens_only use_fp64_gumbel
    """,
    "what is said and measured": """
        aggregate_engine_logging collect_detailed_traces cudagraph_metrics custom_histogram_buckets disable_log_stats
        enable_layerwise_nvtx_tracing enable_log_requests enable_logging_iteration_details enable_mfu_metrics
        fail_on_environ_validation kv_cache_metrics kv_cache_metrics_sample kv_events_config log_config_file log_level
        logging_config otlp_traces_endpoint per_request_spec_decode_metrics profiler_config
        show_hidden_metrics_for_version
    """,
}
HARMLESS = frozenset(name for names in _HARMLESS.values() for name in names.split())
