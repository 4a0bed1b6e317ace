"""Which attention heads bring the context into an answer, and which the model's own knowledge.

After "The Atlas of In-Context Learning" (arXiv 2505.15807): a head's contribution to an answer is its positive AttnLRP
relevance. In-context heads contribute more with the context given than without, parametric heads the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from agd_vllm.attribution.reference import ReferenceScorer
from agd_vllm.evaluation import natural_questions
from agd_vllm.evaluation.suites import numbered, read_records
from agd_vllm.prompts.prepare import Preparer
from agd_vllm.records import InputRow, RowRefused


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its answer, asked from its context and without."""

    open_book: str
    closed_book: str
    answer: str


def read_questions(path: str, limit: int | None) -> list[Question]:
    """Questions of an nq file ({"question", "answers", "ctxs": [{"text"}]}) or of rows of the input format whose
    metadata is {"question", "answers", "context"}; the first answer counts. Raises SuiteUnusable, in one line."""
    return numbered("questions", read_records("questions", path)[:limit], _question)


def _question(record: dict[str, Any], number: int) -> Question:
    if "ctxs" not in record:
        given = record["metadata"]
        record = {key: given[key] for key in ("question", "answers")} | {"ctxs": [{"text": given["context"]}]}
    natural_questions.check(record)
    open_book, _ = natural_questions.prompt(record["question"], [passage["text"] for passage in record["ctxs"]])
    return Question(open_book, natural_questions.closed_book_prompt(record["question"]), record["answers"][0])


class HeadRanking:
    """Contributions of all heads, added up question by question.

    For each question and setting the answer is put behind the prompt, and the logits of all its tokens are explained
    at once: R_h, the head's positive relevance, is divided by the sum over all heads, so that every question weighs the
    same. D_h is the mean over questions with context minus the mean without.
    """

    def __init__(self, scorer: ReferenceScorer, tokenizer: PreTrainedTokenizerFast, max_model_len: int):
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._preparer = Preparer(
            tokenizer, default_roi=None, guided=False, max_tokens=1, max_model_len=max_model_len, date=datetime.now()
        )
        self._max_model_len = max_model_len
        self._total = torch.zeros(scorer.hf.num_layers, scorer.hf.num_heads)
        self._questions = 0

    def add_all(self, questions: Iterable[Question]) -> None:
        """Raises ValueError for a question that the model's template or length cannot take, with its number."""
        for number, question in enumerate(questions, start=1):
            try:
                self._add(question)
            except (RowRefused, ValueError) as error:
                raise ValueError(f"question {number}: {error}") from error

    def _add(self, question: Question) -> None:
        self._total += self._share(question.open_book, question.answer)
        self._total -= self._share(question.closed_book, question.answer)
        self._questions += 1

    def top(self, kind: str, count: int) -> list[tuple[tuple[int, int], float]]:
        """The `count` heads (layer, head) that are most of that kind, with D_h for in-context and -D_h for parametric
        heads: positive where the head is of the kind at all."""
        scores = self._total / self._questions * (1 if kind == "in-context" else -1)
        best = torch.argsort(scores.flatten(), descending=True, stable=True)[:count].tolist()
        return [(divmod(index, scores.shape[1]), scores.flatten()[index].item()) for index in best]

    def _share(self, prompt: str, answer: str) -> torch.Tensor:
        """Each head's share of the positive relevance for the answer's tokens, [layers, heads], summing up to 1."""
        before, answer_ids = self._prompt(prompt), self._answer(answer)
        if len(before) + len(answer_ids) > self._max_model_len:
            raise ValueError(f"prompt and answer have more than the {self._max_model_len} tokens that the model takes")
        targets = [(len(before) - 1 + number, token) for number, token in enumerate(answer_ids)]
        relevance = self._scorer.head_relevance([*before, *answer_ids[:-1]], targets)
        return relevance / relevance.sum().clamp(min=torch.finfo(torch.float32).tiny)

    def _prompt(self, prompt: str) -> list[int]:
        if self._tokenizer.chat_template:
            row = InputRow("question", messages=({"role": "user", "content": prompt},))
        else:
            row = InputRow("question", prompt=f"{prompt}\nAnswer:")
        return self._preparer.encode(row)[1].ids

    def _answer(self, answer: str) -> list[int]:
        text = answer if self._tokenizer.chat_template else f" {answer}"
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]
