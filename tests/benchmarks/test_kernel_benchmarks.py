"""The benchmarks that wait for a GPU run on a CPU, on small shapes."""

import itertools
import json
import os
import subprocess
import sys

from conftest import CHECKOUT
from transformers import LlamaConfig

from benchmarks import attribution, random_model


def test_kernels_are_interpreted_on_small_shapes(tmp_path):
    output = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "benchmarks.kernels", "--json", str(output)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=CHECKOUT, env=environment, check=True, capture_output=True, timeout=120)
    result = json.loads(output.read_text())
    assert result["device"].startswith("interpreter")
    assert {point["kernel"] for point in result["points"]} == {
        "gate",
        "gate twin",
        "dual attention prefill",
        "dual attention decode",
        *(f"{name}{twin}" for name in ("rms norm", "gated product") for twin in ("", " twin")),
    }
    for point in result["points"]:
        assert set(point) == {"kernel", "shape", "dtype", "seconds", "bound_seconds", "ratio"}
        assert point["ratio"] == point["seconds"] / point["bound_seconds"] > 0


def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kernels", "--json", str(tmp_path / "kernels.json")]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "Error: there is no NVIDIA GPU; TRITON_INTERPRET=1 runs the kernels on a CPU, to try them\n"


def test_a_guided_step_is_measured_with_random_weights(tmp_path):
    """Reverse mode is left out: it would patch the classes of this process."""
    small = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2000,
    )
    model = random_model.write(small, tmp_path / "small")
    points = list(attribution.points(str(model), [64, 128], [], [1], "bfloat16"))
    assert [(point["context"], point["scorer"]) for point in points] == [
        (64, "forward-full"),
        (64, "forward-cached"),
        (128, "forward-full"),
        (128, "forward-cached"),
    ]
    assert all(point["seconds"] > 0 for point in points)


def test_slow_first_runs_do_not_count(monkeypatch):
    times = iter([9.0, 1.0, 0.11, 0.1, 0.1, 0.3, 0.12])
    monkeypatch.setattr(attribution, "_seconds", lambda step: next(times))
    monkeypatch.setattr(attribution, "_reset_peak", lambda: None)
    measured = attribution.measure(lambda: None, 3)
    assert (measured.seconds, measured.fastest, measured.slowest, measured.repeats) == (0.12, 0.1, 0.3, 3)


def test_runs_that_never_agree_are_warmed_up_for_a_while_only(monkeypatch):
    times = itertools.cycle([1.0, 2.0])
    runs = []
    monkeypatch.setattr(attribution, "_seconds", lambda step: runs.append(next(times)) or runs[-1])
    attribution.warm_up(lambda: None)
    assert len(runs) == attribution.WARM_UPS


def test_what_did_not_fit_has_no_ratio():
    def point(context, scorer, seconds, peak):
        return {"context": context, "batch": 1, "scorer": scorer, "seconds": seconds, "peak_bytes": peak}

    measured = [
        point(512, "lxt", 2.0, 900),
        point(4096, "lxt", None, None),
        point(512, "forward-cached", 0.02, 90),
        point(4096, "forward-cached", 0.04, 200),
    ]
    assert attribution.ratios(measured) == {
        "lxt_over_cached_512": 100.0,
        "lxt_peak_over_cached_512": 10.0,
        "cached_growth": 2.0,
    }
