"""AGD in somebody's own script, as docs/inline.md shows it: a default `vllm.LLM`, its engine in a process of its own.

script.py < JOB.json, which names a model, conversations with regions, and an output.
"""

import json
import sys
from pathlib import Path

from vllm import LLM

from agd_vllm.inline import engine_args, request


def main() -> None:
    job = json.load(sys.stdin)
    args = engine_args(job["model"], dtype="float32") | {"max_model_len": 512, "kv_cache_memory_bytes": 1 << 29}
    llm = LLM(**args)
    asked = [
        request(llm.get_tokenizer(), row["messages"], row["roi"], tau=0.7, max_tokens=row["max_tokens"])
        for row in job["rows"]
    ]
    outputs = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked], use_tqdm=False)
    answers = [[list(output.outputs[0].token_ids), output.outputs[0].text] for output in outputs]
    Path(job["output"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
