"""Natural Questions with the gold passage, as lost-in-the-middle publishes it (arXiv 2307.03172): rows with a source.

The region is the source: the passage, or with distractors all passages, since what decodes a row in earnest does not
know which of them holds the answer either.
"""

from __future__ import annotations

import random
from typing import Any

from agd_vllm.evaluation.answers import contains_answer

INSTRUCTION = "Answer the question from the document, in as few words as possible."
INSTRUCTION_MANY = "Answer the question from the documents, in as few words as possible."
CLOSED_BOOK_INSTRUCTION = "Answer the question, in as few words as possible."

Record = dict[str, Any]


def check(record: Record) -> Record:
    """The record as it is. Raises KeyError, TypeError, IndexError or ValueError for one of another format."""
    passages = [passage["text"] for passage in record["ctxs"]]
    if not passages or not all(isinstance(text, str) and text for text in [record["question"], *passages]):
        raise ValueError("question and the text of each of ctxs must be non-empty strings")
    check_answers(record["answers"])
    return record


def check_answers(answers: Any) -> None:
    """Raises ValueError, in one line, unless `answers` are strings that are not empty."""
    if not isinstance(answers, list) or not answers or not all(isinstance(text, str) and text for text in answers):
        raise ValueError("answers must be a non-empty list of non-empty strings")


def row(record: Record, number: int) -> dict[str, Any]:
    """One record as an input row; its first passages, gold or not, in their order."""
    check(record)
    content, region = prompt(record["question"], [passage["text"] for passage in record["ctxs"]])
    return {
        "id": f"nq-{number}",
        "messages": [{"role": "user", "content": content}],
        "roi": [{"message": 0, "chars": list(region)}],
        "metadata": {"question": record["question"], "answers": record["answers"]},
    }


def prompt(question: str, passages: list[str]) -> tuple[str, tuple[int, int]]:
    """The user message and the characters [start, end) of its source."""
    if len(passages) == 1:
        before, source = f"{INSTRUCTION}\n\nDocument: ", passages[0]
    else:
        before = f"{INSTRUCTION_MANY}\n\n"
        source = "\n\n".join(f"Document {number}: {text}" for number, text in enumerate(passages, start=1))
    return f"{before}{source}\n\n{_asked(question)}", (len(before), len(before) + len(source))


def closed_book_prompt(question: str) -> str:
    """The user message without a source: what the model answers from its weights."""
    return f"{CLOSED_BOOK_INSTRUCTION}\n\n{_asked(question)}"


def _asked(question: str) -> str:
    return f"Question: {question.rstrip('? ')}?"


def with_distractors(records: list[Record], count: int, seed: int) -> list[Record]:
    """Each record with `count` passages of other records among its own, in a drawn order.

    A passage that holds an answer of the question is no distractor. Four beside the gold one are the paper's share
    of 80 % (arXiv 2509.26307, its HotPotQA setting). The same seed draws the same passages whatever the limit.
    Raises ValueError where a record has too few to draw from.
    """
    pool = list(dict.fromkeys(record["ctxs"][0]["text"] for record in records))
    return [_mixed(record, pool, count, random.Random(f"{seed}-{number}")) for number, record in enumerate(records)]


def _mixed(record: Record, pool: list[str], count: int, rng: random.Random) -> Record:
    own = {passage["text"] for passage in record["ctxs"]}
    drawn: list[str] = []
    for text in rng.sample(pool, len(pool)):
        if len(drawn) == count:
            break
        if text not in own and not contains_answer(text, record["answers"]):
            drawn.append(text)
    if len(drawn) < count:
        raise ValueError(f"{count} distractors are more than the file has for the question {record['question']!r}")
    passages = [*record["ctxs"], *({"text": text} for text in drawn)]
    return {**record, "ctxs": rng.sample(passages, len(passages))}
