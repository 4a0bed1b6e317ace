"""How a request enters Model Runner V2's state: nothing that it copies makes the host wait for a GPU."""

from types import SimpleNamespace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agd_vllm.inline import runner_v2
from agd_vllm.inline.params import inline_params_of
from agd_vllm.inline.runner_v2 import RunnerV2
from agd_vllm.records import Roi, Span


class Copies(TorchDispatchMode):
    """Where copies into a tensor come from."""

    def __init__(self, into):
        super().__init__()
        self._into = into.data_ptr(), into.data_ptr() + into.nbytes
        self.sources = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if "copy" in operator.name() and self._into[0] <= args[0].data_ptr() < self._into[1]:
            self.sources.append(args[1])
        return operator(*args, **(kwargs or {}))


def test_a_head_set_is_copied_from_pinned_memory_only(monkeypatch):
    runner = object.__new__(RunnerV2)
    runner._sets = torch.zeros(2, 3, 4)
    runner._weights = SimpleNamespace(stage_write=lambda row, start, weights: None)
    runner._reach, runner._set_of_row = (SimpleNamespace(np=np.zeros(2, dtype=np.int32)) for _ in range(2))
    pinned = []

    def to_device(host, device):
        pinned.append(host.clone())
        return pinned[-1]

    monkeypatch.setattr(runner_v2, "to_device", to_device)
    roi = Roi((Span(0, 2),), ((0, 1), (2, 3)))
    with Copies(runner._sets) as copies:
        runner.enter(1, inline_params_of(roi, 1, "attnlrp", 0.0, 5, 0.05), 4)
    assert copies.sources and all(any(source is there for there in pinned) for source in copies.sources)
    assert runner._sets[1].nonzero().tolist() == [[0, 1], [2, 3]] and not runner._sets[0].any()
    assert runner._set_of_row.np.tolist() == [0, 1]
