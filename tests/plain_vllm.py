"""The oracle of ungated decoding, in a process of its own: plain vllm.LLM, greedy. Reads and writes JSON."""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

if __name__ == "__main__":
    job = json.load(sys.stdin)
    llm = LLM(job["model"], disable_log_stats=True, **job["engine_args"])
    prompts = [TokensPrompt(prompt_token_ids=row["prompt_token_ids"]) for row in job["rows"]]
    params = [SamplingParams(temperature=0.0, **row["params"]) for row in job["rows"]]
    outputs = []
    for strength in job["steering_strengths"] or [None]:
        if strength is not None:
            llm.collective_rpc("set_steering_strength", args=(strength,))
            llm.reset_prefix_cache()
        outputs += [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    with open(job["output"], "w") as file:
        fields = (
            {
                "token_ids": list(o.token_ids),
                "text": o.text,
                "finish_reason": o.finish_reason,
                "logprobs": [{token: found.logprob for token, found in step.items()} for step in o.logprobs or ()],
            }
            for o in outputs
        )
        json.dump(list(fields), file)
