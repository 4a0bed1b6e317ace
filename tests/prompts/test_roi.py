"""Selectors to token spans: every character that is selected, no token that is not, and a clear word otherwise."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import conversations, encoded
from tiny_tokenizers import KINDS, TEMPLATES, tiny

from agd_vllm.prompts.roi import region
from agd_vllm.prompts.template import raw_prompt
from agd_vllm.prompts.tokenizer import ChatTokenizer, load_tokenizer
from agd_vllm.records import RowRefused, Selector, Span


def chat_region(messages, *selectors, kind="byte_level", template="chatml"):
    """The region's pieces of text, its spans, and all tokens' text."""
    rendered, tokens = encoded(tiny(kind, template), messages)
    roi = region(selectors, rendered, tokens)
    pieces = [rendered.text[start:end] for start, end in tokens.offsets]
    return ["".join(pieces[span.start : span.end]) for span in roi.spans], roi.spans, pieces


def prompt_region(prompt, *selectors, kind="byte_level"):
    """The characters of each token of the region, and its weight."""
    rendered = raw_prompt(prompt)
    tokens = ChatTokenizer(tiny(kind)).encode(rendered)
    spans = region(selectors, rendered, tokens).spans
    return [
        (prompt[slice(*tokens.offsets[index])], span.weight) for span in spans for index in range(span.start, span.end)
    ]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(sorted(TEMPLATES)), conversations(), st.data())
def test_a_region_is_the_tokens_that_overlap_the_selected_characters(kind, template, messages, data):
    rendered, tokens = encoded(tiny(kind, template), messages)
    i = data.draw(st.sampled_from([i for i in range(len(messages)) if i not in rendered.faults]))
    content = messages[i]["content"]
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start + 1, len(content)))
    trimmed = (len(content) - len(content.lstrip()), len(content.rstrip()))
    selected, at = set(), -1
    for occurrence in range(rendered.text.count(f"Q{i}Z")):
        at = rendered.text.index(f"Q{i}Z", at + 1)
        shift = at - content.index(f"Q{i}Z")
        role = messages[i]["role"]
        strips_both = template == "llama3" or (template == "gemma" and role != "system")
        strips_left = strips_both or (template == "twice_no_system" and role == "assistant")
        strips_right = strips_both or (template == "twice_no_system" and occurrence == 1)
        first = max(start, trimmed[0]) if strips_left else start
        if template == "qwen3" and role == "assistant" and i == len(messages) - 1:
            # Written after an empty thought, as an answer to go on with.
            first = max(start, len(content) - len(content.lstrip("\n")))
        last = min(end, trimmed[1]) if strips_right else end
        selected |= set(range(shift + first, shift + last))
    expected = [k for k, (a, b) in enumerate(tokens.offsets) if selected.intersection(range(a, b))]
    try:
        roi = region([Selector(message=i, chars=(start, end))], rendered, tokens)
    except RowRefused:
        assert not expected
        return
    assert [k for span in roi.spans for k in range(span.start, span.end)] == expected
    assert all(earlier.end < later.start for earlier, later in zip(roi.spans, roi.spans[1:], strict=False))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["byte_level", "byte_level_trimmed"]), conversations(), st.data())
def test_a_regions_tokens_decode_to_the_selected_text(kind, messages, data):
    """Independent of offsets: what the tokens themselves say."""
    tokenizer = tiny(kind, "qwen")
    rendered, tokens = encoded(tokenizer, messages)
    i = data.draw(st.integers(0, len(messages) - 1))
    content = messages[i]["content"]
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start + 1, len(content)))
    (span,) = region([Selector(message=i, chars=(start, end))], rendered, tokens).spans
    assert content[start:end] in tokenizer.decode(tokens.ids[span.start : span.end], clean_up_tokenization_spaces=False)
    inner = tokenizer.decode(tokens.ids[span.start + 1 : span.end - 1], clean_up_tokenization_spaces=False)
    assert "\ufffd" in inner or inner in content[start:end]


SYSTEM_USER = [
    {"role": "system", "content": "Answer in French. Please answer in one sentence."},
    {"role": "user", "content": "what is the weather like in French?"},
]


@pytest.mark.parametrize("template", ["chatml", "qwen", "llama3", "gemma"])
def test_role_selects_the_words_and_not_the_markers(template):
    texts, _, _ = chat_region(SYSTEM_USER, Selector(role="system"), template=template)
    assert texts == ["Answer in French. Please answer in one sentence."]


def test_the_demo_model(smollm2):
    tokenizer = load_tokenizer(str(smollm2))
    rendered, tokens = encoded(tokenizer, SYSTEM_USER)
    roi = region([Selector(message=0, text="French")], rendered, tokens)
    (span,) = roi.spans
    assert tokenizer.decode(tokens.ids[span.start : span.end]) == " French"


def test_text_in_one_message_or_in_all():
    one, _, _ = chat_region(SYSTEM_USER, Selector(message=0, text="in French"))
    assert one == [" in French"]
    everywhere, _, _ = chat_region(SYSTEM_USER, Selector(text="in French"))
    assert everywhere == [" in French", " in French"]


def test_text_selects_from_left_to_right_without_overlaps():
    assert prompt_region("aXaXaXa", Selector(text="aXa")) == [(c, 1.0) for c in "aXaaXa"]


def test_text_is_no_pattern():
    assert prompt_region("a.c abc", Selector(text="a.c")) == [("a", 1.0), (".", 1.0), ("c", 1.0)]


def test_a_token_that_straddles_belongs():
    rendered = raw_prompt("Answer in French.")
    tokens = ChatTokenizer(tiny("byte_level")).encode(rendered)
    assert tokens.offsets == [(0, 6), (6, 9), (9, 16), (16, 17)]
    assert region([Selector(chars=(5, 7))], rendered, tokens).spans == (Span(0, 2, 1.0),)
    assert region([Selector(chars=(6, 9))], rendered, tokens).spans == (Span(1, 2, 1.0),)


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_trimmed", "llama2", "gemma"])
def test_all_bytes_of_a_character_belong(kind):
    chosen = prompt_region("x 🤖 y", Selector(text="🤖"), kind=kind)
    assert chosen == [("🤖", 1.0)] * 4


def test_combining_marks():
    # A mark's bytes have tokens of their own; composed with its letter, it is in the letter's token.
    assert prompt_region("cafe\u0301", Selector(chars=(4, 5))) == [("\u0301", 1.0)] * 2
    assert prompt_region("cafe\u0301", Selector(chars=(3, 5)), kind="wordpiece") == [("cafe", 1.0)]


def test_cjk_and_crlf():
    assert "".join(text for text, _ in prompt_region("a\r\n日本語\r\nb", Selector(text="\r\n"))) == "\r\n\r\n"
    texts, _, _ = chat_region([{"role": "user", "content": "a\r\n日本語\r\nb"}], Selector(message=0, chars=(3, 6)))
    assert texts[0][0] == "日"


def test_chars_count_in_the_content_as_given_even_where_it_is_trimmed():
    messages = [{"role": "user", "content": "\n\n  in French \n"}]
    texts, _, _ = chat_region(messages, Selector(message=0, chars=(7, 13)), template="llama3")
    assert texts == [" French"]


def test_a_message_rendered_twice_counts_twice():
    messages = [{"role": "user", "content": "what is the weather"}]
    texts, _, _ = chat_region(messages, Selector(message=0, text="weather"), template="twice_no_system")
    assert texts == [" weather", " weather"]


def test_weights_add_up_where_selectors_overlap():
    text = "Answer in French."
    one, two = Selector(chars=(0, 9), weight=0.5), Selector(chars=(6, 17), weight=-2.0)
    assert prompt_region(text, one, two) == [("Answer", 0.5), (" in", -1.5), (" French", -2.0), (".", -2.0)]


def test_spans_are_maximal_runs_of_one_weight():
    rendered = raw_prompt("Answer in French.")
    tokens = ChatTokenizer(tiny("byte_level")).encode(rendered)
    roi = region([Selector(text="."), Selector(text="Answer"), Selector(text=" in")], rendered, tokens)
    assert roi.spans == (Span(0, 2, 1.0), Span(3, 4, 1.0))
    assert roi.heads == ()


def test_one_selector_counts_a_token_once():
    # "ence" holds two occurrences.
    assert prompt_region("sentence", Selector(text="e")) == [("ent", 1.0), ("ence", 1.0)]


def test_decimal_weights_cancel_as_they_read():
    parts = [Selector(text="in", weight=weight) for weight in (0.1, 0.2, -0.3)]
    assert prompt_region("Answer in French.", *parts, Selector(text="French")) == [(" French", 1.0)]


def test_weights_that_cancel_everywhere_are_refused():
    with pytest.raises(RowRefused, match="cancel on every token"):
        prompt_region("Answer", Selector(text="Answer"), Selector(chars=(0, 6), weight=-1.0))


def test_weights_that_add_up_beyond_float32_are_refused():
    with pytest.raises(RowRefused, match="beyond float32"):
        prompt_region("Answer", Selector(text="Answer", weight=3e38), Selector(chars=(0, 6), weight=3e38))


CHAT_REFUSALS = [
    (Selector(role="assistant"), '"role": "assistant"}: no message has this role'),
    (Selector(message=2), '"message": 2}: the row has 2 messages, numbered from 0'),
    (Selector(message=0, text="Spanish"), r"message 0 \(system\) does not hold this text"),
    (Selector(text="Spanish"), "no message holds this text"),
    (Selector(message=1, chars=(30, 36)), r"message 1 \(user\) has 35 characters"),
    (Selector(message=1, chars=(4, 4)), "start < end"),
    (Selector(message=1, chars=(-3, 2)), "start < end"),
    (Selector(chars=(0, 2)), "chars need a message"),
]


@pytest.mark.parametrize(("selector", "reason"), CHAT_REFUSALS)
def test_refused_in_a_chat(selector, reason):
    with pytest.raises(RowRefused, match=reason) as refusal:
        chat_region(SYSTEM_USER, selector)
    assert refusal.value.type == "roi"


@pytest.mark.parametrize(
    ("selector", "reason"),
    [
        (Selector(role="system"), "a prompt row has no messages"),
        (Selector(message=0), "a prompt row has no messages"),
        (Selector(text="Spanish"), "the prompt does not hold this text"),
        (Selector(chars=(0, 18)), "the prompt has 17 characters"),
    ],
)
def test_refused_in_a_prompt(selector, reason):
    with pytest.raises(RowRefused, match=reason) as refusal:
        prompt_region("Answer in French.", selector)
    assert refusal.value.type == "roi"


def test_refused_where_the_template_leaves_the_message_out():
    with pytest.raises(RowRefused, match=r"message 0 \(system\) is left out by the chat template"):
        chat_region(SYSTEM_USER, Selector(role="system"), template="twice_no_system")
    texts, _, _ = chat_region(SYSTEM_USER, Selector(role="user"), template="twice_no_system")
    assert texts == ["what is the weather like in French?"] * 2


def test_a_message_without_places_that_does_not_hold_the_text_is_in_no_ones_way():
    texts, _, _ = chat_region(SYSTEM_USER, Selector(text="weather"), template="twice_no_system")
    assert texts == [" weather", " weather"]
    with pytest.raises(RowRefused, match=r"message 0 \(system\) is left out"):
        chat_region(SYSTEM_USER, Selector(text="French"), template="twice_no_system")


def test_refused_where_the_template_changes_the_message():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "hm</think>\n\nYes"},
        {"role": "user", "content": "Go on"},
    ]
    with pytest.raises(RowRefused, match=r"message 1 \(assistant\) is changed by the chat template"):
        chat_region(messages, Selector(message=1, text="Yes"), template="thinking")


def test_refused_where_the_message_is_empty():
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    with pytest.raises(RowRefused, match=r"message 0 \(system\) is empty"):
        chat_region(messages, Selector(role="system"))


def test_refused_where_the_template_trims_the_characters():
    messages = [{"role": "user", "content": "  in French  "}]
    with pytest.raises(RowRefused, match="the chat template trims these characters"):
        chat_region(messages, Selector(message=0, chars=(0, 2)), template="llama3")


def test_refused_where_the_tokenizer_drops_the_characters():
    with pytest.raises(RowRefused, match="no token covers these characters"):
        prompt_region("in  French", Selector(chars=(2, 4)), kind="wordpiece")


def test_a_long_text_is_named_in_short():
    with pytest.raises(RowRefused, match=r"x{57}\.\.\.") as refusal:
        prompt_region("Answer", Selector(text="x" * 5000))
    assert len(str(refusal.value)) < 200
