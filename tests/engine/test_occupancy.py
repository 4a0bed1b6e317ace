"""Idle time of an engine: only while every open session waits."""

import time

import pytest

from agd_vllm.engine.occupancy import Occupancy


def test_only_the_time_in_which_all_sessions_wait_is_idle():
    occupancy = Occupancy()
    with occupancy.session(), occupancy.session():
        with occupancy.pause():
            time.sleep(0.05)
            assert occupancy.idle_seconds == 0
            with occupancy.pause():
                assert occupancy.paused == 2
                time.sleep(0.1)
            idle = occupancy.idle_seconds
        time.sleep(0.05)
        assert occupancy.idle_seconds == idle == pytest.approx(0.1, abs=0.05)
    assert occupancy.idle_seconds == idle


def test_an_engine_is_silent_only_while_a_session_could_give_a_token():
    occupancy = Occupancy()
    time.sleep(0.05)
    assert occupancy.silent_seconds == 0
    with occupancy.session(), occupancy.session():
        time.sleep(0.05)
        assert occupancy.silent_seconds >= 0.05
        occupancy.sign_of_life()
        assert occupancy.silent_seconds < 0.05
        with occupancy.pause():
            time.sleep(0.05)
            assert occupancy.silent_seconds >= 0.05
            with occupancy.pause():
                time.sleep(0.05)
                assert occupancy.silent_seconds == 0
        assert occupancy.silent_seconds < 0.05
