"""`python -m benchmarks.inline` on a CPU, with a tiny shape."""

import json
import subprocess
import sys

import pytest
from conftest import CHECKOUT, DEMO_ROWS


@pytest.mark.long
def test_greedy_inline_and_the_pool_are_measured_on_the_same_rows(smollm2, tmp_path):
    """More rows than there are in the file, one point with tokens before its prompts."""
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.inline", "--model", str(smollm2), "--input", str(DEMO_ROWS)]
    command += ["--shape", "tiny", "--runs", "1", "--eager", "--pool", "--json", str(output)]
    for rows, new, prompt in ((30, 8, 0), (3, 4, 50)):
        command += ["--rows", f"{rows}", "--new", f"{new}", "--prompt", f"{prompt}"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert (result["model"], result["own_process"]) == ("tiny", False)
    many, few = result["points"]
    assert [(each["rows"], each["new"], each["prompt"]) for each in (many, few)] == [(30, 8, 0), (3, 4, 50)]
    for each in (many, few):
        for name in ("", "_decoding", "_prompts"):
            ratio = each[f"inline{name}"] / each[f"greedy{name}"]
            assert each[f"ratio{name}"] == pytest.approx(ratio) and ratio > 0
        assert 0 < each["guided_share"] < 1
    assert many["pool"] > 0 and few["pool"] is None
