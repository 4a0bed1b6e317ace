"""AGD in somebody's own script, as docs/inline.md shows it: a default `vllm.LLM`, its engine in a process of its own.

script.py < JOB.json, which names a model, conversations with regions, and an output.
"""

import json
import sys
from pathlib import Path

from vllm import LLM

from agd_vllm.inline import Reports, engine_args, request


def main() -> None:
    job = json.load(sys.stdin)
    args = engine_args(job["model"], dtype="float32") | {"max_model_len": 512, "kv_cache_memory_bytes": 1 << 29}
    with Reports() as reports:
        llm = LLM(**args)
        asked = [
            request(llm.get_tokenizer(), row["messages"], row["roi"], tau=0.7, max_tokens=row["max_tokens"])
            for row in job["rows"]
        ]
        for prompt, params in asked:
            # The scheduler gives it.
            del prompt["cache_salt"]
            reports.follow(params)
        outputs = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked], use_tqdm=False)
        answers = []
        for output, (_, params) in zip(outputs, asked, strict=True):
            (answer,) = output.outputs
            steps = reports.guided_steps(params, answer.token_ids)
            found = [[step.step, step.chosen_id, step.scores] for step in steps]
            answers.append([list(answer.token_ids), answer.text, found])
    Path(job["output"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
