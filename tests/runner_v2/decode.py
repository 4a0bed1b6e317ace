"""The demo rows under a gate that takes the last candidate: what both of vLLM's model runners must decode alike.

decode.py < JOB.json        on Model Runner V2, in a process of its own (see site/sitecustomize.py)
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))
from conftest import Chooser, EngineThread, last_candidate, prepared_demo_rows

TAU = 0.5


def outcomes(engine: EngineThread, model: Path, count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Tokens, end and guided steps of each row."""
    decoded = engine.decode(prepared_demo_rows(model, count, max_tokens), Chooser(last_candidate), tau=TAU)
    return [
        {
            "token_ids": row.token_ids,
            "finish_reason": row.finish_reason,
            "steps": [[step.step, step.entropy, *step.candidate_ids] for step in row.steps],
        }
        for row in decoded
    ]


def main() -> None:
    job = json.load(sys.stdin)
    engine = EngineThread(Path(job["model"]), **job["engine_args"])
    config = engine.engine._llm.vllm_config
    result = {
        "v2": config.use_v2_model_runner,
        "async": config.scheduler_config.async_scheduling,
        "rows": outcomes(engine, Path(job["model"]), job["count"], job["max_tokens"]),
    }
    Path(job["output"]).write_text(json.dumps(result))
    engine.close()


if __name__ == "__main__":
    main()
