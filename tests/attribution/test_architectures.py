"""What attribution refuses to read, each in one line that says what and why."""

from types import SimpleNamespace

import pytest
import tiny
from transformers import GPT2Config, LlamaConfig

from agd_vllm.attribution.adapters import adapt
from agd_vllm.attribution.architectures import SUPPORTED, check_supported
from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.attribution.hf_model import load_model
from agd_vllm.attribution.scorer import load_scorer


def refused(config) -> str:
    with pytest.raises(ValueError) as error:
        check_supported(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unsupported_architecture_is_told_which_are_supported():
    message = refused(GPT2Config(architectures=["GPT2LMHeadModel"]))
    assert "GPT2LMHeadModel" in message
    assert all(name in message for name in SUPPORTED)


def test_a_config_that_names_no_architecture_is_refused():
    assert "none named" in refused(LlamaConfig())


@pytest.mark.parametrize("name", sorted(tiny.configs()))
def test_every_tiny_model_is_supported(name, tmp_path):
    config = load_model(str(tiny.save(name, tmp_path))).model.config
    assert check_supported(config) in SUPPORTED


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq"}, SimpleNamespace(quant_method="gptq")])
def test_quantized_weights_are_named(quantization):
    message = refused(LlamaConfig(architectures=["LlamaForCausalLM"], quantization_config=quantization))
    assert "gptq" in message and "quantized" in message


def test_soft_capped_logits_are_refused():
    config = tiny.configs()["gemma3"]
    config.architectures, config.final_logit_softcapping = ["Gemma3ForCausalLM"], 30.0
    assert "final_logit_softcapping" in refused(config)


def test_forward_mode_refuses_frequencies_that_change_with_the_length(tmp_path):
    hf = load_model(str(tiny.save("llama", tmp_path)))
    hf.stack.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="dynamic"):
        adapt(hf)


def test_forward_mode_refuses_an_activation_without_a_rule(tmp_path):
    hf = load_model(str(tiny.save("llama", tmp_path)))
    hf.config.hidden_act = "relu"
    with pytest.raises(ValueError, match="relu"):
        adapt(hf)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="forward, lxt"):
        load_scorer("backward", "anywhere")
    with pytest.raises(ValueError, match="attnlrp, cplrp, ixg"):
        load_scorer("forward", "anywhere", rule="lrp")
    with pytest.raises(ValueError, match="float32, bfloat16"):
        ForwardScorer(str(tiny.save("llama", tmp_path)), dtype="int8")
