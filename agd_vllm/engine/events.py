"""How a session in vLLM can go: it ends, or it fails. Free of vLLM's imports, which take seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finished:
    """The row's end; `reason` is `stop` or `length`."""

    reason: str


class SessionFailed(Exception):
    """vLLM ended the session by itself (abort or error)."""


class SessionStalled(SessionFailed):
    """vLLM gave no token in time; prompt and tokens so far can be given to a new session."""
