"""vLLM's hf_overrides on copies of the model: the configuration is vLLM's, and scores are those of a model whose
config.json says the same."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from requests_for_tiny import as_request
from tiny_oracle import ATTRIBUTION, assert_close

from agd_vllm.attribution.worker import AttributionSettings, AttributionWorker
from agd_vllm.evaluation.quality import PerplexityModel
from agd_vllm.models.config_overrides import followed, read_config

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
# Model, overrides, and the same in its config.json: on the top level a dict takes the place of the one there, within a
# nested configuration it is merged.
CHANGED = {
    "llama": {"rope_parameters": LINEAR},
    "llama-3": {"rope_parameters": PLAIN, "rms_norm_eps": 0.3},
    "mistral": {"rope_parameters": YARN, "max_position_embeddings": 64},
    "qwen2": {"rms_norm_eps": 0.5},
    "qwen3": {"rope_parameters": LLAMA3},
    "gemma3": {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}},
    "gemma3-multimodal": {
        "text_config": {"rope_parameters": {"sliding_attention": {"rope_theta": 50.0}}, "rms_norm_eps": 0.2}
    },
}


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changed_folder(folder, target, overrides) -> str:
    """A copy of the model whose config.json says what the overrides do."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    nested = overrides.get("text_config", {})
    config |= {key: value for key, value in overrides.items() if key != "text_config"}
    for key, value in nested.items():
        if key == "rope_parameters":
            for kind, of_kind in value.items():
                config["text_config"][key][kind] |= of_kind
        else:
            config["text_config"][key] = value
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


@pytest.mark.parametrize("name", CHANGED)
def test_the_configuration_is_vllms(tiny_models, name):
    from vllm.config import ModelConfig
    from vllm.transformers_utils.config import get_config

    overrides = CHANGED[name]
    assert followed(overrides) == overrides
    dicts = {key: value for key, value in overrides.items() if isinstance(value, dict)}
    plain = {key: value for key, value in overrides.items() if key not in dicts}
    theirs = get_config(str(tiny_models[name]), False, hf_overrides_kw=plain)
    # As in ModelConfig.__post_init__, all of which would look into the model's class in a process of its own.
    ModelConfig._apply_dict_overrides(ModelConfig.__new__(ModelConfig), theirs, dicts)
    ours = read_config(str(tiny_models[name]), overrides=overrides)
    assert ours.to_dict() == theirs.to_dict()
    assert ours.to_dict() != read_config(str(tiny_models[name])).to_dict()


def test_workers_score_as_reverse_mode_of_a_model_that_says_so_itself(tiny_models, tiny_cases, tmp_path):
    """The oracle reads a changed config.json, the workers the overrides."""
    changed = {name: changed_folder(tiny_models[name], tmp_path / name, CHANGED[name]) for name in CHANGED}
    cases = {name: tiny_cases[name][:2] for name in CHANGED}
    job = {"rule": "attnlrp", "output": str(tmp_path / "scores.json")}
    job["models"] = {changed[name]: cases[name] for name in CHANGED}
    command = [sys.executable, str(ATTRIBUTION / "oracle.py")]
    subprocess.run(command, input=json.dumps(job), text=True, check=True, timeout=300)
    theirs = json.loads((tmp_path / "scores.json").read_text())
    for name, overrides in CHANGED.items():
        requests = [as_request(case) for case in cases[name]]
        settings = AttributionSettings("forward", "attnlrp", "float32", overrides=overrides)
        worker = AttributionWorker(str(tiny_models[name]), None, False, settings)
        assert_close(worker.score(requests, []).scores, theirs[changed[name]])
        plain = AttributionWorker(str(tiny_models[name]), None, False, replace(settings, overrides={}))
        with pytest.raises(AssertionError):
            assert_close(plain.score(requests, []).scores, theirs[changed[name]])


def test_perplexity_is_that_of_a_model_that_says_so_itself(tiny_models, tmp_path):
    texts = {"greedy": [([5, 6, 7, 8, 9, 10], [11, 12, 13, 14])]}
    folder, overrides = tiny_models["llama"], CHANGED["llama"]
    changed = changed_folder(folder, tmp_path / "m", overrides)
    ours = PerplexityModel(str(folder), overrides=overrides).perplexities(texts)
    assert ours == PerplexityModel(changed).perplexities(texts)
    assert ours != PerplexityModel(str(folder)).perplexities(texts)
