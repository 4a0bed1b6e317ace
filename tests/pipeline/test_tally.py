"""Seconds and faults add up over invocations, also over one that was killed outright."""

import json
from types import SimpleNamespace

import pytest

from agd_vllm.pipeline import tally
from agd_vllm.pipeline.tally import Tally


def invocation(directory, seconds: float, load_seconds: float, **faults: int) -> Tally:
    decoder = SimpleNamespace(load_seconds=load_seconds, faults=faults)
    return Tally(str(directory), decoder, SimpleNamespace(seconds=seconds))


def test_invocations_add_up(tmp_path):
    first = invocation(tmp_path, 5.0, 40.0, engine_restarts=1)
    first.keep()
    first.keep()
    second = invocation(tmp_path, 2.0, 30.0, engine_restarts=2, nan_scores=1)
    second.keep()
    assert second.total() == {"seconds": 7.0, "load_seconds": 70.0, "faults": {"engine_restarts": 3, "nan_scores": 1}}
    assert json.loads((tmp_path / "times.json").read_text()) == second.total()


def test_what_is_kept_is_never_old(tmp_path, monkeypatch):
    running = invocation(tmp_path, 5.0, 40.0)
    running.keep_if_due()
    assert not (tmp_path / "times.json").exists()
    monkeypatch.setattr(tally, "KEEP_SECONDS", 0.0)
    running.keep_if_due()
    assert invocation(tmp_path, 0.0, 0.0).total()["seconds"] == pytest.approx(5.0)
