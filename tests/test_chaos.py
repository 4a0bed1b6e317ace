"""Three kills in one run (`make chaos` has thirty): nothing lost, twice, changed or left behind."""

import pytest
from chaos import unleash


@pytest.mark.timeout(900)
def test_a_run_survives_the_death_of_each_part(smollm2, tmp_path):
    result = unleash(smollm2, tmp_path, ["driver", "worker", "actor"], rows=30, seed=0)
    assert not result["kills_left"]
    assert result["launches"] == 2
    assert result["faults"]["worker_restarts"] >= 1
    assert result["faults"]["engine_restarts"] >= 1
