"""What must be known of a model before it is loaded: that it exists, is supported, how it ends and can be paused."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from agd_vllm.models.architectures import check_supported, longest_sequence
from agd_vllm.models.config_overrides import read_config
from agd_vllm.models.digest import model_digest
from agd_vllm.prompts.template import one_line
from agd_vllm.prompts.tokenizer import load_tokenizer

RESERVED_NAME = re.compile(r"reserved|unused", re.IGNORECASE)
NAMED_TOKENS = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "sep_token_id", "cls_token_id")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A checked model. `eos_ids` end a row; `pause_id` is None where no gate is needed; lengths are in tokens; `digest`
    is that of `model_digest`."""

    path: str
    revision: str | None
    trust_remote_code: bool
    eos_ids: frozenset[int]
    pause_id: int | None
    max_model_len: int
    vocab_size: int
    num_layers: int
    num_heads: int
    digest: str | None = None


def inspect_model(
    path: str,
    *,
    pauses: bool = False,
    attribution: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[ModelInfo, PreTrainedTokenizerFast]:
    """Reads configuration and tokenizer, no weights. `overrides` change the configuration, as for `read_config`.

    Raises ValueError with one line for a model that is missing, that has no token to pause with (if it `pauses`), or
    that is not supported by `attribution` (if there is some).
    """
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    if _looks_like_path(path) and not os.path.isdir(path):
        raise ValueError(f"--model {path}: no such folder; give a local model folder or a Hugging Face id")
    try:
        config = read_config(path, overrides=overrides, **source)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {path}: cannot read its configuration: {one_line(error)}") from error
    if attribution:
        check_supported(config)
    tokenizer = load_tokenizer(path, **source)
    try:
        generation = GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:
        # As vLLM does: EOS tokens may stand in the model's configuration.
        generation = GenerationConfig.from_model_config(config)
    eos_ids = frozenset({tokenizer.eos_token_id, *_as_list(generation.eos_token_id)} - {None})
    text_config = config.get_text_config()
    pause_id = find_pause_token(tokenizer, text_config, eos_ids) if pauses else None
    info = ModelInfo(
        path,
        revision,
        trust_remote_code,
        eos_ids,
        pause_id,
        max_model_len=longest_sequence(text_config),
        vocab_size=text_config.vocab_size,
        num_layers=text_config.num_hidden_layers,
        num_heads=text_config.num_attention_heads,
        digest=model_digest(path, config),
    )
    return info, tokenizer


def find_pause_token(tokenizer: PreTrainedTokenizerFast, config: PretrainedConfig, eos_ids: frozenset[int]) -> int:
    """A special token that the model never emits in text: one reserved by name, else one that neither the tokenizer
    names, nor the chat template writes, nor ends a row. Raises ValueError where there is none."""
    template = str(tokenizer.chat_template or "")
    taken = eos_ids.union(getattr(tokenizer, name) for name in NAMED_TOKENS)
    free = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if (token.special or RESERVED_NAME.search(token.content))
        and token_id not in taken
        and token_id < config.vocab_size
        and token.content not in template
    }
    if not free:
        raise ValueError(
            "the tokenizer has no unused special token to pause with; add one (tokenizer.add_special_tokens and "
            "model.resize_token_embeddings), save the model and use that"
        )
    return max(free, key=lambda token_id: (bool(RESERVED_NAME.search(free[token_id])), token_id))


def _looks_like_path(path: str) -> bool:
    # "owner/name" may be a hub id; anything else with a separator, or nothing but a name, is a folder.
    return os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") != 1


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
