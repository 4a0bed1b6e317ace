"""The lease by itself: who gets it, who keeps it, and what is left of it, on a real S3 server."""

import json
import re
import threading
import time
from datetime import timedelta

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from agd_vllm.output import lease
from agd_vllm.output.lease import Lease
from agd_vllm.output.storage import OutputDirectory, OutputFailed

TAKERS = 6


@pytest.fixture(autouse=True)
def no_thread(monkeypatch):
    """However slow the machine is: no lease is renewed on its own."""
    monkeypatch.setattr(lease, "RENEWED_EVERY", 3600.0)


def held(store):
    """The leases that are there."""
    return [name for name in store.names() if name.startswith(".")]


def expire(store):
    """As if the lease's time were over: it states itself for how long it is one."""
    (name,) = held(store)
    store.write(name, json.dumps(json.loads(store.read(name)) | {"expires_after": 0}).encode())


def directory(store):
    return OutputDirectory(store.url)


def refused(store):
    with pytest.raises(OutputFailed, match="another run is writing there") as failed:
        Lease(directory(store))
    return str(failed.value)


@pytest.mark.parametrize("s3", ["", "names no condition"], indirect=True)
def test_a_second_lease_is_refused_until_the_first_is_released(s3):
    first = Lease(directory(s3))
    line = refused(s3)
    assert "\n" not in line and re.search(r"its lease expires in \d+ s, at .* UTC$", line)
    first.renew()
    refused(s3)
    assert held(s3) == [".lease-0000000001"]
    first.release()
    assert held(s3) == []
    Lease(directory(s3)).release()
    assert held(s3) == []


def test_an_expired_lease_is_taken_and_its_holder_knows(s3):
    dead = Lease(directory(s3))
    expire(s3)
    taker = Lease(directory(s3))
    assert held(s3) == [".lease-0000000001"]
    dead.check()
    with pytest.raises(OutputFailed, match="another run has taken it over"):
        dead.renew()
    with pytest.raises(OutputFailed, match="another run has taken it over"):
        dead.check()
    dead.release()
    taker.renew()
    assert held(s3) == [".lease-0000000002"], "a holder that lost its lease has removed the other one's"
    taker.release()


def test_a_holder_knows_too_where_the_run_that_took_its_lease_has_ended(s3):
    dead = Lease(directory(s3))
    expire(s3)
    Lease(directory(s3)).release()
    dead.release()
    third = Lease(directory(s3))
    dead.release()
    assert held(s3) == [".lease-0000000000"], "a third run's"
    with pytest.raises(OutputFailed, match="another run has taken it over"):
        dead.renew()
    assert held(s3) == [".lease-0000000000"]
    third.release()


def test_a_holder_may_renew_a_lease_that_has_expired_and_nobody_took(s3):
    late = Lease(directory(s3))
    expire(s3)
    late.renew()
    refused(s3)
    late.release()


def test_of_many_that_take_an_expired_lease_at_once_one_gets_it(s3):
    for _ in range(4):
        dead = Lease(directory(s3))
        expire(s3)
        begin, leases, failures = threading.Barrier(TAKERS), [], []

        def take(begin=begin, leases=leases, failures=failures):
            output = directory(s3)
            begin.wait()
            try:
                leases.append(Lease(output))
            except OutputFailed as failed:
                failures.append(failed)

        takers = [threading.Thread(target=take) for _ in range(TAKERS)]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join()
        assert len(leases) == 1 and len(failures) == TAKERS - 1
        assert len(held(s3)) == 1
        leases[0].renew()
        leases[0].release()
        dead.release()


@pytest.fixture
def before_creating(monkeypatch):
    """Has something happen while a process that has looked has not yet created its lease."""
    create = OutputDirectory.create_new

    def arrange(happening):
        def late(self, name, data):
            if "lease" in name:
                monkeypatch.setattr(OutputDirectory, "create_new", create)
                happening()
            create(self, name, data)

        monkeypatch.setattr(OutputDirectory, "create_new", late)

    return arrange


def test_one_who_looked_before_the_holder_renewed_is_refused(s3, before_creating):
    holder = Lease(directory(s3))
    expire(s3)
    before_creating(holder.renew)
    refused(s3)
    holder.renew()
    holder.release()


def test_one_who_looked_before_another_took_the_lease_and_renewed_it_is_refused(s3, before_creating):
    """The number that it wants is free again by then."""
    dead = Lease(directory(s3))
    expire(s3)
    faster = []

    def take_and_renew():
        faster.append(Lease(directory(s3)))
        faster[0].renew()
        faster[0].renew()

    before_creating(take_and_renew)
    refused(s3)
    assert held(s3) == [".lease-0000000003"]
    faster[0].renew()
    faster[0].release()
    dead.release()


def test_a_lease_that_is_taken_and_released_while_its_holder_renews_is_lost(s3, before_creating):
    holder = Lease(directory(s3))
    expire(s3)
    before_creating(lambda: Lease(directory(s3)).release())
    with pytest.raises(OutputFailed, match="another run has taken it over"):
        holder.renew()
    assert held(s3) == []


class _ADayBehind(MemoryFileSystem):
    """A store whose clock is not this machine's."""

    protocol = "a-day-behind"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("a-day-behind://"))

    def modified(self, path):
        return super().modified(path) - timedelta(days=1)


def test_a_lease_expires_by_the_clock_of_the_store():
    fsspec.register_implementation("a-day-behind", _ADayBehind, clobber=True)
    output = OutputDirectory("a-day-behind://run")
    first = Lease(output)
    with pytest.raises(OutputFailed, match=r"its lease expires in 1\d\d s"):
        Lease(output)
    assert output.names() == [".lease-0000000000"], "what asks for the time is gone"
    first.release()


def test_a_thread_renews_the_lease_and_finds_it_taken(s3, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.05)
    holder = Lease(directory(s3))
    deadline = time.monotonic() + 30
    while max(held(s3), default="") < ".lease-0000000002":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    number = int(max(held(s3)).removeprefix(".lease-"))
    for ahead in range(1, 30):  # whichever it wants next
        s3.write(f".lease-{number + ahead:010d}", b"{}")
    with pytest.raises(OutputFailed, match="another run has taken it over"):
        while time.monotonic() < deadline:
            holder.check()
            time.sleep(0.05)
    holder.release()


def test_a_lease_whose_thread_was_late_is_renewed_before_anything_is_written(s3, monkeypatch):
    holder = Lease(directory(s3))
    holder.confirm()
    assert held(s3) == [".lease-0000000000"]
    monkeypatch.setattr(lease, "EXPIRES_AFTER", 0.0)
    holder.confirm()
    assert held(s3) == [".lease-0000000001"]
    holder.release()


def test_a_request_that_a_client_repeats_is_no_other_run(s3, monkeypatch):
    """The first was carried out, and its answer lost on the way: the second finds the lease there."""
    create = OutputDirectory.create_new

    def twice(self, name, data):
        create(self, name, data)
        create(self, name, data)

    holder = Lease(directory(s3))
    with monkeypatch.context() as patch:
        patch.setattr(OutputDirectory, "create_new", twice)
        holder.renew()
    holder.renew()
    assert held(s3) == [".lease-0000000002"]
    holder.release()
