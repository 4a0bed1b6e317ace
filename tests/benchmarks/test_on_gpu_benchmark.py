"""`python -m benchmarks.on_gpu`: its stages' limits and files by commands of a moment, and the whole of it on a CPU."""

import json
import os
import re
import subprocess
import sys
import time

import psutil
import pytest
from click.testing import CliRunner
from conftest import CHECKOUT, DEMO_ROWS

from benchmarks import on_gpu
from benchmarks.on_gpu import Stage

WRITES = '{python} -c "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])" {scratch}/found.json'
SLEEPS = "{python} -c 'import time; time.sleep(60)'"


@pytest.fixture
def run(tmp_path):
    """Runs stages; gives whether all went well, and their JSONs."""

    def run(stages, done=None, budget=100.0, model=lambda: "weights"):
        for name in ("out", "scratch"):
            (tmp_path / name).mkdir(exist_ok=True)
        words = {"python": sys.executable, "input": str(DEMO_ROWS), "scratch": str(tmp_path / "scratch")}
        arguments = (tmp_path / "out", done, budget, model, dict(os.environ), {"device": "none", "model": "tiny"})
        well = on_gpu.run_all(stages, *arguments, **words)
        return well, {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}

    return run


def test_a_stage_writes_what_its_command_found(run):
    well, found = run([Stage("one", 30, (WRITES + " '[1]'", WRITES.replace("found", "other") + " 2"), "found.json")])
    assert well and list(found) == ["one"]
    one = found["one"]
    assert (one["stage"], one["ok"], one["timed_out"], one["exits"]) == ("one", True, False, [0, 0])
    assert (one["device"], one["model"], one["limit"], one["result"], one["output"]) == ("none", "tiny", 30, [1], None)
    assert 0 < one["seconds"] < 30 and one["commands"][1].startswith("python -c ")


def test_after_a_stage_that_fails_the_next_one_goes_on(run):
    fails = Stage("fails", 30, (WRITES + " 3", "{python} -c 'print(7); raise SystemExit(4)'"), "found.json")
    well, found = run([fails, Stage("next", 30, ("{python} -c 'print(8)'",))])
    assert not well
    assert (found["fails"]["ok"], found["fails"]["exits"], found["fails"]["result"]) == (False, [0, 4], 3)
    assert found["fails"]["output"] == [[], ["7"]]
    assert found["next"]["ok"] and found["next"]["result"] == [["8"]]


def test_by_its_limit_a_stage_is_ended_with_all_below_it(run, tmp_path):
    """What it had written stays, and its children are gone, one of them in a session of its own."""
    program = tmp_path / "starts.py"
    program.write_text(
        "import pathlib, subprocess, sys, time\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "pids = [subprocess.Popen(command, start_new_session=apart).pid for apart in (False, True)]\n"
        "pathlib.Path(sys.argv[1]).write_text(str(pids))\n"
        "time.sleep(60)\n"
    )
    stages = [Stage("slow", 3, (f"{{python}} {program} {{scratch}}/found.json", "{python} -c pass"), "found.json")]
    begun = time.monotonic()
    well, found = run([*stages, Stage("next", 30, ("{python} -c pass",))])
    assert not well and time.monotonic() - begun < 20
    slow = found["slow"]
    assert (slow["ok"], slow["timed_out"], slow["exits"]) == (False, True, [None, 0])
    assert len(slow["result"]) == 2
    for pid in slow["result"]:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert found["next"]["ok"]


def test_a_stage_that_does_not_fit_is_not_begun(run, capsys):
    well, found = run([Stage("long", 101, (SLEEPS,)), Stage("short", 30, ("{python} -c pass",))])
    assert well and list(found) == ["short"]
    assert "long: not begun, its limit is 101 s and 100 s are left" in capsys.readouterr().out


def test_weights_are_written_for_the_first_stage_that_reads_them(run):
    """Not for one that does not fit; and what that takes counts."""
    asked = []

    def model():
        asked.append(len(asked))
        time.sleep(0.5)
        return "weights"

    reads = "{python} -c 'import sys; print(sys.argv[1])' {model}"
    _, found = run([Stage("long", 101, (reads,)), Stage("just", 99.9, (reads,))], model=model)
    assert asked == [0] and found == {}
    _, found = run([Stage("without", 9, (SLEEPS.replace("60", "0"),)), Stage("reads", 9, (reads,))], model=model)
    assert asked == [0, 1] and found["reads"]["result"] == [["weights"]]


def test_what_was_done_before_is_not_run_again(run, tmp_path):
    (tmp_path / "before").mkdir()
    (tmp_path / "before/one.json").write_text("{}")
    stages = [Stage("one", 30, (SLEEPS,)), Stage("two", 30, ("{python} -c pass",))]
    well, found = run(stages, done=tmp_path / "before")
    assert well and list(found) == ["two"]


def test_stages_are_listed_with_limits_and_commands(tmp_path):
    common = ["--model", str(tmp_path), "--input", str(DEMO_ROWS), "--out", str(tmp_path / "out"), "--list"]
    done = CliRunner().invoke(on_gpu.main, [*common, "--shape", "tiny"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    limits = {"smoke": 60, "kernel-tests": 180, "pool": 160, "inline": 400, "workers": 200, "throughput": 300}
    assert [line for line in lines if not line.startswith(" ")] == [f"{name}, {s} s" for name, s in limits.items()]
    assert sum("-m pytest" in line for line in lines) == 4
    assert any("benchmarks.inline --model tiny" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_kernel_tests_are_shared_out():
    """To three processes: each has some, none is in two."""
    (stage,) = (stage for stage in on_gpu.stages_of("cuda") if stage.name == "kernel-tests")
    first, second, rest = (command[-1] for command in stage.filled(python="python")[:3])
    assert rest == f"not {first} and not {second}"
    names = re.findall(r"^def (test_\w+)", (CHECKOUT / "tests/test_on_gpu.py").read_text(), re.MULTILINE)
    shares = [[name for name in names if word in name] for word in (first, second)]
    assert all(shares) and not set(shares[0]) & set(shares[1]) and len(names) > len(shares[0] + shares[1])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_on_a_cpu_the_whole_runs_with_a_tiny_shape(smollm2, tmp_path):
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--model", str(smollm2), "--input", str(DEMO_ROWS)]
    command += ["--shape", "tiny", "--out", str(tmp_path), "--budget", "3000"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = {stage.name: json.loads((tmp_path / f"{stage.name}.json").read_text()) for stage in on_gpu.stages_of("cpu")}
    assert {(each["ok"], each["model"], each["device"]) for each in found.values()} == {(True, "tiny", "CPU")}
    # Of this machine's paths they hold none.
    assert not any(str(path) in json.dumps(found) for path in (CHECKOUT, smollm2, sys.executable))
    results = {name: each["result"] for name, each in found.items()}
    assert results["smoke"]["versions"]["vllm"]
    assert all("skipped" in line for (line,) in results["kernel-tests"])
    assert (results["pool"]["decoded"], results["pool"]["output_tokens"]) == (4, 4 * 8)
    check_inline(results["inline"])
    assert [point["steps"] for point in results["workers"]["points"]] == [1, 2]
    assert results["throughput"]["tokens_per_second"].keys() == {"greedy", "agd"}
    assert {results[name]["model"] for name in ("pool", "inline", "workers", "throughput")} == {"tiny"}


def check_inline(result) -> None:
    """Greedy, inline and the pool are measured on the same rows."""
    assert result["own_process"] is False
    point, continuous = result["points"]
    assert (point["rows"], point["new"], point["prompt"]) == (30, 8, 0)
    assert (point["side_by_side"], point["lengths"]) == (30, [8, 8])
    for name in ("", "_decoding", "_prompts"):
        ratio = point[f"inline{name}"] / point[f"greedy{name}"]
        assert point[f"ratio{name}"] == pytest.approx(ratio) and ratio > 0
    assert 0 < point["guided_share"] < 1 and point["pool"] > 0
    assert (continuous["rows"], continuous["side_by_side"], continuous["lengths"]) == (12, 5, [8, 32])
    assert continuous["ratio"] == pytest.approx(continuous["inline"] / continuous["greedy"])
    assert 0 < continuous["guided_share"] < 1
    assert {continuous[name] for name in ("new", "ratio_decoding", "ratio_prompts", "pool")} == {None}
