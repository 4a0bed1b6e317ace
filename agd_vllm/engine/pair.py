"""Two sessions of one row that are decoded in step: with the region of interest and without it."""

from __future__ import annotations

import asyncio

from agd_vllm.engine.channel import GateReceiver
from agd_vllm.engine.events import Finished, SessionFailed
from agd_vllm.engine.session import Session
from agd_vllm.engine.stops import StopCheck


class PairSession:
    """`leader` is the row as it is and decides when it ends, `follower` is given the same tokens.

    In step both sample the same tokens inside vLLM (engine/contrast.py); out of step each pauses at the same token,
    which is then given to both.
    """

    def __init__(
        self,
        leader: Session,
        follower: Session,
        receiver: GateReceiver,
        key: int,
        stops: StopCheck,
        follower_stops: StopCheck,
    ):
        self._leader = leader
        self._follower = follower
        self._receiver = receiver
        self._key = key
        self._stops = stops
        self._follower_stops = follower_stops

    async def run(self) -> Finished:
        """Decodes to the row's end. Raises SessionFailed or SessionStalled."""
        # vLLM hears of a session once its output is waited for: in the background, both prompts go in at once.
        follower = asyncio.ensure_future(self._follower.advance())
        try:
            while True:
                if finished := await self._leader.advance():
                    return finished
                # Both have paused at the same step before the choice is read: the last one reported counts.
                if await follower or self._follower_stops.token_ids != self._stops.token_ids:
                    raise SessionFailed("the row's sequences with and without its region got out of step")
                token_id = self._receiver.take_choice(self._key, len(self._stops.token_ids))
                if finished := self._leader.select(token_id):
                    return finished
                self._follower.select(token_id)
                follower = asyncio.ensure_future(self._follower.advance())
        finally:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)

    async def close(self) -> None:
        """Ends both sessions in vLLM."""
        try:
            await self._leader.close()
        finally:
            await self._follower.close()
