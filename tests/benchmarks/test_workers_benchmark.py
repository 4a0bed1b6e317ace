"""The benchmark of calls to an attribution worker, on a few points of the demo model."""

import json
import subprocess
import sys

from conftest import CHECKOUT


def test_calls_are_measured_beside_their_bounds(tmp_path, smollm2):
    output = tmp_path / "workers.json"
    sizes = ["--steps", "1,5,1000000", "--tokens", "2", "--contexts", "40"]
    command = [sys.executable, "-m", "benchmarks.workers", "--json", str(output), "--model", str(smollm2), *sizes]
    done = subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True, timeout=200)
    *points, unfit = json.loads(output.read_text())["points"]
    assert [(point["steps"], point["tokens"], point["context"]) for point in points] == [(1, 2, 40), (5, 2, 40)]
    for point in points:
        assert 0 < point["host_milliseconds"] < point["milliseconds"]
        assert point["bytes_bound"] > 0 and point["operations_bound"] > 0
    # 106 million weights in two bytes, and K, V, K', V' of 42 tokens: 30 layers, 3 heads of 64.
    read = [106_168_320 * 2 + steps * 42 * 30 * 3 * 64 * 4 * 2 for steps in (1, 5)]
    assert points[1]["bytes_bound"] / points[0]["bytes_bound"] == read[1] / read[0]
    assert list(unfit.values()) == [1_000_000, 2, 40, None, None, None, None]
    assert "1000000 steps at 40 tokens do not fit the memory" in done.stderr
