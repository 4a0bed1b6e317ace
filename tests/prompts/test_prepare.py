"""Rows to prepared rows: run defaults, limits, and every reason for which a row cannot run."""

import dataclasses

import pytest
from test_tokenizer import prompt_of
from tiny_tokenizers import tiny

from agd_vllm.input.reader import read_rows
from agd_vllm.prompts.prepare import Preparer
from agd_vllm.prompts.tokenizer import load_tokenizer
from agd_vllm.records import InputRow, PreparedRow, Roi, RowRefused, Selector, Span

SYSTEM = (Selector(role="system"),)
CHAT = InputRow(
    id="a",
    messages=(
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "what is the weather like?"},
    ),
)
NO_SYSTEM = InputRow(id="b", messages=({"role": "user", "content": "what is the weather like?"},))
PROMPT = InputRow(id="c", prompt="Answer in French.")


def preparer(template="chatml", **settings):
    defaults = {"default_roi": SYSTEM, "guided": True, "max_tokens": 256, "max_model_len": None}
    return Preparer(tiny("byte_level", template), **{**defaults, **settings})


def refusal(row, **settings):
    with pytest.raises(RowRefused) as refused:
        preparer(**settings).prepare(row)
    return refused.value.type, str(refused.value)


def region_text(prepared):
    tokenizer = tiny("byte_level")
    return [tokenizer.decode(prepared.prompt_token_ids[span.start : span.end]) for span in prepared.roi.spans]


def test_a_row_with_its_own_settings():
    row = dataclasses.replace(
        CHAT,
        roi=(Selector(message=1, text="weather", weight=2.0),),
        max_tokens=7,
        min_tokens=3,
        stop=("\n\n",),
        stop_token_ids=(5,),
    )
    prepared = preparer().prepare(row)
    ids = prompt_of(tiny("byte_level"), list(row.messages), tokenize=True)
    (span,) = prepared.roi.spans
    assert tiny("byte_level").decode(ids[span.start : span.end]) == " weather"
    assert prepared == PreparedRow(
        id="a",
        prompt_token_ids=ids,
        roi=Roi(spans=(Span(span.start, span.end, 2.0),)),
        max_tokens=7,
        min_tokens=3,
        stop=("\n\n",),
        stop_token_ids=(5,),
    )


def test_run_defaults_apply():
    prepared = preparer().prepare(CHAT)
    assert region_text(prepared) == ["Answer in French."]
    assert (prepared.max_tokens, prepared.min_tokens) == (256, 0)


def test_a_rows_region_comes_before_the_runs():
    row = dataclasses.replace(CHAT, roi=(Selector(message=0, text="French"),))
    assert region_text(preparer().prepare(row)) == [" French"]


def test_text_as_the_runs_region_is_looked_for_in_every_message():
    settings = {"default_roi": (Selector(text="weather"),)}
    assert region_text(preparer(**settings).prepare(NO_SYSTEM)) == [" weather"]


def test_without_guidance_no_region_is_looked_at():
    row = dataclasses.replace(CHAT, roi=(Selector(message=99),))
    assert preparer(guided=False).prepare(row).roi == Roi()
    assert preparer(guided=False).prepare(PROMPT).roi == Roi()


def test_roi_none_leaves_rows_without_a_region_unguided():
    assert preparer(default_roi=None).prepare(CHAT).roi == Roi()
    row = dataclasses.replace(CHAT, roi=SYSTEM)
    assert region_text(preparer(default_roi=None).prepare(row)) == ["Answer in French."]


@pytest.mark.parametrize("row", [NO_SYSTEM, PROMPT])
def test_a_row_without_a_region_is_refused_with_the_way_out(row):
    kind, message = refusal(row)
    assert kind == "roi"
    assert "give the row a roi, or decode rows without one unguided with --roi none" in message


def test_a_rows_own_bad_region_is_not_blamed_on_the_run():
    kind, message = refusal(dataclasses.replace(CHAT, roi=(Selector(message=0, text="Spanish"),)))
    assert kind == "roi"
    assert "--roi none" not in message


def test_room_in_the_model():
    size = len(preparer().prepare(CHAT).prompt_token_ids)
    assert preparer(max_model_len=size + 10).prepare(CHAT).max_tokens == 10
    assert preparer(max_model_len=size + 1).prepare(CHAT).max_tokens == 1
    assert preparer(max_model_len=size + 300).prepare(CHAT).max_tokens == 256
    kind, message = refusal(CHAT, max_model_len=size)
    assert kind == "prompt_length"
    assert f"has {size} tokens, the model takes {size}" in message
    assert "shorten it or raise --max-model-len" in message


def test_a_prompt_of_no_tokens():
    kind, message = refusal(InputRow(id="d", prompt=""), guided=False)
    assert (kind, message) == ("prompt_length", "the prompt has no tokens; give it some text")


def test_min_tokens_must_fit():
    row = dataclasses.replace(CHAT, min_tokens=8)
    assert preparer(max_tokens=8).prepare(row).min_tokens == 8
    kind, message = refusal(row, max_tokens=7)
    assert kind == "min_tokens"
    assert "min_tokens is 8, but at most 7" in message
    size = len(preparer().prepare(CHAT).prompt_token_ids)
    assert "at most 5" in refusal(row, max_model_len=size + 5)[1]


def test_template_kwargs_of_run_and_row(monkeypatch):
    tokenizer = tiny("byte_level", "chatml")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ tone }} {{ pace }} " + tokenizer.chat_template)
    both = preparer(chat_template_kwargs={"tone": "kind", "pace": "slow"})
    row = dataclasses.replace(CHAT, chat_template_kwargs={"tone": "rude"})
    start = tokenizer.decode(both.prepare(row).prompt_token_ids)[:10]
    assert start == "rude slow "
    assert tokenizer.decode(both.prepare(CHAT).prompt_token_ids)[:10] == "kind slow "


@pytest.mark.parametrize("name", ["chat_template", "add_generation_prompt", "tokenize", "messages", "bos_token"])
def test_template_kwargs_that_are_not_the_templates(name):
    kind, message = refusal(dataclasses.replace(CHAT, chat_template_kwargs={name: "{{ 1 }}"}))
    assert kind == "chat_template_kwargs"
    assert name in message
    with pytest.raises(ValueError, match=f"cannot set {name}"):
        preparer(chat_template_kwargs={name: "{{ 1 }}"})


@pytest.mark.parametrize(
    "kwargs", [{"documents": [{"title": "x", "text": "so <|end|> then"}]}, {"map": {"<|end|>": 1}}, {"tone": "<|end|>"}]
)
def test_template_kwargs_cannot_carry_control_tokens(kwargs):
    row = dataclasses.replace(CHAT, chat_template_kwargs=kwargs)
    kind, message = refusal(row)
    assert kind == "chat_template_kwargs"
    assert "<|end|>" in message


def test_the_pause_token_stays_out_of_prompts():
    pause = tiny("byte_level").convert_tokens_to_ids("<|pad|>")
    row = InputRow(id="e", prompt="Answer<|pad|>in", roi=(Selector(text="in"),))
    assert pause in preparer().prepare(row).prompt_token_ids
    kind, message = refusal(row, pause_token_id=pause)
    assert kind == "special_tokens"
    assert f"holds the token {pause}" in message
    # Spelled in a chat it is no token, so there is nothing to refuse.
    row = dataclasses.replace(CHAT, messages=(*CHAT.messages[:1], {"role": "user", "content": "Answer<|pad|>in"}))
    assert pause not in preparer(pause_token_id=pause).prepare(row).prompt_token_ids


def test_a_model_without_a_template_takes_prompts_only():
    assert refusal(CHAT, template=None)[0] == "chat_template"
    assert preparer(template=None, default_roi=None).prepare(PROMPT).prompt_token_ids


def test_the_demo_rows_are_usable(smollm2, request):
    """Each decodes under the default region, with a short prompt and few tokens to generate."""
    rows = list(read_rows([str(request.config.rootpath / "examples/demo.jsonl")]))
    demo = Preparer(load_tokenizer(str(smollm2)), default_roi=SYSTEM, guided=True, max_tokens=256, max_model_len=2048)
    prepared = [demo.prepare(row) for row in rows]
    assert 24 <= len(prepared) <= 28
    assert [row.id for row in prepared] == [f"demo-{number:02d}" for number in range(1, len(prepared) + 1)]
    assert all(row.roi and len(row.prompt_token_ids) <= 250 and row.max_tokens <= 96 for row in prepared)


def test_a_token_beyond_the_models_vocabulary_is_refused():
    largest = max(preparer().prepare(CHAT).prompt_token_ids)
    assert preparer(vocab_size=largest + 1).prepare(CHAT)
    kind, message = refusal(CHAT, vocab_size=largest)
    assert kind == "special_tokens"
    assert f"token {largest}" in message


def test_stop_tokens_beyond_the_models_vocabulary_are_refused():
    row = dataclasses.replace(CHAT, stop_token_ids=(5, 499))
    assert preparer(vocab_size=500).prepare(row).stop_token_ids == (5, 499)
    kind, message = refusal(row, vocab_size=499)
    assert kind == "stop_token_ids"
    assert message == "stop_token_ids holds 499, the model's tokens are 0 to 498; take it out"


def test_a_prompt_that_can_only_be_too_long_is_refused_before_it_is_tokenized(monkeypatch):
    longest = max(map(len, tiny("byte_level").get_vocab()))
    huge = dataclasses.replace(PROMPT, prompt="a" * (100 * longest + 1))
    ours = preparer(default_roi=None, max_model_len=100)
    monkeypatch.setattr(ours._tokenizer, "encode", lambda rendered: pytest.fail("it was tokenized"))
    with pytest.raises(RowRefused, match="characters"):
        ours.prepare(huge)


# Warnings


def warnings_of(rows, tokenizer=None, **settings):
    """What is said while the rows are prepared."""
    ours = Preparer(
        tokenizer or tiny("byte_level"), **{"default_roi": None, "guided": True, "max_tokens": 8, **settings}
    )
    said = []
    ours.warn = said.append
    for row in rows:
        ours.prepare(row)
    return said


@pytest.mark.parametrize("prompt", ["<s> Answer in French.", "Answer in French.<|end|>", "<s>"])
def test_a_special_token_that_the_prompt_spells_and_the_tokenizer_adds_is_said_once(prompt):
    rows = [InputRow(id="a\n", prompt=prompt), InputRow(id="b", prompt=prompt)]
    (said,) = warnings_of([PROMPT, *rows], tiny("wordpiece"))
    token = "<|end|>" if prompt.endswith("<|end|>") else "<s>"
    assert said.startswith(f"row 'a\\n': the prompt spells out {token}, which the tokenizer adds as well")
    assert "leave it out of the prompt" in said


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level"])
def test_a_special_token_that_stands_there_once_is_no_matter(kind):
    rows = [InputRow(id="a", prompt=prompt) for prompt in ("Answer <s> in French.", "<|end|> x <s>", "Answer")]
    rows += [InputRow(id="b", prompt="<s> Answer")] if kind == "byte_level" else []
    assert not warnings_of(rows, tiny(kind))


def test_a_stop_string_that_the_text_never_holds_is_said_once():
    rows = [dataclasses.replace(PROMPT, stop=("x", stop)) for stop in ("a<|start|>\n", "<|pad|>")]
    (said,) = warnings_of([PROMPT, *rows])
    assert said.startswith(
        "row 'c': the stop string \"a<|start|>\\n\" holds the special token <|start|>, which the text"
    )
    assert "give stop_token_ids [2]" in said


def test_a_special_token_that_ends_the_row_may_be_a_stop_string():
    row = dataclasses.replace(PROMPT, stop=("<|end|>", "<|start|>"), stop_token_ids=(2,))
    assert not warnings_of([row], eos_ids=frozenset({3}))
    assert warnings_of([row])


def test_warnings_go_to_the_log(caplog):
    ours = preparer(default_roi=None)
    for _ in range(2):
        ours.prepare(dataclasses.replace(PROMPT, stop=("<|start|>",)))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("agd_vllm", "WARNING")
