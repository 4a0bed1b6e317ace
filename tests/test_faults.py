"""Parts that die while a run goes on: the output stays that of an undisturbed run, in float32."""

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

pytestmark = pytest.mark.timeout(900)

ROWS = 16


@pytest.fixture(scope="module")
def rows():
    return list(read_rows([str(DEMO_ROWS)]))[:ROWS]


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
    return [process for process in psutil.process_iter(["cmdline"]) if name in " ".join(process.info["cmdline"] or ())]


def killing(name: str, outcomes, after: int):
    """Passes the outcomes on; kills the processes of that name (kill -9) once `after` rows have come out."""
    count = 0
    for outcome in outcomes:
        yield outcome
        count += outcome is not None
        if count == after:
            victims = processes(name)
            assert victims, f"no process {name}"
            for victim in victims:
                victim.send_signal(signal.SIGKILL)
            count += 1000


def same(ours: dict[str, DecodedRow], theirs: dict[str, DecodedRow]) -> None:
    assert ours.keys() == theirs.keys()
    for name, row in ours.items():
        assert row.token_ids == theirs[name].token_ids, name
        assert [step.step for step in row.steps] == [step.step for step in theirs[name].steps]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("ray::AttributionWorker", "worker_restarts"),
        ("VLLM::EngineCore", "engine_restarts"),
        ("ray::Replica", "engine_restarts"),
    ],
)
def test_a_dead_part_is_replaced_and_the_output_is_the_same(decoder, rows, undisturbed, log, name, fault):
    before = decoder.faults.get(fault, 0)
    same(decoded(killing(name, decoder.outcomes(rows), after=3)), undisturbed)
    assert decoder.faults[fault] > before
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(event["kind"] == fault for event in events) == decoder.faults[fault]


def test_a_row_that_kills_its_engine_is_an_error_and_the_rest_is_decoded(decoder, rows, undisturbed):
    """The engine is killed whenever the row is in flight, as a row would do it that crashes vLLM."""
    poison = rows[5].id
    done = threading.Event()

    def assassin():
        while not done.is_set():
            if any(poison in engine.rows and engine.started for engine in decoder._fleet._engines):
                for victim in processes("VLLM::EngineCore"):
                    victim.send_signal(signal.SIGKILL)
            time.sleep(0.05)

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
    same(outcomes, {name: row for name, row in undisturbed.items() if name != poison})


def test_nothing_is_left_behind(decoder, undisturbed):
    names = ("ray::Replica", "ray::AttributionWorker", "VLLM::")
    assert any(processes(name) for name in names)
    decoder.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(processes(name) for name in names):
        time.sleep(0.5)
    assert not any(processes(name) for name in names)
