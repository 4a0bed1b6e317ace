"""Raw parameters against a live engine of plain vLLM: raw_parameters.py < JOB.json

Somebody's own requests, as HTTP or a script may send them: a job has a model, how many `objects` are drawn, and an
output. Answers with what regions over one prompt give without salts, what is said of a request that the model cannot
do, and what became of the objects, with a known request among them.
"""

import json
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# Known requests are compared with others of this process: one engine for all, in this process.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, given, settings
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.inputs import TokensPrompt

from agd_vllm.inline import Reports, engine_args
from agd_vllm.inline.params import EXTRA_ARG, inline_params_of, region_salt
from agd_vllm.records import Roi, Span

BLOCK = 16
PROMPT, LONG = list(range(3, 43)), [3 + number % 90 for number in range(400)]
REGION, OTHER = Roi((Span(2, 20),)), Roi((Span(20, 36, -2.0),), ((1, 1),))
KNOWN_EVERY = 100


def params_of(roi: Roi, **changes: Any) -> dict[str, Any]:
    return inline_params_of(roi, 1, "attnlrp", 0.0, 5, 0.0).as_extra_args()[EXTRA_ARG] | changes


class Engine:
    def __init__(self, model: str):
        given = {"max_model_len": 512, "kv_cache_memory_bytes": 1 << 26, "block_size": BLOCK, "max_num_seqs": 32}
        self.llm = LLM(**engine_args(model, dtype="float32"), skip_tokenizer_init=True, **given)
        self._count = 0

    def add(self, prompt: list[int], extra: Any, max_tokens: int = 2) -> str:
        """Raises VLLMClientError where vLLM refuses it."""
        self._count += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, detokenize=False, ignore_eos=True)
        sampling.extra_args = {EXTRA_ARG: extra}
        self.llm.llm_engine.add_request(f"{self._count}", TokensPrompt(prompt_token_ids=prompt), sampling)
        return f"{self._count}"

    def run(self) -> dict[str, Any]:
        """What became of all that was added."""
        ended = {}
        while self.llm.llm_engine.has_unfinished_requests():
            ended |= {output.request_id: output for output in self.llm.llm_engine.step() if output.finished}
        return ended

    def tokens(self, prompt: list[int], extra: Any, max_tokens: int = 8) -> tuple[list[int], int]:
        """Of one request alone: its tokens, and how many of its prompt came from the prefix cache."""
        name = self.add(prompt, extra, max_tokens)
        output = self.run()[name]
        return list(output.outputs[0].token_ids), output.num_cached_tokens

    def forget(self) -> None:
        self.llm.llm_engine.reset_prefix_cache()


def regions(engine: Engine) -> dict[str, Any]:
    """Regions over one prompt, its requests without a salt."""
    a, b = params_of(REGION), params_of(OTHER)
    alone, _ = engine.tokens(LONG, b)
    engine.forget()
    first, _ = engine.tokens(LONG, a)
    second, cached = engine.tokens(LONG, b)
    again, cached_again = engine.tokens(LONG, a)
    return {
        "alone": alone,
        "second": second,
        "cached": cached,
        "first": first,
        "again": again,
        "cached_again": cached_again,
    }


def refusals(engine: Engine) -> dict[str, str]:
    """What the client reads of requests that only the engine can refuse."""
    asked = {
        "head": params_of(Roi((), ((99, 99),))),
        "span": params_of(Roi((Span(2, 900),))),
        "rule": inline_params_of(REGION, 1, "ixg", 0.0, 5, 0.0).as_extra_args()[EXTRA_ARG],
    }
    names = {name: engine.add(PROMPT, extra) for name, extra in asked.items()}
    beside = engine.add(PROMPT, params_of(REGION))
    ended = engine.run()
    assert len(ended[beside].outputs[0].token_ids) == 2
    words = {}
    for name, request_id in names.items():
        completion = ended[request_id].outputs[0]
        assert (completion.finish_reason, list(completion.token_ids)) == ("error", []), completion
        words[name] = completion.stop_reason
    return words


numbers = st.one_of(st.integers(-3, 50), st.integers(-(2**31), 2**31), st.sampled_from((2**63, 2**64, -(2**70))))
floats = st.one_of(st.floats(), st.sampled_from((1e9, -1e9, 1e39, math.nan, math.inf, -0.0)))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, floats, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
spans = st.lists(st.tuples(numbers, numbers, floats), max_size=3)
heads = st.lists(st.tuples(numbers, numbers), max_size=4)
CHANGES = {
    "key": numbers,
    "rule": st.sampled_from(("attnlrp", "cplrp", "ixg", "none", "")),
    "salt": st.text(max_size=32),
    "tau": floats,
    "top_k": numbers,
    "min_prob": floats,
    "spans": st.one_of(spans, st.just([[2.0, 20.0, 1]]), spans.map(lambda found: json.dumps(found))),
    "heads": st.one_of(heads, st.just([[1.0, 0.0]]), st.just([[1, 0], [0, 3]])),
    "repetition_penalty": floats,
}


@st.composite
def near(draw) -> dict[str, Any]:
    """Valid but for one field; the salt fits the region where one can be made, so that it is no excuse."""
    field = draw(st.sampled_from(sorted(CHANGES)))
    params = params_of(REGION) | {field: draw(st.one_of(CHANGES[field], anything))}
    if field in ("spans", "heads", "rule"):
        try:
            roi = Roi(tuple(Span(*span) for span in params["spans"]), tuple(map(tuple, params["heads"])))
            params["salt"] = region_salt(roi, params["rule"])
        except (TypeError, ValueError):
            pass
    return params


as_text = near().map(lambda params: json.dumps(params))
OBJECTS = st.one_of(near(), near(), as_text, st.fixed_dictionaries(CHANGES), anything)


def drawn(count: int) -> list[Any]:
    """As many parameter objects, the same each time."""
    objects: list[Any] = []

    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(OBJECTS)
    def draw(found: Any) -> None:
        objects.append(found)

    draw()
    return objects


def fuzz(engine: Engine, objects: list[Any]) -> dict[str, int]:
    known, known_params = None, params_of(REGION)
    counts: Counter[str] = Counter()
    for start in range(0, len(objects), KNOWN_EVERY):
        for found in objects[start : start + KNOWN_EVERY]:
            try:
                engine.add(PROMPT, found)
                counts["taken"] += 1
            except VLLMClientError as error:
                assert "\n" not in f"{error}", error
                counts["refused"] += 1
        for output in engine.run().values():
            counts[output.outputs[0].finish_reason] += 1
        engine.forget()
        tokens, _ = engine.tokens(PROMPT, known_params)
        known = known or tokens
        counts["known"] += tokens == known
        counts["hundreds"] += 1
    return counts


def main() -> None:
    job = json.load(sys.stdin)
    # Somebody listens, so that reports are made, too.
    with Reports():
        answer(job)


def answer(job: dict[str, Any]) -> None:
    engine = Engine(job["model"])
    config = engine.llm.llm_engine.vllm_config
    answers = {"v2": config.use_v2_model_runner, "async": config.scheduler_config.async_scheduling}
    answers |= {"regions": regions(engine), "refusals": refusals(engine)}
    objects = drawn(job["objects"])
    near_valid = sum(isinstance(each, dict) and each.keys() >= CHANGES.keys() for each in objects)
    Path(job["output"]).write_text(
        json.dumps(answers | {"drawn": len(objects), "near": near_valid, "fuzz": fuzz(engine, objects)})
    )


if __name__ == "__main__":
    main()
