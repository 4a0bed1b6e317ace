"""The oracle of ungated decoding, in a process of its own: plain vllm.LLM, greedy. Reads and writes JSON.

Several jobs share the process, one engine after another: a tiny model loads in seconds, a process takes half a
minute."""

import json
import os
import sys


def decoded(job) -> list[dict]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(job["model"], disable_log_stats=True, **job["engine_args"])
    prompts = [TokensPrompt(prompt_token_ids=row["prompt_token_ids"]) for row in job["rows"]]
    params = [SamplingParams(temperature=0.0, **row["params"]) for row in job["rows"]]
    outputs = []
    for strength in job["steering_strengths"] or [None]:
        if strength is not None:
            llm.collective_rpc("set_steering_strength", args=(strength,))
            llm.reset_prefix_cache()
        outputs += [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return [
        {
            "token_ids": list(o.token_ids),
            "text": o.text,
            "finish_reason": o.finish_reason,
            "logprobs": [{token: found.logprob for token, found in step.items()} for step in o.logprobs or ()],
        }
        for o in outputs
    ]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    if len(asked["jobs"]) > 1:
        # Each engine would have two processes of its own.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with open(asked["output"], "w") as file:
        json.dump([decoded(job) for job in asked["jobs"]], file)
