"""The region repeated: what is repeated, where, and which rows have nothing to repeat."""

import dataclasses

import pytest
from test_prepare import CHAT, PROMPT, preparer, refusal
from tiny_tokenizers import tiny

from agd_vllm.records import InputRow, Selector


def said(*selectors, row=CHAT):
    """The row's prompt, emphasized, as text."""
    changed = dataclasses.replace(row, roi=selectors) if selectors else row
    prepared = preparer(guided=False, emphasized=True).prepare(changed)
    assert not prepared.roi
    return tiny("byte_level").decode(prepared.prompt_token_ids)


def test_the_default_region_is_said_at_the_end_of_the_last_user_message():
    turns = (*CHAT.messages, {"role": "assistant", "content": "Il pleut."}, {"role": "user", "content": "And now?"})
    text = said(row=dataclasses.replace(CHAT, messages=turns))
    assert "And now?\n\nAnswer in French.<" in text
    assert "like?<" in text
    assert text.count("Answer in French.") == 2


@pytest.mark.parametrize(
    ("selectors", "addition"),
    [
        ([Selector(message=1, text="weather")], "\n\nweather"),
        # In the order of the prompt, not of the selectors.
        ([Selector(message=1, text="weather"), Selector(message=0, text="French")], "\n\nFrench\n\nweather"),
        ([Selector(role="system"), Selector(message=1, text="weather", weight=-2)], "\n\nAnswer in French."),
        ([Selector(role="system"), Selector(message=0, text=" in", weight=-1)], "\n\nAnswer\n\n French."),
        ([Selector(role="system", weight=2), Selector(message=0, text="in", weight=-0.5)], "\n\nAnswer in French."),
        ([Selector(role="system", weight=0.3), Selector(message=0, text="in", weight=-0.3)], "\n\nAnswer \n\n French."),
        ([Selector(role="system"), Selector(message=0, text="Answer")], "\n\nAnswer in French."),
    ],
)
def test_text_of_positive_weight_is_said_verbatim_and_in_order(selectors, addition):
    assert f"what is the weather like?{addition}<" in said(*selectors)


def test_a_row_that_cannot_say_its_region_is_refused():
    settings = {"guided": False, "emphasized": True}
    assert refusal(dataclasses.replace(PROMPT, roi=(Selector(text="French"),)), **settings)[0] == "emphasize"
    negative = dataclasses.replace(CHAT, roi=(Selector(role="system", weight=-1),))
    assert "no part of the region has a positive weight" in refusal(negative, **settings)[1]
    alone = InputRow(id="s", messages=({"role": "system", "content": "Answer."},))
    assert "the row has none" in refusal(alone, **settings)[1]
    missing = dataclasses.replace(CHAT, roi=(Selector(text="not there"),))
    assert refusal(missing, **settings)[0] == "roi"


def test_without_a_region_a_row_is_as_it_was():
    plain = preparer(guided=False, default_roi=None).prepare(CHAT)
    emphasizing, said = preparer(guided=False, emphasized=True, default_roi=None), []
    emphasizing.warn = said.append
    assert [emphasizing.prepare(CHAT) for _ in range(2)] == [plain, plain]
    (hint,) = said
    assert "names no region, so nothing is repeated" in hint and "--roi" in hint
