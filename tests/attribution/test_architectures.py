"""What attribution refuses to read, each in one line that says what and why."""

from types import SimpleNamespace

import pytest
import tiny
from transformers import GPT2Config, LlamaConfig

from agd_vllm.attribution import rules
from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.attribution.hf_model import load_model
from agd_vllm.attribution.scorer import load_scorer
from agd_vllm.models.architectures import ACTIVATIONS, SUPPORTED, check_supported


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


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_frequencies_that_change_with_the_length_are_refused(name, rope_type):
    config = tiny.configs()[name]
    config.architectures = {"llama": ["LlamaForCausalLM"], "gemma3": ["Gemma3ForCausalLM"]}[name]
    parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    config.rope_parameters = parameters if name == "llama" else {"full_attention": parameters}
    assert rope_type in refused(config)


def test_an_activation_without_a_rule_is_refused():
    message = refused(LlamaConfig(architectures=["LlamaForCausalLM"], hidden_act="relu"))
    assert "relu" in message
    assert set(ACTIVATIONS) == set(rules.ACTIVATIONS)
    assert all(name in message for name in ACTIVATIONS)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="forward, lxt"):
        load_scorer("backward", "anywhere")
    with pytest.raises(ValueError, match="attnlrp, cplrp, ixg"):
        load_scorer("forward", "anywhere", rule="lrp")
    with pytest.raises(ValueError, match="float32, bfloat16"):
        ForwardScorer(str(tiny.save("llama", tmp_path)), dtype="int8")
