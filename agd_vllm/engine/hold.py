"""An engine on a shared GPU is held until the others have their memory there: vLLM looks at the GPU once while it
starts, and takes what goes later on for its own. It imports and configures meanwhile."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

# The file that says how it went on; vLLM's processes inherit the actor's environment.
HOLD_VARIABLE = "AGD_VLLM_HOLD"
# Longer than any worker may take to load.
READY_S = 3600
POLL_S = 0.05
LET_GO = "let go"

HELD_WORKER = "agd_vllm.engine.held_worker.HeldWorker"


class Hold:
    """Of one engine, made before it starts, in its actor."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="agd-vllm-")
        self._path = Path(self._folder.name) / "hold"
        os.environ[HOLD_VARIABLE] = f"{self._path}"
        os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", f"{READY_S}")

    def let_go(self) -> None:
        self._say(LET_GO)

    def give_up(self, reason: str) -> None:
        """What it waited for will not come: the engine fails, with that reason."""
        self._say(reason)

    def _say(self, word: str) -> None:
        draft = self._path.with_suffix(".new")
        draft.write_text(word)
        draft.rename(self._path)


def wait() -> None:
    """In vLLM's process, until the engine is let go. Raises RuntimeError with the reason if it is given up."""
    path = Path(os.environ[HOLD_VARIABLE])
    while not path.exists():
        time.sleep(POLL_S)
    word = path.read_text()
    if word != LET_GO:
        raise RuntimeError(word)
