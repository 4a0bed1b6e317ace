"""A local Ray where the home folder cannot be written to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agd_vllm.pipeline import ray_token

# Nobody, not even root, can make a folder there.
NO_HOME = "/proc/none"


@pytest.fixture
def environment(monkeypatch):
    for name in ray_token.GIVEN:
        monkeypatch.setenv(name, "")
    return monkeypatch


def test_without_a_home_the_token_lies_where_only_the_user_reads_it(environment):
    environment.setenv("HOME", NO_HOME)
    ray_token.provide_token()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert len(token.read_text()) == 64
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize("name", ray_token.GIVEN)
def test_a_token_that_was_given_stays(environment, name):
    environment.setenv("HOME", NO_HOME)
    environment.setenv(name, "mine")
    ray_token.provide_token()
    assert [os.environ[each] for each in ray_token.GIVEN if os.environ[each]] == ["mine"]


def test_a_home_that_serves_is_left_to_ray(environment, tmp_path):
    environment.setenv("HOME", str(tmp_path))
    ray_token.provide_token()
    assert not os.environ["RAY_AUTH_TOKEN_PATH"]


def test_a_local_ray_starts_without_a_home():
    code = (
        "import ray\n"
        "from agd_vllm.pipeline.placement import connect, _stop_ray\n"
        "from agd_vllm.pipeline.teams import Demand\n"
        "connect(Demand(1, 0, 1), debug=False); print(ray.get(ray.remote(num_cpus=0)(lambda: 7).remote())); _stop_ray()"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"HOME": NO_HOME}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "7", done.stderr[-2000:]
