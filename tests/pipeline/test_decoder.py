"""One Decoder over its life: left early, killed by a row, closed. Parts that die otherwise: test_chaos.py."""

import contextlib
import dataclasses
import itertools
import json
import signal
import threading
import time

import psutil
import pytest
from conftest import DEMO_ROWS, ENGINE_ARGS

from agd_vllm import Decoder
from agd_vllm.input.reader import read_rows
from agd_vllm.records import DecodedRow, RowError

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def rows():
    rows = list(read_rows([str(DEMO_ROWS)]))[:3]
    return [dataclasses.replace(row, max_tokens=12 + 4 * index) for index, row in enumerate(rows)]


@pytest.fixture(scope="module")
def decoder(smollm2):
    engine_args = {key: value for key, value in ENGINE_ARGS.items() if key != "max_model_len"}
    before = signal.signal(signal.SIGTERM, ended_by_scheduler)
    with Decoder(str(smollm2), dtype="float32", max_model_len=1024, engine_args=engine_args) as decoder:
        yield decoder
    signal.signal(signal.SIGTERM, before)


def ended_by_scheduler(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(decoder, rows):
    return decoded(decoder.outcomes(rows))


def decoded(outcomes) -> dict[str, DecodedRow]:
    ended = [outcome for outcome in outcomes if outcome is not None]
    rows = {row.id: row for row in ended}
    assert len(rows) == len(ended), "a row came out twice"
    return rows


def processes(name: str) -> list[psutil.Process]:
    """Those of that name among our own Ray's actors and what they started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = [" ".join(each.cmdline()) for each in (process, *process.parents())]
        except psutil.NoSuchProcess:
            continue
        if name in line[0] and any("ray::" in command for command in line):
            found.append(process)
    return found


def kill(name: str) -> int:
    """kill -9; how many."""
    victims = processes(name)
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    return len(victims)


def same(ours: dict[str, DecodedRow], theirs: dict[str, DecodedRow]) -> None:
    assert ours.keys() == theirs.keys()
    for name, row in ours.items():
        assert row.token_ids == theirs[name].token_ids, name
        assert [step.step for step in row.steps] == [step.step for step in theirs[name].steps]


def test_the_callers_signal_handler_stays(decoder):
    """Ray would put one of its own in its place, which ends the process without a word."""
    assert signal.getsignal(signal.SIGTERM) is ended_by_scheduler


def test_decode_takes_endless_input_as_room_allows_and_may_be_left(decoder, rows, undisturbed):
    """The next call starts clean, also with ids that were in flight."""
    taken, errors = [], []

    def endless():
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a fruit."}]
        yield {"id": "no messages"}
        for name in itertools.chain((row.id for row in rows), map(str, itertools.count())):
            taken.append(name)
            yield {"id": name, "messages": messages, "max_tokens": 400, "metadata": {"name": name}}

    for row in decoder.decode(endless(), on_error=errors.append):
        assert json.loads(row.metadata) == {"name": row.id}
        assert row.steps and row.text
        break
    assert [error.id for error in errors] == ["no messages"]
    assert len(taken) < ENGINE_ARGS["max_num_seqs"] + 100
    same(decoded(decoder.outcomes(rows)), undisturbed)


@contextlib.contextmanager
def killing(decoder, in_flight, times=None):
    """vLLM's process is killed whenever rows are in flight of which `in_flight` says so, `times` times at most."""
    done = threading.Event()

    def assassin():
        killed = 0
        while not done.is_set() and killed != times:
            if any(in_flight(engine.rows) and engine.started for engine in decoder._fleet._engines):
                killed += kill("VLLM::EngineCore")
            time.sleep(0.05)

    thread = threading.Thread(target=assassin)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_rows_of_an_engine_that_dies_are_decoded_by_the_next(decoder, rows, undisturbed):
    before = decoder.faults.get("engine_restarts", 0)
    with killing(decoder, lambda in_flight: len(in_flight) == len(rows), times=1):
        outcomes = decoded(decoder.outcomes(rows))
    assert decoder.faults["engine_restarts"] == before + 1
    same(outcomes, undisturbed)


@pytest.mark.long
def test_a_row_that_kills_its_engine_is_an_error_and_the_rest_is_decoded(decoder, rows, undisturbed):
    """As a row would do it that crashes vLLM."""
    poison = rows[-1].id
    before = decoder.faults.get("engine_restarts", 0)
    with killing(decoder, lambda in_flight: poison in in_flight):
        outcomes = decoded(decoder.outcomes(rows))
    error = outcomes.pop(poison)
    assert isinstance(error, RowError)
    assert error.type == "poison"
    # With all three rows in flight, then twice alone; a kill may hit the next engine, too, while it starts.
    assert before + 3 <= decoder.faults["engine_restarts"] <= before + 5
    same(outcomes, {name: row for name, row in undisturbed.items() if name != poison})


def test_nothing_is_left_behind(decoder, undisturbed):
    left = [process for name in ("ray::", "VLLM::") for process in processes(name)]
    assert left
    decoder.close()
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive
