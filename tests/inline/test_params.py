"""What a request for inline attribution says, and what is refused before it could kill an engine."""

import json

import pytest
from vllm import SamplingParams

from agd_vllm.inline.params import EXTRA_ARG, inline_params, inline_params_of, region_salt
from agd_vllm.records import Roi, Span

ROI = Roi((Span(2, 9), Span(4, 6, -0.5)), ((1, 0), (0, 3)))


def request(changes=(), **sampling):
    params = inline_params_of(ROI, 7, "attnlrp", 1.734, 5, 0.05).as_extra_args()
    params[EXTRA_ARG] |= dict(changes)
    return SamplingParams(**({"temperature": 0.0, "extra_args": params} | sampling))


def test_a_request_says_what_it_was_made_of():
    params = inline_params(request())
    assert params.roi == ROI
    assert (params.key, params.rule, params.tau, params.top_k, params.min_prob) == (7, "attnlrp", 1.734, 5, 0.05)
    assert inline_params(SamplingParams(temperature=0.7)) is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"salt": ""}, "salt"),
        ({"spans": [[0, 9, 1.0]]}, "salt"),
        ({"rule": "ixg"}, "salt"),
        ({"tau": -1.0}, "tau"),
        ({"top_k": 1}, "top_k"),
        ({"spans": [[5, 5, 1.0]]}, "span"),
        ({"spans": [[5, 8, float("inf")]]}, "span"),
        ({"spans": [], "heads": []}, "no region"),
        ({"key": "x"}, "key"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes, word):
    with pytest.raises(ValueError, match=word) as error:
        inline_params(request(changes))
    assert "\n" not in str(error.value)


def test_json_that_names_a_key_twice_is_refused():
    params = request()
    text = json.dumps(params.extra_args[EXTRA_ARG])
    params.extra_args[EXTRA_ARG] = text
    assert inline_params(params) == inline_params(request())
    params.extra_args[EXTRA_ARG] = text.replace('"tau":', '"tau": 0.5, "tau":')
    with pytest.raises(ValueError, match="tau is named twice"):
        inline_params(params)


def test_a_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature 0"):
        inline_params(request(temperature=0.5))


def test_without_its_salt_a_region_is_refused():
    params = request()
    del params.extra_args[EXTRA_ARG]["salt"]
    with pytest.raises(ValueError, match="salt"):
        inline_params(params)


def test_salts_tell_regions_and_rules_apart_and_nothing_else():
    salts = [
        region_salt(roi, rule)
        for rule in ("attnlrp", "ixg")
        for roi in (ROI, Roi(ROI.spans), Roi((), ROI.heads), Roi((Span(2, 9, 2.0),)), Roi((Span(2, 10, 2.0),)))
    ]
    assert len(set(salts)) == len(salts)
    assert region_salt(Roi(ROI.spans[::-1], ROI.heads[::-1]), "ixg") == salts[5]
