"""What is said of a process that Ray's memory monitor killed."""

import pytest
from ray.exceptions import OutOfMemoryError

from agd_vllm.faults import last_line
from agd_vllm.low_memory import killed_for_memory
from agd_vllm.pipeline import actors

# Of Ray 2.60.0, whose monitor killed an actor; only ids, addresses and what others used are made up.
KILLED = """\
1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: a0b1d92f) was \
22.36GB used / 23.54GB limit (0.949872)
OOM kill reason: Memory usage 24012677120B exceeded threshold of 23999999999B (95.0% of 25276502016B limit)
Object store memory usage: [- objects spillable: 0
- bytes spillable: 0
- objects unsealed: 0

Eviction Stats:
(global lru) capacity: 5663089459
(global lru) used: 0%
(global lru) bytes evicted: 0]
Ray killed 1 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Actor(dd7b8e6c154dccfdc536443c01000000): job ID=01000000, lease ID=00000000f859ba47, \
task name=Replica.__init__, required resources={CPU: 1}, pid=11805, actual memory used=3.14GB, worker ID=f67f97fe)
]
Total non-selected idle workers: 0
Total non-selected idle workers USS bytes: 0.00GB
To see more information about memory usage on this node, use `ray logs raylet.out -ip 192.0.2.2`
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
7584\t6.46\tVLLM::Worker
11805\t3.14\tray::Replica.start
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/latest/ray-observability/\
user-guides/debug-apps/debug-memory.html. Consider provisioning more memory on this node or reducing task parallelism \
by requesting more CPUs per task. To adjust the kill threshold, set the environment variable \
`RAY_memory_usage_threshold` when starting Ray. To disable worker killing, set the environment variable \
`RAY_memory_monitor_refresh_ms` to zero."""
SAID = (
    "Ray killed the process because memory ran low (its machine had 22.36 of 23.54 GiB in use, the process itself "
    "3.14 GiB); start fewer engines or attribution workers, take a smaller KV cache (on a CPU --engine-arg "
    "kv_cache_memory_bytes=...), or use a machine with more memory"
)


def test_the_line_says_what_happened_how_much_was_used_and_what_to_do():
    assert last_line(OutOfMemoryError(KILLED)) == SAID


def test_of_several_killed_at_once_none_is_named():
    chosen = next(line for line in KILLED.splitlines() if line.startswith("Selected"))
    line = killed_for_memory(KILLED.replace(chosen, f"{chosen}\n{chosen.replace('3.14', '1.00')}"))
    assert "22.36 of 23.54 GiB in use)" in line and "itself" not in line


def test_without_the_numbers_the_rest_is_said():
    line = killed_for_memory("2 worker(s) were killed due to the node running low on memory. In other words")
    assert line.startswith("Ray killed the process because memory ran low; start fewer engines")


def test_other_errors_are_left_alone():
    assert killed_for_memory("torch.OutOfMemoryError: CUDA out of memory") is None


def test_an_engine_that_is_killed_while_it_starts_says_so(monkeypatch):
    def killed(*_, **__):
        raise OutOfMemoryError(KILLED)

    monkeypatch.setattr(actors.ray, "get", killed)
    with pytest.raises(RuntimeError) as raised:
        actors.loaded([], "an engine")
    assert str(raised.value) == f"an engine could not start: {SAID} (--debug shows its log)"
