"""Rows of a report as the page's script reads them: compact JSON values, numbers of texts in place of tokens."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from agd_vllm.records import DecodedRow, GuidedStep
from agd_vllm.reporting.texts import TokenTexts

_STEPS = 32767  # of an int16, on each side of zero


def side(row: DecodedRow, texts: TokenTexts) -> dict[str, Any]:
    """One run's row: texts of prompt and answer, regions as [start, end, weight], and the guided steps."""
    return {
        "prompt": texts.sequence(row.prompt_token_ids),
        "answer": texts.sequence(row.token_ids),
        "regions": [[span.start, span.end, span.weight] for span in row.roi_spans],
        "finish": row.finish_reason,
        "metadata": row.metadata,
        "guided": [_guided(step, texts) for step in row.steps],
    }


def _guided(step: GuidedStep, texts: TokenTexts) -> list[Any]:
    """[step, entropy, [[token id, text, probability, score], ...], chosen id, greedy id]; a NaN is null."""
    candidates = zip(step.candidate_ids, step.candidate_probs, step.scores, strict=True)
    return [
        step.step,
        _short(step.entropy),
        [[id, texts.alone(id), _short(probability), _short(score)] for id, probability, score in candidates],
        step.chosen_id,
        step.greedy_id,
    ]


def _short(value: float) -> float | None:
    """All digits of a float32 that a reader could compare, and no more."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def encoded(relevance: Sequence[float]) -> list[Any]:
    """[scale, base64 of int16]: a token's relevance is scale * value / 32767, within 2e-5 of the scale."""
    values = np.nan_to_num(np.asarray(relevance, np.float32))
    scale = float(np.abs(values).max(initial=0.0))
    levels = np.round(values * (_STEPS / scale)) if scale else values
    return [_short(scale), b64encode(levels.astype("<i2").tobytes()).decode()]


def differences(mine: list[int], other: list[int]) -> dict[str, Any]:
    """Where two answers part: the first index, and the ranges [start, end) of each that the other has not.

    Tokens are aligned, so that one that is put in does not set all that follow apart.
    """
    blocks = SequenceMatcher(None, mine, other, autojunk=False).get_opcodes()
    changes = [block for block in blocks if block[0] != "equal"]
    return {
        "first": min((min(block[1], block[3]) for block in changes), default=None),
        "ranges": [
            [[start, end] for _, start, end, _, _ in changes if start < end],
            [[start, end] for _, _, _, start, end in changes if start < end],
        ],
    }


def natural_order(id: str) -> list[Any]:
    """A key that sorts row-2 before row-10."""
    parts = re.split("0*([0-9]+)", id)
    return [(len(part), part) if index % 2 else part for index, part in enumerate(parts)]
