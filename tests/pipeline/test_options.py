"""Options of `Decoder`: the same checks as on the command line, before anything is loaded."""

import json
from dataclasses import fields

import pytest
import torch
from command_line import fails, run

from agd_vllm import Decoder
from agd_vllm.commands.decode import decode
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.pipeline.run import RunSettings, run_dataset, run_identity
from agd_vllm.steering.vector_file import SteeringVectors, write_vectors
from agd_vllm.strategies.registry import OPTIONS, STRATEGIES, owners


@pytest.fixture
def vectors(smollm2, tmp_path) -> str:
    write_vectors(f"{tmp_path}/v.safetensors", SteeringVectors({3: torch.ones(576)}, "caa", str(smollm2)))
    return f"{tmp_path}/v.safetensors"


# The strategy that an option is tried with: one that has it.
OF = {option: owners(option)[0] for option in OPTIONS} | {"entropies": "greedy", "repetition_penalty": "greedy"}


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
    options = {"strategy": OF.get(name, "agd"), name: value}
    with pytest.raises(ValueError, match=name) as error:
        Decoder(str(smollm2), **options)
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)


WHOLE = ("top_k", "engines", "attribution_workers", "max_tokens", "max_model_len", "seed")
REAL = ("tau", "min_prob", "cad_alpha", "dola_relative_top", "steering_strength", "repetition_penalty")


def options_with(name: str, value: object) -> DecoderOptions:
    strategy = OF.get(name, "agd")
    given = {"steering": "v.safetensors"} if strategy == "steer" else {}
    return DecoderOptions.of("m", strategy, **given, **{name: value})


def test_every_number_is_a_number_that_float32_or_int32_holds():
    options = [*fields(DecoderOptions), *OPTIONS.values()]
    numeric = {option.name for option in options if "float" in option.type or "int" in option.type}
    assert numeric == {*WHOLE, *REAL}
    for name in numeric:
        huge = [10**39, 10**5000, float("inf"), float("nan"), *([1e39, -1e39] if name in REAL else [2**32, 2.0])]
        for value in ("2", "2\n", [2], True, b"2", *huge, None):
            if (name == "tau" and value == float("inf")) or (value is None and name in WHOLE):
                continue
            with pytest.raises(ValueError, match=f"^{name} ") as error:
                options_with(name, value)
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 160
    for name, fine in (("tau", float("inf")), ("tau", 0), ("steering_strength", -3e38)):
        assert getattr(options_with(name, fine).strategy, name) == fine
    assert options_with("seed", 2**32 - 1).seed == 2**32 - 1


def test_a_decoder_without_a_model():
    with pytest.raises(ValueError, match="model is missing"):
        Decoder()


def test_an_option_of_another_strategy_is_refused(smollm2):
    """Whatever its value: also that which it has where nothing is given."""
    for strategy in STRATEGIES:
        own = {option.name for option in fields(STRATEGIES[strategy])}
        for name, option in OPTIONS.items():
            if name in own:
                continue
            with pytest.raises(ValueError) as error:
                DecoderOptions.of(str(smollm2), strategy, **{name: option.default})
            others = " or ".join(owners(name))
            assert f"{error.value}" == (
                f"{name}: strategy {strategy} has no such option; leave it out, or choose strategy {others}"
            )
    with pytest.raises(TypeError, match="unknown"):
        DecoderOptions.of(str(smollm2), unknown=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_what_all_have_in_common(strategy):
    own = {"steering": "v.safetensors"} if strategy == "steer" else {}
    common = {"roi": "none", "seed": 3, "engines": 2, "attribution_workers": 2}
    options = DecoderOptions.of("m", strategy, **own, **common)
    assert {name: getattr(options, name) for name in common} == common
    assert options.workers == (2 if strategy == "agd" else 0)


def test_the_command_line_refuses_only_what_it_gives(smollm2, capsys, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"id": "a", "prompt": "Hi"}\n')
    command = ("decode", str(data), "--model", str(smollm2), "--dry-run", "--strategy", "greedy")
    assert run(capsys, *command, "--roi", "none", "--attribution-workers", "2")[0] == 0
    assert "tau: strategy greedy has no such option" in fails(capsys, 2, *command, "--tau", "1.734")
    assert "steering_norm: strategy greedy" in fails(capsys, 2, *command, "--steering-norm")
    evaluate = ("evaluate", "--suite", "jsonl", "--data", str(data), "--model", str(smollm2))
    evaluate += ("--output", str(tmp_path / "out"), "--tau", "1")
    assert "tau: no strategy here" in fails(capsys, 2, *evaluate, "--strategies", "greedy,cad")


def test_options_that_do_not_go_together(smollm2):
    with pytest.raises(ValueError, match=r"repetition_penalty: strategy agd has none.*, or take"):
        Decoder(str(smollm2), scorer="lxt", repetition_penalty=1.2)
    with pytest.raises(ValueError, match="entropies are recorded without one"):
        Decoder(str(smollm2), strategy="greedy", entropies=True, repetition_penalty=1.2)
    assert DecoderOptions.of("m", scorer="inline", repetition_penalty=1.2).strategy.repetition_penalty == 1.2


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_gets_its_options_and_starts_what_it_needs(smollm2, name, vectors):
    own = {
        "cad": {"cad_alpha": 0.25},
        "dola": {"dola_layers": "4+6", "dola_relative_top": 0.5},
        "steer": {"steering": vectors, "steering_strength": -2.0, "steering_norm": False},
    }.get(name, {})
    options = DecoderOptions.of(str(smollm2), name, **own)
    assert options.strategy.name == name
    assert {key: getattr(options.strategy, key) for key in own} == own
    decoder = Decoder(options=options)
    assert (decoder.model.pause_id is None) == (name in ("greedy", "dola", "steer", "emphasize"))
    assert decoder.preparer().guided == (name not in ("greedy", "dola", "steer", "emphasize"))
    assert (options.workers > 0) == (name == "agd")


def test_the_command_line_knows_all_strategies():
    (option,) = [option for option in decode.params if option.name == "strategy"]
    assert set(option.type.choices) == set(STRATEGIES)


def test_what_decides_the_tokens_is_part_of_a_runs_identity(smollm2, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    settings = RunSettings((str(path),), str(tmp_path / "out"))
    identity = run_identity(settings, Decoder(str(smollm2), strategy="cad", cad_alpha=0.25, seed=7))
    assert (identity["strategy"], identity["cad_alpha"], identity["seed"]) == ("cad", 0.25, 7)
    assert not identity.keys() & {"entropies", "tau", "scorer", "engines", "attribution_workers", "debug"}


def test_the_summary_names_the_layers_of_the_vectors(smollm2, vectors, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    settings = RunSettings((f"{tmp_path}/rows.jsonl",), str(tmp_path / "out"))
    assert run_dataset(settings, DecoderOptions.of(str(smollm2), "steer", steering=vectors)) == 1  # and loads no model
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["steering_layers"] == [3]
    assert not summary.keys() & {"scorer", "rule", "tau", "attribution_workers", "cad_alpha"}
    assert "steering_layers" not in json.loads((tmp_path / "out/run.json").read_text())  # so that old runs go on


def test_vectors_are_part_of_a_runs_identity_whatever_their_name(smollm2, vectors, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    settings = RunSettings((f"{tmp_path}/rows.jsonl",), str(tmp_path / "out"))
    options = DecoderOptions.of(str(smollm2), "steer", steering=vectors)
    identity = run_identity(settings, Decoder(options=options))
    assert identity == run_identity(settings, Decoder(options=options))
    write_vectors(vectors, SteeringVectors({3: -torch.ones(576)}, "caa", str(smollm2)))
    other = run_identity(settings, Decoder(options=options))
    assert {key for key in identity if identity[key] != other[key]} == {"steering"}
