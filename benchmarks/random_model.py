"""Models of a published shape with random bfloat16 weights: what a step costs does not depend on what it says."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from agd_vllm.models import demo

SHAPES = {
    # To try a benchmark with.
    "tiny": LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=49152,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    ),
    "llama-3.1-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
}


# Standard deviation of the logits: about half of all steps are then uncertain (tau 1.734), as in real models' answers.
SIGMA = 7.0
TOKENIZER_FILES = ("tokenizer", "special", "vocab", "merges", "chat_template")


def write(config: LlamaConfig, folder: Path, tokenizer: str | None = None) -> Path:
    """Random weights of `config`, seeded, as a model folder; they are made on the GPU if there is one.

    With the folder of a `tokenizer` its files are there, too, and the next token's distribution is peaked: of its
    tokens but the special ones any may come next, so that gates open and no row ends early.
    """
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if tokenizer is not None:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, name, getattr(loaded, name))
            setattr(model.generation_config, name, getattr(loaded, name))
        with torch.no_grad():
            unembedding = model.lm_head.weight
            unembedding.normal_(0, SIGMA / config.hidden_size**0.5)
            unembedding[len(loaded) :] = 0
            unembedding[loaded.all_special_ids] = 0
    model.save_pretrained(folder)
    for file in Path(tokenizer).iterdir() if tokenizer is not None else ():
        if file.name.startswith(TOKENIZER_FILES):
            shutil.copy(file, folder)
    return folder


@contextmanager
def of_shape(model: str, shape: str | None) -> Iterator[str]:
    """The model's folder, or one of random weights of that `shape` with the model's tokenizer, while it is used."""
    if shape is None:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        yield _write_apart(shape, Path(folder) / shape, model)


@contextmanager
def demo_or(model: str | None, shape: str | None) -> Iterator[str]:
    """A model's folder while it is used: of random weights of that `shape`, that `model`, or else the demo's."""
    if shape is None:
        yield model or str(demo.fetch(demo.DEMO_MODEL, Path(".cache/models") / demo.DEMO_MODEL))
        return
    with tempfile.TemporaryDirectory() as folder:
        yield _write_apart(shape, Path(folder) / shape)


def _write_apart(shape: str, folder: Path, tokenizer: str | None = None) -> str:
    """`write` in a process that ends: of a GPU's memory nothing is left to the caller, who starts engines there."""
    process = multiprocessing.get_context("spawn").Process(target=write, args=(SHAPES[shape], folder, tokenizer))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("the random weights could not be written; what went wrong stands above")
    return str(folder)
