"""A region repeated at the end of the last user message: what anyone can do without attribution."""

from __future__ import annotations

import dataclasses

from agd_vllm.prompts.roi import positive_texts
from agd_vllm.prompts.template import Rendered
from agd_vllm.records import InputRow, RowRefused, Selector


def emphasized(row: InputRow, selectors: tuple[Selector, ...], rendered: Rendered) -> InputRow:
    """`row` with the text of its region's positive spans, verbatim and in order, a paragraph each, after its last user
    message. `rendered` is the row as it is. Raises RowRefused where there is nothing to say, or no one to say it."""
    if row.messages is None:
        raise RowRefused("emphasize", "strategy emphasize adds to a user message, a prompt row has none; give messages")
    last = max((at for at, message in enumerate(row.messages) if message["role"] == "user"), default=None)
    if last is None:
        raise RowRefused("emphasize", "strategy emphasize adds to a user message, the row has none; give it one")
    texts = positive_texts(selectors, rendered)
    if not texts:
        raise RowRefused("emphasize", "no part of the region has a positive weight; give one that has, to be repeated")
    messages = list(row.messages)
    messages[last] = messages[last] | {"content": "\n\n".join([messages[last]["content"], *texts])}
    return dataclasses.replace(row, messages=tuple(messages))
