"""An engine that is held takes no memory of its device before what it waits for has answered."""

import os
import threading
import time

import pytest

from agd_vllm.engine import hold as hold_module
from agd_vllm.engine.hold import HELD_WORKER, HOLD_VARIABLE, Hold


@pytest.fixture
def hold():
    kept = dict(os.environ)
    yield Hold()
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture
def held_worker(hold, monkeypatch):
    """vLLM's worker of this platform; what it does to its device is not done, its process watches no actor."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    worker = resolve_obj_by_qualname(HELD_WORKER)
    looked: list[float] = []
    monkeypatch.setattr(worker.__bases__[0], "init_device", lambda self: looked.append(time.monotonic()))
    monkeypatch.setattr("agd_vllm.engine.held_worker.end_with_actor", lambda: None)
    return worker.__new__(worker), looked


def test_the_device_is_looked_at_only_after_the_workers_info_has_answered(hold, held_worker):
    """The replica's own thread lets the engine go, by an answer of Ray's that takes a moment."""
    import ray

    from agd_vllm.pipeline.replica import _let_go

    worker, looked = held_worker
    answered: list[float] = []

    def get(_refs):
        time.sleep(0.3)
        answered.append(time.monotonic())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "get", get)
        thread = threading.Thread(target=_let_go, args=(hold, ["info"]))
        thread.start()
        worker.init_device()
        thread.join()
    assert len(looked) == 1 and looked[0] >= answered[0]


def test_an_engine_whose_workers_do_not_come_fails_with_their_reason(hold, held_worker):
    worker, looked = held_worker
    hold.give_up("an attribution worker needs 3 GiB")
    with pytest.raises(RuntimeError, match="needs 3 GiB"):
        worker.init_device()
    assert not looked


def test_vllm_waits_long_enough_for_an_engine_that_is_held(hold):
    assert int(os.environ["VLLM_ENGINE_READY_TIMEOUT_S"]) == hold_module.READY_S
    assert not os.path.exists(os.environ[HOLD_VARIABLE])
