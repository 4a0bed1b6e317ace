"""NAME[:KEY=VALUE...]: decoder options, a folder, or one line on what is wrong."""

import pytest

from agd_vllm.evaluation.strategies import parse_strategies
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.strategies.agd import Agd
from agd_vllm.strategies.greedy import Greedy
from agd_vllm.strategies.steer import Steer

BASE = {"model": "m", "tau": 1.0, "max_tokens": 9}


def test_keys_are_options_of_the_decoder():
    greedy, plain, own, heads = parse_strategies(
        "greedy,agd,agd:tau=0:rule=ixg:top-k=3:attribution-dtype=float32,agd:roi-heads=some/heads.json", BASE
    )
    assert (greedy.options.strategy, greedy.folder) == (Greedy(), "greedy")
    assert plain.options == DecoderOptions.of(**BASE)
    assert own.name == "agd:tau=0:rule=ixg:top-k=3:attribution-dtype=float32"
    assert own.folder == "agd-tau-0-rule-ixg-top-k-3-attribution-dtype-float32"
    assert own.options.strategy == Agd(tau=0.0, rule="ixg", top_k=3, attribution_dtype="float32")
    assert own.options.max_tokens == 9
    assert heads.options.strategy.roi_heads == "some/heads.json"
    assert [strategy.names_region for strategy in (greedy, plain, own, heads)] == [False, False, False, True]


def test_a_value_may_hold_colons():
    (url,) = parse_strategies("steer:steering=s3://b/v.safetensors:steering-strength=2", {"model": "m"})
    assert url.options.strategy == Steer(steering="s3://b/v.safetensors", steering_strength=2.0)
    assert url.folder == "steer-steering-s3---b-v-safetensors-steering-strength-2"
    (query,) = parse_strategies("steer:steering-norm=false:steering=http://h:80/v?a=b", {"model": "m"})
    assert query.options.strategy == Steer(steering="http://h:80/v?a=b", steering_norm=False)


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
        ("agd:steering=v", "steering: strategy agd has no such option; leave it out, or choose strategy steer"),
        (
            "agd,greedy:tau=1",
            "tau: strategy greedy has no such option; leave it out, or choose strategy agd or r",
        ),
        ("greedy,cad", "tau: no strategy here has this option; leave it out, or add agd or random-candidate"),
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
