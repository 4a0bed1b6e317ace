"""Parts that die while a run goes on: the output stays that of an undisturbed run, in float32."""

import dataclasses
import json
import signal
import threading
import time

import psutil
import pytest
from conftest import DEMO_ROWS, ENGINE_ARGS

from agd_vllm import Decoder
from agd_vllm.reader import read_rows
from agd_vllm.records import DecodedRow, RowError

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def rows():
    """Short rows that end one after another, so that others are in flight when the first has come out."""
    rows = list(read_rows([str(DEMO_ROWS)]))[:8]
    return [dataclasses.replace(row, max_tokens=12 + 4 * index) for index, row in enumerate(rows)]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("faults") / "faults.jsonl"


@pytest.fixture(scope="module")
def decoder(smollm2, log):
    engine_args = {key: value for key, value in ENGINE_ARGS.items() if key != "max_model_len"}
    with Decoder(
        str(smollm2), dtype="float32", max_model_len=1024, engine_args=engine_args, log_json=str(log)
    ) as decoder:
        yield decoder


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


def killing(name: str, outcomes):
    """Passes the outcomes on; kills the processes of that name once the first row has come out."""
    pending = True
    for outcome in outcomes:
        yield outcome
        if pending and outcome is not None:
            pending = False
            assert kill(name), f"no process {name}"


def same(ours: dict[str, DecodedRow], theirs: dict[str, DecodedRow]) -> None:
    assert ours.keys() == theirs.keys()
    for name, row in ours.items():
        assert row.token_ids == theirs[name].token_ids, name
        assert [step.step for step in row.steps] == [step.step for step in theirs[name].steps]


@pytest.mark.parametrize(
    ("name", "fault"), [("ray::AttributionWorker", "worker_restarts"), ("ray::Replica", "engine_restarts")]
)
def test_a_dead_part_is_replaced_and_the_output_is_the_same(decoder, rows, undisturbed, log, name, fault):
    before = decoder.faults.get(fault, 0)
    same(decoded(killing(name, decoder.outcomes(rows))), undisturbed)
    assert decoder.faults[fault] > before
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(event["kind"] == fault for event in events) == decoder.faults[fault]


def test_a_row_that_kills_its_engine_is_an_error_and_the_rest_is_decoded(decoder, rows, undisturbed):
    """vLLM's process is killed whenever the row is in flight, as a row would do it that crashes vLLM."""
    poison = rows[-1].id
    done = threading.Event()

    def assassin():
        while not done.is_set():
            if any(poison in engine.rows and engine.started for engine in decoder._fleet._engines):
                kill("VLLM::EngineCore")
            time.sleep(0.05)

    before = decoder.faults["engine_restarts"]
    thread = threading.Thread(target=assassin)
    thread.start()
    try:
        outcomes = decoded(decoder.outcomes(rows))
    finally:
        done.set()
        thread.join()
    error = outcomes.pop(poison)
    assert isinstance(error, RowError)
    assert error.type == "poison"
    assert decoder.faults["engine_restarts"] == before + 3  # with all rows in flight, then twice alone
    same(outcomes, {name: row for name, row in undisturbed.items() if name != poison})


def test_nothing_is_left_behind(decoder, undisturbed):
    left = [process for name in ("ray::", "VLLM::") for process in processes(name)]
    assert left
    decoder.close()
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive
