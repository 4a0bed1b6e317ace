"""Answers to questions, compared as SQuAD does (arXiv 1606.05250): without case, punctuation, articles and spacing."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """In lower case, without articles, punctuation and repeated spaces, as SQuAD's script has it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, answers: Iterable[str]) -> bool:
    """Whether `text` is one of the answers, after normalisation."""
    return normalised(text) in _all(answers)


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether one of the answers stands in `text` as whole words, after normalisation.

    Models that talk around a right answer pass too; lost-in-the-middle (arXiv 2307.03172) scores this way.
    """
    padded = f" {normalised(text)} "
    return any(f" {answer} " in padded for answer in _all(answers))


def _all(answers: Iterable[str]) -> set[str]:
    """Normalised answers; one that is nothing but articles and punctuation would be in every text."""
    return {normalised(answer) for answer in answers} - {""}
