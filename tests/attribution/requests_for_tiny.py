"""Random requests for the tiny models."""

import random

import tiny

from agd_vllm.records import Roi, ScoreRequest, Span


def random_case(rng: random.Random, name: str, kind: str) -> dict:
    """A request of 8 to 40 tokens with a region of spans, heads, or both."""
    length = rng.randint(8, 40)
    spans = []
    if kind != "heads":
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(length - 1)
            spans.append((start, rng.randint(start + 1, length), rng.choice([1.0, 1.0, 0.5, -0.7])))
    heads = rng.sample([(layer, head) for layer in range(3) for head in range(4)], 3) if kind != "spans" else []
    return {
        "name": name,
        "token_ids": [rng.randrange(3, tiny.VOCABULARY) for _ in range(length)],
        "spans": spans,
        "heads": heads,
        # Errors are relative to the step's largest |score|. Single scores cancel to any size; of a dozen, one does not.
        "candidate_ids": rng.sample(range(tiny.VOCABULARY), 12),
    }


def as_request(case: dict) -> ScoreRequest:
    roi = Roi(tuple(Span(*span) for span in case["spans"]), tuple((layer, head) for layer, head in case["heads"]))
    return ScoreRequest(case["name"], 0, case["token_ids"], roi, tuple(case["candidate_ids"]))


def long_request(name: str, length: int, tail: int = 0) -> ScoreRequest:
    rng = random.Random(length)
    tokens = [rng.randrange(3, tiny.VOCABULARY) for _ in range(length)]
    tokens[-1] = 3 + tail
    return ScoreRequest(name, 0, tokens, Roi((Span(0, 9),)), (5, 6, 7))
