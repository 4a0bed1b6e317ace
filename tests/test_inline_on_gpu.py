"""What only an NVIDIA GPU shows of inline attribution in vLLM: that its steps neither wait for the GPU nor compile, and
that compiled and captured they score as the twin does on a CPU."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.records import Roi, ScoreRequest, Span
from benchmarks.random_model import SHAPES, SIGMA

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
VOCABULARY, LAYERS, HEADS, TOKENS, TOP_K = 4096, 2, 4, 12, 4
# Prompts in one piece and in several, some within a block.
BATCH_TOKENS, LENGTHS = 64, (5, 16, 33, 40, 90, 150)
Row = tuple[list[int], Roi]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """With heads that the kernels of a GPU have code for, and a peaked distribution."""
    config = SHAPES["tiny"].to_dict() | {"head_dim": 64, "vocab_size": VOCABULARY}
    assert (config["num_hidden_layers"], config["num_attention_heads"]) == (LAYERS, HEADS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, SIGMA / config["hidden_size"] ** 0.5)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reports():
    from agd_vllm.inline import Reports

    with Reports() as reports:
        yield reports


@pytest.fixture(scope="module")
def llm(model, reports):
    from vllm import LLM

    from agd_vllm.inline import engine_args

    with pytest.MonkeyPatch.context() as patch:
        # A spawned process reads the variable when it imports vLLM; a forked one has imported it.
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        patch.setenv("VLLM_GPU_SYNC_CHECK", "error")
        args = engine_args(model) | {
            "max_model_len": 512,
            "max_num_batched_tokens": BATCH_TOKENS,
            "max_num_seqs": 16,
            "kv_cache_memory_bytes": 1 << 28,
            "gpu_memory_utilization": 0.2,
            "skip_tokenizer_init": True,
            "worker_extension_cls": "worker_probe.WorkerProbe",
        }
        llm = LLM(**args)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def rows(seed: int) -> list[Row]:
    """For each length one with a region of spans, one with heads, too, one with heads alone, and one without."""
    rng, found = random.Random(seed), []
    for length in LENGTHS:
        start = rng.randrange(length - 1)
        spans = (Span(start, rng.randint(start + 1, length)), Span(0, 2, -0.5))
        heads = tuple(sorted({(rng.randrange(LAYERS), rng.randrange(HEADS)) for _ in range(3)}))
        for roi in (Roi(spans), Roi(spans, heads), Roi(heads=heads), Roi()):
            found.append(([rng.randrange(3, VOCABULARY) for _ in range(length)], roi))
    return found


def decode(llm, reports, given: list[Row], first_key: int) -> list[tuple[list[int], list]]:
    """Tokens and guided steps of each row, of which every step is gated."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    from agd_vllm.inline.params import inline_params_of

    prompts, params = [], []
    for key, (ids, roi) in enumerate(given, start=first_key):
        asked = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        if roi:
            asked.extra_args = inline_params_of(roi, key, "attnlrp", 0.0, TOP_K, 0.0).as_extra_args()
            reports.follow(asked)
        prompts.append(TokensPrompt(prompt_token_ids=ids))
        params.append(asked)
    outputs = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]
    return [
        (ids, reports.guided_steps(asked, ids) if roi else [])
        for ids, asked, (_, roi) in zip(outputs, params, given, strict=True)
    ]


def test_steps_neither_wait_nor_compile_and_score_as_the_twin(llm, model, reports):
    decode(llm, reports, rows(0), 1)
    # What is compiled from here on ends the engine, as does what waits for the GPU, from vLLM's own warm-up on.
    assert llm.collective_rpc("fail_where_it_compiles") == ["error"]
    given = rows(1)
    decoded = decode(llm, reports, given, 1000)
    check(model, given, decoded)


def check(model: str, given: list[Row], decoded: list[tuple[list[int], list]]) -> None:
    scorer = ForwardScorer(model, dtype="float32", device="cpu", cache_bytes=1 << 28)
    for row, ((prompt, roi), (ids, steps)) in enumerate(zip(given, decoded, strict=True)):
        assert len(ids) == TOKENS
        assert [step.step for step in steps] == (list(range(TOKENS)) if roi else [])
        for step in steps:
            context = prompt + ids[: step.step]
            request = ScoreRequest(f"{row} {step.step}", 0, context, roi, step.candidate_ids)
            ours, theirs = torch.tensor(step.scores), torch.tensor(scorer.score([request])[0])
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))
