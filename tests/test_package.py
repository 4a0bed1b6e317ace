"""How the package is laid out for its users: `kernels` exists as `agd_vllm.kernels` only."""

import os
import subprocess
import sys

import pytest
from conftest import CHECKOUT

PROGRAM = """
import importlib.metadata, importlib.util
import agd_vllm.kernels.gate
spec = importlib.util.find_spec("kernels")
# In the checkout the bare folder may be seen, as a namespace without a file, which is nobody's package.
assert spec is None or spec.origin is None, spec
assert "kernels" not in importlib.metadata.packages_distributions()
from transformers.utils import is_kernels_available
assert not is_kernels_available()
"""


@pytest.mark.parametrize("where", ["checkout", "elsewhere", "path"])
def test_kernels_are_part_of_the_package_and_no_module_of_their_own(tmp_path, where):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if where == "path":
        environment["PYTHONPATH"] = str(CHECKOUT)
    folder = CHECKOUT if where == "checkout" else tmp_path
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
