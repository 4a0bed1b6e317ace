"""One row in vLLM as a plain request: nothing pauses, guided steps are reported on the way and read at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind

from agd_vllm.engine.channel import GateReceiver
from agd_vllm.engine.events import Finished, SessionFailed
from agd_vllm.engine.stops import StopCheck
from agd_vllm.records import GuidedStep, PreparedRow

# With no stop string to look for, most tokens need no message of their own; some show that the engine is alive.
STREAM_INTERVAL = 64


class PlainRequest:
    """`await next()` decodes to the row's end. `close()` always, or vLLM decodes on.

    `llm` is an AsyncLLM or a SteppedLLM. `params`, where the row is guided: what its extra arguments are, with a `key`
    and the prompt's `salt`. `repetition_penalty`: that of vLLM's sampler.
    """

    def __init__(
        self,
        llm: Any,
        receiver: GateReceiver,
        row: PreparedRow,
        stops: StopCheck,
        request_id: str,
        params: Any | None,
        sign_of_life: Callable[[], None],
        repetition_penalty: float = 1.0,
    ):
        self._receiver = receiver
        self._stops = stops
        self._key = params.key if params else None
        self._sign_of_life = sign_of_life
        if params:
            receiver.follow(params.key)
        prompt = TokensPrompt(prompt_token_ids=list(row.prompt_token_ids))
        if params:
            prompt["cache_salt"] = params.salt
        sampling = SamplingParams(
            temperature=0.0,
            repetition_penalty=repetition_penalty,
            max_tokens=row.max_tokens,
            min_tokens=row.min_tokens,
            stop_token_ids=list(row.stop_token_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=1 if row.stop else STREAM_INTERVAL,
            extra_args=params.as_extra_args() if params else None,
            skip_clone=True,
        )
        self._outputs = llm.generate(prompt, sampling, request_id=request_id)

    async def next(self) -> Finished:
        """Raises SessionFailed where vLLM ends the row by itself."""
        async for output in self._outputs:
            self._sign_of_life()
            completion = output.outputs[0]
            for token_id in completion.token_ids:
                if reason := self._stops.add(token_id):
                    return Finished(reason)
            if completion.finish_reason is not None:
                said = completion.stop_reason or completion.finish_reason
                raise SessionFailed(f"vLLM ended the row early ({said})")
        raise SessionFailed("vLLM closed the request")

    async def guided_steps(self) -> list[GuidedStep]:
        """Those of all tokens so far; waits for reports that are still on their way. Raises ReportsLost."""
        return [] if self._key is None else await self._receiver.take_steps(self._key, self._stops.token_ids)

    async def close(self) -> None:
        if self._key is not None:
            self._receiver.forget(self._key)
        await self._outputs.aclose()
