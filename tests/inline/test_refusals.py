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


def test_the_other_model_runner(monkeypatch, smollm2):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="Model Runner V1"):
        Decoder(str(smollm2), scorer="inline")


def test_workers_are_those_of_the_strategies_that_have_some():
    options = DecoderOptions(model="m", attribution_workers=2, attribution_dtype="float32")
    forward, inline = parse_strategies("agd,agd:scorer=inline", options)
    assert (forward.options.workers, inline.options.attribution_workers) == (2, None)
    with pytest.raises(ValueError, match="every strategy attributes inline"):
        parse_strategies("agd:scorer=inline,agd:scorer=inline:tau=0", options)
