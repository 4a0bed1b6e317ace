"""Processes that an actor has started end with it, however it dies."""

import subprocess
import sys

import psutil
import pytest

# The actor starts an engine process, which starts a worker that samples, as vLLM does on CPU; or samples itself.
SAMPLER = """
import time
from agd_vllm.engine.orphans import end_with_actor
end_with_actor()
print("up", flush=True)
time.sleep(60)
"""
ENGINE = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SAMPLER!r}])"
ACTOR = """
import os, subprocess, sys
from agd_vllm.engine.orphans import ACTOR_VARIABLE
os.environ[ACTOR_VARIABLE] = str(os.getpid())
subprocess.run([sys.executable, "-c", {child!r}])
"""


@pytest.mark.parametrize("child", [ENGINE, SAMPLER], ids=["worker process", "in the engine process"])
def test_a_killed_actor_takes_vllms_processes_along(child):
    actor = psutil.Popen([sys.executable, "-c", ACTOR.format(child=child)], stdout=subprocess.PIPE, text=True)
    assert actor.stdout.readline() == "up\n"
    children = actor.children(recursive=True)
    assert len(children) == (2 if child == ENGINE else 1)
    actor.kill()
    actor.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
