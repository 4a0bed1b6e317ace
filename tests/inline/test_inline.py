"""Real vLLM with inline attribution against real vLLM with pauses and the forward scorer: the same tokens, the same
guided steps, the same scores. Float32 throughout."""

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, ENGINE_ARGS, RUNNER_V2, prepared_demo_rows
from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.records import PreparedRow, Roi, ScoreRequest, Span

sys.path.append(str(Path(__file__).parent))
TOKENS = 24
PENALTY, PENALTY_TAU = 1.3, 1.0
# Seconds that reports are late; rows side by side then, and tokens of most of them.
DELAYS = (0.002, 0.2)
SIDE_BY_SIDE, SHORT = 64, 4
# Room for all rows' tangents; the default is an eighth of the memory.
CACHE_BYTES = 1 << 28
# A cache of some hundred tokens and prompts in chunks: rows are preempted and computed again.
TIGHT = {"max_num_batched_tokens": 64, "block_size": 32, "num_gpu_blocks_override": 17, "kv_cache_memory_bytes": None}


class InProcess:
    """The forward scorer in the pool's place."""

    def __init__(self, model: Path):
        self._scorer = ForwardScorer(str(model), cache_bytes=CACHE_BYTES)

    async def score(self, sequence, token_ids, roi, gate):
        await asyncio.sleep(0)
        return self._scorer.score([ScoreRequest(sequence, 0, token_ids, roi, gate.candidate_ids)])[0]

    def prefill(self, sequence, token_ids, roi):
        pass

    def release(self, sequence):
        self._scorer.release(sequence)


def renamed(row: PreparedRow, name: str, **changes: Any) -> PreparedRow:
    return dataclasses.replace(row, id=f"{row.id}-{name}", **changes)


@pytest.fixture(scope="module")
def groups(smollm2) -> dict[str, list[PreparedRow]]:
    """Rows as they are; their system prompts, which are the regions, with another row's user message; the same prompts
    under other regions or none; and other ends."""
    plain = prepared_demo_rows(smollm2, 4, TOKENS)
    ends = [max(span.end for span in row.roi.spans) for row in plain]
    others = [
        renamed(row, "user", prompt_token_ids=row.prompt_token_ids[:end] + other.prompt_token_ids[its_end:])
        for (row, end), (other, its_end) in zip(
            zip(plain, ends, strict=True), zip(plain[1:] + plain[:1], ends[1:] + ends[:1], strict=True), strict=True
        )
    ]
    regions = []
    for row in plain[:2]:
        (first, *_) = row.roi.spans
        away = Span(first.start, (first.start + first.end) // 2, -0.6)
        regions.append(renamed(row, "away", roi=Roi((*row.roi.spans, away))))
        regions.append(renamed(row, "heads", roi=Roi(row.roi.spans, ((3, 1), (3, 4), (17, 8)))))
        regions.append(renamed(row, "only-heads", roi=Roi((), ((0, 0), (11, 5)))))
        regions.append(renamed(row, "unguided", roi=Roi()))
    stops = [
        renamed(plain[0], "stop", stop=(" the", " a")),
        renamed(plain[1], "late", stop=(" the",), min_tokens=12),
        renamed(plain[2], "token", stop_token_ids=(28, 30, 29)),
    ]
    return {"plain": plain, "users": others, "regions": regions, "stops": stops}


@pytest.fixture(scope="module")
def rows(groups) -> list[PreparedRow]:
    return [row for group in groups.values() for row in group]


@pytest.fixture(scope="module")
def expected(engine, smollm2, rows):
    """Rows decoded with pauses, by tau."""
    from inline.decode import outcome

    scorer = InProcess(smollm2)
    return {tau: list(map(outcome, engine.decode(rows, scorer, tau=tau))) for tau in (0.0, 1.734)}


def decode(
    model: Path, folder: Path, runs: list[dict[str, Any]], environment: Mapping[str, str] = {}, **engine_args: Any
) -> list[dict[str, Any]]:
    from inline.decode import as_json

    job = {
        "model": str(model),
        "engine_args": ENGINE_ARGS | engine_args,
        "output": str(folder / "runs.json"),
        "runs": [run | {"rows": list(map(as_json, run["rows"]))} for run in runs],
    }
    command = [sys.executable, str(CHECKOUT / "tests/inline/decode.py")]
    environment = os.environ | environment
    done = subprocess.run(command, input=json.dumps(job), env=environment, text=True, capture_output=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "runs.json").read_text())


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert "error" not in one, one
        assert (one["token_ids"], one["text"], one["finish_reason"]) == (
            other["token_ids"],
            other["text"],
            other["finish_reason"],
        )
        for (*step, entropy, probs, scores), (*its_step, its_entropy, its_probs, its_scores) in zip(
            one["steps"], other["steps"], strict=True
        ):
            assert step == its_step
            assert entropy == pytest.approx(its_entropy, rel=1e-4)
            assert probs == pytest.approx(its_probs, rel=1e-3)
            assert scores == pytest.approx(its_scores, abs=1e-4 * max(map(abs, its_scores)))


@pytest.fixture(scope="module")
def runs(smollm2, groups, rows, tmp_path_factory):
    """On one engine, whose prefix cache keeps what was decoded before: group by group, then all together under both
    taus, and a run whose first report is lost."""
    asked = [{"rows": groups[name], "tau": 1.734} for name in ("plain", "users", "regions")]
    asked += [{"rows": rows, "tau": tau} for tau in (1.734, 0.0)]
    asked.append({"rows": rows, "tau": 1.734, "dropped": 1})
    asked.append({"rows": to_penalize(groups), "tau": PENALTY_TAU, "penalty": PENALTY})
    asked += [{"rows": many(groups), "tau": 1.734, "delayed": seconds} for seconds in DELAYS]
    done = decode(smollm2, tmp_path_factory.mktemp("inline"), asked, block_size=16, max_num_seqs=SIDE_BY_SIDE)
    names = ("plain", "users", "regions", "gated", "full", "lost", "penalized", *DELAYS)
    return dict(zip(names, done, strict=True))


def many(groups) -> list[PreparedRow]:
    """As many as the engine takes, of a few tokens or with a stop string."""
    chosen = [dataclasses.replace(row, max_tokens=SHORT) for row in groups["plain"]] + groups["stops"][:1]
    return [renamed(chosen[number % len(chosen)], f"{number}") for number in range(SIDE_BY_SIDE)]


def to_penalize(groups) -> list[PreparedRow]:
    """With regions, and one without."""
    chosen = [*groups["plain"][:2], groups["regions"][3]]
    return [renamed(row, "penalized", max_tokens=12) for row in chosen]


@pytest.fixture(scope="module")
def penalized(smollm2, groups):
    """Token by token, on penalised logits: of Transformers' model by its own processor."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    penalize, scorer = RepetitionPenaltyLogitsProcessor(PENALTY), ForwardScorer(str(smollm2), cache_bytes=CACHE_BYTES)
    return [literal(model, penalize, scorer, row) for row in to_penalize(groups)]


@torch.no_grad()
def literal(model, penalize, scorer, row: PreparedRow) -> dict[str, Any]:
    ids, steps = list(row.prompt_token_ids), []
    for step in range(row.max_tokens):
        context = torch.tensor([ids])
        probs = penalize(context, model(context).logits[:, -1])[0].softmax(-1)
        entropy = torch.special.entr(probs).sum().item()
        top = probs.topk(5)
        among = [token for token, prob in zip(top.indices.tolist(), top.values, strict=True) if prob >= 0.05]
        chosen = int(probs.argmax())
        if row.roi and entropy >= PENALTY_TAU and len(among) > 1:
            (scores,) = scorer.score([ScoreRequest(row.id, 0, ids, row.roi, among)])
            chosen = among[scores.index(max(scores))]
            steps.append([step, among, chosen, entropy, top.values[: len(among)].tolist(), scores])
        ids.append(chosen)
    return {"token_ids": ids[len(row.prompt_token_ids) :], "steps": steps}


def assert_penalized(run, penalized) -> None:
    assert sum(len(row["steps"]) for row in penalized) > 6
    ends = [{"text": row["text"], "finish_reason": row["finish_reason"]} for row in run["rows"]]
    assert_same(run["rows"], [row | end for row, end in zip(penalized, ends, strict=True)])


def of(expected, rows, groups, name):
    """What is expected of one group's rows."""
    return [found for row, found in zip(rows, expected[1.734], strict=True) if row in groups[name]]


def test_tokens_steps_and_scores_are_those_of_the_workers(runs, expected):
    """Regions of every kind side by side, rows without one among them."""
    assert sum(len(row["steps"]) for row in expected[1.734]) > 60
    assert_same(runs["gated"]["rows"], expected[1.734])
    assert not runs["gated"]["faults"]


def test_so_they_are_where_every_step_is_guided(runs, expected):
    assert sum(len(row["steps"]) for row in expected[0.0]) > sum(len(row["steps"]) for row in expected[1.734])
    assert_same(runs["full"]["rows"], expected[0.0])


def test_other_messages_under_one_region_come_from_the_prefix_cache(runs, expected, rows, groups):
    assert runs["plain"].get("cached_tokens", 0) == 0 < runs["users"]["cached_tokens"]
    assert_same(runs["users"]["rows"], of(expected, rows, groups, "users"))


def test_the_same_prompts_under_another_region_do_not(runs, expected, rows, groups):
    assert runs["regions"].get("cached_tokens", 0) == 0
    assert_same(runs["regions"]["rows"], of(expected, rows, groups, "regions"))


def test_rows_whose_report_was_lost_are_decoded_again(runs, expected):
    assert runs["lost"]["faults"]["reports_lost"] >= 1
    assert_same(runs["lost"]["rows"], expected[1.734])


@pytest.mark.parametrize("seconds", DELAYS)
def test_reports_that_come_after_their_tokens_are_awaited(runs, expected, rows, groups, seconds):
    """As on a GPU, where a thread sends them."""
    run = runs[seconds]
    assert not run["faults"]
    stopped, plain = of(expected, rows, groups, "stops")[0], of(expected, rows, groups, "plain")
    for number, row in enumerate(run["rows"]):
        place = number % (len(plain) + 1)
        theirs = plain[place] if place < len(plain) else stopped
        assert row["token_ids"] == theirs["token_ids"][: SHORT if place < len(plain) else None]
        steps = [step[:3] for step in theirs["steps"] if step[0] < len(row["token_ids"])]
        assert [step[:3] for step in row["steps"]] == steps


def test_the_gate_sees_penalised_logits(runs, expected, rows, groups, penalized):
    assert_penalized(runs["penalized"], penalized)
    plain = of(expected, rows, groups, "plain")[:2]
    assert [row["token_ids"][:12] for row in plain] != [row["token_ids"] for row in penalized[:2]]


def test_chunks_and_preemptions_change_nothing(smollm2, rows, expected, tmp_path):
    (run,) = decode(smollm2, tmp_path, [{"rows": rows, "tau": 1.734}], max_model_len=512, **TIGHT)
    assert run["preemptions"] > 0
    assert_same(run["rows"], expected[1.734])


@pytest.mark.long
def test_so_it_decodes_on_model_runner_v2(smollm2, groups, rows, expected, penalized, tmp_path):
    """With asynchronous scheduling: prefix hits and no false one, regions of every kind, a lost report, a penalty."""
    few = {name: groups[name][:count] for name, count in (("plain", 2), ("users", 1), ("regions", 4), ("stops", 2))}
    few["lost"] = few["plain"] + few.pop("stops")
    asked = [{"rows": chosen, "tau": 1.734, "dropped": int(name == "lost")} for name, chosen in few.items()]
    asked.append({"rows": to_penalize(groups), "tau": PENALTY_TAU, "penalty": PENALTY})
    *found, last = decode(smollm2, tmp_path, asked, RUNNER_V2, block_size=16)
    assert_penalized(last, penalized)
    done = dict(zip(few, found, strict=True))
    for name, run in done.items():
        assert run["v2"] and run["async"]
        assert_same(run["rows"], [found for row, found in zip(rows, expected[1.734], strict=True) if row in few[name]])
        assert (run.get("cached_tokens", 0) > 0) == (name in ("users", "lost"))
    assert done["lost"]["faults"]["reports_lost"] >= 1


@pytest.mark.long
def test_chunks_and_preemptions_change_nothing_there_either(smollm2, groups, rows, expected, tmp_path):
    """One step at a time, and every step guided."""
    chosen = groups["plain"] + groups["regions"]
    asked = [{"rows": chosen, "tau": 0.0}]
    (run,) = decode(smollm2, tmp_path, asked, RUNNER_V2, async_scheduling=False, max_model_len=512, **TIGHT)
    assert (run["v2"], run["async"]) == (True, False) and run["preemptions"] > 0
    full = [found for row, found in zip(rows, expected[0.0], strict=True) if row in chosen]
    assert_same(run["rows"], full)
