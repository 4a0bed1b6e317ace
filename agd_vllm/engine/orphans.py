"""vLLM's processes end with the actor that started them, however it dies: nobody else would end them."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

# The actor's process id; vLLM's processes inherit the actor's environment.
ACTOR_VARIABLE = "AGD_VLLM_ACTOR_PID"
LOOK_EVERY_S = 1.0


def end_with_actor() -> None:
    """Called in the process that samples: watches the actor, and once that is gone kills this process and its parent.

    With an executor of its own the sampling process is a child of vLLM's engine process; without, it is that itself.
    """
    actor = psutil.Process(int(os.environ[ACTOR_VARIABLE]))
    parent = psutil.Process().parent()
    threading.Thread(target=_watch, args=(actor, parent), name="agd-vllm-orphans", daemon=True).start()


def _watch(actor: psutil.Process, parent: psutil.Process | None) -> None:
    while _alive(actor):
        time.sleep(LOOK_EVERY_S)
    if parent is not None and parent != actor and _alive(parent):
        parent.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
