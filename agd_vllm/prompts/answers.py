"""Answers that come with their rows: a last message of role assistant, taken as it is in place of a decoded one."""

from __future__ import annotations

from agd_vllm.prompts.prepare import Preparer
from agd_vllm.records import DecodedRow, InputRow, RowRefused

GIVEN = "given"
"""The `finish_reason` of an answer that was not decoded."""


def gives_answer(row: InputRow) -> bool:
    """Whether the row's last message is the assistant's."""
    return row.messages is not None and row.messages[-1]["role"] == "assistant"


def given_answer(row: InputRow, preparer: Preparer) -> DecodedRow:
    """The row as if its last message had been decoded, token by token as the chat template's text is tokenized.

    A token that holds both the template's characters and the answer's first ones counts as the answer's. Raises
    RowRefused for a row that cannot run, and for an answer that the template changes or leaves out.
    """
    preparer.prepare(row)  # refuses what is too long, or no token of the model
    rendered, tokens = preparer.encode(row)
    last = len(row.messages) - 1
    if not rendered.places[last]:
        raise RowRefused(
            "answer", f"message {last} (assistant) {rendered.faults[last]}; give an answer, or leave the message out"
        )
    place = rendered.places[last][-1]
    begin = next(index for index, (_, end) in enumerate(tokens.offsets) if end > place.start)
    end = next((index for index, (start, _) in enumerate(tokens.offsets) if start >= place.end), len(tokens.ids))
    if begin == 0:
        raise RowRefused("answer", "no token stands before the answer; give a message for it to answer")
    return DecodedRow(
        id=row.id,
        text=rendered.text[place.start : place.end],
        token_ids=tokens.ids[begin:end],
        prompt_token_ids=tokens.ids[:begin],
        roi_spans=(),
        finish_reason=GIVEN,
        steps=[],
        metadata=row.metadata,
    )
