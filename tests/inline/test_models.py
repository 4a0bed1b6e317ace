"""vLLM's model classes with tangents against reverse mode, on tiny models of every architecture; no engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT
from tiny_oracle import MODELS, assert_close

from agd_vllm.attribution.scorer import RULES
from agd_vllm.inline.arguments import engine_args

# Whole prompts, and pieces that end within blocks.
CHUNKS = [64, 7]
# vLLM has no windows in some of Qwen2's layers only.
INLINE = [name for name in MODELS if name not in ("gemma3-multimodal", "qwen2-window")]


def score(
    models: dict[str, list[dict]], rule: str, output: Path, kernels: str, chunks: list[int] = CHUNKS
) -> dict[str, list[list[float]]]:
    job = {"rule": rule, "output": str(output), "chunks": chunks, "models": models, "kernels": kernels}
    command = [sys.executable, str(Path(__file__).parent / "score.py")]
    folders = [CHECKOUT, CHECKOUT / "tests/attribution"]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    if kernels == "triton":
        folders.append(CHECKOUT / "tests/runner_v2/site")
        environment |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    done = subprocess.run(command, input=json.dumps(job), text=True, env=environment, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_those_of_reverse_mode(tiny_models, tiny_cases, tiny_oracle, rule, tmp_path):
    """By the kernels of a CPU, and for heads that these have no code for by their twin."""
    answers = score(
        {str(tiny_models[name]): tiny_cases[name] for name in INLINE}, rule, tmp_path / "out.json", "compiled"
    )
    for name in INLINE:
        assert_close(answers[str(tiny_models[name])], len(CHUNKS) * tiny_oracle[rule][name])


def test_without_a_compiler_the_scores_are_the_same(tiny_models, tiny_cases, tiny_oracle, tmp_path):
    names = ("llama-bias", "qwen3", "gemma3")
    models = {str(tiny_models[name]): tiny_cases[name] for name in names}
    answers = score(models, "attnlrp", tmp_path / "out.json", "none")
    for name in names:
        assert_close(answers[str(tiny_models[name])], len(CHUNKS) * tiny_oracle["attnlrp"][name])


@pytest.mark.parametrize(
    ("rule", "name", "chunk"),
    [
        ("attnlrp", "gemma3", 16),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("attnlrp", "qwen2", 1), ("cplrp", "qwen3", 7), ("ixg", "gemma3", 7))
        ),
    ],
)
def test_by_the_kernels_of_a_gpu_the_scores_are_the_same(
    tiny_models, tiny_cases, tiny_oracle, rule, name, chunk, tmp_path
):
    """Interpreted, with the state of Model Runner V2: in pieces of a prompt, or token by token."""
    model, cases = str(tiny_models[name]), tiny_cases[name][:3]
    answers = score({model: cases}, rule, tmp_path / "out.json", "triton", [chunk])
    assert_close(answers[model], tiny_oracle[rule][name][:3])


def test_an_architecture_without_a_class_is_refused_in_one_line(tiny_models):
    with pytest.raises(ValueError, match=r"^Gemma3ForConditionalGeneration has no inline class; take --scorer forward"):
        engine_args(str(tiny_models["gemma3-multimodal"]))
