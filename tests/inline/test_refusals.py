"""What inline attribution cannot do ends with one line before anything is loaded."""

import json
import shutil

import pytest
from command_line import fails

from agd_vllm import Decoder
from agd_vllm.evaluation.strategies import parse_strategies
from agd_vllm.pipeline.options import DecoderOptions


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--strategy", "cad", "strategy cad contrasts"),
        ("--attribution-workers", "2", "scorer inline has none"),
        ("--attribution-dtype", "float32", "in the engine's dtype"),
        ("--engine-arg", "tensor_parallel_size=2", "tensor_parallel_size"),
        ("--engine-arg", "pipeline_parallel_size=2", "pipeline_parallel_size"),
        ("--engine-arg", "enable_lora=true", "enable_lora"),
        ("--engine-arg", "quantization=fp8", "quantization"),
        ("--engine-arg", "kv_cache_dtype=fp8", "kv_cache_dtype"),
        ("--engine-arg", "enable_batch_sharded_sampling=true", "enable_batch_sharded_sampling"),
        ("--engine-arg", 'speculative_config={"num_speculative_tokens": 1}', "speculative_config"),
    ],
)
def test_options(capsys, tmp_path, smollm2, option, value, words):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "prompt": "Hi"}) + "\n")
    command = ["decode", str(tmp_path / "rows.jsonl"), "--model", str(smollm2), "--output", str(tmp_path / "out")]
    line = fails(capsys, 2, *command, "--scorer", "inline", option, value)
    assert words in line
    assert not (tmp_path / "out").exists()


def model_with(smollm2, folder, **changes):
    """The demo model's files, with another configuration."""
    shutil.copytree(smollm2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"architectures": ["OPTForCausalLM"]}, "OPTForCausalLM"),
    ],
)
def test_models(smollm2, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        Decoder(model_with(smollm2, tmp_path / "model", **changes), scorer="inline")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "capability", "runner", "words"),
    [
        ("float32", (9, 0), "1", "on a GPU inline attribution has bfloat16 only"),
        ("bfloat16", (7, 5), "1", "no kernel for heads of 64 on this GPU"),
        ("bfloat16", (9, 0), "0", "needs Model Runner V2; leave it out"),
    ],
)
def test_gpus(monkeypatch, smollm2, dtype, capability, runner, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    with pytest.raises(ValueError, match=words) as error:
        Decoder(str(smollm2), scorer="inline", dtype=dtype)
    assert "\n" not in str(error.value)


def test_workers_are_those_of_the_strategies_that_have_some():
    options = DecoderOptions(model="m", attribution_workers=2, attribution_dtype="float32")
    forward, inline = parse_strategies("agd,agd:scorer=inline", options)
    assert (forward.options.workers, inline.options.attribution_workers) == (2, None)
    with pytest.raises(ValueError, match="every strategy attributes inline"):
        parse_strategies("agd:scorer=inline,agd:scorer=inline:tau=0", options)
