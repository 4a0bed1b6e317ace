"""One row in vLLM: a resumable request that pauses at gated steps and keeps its KV cache while it waits."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator

import msgspec
from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector

from agd_vllm.engine.channel import GateReceiver
from agd_vllm.engine.contrast import ContrastParams
from agd_vllm.engine.entropies import EntropyParams
from agd_vllm.engine.events import Finished, SessionFailed, SessionStalled
from agd_vllm.engine.gate_params import GateParams
from agd_vllm.engine.plain_request import STREAM_INTERVAL
from agd_vllm.engine.stops import StopCheck
from agd_vllm.records import Gate, PreparedRow


class Session:
    """Use: `await next()` gives a Gate (paused) or Finished; after a Gate `select(token)` and `next()` again.

    `close()` always, or vLLM keeps the session's slot and blocks.

    vLLM's own way of going on, streaming input to `AsyncLLM.generate`, makes each chunk a request from the beginning;
    here a chunk is the first one's request again, with its own token and limits.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        receiver: GateReceiver,
        row: PreparedRow,
        stops: StopCheck,
        params: GateParams | ContrastParams | EntropyParams | None,
        keys: Iterator[int],
        deadline_s: float,
        sign_of_life: Callable[[], None],
        repetition_penalty: float = 1.0,
    ):
        self._row = row
        self._repetition_penalty = repetition_penalty
        self._stops = stops
        self._params = params
        self._pause_id = params.pause_id if params else None
        self._receiver = receiver
        self._llm = llm
        self._keys = keys
        self._key = params.key if params else None
        if isinstance(params, GateParams):
            receiver.expect(self._key)
        self._deadline_s = deadline_s
        self._sign_of_life = sign_of_life
        self._first: EngineCoreRequest | None = None
        # Goes to vLLM with `next`: the first request, or after a selection its like.
        self._unsent: EngineCoreRequest | None = None
        self._outputs: RequestOutputCollector | None = None
        self.num_cached_tokens: int | None = None

    async def _open(self) -> None:
        params = self._first_params()
        # A new list, because vLLM extends it in place; with the output so far, where an earlier session stalled.
        prompt = tokens_input(self._row.prompt_token_ids + self._stops.token_ids)
        inputs = self._llm.input_processor
        tasks = await self._llm.get_supported_tasks()
        request = inputs.process_inputs(f"{next(self._keys)}", prompt, params, tasks, resumable=True)
        inputs.assign_request_id(request)
        self._llm._run_output_handler()
        self._outputs = RequestOutputCollector(params.output_kind, request.request_id)
        self._first = self._unsent = request

    async def _send(self) -> None:
        request, self._unsent = self._unsent, None
        await self._llm._add_request(request, None, None, 0, self._outputs)

    def _first_params(self) -> SamplingParams:
        return SamplingParams(
            temperature=0.0,
            repetition_penalty=self._repetition_penalty,
            max_tokens=self._stops.remaining,
            min_tokens=self._min_tokens,
            stop_token_ids=[*self._row.stop_token_ids, *([] if self._pause_id is None else [self._pause_id])],
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=1 if self._row.stop else STREAM_INTERVAL,
            extra_args=self._params.as_extra_args() if self._params else None,
            skip_clone=True,
        )

    def _next_request(self, token_id: int) -> EngineCoreRequest:
        """vLLM counts max_tokens and min_tokens within a chunk, so both shrink."""
        request = copy.copy(self._first)
        request.prompt_token_ids = [token_id]
        request.sampling_params = params = copy.copy(self._first.sampling_params)
        params.max_tokens, params.min_tokens = self._stops.remaining, self._min_tokens
        if self._params:
            params.extra_args = self._params.as_extra_args()
        return request

    @property
    def _min_tokens(self) -> int:
        return max(0, self._row.min_tokens - len(self._stops.token_ids))

    async def next(self) -> Gate | Finished:
        """Decodes up to the next gated step or the end. Raises SessionFailed or SessionStalled."""
        return await self.advance() or await self._receiver.take(self._key, len(self._stops.token_ids))

    async def advance(self) -> Finished | None:
        """As `next`, with None for a pause, whose report may not have come yet."""
        if self._first is None:
            await self._open()
        if self._unsent is not None:
            await self._send()
        while True:
            output = self._outputs.get_nowait() or await self._output()
            self._sign_of_life()
            if self.num_cached_tokens is None:
                self.num_cached_tokens = output.num_cached_tokens
            completion = output.outputs[0]
            for token_id in completion.token_ids:
                # A stop reason of an earlier chunk sticks in vLLM's outputs: only the token itself tells.
                if token_id == self._pause_id:
                    return None
                if reason := self._stops.add(token_id):
                    return Finished(reason)
            if completion.finish_reason is not None:
                raise SessionFailed(f"vLLM ended the session early ({completion.finish_reason})")

    async def _output(self) -> RequestOutput:
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._outputs.get()
        except TimeoutError as error:
            raise SessionStalled(f"vLLM gave no token for {self._deadline_s:g} s") from error

    def select(self, token_id: int) -> Finished | None:
        """Takes `token_id` at the paused step: ends the row (returned), or has `next` send it to vLLM."""
        if reason := self._stops.add(token_id):
            return Finished(reason)
        if isinstance(self._params, GateParams):
            self._take_new_key()
        self._unsent = self._next_request(token_id)
        return None

    def _take_new_key(self) -> None:
        # With async scheduling vLLM has begun the step after PAUSE when it hears of it: a report of what never was.
        self._receiver.forget(self._key)
        self._key = next(self._keys)
        self._params = msgspec.structs.replace(self._params, key=self._key)
        self._receiver.expect(self._key)

    def entropies(self, steps: range) -> list[float]:
        """Entropies of tokens that this session has decoded, nats, where they are recorded (EntropyParams)."""
        return self._receiver.entropies(self._key, steps)

    async def close(self) -> None:
        """Ends the session in vLLM, finished or not, and frees its slot and blocks."""
        if self._key is not None:
            self._receiver.forget(self._key)
        if self._outputs is not None:
            await self._llm.abort(self._outputs.request_id, internal=True)
