"""Options of `Decoder`: the same checks as on the command line, before anything is loaded."""

import json
from dataclasses import fields

import pytest
import torch

from agd_vllm import Decoder
from agd_vllm.commands.decode import decode
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.pipeline.run import RunSettings, run_dataset, run_identity
from agd_vllm.pipeline.strategies import STRATEGIES
from agd_vllm.steering.vector_file import SteeringVectors, write_vectors


@pytest.fixture
def vectors(smollm2, tmp_path) -> str:
    write_vectors(f"{tmp_path}/v.safetensors", SteeringVectors({3: torch.ones(576)}, "caa", str(smollm2)))
    return f"{tmp_path}/v.safetensors"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scorer", "foward"),
        ("rule", "lrp"),
        ("dtype", "fp16"),
        ("attribution_dtype", "int8"),
        ("strategy", "sampling"),
        ("top_k", 100_000),
        ("tau", float("nan")),
        ("cad_alpha", -0.5),
        ("cad_alpha", float("inf")),
        ("dola_layers", "middle"),
        ("dola_layers", "2,-1"),
        ("dola_relative_top", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("dola_relative_top", float("nan")),
        ("steering_strength", float("nan")),
    ],
)
def test_a_wrong_value_is_named(smollm2, name, value):
    with pytest.raises(ValueError, match=name) as error:
        Decoder(str(smollm2), **{name: value})
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)


WHOLE = ("top_k", "engines", "attribution_workers", "max_tokens", "max_model_len", "seed")
REAL = ("tau", "min_prob", "cad_alpha", "dola_relative_top", "steering_strength", "repetition_penalty")


def test_every_number_is_a_number_that_float32_or_int32_holds():
    numeric = {option.name for option in fields(DecoderOptions) if "float" in option.type or "int" in option.type}
    assert numeric == {*WHOLE, *REAL}
    for name in numeric:
        huge = [10**39, 10**5000, float("inf"), float("nan"), *([1e39, -1e39] if name in REAL else [2**32, 2.0])]
        for value in ("2", "2\n", [2], True, b"2", *huge, None):
            if (name == "tau" and value == float("inf")) or (value is None and name in WHOLE):
                continue
            with pytest.raises(ValueError, match=f"^{name} ") as error:
                DecoderOptions("m", **{name: value})
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 160
    for name, fine in (("tau", float("inf")), ("tau", 0), ("steering_strength", -3e38), ("seed", 2**32 - 1)):
        assert getattr(DecoderOptions("m", strategy="greedy", **{name: fine}), name) == fine


def test_a_decoder_without_a_model():
    with pytest.raises(ValueError, match="model is missing"):
        Decoder()


def test_options_that_do_not_go_together(smollm2):
    with pytest.raises(ValueError, match=r"roi_heads.*cad"):
        Decoder(str(smollm2), strategy="cad", roi_heads="heads.json")
    for choice in ({"strategy": "agd"}, {"strategy": "agd", "scorer": "lxt"}, {"strategy": "random-candidate"}):
        with pytest.raises(ValueError, match=f"repetition_penalty: strategy {choice['strategy']} has none.*, or take"):
            Decoder(str(smollm2), **choice, repetition_penalty=1.2)
    with pytest.raises(ValueError, match=r"roi_heads.*emphasize"):
        Decoder(str(smollm2), strategy="emphasize", roi_heads="heads.json")
    with pytest.raises(ValueError, match=r"entropies.*greedy"):
        Decoder(str(smollm2), entropies=True)
    for strategy in ("agd", "greedy", "dola"):
        with pytest.raises(ValueError, match=f"steering: strategy {strategy} cannot be steered"):
            Decoder(str(smollm2), strategy=strategy, steering="v.safetensors")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_gets_its_options_and_starts_what_it_needs(smollm2, name, vectors):
    own = {"steering": vectors, "steering_strength": -2.0, "steering_norm": False} if name == "steer" else {}
    options = DecoderOptions(
        str(smollm2), name, cad_alpha=0.25, seed=7, dola_layers="4+6", dola_relative_top=0.5, **own
    )
    strategy = options.make_strategy()
    assert strategy.name == name
    assert getattr(strategy, "alpha", 0.25) == 0.25
    assert getattr(strategy, "seed", 7) == 7
    assert (getattr(strategy, "layers", "4+6"), getattr(strategy, "relative_top", 0.5)) == ("4+6", 0.5)
    assert (getattr(strategy, "strength", -2.0), getattr(strategy, "norm", False)) == (-2.0, False)
    decoder = Decoder(options=options)
    assert (decoder.model.pause_id is None) == (name in ("greedy", "dola", "steer", "emphasize"))
    assert decoder.preparer().guided == (name not in ("greedy", "dola", "steer", "emphasize"))
    assert strategy.attribution == (name == "agd")


def test_the_command_line_knows_all_strategies():
    (option,) = [option for option in decode.params if option.name == "strategy"]
    assert set(option.type.choices) == set(STRATEGIES)


def test_what_decides_the_tokens_is_part_of_a_runs_identity(smollm2, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    settings = RunSettings((str(path),), str(tmp_path / "out"))
    identity = run_identity(settings, Decoder(str(smollm2), strategy="cad", cad_alpha=0.25, seed=7))
    assert (identity["strategy"], identity["cad_alpha"], identity["seed"]) == ("cad", 0.25, 7)
    assert "entropies" not in identity


def test_the_summary_names_the_layers_of_the_vectors(smollm2, vectors, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    settings = RunSettings((f"{tmp_path}/rows.jsonl",), str(tmp_path / "out"))
    assert run_dataset(settings, DecoderOptions(str(smollm2), "steer", steering=vectors)) == 1  # and loads no model
    assert json.loads((tmp_path / "out/summary.json").read_text())["steering_layers"] == [3]
    assert "steering_layers" not in json.loads((tmp_path / "out/run.json").read_text())  # so that old runs go on


def test_vectors_are_part_of_a_runs_identity_whatever_their_name(smollm2, vectors, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    settings = RunSettings((f"{tmp_path}/rows.jsonl",), str(tmp_path / "out"))
    options = DecoderOptions(str(smollm2), "steer", steering=vectors)
    identity = run_identity(settings, Decoder(options=options))
    assert identity == run_identity(settings, Decoder(options=options))
    write_vectors(vectors, SteeringVectors({3: -torch.ones(576)}, "caa", str(smollm2)))
    other = run_identity(settings, Decoder(options=options))
    assert {key for key in identity if identity[key] != other[key]} == {"steering"}
