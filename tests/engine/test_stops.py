"""The text of a row leaves out what ended it."""

import pytest

from agd_vllm.engine.stops import StopCheck
from agd_vllm.prompts.tokenizer import load_tokenizer
from agd_vllm.records import PreparedRow, Roi


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return load_tokenizer(str(smollm2))


@pytest.mark.parametrize("end", ["token", "string", "eos", "length"])
def test_text_without_its_end(tokenizer, end):
    ids = tokenizer.encode("Hello there. STOP", add_special_tokens=False)
    eos = tokenizer.eos_token_id
    row = PreparedRow(
        "r",
        [1, 2],
        Roi(),
        max_tokens=len(ids) if end == "length" else 40,
        stop=(" STOP",) if end == "string" else (),
        stop_token_ids=(ids[-1],) if end == "token" else (),
    )
    stops = StopCheck(row, frozenset({eos}), tokenizer)
    reasons = [stops.add(token) for token in ([*ids, eos] if end == "eos" else ids)]
    assert set(reasons[:-1]) == {None}
    assert reasons[-1] == ("length" if end == "length" else "stop")
    expected = {
        "token": tokenizer.decode(ids[:-1]),
        "string": "Hello there.",
        "eos": "Hello there. STOP",
        "length": "Hello there. STOP",
    }
    assert stops.text() == expected[end]
