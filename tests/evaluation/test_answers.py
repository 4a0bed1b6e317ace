"""Answers against what a model says, after normalisation."""

import pytest

from agd_vllm.evaluation.answers import contains_answer, exact_match


@pytest.mark.parametrize(
    ("text", "answers", "exact", "contained"),
    [
        ("The Beatles.", ["beatles"], True, True),
        ("It was Wilhelm  Conrad\nRöntgen!", ["Marie Curie", "Wilhelm Conrad Röntgen"], False, True),
        ("In 1905.", ["190"], False, False),
        ("A part of the art", ["par"], False, False),
        ("", ["Paris"], False, False),
        ("anything", ["The"], False, False),
    ],
)
def test_match_and_containment(text, answers, exact, contained):
    assert exact_match(text, answers) == exact
    assert contains_answer(text, answers) == contained
