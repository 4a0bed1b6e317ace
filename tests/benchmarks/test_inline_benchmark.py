"""`python -m benchmarks.inline` on a CPU, with a tiny shape."""

import json
import subprocess
import sys

import pytest
from conftest import CHECKOUT, DEMO_ROWS


@pytest.mark.long
def test_greedy_inline_and_the_pool_are_measured_on_the_same_rows(smollm2, tmp_path):
    """More rows than there are in the file."""
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.inline", "--model", str(smollm2), "--input", str(DEMO_ROWS)]
    command += ["--shape", "tiny", "--runs", "1", "--eager", "--pool", "--json", str(output)]
    command += ["--rows", "30", "--new", "8", "--prompt", "0"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert (result["model"], result["own_process"]) == ("tiny", False)
    (point,) = result["points"]
    assert (point["rows"], point["new"], point["prompt"]) == (30, 8, 0)
    for name in ("", "_decoding", "_prompts"):
        ratio = point[f"inline{name}"] / point[f"greedy{name}"]
        assert point[f"ratio{name}"] == pytest.approx(ratio) and ratio > 0
    assert 0 < point["guided_share"] < 1 and point["pool"] > 0
