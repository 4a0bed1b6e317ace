"""The fleet without Ray: engines are plain objects, and the time is a clock that jumps from answer to answer."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, NodeDiedError, OutOfMemoryError, RayTaskError

from agd_vllm.attribution.batch_bounds import BatchBounds
from agd_vllm.attribution.pool import WorkerLost
from agd_vllm.attribution.worker import WorkerInfo
from agd_vllm.faults import FaultLog, last_line
from agd_vllm.pipeline import actors, placement
from agd_vllm.pipeline import fleet as subject
from agd_vllm.pipeline import source as source_module
from agd_vllm.pipeline.deaths import MAX_DEATHS_AT_FIRST, MAX_POISON_IN_A_ROW, MAX_RESTARTS_IN_A_ROW
from agd_vllm.pipeline.decoder import Decoder
from agd_vllm.pipeline.fleet import ROWS_AHEAD, Fleet
from agd_vllm.pipeline.replica import EngineLost, Progress, ReplicaInfo
from agd_vllm.pipeline.source import Source
from agd_vllm.pipeline.suspects import POISON_DEATHS, Suspects
from agd_vllm.pipeline.teams import Shares
from agd_vllm.records import DecodedRow, InputRow, PreparedRow, Roi, RowError, RowRefused

NEVER = math.inf


class Ref:
    def __init__(self, due, answer):
        self.due, self.answer, self.value = due, answer, None

    def happen(self):
        try:
            self.value = self.answer()
        except Exception as error:
            self.value = error


class World:
    """In the places of `ray` and of `time`. What is called happens when the clock passes it, waited for or not."""

    def __init__(self):
        self.now, self.pending = 0.0, []
        self.interrupt_waits = False
        self.replicas, self.killed, self.told = [], [], []
        # How an engine behaves; tests put their own in place.
        self.start_s = lambda index, launch: 1.0
        self.collect_s = lambda replica: 0.3
        self.trouble = lambda replica: None
        self.ends_at_once = 4
        self.cancel_s = 0.1
        self.stop_s = 1.0
        self.sessions = 4

    def monotonic(self):
        return self.now

    def pass_until(self, time):
        while self.pending and min(ref.due for ref in self.pending) <= time:
            ref = min(self.pending, key=lambda ref: ref.due)
            self.pending.remove(ref)
            self.now = max(self.now, ref.due)
            ref.happen()
        self.now = max(self.now, time)

    def call(self, seconds, answer):
        self.pending.append(Ref(self.now + seconds, answer))
        return self.pending[-1]

    def wait(self, refs, num_returns=1, timeout=None):
        if self.interrupt_waits:
            raise KeyboardInterrupt
        assert refs and timeout is not None, "a wait without an end"
        due = sorted(ref.due for ref in refs)[num_returns - 1]
        self.pass_until(min(due, self.now + timeout))
        ready = [ref for ref in refs if ref not in self.pending][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, refs, timeout=NEVER):
        every = refs if isinstance(refs, list) else [refs]
        due = max(ref.due for ref in every)
        assert min(due, timeout) < NEVER, "a wait without an end"
        self.pass_until(min(due, self.now + timeout))
        values = []
        for ref in every:
            if ref in self.pending:
                raise GetTimeoutError("late")
            if isinstance(ref.value, Exception):
                raise ref.value
            values.append(ref.value)
        return values if isinstance(refs, list) else values[0]

    def kill(self, replica):
        self.killed.append(replica)

    def make(self, index):
        self.replicas.append(FakeReplica(self, index, len(self.replicas)))
        return self.replicas[-1]


class Method:
    def __init__(self, remote):
        self.remote = remote


class FakeReplica:
    """As Replica, seen through Ray: `ends_at_once` rows have ended whenever it is asked."""

    def __init__(self, world, index, launch):
        self.world, self.index, self.launch, self.made_at = world, index, launch, world.now
        self.rows, self.batches, self.together = [], [], []
        for name in ("start", "attach", "serve", "submit", "collect", "cancel", "stop"):
            setattr(self, name, Method(getattr(self, f"_{name}")))

    def _do(self, seconds, answer):
        def unless_dead():
            if self in self.world.killed:
                raise ActorDiedError()
            return answer()

        return self.world.call(seconds, unless_dead)

    def _start(self):
        return self._do(self.world.start_s(self.index, self.launch), self._loaded)

    def _loaded(self):
        error = self.world.trouble(self)
        if error is not None:
            raise error
        return ReplicaInfo(1024, self.world.sessions, 0.0)

    def _attach(self, *_scoring):
        self.world.told.append(("attach", self))

    def _serve(self):
        return self._do(0.1, lambda: self.world.told.append(("serve", self)))

    def _submit(self, rows, batch):
        self.batches.append([row.id for row in rows])
        self.rows += rows
        self.together.append({row.id for row in self.rows})

    def _collect(self, wait_s):
        return self._do(self.world.collect_s(self), self._ended)

    def _ended(self):
        error = self.world.trouble(self)
        if error is not None:
            raise error
        ended, self.rows = self.rows[: self.world.ends_at_once], self.rows[self.world.ends_at_once :]
        rows = [DecodedRow(row.id, "", [1], row.prompt_token_ids, (), "length", []) for row in ended]
        return rows, Progress(len(self.rows), 0.0, [], [])

    def _cancel(self, batch):
        self.world.told.append(("cancel", self))
        return self._do(self.world.cancel_s, lambda: self.rows.clear())

    def _stop(self):
        self.world.told.append(("stop", self))
        return self._do(self.world.stop_s, lambda: None)


@pytest.fixture
def world(monkeypatch):
    world = World()
    for module in (subject, actors):
        monkeypatch.setattr(module, "ray", world)
    monkeypatch.setattr(subject, "time", world)
    monkeypatch.setattr(source_module, "time", world)
    return world


class FakePreparer:
    def prepare(self, row):
        if row.id.startswith("refused"):
            raise RowRefused("refused", "no")
        return PreparedRow(row.id, [len(row.prompt)], Roi(), 4)


def rows(count, name="r", prompt="x"):
    return [InputRow(id=f"{name}{index}", prompt=prompt) for index in range(count)]


def source(items):
    return Source(items, FakePreparer())


def fleet_of(world, engines):
    fleet = Fleet(world.make, lambda index, replica: replica.attach.remote(), engines, FaultLog())
    fleet.start()
    return fleet


def run(fleet, items):
    """What came of each row: "ok" or an error's type."""
    outcomes = [outcome for outcome in fleet.decode(source(items)) if outcome is not None]
    assert len({outcome.id for outcome in outcomes}) == len(outcomes), "a row came out twice"
    return {outcome.id: outcome.type if isinstance(outcome, RowError) else "ok" for outcome in outcomes}


def restarts(fleet):
    return fleet._faults.counts["engine_restarts"]


def dies_with(*ids):
    """Engines die whenever one of these rows is in flight."""
    return lambda replica: EngineLost("dead") if any(row.id in ids for row in replica.rows) else None


def once(error, engine=0):
    """The first engine launched dies once it has rows."""
    return lambda replica: error if replica.launch == engine and replica.rows else None


def remote(error):
    """An error of an actor's method, as Ray hands it over."""
    return RayTaskError("collect", "traceback", error, "ray::Replica", 1, "127.0.0.1").as_instanceof_cause()


def test_every_row_comes_out_once(world):
    items = [*rows(50), InputRow(id="refused", prompt="x"), RowError({}, 9, "bad", "json", "no"), *rows(50, "s")]
    outcomes = run(fleet_of(world, 3), items)
    assert outcomes.pop("refused") == "refused"
    assert outcomes.pop("bad") == "json"
    assert outcomes == dict.fromkeys([row.id for row in rows(50) + rows(50, "s")], "ok")


# Deaths


@pytest.mark.parametrize(
    "error",
    [ActorDiedError(), OutOfMemoryError("memory"), NodeDiedError("node"), EngineLost("dead"), remote(EngineLost("d"))],
    ids=lambda error: type(error).__name__,
)
def test_an_engine_that_died_is_replaced(world, error):
    world.trouble = once(error)
    fleet = fleet_of(world, 1)
    assert set(run(fleet, rows(6)).values()) == {"ok"}
    assert restarts(fleet) == 1
    assert world.killed == world.replicas[:1]


def test_an_error_of_our_own_ends_the_run(world):
    world.trouble = once(remote(KeyError("ours")))
    with pytest.raises(KeyError):
        run(fleet_of(world, 1), rows(6))


def test_lost_attribution_ends_the_run(world):
    world.trouble = once(remote(WorkerLost("a worker failed")))
    with pytest.raises(RuntimeError, match="what was decoded is kept"):
        run(fleet_of(world, 1), rows(6))


def test_an_engine_that_always_fails_to_start_ends_the_run(world):
    fleet = fleet_of(world, 1)
    run(fleet, rows(1))
    world.trouble = lambda replica: EngineLost("dead") if replica.rows or replica.launch > 0 else None
    with pytest.raises(RuntimeError, match=f"died {MAX_RESTARTS_IN_A_ROW + 1} times in a row.*: dead"):
        run(fleet, rows(6))


def test_a_run_that_ended_so_does_not_count_for_the_next(world):
    world.trouble = lambda replica: EngineLost("dead") if replica.rows or replica.launch > 0 else None
    fleet = fleet_of(world, 1)
    with pytest.raises(RuntimeError):
        run(fleet, rows(6))
    last = len(world.replicas)
    world.trouble = lambda replica: EngineLost("dead") if replica.launch < last else None
    assert set(run(fleet, rows(6)).values()) == {"ok"}


def test_an_engine_that_dies_in_every_row_ends_the_run_and_no_row_is_to_blame(world):
    fleet = fleet_of(world, 1)
    run(fleet, rows(1))
    world.trouble = lambda replica: EngineLost("dead") if replica.rows else None
    told = []
    with pytest.raises(RuntimeError, match=f"died in each of {MAX_POISON_IN_A_ROW} rows in a row"):
        told += (outcome for outcome in fleet.decode(source(rows(200))) if outcome is not None)
    assert not told


@pytest.mark.parametrize("count", [3, 12, 200])
def test_engines_that_die_before_any_row_was_decoded_end_the_run_soon(world, count):
    world.trouble = lambda replica: EngineLost("vLLM's own reason") if replica.rows else None
    fleet, told = fleet_of(world, 1), []
    with pytest.raises(RuntimeError, match=f"{MAX_DEATHS_AT_FIRST} engines died before.*: vLLM's own reason; "):
        told += (outcome for outcome in fleet.decode(source(rows(count))) if outcome is not None)
    assert not told
    assert restarts(fleet) == MAX_DEATHS_AT_FIRST


def test_the_only_row_of_a_run_is_to_blame_where_engines_die_in_it(world):
    world.trouble = dies_with("r0")
    assert run(fleet_of(world, 1), rows(1)) == {"r0": "poison"}


def test_two_poison_rows_in_the_first_batch_do_not_end_the_run(world):
    world.trouble = dies_with("r0", "r11")
    outcomes = run(fleet_of(world, 1), rows(12))
    assert {name for name, outcome in outcomes.items() if outcome == "poison"} == {"r0", "r11"}


# Silence


def test_a_slow_caller_does_not_make_an_engine_silent(world):
    # The second engine's answer comes while the caller is busy with the first one's.
    world.collect_s = lambda replica: 0.3 + 0.1 * replica.index
    fleet = fleet_of(world, 2)
    for outcome in fleet.decode(source(rows(40))):
        if outcome is not None:
            world.pass_until(world.now + 2 * subject.SILENCE_S)
    assert not world.killed
    assert restarts(fleet) == 0


def test_a_silent_engine_is_replaced(world):
    world.collect_s = lambda replica: NEVER if replica.launch == 0 else 0.3
    fleet = fleet_of(world, 1)
    begun = world.now
    assert set(run(fleet, rows(6)).values()) == {"ok"}
    assert world.killed == world.replicas[:1]
    assert begun + subject.SILENCE_S <= world.now < begun + subject.SILENCE_S + 20


def test_all_answers_that_are_there_are_collected(world):
    fleet = fleet_of(world, 3)
    between = list(itertools.takewhile(lambda outcome: outcome is None, outcomes := fleet.decode(source(rows(24)))))
    assert between
    together = 1 + len(list(itertools.takewhile(lambda outcome: outcome is not None, outcomes)))
    assert together == 3 * world.ends_at_once


def test_the_caller_has_its_turn_every_second_while_an_engine_loads(world):
    world.trouble = once(EngineLost("dead"))
    world.start_s = lambda index, launch: 1.0 if launch == 0 else 100.0
    turns = []
    for outcome in fleet_of(world, 1).decode(source(rows(6))):
        if outcome is None:
            turns.append(world.now)
    assert max(after - before for before, after in itertools.pairwise(turns)) <= 1.0 + 1e-6


# Start


def test_an_engine_that_never_starts_ends_the_start(world):
    world.start_s = lambda index, launch: NEVER if index == 1 else 1.0
    with pytest.raises(RuntimeError, match=r"^an engine did not start within 1800 s[^\n]*$"):
        fleet_of(world, 2)


def test_an_engine_that_fails_to_start_says_why_in_one_line(world):
    world.trouble = lambda replica: ValueError("a traceback\n\x1b[31mno such model\x1b[0m")
    with pytest.raises(RuntimeError, match=r"^an engine could not start: no such model \(--debug[^\n]*$"):
        fleet_of(world, 1)


def test_engines_go_on_for_another_run_unless_one_is_missing(world):
    fleet, faults = fleet_of(world, 2), FaultLog()
    given = (world.make, lambda *_: None, lambda replica: replica.serve.remote(), faults)
    fleet.serve(*given)
    assert [what for what, _ in world.told] == ["attach", "attach", "serve", "serve"]
    assert set(run(fleet, rows(6)).values()) == {"ok"}
    fleet._engines[1].started = False
    with pytest.raises(RuntimeError, match="an engine is loading"):
        fleet.serve(*given)
    fleet._engines[1].started = True
    world.killed.append(world.replicas[0])
    with pytest.raises(RuntimeError, match="an engine could not start"):
        fleet.serve(*given)


def test_an_engine_that_hangs_while_it_restarts_is_replaced(world):
    world.trouble = once(EngineLost("dead"))
    world.start_s = lambda index, launch: NEVER if launch == 1 else 1.0
    fleet = fleet_of(world, 1)
    assert set(run(fleet, rows(6)).values()) == {"ok"}
    assert restarts(fleet) == 2
    assert world.killed == world.replicas[:2]
    assert actors.START_S <= world.now < actors.START_S + 100


def test_a_run_does_not_wait_for_an_engine_that_it_does_not_need(world):
    world.trouble = once(EngineLost("dead"))
    world.start_s = lambda index, launch: 1.0 if launch < 2 else 1000.0
    fleet = fleet_of(world, 2)
    assert set(run(fleet, rows(12)).values()) == {"ok"}
    assert world.now < 100
    world.pass_until(2000)
    assert set(run(fleet, rows(12, "s")).values()) == {"ok"}
    assert world.replicas[2].batches, "the engine that was late takes rows of the next decode()"


class FakeWorker:
    def __init__(self, world, seconds, info=None):
        self.asked = 0
        self._world, self._seconds, self._info = world, seconds, info
        self.info = Method(self._answer)

    def _answer(self):
        self.asked += 1
        return self._world.call(self._seconds, self._loaded)

    def _loaded(self):
        if isinstance(self._info, Exception):
            raise self._info
        return self._info


def decoder_with(workers):
    decoder = Decoder.__new__(Decoder)
    decoder.options = SimpleNamespace(engines=2)
    decoder._workers, decoder._infos, decoder._asked = workers, None, None
    return decoder


BOUNDS = BatchBounds(requests=96, tokens=96, ahead=96)


class FakeEngineActor:
    def __init__(self, world):
        self.attached = []
        self.attach = Method(lambda workers, *scoring: self.attached.append((world.now, workers, *scoring)))


def test_workers_are_asked_once_and_all_of_them(world):
    workers = [FakeWorker(world, 5.0, WorkerInfo(True, 1000, BOUNDS)), FakeWorker(world, 50.0, WorkerInfo(True, 500))]
    decoder, replica = decoder_with(workers), FakeEngineActor(world)
    decoder._attach(0, replica)
    decoder._attach(1, replica)
    assert replica.attached == [(50.0, workers[:1], True, 1000, BOUNDS), (50.0, workers[1:], True, 500, BOUNDS)]
    assert [worker.asked for worker in workers] == [1, 1]


def test_engines_that_share_a_worker_share_its_cache(world):
    workers = [FakeWorker(world, 5.0, WorkerInfo(True, 1000))]
    decoder, replica = decoder_with(workers), FakeEngineActor(world)
    decoder._attach(1, replica)
    assert replica.attached == [(5.0, workers, True, 500, BatchBounds())]


@pytest.mark.parametrize(
    ("shares", "made_at", "held"),
    [
        (Shares(), [0.0, 0.0], False),
        (Shares(1, 1), [0.0, 0.0], False),
        (Shares(1 / 3, 1 / 3), [0.0, 1.0], True),
    ],
)
def test_who_shares_a_gpu_takes_its_memory_one_after_another(world, smollm2, monkeypatch, shares, made_at, held):
    """vLLM takes all memory that goes while it starts for its own. The first engine imports while the workers load."""
    worker = FakeWorker(world, 50.0, WorkerInfo(True, 1000))
    waited_for = []

    def make_replica(_cluster, index, *others):
        waited_for.append(others[-1])
        return world.make(index)

    monkeypatch.setattr(placement, "make_worker", lambda *_: worker)
    monkeypatch.setattr(placement, "make_replica", make_replica)
    decoder = Decoder(str(smollm2), engines=2)
    decoder._start_actors(SimpleNamespace(shares=shares, started=False))
    assert [replica.made_at for replica in world.replicas] == made_at
    assert [what for what, _ in world.told] == ["attach", "attach"]
    # Each is held until the workers' `info` has answered, which is asked for once.
    assert [len(refs) for refs in waited_for] == [held, held]
    assert all(ref.value == worker._info for refs in waited_for for ref in refs)
    assert worker.asked == 1


def test_a_worker_that_cannot_start_is_named_and_not_the_engine_that_waited_for_it(world, smollm2, monkeypatch):
    worker = FakeWorker(world, 5.0, RuntimeError("out of memory"))
    monkeypatch.setattr(placement, "make_worker", lambda *_: worker)
    monkeypatch.setattr(placement, "make_replica", lambda _cluster, index, *_: world.make(index))
    world.trouble = lambda _replica: RuntimeError("the worker did not come")
    decoder = Decoder(str(smollm2))
    cluster = SimpleNamespace(shares=Shares(1 / 2, 1 / 2), started=False)
    with pytest.raises(RuntimeError, match=r"^an attribution worker could not start: .*out of memory"):
        decoder._start_actors(cluster)


def test_without_workers_an_engine_is_told_so(world):
    replica = FakeEngineActor(world)
    decoder_with([])._attach(0, replica)
    assert replica.attached == [(0.0, [], False, None, BatchBounds())]


def test_a_worker_that_never_starts_ends_the_start(world):
    workers = [FakeWorker(world, 5.0, WorkerInfo(False, None)), FakeWorker(world, NEVER)]
    with pytest.raises(RuntimeError, match=r"^an attribution worker did not start within 1800 s[^\n]*$"):
        decoder_with(workers)._attach(0, SimpleNamespace())


# Leaving a decode()


def leave_after_the_first_row(fleet, items):
    outcomes = fleet.decode(source(items))
    first = next(outcome for outcome in outcomes if outcome is not None)
    outcomes.close()
    return first.id


@pytest.mark.parametrize("cancel_s", [0.1, 3.0], ids=["cancel ends first", "collect ends first"])
def test_a_decode_that_was_left_leaves_nothing_behind(world, cancel_s):
    """An answer that was due when it was left must not take rows of the next one, whose ids may be the same."""
    world.cancel_s, world.ends_at_once = cancel_s, 1
    world.collect_s = lambda replica: 0.3 + replica.index
    fleet = fleet_of(world, 2)
    assert leave_after_the_first_row(fleet, rows(20)) == "r0"
    assert [what for what, _ in world.told] == ["attach", "attach", "cancel", "cancel"]
    assert fleet.waiting_for_attribution == 0
    prompts = [outcome.prompt_token_ids for outcome in fleet.decode(source(rows(20, prompt="longer"))) if outcome]
    assert prompts == [[len("longer")]] * 20
    assert restarts(fleet) == 0


def test_an_engine_that_cannot_cancel_in_time_is_replaced(world):
    world.cancel_s = NEVER
    fleet = fleet_of(world, 1)
    leave_after_the_first_row(fleet, rows(20))
    assert run(fleet, rows(5)) == dict.fromkeys([row.id for row in rows(5)], "ok")
    assert world.killed == world.replicas[:1]


def test_suspects_of_a_decode_that_was_left_are_forgotten(world):
    world.trouble = once(EngineLost("dead"))
    world.start_s = lambda index, launch: 5.0
    fleet = fleet_of(world, 1)
    outcomes = fleet.decode(source(rows(8)))
    while not fleet._suspects:
        assert next(outcomes) is None
    outcomes.close()
    assert run(fleet, rows(3, "s")) == dict.fromkeys([row.id for row in rows(3, "s")], "ok")


def test_nothing_is_cancelled_after_a_whole_decode(world):
    fleet = fleet_of(world, 1)
    run(fleet, rows(10))
    assert [what for what, _ in world.told] == ["attach"]


def test_two_decodes_at_a_time_are_refused(world):
    fleet = fleet_of(world, 1)
    outcomes = fleet.decode(source(rows(8)))
    next(outcomes)
    with pytest.raises(RuntimeError, match="another decode\\(\\) has not ended"):
        next(fleet.decode(source(rows(8))))
    assert len([outcome for outcome in outcomes if outcome is not None]) == 8


def test_a_decode_ends_where_the_fleet_is_closed(world):
    fleet = fleet_of(world, 1)
    outcomes = fleet.decode(source(rows(8)))
    next(outcomes)
    fleet.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(outcomes)


# Poison


def test_suspects_are_halved_until_the_poison_row_is_found():
    suspects = Suspects()
    prepared = [PreparedRow(str(index), [1], Roi(), 4) for index in range(8)]
    poison, deaths, groups, found = prepared[5], 1, [], suspects.add(prepared)
    while suspects:
        group = suspects.take()
        groups.append([row.id for row in group])
        if poison in group:
            deaths += 1
            found = suspects.add(group)
    assert found is poison
    assert deaths == 3 + POISON_DEATHS
    assert groups == [list("0123"), list("4567"), list("45"), list("67"), ["4"], ["5"], ["5"]]


@pytest.mark.parametrize("engines", [1, 2])
def test_three_poison_rows_side_by_side_do_not_end_the_run(world, engines):
    world.trouble = dies_with("p0", "p1", "p2")
    outcomes = run(fleet_of(world, engines), [*rows(3, "p"), *rows(20)])
    assert outcomes == dict.fromkeys(["p0", "p1", "p2"], "poison") | {row.id: "ok" for row in rows(20)}


def test_a_poison_row_among_many_is_found_in_few_deaths(world):
    world.sessions, world.ends_at_once = 256, 1
    world.trouble = dies_with("r0")
    # An engine answers once it is full.
    world.collect_s = lambda replica: 0.3 if replica.launch else 1.0
    fleet = fleet_of(world, 1)
    outcomes = run(fleet, rows(400))
    assert outcomes.pop("r0") == "poison"
    assert set(outcomes.values()) == {"ok"}
    assert max(map(len, world.replicas[0].together)) == 256 + ROWS_AHEAD
    assert restarts(fleet) == 1 + math.ceil(math.log2(256 + ROWS_AHEAD)) - 1 + POISON_DEATHS


def test_a_death_by_chance_costs_two_groups(world):
    world.trouble = once(EngineLost("dead"))
    fleet = fleet_of(world, 1)
    assert set(run(fleet, rows(8)).values()) == {"ok"}
    assert world.replicas[1].batches == [["r0", "r1", "r2", "r3"], ["r4", "r5", "r6", "r7"]]


def test_suspects_have_their_engine_alone(world):
    world.trouble = once(EngineLost("dead"))
    world.ends_at_once = 1
    fleet = fleet_of(world, 1)
    assert set(run(fleet, rows(40)).values()) == {"ok"}
    first, second, *rest = world.replicas[1].together
    suspects = {row for batch in world.replicas[0].batches for row in batch}
    assert first | second == suspects
    assert not first & second
    assert not suspects & set.union(*rest)


def test_suspects_are_not_stuck_on_an_engine_that_cannot_start(world):
    """The other engine takes them when it has nothing else; it goes on decoding until then."""
    world.trouble = lambda replica: (
        EngineLost("dead") if replica.index == 0 and (replica.rows or replica.launch > 1) else None
    )
    fleet = fleet_of(world, 2)
    assert run(fleet, rows(40)) == dict.fromkeys([row.id for row in rows(40)], "ok")
    assert restarts(fleet) >= 1


# The way in


def test_rows_are_read_a_few_at_a_time(world):
    """An engine has its first rows before the next are read, and is full before the driver waits."""
    world.sessions = 64
    fleet = fleet_of(world, 2)
    read_before_submit, seen = [], 0

    def items():
        nonlocal seen
        for row in rows(200):
            seen += 1
            yield row

    for replica in world.replicas:
        submit = replica.submit.remote
        replica.submit = Method(
            lambda rows, batch, submit=submit: (read_before_submit.append(seen), submit(rows, batch))
        )
    begun, outcomes = world.now, fleet.decode(source(items()))
    assert next(outcomes) is None
    assert read_before_submit == [8, 16]
    turns = (64 + ROWS_AHEAD) // 8
    assert [next(outcomes) for _ in range(turns - 2)] == [None] * (turns - 2)
    assert world.now == begun
    next(outcomes)
    assert [len(set().union(*replica.together)) for replica in world.replicas] == [64 + ROWS_AHEAD] * 2


def test_a_slow_input_delays_no_answer(world):
    fleet = fleet_of(world, 1)

    def slow():
        for row in rows(20):
            world.pass_until(world.now + 5.0)
            yield row

    begun = world.now
    came = [world.now - begun for outcome in fleet.decode(source(slow())) if outcome is not None]
    assert len(came) == 20
    assert came[0] <= 10.0
    assert came[9] <= 60.0


# Closing


def test_engines_stop_together_under_one_deadline(world):
    world.stop_s = NEVER
    fleet = fleet_of(world, 3)
    begun = world.now
    fleet.close()
    assert world.told[-3:] == [("stop", replica) for replica in world.replicas]
    assert world.now == begun + subject.STOP_S
    assert world.killed == world.replicas


def test_engines_that_stop_are_not_waited_for_longer(world):
    fleet = fleet_of(world, 3)
    begun = world.now
    fleet.close()
    assert world.now == begun + world.stop_s
    assert world.killed == world.replicas


def test_an_engine_that_is_loading_is_killed_directly(world):
    world.start_s = lambda index, launch: NEVER
    fleet = Fleet(world.make, lambda replica: None, 2, FaultLog())
    fleet.close()
    assert world.now == 0
    assert world.killed == world.replicas
    assert not world.told


def test_an_interrupt_while_engines_stop_kills_them_all(world):
    fleet = fleet_of(world, 3)
    world.interrupt_waits = True
    with pytest.raises(KeyboardInterrupt):
        fleet.close()
    assert world.killed == world.replicas


def test_an_interrupt_while_engines_stop_closes_the_rest(world, monkeypatch):
    world.interrupt_waits = True
    worker = FakeWorker(world, 1.0)
    decoder = decoder_with([worker])
    decoder._fleet, decoder._cluster, decoder._trace = fleet_of(world, 1), object(), None
    disconnected = []
    monkeypatch.setattr("agd_vllm.pipeline.placement.disconnect", disconnected.append)
    with pytest.raises(KeyboardInterrupt):
        decoder.close()
    assert world.killed == [*world.replicas, worker]
    assert len(disconnected) == 1


def test_the_last_line_of_an_error_is_plain_text():
    error = ValueError("traceback\n  File x\n\x1b[1;31mValueError\x1b[0m: no \x1b[36mmodel\x1b[39m\n\x1b[0m\n")
    assert last_line(error) == "ValueError: no model"
    assert last_line(ValueError("\x1b[0m\n")) == "ValueError"
    lost = RuntimeError("trace\nagd_vllm.pipeline.replica.EngineLost: vLLM's engine died: ValueError: a.b")
    assert last_line(lost) == "vLLM's engine died: ValueError: a.b"
    lost = RuntimeError("trace\nvllm.v1.engine.exceptions.EngineDeadError: it died")
    assert last_line(lost) == "EngineDeadError: it died"


def test_metadata_of_the_row_comes_out(world):
    row = dataclasses.replace(rows(1)[0], metadata='{"a": 1}')
    outcomes = [outcome for outcome in fleet_of(world, 1).decode(source([row])) if outcome is not None]
    assert [outcome.metadata for outcome in outcomes] == ['{"a": 1}']
