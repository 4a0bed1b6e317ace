"""The longest sequence that a worker is made for, against the one that vLLM takes."""

import json
import shutil

import pytest
from transformers import Gemma3TextConfig, LlamaConfig
from vllm.config import ModelConfig

from agd_vllm.models.architectures import longest_sequence
from agd_vllm.models.inspect import inspect_model

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1000,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 250}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.long  # vLLM looks into the model's class in a process of its own.
@pytest.mark.parametrize(
    "rope", [DEFAULT, LINEAR, YARN, LLAMA3, {"full_attention": LINEAR, "sliding_attention": DEFAULT}]
)
def test_it_is_vllms(tmp_path, rope):
    kind, name = (
        (Gemma3TextConfig, "Gemma3ForCausalLM") if "full_attention" in rope else (LlamaConfig, "LlamaForCausalLM")
    )
    config = kind(**SMALL, architectures=[name], rope_parameters=rope)
    config.save_pretrained(tmp_path)
    theirs = ModelConfig(model=str(tmp_path), skip_tokenizer_init=True, dtype="float32").max_model_len
    assert longest_sequence(config) == theirs


@pytest.mark.parametrize("attribution", [True, False])
def test_what_is_known_of_a_model_before_it_is_loaded_has_stretched_positions(smollm2, tmp_path, attribution):
    """The dry run and --max-model-len go by it."""
    model = shutil.copytree(smollm2, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text())
    config["rope_scaling"] = {"type": "linear", "factor": 2.5}  # as vicuna-16k and longchat have it
    (model / "config.json").write_text(json.dumps(config))
    assert inspect_model(str(model), attribution=attribution)[0].max_model_len == 20480
