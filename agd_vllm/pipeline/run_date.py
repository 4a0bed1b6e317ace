"""One date for all prompts of a run, or of an evaluation's runs, on whatever day it is resumed."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from agd_vllm.output import run_date
from agd_vllm.pipeline.decoder import Decoder
from agd_vllm.prompts.template_date import writes_date


def settle_date(decoder: Decoder, directory: str, now: datetime | None) -> dict[str, Any]:
    """Gives the decoder the date that is stored in an output directory, or stores `now` (None: the decoder's own).

    Returns it for `summary.json`. Nothing, and nothing is stored, where the chat template writes no date: such runs are
    the same on all days.
    """
    if not writes_date(decoder.tokenizer.chat_template):
        return {}
    decoder.date = run_date.settle_date(directory, now or decoder.date)
    return {"date": decoder.date.isoformat()}


def recall_date(decoder: Decoder, directory: str) -> None:
    """Gives the decoder the date that is stored in an output directory, if there is one."""
    if writes_date(decoder.tokenizer.chat_template):
        decoder.date = run_date.stored_date(directory) or decoder.date
