"""NAME[:KEY=VALUE...]: decoder options, a folder, or one line on what is wrong."""

import pytest

from agd_vllm.evaluation.strategies import parse_strategies
from agd_vllm.pipeline.options import DecoderOptions

BASE = DecoderOptions(model="m", tau=1.0, max_tokens=9)


def test_keys_are_options_of_the_decoder():
    greedy, plain, own, heads = parse_strategies(
        "greedy,agd,agd:tau=0:rule=ixg:top-k=3:attribution-dtype=float32,agd:roi-heads=some/heads.json", BASE
    )
    assert (greedy.options.strategy, greedy.folder) == ("greedy", "greedy")
    assert plain.options == BASE
    assert own.name == "agd:tau=0:rule=ixg:top-k=3:attribution-dtype=float32"
    assert own.folder == "agd-tau-0-rule-ixg-top-k-3-attribution-dtype-float32"
    assert (own.options.tau, own.options.rule, own.options.top_k) == (0.0, "ixg", 3)
    assert (own.options.attribution_dtype, own.options.max_tokens) == ("float32", 9)
    assert heads.options.roi_heads == "some/heads.json"
    assert [strategy.names_region for strategy in (greedy, plain, own, heads)] == [False, False, False, True]


def test_a_value_may_hold_colons():
    (url,) = parse_strategies("steer:steering=s3://b/v.safetensors:steering-strength=2", BASE)
    assert (url.options.steering, url.options.steering_strength) == ("s3://b/v.safetensors", 2.0)
    assert url.folder == "steer-steering-s3---b-v-safetensors-steering-strength-2"
    (query,) = parse_strategies("steer:steering-norm=false:steering=http://h:80/v?a=b", BASE)
    assert (query.options.steering, query.options.steering_norm) == ("http://h:80/v?a=b", False)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("sampling", "sampling"),
        ("greedy,", "strategy ''"),
        ("agd:tau", "'tau' is not KEY=VALUE"),
        ("agd:tau=low", "tau 'low'"),
        ("agd:tau=-1", "must be 0 or more"),
        ("agd:top-k=2.5", "top-k '2.5'"),
        ("agd:temperature=1", "unknown key 'temperature'; known: "),
        ("agd:model=other", "unknown key 'model'"),
        ("agd:rule=lrp", "rule 'lrp'"),
        ("agd:tau=0,agd:tau:0", "'tau' is not KEY=VALUE"),
        ("agd:tau=0:temperature=1", "unknown key 'temperature'"),
        ("steer", "steering is missing; name a file of vectors"),
        ("agd:steering=v", "strategy agd cannot be steered"),
        ("steer:steering=v:steering-strength=inf", "steering_strength inf"),
        ("agd,agd", "share the folder"),
        ("greedy,agd:tau=0:tau=1", "--strategies agd:tau=0:tau=1: tau is named twice"),
        ("agd:top-k=3:tau=0:top_k=3", "top_k is named twice"),
        ("steer:steering=s3://b/v:steering=w", "steering is named twice"),
    ],
)
def test_unusable_strategies(text, word):
    with pytest.raises(ValueError) as error:
        parse_strategies(text, BASE)
    assert word in str(error.value)
    assert "\n" not in str(error.value)
