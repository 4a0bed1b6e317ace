"""A model that vLLM loads and cannot run: the run ends at once with vLLM's own reason, and no row is to blame."""

import json
import time

import pytest
from chaos import ChaosRun
from tiny_smollm2 import save


@pytest.fixture(scope="module")
def heads_of_16(smollm2, tmp_path_factory):
    """vLLM has no attention of this head size on a CPU, which shows at the first token."""
    return save(smollm2, tmp_path_factory.mktemp("heads of 16"), heads=8)


@pytest.mark.parametrize("strategy", ["greedy", pytest.param("agd", marks=pytest.mark.long)])
def test_the_run_ends_at_the_first_engine_with_vllms_reason(heads_of_16, tmp_path, strategy):
    run = ChaosRun(heads_of_16, tmp_path / "run", 12, "--strategy", strategy)
    begun = time.monotonic()
    assert run.start().wait() == 1, run.log()
    assert time.monotonic() - begun < 150
    line = run.log().splitlines()[-1]
    print(line)
    assert line.startswith("agd-vllm: an engine could not start: at its first steps vLLM's engine died: ")
    assert "head" in line.split("died: ")[1]
    assert "agd_vllm." not in run.log()
    assert not (run.output / "errors.jsonl").exists() or not (run.output / "errors.jsonl").read_text()
    assert json.loads((run.output / "summary.json").read_text())["rows"] == 0
