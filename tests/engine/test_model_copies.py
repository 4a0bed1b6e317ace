"""What vLLM's engine arguments mean to the copies of the model beside an engine: every one of them is known."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from command_line import fails
from conftest import DEMO_ROWS
from made_runs import made_row, write_run
from vllm.engine.arg_utils import AsyncEngineArgs

from agd_vllm import Decoder
from agd_vllm.engine.argument_table import HARMLESS, PASSED_ON, REFUSED
from agd_vllm.engine.arguments import FIXED, OWN
from agd_vllm.engine.model_copies import check_for_copies
from agd_vllm.evaluation.outcomes import Outcome
from agd_vllm.evaluation.perplexity import perplexities
from agd_vllm.pipeline import relevance
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.prompts.tokenizer import load_tokenizer

FIELDS = {field.name: field for field in dataclasses.fields(AsyncEngineArgs)}
YARN = {"rope_type": "yarn", "rope_theta": 100000.0, "factor": 4.0, "original_max_position_embeddings": 2048}
# A value of each refused argument that changes something.
CHANGING = dict.fromkeys(REFUSED, "something-else") | {
    "additional_config": {"key": 1},
    "allow_deprecated_quantization": True,
    "attention_config": {"use_prefill_query_quantization": True},
    "enable_lora": True,
    "kv_cache_dtype": "fp8",
    "load_format": "dummy",
    "quantization": "fp8",
    "spec_tokens": 3,
}


@pytest.fixture
def unloadable(smollm2, tmp_path) -> Path:
    """The demo model without its weights: whatever comes to load them fails otherwise than in the line expected."""
    return Path(shutil.copytree(smollm2, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors")))


def default_of(field: dataclasses.Field):
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def test_every_engine_argument_of_this_vllm_stands_in_the_table_once():
    """A release of vLLM names its new arguments here: sort them into argument_table."""
    table = [*OWN, *FIXED, *PASSED_ON, *REFUSED, *HARMLESS]
    assert sorted(table) == sorted(FIELDS)


def test_vllms_defaults_are_refused_nowhere():
    given = {name: default_of(field) for name, field in FIELDS.items()}
    # vLLM's own default is an object, which no command line and no JSON gives.
    check_for_copies(given | {"attention_config": {}}, "auto")


def test_each_refused_argument_is_one_line_before_anything_is_loaded(unloadable):
    for name, value in CHANGING.items():
        for strategy in ({}, {"scorer": "lxt"}):
            with pytest.raises(ValueError, match=f"^--engine-arg {name}=.* leave it out$") as error:
                Decoder(str(unloadable), engine_args={name: value}, **strategy)
            assert "\n" not in str(error.value)
        for same in (*REFUSED[name], None):
            check_for_copies({name: same}, "auto")
    # Without copies nothing changes.
    Decoder(str(unloadable), strategy="greedy", engine_args=CHANGING)


def test_keys_and_values_in_the_models_own_dtype_are_nothing_else(unloadable):
    Decoder(str(unloadable), dtype="bfloat16", engine_args={"kv_cache_dtype": "bfloat16"})
    with pytest.raises(ValueError, match="kv_cache_dtype=bfloat16"):
        Decoder(str(unloadable), dtype="float32", engine_args={"kv_cache_dtype": "bfloat16"})


def test_an_argument_that_a_later_vllm_has_is_refused_with_copies(unloadable, monkeypatch):
    later = dataclasses.make_dataclass("Later", [("rotate_weights", bool, False)], bases=(AsyncEngineArgs,))
    monkeypatch.setattr("vllm.engine.arg_utils.AsyncEngineArgs", later)
    with pytest.raises(ValueError, match=r"^--engine-arg rotate_weights: .* may not follow the engine there"):
        Decoder(str(unloadable), engine_args={"rotate_weights": True})
    Decoder(str(unloadable), strategy="greedy", engine_args={"rotate_weights": True})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"rope_theta": 5000.0}, "not rope_theta; write the change into config.json"),
        ({"architectures": ["MistralForCausalLM"]}, "not architectures; write the change into config.json"),
        ({"text_config": {"sliding_window": 4}}, "not sliding_window; write the change into config.json"),
        (lambda config: config, "a JSON object only; write the change into config.json"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_theta missing; hf_overrides take"),
        ({"rope_parameters": {"full_attention": YARN}}, "not of the form that config.json has; hf_overrides take"),
        ({"rope_parameters": YARN | {"rope_type": "dynamic"}}, "RoPE type 'dynamic' cannot be cached"),
        ({"max_position_embeddings": "many"}, "cannot read its configuration: hf_overrides: .*max_position_embeddings"),
    ],
)
def test_overrides_that_copies_cannot_follow_are_one_line(unloadable, overrides, said):
    with pytest.raises(ValueError, match=said) as error:
        Decoder(str(unloadable), engine_args={"hf_overrides": overrides})
    assert "\n" not in str(error.value)


def test_overrides_reach_what_is_known_of_the_model_and_what_workers_are_started_with(unloadable):
    overrides = {"rope_parameters": YARN, "max_position_embeddings": 32768}
    for strategy in ("agd", "greedy"):
        decoder = Decoder(
            str(unloadable), strategy=strategy, max_model_len=30000, engine_args={"hf_overrides": overrides}
        )
        assert decoder.model.max_model_len == 32768
        assert strategy == "greedy" or decoder._attribution.overrides == overrides
        assert decoder._engine_settings().engine_args == {"hf_overrides": overrides}


def test_attribute_refuses_before_it_decodes_and_for_a_run_of_such_an_engine(capsys, smollm2, unloadable, tmp_path):
    arguments = ["attribute", str(DEMO_ROWS), "--model", str(unloadable), "--output", str(tmp_path / "out")]
    assert "quantization=fp8" in fails(capsys, 2, *arguments, "--engine-arg", "quantization=fp8")
    assert not (tmp_path / "out").exists()
    row = made_row(load_tokenizer(str(smollm2)), "row-1", "A prompt.", "An answer.")
    directory = write_run(tmp_path / "run", [row], str(unloadable), engine_args={"kv_cache_dtype": "fp8"})
    line = fails(capsys, 2, "attribute", "--run", str(directory))
    assert f"run {directory}: --engine-arg kv_cache_dtype=fp8: " in line
    assert not (directory / "relevance.json").exists()


def test_perplexity_is_not_measured_where_the_copy_is_another_model(unloadable):
    outcomes = {"greedy": {"a": Outcome.__new__(Outcome)}}
    found, said = perplexities(DecoderOptions.of(str(unloadable), engine_args={"quantization": "fp8"}), outcomes)
    assert found == {"greedy": None}
    assert said.startswith("perplexity was not measured: --engine-arg quantization=fp8")


def test_attribute_starts_its_workers_with_the_runs_changes_wherever_the_model_lies(
    smollm2, unloadable, tmp_path, monkeypatch
):
    started = []

    class Started(Exception):
        pass

    def start(model, settings, count, debug):
        started.append((model.path, settings.overrides))
        raise Started

    monkeypatch.setattr(relevance, "RelevanceFleet", start)
    row = made_row(load_tokenizer(str(smollm2)), "row-1", "A prompt.", "An answer.")
    given = {"hf_overrides": {"rms_norm_eps": 0.5}, "enforce_eager": True}
    for ran, model in ((str(unloadable), None), ("/gone", str(unloadable))):
        directory = write_run(tmp_path / f"run-{len(started)}", [row], ran, engine_args=given)
        with pytest.raises(Started):
            relevance.attribute_run(relevance.RelevanceSettings(str(directory), model))
    assert started == [(str(unloadable), {"rms_norm_eps": 0.5})] * 2


def test_relevance_of_the_model_without_the_changes_is_not_continued(capsys, smollm2, unloadable, tmp_path):
    row = made_row(load_tokenizer(str(smollm2)), "row-1", "A prompt.", "An answer.")
    overrides = {"rms_norm_eps": 0.5}
    directory = write_run(tmp_path / "run", [row], str(unloadable), engine_args={"hf_overrides": overrides})
    before = {"model": str(unloadable), "revision": None, "rule": "attnlrp", "dtype": "float32"}
    (directory / "relevance.json").write_text(json.dumps(before))
    assert "holds other relevance: hf_overrides" in fails(capsys, 2, "attribute", "--run", str(directory))
