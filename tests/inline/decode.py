"""Rows decoded with inline attribution by an engine of one process, in float32: decode.py < JOB.json

A job has a model, engine_args, an output, and `runs` one after another on one engine: rows and tau, how many reports
are `dropped`, by how many seconds they are `delayed`, and a repetition `penalty`. Each answers with its rows, faults,
model runner and scheduling, and how often vLLM preempted and took tokens from its prefix cache.
"""

import json
import queue
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))
from conftest import EngineThread
from vllm.v1.core.sched.scheduler import Scheduler

from agd_vllm.engine import engine as engine_module
from agd_vllm.engine.channel import GateSender
from agd_vllm.engine.stepped import SteppedLLM
from agd_vllm.inline import engine_args
from agd_vllm.inline.arguments import PROCESSOR
from agd_vllm.records import DecodedRow, PreparedRow, Roi, Span
from agd_vllm.strategies.agd import Agd

COUNTS: Counter[str] = Counter()
DELAY = {"seconds": 0.0}


def spy() -> None:
    """Counts what vLLM does on its way; drops and delays reports where that is asked for."""
    put, preempt, send = SteppedLLM._put, Scheduler._preempt_request, GateSender._send

    def counted_put(self, request_id, output):
        COUNTS["cached_tokens"] += getattr(output, "finished", False) and (output.num_cached_tokens or 0)
        put(self, request_id, output)

    def counted_preempt(self, *args, **kwargs):
        COUNTS["preemptions"] += 1
        return preempt(self, *args, **kwargs)

    def dropping_send(self, datagram):
        if datagram.samples and COUNTS["to_drop"]:
            COUNTS["to_drop"] -= 1
        elif DELAY["seconds"]:
            late.put((time.monotonic() + DELAY["seconds"], self, datagram))
        else:
            send(self, datagram)

    late = queue.SimpleQueue()

    def send_late():
        while True:
            due, sender, datagram = late.get()
            time.sleep(max(0.0, due - time.monotonic()))
            send(sender, datagram)

    threading.Thread(target=send_late, daemon=True).start()

    SteppedLLM._put, Scheduler._preempt_request, GateSender._send = counted_put, counted_preempt, dropping_send


def prepared(row: dict[str, Any]) -> PreparedRow:
    roi = Roi(tuple(Span(*span) for span in row.pop("spans")), tuple(map(tuple, row.pop("heads"))))
    return PreparedRow(roi=roi, **row | {key: tuple(row[key]) for key in ("stop", "stop_token_ids")})


def as_json(row: PreparedRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "prompt_token_ids": row.prompt_token_ids,
        "spans": [[span.start, span.end, span.weight] for span in row.roi.spans],
        "heads": row.roi.heads,
        "max_tokens": row.max_tokens,
        "min_tokens": row.min_tokens,
        "stop": row.stop,
        "stop_token_ids": row.stop_token_ids,
    }


def outcome(row: DecodedRow | Exception) -> dict[str, Any]:
    if isinstance(row, Exception):
        return {"error": repr(row)}
    steps = [[s.step, s.candidate_ids, s.chosen_id, s.entropy, s.candidate_probs, s.scores] for s in row.steps]
    return {"token_ids": row.token_ids, "text": row.text, "finish_reason": row.finish_reason, "steps": steps}


def main() -> None:
    job = json.load(sys.stdin)
    spy()
    # What is counted here happens in this process, with Model Runner V2, too.
    engine_module.runs_v1 = lambda: True
    args = engine_args(job["model"], job.get("rule", "attnlrp"))
    args = {
        key: args[key] for key in ("model_class_overrides", "additional_config", "compilation_config", "scheduler_cls")
    }
    engine = EngineThread(Path(job["model"]), (PROCESSOR,), plain=True, **args | job["engine_args"])
    config = engine.engine._llm.vllm_config
    kind = {"v2": config.use_v2_model_runner, "async": config.scheduler_config.async_scheduling}
    results = []
    for run in job["runs"]:
        COUNTS.clear()
        COUNTS["to_drop"], DELAY["seconds"] = run.get("dropped", 0), run.get("delayed", 0.0)
        penalty = run.get("penalty", 1.0)
        strategy = Agd(scorer="inline", rule=job.get("rule", "attnlrp"), tau=run["tau"], repetition_penalty=penalty)
        rows = engine.decode([prepared(row) for row in run["rows"]], strategy=strategy)
        results.append({"rows": list(map(outcome, rows)), "faults": dict(engine.faults.counts), **kind, **COUNTS})
    Path(job["output"]).write_text(json.dumps(results))
    engine.close()


if __name__ == "__main__":
    main()
