"""Guided steps for one's own script: read by a thread, awaited, and no more than an error when one is lost."""

import threading
import time

import pytest
from vllm import SamplingParams

from agd_vllm.engine.channel import GateSender, ReportsLost
from agd_vllm.inline import Reports, reports
from agd_vllm.inline.params import inline_params_of
from agd_vllm.records import Roi, Span

GUIDED = (2.0, [5, 9], [0.5, 0.25], [0.1, 0.9])


def request(key: int) -> SamplingParams:
    params = inline_params_of(Roi((Span(0, 4),)), key, "attnlrp", 0.0, 5, 0.05)
    return SamplingParams(temperature=0.0, extra_args=params.as_extra_args())


def test_more_reports_than_a_socket_holds_arrive_while_the_script_waits_for_vllm():
    rows = [request(key) for key in range(400)]
    with Reports() as found:
        for params in rows:
            found.follow(params)
        sender = GateSender(found._receiver.path)

        def decode():
            for key in range(len(rows)):
                sender.send_samples([(key, 0, None)])
                sender.send_samples([(key, 1, GUIDED)])

        worker = threading.Thread(target=decode, daemon=True)
        worker.start()
        worker.join(20)
        assert not worker.is_alive(), "the sender waits for somebody to read"
        for params in rows:
            (step,) = found.guided_steps(params, (4, 9))
            assert (step.step, step.chosen_id, step.scores) == (1, 9, [0.1, 0.9])
        assert not found._receiver._followed


def test_a_report_that_is_late_is_awaited_and_one_that_is_lost_is_an_error(monkeypatch):
    monkeypatch.setattr(reports, "REPORT_S", 1.0)
    with Reports() as found:
        for key in (1, 2):
            found.follow(request(key))
        sender = GateSender(found._receiver.path)
        threading.Timer(0.2, sender.send_samples, [[(1, 0, GUIDED)]]).start()
        begun = time.monotonic()
        assert len(found.guided_steps(request(1), [9])) == 1
        assert 0.1 < time.monotonic() - begun < 0.9
        with pytest.raises(ReportsLost, match="within 1 s"):
            found.guided_steps(request(2), [9])
    assert not found._thread.is_alive()
