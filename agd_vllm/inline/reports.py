"""The guided steps of one's own `vllm.LLM` script: a thread reads the reports while vLLM decodes."""

from __future__ import annotations

import selectors
import threading
from collections.abc import Sequence
from types import TracebackType

from vllm import SamplingParams

from agd_vllm.engine.channel import REPORT_S, GateReceiver, ReportsLost
from agd_vllm.inline.params import inline_params
from agd_vllm.records import GuidedStep

# The thread looks so often whether it should end.
LOOK_EVERY_S = 0.2


class Reports:
    """Make it before the engine: vLLM's processes inherit the name of its socket.

    with Reports() as reports:
        llm = LLM(**engine_args(model))
        prompt, params = request(llm.get_tokenizer(), messages, roi=[{"role": "system"}])
        reports.follow(params)
        (output,) = llm.generate(prompt, params)
        steps = reports.guided_steps(params, output.outputs[0].token_ids)

    The queue of a socket holds about ten reports, and `LLM.generate` returns at the end only: without a thread that
    reads them vLLM's worker would wait forever.
    """

    def __init__(self):
        self._receiver = GateReceiver(lambda step: None)
        self._arrived = threading.Condition()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="agd-vllm-reports", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._receiver.fileno(), selectors.EVENT_READ)
            while not self._closed.is_set():
                if selector.select(LOOK_EVERY_S):
                    with self._arrived:
                        self._receiver.drain()
                        self._arrived.notify_all()

    def follow(self, params: SamplingParams) -> None:
        """Keeps the guided steps of this request until `guided_steps`. Before it goes to vLLM."""
        with self._arrived:
            self._receiver.follow(inline_params(params).key)

    def guided_steps(self, params: SamplingParams, token_ids: Sequence[int]) -> list[GuidedStep]:
        """The guided steps of a request that was followed and gave `token_ids`, in their order; once.

        Waits for reports that are still on their way. Raises ReportsLost where one does not come.
        """
        key, ids = inline_params(params).key, list(token_ids)
        with self._arrived:
            try:
                if not self._arrived.wait_for(lambda: self._receiver.guided_steps(key, ids) is not None, REPORT_S):
                    raise ReportsLost(f"no report of the last token came within {REPORT_S:g} s")
                return self._receiver.guided_steps(key, ids)
            finally:
                self._receiver.forget(key)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._receiver.close()

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
