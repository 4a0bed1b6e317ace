"""`python -m benchmarks.inline` without engines; with them, in test_on_gpu_benchmark.py."""

import json

import pytest
import torch
from click.testing import CliRunner
from conftest import DEMO_ROWS

from benchmarks import inline, machine, plain, random_model

POINTS = ["--rows", "3", "--new", "8", "--prompt", "0", "--rows", "2", "--new", "4", "--prompt", "30"]


class Engine:
    """In plain vLLM's place: dies at one of its turns."""

    jobs: list
    dies_at = None

    def __init__(self, model, **engine_args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def generate(self, job, side_by_side=None):
        self.jobs.append((job, side_by_side))
        if len(self.jobs) == self.dies_at:
            raise RuntimeError("the engine died")
        return sum(given["max_tokens"] for _, given in job), 0.5, 1


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.setattr(inline, "PlainVLLM", Engine)
    monkeypatch.setattr(Engine, "jobs", [], raising=False)
    return Engine


def run(model, output, *arguments):
    common = ["--model", str(model), "--input", str(DEMO_ROWS), "--runs", "1", "--json", str(output)]
    return CliRunner().invoke(inline.main, [*common, *arguments])


def test_points_are_in_the_file_though_a_later_one_fails(engines, smollm2, tmp_path, monkeypatch):
    # A point takes three turns a side to warm up, and two to be measured.
    monkeypatch.setattr(engines, "dies_at", 15)
    done = run(smollm2, tmp_path / "out.json", *POINTS)
    assert str(done.exception) == "the engine died"
    (point,) = json.loads((tmp_path / "out.json").read_text())["points"]
    assert (point["rows"], point["ratio"], point["pool"]) == (3, 1.0, None)


def test_points_are_in_the_file_though_the_pool_fails(engines, smollm2, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no room")

    monkeypatch.setattr(inline.Decoder, "__enter__", fail)
    done = run(smollm2, tmp_path / "out.json", *POINTS, "--pool")
    assert str(done.exception) == "no room"
    assert [point["rows"] for point in json.loads((tmp_path / "out.json").read_text())["points"]] == [3, 2]


def test_both_sides_get_the_same_rows_of_drawn_lengths(engines, smollm2, tmp_path):
    done = run(smollm2, tmp_path / "out.json", "--continuous", "20,4")
    assert done.exit_code == 0, done.output
    *_, (greedy, first), (ours, second) = engines.jobs
    assert first == second == 4
    assert [ids for ids, _ in greedy] == [ids for ids, _ in ours]
    lengths = [given["max_tokens"] for _, given in greedy]
    assert lengths == [given["max_tokens"] for _, given in ours]
    assert 8 <= min(lengths) < max(lengths) <= 32 and len(lengths) == 20


@pytest.mark.parametrize("named", ["4,20", "20", "4,4", "a,b"])
def test_continuous_takes_rows_and_fewer_side_by_side(named, tmp_path):
    done = run("nothing", tmp_path / "out.json", "--continuous", named)
    assert done.exit_code == 2 and "fewer of them side by side" in done.output


class SteppedLLM:
    """As much of vLLM's engine as rows side by side need: each ends after as many steps as it has tokens."""

    def __init__(self):
        self.request_counter, self.llm_engine = iter(range(7, 1000)), self
        self.running, self.most = {}, 0

    def get_num_unfinished_requests(self):
        return len(self.running)

    def add_request(self, request_id, prompt, params):
        self.running[request_id] = [prompt, params.max_tokens]
        self.most = max(self.most, len(self.running))

    def step(self):
        for each in self.running.values():
            each[1] -= 1
        ended = [request_id for request_id, (_, left) in self.running.items() if not left]
        return [Output(request_id, self.running.pop(request_id)[0]) for request_id in ended]


class Output:
    finished = True

    def __init__(self, request_id, prompt):
        self.request_id, self.prompt = request_id, prompt


def test_the_next_row_is_added_when_one_ends():
    from vllm import SamplingParams

    llm, lengths = SteppedLLM(), [5, 1, 9, 2, 2, 7, 1, 1]
    params = [SamplingParams(max_tokens=length) for length in lengths]
    outputs = plain._continuously(llm, list(range(8)), params, 3)
    assert [output.prompt for output in outputs] == list(range(8))
    assert llm.most == 3 and not llm.running


def test_weights_are_written_by_a_process_that_ends(smollm2, monkeypatch):
    """On a GPU it takes their memory with it."""

    def fail(*arguments, **named):
        raise AssertionError("the weights are in this process")

    monkeypatch.setattr(random_model.AutoModelForCausalLM, "from_config", fail)
    with random_model.of_shape(str(smollm2), "tiny") as folder:
        config = random_model.LlamaConfig.from_pretrained(folder)
    assert config.hidden_size == random_model.SHAPES["tiny"].hidden_size


def test_engines_do_not_start_beside_memory_of_the_caller(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 15 << 30)
    with pytest.raises(AssertionError, match="holds memory of the GPU"):
        plain.PlainVLLM("nothing")


def test_gpus_are_named_by_a_process_that_ends(monkeypatch):
    """Points are written while engines run: the benchmark's own process has no context of CUDA's beside them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", None)
    machine.gpu_names.cache_clear()
    assert machine.gpu_names() == []  # as many as that process sees
    machine.gpu_names.cache_clear()
