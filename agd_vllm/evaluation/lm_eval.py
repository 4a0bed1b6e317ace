"""AGD as a model of lm-eval: any of its generation tasks under attribution-guided decoding.

`agd-vllm lm-eval` is lm-eval's own command with this model known to it: lm-eval (0.4) looks for no models in other
packages. `model_args` are the options of `agd-vllm decode` ('-' as '_') and vLLM's engine arguments, as lm-eval's own
vLLM model takes them.

The region, where no `roi` is given: the system message of a chat, the last user message of a chat without one, the
whole of a prompt without a chat template. A request that cannot be decoded, because it is longer than the model takes
or empty, has an empty answer; how many there are, and why, is said before anything is decoded.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from agd_vllm.engine.arguments import OWN
from agd_vllm.evaluation.strategies import flat_types, typed_options
from agd_vllm.input.reader import check_rows
from agd_vllm.input.schema import MEANINGLESS, NEUTRAL
from agd_vllm.pipeline.decoder import Decoder
from agd_vllm.pipeline.engines import Engines
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.records import InputRow, RowError, RowRefused

# Generation settings that tasks spell out at the value that changes nothing, beside those of rows.
UNCHANGING = NEUTRAL | {"num_beams": 1, "num_return_sequences": 1}
# Options by the names that lm-eval's vLLM model has for them.
RENAMED = {"max_length": "max_model_len", "max_gen_toks": "max_tokens"}
SHOWN_FAILURES = 3

log = logging.getLogger("agd_vllm")


class RequestRefused(ValueError):
    """A request or setting that deterministic guided decoding cannot serve. One line."""


class Chat(str):
    """A chat on its way through lm-eval, which takes prompts as text: its messages as JSON, not yet rendered."""


@register_model("agd-vllm")
class AGDModel(LM):
    """`pretrained` and, as `options`, fields of DecoderOptions or of vLLM's AsyncEngineArgs; lm-eval's batch sizes and
    device have no use here.

    Engines and workers are started for each call of `generate_until`, which lm-eval makes once for all its tasks.
    """

    def __init__(
        self, pretrained: str, batch_size: Any = None, max_batch_size: Any = None, device: Any = None, **options: Any
    ):
        super().__init__()
        self.tasks: Sequence[tuple[str, Any]] = ()
        try:
            self._given = _decoder_options(options)
            self._options = DecoderOptions.of(pretrained, **self._given)
            decoder = Decoder(options=self._options)
        except ValueError as error:
            raise RequestRefused(f"model_args: {error}") from error
        self._tokenizer, self._date = decoder.tokenizer, decoder.date

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers, in the order of the requests; empty ones for those that cannot be decoded.

        Raises RequestRefused for settings that guided decoding cannot serve, where no request can be decoded, and where
        a task of the same evaluation scores likelihoods.
        """
        if scoring := self._scoring_likelihoods():
            raise _no_likelihoods(scoring)
        by_penalty: dict[float, list[dict[str, Any]]] = {}
        for number, request in enumerate(requests):
            by_penalty.setdefault(self._penalty(request.args[1]), []).append(self._row(number, *request.args))
        decoders = {penalty: self._decoder(penalty) for penalty in by_penalty}
        failures = _Failures(len(requests))
        usable = {penalty: list(_usable(by_penalty[penalty], decoders[penalty], failures)) for penalty in by_penalty}
        failures.say("cannot be decoded")
        if requests and not any(usable.values()):
            raise RequestRefused(f"none of the {len(requests)} requests can be decoded; {failures.reasons()}")
        answers = [""] * len(requests)
        late = _Failures(len(requests))
        with Engines() as engines:
            for penalty, rows in usable.items():
                if not rows:
                    continue
                with engines.serving(decoders[penalty]):
                    self._decode(decoders[penalty], rows, late, requests, answers)
        late.say("could not be decoded")
        return answers

    def _decode(
        self,
        decoder: Decoder,
        rows: list[dict[str, Any]],
        failures: _Failures,
        requests: list[Instance],
        answers: list[str],
    ) -> None:
        """Decodes the rows of a penalty and puts their answers in their places."""
        for row in decoder.decode(rows, on_error=failures.add):
            answers[int(row.id)] = row.text
            # At once, so that lm-eval's cache has it whatever becomes of the others.
            self.cache_hook.add_partial("generate_until", requests[int(row.id)].args, row.text)

    def _penalty(self, settings: Mapping[str, Any]) -> float:
        """The request's own repetition penalty, else the model's; the decoder has one for all its rows."""
        given = settings.get("repetition_penalty")
        try:
            return self._own_penalty() if given is None else float(given)
        except (TypeError, ValueError) as error:
            raise RequestRefused(f"repetition_penalty {given!r}: must be a number (--gen_kwargs)") from error

    def _own_penalty(self) -> float:
        return getattr(self._options.strategy, "repetition_penalty", 1.0)

    def _decoder(self, penalty: float) -> Decoder:
        options = self._options
        try:
            if penalty != self._own_penalty():
                options = DecoderOptions.of(options.model, **self._given | {"repetition_penalty": penalty})
            decoder = Decoder(options=options)
        except ValueError as error:
            raise RequestRefused(f"generation settings: {error}") from error
        decoder.date = self._date
        return decoder

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise _no_likelihoods(self._scoring_likelihoods())

    loglikelihood_rolling = loglikelihood

    def _scoring_likelihoods(self) -> list[str]:
        """The tasks with such requests; a task's requests may be of both kinds, so its output_type does not tell."""
        return [
            name
            for name, task in self.tasks
            if any(request.request_type != "generate_until" for request in task.instances)
        ]

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
        unserved = [
            f"{key}={value!r}"
            for key, value in generation.items()
            if key not in (*MEANINGLESS, "temperature", "repetition_penalty")
            and not (key in UNCHANGING and value in (None, UNCHANGING[key]))
        ]
        if unserved:
            raise RequestRefused(f"agd-vllm cannot serve the generation setting {', '.join(unserved)}; take it out")
        if isinstance(context, Chat):
            row["messages"] = json.loads(context)
        else:
            row["prompt"] = context
        if self._options.roi is None and self._options.strategy.heads is None:
            row["roi"] = [_region(row)]
        return row


def _decoder_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of DecoderOptions; vLLM's engine arguments among them become its `engine_args`. Raises ValueError."""
    options: dict[str, Any] = {}
    for name, value in given.items():
        field = RENAMED.get(name, name)
        if field != name and field in given:
            raise ValueError(f"{name} and {field} are the same; leave one out")
        options[field] = value
    engine_args = {}
    if options.keys() - flat_types().keys():
        from vllm.engine.arg_utils import AsyncEngineArgs

        known = {field.name for field in fields(AsyncEngineArgs)} - flat_types().keys()
        engine_args = {name: options.pop(name) for name in known - OWN.keys() if name in options}
    typed = typed_options(options, refused=("model",))
    if twice := engine_args.keys() & typed.get("engine_args", {}).keys():
        raise ValueError(f"{', '.join(sorted(twice))}: in engine_args, too; leave one out")
    return typed | {"engine_args": typed.get("engine_args", {}) | engine_args}


def _no_likelihoods(tasks: Sequence[str]) -> RequestRefused:
    return RequestRefused(
        "no likelihoods: AGD selects tokens and leaves the model's probabilities "
        "as they are; choose tasks of output_type generate_until, or score likelihoods with --model vllm"
        + (f" (asked for by {', '.join(tasks)})" if tasks else "")
    )


def _telling_the_tasks(evaluate: Any) -> Any:
    """lm-eval's `evaluate`, with the model told of all tasks: it is asked for one kind of requests after the other, and
    would refuse likelihoods once everything else is decoded."""

    @functools.wraps(evaluate)
    def telling(lm: Any, task_dict: Mapping[Any, Any], *args: Any, **kwargs: Any) -> Any:
        model = getattr(lm, "lm", lm)  # --use_cache wraps it
        if not isinstance(model, AGDModel):
            return evaluate(lm, task_dict, *args, **kwargs)
        model.tasks = list(_flat(task_dict.get("tasks", task_dict)))
        try:
            return evaluate(lm, task_dict, *args, **kwargs)
        finally:
            model.tasks = ()

    return telling


def _flat(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, task in tasks.items():
        yield from _flat(task) if isinstance(task, Mapping) else [(name, task)]


evaluator.evaluate = _telling_the_tasks(evaluator.evaluate)


def _region(row: dict[str, Any]) -> dict[str, Any]:
    if "prompt" in row:
        return {"chars": [0, len(row["prompt"])]}
    messages = row["messages"]
    if any(message["role"] == "system" and message["content"] for message in messages):
        return {"role": "system"}
    asked = [index for index, message in enumerate(messages) if message["role"] == "user" and message["content"]]
    return {"message": asked[-1] if asked else 0}


def _usable(rows: list[dict[str, Any]], decoder: Decoder, failures: _Failures) -> Iterator[dict[str, Any]]:
    """The rows that can be decoded, as far as that shows without a model."""
    preparer = decoder.preparer()
    for row, checked in zip(rows, check_rows(rows), strict=True):
        if isinstance(checked, InputRow):
            try:
                preparer.prepare(checked)
            except RowRefused as refused:
                checked = RowError(row, checked.line, checked.id, refused.type, str(refused))
        if isinstance(checked, RowError):
            failures.add(checked)
        else:
            yield row


class _Failures:
    """Requests without an answer: how many, and why the first ones."""

    def __init__(self, total: int):
        self._total = total
        self._count = 0
        self._first: list[str] = []

    def add(self, error: RowError) -> None:
        self._count += 1
        if len(self._first) < SHOWN_FAILURES:
            self._first.append(f"request {error.id}: {error.message}")

    def reasons(self) -> str:
        return "; ".join(self._first) + ("; ..." if self._count > len(self._first) else "")

    def say(self, what: str) -> None:
        if self._count:
            counts = f"{self._count} of {self._total} requests"
            log.warning("%s %s, their answers are empty; %s", counts, what, self.reasons())
