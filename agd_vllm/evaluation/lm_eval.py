"""AGD as a model of lm-eval: any of its generation tasks under attribution-guided decoding.

`agd-vllm lm-eval` is lm-eval's own command with this model known to it: lm-eval (0.4) looks for no models in other
packages. `model_args` are the options of `agd-vllm decode` ('-' as '_').

The region, where no `roi` is given: the system message of a chat, the last user message of a chat without one, the
whole of a prompt without a chat template.
"""

from __future__ import annotations

import json
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from agd_vllm.evaluation.strategies import typed_options
from agd_vllm.pipeline.decoder import Decoder
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.records import RowError

# Generation settings that mean nothing where nothing is drawn.
MEANINGLESS = ("top_p", "top_k", "min_p", "seed")


class RequestRefused(ValueError):
    """A request or setting that deterministic guided decoding cannot serve. One line."""


class Chat(str):
    """A chat on its way through lm-eval, which takes prompts as text: its messages as JSON, not yet rendered."""


@register_model("agd-vllm")
class AGDModel(LM):
    """`pretrained` and, as `options`, fields of DecoderOptions; lm-eval's batch sizes and device have no use here.

    Engines and workers are started for each call of `generate_until`, which lm-eval makes once for all its tasks.
    """

    def __init__(
        self, pretrained: str, batch_size: Any = None, max_batch_size: Any = None, device: Any = None, **options: Any
    ):
        super().__init__()
        try:
            self._options = DecoderOptions(model=pretrained, **typed_options(options, refused=("model",)))
            self._tokenizer = Decoder(options=self._options).tokenizer
        except ValueError as error:
            raise RequestRefused(f"model_args: {error}") from error

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers, in the order of the requests. Raises RequestRefused where one cannot be decoded."""
        rows = [self._row(number, *request.args) for number, request in enumerate(requests)]
        texts: dict[str, str] = {}
        with Decoder(options=self._options) as decoder:
            for row in decoder.decode(rows, on_error=_refuse):
                texts[row.id] = row.text
        answers = [texts[row["id"]] for row in rows]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise RequestRefused(
            "no likelihoods: AGD selects tokens and leaves the model's probabilities "
            "as they are; choose tasks of output_type generate_until, or score likelihoods with --model vllm"
        )

    loglikelihood_rolling = loglikelihood

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Chat:
        """Messages as they are: the template is applied where regions are mapped to tokens. A last message of the
        assistant (`add_generation_prompt` false) is continued."""
        messages = [{"role": message["role"], "content": message["content"]} for message in chat_history]
        return Chat(json.dumps(messages, ensure_ascii=False))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self._options.model

    def _row(self, number: int, context: str, settings: dict[str, Any]) -> dict[str, Any]:
        generation = normalize_gen_kwargs(settings, default_max_gen_toks=self._options.max_tokens)
        if generation.pop("do_sample") or generation.pop("temperature", 0):
            raise RequestRefused(
                "agd-vllm decodes deterministically; set do_sample=False and temperature=0 (--gen_kwargs)"
            )
        row = {
            "id": f"{number}",
            "max_tokens": generation.pop("max_gen_toks"),
            "stop": [stop for stop in generation.pop("until") if stop],
        }
        unknown = [key for key in generation if key not in (*MEANINGLESS, "temperature")]
        if unknown:
            raise RequestRefused(f"agd-vllm knows no generation setting {', '.join(unknown)}; take it out")
        if isinstance(context, Chat):
            row["messages"] = json.loads(context)
        else:
            row["prompt"] = context
        if self._options.roi is None and self._options.roi_heads is None:
            row["roi"] = [_region(row)]
        return row


def _region(row: dict[str, Any]) -> dict[str, Any]:
    if "prompt" in row:
        return {"chars": [0, len(row["prompt"])]}
    roles = [message["role"] for message in row["messages"]]
    if "system" in roles:
        return {"role": "system"}
    return {"message": max(index for index, role in enumerate(roles) if role == "user")}


def _refuse(error: RowError) -> None:
    raise RequestRefused(f"request {error.id} cannot be decoded: {error.message}")
