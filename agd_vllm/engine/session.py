"""One row in vLLM: a streaming-input session that pauses at gated steps and keeps its KV cache while it waits."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Callable, Iterator

import msgspec
from vllm import SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from agd_vllm.engine.channel import GateReceiver
from agd_vllm.engine.contrast import ContrastParams
from agd_vllm.engine.entropies import EntropyParams
from agd_vllm.engine.events import Finished, SessionFailed, SessionStalled
from agd_vllm.engine.gate_params import GateParams
from agd_vllm.engine.stops import StopCheck
from agd_vllm.records import Gate, PreparedRow

# With no stop string to look for, most tokens need no message of their own; some show that the session is alive.
STREAM_INTERVAL = 64


class Session:
    """Use: `await next()` gives a Gate (paused) or Finished; after a Gate `select(token)` and `next()` again.

    `close()` always, or vLLM keeps the session's slot and blocks.
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
        self._keys = keys
        self._key = params.key if params else None
        if isinstance(params, GateParams):
            receiver.expect(self._key)
        self._deadline_s = deadline_s
        self._sign_of_life = sign_of_life
        self._chunks: asyncio.Queue[StreamingInput | None] = asyncio.Queue()
        self._sampling = self._first_params()
        # A new list, because vLLM extends it in place; with the output so far, where an earlier session stalled.
        self._chunks.put_nowait(StreamingInput(tokens_input(row.prompt_token_ids + stops.token_ids), self._sampling))
        self._outputs = llm.generate(self._inputs(), self._sampling, request_id=f"{next(keys)}")
        self.num_cached_tokens: int | None = None

    async def _inputs(self) -> AsyncGenerator[StreamingInput, None]:
        while (chunk := await self._chunks.get()) is not None:
            yield chunk

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

    def _next_params(self) -> SamplingParams:
        """Of the next chunk: vLLM counts max_tokens and min_tokens within a chunk, so both shrink.

        A copy: to make them anew, and to check them anew, is a good part of what a resume costs.
        """
        params = copy.copy(self._sampling)
        params.max_tokens, params.min_tokens = self._stops.remaining, self._min_tokens
        if self._params:
            params.extra_args = self._params.as_extra_args()
        return params

    @property
    def _min_tokens(self) -> int:
        return max(0, self._row.min_tokens - len(self._stops.token_ids))

    async def next(self) -> Gate | Finished:
        """Decodes up to the next gated step or the end. Raises SessionFailed or SessionStalled."""
        return await self.advance() or await self._receiver.take(self._key, len(self._stops.token_ids))

    async def advance(self) -> Finished | None:
        """As `next`, with None for a pause, whose report may not have come yet."""
        while True:
            try:
                async with asyncio.timeout(self._deadline_s):
                    output = await anext(self._outputs)
            except TimeoutError as error:
                raise SessionStalled(f"vLLM gave no token for {self._deadline_s:g} s") from error
            except StopAsyncIteration as error:
                raise SessionFailed("vLLM closed the session") from error
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

    def select(self, token_id: int) -> Finished | None:
        """Takes `token_id` at the paused step: ends the row (returned) or sends it to vLLM, which decodes on."""
        if reason := self._stops.add(token_id):
            return Finished(reason)
        if isinstance(self._params, GateParams):
            self._take_new_key()
        self._chunks.put_nowait(StreamingInput(tokens_input([token_id]), self._next_params()))
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
        self._chunks.put_nowait(None)
        await self._outputs.aclose()
