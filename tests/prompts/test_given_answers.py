"""Answers that come with their rows, token by token."""

import pytest
from tiny_tokenizers import tiny

from agd_vllm.prompts.answers import given_answer
from agd_vllm.prompts.prepare import Preparer
from agd_vllm.records import InputRow, RowRefused

QUESTION = {"role": "user", "content": "what is the weather like?"}


def answer(content):
    preparer = Preparer(tiny("byte_level", "qwen3"), default_roi=None, guided=True, max_tokens=8)
    row = InputRow(id="a", messages=(QUESTION, {"role": "assistant", "content": content}))
    return given_answer(row, preparer)


def test_an_answer_with_thoughts_is_taken_whole():
    content = "<think>\nin the early morning?\n</think>\n\nAnswer in French."
    given = answer(content)
    tokenizer = tiny("byte_level")
    assert given.text == tokenizer.decode(given.token_ids) == content
    assert tokenizer.decode(given.prompt_token_ids).endswith("like?<|end|>\n<|start|>assistant\n")


def test_an_answer_that_the_template_writes_in_another_way_is_refused():
    with pytest.raises(RowRefused, match="the final message does not appear in the chat"):
        answer("<think>in the early morning?</think>Answer in French.")
